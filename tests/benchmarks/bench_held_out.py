"""Winners of the demo's search against the free methods, on needles that nothing was chosen by.

    python tests/benchmarks/bench_held_out.py runs/0/winner.json runs/1/winner.json \
        [--needles 120] [--seed 2001]

Needles at the start of the document and spread over it, from the held-out texts. Each winner has
the attention factor that its search chose; the free methods, YaRN once more with a kept head, have
``su``. For each winner and free method the ratio of the method's perplexity to the winner's, with a
95 % interval from a paired bootstrap over the needles.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from longrope2_ray.model.loading import load_model, load_tokenizer, require_loadable
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.rope.baselines import llama3, su_attention_factor, yarn
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.scorer import NeedleScorer
from longrope2_ray.search.scores import NeedleSummary
from longrope2_ray.search.starts import num_kept_dims
from longrope2_ray.search.verdict import compare
from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import NeedleSample, build_needle_set


def summary(
    scorer: NeedleScorer, samples: list[NeedleSample], factors: RescaleFactors
) -> NeedleSummary:
    scores = [scorer.score(sample, factors) for sample in samples]
    return NeedleSummary(
        tuple(score.nll_sum for score in scores),
        tuple(score.num_tokens for score in scores),
        tuple(score.correct for score in scores),
        tuple(sample.depth for sample in samples),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("winners", nargs="+", type=Path)
    parser.add_argument("--needles", type=int, default=120)
    parser.add_argument("--seed", type=int, default=2001)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("demo")
    shape, tokenizer = require_loadable(recipe.model), load_tokenizer(recipe.model)
    scorer = NeedleScorer(load_model(recipe.model, threads=1, num_gpus=1), shape)
    geometry = shape.geometry
    bodies = {str(path): json.loads(path.read_text()) for path in args.winners}
    (target,) = {body["target_length"] for body in bodies.values()}
    books = load_books(recipe.report.text, "report.text")
    sets = [
        build_needle_set(
            tokenizer,
            books,
            length=target,
            num_samples=args.needles,
            seed=args.seed + place,
            depth=depth,
        )
        for place, depth in enumerate(("start", "stratified"))
    ]
    plain = yarn(geometry, target)
    kept = np.maximum.accumulate(
        np.where(np.arange(len(plain)) < num_kept_dims(geometry), 1, plain)
    )
    su = su_attention_factor(target / geometry.original_length, geometry.original_length)
    vectors = {"YaRN": plain, "Llama 3": llama3(geometry, target), "YaRN, kept head": kept}
    free = {
        name: [summary(scorer, samples, RescaleFactors(values, su)) for samples in sets]
        for name, values in vectors.items()
    }

    def cells(summaries: list[NeedleSummary]) -> str:
        return " | ".join(f"{s.ppl:.3f} / {s.accuracy:.0%}" for s in summaries)

    columns = [f"{name}, {place}" for name in free for place in ("start", "spread")]
    print("| | start | spread | " + " | ".join(columns) + " |")
    print("|" + "---|" * (3 + len(columns)))
    for name, summaries in free.items():
        print(f"| {name} | {cells(summaries)} |" + " |" * len(columns))
    for path, body in bodies.items():
        factors = RescaleFactors(np.array(body["factors"]), body["attention_factor"])
        ours = [summary(scorer, samples, factors) for samples in sets]
        found = [
            compare(*pair).overall
            for rows in free.values()
            for pair in zip(ours, rows, strict=True)
        ]
        intervals = (f"{i.ratio:.3f} ({i.low:.3f} to {i.high:.3f})" for i in found)
        print(f"| {path} | {cells(ours)} | " + " | ".join(intervals) + " |", flush=True)


if __name__ == "__main__":
    main()
