"""The driver without a model: units a second with scorers that do nothing, and how busy it keeps
scorers that sleep.

    python tests/benchmarks/bench_pool.py [--seconds 0.2] [--scorers 32]

The whole driver is measured: race, ledger with its syncs, status, pool, on a real Ray. Scorers that
sleep stand for GPUs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.scores import (
    SEARCH_SET,
    NeedleSet,
    Unit,
    UnitScore,
    report_set,
    scores_of,
)
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.actors import Actors, actor_factory
from longrope2_ray.workers.connection import ray_session
from longrope2_ray.workers.failures import Limits
from longrope2_ray.workers.pool import Pool

GEOMETRY = RopeGeometry(128, 128, 5e5, 8192)  # Llama-3-8B
TARGET_LENGTH = 131_072
NUM_TOKENS = 8
RESOURCES = {"CPU": 0}


class SleepingSetup:
    """Sets up a scorer that sleeps for a unit and answers with a number that depends on it.

    Args:
        seconds: time of a unit.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, num_gpus: int) -> Callable[[Unit], UnitScore]:
        return self.score

    def score(self, unit: Unit) -> UnitScore:
        began = time.perf_counter()
        time.sleep(self.seconds)
        nll = float(unit.factors.values[-1]) + unit.sample
        return UnitScore(nll, NUM_TOKENS, True, time.perf_counter() - began)


def needle_set(name: str, num_samples: int) -> NeedleSet:
    ids = tuple(f"{name}/{sample}" for sample in range(num_samples))
    return NeedleSet(name, ids, (NUM_TOKENS,) * num_samples, (0.0,) * num_samples)


def recipe(candidates: int) -> Recipe:
    return Recipe(
        name="bench",
        model={"path": "none"},
        search={
            "target_length": TARGET_LENGTH,
            "preset": "paper",
            "population_size": candidates,
            "top_k": candidates,  # so nothing is eliminated
            "iterations": 0,
        },
        report={"methods": ["longrope2"], "num_samples": 1, "depth": "start"},
    )


def measure(num_scorers: int, seconds: float, candidates: int, samples: int) -> tuple[float, float]:
    """Return units a second and the busy share of one generation."""
    sizes = {SEARCH_SET: samples, report_set(TARGET_LENGTH): 1}
    needle_sets = {name: needle_set(name, size) for name, size in sizes.items()}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        run_dir.create()
        actors = Actors(
            actor_factory(SleepingSetup(seconds), RESOURCES), num_scorers, RESOURCES, "scorer"
        )
        pool: Pool[Unit, UnitScore] = Pool(actors, Limits())
        while pool.counts()["starting"]:
            pool.wait()
        SearchLoop(recipe(candidates), GEOMETRY, needle_sets, run_dir, pool, {}).run()
        pool.close()
        scores = scores_of(run_dir).load().values()
    rows = [score for score in scores if score.needle_set == SEARCH_SET]
    wall = max(r.started + r.seconds for r in rows) - min(r.started for r in rows)
    return len(rows) / wall, sum(r.seconds for r in rows) / (wall * num_scorers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scorers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with ray_session():
        rates = [measure(4, 0.0, args.candidates, 30)[0] for _ in range(args.repeats)]
        print(
            f"units a second, 4 scorers that do nothing: median {statistics.median(rates):.0f} "
            f"of {[round(rate) for rate in rates]}"
        )
        shares = [
            measure(args.scorers, args.seconds, args.candidates, 10)[1] for _ in range(args.repeats)
        ]
        print(
            f"busy share of {args.scorers} scorers, {args.seconds} s a unit, {args.candidates} "
            f"candidates x 10 samples: median {statistics.median(shares):.1%} "
            f"of {[f'{share:.1%}' for share in shares]}"
        )


if __name__ == "__main__":
    main()
