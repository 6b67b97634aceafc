import dataclasses
import pickle
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longrope2_ray.tasks.books import Book
from longrope2_ray.tasks.needle import (
    INSTRUCTION,
    NEEDLE,
    QUESTION,
    NeedleSample,
    build_needle_set,
    build_sample,
    draw_key,
    draw_value,
    encode_answer,
    needle_fingerprint,
)

SENTENCES = [
    INSTRUCTION
    + NEEDLE.format(key="numerous-kite", value=6716097)
    + QUESTION.format(key="numerous-kite")
    + " 6716097",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, 0123456789",
    "Fellow citizens of the Senate and of the House of Representatives, the state of the union is "
    "1898 and 42.",
]
LENGTH = 700


def wrapped(backend: Backend, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=True, **special
    )


def byte_level(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama-3's and SmolLM2's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return wrapped(backend, bos_token=bos) if bos else wrapped(backend)


def byte_fallback(**replaced: Any) -> Backend:
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    for part, value in replaced.items():
        setattr(backend, part, value)
    alphabet = sorted({*"".join(SENTENCES), "▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def metaspace() -> PreTrainedTokenizerFast:
    """As newer conversions of sentencepiece: a word mark is put before the first word."""
    return wrapped(
        byte_fallback(
            pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoder=decoders.Sequence(
                [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
            ),
        ),
        bos_token="<s>",
        unk_token="<unk>",
    )


def prepending() -> PreTrainedTokenizerFast:
    """As Llama-2's and Phi-3's: every text gets a word mark before it."""
    return wrapped(
        byte_fallback(
            normalizer=normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            ),
            decoder=decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            ),
        ),
        bos_token="<s>",
        unk_token="<unk>",
    )


TOKENIZERS = {
    "byte level": byte_level(),
    "byte level without BOS": byte_level(bos=None),
    "metaspace": metaspace(),
    "prepending": prepending(),
}
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))
GPT = TOKENIZERS["byte level"]


def book(name: str, words: int = 1500) -> Book:
    rng = random.Random(name)
    vocabulary = re.findall(r"[a-z]+", " ".join(SENTENCES))
    return Book(name, f"{name}: " + " ".join(rng.choice(vocabulary) for _ in range(words)))


BOOKS = [book(f"book{letter}") for letter in "ABCDE"]


def needle_set(tokenizer: Any = GPT, **changes: Any) -> list[NeedleSample]:
    arguments: dict[str, Any] = {"length": LENGTH, "num_samples": 5, "seed": 0, **changes}
    return build_needle_set(tokenizer, arguments.pop("books", BOOKS), **arguments)


@tokenizers
def test_a_sample_is_exactly_as_long_as_asked_and_ends_in_the_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for sample in needle_set(tokenizer):
        start, stop = sample.answer_span
        assert sample.input_ids.shape == (LENGTH,)
        assert sample.input_ids.dtype == np.int64
        assert stop == LENGTH
        assert tokenizer.decode(sample.input_ids[start:stop]).strip() == sample.value
        assert re.fullmatch(r"[1-9]\d{6}", sample.value)


@tokenizers
def test_the_end_of_a_sample_reads_as_question_and_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for sample in needle_set(tokenizer):
        text = tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)
        assert text.endswith(f"{QUESTION.format(key=sample.key)} {sample.value}")
        assert "is  " not in text[-20:], "two spaces before the answer"


