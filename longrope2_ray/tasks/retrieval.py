"""Training documents with something to retrieve: text with needles in it and a question at its end.

The pre-training of the reference model had such documents, in its window. These are as long as
and longer than the window, for training on rescaled factors.
"""

import random
import zlib
from collections.abc import Iterator, Sequence

from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import INSTRUCTION, NEEDLE, QUESTION, draw_key, draw_value

GENERATED_PREFIX = "generated:"
RETRIEVAL = GENERATED_PREFIX + "retrieval"
"""The path by which a recipe's data source names these documents."""


def seen_in_training(key: str) -> bool:
    """Say whether a key may be trained on: three of four may, the others are for checks."""
    return zlib.crc32(key.encode()) % 4 != 0


def retrieval_document(rng: random.Random, texts: Sequence[str], num_characters: int) -> str:
    """Draw one document: a stretch of a text, one to three needles in it, a question, its answer.

    Args:
        rng: gives the stretch, the needles, their order and their places.
        texts: every one longer than ``num_characters``.
        num_characters: length of the stretch alone.
    """
    pairs: list[tuple[str, str]] = []
    num_needles = rng.choice((1, 1, 2, 3))
    while len(pairs) < num_needles:
        if seen_in_training(key := draw_key(rng)):
            pairs.append((key, draw_value(rng)))
    text = rng.choice(texts)
    start = rng.randrange(len(text) - num_characters)
    stretch = text[start : start + num_characters]
    cuts = sorted(rng.randint(0, num_characters) for _ in pairs)
    asked_key, asked_value = pairs[0]
    needles = [NEEDLE.format(key=k, value=v) for k, v in rng.sample(pairs, len(pairs))]
    document = INSTRUCTION
    for begin, end, needle in zip([0, *cuts], [*cuts, num_characters], [*needles, ""], strict=True):
        document += stretch[begin:end] + needle
    return f"{document}{QUESTION.format(key=asked_key)} {asked_value}"


def retrieval_documents(
    num_short: int = 3000, num_long: int = 1500, max_characters: int = 7000, seed: int = 0
) -> Iterator[str]:
    """Draw documents from the bundled pre-training texts; the same arguments give the same ones.

    Args:
        num_short: documents around less than 400 characters of text.
        num_long: documents around 1,000 to ``max_characters`` characters of text, after the short.
        max_characters: excluded.
        seed: of everything that is drawn.
    """
    rng = random.Random(seed)
    texts = [book.text for book in load_books(["bundled:pretraining"])]
    lengths = [rng.randrange(0, 400) for _ in range(num_short)]
    lengths += [rng.randrange(1000, max_characters) for _ in range(num_long)]
    return (retrieval_document(rng, texts, length) for length in lengths)
