"""Ways of searching, compared on a real model after the same number of scored units.

    python tests/benchmarks/compare_search.py --units 240 --seeds 5 [--variants push sort ...]

Every (variant, seed) is a search of one Ray actor, which loads the model once. What counts is the
best complete candidate after the given number of scored units: on the search's own needles, and on
held-out ones. The table has the medians over the seeds.
"""

import argparse
import json
import math
import statistics
import time
from typing import Any

import ray

from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.evolution import Evolution
from longrope2_ray.search.preparation import Prepared, prepare
from longrope2_ray.search.racing import Race, RaceRules
from longrope2_ray.search.scores import SEARCH_SET, UnitScore, perplexity, report_set
from longrope2_ray.search.space import SearchSpace
from longrope2_ray.tasks.needle import NeedleSample
from longrope2_ray.workers.connection import ray_session

# Name of a variant -> its fields of the recipe's search section.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "random": {"preset": "random"},
    "paper": {"preset": "paper"},
    "authors": {"preset": "authors"},
    "longrope": {"preset": "longrope", "tail_bounds": (1.0, 1.25)},
    "longrope, no start tokens": {
        "preset": "longrope",
        "tail_bounds": (1.0, 1.25),
        "start_tokens": [0],
    },
    "longrope, up to 2 ratio": {"preset": "longrope"},
    "longrope, up to 2 ratio, no start tokens": {"preset": "longrope", "start_tokens": [0]},
    "start tokens": {"start_tokens": [0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256]},
    "attention": {"attention_factor": "search", "attention_bounds": (1.0, 1.4)},
    "mutants": {"initial": "mutants"},
    "steps": {"initial": "steps"},
    "steps, immigrants 0.2": {"initial": "steps", "immigrants": 0.2},
    "steps, immigrants 0.2, p 0.1": {
        "initial": "steps",
        "immigrants": 0.2,
        "mutation_probability": 0.1,
    },
    "steps, immigrants 0.5": {"initial": "steps", "immigrants": 0.5},
    "steps, block, immigrants 0.5": {"initial": "steps", "mutation": "block", "immigrants": 0.5},
    "steps, local": {"initial": "steps", "mutation": "local"},
    "steps, local, immigrants 0.2": {"initial": "steps", "mutation": "local", "immigrants": 0.2},
    "immigrants 0.5": {"immigrants": 0.5},
    "sort": {"mutation": "sort"},
    "local": {"mutation": "local"},
    "block": {"mutation": "block"},
    "neighbors": {"mutation": "neighbors"},
    "authors' mutation": {"mutation": "authors"},
    "authors' crossover": {"crossover": "authors"},
    "no shift": {"shift_probability": 0.0},
    "niche 1": {"niche_size": 1},
    "blend": {"crossover": "blend"},
    "random steps": {"preset": "random", "initial": "steps"},
    "all dims": {"dimensions": "all"},
    "racing off": {"racing": "off"},
    "statistical": {"racing": "statistical"},
    "statistical, 1 s.e.": {"racing": "statistical", "racing_confidence": 1.0},
}


# Fields that every variant takes from the recipe.
KEPT = (
    "target_length",
    "population_size",
    "top_k",
    "num_offspring",
    "attention_factor",
    "critical_dims",
    "tail_bounds",
)


@ray.remote(num_cpus=1)
class Runner:
    """Keeps the model; runs one search after the other in its process."""

    def __init__(self, prepared: Prepared):
        from longrope2_ray.model.loading import load_model
        from longrope2_ray.search.scorer import NeedleScorer

        loaded = load_model(prepared.recipe.model, threads=1)
        self.prepared = prepared
        self.scorer = NeedleScorer(loaded, prepared.shape)

    def search(self, variant: str, seed: int, units: int, iterations: int | None) -> dict[str, Any]:
        """Search until ``units`` are scored, or for ``iterations`` generations if given."""
        base = self.prepared.recipe.search
        chosen = {name: value for name, value in base.model_dump().items() if name in KEPT}
        ends = 10_000 if iterations is None else iterations
        settings = type(base)(**{**chosen, "seed": seed, "iterations": ends, **VARIANTS[variant]})
        samples = self.prepared.samples[SEARCH_SET]
        evolution = Evolution(
            SearchSpace.from_recipe(self.prepared.shape.geometry, settings), settings
        )
        nll: dict[str, dict[int, float]] = {}
        spent, began, curve = 0, time.monotonic(), []
        best, best_total = None, math.inf
        while spent < units and not evolution.finished:
            generation = evolution.generation
            vectors = {c.id: c for c in generation.candidates}
            dims = {c.id: c.critical_dim for c in (*generation.survivors, *generation.candidates)}
            race = Race(
                dims,
                list(vectors),
                {c.id: nll[c.id] for c in generation.survivors},
                len(samples),
                RaceRules.of(settings),
            )
            while not race.finished and spent < units and (unit := race.next_unit()):
                id, sample = unit
                result = self.score(samples[sample], vectors[id].factors)
                nll.setdefault(id, {})[sample] = result.nll_sum
                race.add(id, sample, result.nll_sum)
                spent += 1
            for id, total in race.totals.items():
                if total < best_total:
                    best, best_total = vectors[id], total
            curve.append((spent, best_total))
            if race.finished:
                evolution.tell(race.totals)
        if best is None:
            raise ValueError(f"--units: expected enough to complete a candidate, got {units}")
        tokens = self.prepared.needle_sets[SEARCH_SET].num_tokens
        held_out = self.prepared.samples[report_set(base.target_length)]
        held = [self.score(sample, best.factors) for sample in held_out]
        return {
            "variant": variant,
            "seed": seed,
            "units": spent,
            "search_ppl": perplexity(best_total, sum(tokens)),
            "held_out_ppl": perplexity(
                sum(h.nll_sum for h in held), sum(h.num_tokens for h in held)
            ),
            "accuracy": sum(h.correct for h in held) / len(held),
            "critical_dim": best.critical_dim,
            "attention_factor": round(best.attention_factor, 4),
            "start_tokens": best.start_tokens,
            "generations": evolution.generation.index,
            "seconds": round(time.monotonic() - began, 1),
        }

    def score(self, sample: NeedleSample, factors: RescaleFactors) -> UnitScore:
        return self.scorer.score(sample, factors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--units", type=int, default=240)
    parser.add_argument(
        "--iterations", type=int, help="compare whole searches of this many generations instead"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    args, overrides = parser.parse_known_args()
    prepared = prepare(load_recipe(args.recipe, overrides))
    units = 10**9 if args.iterations is not None else args.units
    with ray_session():
        runners = [Runner.remote(prepared) for _ in range(int(ray.cluster_resources()["CPU"]))]
        pool = ray.util.ActorPool(runners)
        work = [
            (variant, seed)
            for seed in range(args.first_seed, args.first_seed + args.seeds)
            for variant in args.variants
        ]
        rows = []
        for row in pool.map_unordered(
            lambda a, w: a.search.remote(*w, units, args.iterations), work
        ):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(
        f"{'variant':<14} {'search ppl':>10} {'held out':>10} {'accuracy':>9} {'units':>7}   "
        f"(medians of {args.seeds} seeds)"
    )
    for variant in args.variants:
        mine = [row for row in rows if row["variant"] == variant]
        middle = {
            k: statistics.median(r[k] for r in mine)
            for k in ("search_ppl", "held_out_ppl", "accuracy", "units")
        }
        print(
            f"{variant:<14} {middle['search_ppl']:>10.4f} {middle['held_out_ppl']:>10.4f} "
            f"{middle['accuracy']:>9.2f} {middle['units']:>7.0f}"
        )


if __name__ == "__main__":
    main()
