"""The driver without a model: units per second with no-op scorers, and the busy share of sleeping ones.

    python tests/benchmarks/bench_pool.py [--seconds 0.2] [--scorers 32]

The whole driver is measured: race, ledger with its syncs, status, pool, on a real Ray. Scorers that sleep stand for GPUs.
"""

import argparse
import os
import statistics
import tempfile
import time

import ray

from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.sections import ScorerSection
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.loop import SearchRun
from longrope2_ray.search.scores import SEARCH_SET
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.connection import ray_session
from longrope2_ray.workers.pool import ScorerPool


class SleepingScorer:
    """Takes ``seconds`` for a unit and answers with a number that depends on it."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def place(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        pass

    def score(
        self, needle_set: str, sample: int, values, attention_factor: float, start_tokens: int
    ) -> tuple[float, int, bool, float]:
        began = time.perf_counter()
        time.sleep(self.seconds)
        return float(values[-1]) + sample, 8, True, time.perf_counter() - began


def measure(num_scorers: int, seconds: float, candidates: int, samples: int) -> tuple[float, float]:
    """(units per second, busy share) of one generation."""
    recipe = Recipe(
        name="bench",
        model={"path": "none"},
        search={
            "target_length": 131072,
            "population_size": candidates,
            "iterations": 0,
            "racing": "off",
        },
        report={"methods": ["longrope2"], "num_samples": 1},
    )
    remote = ray.remote(SleepingScorer)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        run_dir.create()
        pool = ScorerPool(
            lambda name: remote.options(num_cpus=0).remote(seconds),
            num_scorers,
            {"CPU": 0},
            ScorerSection(),
        )
        while pool.counts()["starting"]:
            pool.wait()
        tokens = {SEARCH_SET: [8] * samples, "report@131072": [8]}
        SearchRun(recipe, RopeGeometry(128, 128, 5e5, 8192), tokens, run_dir, pool, {}).run()
        rows = [score for key, score in run_dir.load_scores().items() if key[1] == SEARCH_SET]
        pool.close()
    wall = max(r.started + r.seconds for r in rows) - min(r.started for r in rows)
    return len(rows) / wall, sum(r.seconds for r in rows) / (wall * num_scorers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scorers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with ray_session():
        rates = [measure(4, 0.0, 64, 30)[0] for _ in range(args.repeats)]
        print(
            f"no-op units per second (4 scorers): median {statistics.median(rates):.0f} of {[round(r) for r in rates]}"
        )
        shares = [measure(args.scorers, args.seconds, 64, 10)[1] for _ in range(args.repeats)]
        print(
            f"busy share of {args.scorers} scorers, {args.seconds} s a unit, 64 candidates x 10 samples: "
            f"median {statistics.median(shares):.1%} of {[f'{s:.1%}' for s in shares]}"
        )


if __name__ == "__main__":
    main()
