"""The recipe's section for the search, and the presets of its fields."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from longrope2_ray.recipe.base import AttentionFactor, Positive, Section
from longrope2_ray.recipe.identity import SEARCH, PartOf

# ``search.critical_dims`` of a search without a critical dimension: the tail is the whole vector.
EVERY_DIMENSION = (0, 0)


def _check_attention(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """Return the attention factor that a recipe says: a word, a number, or a pair of bounds.

    The command line makes a list of one.
    """
    factor: Any = ()
    with suppress(ValidationError):
        factor = read(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if isinstance(factor, str):
        return factor
    bounds = factor if isinstance(factor, tuple) else (factor, factor)
    if not bounds or not 0 < bounds[0] <= bounds[1]:
        raise ValueError(
            f"expected a positive number, su, yarn, search, or two bounds [low, high] with "
            f"0 < low <= high to search it between them, got {value!r}"
        )
    return factor


SearchedAttention = Annotated[
    AttentionFactor | tuple[float, float], WrapValidator(_check_attention)
]


class SearchSection(Section):
    """The search: its space, and how it goes through it."""

    target_length: Annotated[Positive, PartOf("search", "segments")] = Field(
        description="Target window L in tokens, above the original one."
    )
    preset: Annotated[Literal["default", "paper", "authors", "longrope"], SEARCH] = Field(
        "default",
        description="How it searches, and defaults of the fields below: down the gradient from "
        "published methods; the paper's evolution; the operators of its authors' code; the first "
        "LongRoPE's over every dimension from PI, NTK and YaRN with the positions at the start.",
    )
    population_size: Annotated[Positive, SEARCH] = Field(
        64, description="Candidates in the initial population, P; none in a descent."
    )
    iterations: Annotated[int, SEARCH] = Field(
        0, ge=0, description="Generations after the initial one; the paper's 40, 0 in a descent."
    )
    top_k: Annotated[Positive, SEARCH] = Field(
        1, description="Survivors of each generation; 32 in the evolutionary presets."
    )
    num_offspring: Annotated[Positive, SEARCH] = Field(
        32, description="New candidates a generation; none in a descent."
    )
    mutation_probability: Annotated[float, SEARCH] = Field(
        0.3, gt=0, le=1, description="Probability p that an entry of the tail mutates."
    )
    tail_bounds: Annotated[tuple[float, float], SEARCH] = Field(
        (1.0, 2.0),
        description="Lowest and highest factor of the tail in units of the extension ratio; the "
        "lowest is a factor of 1 where every dimension is searched.",
    )
    critical_dims: Annotated[tuple[int, int] | None, SEARCH] = Field(
        None,
        description="First and last critical dimension (cosine index) tried; d_10 ... d_tcd "
        "unless given; [0, 0] searches every dimension (Table 10's ablation, LongRoPE).",
    )
    starts: Annotated[list[Annotated[str, Field(min_length=1)] | list[float]], SEARCH] = Field(
        [],
        description="What a search over every dimension starts from: baseline methods, or vectors "
        "such as the factors that an extended model was trained with; PI, NTK and YaRN unless "
        "given.",
    )
    start_tokens: Annotated[list[Annotated[int, Field(ge=0)]], SEARCH] = Field(
        [0],
        min_length=1,
        description="LongRoPE's n_hat: how many positions at the start keep the original RoPE; "
        "several numbers to search it with the factors, starting from the first.",
    )
    attention_factor: Annotated[SearchedAttention, SEARCH] = Field(
        "search",
        description="Attention factor during the search: a number (1 in the evolutionary presets), "
        "su, yarn, two bounds to search it between them, or search: from 1 to twice as far from 1 "
        "as the higher one of su and yarn.",
    )
    descent_steps: Annotated[int, SEARCH] = Field(
        30,
        ge=0,
        description="Steps down the gradient of skipped documents before the first generation; 0 "
        "in the evolutionary presets, whose first generation is drawn.",
    )
    skipped_needles: Annotated[Positive, SEARCH] = Field(
        8, description="Skipped documents of each step, which are drawn anew for it."
    )
    skipped_tokens: Annotated[Positive | None, SEARCH] = Field(
        None,
        description="Tokens of a skipped document, which keep their positions; 1/8 of the target "
        "length unless given.",
    )
    seed: Annotated[int, SEARCH] = Field(0, ge=0, description="Seed of the search.")

    @model_validator(mode="after")
    def _check(self) -> "SearchSection":
        self._apply_preset()
        if self.preset == "default":
            self._check_descent()
        else:
            self._check_evolution()
        if self.skipped_tokens is not None and self.skipped_tokens > self.target_length:
            raise ValueError(
                f"skipped_tokens: expected at most target_length {self.target_length}, got "
                f"{self.skipped_tokens}"
            )
        low, high = self.tail_bounds
        if not 0 < low <= high:
            raise ValueError(f"tail_bounds: expected 0 < low <= high, got {low}, {high}")
        first, last = self.critical_dims or (1, 1)
        if not 0 < first <= last and self.critical_dims != EVERY_DIMENSION:
            raise ValueError(
                f"critical_dims: expected 0 < first <= last, or [0, 0] for every dimension, got "
                f"{self.critical_dims}"
            )
        return self

    def _apply_preset(self) -> None:
        """Fill the fields that were not given; what the preset says does not count as given."""
        preset = {**PRESETS[self.preset]}
        if self.preset != "default":
            preset["top_k"] = min(preset["top_k"], self.population_size)
        given = self.model_fields_set
        self.__dict__.update({name: preset[name] for name in preset if name not in given})

    def _check_descent(self) -> None:
        """Refuse what a descent has no use for, rather than ignore it.

        Raises:
            ValueError: naming the field and the preset.
        """
        self._refuse(_OF_EVOLUTION, "a descent draws no population and breeds no offspring")
        if self.iterations:
            self._refuse(["iterations"], "a descent breeds no offspring")
        if self.critical_dims == EVERY_DIMENSION:
            self._refuse(["critical_dims"], "the starts of a descent have critical dimensions")
        if not self.descent_steps:
            raise ValueError(
                "descent_steps: expected at least 1 with preset 'default', which is a descent, "
                "got 0; to search without gradients, take preset 'paper'"
            )

    def _check_evolution(self) -> None:
        """Refuse what an evolutionary preset has no use for, and what does not fit together.

        Raises:
            ValueError: naming the field.
        """
        why = "it draws its first generation, and only preset 'default' descends to it"
        if self.descent_steps:
            self._refuse(["descent_steps"], why)
        self._refuse(_OF_DESCENT, why)
        if self.top_k > self.population_size:
            raise ValueError(
                f"top_k: expected at most population_size {self.population_size}, got {self.top_k}"
            )
        if self.starts and self.critical_dims != EVERY_DIMENSION:
            raise ValueError(
                "starts: expected none unless critical_dims = [0, 0]; a tail starts from constant "
                "ones (Alg. 1)"
            )
        if len(set(self.start_tokens)) < len(self.start_tokens):
            raise ValueError(f"start_tokens: expected different numbers, got {self.start_tokens}")

    def _refuse(self, names: Iterable[str], why: str) -> None:
        """Refuse a field that the recipe gives and its preset does not know.

        The value that it has anyway is no mistake: a run directory's own recipe names every field.
        """
        preset = PRESETS[self.preset]
        for name in names:
            value = getattr(self, name)
            default = preset.get(name, type(self).model_fields[name].default)
            if name in self.model_fields_set and value != default:
                raise ValueError(
                    f"{name}: expected to be left out with preset {self.preset!r}, since {why}; "
                    f"got {value!r}"
                )


_OF_EVOLUTION = (
    "population_size",
    "top_k",
    "num_offspring",
    "mutation_probability",
    "starts",
    "start_tokens",
)
_OF_DESCENT = ("skipped_needles", "skipped_tokens")

_EVOLUTION = {"iterations": 40, "top_k": 32, "attention_factor": 1.0, "descent_steps": 0}

# What a preset sets beside the defaults above. "default" is what jobs/LOG.md measured to be the
# best, "paper" is Alg. 2 read literally, "authors" has the operators of their code, "longrope" is
# the first paper's search (its Table 4). Their operators stand in longrope2_ray.search.operators.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _EVOLUTION,
    "authors": _EVOLUTION,
    "longrope": {
        **_EVOLUTION,
        "critical_dims": EVERY_DIMENSION,
        "tail_bounds": (1.0, 1.25),
        "start_tokens": [0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256],
    },
}
