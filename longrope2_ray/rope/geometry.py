"""Rotary position embeddings: angles, periods, critical dimensions (LongRoPE2, Eq. 5-10)."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RopeGeometry:
    """A model's RoPE before any rescaling.

    Every ``_dim`` is a cosine index ``i`` in ``0 ... num_cosines - 1``, counted from zero; one
    cosine index stands for the pair of rotary dimensions that turn at the same angle.

    Attributes:
        head_dim: size of one attention head.
        rotary_dim: how many of its dimensions are rotated, an even number
            (``head_dim * partial_rotary_factor``).
        base: RoPE base, ``theta`` in the papers.
        original_length: pre-trained window L0, in tokens.
    """

    head_dim: int
    rotary_dim: int
    base: float
    original_length: int

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim: expected a positive even number, got {self.rotary_dim}")
        if self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim: expected at most head_dim {self.head_dim}, got {self.rotary_dim}"
            )
        if not (math.isfinite(self.base) and self.base > 1):
            raise ValueError(f"base: expected a finite number above 1, got {self.base}")
        if self.original_length <= 2 * math.pi:
            raise ValueError(
                f"original_length: expected more than 2 pi tokens, got {self.original_length}"
            )

    @property
    def num_cosines(self) -> int:
        """The length of a factor vector, ``d/2``."""
        return self.rotary_dim // 2

    @property
    def angles(self) -> np.ndarray:
        """``theta_i = base^(-2i/d)``, (d/2,) float64, radians per token (Eq. 5)."""
        return self.base ** (-2.0 * np.arange(self.num_cosines) / self.rotary_dim)

    @property
    def periods_tokens(self) -> np.ndarray:
        """``T_i = 2 pi / theta_i``, (d/2,) float64, tokens a full turn takes (Eq. 6)."""
        return 2 * math.pi / self.angles

    def dim_with_periods(self, num_periods: float, length_tokens: float | None = None) -> int:
        """The first cosine index that completes fewer than ``num_periods`` turns in a length.

        ``ceil(d/2 * log_base(L / (2 pi num_periods)))``, clipped to ``0 ... d/2 - 1``. The
        authors' tool prints one less; this is the formula of the paper (Eq. 7), as a cosine index
        counted from zero.

        Args:
            num_periods: full turns.
            length_tokens: L; the original length L0 unless given.
        """
        length = self.original_length if length_tokens is None else length_tokens
        turns = length / (2 * math.pi * num_periods)
        dim = (
            math.ceil(self.num_cosines * math.log(turns) / math.log(self.base)) if turns > 1 else 0
        )
        return min(max(dim, 0), self.num_cosines - 1)

    @property
    def theoretical_critical_dim(self) -> int:
        """``d_tcd``, the first dimension that completed no period in pre-training (Eq. 7)."""
        return self.dim_with_periods(1)

    @property
    def ten_period_dim(self) -> int:
        """``d_10``, the first dimension with fewer than ten periods in L0 (Alg. 1, line 2)."""
        return self.dim_with_periods(10)
