"""The study file: variants of a recipe and seeds, whose pairs are the study's trials.

name = "operators"
recipe = "demo"                          # a shipped recipe, or a file beside the study
seeds = [0, 1, 2, 3, 4]

[settings]                               # recipe fields of every trial
report.attention_factors = [1.0]

[[variants]]                             # the first one is what the others are compared with
name = "default"

[[variants]]
name = "authors"
settings.search.preset = "authors"       # recipe fields of this variant's trials
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator

from longrope2_ray.errors import RecipeError
from longrope2_ray.recipe.base import Location, Positive, Section
from longrope2_ray.recipe.loading import load_recipe, merge_tables, mistakes, read_toml
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.storage.rundir import require_free_name

STUDY_JSON = "study.json"
STUDY_MARKDOWN = "study.md"


def _no_seed(settings: dict[str, Any]) -> dict[str, Any]:
    for name in ("search", "train"):
        section = settings.get(name)
        if isinstance(section, dict) and "seed" in section:
            raise ValueError(f"expected no {name}.seed, which seeds sets, got {section['seed']!r}")
    return settings


def _free_name(name: str) -> str:
    require_free_name(name)
    if name == STUDY_MARKDOWN:
        raise ValueError(f"expected a folder of its own in the study's directory, got {name!r}")
    return name


FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Settings = Annotated[dict[str, Any], AfterValidator(_no_seed)]


class Variant(Section):
    """A variant of the recipe.

    Attributes:
        name: its name in the tables, and its folder in the study's directory.
        settings: nested tables of recipe fields, stronger than the study's.
        train: whether training data, a training and held-out needles of what was trained follow
            each search.
    """

    name: Annotated[FolderName, AfterValidator(_free_name)]
    settings: Settings = Field({})
    train: bool = False


class StudySpec(Section):
    """The content of a study file.

    Attributes:
        name: the study's name, and its directory below ``runs`` unless another is given.
        recipe: a shipped recipe's name, or a file, beside the study's own if it is there.
        seeds: values of ``search.seed`` and ``train.seed``; each variant is searched with each of
            them.
        settings: nested tables of recipe fields of every trial.
        variants: the variants, the one that the others are compared with first.
        max_concurrent_trials: trials at once. Above 1 ``scorer.num_scorers`` says how many scorers
            each takes.
    """

    name: FolderName
    recipe: Location
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    settings: Settings = Field({})
    variants: Annotated[list[Variant], Field(min_length=1)]
    max_concurrent_trials: Positive = 1

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"expected different numbers, got {seeds}")
        return seeds

    @field_validator("variants")
    @classmethod
    def _different_names(cls, variants: list[Variant]) -> list[Variant]:
        names = [variant.name for variant in variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected different names, got {', '.join(twice)} more than once")
        return variants


@dataclass(frozen=True)
class Trial:
    """One trial of a study: a whole search, and a training if its variant has one.

    Attributes:
        variant: name of its variant.
        seed: its ``search.seed`` and ``train.seed``.
        recipe: the recipe with everything set.
        train: whether training data and a training follow the search.
    """

    variant: str
    seed: int
    recipe: Recipe
    train: bool

    @property
    def folder(self) -> str:
        """The trial's run directory, relative to the study's."""
        return f"{self.variant}/seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study whose trials' recipes are loaded.

    Attributes:
        spec: the content of its file.
        trials: the trials in the order in which they start: seed by seed, so that all variants can
            be compared as early as possible.
    """

    spec: StudySpec
    trials: Sequence[Trial]


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Load a study and the recipes of all its trials.

    Args:
        path: the TOML file.
        overrides: recipe fields of every trial as words of the command line, the strongest.

    Raises:
        RecipeError: with one message for the mistakes in the study, a recipe or the overrides.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"study: expected a TOML file, got {str(path)!r}, which does not exist")
    try:
        spec = StudySpec(**read_toml(path, "study"))
    except ValidationError as error:
        raise RecipeError(mistakes(str(path), error, StudySpec, "study")) from error
    variants = spec.variants
    trials = [_trial(path, spec, its, seed, overrides) for seed in spec.seeds for its in variants]
    _require_scorers(path, spec, trials)
    return Study(spec, trials)


def _trial(
    path: Path, spec: StudySpec, variant: Variant, seed: int, overrides: Sequence[str]
) -> Trial:
    """Load the recipe of one trial.

    Raises:
        RecipeError: if it cannot be used.
    """
    beside = path.parent / spec.recipe
    settings = merge_tables(spec.settings, variant.settings)
    recipe = load_recipe(
        beside if beside.is_file() else spec.recipe,
        overrides,
        merge_tables(settings, {"search": {"seed": seed}, "train": {"seed": seed}}),
        f"the settings of variant {variant.name} in {path}",
    )
    for name, section in (("search", recipe.search), ("train", recipe.train)):
        if section.seed != seed:
            raise RecipeError(f"--{name}.seed: expected none, since the study's seeds set it")
    if variant.train and recipe.data is None:
        raise RecipeError(
            f"{path}:\n  variants.train: expected a recipe with a [data] section, which "
            f"{spec.recipe} has not"
        )
    return Trial(variant.name, seed, recipe, variant.train)


def _require_scorers(path: Path, spec: StudySpec, trials: Iterable[Trial]) -> None:
    """Refuse trials at once of which the first would take all scorers that there is room for.

    Raises:
        RecipeError: naming the field to set.
    """
    greedy = [trial.variant for trial in trials if not trial.recipe.scorer.num_scorers]
    if spec.max_concurrent_trials > 1 and greedy:
        raise RecipeError(
            f"{path}:\n  max_concurrent_trials: expected 1 or a number of scorers in "
            f"settings.scorer.num_scorers, since variant {greedy[0]} takes all that there is room "
            f"for"
        )
