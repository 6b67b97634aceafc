"""How well skipped documents foretell full-length scores, by the attention factor they get.

    python tests/benchmarks/bench_dilution.py [--vectors 24] [--needles 16] [--seed 0]

Vectors are drawn around what searches find: factors of 1 up to a dimension, a power up to the
critical one, a straight tail. Each is scored on full-length needles and on skipped documents, half
of them with the needle at the start, half spread; what counts is Spearman's rank correlation. The
last rows are the project's own rules, for documents and for wider ones
(``search.cascade.attention_share``).
"""

import argparse
import math

import numpy as np
import torch

from longrope2_ray.model.loading import load_model, load_tokenizer, require_loadable
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.cascade import (
    DILUTION,
    WIDE_DILUTION,
    attention_share,
    rank_correlation,
)
from longrope2_ray.search.scorer import NeedleScorer
from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import NeedleSample, build_needle_set

LENGTH, TOKENS, FULL_FACTOR = 1024, 192, 1.1
FACTORS = (1.1, 1.0, 0.95, 0.88, 0.8)


def drawn(count: int, seed: int, num_cosines: int) -> list[np.ndarray]:
    """Return random vectors of 4 x L0."""
    rng, dims, vectors = np.random.default_rng(seed), np.arange(num_cosines), []
    for _ in range(count):
        kept, critical = rng.uniform(0, 10), rng.uniform(11, 16)
        first, rise = rng.uniform(3.8, 5.8), rng.uniform(1, 1.3)
        head = first ** np.clip((dims - kept) / (critical - kept), 0, 1)
        along = np.clip((dims - critical) / (num_cosines - 1 - critical), 0, 1)
        vectors.append(np.where(dims < critical, head, first * (1 + (rise - 1) * along)))
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vectors", type=int, default=24)
    parser.add_argument("--needles", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_recipe("demo").model
    shape, tokenizer = require_loadable(model), load_tokenizer(model)
    scorer = NeedleScorer(load_model(model, threads=1, num_gpus=1), shape)
    books = load_books(["bundled:search"], "needles.text")

    def needles(seed: int, tokens: int | None) -> list[list[NeedleSample]]:
        return [
            build_needle_set(
                tokenizer,
                books,
                length=LENGTH,
                num_samples=args.needles,
                seed=seed + place,
                depth=depth,
                num_tokens=tokens,
            )
            for place, depth in enumerate(("start", "stratified"))
        ]

    def scores(sets: list[list[NeedleSample]], factor: float) -> np.ndarray:
        """(vectors, 2) summed NLL at the start and spread."""
        return np.array(
            [
                [
                    sum(scorer.score(s, RescaleFactors(v, factor)).nll_sum for s in half)
                    for half in sets
                ]
                for v in vectors
            ]
        )

    vectors = drawn(args.vectors, args.seed, shape.geometry.num_cosines)
    full = scores(needles(args.seed + 41, None), FULL_FACTOR)
    skipped = needles(args.seed + 51, TOKENS)
    shares = [attention_share(TOKENS, LENGTH, power) for power in (DILUTION, WIDE_DILUTION)]
    best = full.sum(1) <= np.median(full.sum(1))
    print("| attention factor | start | spread | both | both, best half |\n|---|---|---|---|---|")
    for factor in (*FACTORS, *(FULL_FACTOR * share for share in shares)):
        cheap = scores(skipped, factor)
        row = [rank_correlation(cheap[:, place], full[:, place]) for place in (0, 1)]
        row.append(rank_correlation(cheap.sum(1), full.sum(1)))
        row.append(rank_correlation(cheap.sum(1)[best], full.sum(1)[best]))
        print(f"| {factor:.3f} | " + " | ".join(f"{value or math.nan:.2f}" for value in row) + " |")


if __name__ == "__main__":
    main()
