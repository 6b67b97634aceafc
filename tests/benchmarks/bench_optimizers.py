"""Optimizers of a search at equal cost, each followed by the same race at full length.

    python tests/benchmarks/bench_optimizers.py                       # the demo, five seeds
    python tests/benchmarks/bench_optimizers.py --recipe smollm2_135m --needles 24 --jobs 8

What a search of the default preset proposes from is replaced: its steps down the gradient by
CMA-ES, random search or evolution on as many passes of the same skipped documents. Starts,
documents and the full-length race that decides are the same, so that the table compares proposals
alone; the evolutionary presets have none, they are whole searches of about that cost. Each result
is scored on held-out needles at the start of the document and spread over it, beside the free
methods under the attention factor ``su``. The cost is in full-length equivalents. No Ray: a trial
is one process. CMA-ES needs the package ``cmaes``.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longrope2_ray.model.costs import GRADIENT_PASSES
from longrope2_ray.model.loading import load_model, load_tokenizer
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.baselines import PLAIN, su_attention_factor
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search import loop
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.preparation import Prepared, open_run, prepare
from longrope2_ray.search.proposing import Proposer
from longrope2_ray.search.scorer import NeedleScorer
from longrope2_ray.search.scores import NeedleSummary, Unit, UnitScore, descent_set, is_descent
from longrope2_ray.search.space import Candidate
from longrope2_ray.search.verdict import compare
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.tasks.books import load_books
from longrope2_ray.tasks.needle import NeedleSample, build_needle_set
from longrope2_ray.workers.done import Done

PLACES = ("start", "spread")
PROPOSALS = ("gradient", "cma", "random", "evolution", "cma+evolution", "none")
PRESETS = ("paper", "authors", "longrope")
# Bounds of the shape: kept dimensions and critical dimension, in cosine indices from the
# theoretical one, and logarithms of the tail's first factor in ratios and of its rise.
SHAPE_LOW, SHAPE_HIGH = np.array([-8, -3, -0.1, 0.0]), np.array([0, 4, 0.5, 0.5])

# (vectors) -> summed NLL of each on the same documents, which are drawn anew for every call.
Evaluate = Callable[[Sequence[np.ndarray]], list[float]]


class OneScorer:
    """Scores units in this process, one at a time.

    Attributes:
        equivalents: what was scored outside of the search's own races.
    """

    def __init__(self, prepared: Prepared, scorer: NeedleScorer):
        self._prepared, self._scorer = prepared, scorer
        self._queue: list[Unit] = []

    def free(self) -> int:
        return 1 - len(self._queue)

    def submit(self, work: Unit) -> None:
        self._queue.append(work)

    def wait(self) -> list[Done[Unit, UnitScore]]:
        queue, self._queue = self._queue, []
        return [Done(unit, self._score(unit), "here", time.time()) for unit in queue]

    flush = wait

    def counts(self) -> Mapping[str, int]:
        return {"starting": 0, "idle": 1, "busy": 0}

    def faults(self) -> Mapping[str, int]:
        return {}

    def _score(self, unit: Unit) -> UnitScore:
        sample = self._prepared.samples[unit.needle_set][unit.sample]
        score = self._scorer.gradient if is_descent(unit.needle_set) else self._scorer.score
        return score(sample, unit.factors)


class Trial:
    """One search of one optimizer with one seed, in this process."""

    def __init__(self, prepared: Prepared, scorer: NeedleScorer, optimizer: str):
        self._prepared, self._scorer = prepared, scorer
        self._optimizer = optimizer
        self._geometry = prepared.shape.geometry
        self._search = prepared.recipe.search
        self._ratio = self._search.target_length / self._geometry.original_length
        self._seed = self._search.seed
        self.equivalents = 0.0

    def run(self) -> tuple[Candidate, float]:
        """Return the winner, and what it cost in full-length equivalents."""
        trial = self

        class Proposing(Proposer):
            def _descend(self, start: Candidate, wide: bool) -> Candidate:
                return trial._propose(start, wide, self._attention)

        shipped = loop.Proposer
        if self._optimizer not in ("gradient", *PRESETS):
            loop.Proposer = Proposing  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as folder:
            run_dir = RunDir(folder)
            open_run(self._prepared, run_dir)
            run_dir.take_over()
            search = SearchLoop(
                self._prepared.recipe,
                self._geometry,
                self._prepared.needle_sets,
                run_dir,
                OneScorer(self._prepared, self._scorer),
                self._prepared.fingerprints,
            )
            try:
                winner = search.run().candidate
            finally:
                loop.Proposer = shipped  # type: ignore[misc]
        return winner, search.status.equivalents + self.equivalents

    def _propose(self, start: Candidate, wide: bool, attention: float) -> Candidate:
        """Return what the optimizer finds from a start, for the passes that a descent costs."""
        steps = self._search.descent_steps
        rounds = iter([descent_set(step, wide) for step in range(steps)])
        budget = int(GRADIENT_PASSES)  # candidates a round, each on all documents of it

        def evaluate(vectors: Sequence[np.ndarray]) -> list[float]:
            name = next(rounds)
            needle_set = self._prepared.needle_sets[name]
            samples = self._prepared.samples[name]
            cost = needle_set.equivalents / GRADIENT_PASSES * len(samples)
            self.equivalents += cost * len(vectors)
            factors = [RescaleFactors(vector, attention) for vector in vectors]
            return [math.fsum(self._scorer.score(s, f).nll_sum for s in samples) for f in factors]

        rng = np.random.default_rng(self._seed)
        values, left = start.factors.values, steps
        for name in self._optimizer.split("+"):
            share = steps if "+" not in self._optimizer else steps // 2
            share = min(share, left)
            left -= share
            values = getattr(self, f"_{name}")(values, share, budget, evaluate, rng)
        return Candidate.of_vector(values, self._ratio, attention, start.id, self._optimizer)

    def _none(self, values: np.ndarray, *_: Any) -> np.ndarray:
        return values

    def _shape(self, numbers: np.ndarray) -> np.ndarray:
        """Return kept dimensions, a rise to the critical one, and a rising tail."""
        theory = self._geometry.theoretical_critical_dim
        kept, critical = np.clip(theory + numbers[:2], [0, 1], self._geometry.num_cosines - 1)
        first = math.log(self._ratio) + numbers[2]
        places = np.arange(self._geometry.num_cosines)
        last = self._geometry.num_cosines - 1
        xs = [min(kept, critical - 0.1), critical, max(last, critical + 0.1)]
        logs = np.interp(places, xs, [0.0, first, first + numbers[3]])
        values: np.ndarray = np.exp(np.maximum.accumulate(logs))
        return np.clip(values, 1.0, self._search.tail_bounds[1] * self._ratio)

    def _random(
        self,
        start: np.ndarray,
        rounds: int,
        size: int,
        evaluate: Evaluate,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Draw shapes; the better half of each round goes on beside new ones."""
        best: list[np.ndarray] = [start]
        for _ in range(rounds):
            drawn = [self._shape(rng.uniform(SHAPE_LOW, SHAPE_HIGH)) for _ in range(size // 2)]
            vectors = (best + drawn)[:size]
            nlls = evaluate(vectors)
            best = [vectors[i] for i in np.argsort(nlls)[: size // 2]]
        return best[0]

    def _cma(
        self,
        start: np.ndarray,
        rounds: int,
        size: int,
        evaluate: Evaluate,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """CMA-ES with margin on the shape numbers; the mean of its last distribution."""
        from cmaes import CMAwM

        grid = np.zeros(4)
        grid[:2] = 0.5 / (SHAPE_HIGH - SHAPE_LOW)[:2]
        optimizer = CMAwM(
            mean=np.full(4, 0.5),
            sigma=0.25,
            bounds=np.array([[0.0, 1.0]] * 4),
            steps=grid,
            seed=int(rng.integers(2**31)),
            population_size=2 * size,
        )
        best = start
        for _ in range(rounds // 2):
            asked = [optimizer.ask() for _ in range(2 * size)]
            vectors = [self._shape(SHAPE_LOW + (SHAPE_HIGH - SHAPE_LOW) * x) for x, _ in asked]
            # Two rounds' passes for one generation of twice the size: half of it on each.
            nlls = evaluate(vectors[:size]) + evaluate(vectors[size:])
            optimizer.tell([(x, nll) for (_, x), nll in zip(asked, nlls, strict=True)])
            best = self._shape(SHAPE_LOW + (SHAPE_HIGH - SHAPE_LOW) * np.clip(optimizer.mean, 0, 1))
        return best

    def _evolution(
        self,
        start: np.ndarray,
        rounds: int,
        size: int,
        evaluate: Evaluate,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Free entries: mutants of the best, each entry by chance, non-decreasing, in bounds."""
        best, high = start, math.log(self._search.tail_bounds[1] * self._ratio)
        for _ in range(rounds):
            vectors = [best]
            for _ in range(size - 1):
                chosen = rng.random(len(best)) < self._search.mutation_probability
                logs = np.log(best) + chosen * rng.normal(0, 0.1, len(best))
                vectors.append(np.exp(np.maximum.accumulate(np.clip(logs, 0, high))))
            best = vectors[int(np.argmin(evaluate(vectors)))]
        return best


def summary(
    scorer: NeedleScorer, samples: Sequence[NeedleSample], factors: RescaleFactors
) -> NeedleSummary:
    scores = [scorer.score(sample, factors) for sample in samples]
    return NeedleSummary(
        tuple(score.nll_sum for score in scores),
        tuple(score.num_tokens for score in scores),
        tuple(score.correct for score in scores),
        tuple(sample.depth for sample in samples),
    )


def trial_recipe(args: argparse.Namespace, optimizer: str, seed: int) -> Recipe:
    # The tables of the search itself are not read here, so they are short.
    short = ["--report.num-samples=4", '--report.methods=["longrope2"]']
    settings = [*short, f"--search.seed={seed}", f"--needles.seed={seed}", *args.set]
    if optimizer in PRESETS:
        size = args.population
        settings += [
            f"--search.preset={optimizer}",
            f"--search.population-size={size}",
            f"--search.top-k={size // 2}",
            f"--search.num-offspring={size // 2}",
            f"--search.iterations={args.iterations}",
            f"--needles.num-samples={args.preset_needles}",
        ]
    return load_recipe(args.recipe, settings)


_LOADED: dict[tuple[Any, ...], Any] = {}


def loaded(recipe: Recipe, prepared: Prepared, threads: int) -> NeedleScorer:
    """Return this process's scorer; trials of one process share the model."""
    key = recipe.model.path, recipe.model.dtype, recipe.model.device, threads
    if key not in _LOADED:
        model = load_model(recipe.model, threads=threads, num_gpus=1)
        _LOADED[key] = NeedleScorer(
            model, prepared.shape, mlp_chunk_tokens=recipe.scorer.mlp_chunk_tokens
        )
    scorer: NeedleScorer = _LOADED[key]
    return scorer


def held_out_sets(recipe: Recipe, num_needles: int, seed: int) -> list[list[NeedleSample]]:
    books, tokenizer = load_books(recipe.report.text, "report.text"), load_tokenizer(recipe.model)
    return [
        build_needle_set(
            tokenizer,
            books,
            length=recipe.search.target_length,
            num_samples=num_needles,
            seed=seed + place,
            depth=depth,
        )
        for place, depth in enumerate(("start", "stratified"))
    ]


def run_trial(args: argparse.Namespace, trial: tuple[str, int]) -> dict[str, Any]:
    """Return the result of a search, or of a free method, as JSON."""
    name, seed = trial
    torch.set_num_threads(args.threads)
    recipe = trial_recipe(args, name, seed)
    prepared = prepare(recipe)
    scorer = loaded(recipe, prepared, args.threads)
    started, equivalents = time.perf_counter(), 0.0
    if name in PLAIN:
        geometry, target = prepared.shape.geometry, recipe.search.target_length
        ratio = target / geometry.original_length
        su = su_attention_factor(ratio, geometry.original_length)
        factors, origin = RescaleFactors(PLAIN[name](geometry, target), su), "free"
    else:
        winner, equivalents = Trial(prepared, scorer, name).run()
        factors, origin = winner.factors, winner.origin
    result = {
        "optimizer": name,
        "seed": seed,
        "equivalents": equivalents,
        "seconds": time.perf_counter() - started,
        "origin": origin,
        "attention_factor": factors.attention_factor,
        "factors": factors.values.tolist(),
    }
    key = "held out", recipe.model.path, recipe.search.target_length
    if key not in _LOADED:
        _LOADED[key] = held_out_sets(recipe, args.needles, args.seed)
    for place, samples in zip(PLACES, _LOADED[key], strict=True):
        result[place] = asdict(summary(scorer, samples, factors))
    return result


def needles(result: Mapping[str, Any], place: str) -> NeedleSummary:
    return NeedleSummary(**{name: tuple(values) for name, values in result[place].items()})


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: medians over seeds, the worst seed in brackets.

    A result is better than a free method where the interval of the ratio of perplexities excludes
    equality.
    """
    yield "| optimizer | start | spread | equivalents | better at start, spread |"
    yield "|---|---|---|---|---|"
    free = [result for result in results if result["origin"] == "free"]
    for name in dict.fromkeys(result["optimizer"] for result in results):
        rows = [result for result in results if result["optimizer"] == name]
        cells, better = [], []
        for place in PLACES:
            found = [needles(row, place) for row in rows]
            ppls, shares = [s.ppl or math.inf for s in found], [s.accuracy for s in found]
            median = f"{statistics.median(ppls):.3f} / {statistics.median(shares):.0%}"
            cells.append(f"{median} ({max(ppls):.3f} / {min(shares):.0%})")
            others = [needles(row, place) for row in free]
            wins = sum(all(compare(s, o).overall.low > 1 for o in others) for s in found)
            better.append(f"{wins} of {len(rows)}")
        costs = [row["equivalents"] for row in rows]
        cost = f"{statistics.median(costs):.0f} ({max(costs):.0f})"
        yield f"| {name} | {cells[0]} | {cells[1]} | {cost} | {', '.join(better)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=[*PROPOSALS, *PRESETS],
        default=[*PROPOSALS, *PRESETS],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", nargs="*", default=[], help="recipe fields, as --set=--a.b=c")
    parser.add_argument("--population", type=int, default=12, help="of the evolutionary presets")
    parser.add_argument("--iterations", type=int, default=3, help="of the evolutionary presets")
    parser.add_argument("--preset-needles", type=int, default=8, help="their needles")
    parser.add_argument("--needles", type=int, default=120, help="held out, at each place")
    parser.add_argument("--seed", type=int, default=3001, help="of the held-out needles")
    parser.add_argument("--free", nargs="+", default=["yarn", "llama3"])
    parser.add_argument("--jobs", type=int, default=1, help="trials at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--out", type=Path, help="a JSON line for each trial")
    args = parser.parse_args()
    trials = [(name, seed) for name in args.optimizers for seed in args.seeds]
    trials += [(name, args.seeds[0]) for name in args.free]
    results = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for result in pool.imap(partial(run_trial, args), trials):
            results.append(result)
            print(f"{result['optimizer']}, seed {result['seed']}: ", end="")
            print(f"{result['equivalents']:.1f} equivalents, {result['seconds']:.0f} s", flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
