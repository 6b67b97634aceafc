"""The preparation of a search: all that can be checked without Ray and the model's weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longrope2_ray.model.costs import GRADIENT_PASSES, full_equivalents
from longrope2_ray.recipe.identity import identity
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.sections import NeedleSection
from longrope2_ray.rope.baselines import require_methods
from longrope2_ray.search.cascade import DILUTION, WIDE_DILUTION, attention_share
from longrope2_ray.search.comparison import comparisons
from longrope2_ray.search.evolution import Evolution
from longrope2_ray.search.proposing import num_skipped_tokens, widths
from longrope2_ray.search.scores import (
    SEARCH_SET,
    SKIPPED_SET,
    WIDE_SET,
    NeedleSet,
    descent_set,
    is_descent,
    report_set,
)
from longrope2_ray.search.space import SearchSpace
from longrope2_ray.search.winner import Winner, read_winner
from longrope2_ray.storage.rundir import GENERATIONS_FOLDER, SCORES_FOLDER, RunDir
from longrope2_ray.tasks.books import Book, load_books
from longrope2_ray.tasks.needle import NeedleSample, build_needle_set, needle_fingerprint

# The skipped documents have keys and values of their own.
SKIPPED_SEED = 1_000_003


@dataclass(frozen=True)
class Prepared:
    """The inputs of a search beside Ray and the model's weights.

    Attributes:
        recipe: the recipe.
        shape: the model's shape.
        samples: needle set -> its samples.
        fingerprints: fingerprints of the model and the needle sets.
    """

    recipe: Recipe
    shape: ModelShape
    samples: Mapping[str, Sequence[NeedleSample]]
    fingerprints: Mapping[str, str]

    @property
    def needle_sets(self) -> dict[str, NeedleSet]:
        """The needle sets as the search sees them, by name."""
        return {name: self._needle_set(name, samples) for name, samples in self.samples.items()}

    def _needle_set(self, name: str, samples: Sequence[NeedleSample]) -> NeedleSet:
        tokens = len(samples[0].input_ids)
        equivalents = full_equivalents(self.shape, tokens, self.recipe.search.target_length)
        return NeedleSet(
            name,
            tuple(sample.id for sample in samples),
            tuple(sample.answer_span[1] - sample.answer_span[0] for sample in samples),
            tuple(sample.depth for sample in samples),
            equivalents * (GRADIENT_PASSES if is_descent(name) else 1.0),
        )


def prepare(recipe: Recipe) -> Prepared:
    """Check model configuration, search space, texts and tokenizer, and build the needle sets.

    Raises:
        ValueError: if any of them cannot be used; the message names the recipe field.
    """
    from longrope2_ray.model.fingerprint import model_fingerprint
    from longrope2_ray.model.loading import load_tokenizer, require_loadable
    from longrope2_ray.model.spec import require_window_reaches

    require_methods(recipe.report.methods)
    books = {
        name: load_books(getattr(recipe, name).text, f"{name}.text")
        for name in ("needles", "report")
    }
    require_held_out(books["needles"], books["report"])
    model, target = recipe.model, recipe.search.target_length
    shape = require_loadable(model)
    require_window_reaches(shape, model.path, target)
    Evolution(SearchSpace.from_recipe(shape.geometry, recipe.search), recipe.search)
    tokenizer: Any = load_tokenizer(model)

    def build(name: str, section: NeedleSection, length: int) -> list[NeedleSample]:
        return build_needle_set(
            tokenizer,
            books[name],
            length=length,
            num_samples=section.num_samples,
            seed=section.seed,
            depth=section.depth,
            section=name,
        )

    samples = {SEARCH_SET: build("needles", recipe.needles, target)}
    samples |= _skipped_sets(recipe, tokenizer, books["needles"])
    if recipe.needles.objective == "document":
        samples = {name: [sample.scored_whole() for sample in samples[name]] for name in samples}
    for length in recipe.report.lengths or [target]:
        samples[report_set(length)] = build("report", recipe.report, length)
    prints = {"model": model_fingerprint(model), **_needle_fingerprints(samples)}
    return Prepared(recipe, shape, samples, prints)


def _needle_fingerprints(samples: Mapping[str, Sequence[NeedleSample]]) -> dict[str, str]:
    """Return the fingerprint of each needle set; those of the descent share one."""
    cheap = (SKIPPED_SET, WIDE_SET)
    skipped = [name for name in samples if name in cheap or is_descent(name)]
    prints = {
        f"needles {name}": needle_fingerprint(built)
        for name, built in samples.items()
        if name not in skipped
    }
    if skipped:
        whole = [sample for name in skipped for sample in samples[name]]
        prints[f"needles {SKIPPED_SET}"] = needle_fingerprint(whole)
    return prints


def _skipped_sets(
    recipe: Recipe, tokenizer: Any, books: Sequence[Book]
) -> dict[str, list[NeedleSample]]:
    """Return the documents of the descent by needle set: one to start from, one for each step."""
    search = recipe.search
    if not search.descent_steps:
        return {}
    size, sets = search.skipped_needles, {}
    for wide in widths(search):
        samples = build_needle_set(
            tokenizer,
            books,
            length=search.target_length,
            num_samples=size * (1 + search.descent_steps),
            seed=recipe.needles.seed + SKIPPED_SEED,
            depth=recipe.needles.depth,
            num_tokens=num_skipped_tokens(search, wide),
        )
        share = attention_share(
            num_skipped_tokens(search, wide),
            search.target_length,
            WIDE_DILUTION if wide else DILUTION,
        )
        samples = [replace(sample, attention_share=share) for sample in samples]
        steps = [descent_set(step, wide) for step in range(search.descent_steps)]
        for i, name in enumerate([WIDE_SET if wide else SKIPPED_SET, *steps]):
            sets[name] = samples[i * size : (i + 1) * size]
    return sets


def require_held_out(searched: Sequence[Book], reported: Sequence[Book]) -> None:
    """Refuse a text that is both searched on and reported on.

    Raises:
        ValueError: if there is such a text; the message names it.
    """
    texts = {book.text for book in searched}
    shared = [book.name for book in reported if book.text in texts]
    if shared:
        raise ValueError(
            f"report.text: expected texts that needles.text does not have, so that what is "
            f"reported is held out, got {', '.join(shared[:3])} in both; split the texts between "
            f"them"
        )


def open_run(prepared: Prepared, run_dir: RunDir) -> bool:
    """Begin the search in ``run_dir`` or resume it; return True if it was there.

    Raises:
        RunDirError: if the directory holds another run.
    """
    recipe, geometry = prepared.recipe, prepared.shape.geometry
    searched = ["model", f"needles {SEARCH_SET}"]
    if recipe.search.descent_steps:
        searched.append(f"needles {SKIPPED_SET}")
    resumed = run_dir.open(
        kind="search",
        identity=identity(recipe, "search"),
        fingerprints={name: prepared.fingerprints[name] for name in searched},
        recipe=recipe.model_dump(mode="json"),
        facts={
            "geometry": {
                "head_dim": geometry.head_dim,
                "rotary_dim": geometry.rotary_dim,
                "rope_base": geometry.base,
                "original_length": geometry.original_length,
            },
            "target_length": recipe.search.target_length,
            "num_samples": recipe.needles.num_samples,
        },
        folders=(SCORES_FOLDER, GENERATIONS_FOLDER),
    )
    # From here on there are scores that could be lost, so storage that fails is tried again.
    run_dir.patience_seconds = recipe.storage.patience_seconds
    return resumed


def finished_winner(prepared: Prepared, run_dir: RunDir) -> Winner | None:
    """Return the winner of a finished run if its tables are those of the recipe, else None.

    Other tables do not make another search: run again, it scores only the units that they add.
    """
    winner = read_winner(run_dir)
    if winner is None or dict(winner.fingerprints) != dict(prepared.fingerprints):
        return None
    rows = comparisons(prepared.recipe, prepared.shape.geometry, winner.candidate, None)
    wanted = [(row.length, row.method, row.compared_at) for row in rows]
    found = [(row.length, row.method, row.compared_at) for row in winner.report]
    return winner if found == wanted else None
