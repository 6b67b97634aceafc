"""The methods that LongRoPE2 is compared with, each as a plain factor vector."""

import math
from collections.abc import Callable, Iterable

import numpy as np

from longrope2_ray.rope.factors import RescaleFactors, assemble
from longrope2_ray.rope.geometry import RopeGeometry


def su_attention_factor(ratio: float, original_length: float) -> float:
    """The attention factor ``sqrt(1 + ln ratio / ln L0)`` of LongRoPE and HF's ``longrope``."""
    return math.sqrt(1 + math.log(ratio) / math.log(original_length)) if ratio > 1 else 1.0


def yarn_attention_factor(ratio: float) -> float:
    """The attention factor ``0.1 ln ratio + 1`` of YaRN (its Eq. 22)."""
    return 0.1 * math.log(ratio) + 1 if ratio > 1 else 1.0


def unscaled(geometry: RopeGeometry, target_length: int) -> np.ndarray:
    """The original RoPE: every factor 1."""
    return np.ones(geometry.num_cosines)


def pi(geometry: RopeGeometry, target_length: int) -> np.ndarray:
    """Position interpolation (Chen et al. 2023): the ratio everywhere."""
    return np.full(geometry.num_cosines, target_length / geometry.original_length)


def ntk_aware(geometry: RopeGeometry, target_length: int) -> np.ndarray:
    """NTK-aware scaling: ``ratio^(2i / (d - 2))``."""
    ratio = target_length / geometry.original_length
    return ratio ** (np.arange(geometry.num_cosines) / max(geometry.num_cosines - 1, 1))


def ntk(geometry: RopeGeometry, target_length: int) -> np.ndarray:
    """NTK with the base of Liu et al.: ``base_ntk = base^(ln(L/2pi) / ln(L0/2pi))``."""
    power = math.log(target_length / (2 * math.pi)) / math.log(
        geometry.original_length / (2 * math.pi)
    )
    exponents = (power - 1) * 2 * np.arange(geometry.num_cosines) / geometry.rotary_dim
    return geometry.base**exponents


def ntk_rcd(geometry: RopeGeometry, target_length: int, critical_dim: int) -> np.ndarray:
    """NTK whose factor reaches the ratio at ``critical_dim`` instead of ``d_tcd`` (Table 5)."""
    ratio = target_length / geometry.original_length
    return ratio ** (np.arange(geometry.num_cosines) / max(critical_dim, 1))


def abf(geometry: RopeGeometry, target_length: int) -> np.ndarray:
    """Adjusted base frequency (Xiong et al. 2023): RoPE with a larger base.

    They go from 10,000 to 500,000 for 8 times the window and give no rule for other ratios.
    [ours] ``base * ratio^(ln 50 / ln 8)`` passes through their numbers and leaves ratio 1 alone; it
    is more than NTK-aware's ``base * ratio^(d / (d - 2))``.
    """
    growth = (target_length / geometry.original_length) ** (math.log(50) / math.log(8))
    exponents = 2 * np.arange(geometry.num_cosines) / geometry.rotary_dim
    values: np.ndarray = growth**exponents
    return values


# CoPE's number of clipped frequencies, of Llama-3-8B's 64.
COPE_CLIPPED = 20
# A frequency that is cut to zero turns less than this over the target length, in radians.
CUT_ANGLE = 1e-3


def _clipped(geometry: RopeGeometry, target_length: int, kept: np.ndarray) -> np.ndarray:
    """Return factors that keep shares of the last frequencies; a share of 0 is a finite factor.

    [ours] That factor is the least at which each of them turns less than ``CUT_ANGLE``: large
    enough for cos and sin of any length below the target to be those of 0 in float32 to 1e-3, and
    small enough for JSON, float32 and configs of transformers.
    """
    factors = np.ones(geometry.num_cosines)
    if len(kept):
        cut = geometry.angles[-len(kept)] * target_length / CUT_ANGLE
        factors[-len(kept) :] = 1 / np.maximum(kept, 1 / cut)
    return np.maximum.accumulate(factors)


def _num_clipped(geometry: RopeGeometry) -> int:
    """Return how many frequencies CoPE clips.

    [ours] The paper clips those whose periods exceed the pre-training window, its code the last 20
    of Llama-3-8B, 29 of whose 64 do. Here it is both: at most 20, and none that turned once in L0.
    """
    return min(COPE_CLIPPED, int(np.sum(geometry.periods_tokens > geometry.original_length)))


def cope(geometry: RopeGeometry, target_length: int) -> np.ndarray:
    """CoPE (Li et al. 2026, arXiv 2602.05258): the last frequencies fade to zero.

    The last ``n`` are multiplied by ``0.5 (1 + cos(pi j / (n - 1)))``, j = 0 ... n - 1, as in the
    authors' ``modeling_cope.py``. The target length matters to the last of them alone.
    """
    count = _num_clipped(geometry)
    kept = 0.5 * (1 + np.cos(math.pi * np.arange(count) / max(count - 1, 1)))
    return _clipped(geometry, target_length, kept)