@tokenizers
def test_the_needle_stands_once_after_the_instruction(tokenizer: PreTrainedTokenizerFast) -> None:
    for sample in needle_set(tokenizer):
        text = tokenizer.decode(
            sample.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        needle = NEEDLE.format(key=sample.key, value=sample.value).strip()
        assert text.count(needle) == 1
        assert text.strip().startswith(INSTRUCTION.strip())
        assert text.index(needle) - len(INSTRUCTION) <= 3
        assert text.count(sample.value) == 2


@tokenizers
def test_bos_stands_once_and_first_if_the_tokenizer_has_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for sample in needle_set(tokenizer):
        places = np.flatnonzero(sample.input_ids == tokenizer.bos_token_id).tolist()
        assert places == ([] if tokenizer.bos_token_id is None else [0])


@tokenizers
def test_encoded_apart_question_and_answer_read_as_one_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    question = QUESTION.format(key="numerous-kite")
    question_ids, answer_ids = encode_answer(tokenizer, question, "6716097")
    text = tokenizer.decode(question_ids + answer_ids, clean_up_tokenization_spaces=False)
    assert text.strip() == f"{question.strip()} 6716097"
    assert tokenizer.bos_token_id not in question_ids + answer_ids


def test_a_book_that_spells_a_special_token_adds_none() -> None:
    books = [Book("page", BOOKS[0].text.replace(" ", " <s> "))]
    for sample in needle_set(books=books, num_samples=2):
        assert np.flatnonzero(sample.input_ids == GPT.bos_token_id).tolist() == [0]


@pytest.mark.parametrize(
    ("depth", "num_samples", "depths"),
    [
        ("start", 3, [0.0, 0.0, 0.0]),
        ("stratified", 5, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("stratified", 1, [0.0]),
        (0.3, 2, [0.3, 0.3]),
        (1.0, 1, [1.0]),
        ([0.75], 2, [0.75, 0.75]),
        ([0.0, 0.5, 1.0], 5, [0.0, 0.5, 1.0, 0.0, 0.5]),
    ],
)
def test_the_needle_stands_where_depth_says(
    depth: str | float | list[float], num_samples: int, depths: list[float]
) -> None:
    samples = needle_set(depth=depth, num_samples=num_samples)
    assert [sample.depth for sample in samples] == depths
    head = 1 + len(GPT.encode(INSTRUCTION, add_special_tokens=False))
    for sample in samples:
        needle = GPT.encode(
            NEEDLE.format(key=sample.key, value=sample.value), add_special_tokens=False
        )
        question = GPT.encode(QUESTION.format(key=sample.key), add_special_tokens=False)
        room = sample.answer_span[0] - len(question) - head - len(needle)
        place = head + round(sample.depth * room)
        assert sample.input_ids[place : place + len(needle)].tolist() == needle


@settings(max_examples=30, deadline=None)
@given(length=st.integers(300, 1200), depth=st.floats(0, 1), name=st.sampled_from(list(TOKENIZERS)))
def test_the_document_is_a_stretch_of_the_book_around_the_needle(
    length: int, depth: float, name: str
) -> None:
    tokenizer, document = TOKENIZERS[name], list(range(300, 1500))
    sample = build_sample(
        tokenizer, document, length=length, key="big-kite", value="1234567", depth=depth
    )
    assert len(sample.input_ids) == length
    stretch = [id for id in sample.input_ids.tolist() if id in document]
    template = length - sample.answer_span[0]
    assert template > 0
    needle = tokenizer.encode(
        NEEDLE.format(key="big-kite", value="1234567"), add_special_tokens=False
    )
    question = tokenizer.encode(QUESTION.format(key="big-kite"), add_special_tokens=False)
    head = len(tokenizer.encode(INSTRUCTION, add_special_tokens=False)) + (
        tokenizer.bos_token_id is not None
    )
    room = length - head - len(needle) - len(question) - template
    body = sample.input_ids.tolist()[head : head + room + len(needle)]
    cut = round(depth * room)
    assert body[:cut] + body[cut + len(needle) :] == document[:room]
    assert len(stretch) >= room


def test_samples_come_from_different_books_while_there_are_enough() -> None:
    assert len({sample.book for sample in needle_set()}) == 5
    again = needle_set(num_samples=12)
    counts = [
        sum(sample.book == name for sample in again) for name in {sample.book for sample in again}
    ]
    assert sorted(counts) == [2, 2, 2, 3, 3]
    assert len({sample.input_ids.tobytes() for sample in again}) == 12


def test_books_that_are_too_short_are_passed_over() -> None:
    books = [book("short", 20), *BOOKS[:2], book("tiny", 3), BOOKS[2]]
    samples = needle_set(books=books, num_samples=3)
    assert {sample.book for sample in samples} == {"bookA", "bookB", "bookC"}


def test_keys_and_values_are_drawn_anew_for_each_sample() -> None:
    samples = needle_set()
    assert len({sample.key for sample in samples}) == len({sample.value for sample in samples}) == 5
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", sample.key) for sample in samples)


@settings(deadline=None)
@given(seed=st.integers())
def test_drawn_keys_are_adjective_and_noun_and_values_seven_digits(seed: int) -> None:
    rng = random.Random(seed)
    assert re.fullmatch(r"[a-z]+-[a-z]+", draw_key(rng))
    assert 1_000_000 <= int(draw_value(rng)) < 10_000_000


def test_the_same_seed_gives_the_same_tokens_and_fingerprint() -> None:
    one, two = needle_set(), needle_set()
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))
    assert needle_fingerprint(one) == needle_fingerprint(two)
    assert re.fullmatch(r"[0-9a-f]{16}", needle_fingerprint(one))


