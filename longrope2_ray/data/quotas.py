"""Which documents are taken: quotas by length and source."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longrope2_ray.data.packing import Window
from longrope2_ray.recipe.training import BandSection, DataSection, SourceSection


def windows_of(bands: Sequence[BandSection], original_length: int) -> list[Window]:
    """Return the window that each band feeds.

    Raises:
        ValueError: if a band holds documents on both sides of the original length.
    """
    bounds = [0, *(band.max_tokens for band in bands)]
    for low, high in itertools.pairwise(bounds):
        if low < original_length < high:
            raise ValueError(
                f"data.bands: expected a band that ends at the original length {original_length}, "
                f"got one from {low + 1} to {high} tokens; add a band with max_tokens = "
                f"{original_length}"
            )
    return ["short" if band.max_tokens <= original_length else "long" for band in bands]


def check_bands(data: DataSection, length: int, original_length: int) -> None:
    """Refuse bands that cannot be packed into segments of ``length`` tokens.

    Raises:
        ValueError: naming the field to change.
    """
    windows = windows_of(data.bands, original_length)
    for window in dict.fromkeys(windows):
        tokens = sum(
            band.tokens for band, its in zip(data.bands, windows, strict=True) if its == window
        )
        if tokens < length * data.num_shards:
            raise ValueError(
                f"data.num_shards: expected at most {tokens // length}, so that each shard holds a "
                f"segment of {length} of the {tokens} tokens in {window} bands, got "
                f"{data.num_shards}"
            )


def band_of(num_tokens: np.ndarray, bands: Sequence[BandSection]) -> np.ndarray:
    """Return (N,) band of each document by its length.

    It is ``len(bands)`` for one that is longer than every band.
    """
    found: np.ndarray = np.searchsorted(
        [band.max_tokens for band in bands], num_tokens, side="left"
    )
    return found


def quotas_of(
    bands: Sequence[BandSection], sources: Sequence[SourceSection]
) -> dict[tuple[int, int], int]:
    """Share each band's tokens among its sources by weight.

    Returns:
        (band, source) -> tokens to take.
    """
    quotas = {}
    for b, band in enumerate(bands):
        shares = {
            s: source.weight
            for s, source in enumerate(sources)
            if not band.sources or source.name in band.sources
        }
        total = math.fsum(shares.values())
        quotas.update({(b, s): round(band.tokens * share / total) for s, share in shares.items()})
    return quotas


@dataclass(frozen=True)
class Taken:
    """What one band takes from one source: every document whose key is at most ``last_key``.

    Attributes:
        documents: how many.
        tokens: of these documents, at least the quota unless the source is too small.
        quota: tokens asked for.
        last_key: None if nothing is taken.
    """

    documents: int
    tokens: int
    quota: int
    last_key: int | None

    @property
    def missing(self) -> int:
        """Tokens of the quota that the source does not have."""
        return max(self.quota - self.tokens, 0)


def fill_quotas(
    keys: np.ndarray,
    num_tokens: np.ndarray,
    bands: np.ndarray,
    sources: np.ndarray,
    quotas: Mapping[tuple[int, int], int],
) -> dict[tuple[int, int], Taken]:
    """Take documents in the order of their keys until their tokens reach each quota.

    The result does not depend on the order in which the documents come.

    Args:
        keys: (N,) uint64, a document's own.
        num_tokens: (N,) tokens of each document.
        bands: (N,) its band.
        sources: (N,) its source.
        quotas: (band, source) -> tokens to take.

    Returns:
        (band, source) -> what is taken.
    """
    taken = {}
    for (band, source), quota in quotas.items():
        mine = np.flatnonzero((bands == band) & (sources == source))
        mine = mine[np.argsort(keys[mine])]
        tokens = np.cumsum(num_tokens[mine], dtype=np.int64)
        reached = int(np.searchsorted(tokens, quota, side="left")) + 1
        count = min(reached, len(mine)) if quota > 0 else 0
        if count:
            last = int(keys[mine[count - 1]])
            taken[band, source] = Taken(count, int(tokens[count - 1]), quota, last)
        else:
            taken[band, source] = Taken(0, 0, quota, None)
    return taken
