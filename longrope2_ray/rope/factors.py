"""RoPE rescale factors, and the NTK head that LongRoPE2 derives from a searched tail."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class RescaleFactors:
    """One factor per cosine index: the rescaled angle is ``theta_i / values[i]`` (Eq. 8).

    The same object goes from a candidate to the rotary buffers. It is validated where it is made;
    what pickle brings to another process is only made read-only again.

    Attributes:
        values: (d/2,) float64, read-only, finite and positive.
        attention_factor: what cos and sin are multiplied by, so that its square scales the
            attention logits; 1.0 leaves them alone.
        critical_dim: the first cosine index of the searched tail, where the vector has one.
        source: where it came from, for tables and messages.
        start_tokens: positions below it keep the original angles (LongRoPE's ``n_hat``); 0 is none.

    Raises:
        ValueError: if an entry is not finite and positive, the vector is not flat, the attention
            factor is not finite and positive, or ``start_tokens`` is negative.
    """

    values: np.ndarray
    attention_factor: float = 1.0
    critical_dim: int | None = None
    source: str = ""
    start_tokens: int = 0

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"factors: expected a flat list of numbers, got shape {values.shape}")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise ValueError(
                f"factors: expected finite positive numbers, got {values[bad[0]]} at index {bad[0]}"
                + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
            )
        if not (np.isfinite(self.attention_factor) and self.attention_factor > 0):
            raise ValueError(
                f"attention_factor: expected a finite positive number, got {self.attention_factor}"
            )
        if self.start_tokens < 0:
            raise ValueError(
                f"start_tokens: expected a number of positions, 0 or more, got {self.start_tokens}"
            )
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a pickled state, whose array numpy would leave writable."""
        self.__dict__.update(state)
        self.values.flags.writeable = False

    @property
    def monotone(self) -> bool:
        """Whether the factors never decrease; some published LongRoPE v1 vectors do."""
        return bool(np.all(np.diff(self.values) >= 0))

    def require_length(self, num_cosines: int) -> "RescaleFactors":
        """The vector itself, if it fits a model with ``num_cosines`` cosine dimensions.

        Raises:
            ValueError: if the vector has another length.
        """
        if len(self.values) != num_cosines:
            raise ValueError(
                f"factors: expected {num_cosines} numbers, one per cosine dimension of this model, "
                f"got {len(self.values)}"
            )
        return self


def ntk_head(first: float, critical_dim: int) -> np.ndarray:
    """Factors below the critical dimension when NTK's base meets the tail's first entry.

    ``base' = base * first^(d / (2 d_rcd))``, hence ``lambda_i = first^(i / d_rcd)``;
    (d_rcd,) float64.
    """
    return first ** (np.arange(critical_dim) / max(critical_dim, 1))


def assemble(critical_dim: int, tail: Sequence[float] | np.ndarray) -> np.ndarray:
    """The whole factor vector of a candidate, head and tail; (d/2,) float64 (Alg. 2, lines 6-8)."""
    tail = np.asarray(tail, dtype=np.float64)
    return np.concatenate([ntk_head(float(tail[0]), critical_dim), tail])


def factors_from_json(text: str, source: str) -> RescaleFactors:
    """Read a vector from a JSON list, a ``winner.json``, or an HF config with a ``long_factor``.

    Raises:
        ValueError: if the text is none of them.
    """
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--factors: expected JSON in {source}, got {error}") from error
    if isinstance(data, list):
        return RescaleFactors(_numbers(data, source), source=source)
    if isinstance(data, dict):
        rope = data.get("rope_parameters")
        # where each layer type has RoPE parameters of its own
        full = rope.get("full_attention") if isinstance(rope, dict) else None
        for section in (data, rope, full, data.get("rope_scaling")):
            if not isinstance(section, dict):
                continue
            values = section.get("factors", section.get("long_factor"))
            if values is not None:
                return RescaleFactors(
                    _numbers(values, source),
                    attention_factor=_number(section, "attention_factor", 1.0, source),
                    critical_dim=_whole(section, "critical_dim", None, source),
                    source=source,
                    start_tokens=_whole(section, "start_tokens", 0, source) or 0,
                )
    raise ValueError(
        "--factors: expected a JSON list of numbers, a winner.json or an HF config with "
        f"long_factor in {source}"
    )


def _numbers(values: Any, source: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--factors: expected numbers in {source}, got {error}") from error


def _number(section: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = section.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--factors: expected a number as {key} in {source}, got {value!r}"
        ) from error


def _whole(section: Mapping[str, Any], key: str, default: int | None, source: str) -> int | None:
    value = section.get(key)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or not float(value).is_integer():
        raise ValueError(f"--factors: expected a whole number as {key} in {source}, got {value!r}")
    return int(value)
