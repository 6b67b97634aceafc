"""The score of one unit of work: the NLL of a needle document's answer (LongRoPE2 Sec. 3.2).

Shapes: B batch (always 1), T tokens, Q queries, H heads, K key/value heads, E head size, D model
width.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from longrope2_ray.model.attention import (
    banded_attention,
    causal_attention,
    decoder_layers,
    flash_attention,
    input_device,
    route_attention,
)
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.scores import UnitScore
from longrope2_ray.tasks.needle import NeedleSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("longrope2")


_ATTENTION_NAME = "longrope2_answer_attention"


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
        self._config = model.config.get_text_config()
        self._kernel: str = self._config._attn_implementation
        self._layers = decoder_layers(model, shape.num_layers)
        self._num_queries = 0
        self._collecting = False
        self._last_keys_values: tuple[torch.Tensor, torch.Tensor] | None = None
        self.trimmed = self._can_trim() and self._probe_agrees()

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
        # No token attends to the answer's last one, so it is not fed, and the queries that are
        # needed are exactly the last ones of what is.
        input_ids = torch.tensor(sample.input_ids[: stop - 1], device=self._device)[None]
        targets = torch.tensor(sample.input_ids[start:stop])
        with self._rope.pinned(factors):
            logits = self._answer_logits(input_ids, stop - start, self.trimmed, self._chunk_tokens)
        targets = targets.to(logits.device)
        nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        nll_sum = float(nll.double().sum())
        correct = bool((logits.argmax(-1) == targets).all()) and np.isfinite(nll_sum)
        return UnitScore(nll_sum, stop - start, bool(correct), time.perf_counter() - started)

    @property
    def _device(self) -> torch.device:
        return input_device(self.model)

    def _answer_logits(
        self, input_ids: torch.Tensor, num_queries: int, trimmed: bool, chunk_tokens: int
    ) -> torch.Tensor:
        """Logits at the last ``num_queries`` positions of (1, T) ids; (num_queries, vocabulary)."""
        with ExitStack() as stack:
            if trimmed:
                stack.enter_context(self._answer_attention(num_queries))
                for layer in self._layers:
                    stack.enter_context(_mlp_in_chunks(layer, chunk_tokens))
            return self.model(
                input_ids=input_ids, use_cache=False, logits_to_keep=num_queries
            ).logits[0]

    # --- attention and the last layer

    @contextmanager
    def _answer_attention(self, num_queries: int) -> Iterator[None]:
        """Route attention through ``_attend`` and trim the last layer, for one forward pass."""
        route_attention(self._config, _ATTENTION_NAME, self._attend)
        self._num_queries = num_queries
        hook = self._layers[-1].register_forward_pre_hook(self._trim, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._config._attn_implementation = self._kernel
            self._last_keys_values = None

    def _trim(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the last layer: all T keys and values, the answer's queries only.

        The layer runs twice: once over all T tokens up to its attention, where ``_attend`` takes
        the keys and values and raises; then, by the ordinary call after this hook, over the last
        positions only, where ``_attend`` puts those keys and values in. So norms, biases, fused
        projections and residuals of a family need no fork.
        """
        self._collecting = True
        try:
            layer.forward(*args, **kwargs)
        except _KeysValuesCollected as collected:
            self._last_keys_values = collected.keys, collected.values
        finally:
            self._collecting = False
        if self._last_keys_values is None:
            raise RuntimeError(
                f"the last layer of {self.shape.model_type} never reached its attention"
            )
        last = self._num_queries
        kwargs = dict(kwargs)
        for name in ("hidden_states", "position_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, -last:]
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(
                table[:, -last:] for table in kwargs["position_embeddings"]
            )
        return tuple(
            arg[:, -last:] if index == 0 else arg for index, arg in enumerate(args)
        ), kwargs

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Causal attention of the last Q of T positions; (B, H, Q, E).

        Args:
            query: (B, H, Q, E), already rotated.
            key: (B, K, T, E); ``value`` likewise.
            scaling: what the logits are multiplied by.
            window: tokens that a query sees; None for all before it.
        """
        if self._collecting:
            raise _KeysValuesCollected(key, value)
        if self._last_keys_values is not None:
            key, value = self._last_keys_values
        num_keys = key.shape[2]
        if window is not None and window >= num_keys:
            window = None
        if self._kernel == "flash_attention_2":
            return flash_attention(query, key, value, scaling, window)
        if window is None and query.shape[2] == num_keys:
            return causal_attention(query, key, value, scaling)
        return banded_attention(query, key, value, scaling=scaling, window=window)

    # --- whether the trimmed forward applies

    def _can_trim(self) -> bool:
        layer_types = set(getattr(self._config, "layer_types", None) or ())
        return (
            self._kernel in ("sdpa", "flash_attention_2")
            and bool(getattr(self.model, "_supports_attention_backend", False))
            and layer_types <= {"full_attention", "sliding_attention"}
            and bool(self._layers)
        )

    @torch.inference_mode()
    def _probe_agrees(self) -> bool:
        """Compare the trimmed forward with the family's own on a few tokens.

        So a family that it does not suit costs time, and no score is wrong.
        """
        input_ids = torch.arange(_PROBE_TOKENS, device=self._device)[None] % self.shape.vocab_size
        plain = self._answer_logits(input_ids, 3, False, _PROBE_TOKENS).float()
        family = self.shape.architecture
        try:
            short = self._answer_logits(input_ids, 3, True, _PROBE_TOKENS // 2).float()
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


class _KeysValuesCollected(Exception):  # noqa: N818 - a way out of the last layer, not an error
    """Ends the last layer's forward once its keys and values (B, K, T, E) are known."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values


@contextmanager
def _mlp_in_chunks(layer: nn.Module, chunk_tokens: int) -> Iterator[None]:
    """Run a layer's dense MLP on ``chunk_tokens`` tokens at a time, since its inside is so wide."""
    mlp = getattr(layer, "mlp", None)
    if mlp is None or hasattr(mlp, "experts"):
        yield
        return
    replaced = mlp.__dict__.get("forward")  # accelerate puts its own forward on the instance
    mlp.forward = _in_chunks(mlp.forward, chunk_tokens)
    try:
        yield
    finally:
        del mlp.forward
        if replaced is not None:
            mlp.forward = replaced


def _in_chunks(
    forward: Callable[..., torch.Tensor], chunk_tokens: int
) -> Callable[..., torch.Tensor]:
    def chunked(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or hidden.shape[1] <= chunk_tokens:
            return forward(hidden, *args, **kwargs)
        out = torch.empty_like(hidden)
        for first in range(0, hidden.shape[1], chunk_tokens):
            out[:, first : first + chunk_tokens] = forward(hidden[:, first : first + chunk_tokens])
        return out

    return chunked
