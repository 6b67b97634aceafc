"""The plan of training data: what to make, checked before Ray starts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope2_ray.data.documents import FoundFile, find_files, read_documents
from longrope2_ray.data.manifest import MANIFEST, Manifest
from longrope2_ray.data.quotas import check_bands
from longrope2_ray.data.tokenizing import tokenizer_fingerprint, worker_tokenizer
from longrope2_ray.recipe.identity import part_of
from longrope2_ray.recipe.model import ModelSection
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.training import DataSection, SourceSection
from longrope2_ray.storage.rundir import RunDir, require_same_run

SETTINGS = "data/settings.json"


@dataclass(frozen=True)
class DataPlan:
    """What workers need to know of the training data to make, every field checked.

    Attributes:
        run_url: the run directory, absolute.
        data: sources, bands and shards.
        model: the model whose tokenizer is used.
        length: tokens of a segment.
        original_length: pre-trained window, the most tokens of a document in a short segment.
        files: source -> URLs of its files.
        settings: recipe field -> value, of all that the documents' tokens depend on.
        packing: recipe field -> value, of all that the segments depend on beside these.
        patience_seconds: how long a storage that fails is waited for.
    """

    run_url: str
    data: DataSection
    model: ModelSection
    length: int
    original_length: int
    files: dict[str, list[str]]
    settings: dict[str, Any]
    packing: dict[str, Any]
    patience_seconds: float

    @property
    def run_dir(self) -> RunDir:
        """The run directory, which waits for its storage."""
        return RunDir(self.run_url, patience_seconds=self.patience_seconds)


def prepare_data(recipe: Recipe, run_url: str) -> DataPlan:
    """Check everything that is cheap, and read one document of each source.

    Raises:
        ValueError: with one clear message, also if the directory holds data of other settings.
    """
    from longrope2_ray.model.spec import read_shape

    data, model, length = recipe.data, recipe.model, recipe.search.target_length
    if data is None:
        raise ValueError("data: missing; add a [data] section with sources and bands")
    original = read_shape(model).original_length
    if length <= original:
        raise ValueError(
            f"search.target_length: expected more than the original length {original}, got {length}"
        )
    check_bands(data, length, original)
    found = {source.name: find_files(source) for source in data.sources}
    for source in data.sources:
        next(read_documents(source, found[source.name][0].url), None)
    settings = {f"data.{name}": value for name, value in part_of(data, "tokens").items()}
    for source in data.sources:
        settings |= _source_settings(source, found[source.name])
    settings["tokenizer of model.path"] = tokenizer_fingerprint(worker_tokenizer(model))
    packing: dict[str, Any] = {"search.target_length": length, "model.original_length": original}
    packing |= {f"data.{name}": value for name, value in part_of(data, "segments").items()}
    for source in data.sources:
        packing |= _fields(source, "segments")
    if "://" not in run_url:
        run_url = str(Path(run_url).resolve())  # workers may stand elsewhere
    plan = DataPlan(
        run_url=run_url,
        data=data,
        model=model,
        length=length,
        original_length=original,
        files={name: [file.url for file in files] for name, files in found.items()},
        settings=settings,
        packing=packing,
        patience_seconds=recipe.storage.patience_seconds,
    )
    require_same_data(plan)
    return plan


def _source_settings(source: SourceSection, files: Iterable[FoundFile]) -> dict[str, Any]:
    """Return field -> value of what the documents of a source depend on.

    Files count by name and size, since a copy of them elsewhere is the same data.
    """
    prefix = f"data.sources.{source.name}"
    names = [
        [file.url.rsplit("/", 1)[-1] if file.num_bytes else file.url, file.num_bytes]
        for file in files
    ]
    return {f"{prefix}.path": sorted(names), **_fields(source, "tokens")}


def _fields(source: SourceSection, kind: str) -> dict[str, Any]:
    """Return recipe field -> value of what a kind of result depends on in a source."""
    values = part_of(source, kind)
    return {f"data.sources.{source.name}.{name}": value for name, value in values.items()}


def require_same_data(plan: DataPlan) -> None:
    """Refuse a run directory that holds data of other settings.

    While it is not whole yet, bands and lengths may change: what is tokenized stays of use.

    Raises:
        RunDirError: naming the first field that differs.
    """
    run_dir = RunDir(plan.run_url)  # without patience: nothing could be lost yet
    found = run_dir.read_or_skip(SETTINGS) or {}
    wanted = plan.settings
    body = run_dir.read_or_skip(MANIFEST)
    if body is not None:
        found = Manifest.from_json(body).settings
        wanted = {**plan.settings, **plan.packing}
    if found:
        require_same_run(plan.run_url, found, wanted)
