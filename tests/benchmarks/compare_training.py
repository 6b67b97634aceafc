"""What mixed context window training does to the reference model, in short and long contexts.

    python tests/benchmarks/compare_training.py --run-dir runs/train-8x --seeds 3 \\
        --search.target-length 2048 --train.global-batch-size 4

It searches, packs the data and trains each variant with the commands that a user has (all of them
resume), then scores every model under the window that a prompt of that length gets: the original
RoPE up to the original length, the rescaled one beyond, and the rescaled one everywhere where
nothing else was trained (not mixed). The scores are needles of unseen keys, at five depths in
held-out text, and the perplexity of that text.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from longrope2_ray.model.loading import load_model, load_tokenizer
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.spec import read_shape
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.model import ModelSection
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.scorer import NeedleScorer
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import build_needle_set
from longrope2_ray.training.factors import find_factors

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Name of a variant -> its fields of the recipe's train section.
VARIANTS = {
    "longrope2, mixed": {"factors": "winner"},
    "longrope2, not mixed": {"factors": "winner", "mixed": "false"},
    "yarn, mixed": {"factors": "yarn"},
    "ntk, mixed": {"factors": "ntk"},
}


def longrope2(command: str, recipe: str, run_dir: str, *overrides: str) -> None:
    line = [
        sys.executable,
        "-m",
        "longrope2_ray",
        command,
        recipe,
        *overrides,
        "--run-dir",
        run_dir,
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stderr[-3000:]}")


class Judge:
    """Scores a model at every length, under the window that the length gets."""

    def __init__(self, base: ModelSection, lengths: list[int], samples: int):
        self.shape = read_shape(base)
        self.lengths = lengths
        tokenizer, books = load_tokenizer(base), load_books(["bundled:report"])
        self.needles = {
            length: [
                sample
                for seed, depth in enumerate(DEPTHS)
                for sample in build_needle_set(
                    tokenizer,
                    books,
                    length=length,
                    num_samples=samples,
                    seed=100 + seed,
                    depth=depth,
                )
            ]
            for length in lengths
        }
        longest = max(lengths)
        ids = [
            tokenizer.encode(book.text[: 12 * longest], add_special_tokens=False)[:longest]
            for book in books
        ]
        self.texts = [
            np.asarray([tokenizer.bos_token_id, *one][:longest])
            for one in ids
            if len(one) == longest
        ]

    def table(
        self, section: ModelSection, factors: RescaleFactors, mixed: bool
    ) -> dict[int, tuple[float, float, float]]:
        """Return length -> (needle accuracy, needle perplexity, text perplexity).

        The perplexity is that of the last quarter of a held-out text.
        """
        model = load_model(section)
        scorer, rope = NeedleScorer(model, self.shape), PinnedRope(model, self.shape)
        original = RescaleFactors(np.ones_like(factors.values))
        rows = {}
        for length in self.lengths:
            short = mixed and length <= self.shape.original_length
            pinned = original if short else factors
            scores = [scorer.score(sample, pinned) for sample in self.needles[length]]
            nll = sum(s.nll_sum for s in scores) / sum(s.num_tokens for s in scores)
            with rope.pinned(pinned):
                losses = [self._plain(model, text[:length]) for text in self.texts]
            accuracy = sum(s.correct for s in scores) / len(scores)
            rows[length] = (accuracy, float(np.exp(nll)), float(np.exp(np.mean(losses))))
        return rows

    @torch.inference_mode()
    def _plain(self, model: torch.nn.Module, text: np.ndarray) -> float:
        ids = torch.as_tensor(text)[None]
        quarter = len(text) // 4
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=quarter + 1).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, -quarter:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8, help="needles a depth")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    args, overrides = parser.parse_known_args()
    recipe = load_recipe(args.recipe, overrides)
    run_dir = RunDir(args.run_dir)
    longrope2("search", args.recipe, args.run_dir, *overrides)
    longrope2("data", args.recipe, args.run_dir, *overrides)
    base = ModelSection(path=recipe.model.path, dtype="float32", device="cpu")
    target = recipe.search.target_length
    shape = read_shape(base)
    lengths = [
        shape.original_length * 2**i for i in range(20) if shape.original_length * 2**i <= target
    ]
    judge = Judge(base, lengths, args.samples)
    results: dict[str, list[dict[int, tuple[float, float, float]]]] = {}

    def record(name: str, seed: int | None, rows: dict[int, tuple[float, float, float]]) -> None:
        results.setdefault(name, []).append(rows)
        print(json.dumps({"variant": name, "seed": seed, "lengths": rows}), flush=True)

    vectors = {}
    for name in args.variants:
        settings = VARIANTS[name]
        fields = [f"--train.{key}={value}" for key, value in settings.items()]
        vectors[name] = find_factors(
            load_recipe(args.recipe, [*overrides, *fields]), shape, run_dir
        )
        if name.endswith(", mixed"):
            record(
                name.replace(", mixed", ", untrained"), None, judge.table(base, vectors[name], True)
            )
        for seed in range(args.seeds):
            folder = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            longrope2(
                "train",
                args.recipe,
                args.run_dir,
                *overrides,
                *fields,
                f"--train.seed={seed}",
                f"--train.name={folder}",
            )
            path = str(Path(args.run_dir) / folder / "model")
            model = base.model_copy(update={"path": path})
            record(name, seed, judge.table(model, vectors[name], settings.get("mixed") != "false"))
    print(
        "\n| needle accuracy / needle perplexity / text perplexity | "
        + " | ".join(map(str, lengths))
        + " | seeds |"
    )
    print("|---|" + "---|" * (len(lengths) + 1))
    for name, runs in results.items():
        cells = [
            "{:.0%} / {:.3f} / {:.2f}".format(
                *(statistics.median(run[length][i] for run in runs) for i in range(3))
            )
            for length in lengths
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | {len(runs)} |")


if __name__ == "__main__":
    main()
