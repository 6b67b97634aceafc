"""Needle documents: the synthetic long data whose answers alone are scored (LongRoPE2 Sec. 3.2, App. C).

A sample is exactly ``length`` tokens: BOS, instruction, needle, a real document, question, answer.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
    """The part of a transformers tokenizer that is used here."""

    bos_token_id: int | None

    def encode(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...


@dataclass(frozen=True)
class NeedleSample:
    """One scored document.

    Attributes:
        input_ids: (T,) int64, T exactly the target length, the answer at its end.
        answer_span: (start, stop) of the answer's tokens; ``stop == len(input_ids)``.
        depth: where the needle stands in the document, 0 its start, 1 its end.
        key: the adjective-noun asked for.
        value: its seven digits.
        book: the name of the document's book.
    """

    input_ids: np.ndarray
    answer_span: tuple[int, int]
    depth: float
    key: str
    value: str
    book: str


@cache
def _words() -> tuple[list[str], list[str]]:
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
    """An adjective-noun such as ``numerous-kite``."""
    adjectives, nouns = _words()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def draw_value(rng: random.Random) -> str:
    """Seven digits, the first not zero."""
    return str(rng.randrange(1_000_000, 10_000_000))


def encode_answer(tokenizer: Tokenizer, question: str, value: str) -> tuple[list[int], list[int]]:
    """Question and answer encoded apart, such that their concatenation decodes to ``question + " " + value``.

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
        f"model.path: expected a tokenizer that gives the answer back, but 'is {value}' came back as "
        f"{decoded[-len(value) - 4 :]!r}; needle samples can't be built with this tokenizer"
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
) -> NeedleSample:
    """One sample of exactly ``length`` tokens around as much of ``document_ids`` as fits.

    Raises:
        ValueError: if the document is too short for the length, or the length too short for the template.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    head = bos + tokenizer.encode(INSTRUCTION, add_special_tokens=False)
    needle = tokenizer.encode(NEEDLE.format(key=key, value=value), add_special_tokens=False)
    question, answer = encode_answer(tokenizer, QUESTION.format(key=key), value)
    room = length - len(head) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(
            f"{'report.lengths' if section == 'report' else 'search.target_length'}: expected at least {length - room} tokens (instruction, needle, question and answer "
            f"of this tokenizer), got {length}"
        )
    if len(document_ids) < room:
        raise ValueError(f"{section}.text: expected a document of {room} tokens for a target length of {length}, "
                         f"got {len(document_ids)} in {book or 'the text'}; add longer text")  # fmt: skip
    document = list(document_ids[:room])
    cut = round(depth * room)
    ids = head + document[:cut] + needle + document[cut:] + question + answer
    return NeedleSample(
        np.asarray(ids, dtype=np.int64), (length - len(answer), length), depth, key, value, book
    )


def build_needle_set(
    tokenizer: Tokenizer,
    books: Sequence[Book],
    *,
    length: int,
    num_samples: int,
    seed: int,
    depth: str | float = "start",
    section: str = "needles",
) -> list[NeedleSample]:
    """``num_samples`` documents from different books (as far as there are enough), all drawn from ``seed``.

    Args:
        depth: ``start`` (the paper), ``stratified`` (evenly over 0 ... 1, as the authors' code does), or a fixed
            number in 0 ... 1.
        section: of the recipe, for messages.

    Raises:
        ValueError: if no book is long enough, or the tokenizer does not give an answer back.
    """
    if not books:
        raise ValueError(f"{section}.text: expected at least one book, got none")
    rng = random.Random(f"needles/{seed}")
    order = list(range(len(books)))
    rng.shuffle(order)
    encoded: dict[int, list[int]] = {}
    longest = 0

    def ids_of(index: int) -> list[int]:
        if index not in encoded:
            encoded[index] = tokenizer.encode(
                books[index].text, add_special_tokens=False, split_special_tokens=True
            )
        return encoded[index]

    samples: list[NeedleSample] = []
    turn = 0
    while len(samples) < num_samples:
        if not order:
            raise ValueError(
                f"{section}.text: expected at least one book of {length} tokens (the target length), "
                f"the longest of {len(books)} has {longest}; add longer text or lower search.target_length"
            )
        index = order[turn % len(order)]
        ids = ids_of(index)
        longest = max(longest, len(ids))
        if len(ids) < length:
            order.remove(index)
            continue
        turn += 1
        position = len(samples)
        where = {"start": 0.0, "stratified": position / max(num_samples - 1, 1)}.get(str(depth))
        start = rng.randrange(len(ids) - length + 1)
        samples.append(
            build_sample(
                tokenizer,
                ids[start : start + length],
                length=length,
                key=draw_key(rng),
                value=draw_value(rng),
                depth=float(depth) if where is None else where,
                book=books[index].name,
                section=section,
            )
        )
    return samples


def needle_fingerprint(samples: Sequence[NeedleSample]) -> str:
    """Sixteen hex digits that change with any token or answer position of the set."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.input_ids.astype("<i8").tobytes())
        digest.update(repr(sample.answer_span).encode())
    return digest.hexdigest()[:16]
