"""The search space: candidates, and where they may lie."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longrope2_ray.recipe.sections import AttentionFactor, SearchSection
from longrope2_ray.rope.baselines import PLAIN, baseline, su_attention_factor, yarn_attention_factor
from longrope2_ray.rope.factors import RescaleFactors, assemble
from longrope2_ray.rope.geometry import RopeGeometry

LONGROPE_STARTS = ("pi", "ntk", "yarn")


@dataclass(frozen=True)
class Candidate:
    """One point of the search space.

    Attributes:
        critical_dim: ``d_rcd``, the cosine index where the tail starts; 0 if every dimension is searched.
        tail: factors from there on, non-decreasing.
        attention_factor: temperature that it is scored with.
        parent_id: the candidate that it was bred from.
        start_tokens: how many positions at the start keep the original RoPE (LongRoPE's ``n_hat``).
    """

    critical_dim: int
    tail: tuple[float, ...]
    attention_factor: float = 1.0
    parent_id: str | None = None
    start_tokens: int = 0

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the content: equal candidates have equal ids, whoever bred them."""
        start = [self.start_tokens] if self.start_tokens else []
        content = json.dumps([self.critical_dim, self.tail, self.attention_factor, *start])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @cached_property
    def factors(self) -> RescaleFactors:
        """The whole vector, head derived."""
        values = assemble(self.critical_dim, self.tail)
        source = f"candidate {self.id}"
        return RescaleFactors(
            values, self.attention_factor, self.critical_dim, source, self.start_tokens
        )


@dataclass(frozen=True)
class SearchSpace:
    """Where candidates may lie.

    Attributes:
        num_cosines: length of a factor vector.
        critical_dims: allowed ``d_rcd``, ascending; ``(0,)`` if every dimension is searched.
        tail_bounds: lowest and highest factor of a tail.
        attention_bounds: lowest and highest attention factor; equal if it is not searched.
        starts: whole vectors that the search starts from, where every dimension is searched (LongRoPE).
        start_tokens: numbers of positions at the start that may keep the original RoPE.
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
        """The paper's space: ``d_10 ... d_tcd`` and ``[ratio, 2 ratio]``, unless the recipe says otherwise.

        Raises:
            ValueError: if the target is not above the original length, or critical dimensions, starting vectors or start
                tokens do not fit the model.
        """
        extended = any(not isinstance(start, str) for start in search.starts)
        if search.target_length <= geometry.original_length and not extended:
            raise ValueError(
                f"search.target_length: expected more than the original length {geometry.original_length}, "
                f"got {search.target_length}; to search an extended model's short window, search.starts takes the "
                f"vector that it was trained with"
            )
        if max(search.start_tokens) > geometry.original_length:
            raise ValueError(
                f"search.start_tokens: expected at most the original length {geometry.original_length}, "
                f"got {max(search.start_tokens)}"
            )
        ratio = max(search.target_length / geometry.original_length, 1.0)
        first, last = search.critical_dims or (
            max(geometry.ten_period_dim, 1),
            geometry.theoretical_critical_dim,
        )
        if not 0 < first <= last < geometry.num_cosines:
            raise ValueError(
                f"search.critical_dims: expected cosine indices in 1 ... {geometry.num_cosines - 1}, got {first}, {last}"
            )
        low, high = (bound * ratio for bound in search.tail_bounds)
        dims = tuple(range(first, last + 1))
        starts: tuple[tuple[float, ...], ...] = ()
        if search.dimensions == "all":
            dims, low = (0,), 1.0
            length = max(search.target_length, geometry.original_length)
            vectors = [
                _start(start, geometry, length) for start in search.starts or LONGROPE_STARTS
            ]
            clipped = (
                tuple(np.clip(np.maximum.accumulate(v), low, high).tolist()) for v in vectors
            )
            starts = tuple(dict.fromkeys(clipped))
        if low < 1 or high < low:
            raise ValueError(
                f"search.tail_bounds: expected factors of at least 1 in units of the ratio {ratio:g}, "
                f"got {search.tail_bounds[0]:g}, {search.tail_bounds[1]:g}"
            )
        top = max(
            su_attention_factor(ratio, geometry.original_length), yarn_attention_factor(ratio)
        )
        fixed = attention_factor(search.attention_factor, ratio, geometry.original_length)
        # [ours] a searched temperature may go twice as far from one as the strongest published rule
        attention = (
            search.attention_bounds or (1.0, 1 + 2 * (top - 1)) if fixed is None else (fixed, fixed)
        )
        return cls(
            geometry.num_cosines, dims, (low, high), attention, starts, tuple(search.start_tokens)
        )


def _start(start: str | Sequence[float], geometry: RopeGeometry, target_length: int) -> np.ndarray:
    if isinstance(start, str) and start not in PLAIN:
        raise ValueError(
            f"search.starts: expected {', '.join(PLAIN)} or a list of factors, got {start!r}"
        )
    vector = (
        baseline(start, geometry, target_length)
        if isinstance(start, str)
        else RescaleFactors(np.array(start))
    )
    if len(vector.values) != geometry.num_cosines:
        raise ValueError(
            f"search.starts: expected {geometry.num_cosines} numbers, one per cosine dimension of this model, got "
            f"{len(vector.values)}"
        )
    return vector.values


def attention_factor(setting: AttentionFactor, ratio: float, original_length: int) -> float | None:
    """The number behind a recipe's ``attention_factor``; None if it is searched."""
    if setting == "search":
        return None
    if setting == "su":
        return su_attention_factor(ratio, original_length)
    return yarn_attention_factor(ratio) if setting == "yarn" else float(setting)
