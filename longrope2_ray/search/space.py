"""The search space: its candidates and their bounds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from longrope2_ray.recipe.base import AttentionFactor
from longrope2_ray.recipe.search import EVERY_DIMENSION, SearchSection
from longrope2_ray.rope.baselines import PLAIN, baseline, su_attention_factor, yarn_attention_factor
from longrope2_ray.rope.factors import RescaleFactors, assemble
from longrope2_ray.rope.geometry import RopeGeometry

LONGROPE_STARTS = ("pi", "ntk", "yarn")


@dataclass(frozen=True)
class Candidate:
    """One point of the search space.

    Attributes:
        critical_dim: ``d_rcd``, the cosine index where the tail starts; 0 if every dimension is
            searched.
        tail: the factors from the critical dimension on, non-decreasing.
        attention_factor: the number that cos and sin are multiplied by.
        parent_id: id of the candidate that it is an offspring of; None if it was drawn.
        start_tokens: number of positions at the start that keep the original RoPE (LongRoPE's
            ``n_hat``).
        head: the factors below the critical dimension, where they are not NTK's; empty otherwise.
        origin: what made it: an operator, or the published method that it is.
    """

    critical_dim: int
    tail: tuple[float, ...]
    attention_factor: float = 1.0
    parent_id: str | None = None
    start_tokens: int = 0
    head: tuple[float, ...] = ()
    origin: str = ""

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the content's SHA-256; parent and origin are no part of it."""
        more: list[Any] = [self.start_tokens] if self.start_tokens else []
        if self.head:
            more.append(self.head)
        content = json.dumps([self.critical_dim, self.tail, self.attention_factor, *more])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @cached_property
    def factors(self) -> RescaleFactors:
        """The whole factor vector, its head derived from the tail (Alg. 2, lines 6-8).

        [ours] A candidate that did not come from a tail has a head of its own.
        """
        whole = np.array(self.head + self.tail) if self.head else None
        return RescaleFactors(
            assemble(self.critical_dim, self.tail) if whole is None else whole,
            attention_factor=self.attention_factor,
            critical_dim=self.critical_dim,
            source=f"candidate {self.id}",
            start_tokens=self.start_tokens,
        )

    @classmethod
    def of_vector(
        cls,
        values: np.ndarray,
        ratio: float,
        attention_factor: float,
        parent_id: str | None = None,
        origin: str = "",
    ) -> "Candidate":
        """[ours] Return a whole vector as a candidate.

        Its critical dimension is the first one whose factor reaches the extension ratio (Eq. 10);
        0 if none does, or the first one.
        """
        reached = np.flatnonzero(values >= ratio * (1 - 1e-9))
        dim = int(reached[0]) if len(reached) else 0
        factors = tuple(map(float, values))
        head, tail = factors[:dim], factors[dim:]
        return cls(dim, tail, attention_factor, parent_id, head=head, origin=origin)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Candidate":
        """Read a candidate that ``to_json`` wrote; other keys of the object are ignored."""
        return cls(
            critical_dim=body["critical_dim"],
            tail=tuple(body["tail"]),
            attention_factor=body["attention_factor"],
            parent_id=body["parent_id"],
            start_tokens=body["start_tokens"],
            head=tuple(body["head"]),
            origin=body["origin"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return the candidate as a JSON object."""
        return {
            "id": self.id,
            "critical_dim": self.critical_dim,
            "head": list(self.head),
            "tail": list(self.tail),
            "attention_factor": self.attention_factor,
            "start_tokens": self.start_tokens,
            "parent_id": self.parent_id,
            "origin": self.origin,
        }


def content_id(factors: RescaleFactors) -> str:
    """Return the id of a vector that is not a candidate; equal vectors share id and scores."""
    values = tuple(factors.values.tolist())
    return Candidate(0, values, factors.attention_factor, None, factors.start_tokens).id


@dataclass(frozen=True)
class SearchSpace:
    """The bounds of the candidates.

    Attributes:
        num_cosines: length of a factor vector.
        critical_dims: allowed ``d_rcd``, ascending; ``(0,)`` if every dimension is searched.
        tail_bounds: lowest and highest factor of a tail.
        attention_bounds: lowest and highest attention factor; equal if it is not searched.
        starts: whole vectors that the search starts from, where every dimension is searched.
        start_tokens: allowed numbers of positions at the start that keep the original RoPE.
    """

    num_cosines: int
    critical_dims: tuple[int, ...]
    tail_bounds: tuple[float, float]
    attention_bounds: tuple[float, float]
    starts: tuple[tuple[float, ...], ...] = ()
    start_tokens: tuple[int, ...] = (0,)

    @property
    def fixed_attention(self) -> float | None:
        """The attention factor of every candidate; None if it is searched."""
        low, high = self.attention_bounds
        return low if low == high else None

    @classmethod
    def from_recipe(cls, geometry: RopeGeometry, search: SearchSection) -> "SearchSpace":
        """Return the space of a recipe.

        Its defaults are the paper's: ``d_10 ... d_tcd``, and factors in ``[ratio, 2 ratio]``.

        Raises:
            ValueError: if the target is not above the original length, or critical dimensions,
                starting vectors or start tokens do not fit the model.
        """
        _require_lengths(geometry, search)
        ratio = max(search.target_length / geometry.original_length, 1.0)
        dims = _critical_dims(geometry, search)
        low, high = (bound * ratio for bound in search.tail_bounds)
        starts: tuple[tuple[float, ...], ...] = ()
        if search.critical_dims == EVERY_DIMENSION:
            low = 1.0
            starts = _starts(geometry, search, low, high)
        if low < 1 or high < low:
            raise ValueError(
                f"search.tail_bounds: expected factors of at least 1 in units of the ratio "
                f"{ratio:g}, got {search.tail_bounds[0]:g}, {search.tail_bounds[1]:g}"
            )
        attention = _attention_bounds(geometry, search, ratio)
        start_tokens = tuple(search.start_tokens)
        return cls(geometry.num_cosines, dims, (low, high), attention, starts, start_tokens)


def _require_lengths(geometry: RopeGeometry, search: SearchSection) -> None:
    extended = any(not isinstance(start, str) for start in search.starts)
    if search.target_length <= geometry.original_length and not extended:
        raise ValueError(
            f"search.target_length: expected more than the original length "
            f"{geometry.original_length}, got {search.target_length}; to search an extended "
            f"model's short window, search.starts takes the vector that it was trained with"
        )
    if max(search.start_tokens) > geometry.original_length:
        raise ValueError(
            f"search.start_tokens: expected at most the original length "
            f"{geometry.original_length}, got {max(search.start_tokens)}"
        )


def _critical_dims(geometry: RopeGeometry, search: SearchSection) -> tuple[int, ...]:
    theory = max(geometry.ten_period_dim, 1), geometry.theoretical_critical_dim
    if search.critical_dims == EVERY_DIMENSION:
        return (0,)
    first, last = search.critical_dims or theory
    if not 0 < first <= last < geometry.num_cosines:
        raise ValueError(
            f"search.critical_dims: expected cosine indices in 1 ... {geometry.num_cosines - 1}, "
            f"or 0, 0 for every dimension, got {first}, {last}"
        )
    return tuple(range(first, last + 1))


def _starts(
    geometry: RopeGeometry, search: SearchSection, low: float, high: float
) -> tuple[tuple[float, ...], ...]:
    """Return the vectors that a search over every dimension starts from, inside its bounds."""
    length = max(search.target_length, geometry.original_length)
    vectors = [_start(start, geometry, length) for start in search.starts or LONGROPE_STARTS]
    clipped = (np.clip(np.maximum.accumulate(vector), low, high) for vector in vectors)
    return tuple(dict.fromkeys(tuple(vector.tolist()) for vector in clipped))


def _start(start: str | Sequence[float], geometry: RopeGeometry, target_length: int) -> np.ndarray:
    if not isinstance(start, str):
        vector = RescaleFactors(np.array(start))
    elif start in PLAIN:
        vector = baseline(start, geometry, target_length)
    else:
        raise ValueError(
            f"search.starts: expected {', '.join(PLAIN)} or a list of factors, got {start!r}"
        )
    if len(vector.values) != geometry.num_cosines:
        raise ValueError(
            f"search.starts: expected {geometry.num_cosines} numbers, one per cosine dimension of "
            f"this model, got {len(vector.values)}"
        )
    return vector.values


def _attention_bounds(
    geometry: RopeGeometry, search: SearchSection, ratio: float
) -> tuple[float, float]:
    if isinstance(search.attention_factor, tuple):
        return search.attention_factor
    fixed = attention_factor(search.attention_factor, ratio, geometry.original_length)
    if fixed is not None:
        return fixed, fixed
    # [ours] A searched factor may go twice as far from one as the strongest published rule.
    su = su_attention_factor(ratio, geometry.original_length)
    return 1.0, 1 + 2 * (max(su, yarn_attention_factor(ratio)) - 1)


def attention_factor(
    setting: AttentionFactor | tuple[float, float], ratio: float, original_length: int
) -> float | None:
    """Return the number behind a recipe's ``attention_factor``; None if it is searched."""
    if setting == "search" or isinstance(setting, tuple):
        return None
    if setting == "su":
        return su_attention_factor(ratio, original_length)
    return yarn_attention_factor(ratio) if setting == "yarn" else float(setting)
