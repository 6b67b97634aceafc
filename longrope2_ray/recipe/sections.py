"""The recipe's sections for needles, the report, scorers and storage."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from longrope2_ray.recipe.base import AttentionFactor, Location, Positive, Section
from longrope2_ray.recipe.identity import FREE, SEARCH

DEPTHS = [0.0, 0.25, 0.5, 0.75]


def _check_depth(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """Return the depth that a recipe says; a list of one, as the command line makes it, as one."""
    depth: Any = []
    with suppress(ValidationError):
        depth = read(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if isinstance(depth, str):
        return depth
    numbers = depth if isinstance(depth, list) else [depth]
    if not numbers or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(
            f"expected start, stratified, a number in 0 ... 1 or a list of such numbers, "
            f"got {value!r}"
        )
    return depth


Depth = Annotated[Literal["start", "stratified"] | float | list[float], WrapValidator(_check_depth)]


class NeedleSection(Section):
    """The needle documents, of the search or held out."""

    text: Annotated[list[Location], SEARCH] = Field(
        ["bundled:search"], description="Files, directories, globs, or bundled:search."
    )
    num_samples: Annotated[Positive, SEARCH] = Field(
        10, description="Needle documents, each from another book as far as there are enough."
    )
    depth: Annotated[Depth, SEARCH] = Field(
        DEPTHS,
        description="Where needles stand: start (paper), stratified over 0 ... 1, a number in "
        "0 ... 1, or a list of numbers, which they take in turns.",
    )
    seed: Annotated[int, SEARCH] = Field(0, ge=0, description="Seed of the needles.")

    @model_validator(mode="after")
    def _check(self) -> "NeedleSection":
        num_depths = len(self.depth) if isinstance(self.depth, list) else 1
        if self.num_samples < num_depths:
            raise ValueError(
                f"num_samples: expected at least {num_depths} needles, one for each depth, got "
                f"{self.num_samples}; raise it, or name fewer depths"
            )
        return self


class SearchNeedleSection(NeedleSection):
    """The needle documents that the search scores candidates on."""

    objective: Annotated[Literal["answer", "document"], SEARCH] = Field(
        "answer",
        description="Tokens whose perplexity is the score: those of the answer, or of the whole "
        "document (Table 6's ablation). Held-out needles are always scored on the answer.",
    )


class ReportSection(NeedleSection):
    """The held-out needle set: winner and baselines are reported on it, nothing is chosen by it."""

    text: Annotated[list[Location], FREE] = Field(
        ["bundled:report"], description="Texts for reporting; keep them apart from needles.text."
    )
    num_samples: Annotated[Positive, FREE] = Field(10, description="Held-out needle documents.")
    depth: Annotated[Depth, FREE] = Field(
        DEPTHS, description="Where held-out needles stand, as needles.depth."
    )
    seed: Annotated[int, FREE] = Field(
        1, ge=0, description="Seed of the held-out needles; keep it apart from needles.seed."
    )
    lengths: Annotated[list[Positive], FREE] = Field(
        [], description="Lengths reported, in tokens; the target length unless given."
    )
    methods: Annotated[list[str], FREE] = Field(
        ["unscaled", "pi", "ntk", "llama3", "yarn", "longrope2"],
        description="Rows of the table, longrope2 the winner.",
    )
    attention_factors: Annotated[list[AttentionFactor], FREE] = Field(
        [], description="Attention factors of the tables; the winner's unless given."
    )

    @model_validator(mode="after")
    def _check_factors(self) -> "ReportSection":
        for factor in self.attention_factors:
            if not isinstance(factor, str) and factor <= 0:
                raise ValueError(
                    f"attention_factors: expected positive numbers, su, yarn or search, "
                    f"got {factor}"
                )
        return self


class ScorerSection(Section):
    """The scorers: how many, how large, and how long a run waits for them."""

    num_scorers: Annotated[int, FREE] = Field(
        0, ge=0, description="Scorers; 0 takes as many as the cluster has room for."
    )
    gpus_per_scorer: Annotated[float, FREE] = Field(
        1, ge=0, description="GPUs of one scorer where there are any; above 1 spreads a model."
    )
    cpus_per_scorer: Annotated[float, FREE] = Field(
        1, gt=0, description="CPUs reserved for one scorer."
    )
    threads: Annotated[Positive, SEARCH] = Field(
        1, description="CPU threads of one scorer; part of the result, since sums depend on it."
    )
    mlp_chunk_tokens: Annotated[Positive, SEARCH] = Field(
        8192, description="Tokens that go through an MLP at once; bounds memory."
    )
    max_attempts: Annotated[Positive, FREE] = Field(
        4, description="Times a unit, or the start of a scorer, is tried before the run stops."
    )
    stall_seconds: Annotated[float, FREE] = Field(
        1800, gt=0, description="A scorer busy for longer on one unit is replaced."
    )
    load_seconds: Annotated[float, FREE] = Field(
        900, gt=0, description="A scorer that takes longer to load its model is replaced."
    )
    start_seconds: Annotated[float, FREE] = Field(
        1800, gt=0, description="Time without any scorer before the run stops."
    )
    look_ahead: Annotated[bool, FREE] = Field(
        True,
        description="Idle scorers take what the report or the next generation will need; the "
        "result is the same.",
    )


class StorageSection(Section):
    """The storage of the run directory."""

    patience_seconds: Annotated[float, FREE] = Field(
        600,
        ge=0,
        description="How long to try again when the run directory's storage fails or is full.",
    )
