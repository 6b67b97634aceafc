"""From a recipe to a running search: every cheap check first, then Ray, then the scorers."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from longrope2_ray.model.costs import (
    ACCELERATORS,
    RAY_ACCELERATORS,
    gpu_memory_bytes,
    scorer_memory_bytes,
)
from longrope2_ray.recipe.fields import FREE_FIELDS, flatten
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.sections import NeedleSection
from longrope2_ray.rope.baselines import require_methods
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.evolution import Evolution
from longrope2_ray.search.loop import SearchRun
from longrope2_ray.search.scores import SEARCH_SET, Score, Unit, report_set, summarize
from longrope2_ray.search.space import SearchSpace
from longrope2_ray.search.status import Observer
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.tasks.books import Book, load_books
from longrope2_ray.tasks.needle import NeedleSample, build_needle_set, needle_fingerprint

log = logging.getLogger("longrope2")


MEMORY_MARGIN = 1.25  # of an estimate: what is refused for it would not have fitted


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs that does not need Ray or the model's weights."""

    recipe: Recipe
    spec: Any
    needle_sets: Mapping[str, Sequence[NeedleSample]]
    fingerprints: Mapping[str, str]

    @property
    def num_tokens(self) -> dict[str, list[int]]:
        """Needle set -> answer tokens of each sample."""
        return {
            name: [s.answer_span[1] - s.answer_span[0] for s in samples]
            for name, samples in self.needle_sets.items()
        }


def prepare(recipe: Recipe) -> Prepared:
    """Check the model's configuration, the search space, the texts and the tokenizer, and build the needle sets.

    Raises:
        ValueError: with one clear message, before anything expensive.
    """
    from longrope2_ray.model.fingerprint import model_fingerprint
    from longrope2_ray.model.loading import check_attention, load_tokenizer, require_loadable
    from longrope2_ray.model.spec import read_spec, require_sight

    require_methods(recipe.report.methods)
    books = {
        name: load_books(getattr(recipe, name).text, f"{name}.text")
        for name in ("needles", "report")
    }
    require_held_out(books["needles"], books["report"])
    model, target = recipe.model, recipe.search.target_length
    check_attention(model.attention, model.device)
    spec = read_spec(model.path, original_length=model.original_length, **model.reading)
    require_sight(spec, model.path, target)
    require_loadable(model.path, dtype=model.dtype, attention=model.attention, **model.reading)
    Evolution(SearchSpace.from_recipe(spec.geometry, recipe.search), recipe.search)
    tokenizer: Any = load_tokenizer(model.path, **model.files)

    def samples(name: str, section: NeedleSection, length: int) -> list[NeedleSample]:
        return build_needle_set(
            tokenizer,
            books[name],
            length=length,
            num_samples=section.num_samples,
            seed=section.seed,
            depth=section.depth,
            section=name,
        )

    needle_sets = {SEARCH_SET: samples("needles", recipe.needles, target)}
    for length in recipe.report.lengths or [target]:
        needle_sets[report_set(length)] = samples("report", recipe.report, length)
    fingerprints = {f"needles {name}": needle_fingerprint(s) for name, s in needle_sets.items()}
    return Prepared(
        recipe,
        spec,
        needle_sets,
        {"model": model_fingerprint(model.path, **model.files), **fingerprints},
    )


def require_held_out(searched: Sequence[Book], reported: Sequence[Book]) -> None:
    """Refuse a text that is both searched on and reported on.

    Raises:
        ValueError: if so; the message names it.
    """
    texts = {book.text for book in searched}
    shared = [book.name for book in reported if book.text in texts]
    if shared:
        raise ValueError(
            f"report.text: expected texts that needles.text does not have, so that what is reported is held out, got "
            f"{', '.join(shared[:3])} in both; split the texts between them"
        )


def open_run(prepared: Prepared, run_dir: RunDir) -> bool:
    """Begin or resume the run in ``run_dir``; True if it was there.

    Raises:
        RunDirError: if another run lives there.
    """
    flat = {k: v for k, v in flatten(prepared.recipe).items() if not k.startswith(FREE_FIELDS)}
    geometry = prepared.spec.geometry
    facts = {
        "geometry": {
            "head_dim": geometry.head_dim,
            "rotary_dim": geometry.rotary_dim,
            "rope_base": geometry.base,
            "original_length": geometry.original_length,
        },
        "target_length": prepared.recipe.search.target_length,
        "num_samples": prepared.recipe.needles.num_samples,
    }
    resumed = run_dir.open(
        flat, prepared.fingerprints, prepared.recipe.model_dump(mode="json"), facts
    )
    run_dir.patience_seconds = (
        prepared.recipe.storage.patience_seconds
    )  # from here on something could be lost
    return resumed