def test_more_samples_begin_with_the_fewer() -> None:
    fewer, more = needle_set(num_samples=3), needle_set(num_samples=5)
    assert all(
        np.array_equal(a.input_ids, b.input_ids) for a, b in zip(fewer, more[:3], strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"depth": 1.0}, {"length": LENGTH + 1}, {"num_samples": 4}, {"books": BOOKS[:3]},
     {"tokenizer": TOKENIZERS["metaspace"]}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_whatever_changes_the_tokens_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert needle_fingerprint(needle_set(**changes)) != needle_fingerprint(needle_set())


def test_one_token_and_one_answer_position_change_the_fingerprint() -> None:
    samples = needle_set(num_samples=1)
    known, (sample,) = needle_fingerprint(samples), samples
    ids = sample.input_ids.copy()
    ids[100] += 1
    touched = NeedleSample(
        ids, sample.answer_span, sample.depth, sample.key, sample.value, sample.book
    )
    shifted = NeedleSample(
        sample.input_ids,
        (sample.answer_span[0] - 1, LENGTH),
        sample.depth,
        sample.key,
        sample.value,
        sample.book,
    )
    assert len({known, needle_fingerprint([touched]), needle_fingerprint([shifted])}) == 3
    assert len({sample.id, touched.id, shifted.id}) == 3


def test_a_samples_id_is_that_of_its_content_alone() -> None:
    one, two = needle_set(num_samples=2)
    same = dataclasses.replace(one, depth=0.5, key="another-key", book="another book")
    assert same.id == one.id != two.id
    assert re.fullmatch(r"[0-9a-f]{16}", one.id)
    assert pickle.loads(pickle.dumps(one)).id == one.id


@settings(max_examples=30, deadline=None)
@given(kept=st.integers(300, LENGTH), depth=st.floats(0, 1), name=st.sampled_from(list(TOKENIZERS)))
def test_a_skipped_sample_is_the_whole_one_without_the_middles_of_its_document(
    kept: int, depth: float, name: str
) -> None:
    document = list(range(5000, 5000 + LENGTH))

    def sample(num_tokens: int | None) -> NeedleSample:
        return build_sample(
            TOKENIZERS[name],
            document,
            length=LENGTH,
            key="big-kite",
            value="1234567",
            depth=depth,
            num_tokens=num_tokens,
        )

    whole, skipped = sample(None), sample(kept)
    if kept == LENGTH:
        assert skipped.position_ids is None
        assert skipped.id == whole.id
        return
    positions = skipped.position_ids
    assert positions is not None
    assert len(skipped.input_ids) == len(positions) == kept
    assert np.array_equal(skipped.input_ids, whole.input_ids[positions])
    assert np.all(np.diff(positions) > 0)
    assert (positions[0], positions[-1]) == (0, LENGTH - 1)
    start, stop = skipped.answer_span
    assert stop == kept
    assert positions[start] == whole.answer_span[0]
    left_out = np.setdiff1d(whole.input_ids, skipped.input_ids)
    assert np.all(left_out >= 5000), "only the document's tokens are left out"
    assert np.count_nonzero(np.diff(positions) > 1) <= 2
    assert skipped.id != whole.id


def test_a_skipped_sample_too_short_for_the_template_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"search\.skipped_tokens: expected at least \d+ .* got 20"
    ):
        needle_set(num_tokens=20)


def test_text_too_short_for_the_length_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        ValueError,
        match=r"^needles.text: expected at least one book of 700 tokens .* of 2 has \d+; add",
    ):
        needle_set(books=[book("short", 20), book("tiny", 3)])


def test_no_books_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^needles.text: expected at least one book, got none"):
        needle_set(books=[])


def test_a_document_too_short_for_its_room_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"^needles.text: expected a document of \d+ tokens .* got 3 in moby; add"
    ):
        build_sample(
            GPT, [1, 2, 3], length=LENGTH, key="a-b", value="1234567", depth=0, book="moby"
        )


def test_a_length_too_short_for_the_template_is_refused_with_the_least_length() -> None:
    with pytest.raises(
        ValueError, match=r"^search.target_length: expected at least (\d+) tokens .* got 50$"
    ) as caught:
        build_sample(GPT, [1] * 50, length=50, key="a-b", value="1234567", depth=0)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert (
        len(build_sample(GPT, [], length=least, key="a-b", value="1234567", depth=0).input_ids)
        == least
    )


def test_a_tokenizer_that_loses_digits_is_refused() -> None:
    backend = Backend(models.WordLevel({"<unk>": 0, "What": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(
        ValueError, match=r"^model.path: expected a tokenizer that gives the answer back"
    ):
        needle_set(wrapped(backend, unk_token="<unk>"), length=60)
