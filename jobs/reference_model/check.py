"""Print what the reference model can do, on held-out text and keys that training never saw.

python jobs/reference_model/check.py [--model bundled:reference] [--samples 40]
"""

import argparse
import random
from collections.abc import Iterable

from longrope2_ray.model.loading import load_model, load_tokenizer
from longrope2_ray.model.spec import read_shape
from longrope2_ray.recipe.model import ModelSection
from longrope2_ray.rope.baselines import baseline, su_attention_factor
from longrope2_ray.search.scorer import NeedleScorer
from longrope2_ray.search.scores import perplexity
from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import NeedleSample, build_sample, draw_key, draw_value
from longrope2_ray.tasks.retrieval import seen_in_training

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = ("unscaled", "pi", "ntk-aware", "ntk", "llama3", "yarn", "longrope2")


class Check:
    """The check of one model: it scores unseen keys in held-out text.

    Args:
        path: the model, as ``model.path`` in a recipe.
        threads: CPU threads; torch's own default unless given.
    """

    def __init__(self, path: str, threads: int | None = None):
        section = ModelSection(path=path, dtype="float32", device="cpu")
        self.shape = read_shape(section)
        self.tokenizer = load_tokenizer(section)
        self.scorer = NeedleScorer(load_model(section, threads=threads), self.shape)
        self.books = [
            self.tokenizer.encode(book.text, add_special_tokens=False)
            for book in load_books(["bundled:report"])
        ]

    def samples(self, length: int, depth: float, count: int, seed: int = 7) -> list[NeedleSample]:
        """Draw ``count`` documents whose keys were kept out of training."""
        rng = random.Random(f"{seed}/{length}/{depth}")
        made = []
        while len(made) < count:
            key = draw_key(rng)
            if not seen_in_training(key):
                book = self.books[len(made) % len(self.books)]
                start = rng.randrange(len(book) - length)
                text = book[start : start + length]
                made.append(
                    build_sample(
                        self.tokenizer,
                        text,
                        length=length,
                        key=key,
                        value=draw_value(rng),
                        depth=depth,
                    )
                )
        return made

    def score(
        self, method: str, length: int, depth: float, count: int, attention_factor: float = 1.0
    ) -> tuple[float | None, float]:
        """Return the needle perplexity and the accuracy of a method, without any search.

        The perplexity is None if it is not finite.
        """
        target = max(length, self.shape.original_length + 1)
        vector = baseline(method, self.shape.geometry, target, attention_factor=attention_factor)
        scores = [self.scorer.score(s, vector) for s in self.samples(length, depth, count)]
        ppl = perplexity(sum(s.nll_sum for s in scores), sum(s.num_tokens for s in scores))
        return ppl, sum(s.correct for s in scores) / count


def in_cells(scores: Iterable[tuple[float | None, float]]) -> str:
    """Return (perplexity, accuracy) pairs as the cells of a table's row."""
    return " | ".join(
        f"{'not finite' if ppl is None else f'{ppl:.3f}'} / {accuracy:.0%}"
        for ppl, accuracy in scores
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled:reference")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    check = Check(args.model, args.threads)
    window = check.shape.original_length
    print(
        f"{args.samples} samples a cell; perplexity of the answer / "
        f"share of answers exactly right\n"
    )
    print(f"| length {window}, unscaled | " + " | ".join(f"depth {d:g}" for d in DEPTHS) + " |")
    print("|---|" + "---|" * len(DEPTHS))
    cells = [check.score("unscaled", window, depth, args.samples) for depth in DEPTHS]
    print(f"| | {in_cells(cells)} |\n")
    for ratio in (4, 8):
        su = su_attention_factor(ratio, window)
        print(
            f"| {ratio} x L0, needle at the start | attention factor 1 | "
            f"attention factor {su:.3f} (su) |"
        )
        print("|---|---|---|")
        for method in METHODS:
            cells = [
                check.score(method, ratio * window, 0.0, args.samples // 2, factor)
                for factor in (1.0, su)
            ]
            print(f"| {method} | {in_cells(cells)} |")
        print(flush=True)


if __name__ == "__main__":
    main()
