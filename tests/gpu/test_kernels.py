"""Each kernel of torch's scaled dot product attention, through the package's attention."""

from collections.abc import Callable

import pytest
import torch
from reference_inputs import DEVICES
from torch.nn.attention import SDPBackend, sdpa_kernel

from longrope2_ray.model.attention import banded_attention, causal_attention

LENGTH = 320
FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# Relative; bfloat16 rounds the weights and the output by up to 2^-9, float32 kernels may put a
# product together from three of TF32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# What torch and cuDNN say where a kernel does not take the inputs.
REFUSALS = ("No available kernel", "No viable backend", "cuDNN Frontend error")

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return causal_attention(query, key, value, 0.2)


def banded(window: int | None, num_queries: int) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return banded_attention(
            query[:, :, -num_queries:], key, value, scaling=0.2, window=window, block_queries=128
        )

    return attend


# How the package calls torch's attention: whole, in a sliding window, the answer's queries alone.
CALLS = {
    "causal": causal,
    "window": banded(50, LENGTH),
    "answer": banded(None, 7),
    "answer in a window": banded(50, 7),
}


def inputs(device: str, dtype: torch.dtype, kv_heads: int) -> Tensors:
    """(1, 6, T, 64) queries, (1, K, T, 64) keys and values, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, LENGTH, 64, generator=generator).to(device, dtype).requires_grad_()
        for heads in (6, kv_heads, kv_heads)
    )
    return query, key, value


def outputs(
    call: str, backend: SDPBackend, tensors: Tensors, backward: bool = True
) -> list[torch.Tensor] | None:
    """Output and gradients under one kernel, in float32; None if it refuses the inputs."""
    try:
        with sdpa_kernel([backend]):
            out = CALLS[call](*tensors)
            grads = torch.autograd.grad(out.float().square().sum(), tensors) if backward else ()
    except RuntimeError as error:
        if any(words in str(error) for words in REFUSALS):
            return None
        raise
    return [tensor.detach().float() for tensor in (out, *grads)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says why it refuses
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_kernel_agrees_with_plain_float32_math(
    device: str, dtype: torch.dtype, call: str, kv_heads: int, name: str
) -> None:
    tensors = inputs(device, dtype, kv_heads)
    found = outputs(call, FUSED[name], tensors)
    if found is None:
        pytest.skip(f"{name} takes no {call} of {dtype} with {kv_heads} key heads on {device}")
    exact = tuple(tensor.detach().float().requires_grad_() for tensor in tensors)
    wanted = outputs(call, SDPBackend.MATH, exact)
    assert wanted is not None
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) <= TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_some_kernel_builds_no_square_of_logits(
    device: str, dtype: torch.dtype, call: str, kv_heads: int
) -> None:
    """Each call that the package makes is taken by a fused kernel, for scores and gradients."""
    tensors = inputs(device, dtype, kv_heads)
    taken = {name for name, kernel in FUSED.items() if outputs(call, kernel, tensors) is not None}
    assert taken