def cope_hard(geometry: RopeGeometry, target_length: int) -> np.ndarray:
    """CoPE's hard clipping, its ablation: the last frequencies are cut to zero."""
    return _clipped(geometry, target_length, np.zeros(_num_clipped(geometry)))


def _yarn_ramp(geometry: RopeGeometry, target_length: int, low: float, high: float) -> np.ndarray:
    ratio = target_length / geometry.original_length
    keep: np.ndarray = 1 - np.clip(
        (np.arange(geometry.num_cosines) - low) / max(high - low, 1e-3), 0, 1
    )
    return 1 / (keep + (1 - keep) / ratio)


def _dim_of_rotations(geometry: RopeGeometry, rotations: float) -> float:
    turns = geometry.original_length / (2 * math.pi * rotations)
    return geometry.num_cosines * math.log(turns) / math.log(geometry.base)


def yarn(
    geometry: RopeGeometry, target_length: int, alpha: float = 1.0, beta: float = 32.0
) -> np.ndarray:
    """YaRN's by-parts ramp between ``beta`` and ``alpha`` rotations in L0.

    The bounds are truncated to whole dimensions, as in transformers.
    """
    low = max(math.floor(_dim_of_rotations(geometry, beta)), 0)
    high = min(math.ceil(_dim_of_rotations(geometry, alpha)), geometry.rotary_dim - 1)
    return _yarn_ramp(geometry, target_length, low, high)


def yarn_rcd(
    geometry: RopeGeometry, target_length: int, critical_dim: int, beta: float = 32.0
) -> np.ndarray:
    """YaRN with full interpolation from ``critical_dim`` on instead of ``d_tcd`` (Table 5)."""
    shift = critical_dim - geometry.theoretical_critical_dim
    low = max(math.floor(_dim_of_rotations(geometry, beta)) + shift, 0)
    return _yarn_ramp(geometry, target_length, low, max(critical_dim, low))


def llama3(
    geometry: RopeGeometry,
    target_length: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> np.ndarray:
    """Llama-3.1's scaling: interpolate long periods, keep short ones, blend between."""
    ratio = target_length / geometry.original_length
    turns = geometry.original_length / geometry.periods_tokens
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return 1 / ((1 - smooth) / ratio + smooth)


def longrope2_start(geometry: RopeGeometry, target_length: int, critical_dim: int) -> np.ndarray:
    """LongRoPE2 before any search: a constant tail of the ratio, and the NTK head it implies."""
    ratio = target_length / geometry.original_length
    return assemble(critical_dim, np.full(geometry.num_cosines - critical_dim, ratio))


PLAIN: dict[str, Callable[[RopeGeometry, int], np.ndarray]] = {
    "unscaled": unscaled,
    "pi": pi,
    "ntk": ntk,
    "ntk-aware": ntk_aware,
    "yarn": yarn,
    "llama3": llama3,
    "abf": abf,
    "cope": cope,
    "cope-hard": cope_hard,
}


WITH_CRITICAL_DIM: dict[str, Callable[[RopeGeometry, int, int], np.ndarray]] = {
    "ntk-rcd": ntk_rcd,
    "yarn-rcd": yarn_rcd,
    "longrope2": longrope2_start,
}


METHODS = (*PLAIN, *WITH_CRITICAL_DIM)


def require_methods(names: Iterable[str]) -> None:
    """Refuse names of methods that do not exist.

    Raises:
        ValueError: naming the field to change.
    """
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise ValueError(
            f"report.methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}"
        )


def baseline(
    method: str,
    geometry: RopeGeometry,
    target_length: int,
    *,
    critical_dim: int | None = None,
    attention_factor: float = 1.0,
) -> RescaleFactors:
    """The factor vector of a published method.

    Args:
        method: one of ``METHODS``.
        geometry: the model's RoPE.
        target_length: L in tokens, which the ratio follows from.
        critical_dim: cosine index for the methods that have one; ``d_tcd`` unless given.
        attention_factor: carried along as it is.

    Raises:
        ValueError: if the method is unknown, or the critical dimension is not one of this geometry.
    """
    if method in PLAIN:
        return RescaleFactors(
            PLAIN[method](geometry, target_length), attention_factor, None, method
        )
    if method not in WITH_CRITICAL_DIM:
        raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {method!r}")
    dim = geometry.theoretical_critical_dim if critical_dim is None else critical_dim
    if not 0 < dim < geometry.num_cosines:
        raise ValueError(
            f"--critical-dim: expected a cosine index in 1 ... {geometry.num_cosines - 1}, "
            f"got {dim}"
        )
    return RescaleFactors(
        WITH_CRITICAL_DIM[method](geometry, target_length, dim), attention_factor, dim, method
    )
