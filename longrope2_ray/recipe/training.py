"""The sections of a recipe that data and training read."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longrope2_ray.recipe.sections import Location, Positive, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class SourceSection(Section):
    """One source of training documents."""

    name: str = Field(description="Name in the manifest and in messages.")
    path: list[Location] = Field(
        description="Files, directories, globs or URLs of .jsonl, .parquet or text files, or hf://<dataset id>. "
        "All their documents are tokenised before the quotas choose, so name a sample of a large collection.",
    )
    field: str = Field(
        "text", description="Field or column that holds the text, in .jsonl and .parquet."
    )
    split: Literal["file", "blank_line", "line"] = Field(
        "file",
        description="In text files, what ends a document: the end of the file, a blank line, or each line.",
    )
    piece_tokens: int | None = Field(
        None,
        ge=3,
        description="Cut longer documents into pieces of at most this many tokens, BOS and EOS included.",
    )
    weight: float = Field(
        1.0, gt=0, description="Share of a band's tokens, relative to its other sources."
    )


class BandSection(Section):
    """Documents of one range of lengths: longer than the band before, at most ``max_tokens`` tokens."""

    max_tokens: Positive = Field(description="Longest document of the band, BOS and EOS included.")
    tokens: Positive = Field(description="Tokens taken from it.")
    sources: list[str] = Field(
        [], description="Names of the sources it is taken from; all unless given."
    )


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
            raise ValueError(
                f"bands.sources: expected names of data.sources ({', '.join(names)}), got {unknown[0]!r}"
            )
        return self


class TrainSection(Section):
    """Mixed context window training (Sec. 3.3); the defaults are the paper's, and its authors' where it is silent."""

    name: str = Field(
        "train",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Folder of this training in the run directory; trainings beside each other share search and data.",
    )
    factors: str = Field(
        "winner",
        description="Rescale factors: the run's winner, a baseline method, or a file that holds a vector.",
    )
    mixed: bool = Field(
        True,
        description="Original RoPE in short segments; off is Table 7's ablation: rescaled RoPE everywhere.",
    )
    max_steps: Positive | None = Field(None, description="Optimizer steps; one epoch unless given.")
    global_batch_size: Positive = Field(
        64, description="Segments of one optimizer step, over all workers."
    )
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(
        40, ge=0, description="Steps of linear warm-up; a cosine to zero follows."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Betas of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    seed: int = Field(0, ge=0, description="Seed of the order of segments.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Compute type; master weights are float32."
    )
    num_workers: int = Field(
        0, ge=0, description="Training processes; 0 takes every GPU of the cluster, or one CPU."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs reserved for one worker.")
    threads: Positive = Field(1, description="CPU threads of one worker; part of the result.")
    sequence_parallel: Positive = Field(
        1,
        description="Workers that share one segment (Ulysses); divides the number of workers and of KV heads.",
    )
    activation_checkpointing: bool = Field(
        True, description="Recompute each layer in the backward pass."
    )
    loss_chunk_tokens: Positive = Field(2048, description="Tokens whose logits exist at once.")
    checkpoint_steps: Positive = Field(50, description="Steps between checkpoints.")
    logging_steps: Positive = Field(1, description="Steps between lines of the log.")
    max_failures: int = Field(
        100,
        ge=-1,
        description="Deaths of a worker or node that one command survives; -1 for no limit.",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainSection":
        if self.name in ("data", "scores", "generations"):
            raise ValueError(
                f"name: expected a folder of its own in the run directory, got {self.name!r}"
            )
        return self
