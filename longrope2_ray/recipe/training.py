"""The recipe's sections for training data and for training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longrope2_ray.recipe.base import Location, Positive, Section
from longrope2_ray.recipe.identity import FREE, TRAINING, PartOf
from longrope2_ray.storage.rundir import require_free_name

Beta = Annotated[float, Field(ge=0, lt=1)]


class SourceSection(Section):
    """One source of training documents."""

    name: Annotated[str, FREE] = Field(description="Name in the manifest and in messages.")
    path: Annotated[list[Location], FREE] = Field(
        description="Files, directories, globs or URLs of .jsonl, .parquet or text files, "
        "hf://<dataset id>, bundled:<texts> or generated:retrieval. All their documents are "
        "tokenized before the quotas choose, so name a sample of a large collection.",
    )
    field: Annotated[str, PartOf("tokens")] = Field(
        "text", description="Field or column that holds the text, in .jsonl and .parquet."
    )
    split: Annotated[Literal["file", "blank_line", "line"], PartOf("tokens")] = Field(
        "file",
        description="In text files, what ends a document: the end of the file, a blank line, or "
        "each line.",
    )
    piece_tokens: Annotated[int | None, PartOf("tokens")] = Field(
        None,
        ge=3,
        description="Cut longer documents into pieces of at most this many tokens, BOS and EOS "
        "included.",
    )
    weight: Annotated[float, PartOf("segments")] = Field(
        1.0, gt=0, description="Share of a band's tokens, relative to its other sources."
    )


class BandSection(Section):
    """A band: documents of one range of lengths.

    They are longer than those of the band before, and have at most ``max_tokens`` tokens.
    """

    max_tokens: Annotated[Positive, PartOf("segments")] = Field(
        description="Longest document of the band, BOS and EOS included."
    )
    tokens: Annotated[Positive, PartOf("segments")] = Field(
        description="Tokens taken from the band."
    )
    sources: Annotated[list[str], PartOf("segments")] = Field(
        [], description="Names of the band's sources; all unless given."
    )


class DataSection(Section):
    """The training data: documents, by length, in short and long segments (Table 1).

    A segment has exactly ``search.target_length`` tokens.
    """

    sources: list[SourceSection] = Field(min_length=1, description="Where documents come from.")
    bands: Annotated[list[BandSection], PartOf("segments")] = Field(
        min_length=1,
        description="Token quotas by document length, ascending; bands up to the original length "
        "make short segments.",
    )
    num_shards: Annotated[Positive, PartOf("tokens")] = Field(
        16, description="Parquet shards; part of the result."
    )
    seed: Annotated[int, PartOf("tokens")] = Field(
        0, ge=0, description="Seed of the order of documents."
    )

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
                f"bands.sources: expected names of data.sources ({', '.join(names)}), "
                f"got {unknown[0]!r}"
            )
        return self


class TrainSection(Section):
    """Mixed context window training (Sec. 3.3).

    The defaults are the paper's; where it gives none, those of its authors' code.
    """

    name: Annotated[str, FREE] = Field(
        "train",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Folder of this training in the run directory; trainings beside each other "
        "share search and data.",
    )
    factors: Annotated[str, TRAINING] = Field(
        "winner",
        description="Rescale factors: the run's winner, a baseline method, or a file that holds a "
        "vector.",
    )
    mixed: Annotated[bool, TRAINING] = Field(
        True,
        description="Original RoPE in short segments; off is Table 7's ablation: rescaled RoPE "
        "everywhere.",
    )
    max_steps: Annotated[Positive | None, TRAINING] = Field(
        None, description="Optimizer steps; one epoch unless given."
    )
    global_batch_size: Annotated[Positive, TRAINING] = Field(
        64, description="Segments of one optimizer step, over all workers."
    )
    learning_rate: Annotated[float, TRAINING] = Field(
        2e-5, gt=0, description="Peak learning rate of AdamW."
    )
    warmup_steps: Annotated[int, TRAINING] = Field(
        40, ge=0, description="Steps of linear warm-up; a cosine to zero follows."
    )
    betas: Annotated[tuple[Beta, Beta], TRAINING] = Field(
        (0.9, 0.95), description="Betas of AdamW."
    )
    weight_decay: Annotated[float, TRAINING] = Field(
        0.0, ge=0, description="Weight decay of AdamW."
    )
    max_grad_norm: Annotated[float, TRAINING] = Field(
        1.0, gt=0, description="Gradients are clipped to this norm."
    )
    seed: Annotated[int, TRAINING] = Field(0, ge=0, description="Seed of the order of segments.")
    dtype: Annotated[Literal["float32", "bfloat16"], TRAINING] = Field(
        "bfloat16", description="Compute type; master weights are float32."
    )
    num_workers: Annotated[int, FREE] = Field(
        0, ge=0, description="Training processes; 0 takes every GPU of the cluster, or one CPU."
    )
    cpus_per_worker: Annotated[float, FREE] = Field(
        1, gt=0, description="CPUs reserved for one worker."
    )
    threads: Annotated[Positive, FREE] = Field(
        1, description="CPU threads of one worker; sums depend on it, in their last bits."
    )
    sequence_parallel: Annotated[Positive, FREE] = Field(
        1,
        description="Workers that share one segment (Ulysses); divides the number of workers and "
        "of KV heads.",
    )
    activation_checkpointing: Annotated[bool, FREE] = Field(
        True, description="Recompute each layer in the backward pass."
    )
    loss_chunk_tokens: Annotated[Positive, FREE] = Field(
        2048, description="Tokens whose logits exist at once."
    )
    checkpoint_steps: Annotated[Positive, FREE] = Field(
        50, description="Steps between checkpoints."
    )
    logging_steps: Annotated[Positive, FREE] = Field(
        1, description="Steps between lines of the log."
    )
    max_failures: Annotated[int, FREE] = Field(
        100,
        ge=-1,
        description="Deaths of a worker or node that one command survives; -1 for no limit.",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainSection":
        try:
            require_free_name(self.name)
        except ValueError as error:
            raise ValueError(f"name: {error}") from None
        return self
