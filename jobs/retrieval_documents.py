"""Documents with something to retrieve, for training the reference model on: its pre-training had them too.

    python jobs/retrieval_documents.py --out runs/retrieval.jsonl

Public-domain text with one to three needles at random depths and one question at the end, in lengths around and beyond the
pre-trained window. Keys that the checks ask for are left out, as in jobs/pretrain.py.
"""

import argparse
import json
import random
import zlib
from pathlib import Path

from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import INSTRUCTION, NEEDLE, QUESTION, draw_key, draw_value

TEXT = Path(__file__).parent / "pretrain_text"


def document(rng: random.Random, texts: list[str], num_characters: int) -> str:
    """One document around ``num_characters`` of text."""
    pairs: list[tuple[str, str]] = []
    count = rng.choice((1, 1, 2, 3))
    while len(pairs) < count:
        if zlib.crc32((key := draw_key(rng)).encode()) % 4:
            pairs.append((key, draw_value(rng)))
    text = rng.choice(texts)
    start = rng.randrange(len(text) - num_characters)
    body = text[start : start + num_characters]
    cuts = sorted(rng.randint(0, num_characters) for _ in pairs)
    key, value = pairs[0]
    order = rng.sample(pairs, len(pairs))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, num_characters], strict=True)]
    needles = [NEEDLE.format(key=k, value=v) for k, v in order]
    middle = "".join(piece + needle for piece, needle in zip(pieces, [*needles, ""], strict=True))
    return f"{INSTRUCTION}{middle}{QUESTION.format(key=key)} {value}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--short", type=int, default=3000, help="documents of up to 400 characters of text"
    )
    parser.add_argument(
        "--long",
        type=int,
        default=1500,
        help="documents of 1,000 to --characters characters of text",
    )
    parser.add_argument("--characters", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    texts = [book.text for book in load_books([str(TEXT)])]
    lengths = [rng.randrange(0, 400) for _ in range(args.short)]
    lengths += [rng.randrange(1000, args.characters) for _ in range(args.long)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    beside = args.out.with_suffix(".tmp")
    beside.write_text(
        "".join(json.dumps({"text": document(rng, texts, length)}) + "\n" for length in lengths)
    )
    beside.replace(args.out)


if __name__ == "__main__":
    main()
