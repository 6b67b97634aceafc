"""The score of one unit of work: the NLL of a needle document's answer (LongRoPE2 Sec. 3.2)."""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longrope2_ray.model.attention import input_device
from longrope2_ray.model.costs import LOGITS_CHUNK_TOKENS
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.trimmed_forward import TrimmedForward
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.scores import UnitScore
from longrope2_ray.tasks.needle import NeedleSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("longrope2")

_PROBE_TOKENS = 24


def plain_loss(model: "PreTrainedModel", sample: NeedleSample) -> float:
    """Mean NLL of the answer's tokens by transformers' own forward and loss, with its defaults.

    The reference for tests and benchmarks: it fills a cache and makes logits for all T positions.
    """
    input_ids = torch.tensor(sample.input_ids, device=input_device(model))[None]
    labels = torch.full_like(input_ids, -100)
    start, stop = sample.answer_span
    labels[:, start:stop] = input_ids[:, start:stop]
    with torch.inference_mode():
        return float(model(input_ids=input_ids, labels=labels).loss)


class NeedleScorer:
    """Scores needle documents with a resident model; memory stays linear in T.

    Nothing is computed that the answer's logits do not need: no cache, no (T, vocabulary) logits,
    no (T, T) mask, the last layer's queries and MLP only where the answer stands, and the MLP in
    chunks of tokens. This trimmed forward works on any family whose attention goes through
    transformers' attention interface; a short probe compares it with the family's own forward,
    and where they disagree (or ``model.attention`` is ``eager``) the family's own is used.

    Args:
        model: a causal language model from ``load_model``.
        shape: the model's shape.
        mlp_chunk_tokens: tokens that go through an MLP at a time.

    Attributes:
        trimmed: whether the trimmed forward is used; the result does not depend on it.
    """

    def __init__(
        self, model: "PreTrainedModel", shape: ModelShape, *, mlp_chunk_tokens: int = 2048
    ) -> None:
        if mlp_chunk_tokens < 1:
            raise ValueError(
                f"scorer.mlp_chunk_tokens: expected at least 1, got {mlp_chunk_tokens}"
            )
        self.model = model
        self.shape = shape
        self._rope = PinnedRope(model, shape)
        self._chunk_tokens = mlp_chunk_tokens
        self._forward = TrimmedForward(model, shape)
        self.trimmed = False
        self.trimmed = self._forward.applies and self._probe_agrees()

    @torch.inference_mode()
    def score(self, sample: NeedleSample, factors: RescaleFactors) -> UnitScore:
        """Score one sample under one factor vector; the model is left as it was.

        Args:
            sample: T tokens, the answer among them.
            factors: the vector with its attention factor and start tokens.

        Raises:
            ValueError: if the vector has another length than this model's.
        """
        started = time.perf_counter()
        start, stop = sample.answer_span
        factors = _weakened(factors, sample)
        with self._rope.pinned(factors), self._trimming(stop - start, self._chunk_tokens):
            nll, correct = self._answer_nll(sample)
        nll_sum = float(nll.double().sum())
        correct = correct and bool(np.isfinite(nll_sum))
        return UnitScore(nll_sum, stop - start, correct, time.perf_counter() - started)

    def gradient(self, sample: NeedleSample, factors: RescaleFactors) -> UnitScore:
        """Score one sample, with the gradient of its NLL in the logarithms of the factors.

        Every layer but the last is computed again on the way back, so that memory stays that of
        one layer: about four forward passes in all (``model.costs.GRADIENT_PASSES``).

        Raises:
            ValueError: if the vector has another length than this model's, or the model's rotary
                tables have a layout of their own.
        """
        started = time.perf_counter()
        start, stop = sample.answer_span
        factors = _weakened(factors, sample)
        self.model.requires_grad_(False)
        trimming = self._trimming(stop - start, self._chunk_tokens)
        with (
            _deterministic(self._device),
            torch.enable_grad(),
            self._rope.differentiable(factors) as logs,
            trimming,
        ):
            with self._forward.recomputed():
                nll, correct = self._answer_nll(sample)
            # Layers run again here, so they still have to be trimmed.
            (gradient,) = torch.autograd.grad(nll.sum(), logs)
        nll_sum = float(nll.detach().double().sum())
        correct = correct and bool(np.isfinite(nll_sum))
        seconds = time.perf_counter() - started
        return UnitScore(nll_sum, stop - start, correct, seconds, tuple(gradient.tolist()))

    def _answer_nll(self, sample: NeedleSample) -> tuple[torch.Tensor, bool]:
        """Return the NLL of each answer token under what is pinned, and whether all are right."""
        start, stop = sample.answer_span
        # No token attends to the answer's last one, so it is not fed, and the queries that are
        # needed are exactly the last ones of what is.
        input_ids = torch.tensor(sample.input_ids[: stop - 1], device=self._device)[None]
        positions = None
        if sample.position_ids is not None:
            positions = torch.tensor(sample.position_ids[: stop - 1], device=self._device)[None]
        targets = torch.tensor(sample.input_ids[start:stop], device=self._device)
        if stop - start <= LOGITS_CHUNK_TOKENS:
            nll, right = _nll(self._logits(input_ids, stop - start, positions), targets)
        else:
            nll, right = self._nll_in_chunks(input_ids, targets, positions)
        return nll, bool(right.all())

    def _nll_in_chunks(
        self, input_ids: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the NLL of many tokens, whose logits never exist all at once.

        The decoder runs once; the family's own forward then makes logits of a chunk of its output,
        with whatever scale or cap it puts on them, and makes them again on a way back.
        """
        decoder = self.model.get_decoder()
        output = decoder(input_ids=input_ids, use_cache=False, **self._placed(input_ids, positions))
        first = output.last_hidden_state.shape[1] - len(targets)

        def chunk(start: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept = torch.arange(start, start + len(wanted), device=wanted.device)
            with _returning(decoder, output):
                whole = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=kept)
            return _nll(whole.logits[0], wanted)

        parts = []
        for wanted in targets.split(LOGITS_CHUNK_TOKENS):
            parts.append(checkpoint(chunk, first, wanted, use_reentrant=False))
            first += len(wanted)
        nlls, rights = zip(*parts, strict=True)
        return torch.cat(nlls), torch.cat(rights)

    @property
    def _device(self) -> torch.device:
        return input_device(self.model)

    def _logits(
        self, input_ids: torch.Tensor, num_queries: int, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits at the last ``num_queries`` positions of (1, T) ids; (num_queries, vocabulary)."""
        where = self._placed(input_ids, positions)
        return self.model(
            input_ids=input_ids, use_cache=False, logits_to_keep=num_queries, **where
        ).logits[0]

    def _placed(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return the arguments that put tokens at positions, if they have their own."""
        if positions is None:
            return {}
        if self.trimmed:
            return {"position_ids": positions}
        # Without a mask transformers takes a jump for the start of another document.
        return {"position_ids": positions, "attention_mask": torch.ones_like(input_ids)}

    def _trimming(self, num_queries: int, chunk_tokens: int) -> AbstractContextManager[None]:
        return self._forward.trimmed(num_queries, chunk_tokens) if self.trimmed else nullcontext()

    # --- whether the trimmed forward applies

    @torch.inference_mode()
    def _probe_agrees(self) -> bool:
        """Compare the trimmed forward with the family's own on a few tokens.

        So a family that it does not suit costs time, and no score is wrong.
        """
        input_ids = torch.arange(_PROBE_TOKENS, device=self._device)[None] % self.shape.vocab_size
        plain = self._logits(input_ids, 3).float()
        family = self.shape.architecture
        try:
            self.trimmed = True
            with self._trimming(3, _PROBE_TOKENS // 2):
                short = self._logits(input_ids, 3).float()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            log.warning("%s is scored by its own forward: %s", family, error)
            return False
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        difference = float((short - plain).norm() / plain.norm())
        agrees = difference <= tolerance
        if not agrees:
            log.warning("%s is scored by its own forward: off by %.1e", family, difference)
        return agrees


def _weakened(factors: RescaleFactors, sample: NeedleSample) -> RescaleFactors:
    """Return the vector as a sample is scored under it (``search.cascade.attention_share``)."""
    if sample.attention_share == 1:
        return factors
    return replace(factors, attention_factor=sample.attention_share * factors.attention_factor)


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the NLL of each target in float32, and whether it is the likeliest token."""
    nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return nll, logits.argmax(-1) == targets


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Let the kernels of a ``with`` block sum in a fixed order.

    On a GPU the backward passes of the fused attention add up by atomics otherwise, and a gradient
    has other bits each time (measured: relative differences of 1e-5 in float32, 2e-3 in bfloat16).
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return what it is known to, for the calls of a ``with`` block."""
    replaced = module.__dict__.get("forward")  # accelerate puts its own forward on the instance
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced
