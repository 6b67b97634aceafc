"""A search on Ray: from a recipe to its winner, over a pool of scorers that each hold the model."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from longrope2_ray.model.costs import (
    ACCELERATORS,
    RAY_ACCELERATORS,
    gpu_memory_bytes,
    scorer_memory_bytes,
)
from longrope2_ray.recipe.model import ModelSection, ModelShape
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.sections import ScorerSection
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.preparation import Prepared, finished_winner, open_run, prepare
from longrope2_ray.search.scores import NeedleSummary, Score, Unit, UnitScore, is_descent
from longrope2_ray.search.status import Observer
from longrope2_ray.search.winner import Winner
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.tasks.needle import NeedleSample
from longrope2_ray.workers.actors import Actors, actor_factory
from longrope2_ray.workers.connection import ray_session
from longrope2_ray.workers.failures import Limits
from longrope2_ray.workers.pool import Pool
from longrope2_ray.workers.resources import Cluster, capacity, use_gpu

log = logging.getLogger("longrope2")
# Memory is estimated: only what is refused with this margin would certainly not have fitted.
MEMORY_MARGIN = 1.25
MEMORY_ADVICE = (
    "the model at this length does not fit: set scorer.gpus_per_scorer or fewer scorers "
    "(scorer.num_scorers), or lower scorer.mlp_chunk_tokens or set model.dtype = 'bfloat16', with "
    "another --run-dir"
)


def search(
    recipe: Recipe, run_dir: str | None = None, observers: Sequence[Observer] = ()
) -> Winner:
    """Run or resume a whole search on the cluster at ``RAY_ADDRESS``, or on this machine.

    Args:
        recipe: the recipe.
        run_dir: directory or URL, ``runs/<recipe name>`` unless given.
        observers: called with the status after commits and after every generation.

    Raises:
        ValueError: if recipe, model, texts or run directory cannot be used.
        StoppedError: if the search cannot go on; what is scored is kept.
    """
    prepared = prepare(recipe)
    place = RunDir(run_dir or str(Path("runs") / recipe.name))
    open_run(prepared, place)
    winner = finished_winner(prepared, place)
    if winner is not None:
        return winner
    with ray_session():
        return run_search(prepared, place, observers)


def run_search(prepared: Prepared, run_dir: RunDir, observers: Sequence[Observer]) -> Winner:
    """Run the search of an opened run directory, inside a Ray session, to its ``winner.json``.

    Raises:
        FencedError: if a newer driver takes the run directory over.
        StoppedError: if the search cannot go on.
    """
    run_dir.take_over()
    with scorer_pool(prepared) as pool:
        return SearchLoop(
            prepared.recipe,
            prepared.shape.geometry,
            prepared.needle_sets,
            run_dir,
            pool,
            prepared.fingerprints,
            observers,
        ).run()


def score_vectors(
    prepared: Prepared,
    vectors: Mapping[str, RescaleFactors],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, NeedleSummary]:
    """Score one vector on each needle set, inside a Ray session, and return the summaries.

    Args:
        vectors: needle set -> vector.
        progress: called with (samples scored, samples in all).

    Raises:
        StoppedError: if the scoring cannot go on.
    """
    sets = {name: prepared.needle_sets[name] for name in vectors}
    scores: dict[tuple[str, int], Score] = {}
    with scorer_pool(prepared) as pool:
        for name, needle_set in sets.items():
            for sample, sample_id in enumerate(needle_set.sample_ids):
                pool.submit(Unit("vector", name, sample, sample_id, vectors[name]))
        total = sum(map(len, sets.values()))
        while len(scores) < total:
            new = [Score.of(done) for done in pool.wait()]
            scores.update({(score.needle_set, score.sample): score for score in new})
            if new and progress:
                progress(len(scores), total)
    return {
        name: NeedleSummary.of(
            [scores[name, sample] for sample in range(len(needle_set))], needle_set
        )
        for name, needle_set in sets.items()
    }


@dataclass(frozen=True)
class ScorerSetup:
    """The setup of a scorer: it loads the model and returns the function that scores.

    Attributes:
        model: the recipe's model section.
        shape: the model's shape.
        settings: the recipe's scorer section.
        samples: needle set -> its samples, the same objects for every scorer.
    """

    model: ModelSection
    shape: ModelShape
    settings: ScorerSection
    samples: Mapping[str, Sequence[NeedleSample]]

    def __call__(self, num_gpus: int) -> Callable[[Unit], UnitScore]:
        """Load the model on this worker and return the function that scores a unit."""
        from longrope2_ray.model.loading import load_model
        from longrope2_ray.search.scorer import NeedleScorer

        settings = self.settings
        # Ray gives no GPU to a worker that asks for none.
        loaded = load_model(self.model, threads=settings.threads, num_gpus=max(1, num_gpus))
        scorer = NeedleScorer(loaded, self.shape, mlp_chunk_tokens=settings.mlp_chunk_tokens)

        def score(unit: Unit) -> UnitScore:
            compute = scorer.gradient if is_descent(unit.needle_set) else scorer.score
            return compute(self.samples[unit.needle_set][unit.sample], unit.factors)

        return score


@contextmanager
def scorer_pool(
    prepared: Prepared, cluster: Cluster | None = None
) -> Iterator[Pool[Unit, UnitScore]]:
    """Yield the pool of a run's scorers, which stop at the end of the ``with`` block.

    Raises:
        ValueError: if the cluster has no room, or the machine no memory, for one scorer.
    """
    recipe, cluster = prepared.recipe, cluster or Cluster()
    settings = recipe.scorer
    gpus = settings.gpus_per_scorer if use_gpu(recipe.model.device, cluster.resources()) else 0
    resources = {"CPU": settings.cpus_per_scorer, "GPU": gpus}
    room = _require_room(prepared, cluster, resources)
    if gpus:
        require_gpu_memory(prepared, cluster)
    else:
        require_memory(prepared, cluster, settings.num_scorers or room)
    setup = ScorerSetup(recipe.model, prepared.shape, settings, dict(prepared.samples))
    actors = Actors(
        actor_factory(setup, resources), settings.num_scorers, resources, "scorer", cluster
    )
    pool: Pool[Unit, UnitScore] = Pool(
        actors, _limits(settings), is_doubtful=lambda score: not score.is_finite
    )
    try:
        yield pool
    finally:
        pool.close()


def _limits(settings: ScorerSection) -> Limits:
    return Limits(
        max_attempts=settings.max_attempts,
        stall_seconds=settings.stall_seconds,
        load_seconds=settings.load_seconds,
        start_seconds=settings.start_seconds,
        section="scorer",
        memory_advice=MEMORY_ADVICE,
    )


def _require_room(prepared: Prepared, cluster: Cluster, resources: Mapping[str, float]) -> int:
    """Return how many scorers fit; an autoscaler may bring room where a number is asked for."""
    room = capacity(cluster.nodes(), resources)
    if room < 1 and not (prepared.recipe.scorer.num_scorers and os.environ.get("RAY_ADDRESS")):
        has = cluster.resources()
        cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
        raise ValueError(
            f"scorer.gpus_per_scorer, scorer.cpus_per_scorer: expected room for one scorer of "
            f"{resources}, the cluster has {cpus:g} CPU and {gpus:g} GPU; "
            f"where an autoscaler brings nodes, set scorer.num_scorers to how many scorers to ask "
            f"for, and model.device = 'cuda' if they have GPUs"
        )
    return room


def require_memory(prepared: Prepared, cluster: Cluster, num_scorers: int) -> None:
    """Refuse a scorer that fits no machine of the cluster, and warn where not all fit together.

    Raises:
        ValueError: naming the fields to change.
    """
    recipe = prepared.recipe
    need = scorer_memory_bytes(prepared.shape, recipe)["total"]
    nodes = [node.get("memory", 0) for node in cluster.nodes()]
    have, largest = sum(nodes), max(nodes, default=0)
    if have and need > largest:
        raise ValueError(
            f"scorer: expected {need / 2**30:.1f} GiB of memory for one scorer at "
            f"{recipe.search.target_length} tokens, the largest machine has "
            f"{largest / 2**30:.1f} GiB; lower search.target_length or scorer.mlp_chunk_tokens, or "
            f"set model.dtype = 'bfloat16', and another --run-dir, since they change the result"
        )
    if have and num_scorers * need > have:
        log.warning(
            "%d scorers need about %.1f GiB, the cluster has %.1f; set scorer.num_scorers = %d if "
            "they are killed",
            num_scorers, num_scorers * need / 2**30, have / 2**30, int(have // need),
        )  # fmt: skip


def require_gpu_memory(prepared: Prepared, cluster: Cluster) -> None:
    """Refuse a scorer that is clearly too large for every GPU, where Ray knows what they are.

    Raises:
        ValueError: naming the fields to change.
    """
    recipe, prefix = prepared.recipe, "accelerator_type:"
    share = min(recipe.scorer.gpus_per_scorer, 1.0)
    kinds = set()
    for node in cluster.nodes():
        if node.get("GPU"):
            named = (name.removeprefix(prefix) for name in node if name.startswith(prefix))
            kinds.add(next((RAY_ACCELERATORS.get(name) for name in named), None))
    # Whether the model fits an unknown kind of GPU shows when the first scorer loads it.
    if not kinds or None in kinds:
        return
    have, kind = max((ACCELERATORS[kind].memory_gib * share, kind) for kind in kinds if kind)
    need = gpu_memory_bytes(prepared.shape, recipe) / 2**30
    if need > MEMORY_MARGIN * have:
        raise ValueError(
            f"scorer: expected about {need:.1f} GiB on each GPU of a scorer at "
            f"{recipe.search.target_length} tokens, the largest has {have:.1f} GiB ({kind}); set "
            f"scorer.gpus_per_scorer, or lower search.target_length or scorer.mlp_chunk_tokens or "
            f"set model.dtype = 'bfloat16', with another --run-dir"
        )
