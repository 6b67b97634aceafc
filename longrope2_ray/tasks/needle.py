"""Needle documents: synthetic long documents of which the answer alone is scored.

A sample is exactly ``length`` tokens: BOS, instruction, needle, a real document, question, answer
(LongRoPE2 Sec. 3.2, App. C; the texts are those of RULER).
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np

from longrope2_ray.tasks.books import Book

INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}.\n"
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that tasks use."""

    bos_token_id: int | None

    def encode(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...


@dataclass(frozen=True)
class NeedleSample:
    """One scored document.

    Attributes:
        input_ids: (T,) int64 tokens, T exactly the target length, the answer at their end.
        answer_span: (start, stop) of the tokens that are scored, the answer's unless the whole
            document is; ``stop == len(input_ids)``.
        depth: where the needle stands in the document, 0 its start, 1 its end.
        key: the adjective-noun that the question asks for.
        value: its seven digits.
        book: the name of the document's book.
        position_ids: (T,) int64 positions, rising; None for 0 ... T - 1. Where they jump, document
            tokens were left out (``skipped``).
        attention_share: what the attention factor is multiplied by where the document is scored;
            1 unless tokens were left out (``search.cascade.attention_share``).
    """

    input_ids: np.ndarray
    answer_span: tuple[int, int]
    depth: float
    key: str
    value: str
    book: str
    position_ids: np.ndarray | None = None
    attention_share: float = 1.0

    @cached_property
    def id(self) -> str:
        """Sixteen hex digits that change with anything that its score depends on."""
        return hashlib.sha256(self._content).hexdigest()[:16]

    def scored_whole(self) -> "NeedleSample":
        """Return the document with every token but the first scored (Table 6's ablation)."""
        return replace(self, answer_span=(1, len(self.input_ids)))

    @property
    def _content(self) -> bytes:
        content = self.input_ids.astype("<i8").tobytes() + repr(self.answer_span).encode()
        if self.position_ids is not None:
            content += self.position_ids.astype("<i8").tobytes()
        if self.attention_share != 1:
            content += repr(self.attention_share).encode()
        return content


def needle_fingerprint(samples: Sequence[NeedleSample]) -> str:
    """Return sixteen hex digits that change with any token or answer position of a set."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample._content)
    return digest.hexdigest()[:16]


@cache
def _words() -> tuple[list[str], list[str]]:
    """Return the adjectives and the nouns of wonderwords, those of small ASCII letters alone."""
    from wonderwords import RandomWord

    words = RandomWord()
    adjectives, nouns = (
        sorted(
            w
            for w in words.filter(include_parts_of_speech=[part])
            if w.isalpha() and w.isascii() and w.islower()
        )
        for part in ("adjectives", "nouns")
    )
    return adjectives, nouns


def draw_key(rng: random.Random) -> str:
    """Draw an adjective-noun such as ``numerous-kite``."""
    adjectives, nouns = _words()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def draw_value(rng: random.Random) -> str:
    """Draw seven digits, the first not zero."""
    return str(rng.randrange(1_000_000, 10_000_000))


def encode_answer(tokenizer: Tokenizer, question: str, value: str) -> tuple[list[int], list[int]]:
    """Encode question and answer apart.

    Their tokens one after the other decode to ``question + " " + value``: with some tokenizers the
    answer needs its space before it, others add it by themselves.

    Raises:
        ValueError: if no way of encoding the answer round-trips through this tokenizer.
    """
    question_ids = tokenizer.encode(question, add_special_tokens=False)
    for text in (f" {value}", value):
        answer_ids = tokenizer.encode(text, add_special_tokens=False)
        decoded = tokenizer.decode(question_ids + answer_ids, clean_up_tokenization_spaces=False)
        if decoded.strip() == f"{question} {value}".strip():
            return question_ids, answer_ids
    raise ValueError(
        f"model.path: expected a tokenizer that gives the answer back, but 'is {value}' came back "
        f"as {decoded[-len(value) - 4 :]!r}; needle samples can't be built with this tokenizer"
    )


def build_sample(
    tokenizer: Tokenizer,
    document_ids: Sequence[int],
    *,
    length: int,
    key: str,
    value: str,
    depth: float,
    book: str = "",
    section: str = "needles",
    num_tokens: int | None = None,
) -> NeedleSample:
    """Build one sample of exactly ``length`` tokens around as much of the document as fits.

    Args:
        document_ids: tokens of the document.
        depth: where the needle stands in it, 0 its start, 1 its end.
        num_tokens: [ours] tokens that are kept of them, at their positions; all unless given. Left
            out are the middles of the stretches before and after the needle, in proportion, so
            that needle and question keep their distance and their neighbors.
        book: the document's name, for messages.
        section: the recipe section that a message names.

    Raises:
        ValueError: if the document is too short for the length, or the length for the template.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    head = bos + tokenizer.encode(INSTRUCTION, add_special_tokens=False)
    needle = tokenizer.encode(NEEDLE.format(key=key, value=value), add_special_tokens=False)
    question, answer = encode_answer(tokenizer, QUESTION.format(key=key), value)
    room = length - len(head) - len(needle) - len(question) - len(answer)
    if room < 0:
        field = "report.lengths" if section == "report" else "search.target_length"
        raise ValueError(
            f"{field}: expected at least {length - room} tokens (instruction, needle, question and "
            f"answer of this tokenizer), got {length}"
        )
    if len(document_ids) < room:
        raise ValueError(
            f"{section}.text: expected a document of {room} tokens for a target length of "
            f"{length}, got {len(document_ids)} in {book or 'the text'}; add longer text"
        )
    document = list(document_ids[:room])
    cut = round(depth * room)
    ids = np.asarray(
        head + document[:cut] + needle + document[cut:] + question + answer, dtype=np.int64
    )
    sample = NeedleSample(ids, (length - len(answer), length), depth, key, value, book)
    if num_tokens is None or num_tokens >= length:
        return sample
    after = len(head) + cut + len(needle)
    return _skipped(sample, [(len(head), cut), (after, room - cut)], num_tokens)


def _skipped(
    sample: NeedleSample, stretches: Sequence[tuple[int, int]], num_tokens: int
) -> NeedleSample:
    """Return a sample without the middles of its document's stretches, in proportion to them.

    Args:
        stretches: (start, size) of the document's tokens before and after the needle.
        num_tokens: tokens that are kept.

    Raises:
        ValueError: if more would have to go than the document has.
    """
    length, room = len(sample.input_ids), sum(size for _, size in stretches)
    dropped = length - num_tokens
    if dropped > room:
        raise ValueError(
            f"search.skipped_tokens: expected at least {length - room} tokens (instruction, "
            f"needle, question and answer of this tokenizer), got {num_tokens}"
        )
    (_, size), before = stretches[0], 0
    if room:
        before = round(dropped * size / room)
    middles = [
        _middle(*stretch, count)
        for stretch, count in zip(stretches, (before, dropped - before), strict=True)
    ]
    positions = np.delete(np.arange(length), np.concatenate(middles))
    start, stop = (end - dropped for end in sample.answer_span)
    return replace(
        sample,
        input_ids=sample.input_ids[positions],
        answer_span=(start, stop),
        position_ids=positions,
    )


def _middle(start: int, size: int, count: int) -> np.ndarray:
    """Return the ``count`` positions in the middle of ``size`` ones from ``start`` on."""
    first = start + (size - count) // 2
    return np.arange(first, first + count)


def build_needle_set(
    tokenizer: Tokenizer,
    books: Sequence[Book],
    *,
    length: int,
    num_samples: int,
    seed: int,
    depth: str | float | Sequence[float] = "start",
    section: str = "needles",
    num_tokens: int | None = None,
) -> list[NeedleSample]:
    """Build samples from different books, as far as there are enough, all drawn from ``seed``.

    Args:
        length: tokens of each sample.
        depth: ``start`` (the paper), ``stratified`` (evenly over 0 ... 1, as the authors' code
            does), a fixed number in 0 ... 1, or several, which the samples take in turns.
        section: the recipe section that a message names.
        num_tokens: tokens kept of each sample, as for ``build_sample``.

    Raises:
        ValueError: if no book is long enough, or the tokenizer does not give an answer back.
    """
    if not books:
        raise ValueError(f"{section}.text: expected at least one book, got none")
    rng = random.Random(f"needles/{seed}")
    shuffled = list(books)
    rng.shuffle(shuffled)
    long_books = _cycle_long_books(tokenizer, shuffled, length, section)
    samples = []
    for index, (book, ids) in zip(range(num_samples), long_books, strict=False):
        start = rng.randrange(len(ids) - length + 1)
        sample = build_sample(
            tokenizer,
            ids[start : start + length],
            length=length,
            key=draw_key(rng),
            value=draw_value(rng),
            depth=_depth_of_sample(depth, index, num_samples),
            book=book.name,
            section=section,
            num_tokens=num_tokens,
        )
        samples.append(sample)
    return samples


def encode_book(tokenizer: Tokenizer, book: Book) -> list[int]:
    """Encode a whole book, which takes up to seconds; its text makes no special tokens."""
    return tokenizer.encode(book.text, add_special_tokens=False, split_special_tokens=True)


def _cycle_long_books(
    tokenizer: Tokenizer, books: Sequence[Book], length: int, section: str
) -> Iterator[tuple[Book, list[int]]]:
    """Yield the books of at least ``length`` tokens with their tokens, over and over.

    No book is encoded before it is its turn.

    Raises:
        ValueError: naming the text of the recipe's ``section``, if no book is long enough.
    """
    long_books = []
    longest = 0
    for book in books:
        ids = encode_book(tokenizer, book)
        longest = max(longest, len(ids))
        if len(ids) >= length:
            long_books.append((book, ids))
            yield book, ids
    if not long_books:
        raise ValueError(
            f"{section}.text: expected at least one book of {length} tokens (the target length), "
            f"the longest of {len(books)} has {longest}; add longer text or lower "
            f"search.target_length"
        )
    while True:
        yield from long_books


def _depth_of_sample(depth: str | float | Sequence[float], index: int, num_samples: int) -> float:
    """Return the depth of the needle in one of ``num_samples`` samples."""
    if depth == "start":
        return 0.0
    if depth == "stratified":
        return index / max(num_samples - 1, 1)
    if isinstance(depth, str | float | int):
        return float(depth)
    return float(depth[index % len(depth)])
