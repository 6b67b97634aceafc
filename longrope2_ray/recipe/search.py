"""The recipe's section for the search, and the presets of its fields."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from longrope2_ray.recipe.base import AttentionFactor, Positive, Section
from longrope2_ray.recipe.identity import SEARCH, PartOf


class SearchSection(Section):
    """The search: its space, its population, its operators."""

    target_length: Annotated[Positive, PartOf("search", "segments")] = Field(
        description="Target window L in tokens, above the original one."
    )
    preset: Annotated[
        Literal["default", "descent", "paper", "authors", "longrope", "random"], SEARCH
    ] = Field(
        "default",
        description="Defaults of the fields below: the best of the evolutionary ones; a descent "
        "from published methods; the paper's; the authors' code; the first LongRoPE's search over "
        "every dimension from PI, NTK and YaRN with the positions at the start; random search.",
    )
    population_size: Annotated[Positive, SEARCH] = Field(
        64, description="Candidates in the initial population, P."
    )
    iterations: Annotated[int, SEARCH] = Field(
        40, ge=0, description="Generations after the initial one."
    )
    top_k: Annotated[Positive, SEARCH] = Field(12, description="Survivors of each generation.")
    num_offspring: Annotated[Positive, SEARCH] = Field(
        32, description="New candidates a generation."
    )
    mutation: Annotated[
        Literal["block", "push", "sort", "local", "neighbors", "authors", "random"], SEARCH
    ] = Field("push", description="How a tail changes: see longrope2_ray.search.operators.")
    initial: Annotated[Literal["mutants", "uniform", "steps"], SEARCH] = Field(
        "uniform",
        description="What fills the population beside one constant tail for each critical "
        "dimension: their mutants, tails drawn uniformly, or tails of one to four steps.",
    )
    mutation_probability: Annotated[float, SEARCH] = Field(
        0.3, gt=0, le=1, description="Probability p that an entry of the tail mutates."
    )
    mutation_step: Annotated[float, SEARCH] = Field(
        0.25,
        gt=0,
        le=1,
        description="Step of 'local', 'block' and a searched attention factor, in widths of their "
        "bounds.",
    )
    shift_probability: Annotated[float, SEARCH] = Field(
        0.25,
        ge=0,
        le=1,
        description="Probability that an offspring moves its critical dimension by one.",
    )
    immigrants: Annotated[float, SEARCH] = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of offspring drawn anew from the whole space, as the initial ones.",
    )
    crossover: Annotated[Literal["none", "blend", "authors"], SEARCH] = Field(
        "none", description="How two parents make an offspring."
    )
    crossover_share: Annotated[float, SEARCH] = Field(
        0.5, ge=0, le=1, description="Share of offspring made by crossover, if any."
    )
    niche_size: Annotated[int, SEARCH] = Field(
        0,
        ge=0,
        description="Survivors kept for each critical dimension before the global top k; 0 is the "
        "paper.",
    )
    tail_bounds: Annotated[tuple[float, float], SEARCH] = Field(
        (1.0, 2.0),
        description="Lowest and highest factor of the tail in units of the extension ratio; the "
        "lowest is a factor of 1 where every dimension is searched.",
    )
    critical_dims: Annotated[tuple[int, int] | None, SEARCH] = Field(
        None,
        description="First and last critical dimension (cosine index) tried; d_10 ... d_tcd "
        "unless given.",
    )
    dimensions: Annotated[Literal["tail", "all"], SEARCH] = Field(
        "tail",
        description="Search the tail beyond the critical dimension, or every dimension (Table "
        "10's ablation, LongRoPE).",
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
    attention_factor: Annotated[AttentionFactor, SEARCH] = Field(
        1.0,
        description="Attention factor during the search: a number, su, yarn, or search to find it "
        "with the factors.",
    )
    attention_bounds: Annotated[tuple[float, float] | None, SEARCH] = Field(
        None,
        description="Lowest and highest attention factor where it is searched; from 1 to twice as "
        "far from 1 as the higher one of su and yarn unless given.",
    )
    racing: Annotated[Literal["exact", "statistical", "off"], SEARCH] = Field(
        "exact",
        description="Eliminate hopeless candidates: provably (exact), or by a paired test that "
        "can err (statistical).",
    )
    racing_confidence: Annotated[float, SEARCH] = Field(
        2.0, gt=0, description="Standard errors a statistical race asks for."
    )
    descent_steps: Annotated[int, SEARCH] = Field(
        0,
        ge=0,
        description="Steps down the gradient of skipped documents before the first generation; 0 "
        "is the paper, whose first generation is drawn.",
    )
    skipped_needles: Annotated[Positive, SEARCH] = Field(
        8, description="Skipped documents of each step, which are drawn anew for it."
    )
    skipped_tokens: Annotated[Positive | None, SEARCH] = Field(
        None,
        description="Tokens of a skipped document, which keep their positions; 3/16 of the target "
        "length unless given.",
    )
    seed: Annotated[int, SEARCH] = Field(0, ge=0, description="Seed of the search.")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, dict):
            preset = dict(PRESETS.get(str(data.get("preset", "default")), {}))
            size = str(data.get("population_size", ""))  # a string on the command line
            if "top_k" not in data and size.isdecimal():
                preset["top_k"] = min(
                    preset.get("top_k", cls.model_fields["top_k"].default), max(int(size), 1)
                )
            return {**preset, **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> "SearchSection":
        if self.skipped_tokens is not None and self.skipped_tokens > self.target_length:
            raise ValueError(
                f"skipped_tokens: expected at most target_length {self.target_length}, got "
                f"{self.skipped_tokens}"
            )
        if self.descent_steps:
            self._check_descent()
        if self.top_k > self.population_size:
            raise ValueError(
                f"top_k: expected at most population_size {self.population_size}, got {self.top_k}"
            )
        if self.racing == "statistical" and self.niche_size:
            raise ValueError(
                "racing: expected niche_size 0 with statistical racing, whose test knows no niches"
            )
        low, high = self.tail_bounds
        if not 0 < low <= high:
            raise ValueError(f"tail_bounds: expected 0 < low <= high, got {low}, {high}")
        if (
            self.critical_dims is not None
            and not 0 < self.critical_dims[0] <= self.critical_dims[1]
        ):
            raise ValueError(f"critical_dims: expected 0 < first <= last, got {self.critical_dims}")
        if self.starts and self.dimensions != "all":
            raise ValueError(
                "starts: expected none unless dimensions = 'all'; a tail starts from constant "
                "ones (Alg. 1)"
            )
        if len(set(self.start_tokens)) < len(self.start_tokens):
            raise ValueError(f"start_tokens: expected different numbers, got {self.start_tokens}")
        if not isinstance(self.attention_factor, str) and self.attention_factor <= 0:
            raise ValueError(
                f"attention_factor: expected a positive number, got {self.attention_factor}"
            )
        if self.attention_bounds is not None:
            low, high = self.attention_bounds
            if not 0 < low <= high:
                raise ValueError(f"attention_bounds: expected 0 < low <= high, got {low}, {high}")
        return self

    def _check_descent(self) -> None:
        """Refuse what a descent has no use for, rather than ignore it.

        Raises:
            ValueError: naming the field.
        """
        without = {"iterations": 0, "dimensions": "tail", "starts": [], "start_tokens": [0]}
        for name, value in without.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}: expected {value!r} with descent_steps {self.descent_steps}, since a "
                    f"descent has no generations of offspring and starts of its own, got "
                    f"{getattr(self, name)!r}"
                )


# What a preset sets beside the defaults above. "default" is what jobs/LOG.md measured to be the
# best way to breed, "descent" follows gradients instead, "paper" is Alg. 2 read literally,
# "authors" has the operators of their code, "longrope" is the first paper's search (its Table 4),
# "random" forgets its parents.
_PLAIN = {"top_k": 32, "initial": "mutants", "shift_probability": 0.0}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "descent": {"descent_steps": 16, "iterations": 0, "attention_factor": "search"},
    "paper": {**_PLAIN, "mutation": "neighbors"},
    "authors": {**_PLAIN, "mutation": "authors", "crossover": "authors"},
    "longrope": {
        **_PLAIN,
        "dimensions": "all",
        "crossover": "authors",
        "tail_bounds": (1.0, 1.25),
        "start_tokens": [0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256],
    },
    "random": {**_PLAIN, "mutation": "random"},
}