@contextmanager
def scorer_pool(prepared: Prepared) -> Iterator[Any]:
    """The scorers of a run.

    Raises:
        ValueError: if the cluster has no room, or the machine no memory, for one scorer.
    """
    import ray

    from longrope2_ray.workers.pool import ScorerPool, scorer_factory
    from longrope2_ray.workers.resources import capacity, node_resources, scorer_resources

    recipe = prepared.recipe
    cluster = ray.cluster_resources()
    resources = scorer_resources(recipe.scorer, recipe.model.device, cluster)
    room = capacity(node_resources(), resources)
    if room < 1 and not (recipe.scorer.num_scorers and os.environ.get("RAY_ADDRESS")):
        raise ValueError(
            f"scorer.gpus_per_scorer, scorer.cpus_per_scorer: expected room for one scorer of {resources}, "
            f"the cluster has {cluster.get('CPU', 0):g} CPU and {cluster.get('GPU', 0):g} GPU; where an autoscaler brings "
            f"nodes, set scorer.num_scorers to how many scorers to ask for, and model.device = 'cuda' if they have GPUs"
        )
    if resources["GPU"]:
        _require_gpu_memory(prepared)
    else:
        _require_memory(prepared, recipe.scorer.num_scorers or room)
    factory = scorer_factory(
        recipe.model, recipe.scorer, ray.put(dict(prepared.needle_sets)), resources
    )
    pool = ScorerPool(factory, recipe.scorer.num_scorers, resources, recipe.scorer)
    try:
        yield pool
    finally:
        pool.close()


def _require_memory(prepared: Prepared, num_scorers: int) -> None:
    from longrope2_ray.workers.resources import node_resources

    need = scorer_memory_bytes(prepared.spec, prepared.recipe)["total"]
    nodes = [node.get("memory", 0) for node in node_resources()]
    have, largest = sum(nodes), max(nodes, default=0)
    if have and need > largest:
        raise ValueError(
            f"scorer: expected {need / 2**30:.1f} GiB of memory for one scorer at {prepared.recipe.search.target_length} "
            f"tokens, the largest machine has {largest / 2**30:.1f} GiB; lower search.target_length or "
            f"scorer.mlp_chunk_tokens, or set model.dtype = 'bfloat16', and another --run-dir, since they change the result"
        )
    if have and num_scorers * need > have:
        log.warning(
            "%d scorers need about %.1f GiB, the cluster has %.1f; set scorer.num_scorers = %d if they are killed",
            num_scorers, num_scorers * need / 2**30, have / 2**30, int(have // need),
        )  # fmt: skip


def _require_gpu_memory(prepared: Prepared) -> None:
    """Refuse a scorer whose need is clearly above every GPU of the cluster, where Ray knows what they are."""
    from longrope2_ray.workers.resources import node_resources

    prefix, share = "accelerator_type:", min(prepared.recipe.scorer.gpus_per_scorer, 1.0)
    kinds = {
        next(
            (
                RAY_ACCELERATORS.get(name.removeprefix(prefix))
                for name in node
                if name.startswith(prefix)
            ),
            None,
        )
        for node in node_resources()
        if node.get("GPU")
    }
    if not kinds or None in kinds:
        return  # of an unknown one the first load says it
    have, kind = max((ACCELERATORS[kind].memory_gib * share, kind) for kind in kinds if kind)
    need = gpu_memory_bytes(prepared.spec, prepared.recipe) / 2**30
    if need > MEMORY_MARGIN * have:
        raise ValueError(
            f"scorer: expected about {need:.1f} GiB on each GPU of a scorer at {prepared.recipe.search.target_length} tokens, "
            f"the largest has {have:.1f} GiB ({kind}); set scorer.gpus_per_scorer, or lower search.target_length or "
            f"scorer.mlp_chunk_tokens or set model.dtype = 'bfloat16', with another --run-dir"
        )


def run_search(
    prepared: Prepared, run_dir: RunDir, observers: Sequence[Observer]
) -> dict[str, Any]:
    """The search of an opened run, from start or resumed, to its ``winner.json``.

    Raises:
        FencedError: if a newer driver takes the run directory over.
        StoppedError: if it cannot go on.
    """
    run_dir.take_over()
    with scorer_pool(prepared) as pool:
        run = SearchRun(
            prepared.recipe,
            prepared.spec.geometry,
            prepared.num_tokens,
            run_dir,
            pool,
            prepared.fingerprints,
            observers,
        )
        return run.run()


def score_vectors(
    prepared: Prepared, vectors: Mapping[str, RescaleFactors]
) -> dict[str, dict[str, Any]]:
    """Needle set -> needle perplexity, accuracy and NLL by sample of its vector."""
    scores: dict[tuple[str, int], Score] = {}
    keys = [(name, sample) for name in vectors for sample in range(len(prepared.needle_sets[name]))]
    with scorer_pool(prepared) as pool:
        for name, sample in keys:
            pool.submit(Unit("vector", name, sample, vectors[name]))
        while len(scores) < len(keys):
            new = {(score.needle_set, score.sample): score for score in pool.wait()}
            scores.update(new)
            if new:
                end = "" if sys.stderr.isatty() else "\n"
                print(
                    f"{'' if end else chr(13)}scored {len(scores)} of {len(keys)}",
                    end=end,
                    file=sys.stderr,
                    flush=True,
                )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return {name: summarize([scores[key] for key in keys if key[0] == name]) for name in vectors}
