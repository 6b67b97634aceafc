"""The score of one unit of work: negative log-likelihood of a needle document's answer (LongRoPE2 Sec. 3.2).

Shapes: B batch (always 1), T tokens, Q queries, H heads, K key/value heads, E head size, D model width.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from longrope2_ray.model.attention import (
    _flash_attention,
    _input_device,
    banded_attention,
    causal_attention,
    decoder_layers,
)
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.spec import ModelSpec
from longrope2_ray.tasks.needle import NeedleSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


_ATTENTION_NAME = "longrope2_answer_attention"


_PROBE_TOKENS = 24


@dataclass(frozen=True)
class UnitScore:
    """One candidate on one sample.

    Attributes:
        nll_sum: summed negative log-likelihood of the answer's tokens, in nats; NaN or inf are kept as they come.
        num_tokens: how many tokens the answer has.
        correct: whether greedy decoding gives exactly the answer. It does if and only if the teacher-forced argmax
            is right at every answer position: greedy decoding sees the prompt plus its own choices so far, which is
            the teacher-forced context for as long as all of them were right, and the first wrong one decides.
        seconds: wall clock time.
    """

    nll_sum: float
    num_tokens: int
    correct: bool
    seconds: float


def plain_loss(model: "PreTrainedModel", sample: NeedleSample) -> float:
    """Mean negative log-likelihood of the answer's tokens by transformers' own forward and loss, with its defaults.

    The reference for tests and benchmarks: it fills a cache and makes logits for all T positions.
    """
    input_ids = torch.tensor(sample.input_ids, device=_input_device(model))[None]
    labels = torch.full_like(input_ids, -100)
    start, stop = sample.answer_span
    labels[:, start:stop] = input_ids[:, start:stop]
    with torch.inference_mode():
        return float(model(input_ids=input_ids, labels=labels).loss)


class NeedleScorer:
    """Scores needle documents with a resident model; memory stays linear in T.

    Nothing is computed that the answer's logits do not need: no cache, no (T, vocabulary) logits, no (T, T) mask,
    the last layer's queries and MLP only where the answer stands, and the MLP in chunks of tokens. Works on any
    family whose attention goes through transformers' attention interface; a short probe compares with the
    family's own forward, and where they disagree (or ``model.attention`` is ``eager``) the family's own is used.

    Args:
        model: a causal language model from ``load_model``.
        spec: what ``read_spec`` says about it.
        mlp_chunk_tokens: tokens that go through an MLP at a time.
    """

    def __init__(
        self, model: "PreTrainedModel", spec: ModelSpec, *, mlp_chunk_tokens: int = 2048
    ) -> None:
        if mlp_chunk_tokens < 1:
            raise ValueError(
                f"scorer.mlp_chunk_tokens: expected at least 1, got {mlp_chunk_tokens}"
            )
        self.model = model
        self.spec = spec
        self._rope = PinnedRope(model, spec)
        self._chunk_tokens = mlp_chunk_tokens
        self._config = model.config.get_text_config()
        self._kernel: str = self._config._attn_implementation
        self._layers = decoder_layers(model, spec.num_layers)
        self._num_queries = 0
        self._collecting = False
        self._last_keys_values: tuple[torch.Tensor, torch.Tensor] | None = None
        self.trimmed = self._can_trim() and self._probe_agrees()
        """Whether the short way is used; the result does not depend on it."""

    @torch.inference_mode()
    def score(
        self,
        sample: NeedleSample,
        values: np.ndarray,
        attention_factor: float,
        start_tokens: int = 0,
    ) -> UnitScore:
        """Score one sample under one factor vector; the model is left as it was.

        Args:
            sample: T tokens, the answer among them.
            values: (d/2,) rescale factors.
            attention_factor: what cos and sin are multiplied by.
            start_tokens: positions that keep the original angles.

        Raises:
            ValueError: if the vector does not fit the model.
        """
        started = time.perf_counter()
        start, stop = sample.answer_span
        # The last answer token is nobody's context, so the needed queries are exactly the last ones of what is fed.
        input_ids = torch.tensor(sample.input_ids[: stop - 1], device=self._device)[None]
        targets = torch.tensor(sample.input_ids[start:stop])
        with self._rope.pinned(values, attention_factor, start_tokens):
            logits = self._answer_logits(input_ids, stop - start, self.trimmed, self._chunk_tokens)
        targets = targets.to(logits.device)
        nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        nll_sum = float(nll.double().sum())
        correct = bool((logits.argmax(-1) == targets).all()) and np.isfinite(nll_sum)
        return UnitScore(nll_sum, stop - start, bool(correct), time.perf_counter() - started)

    @property
    def _device(self) -> torch.device:
        return _input_device(self.model)

    def _answer_logits(
        self, input_ids: torch.Tensor, num_queries: int, trimmed: bool, chunk_tokens: int
    ) -> torch.Tensor:
        """Logits at the last ``num_queries`` positions of ``input_ids`` (1, T); (num_queries, vocabulary)."""
        with ExitStack() as stack:
            if trimmed:
                stack.enter_context(self._answer_attention(num_queries))
                for layer in self._layers:
                    stack.enter_context(_mlp_in_chunks(layer, chunk_tokens))
            return self.model(
                input_ids=input_ids, use_cache=False, logits_to_keep=num_queries
            ).logits[0]

    # -------------------------------------------------------------------------------- attention and the last layer

    @contextmanager
    def _answer_attention(self, num_queries: int) -> Iterator[None]:
        """Route the model's attention through ``_attend`` and trim its last layer, for one forward.

        transformers makes no mask for an attention function that has no mask function of its own, so nothing of
        size T x T is built, sliding windows included: ``_attend`` knows the causal structure itself.
        """
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION_NAME, self._attend)
        self._config._attn_implementation = _ATTENTION_NAME
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
        """Forward pre-hook of the last layer: collect keys and values of all tokens, then let only the answer through.

        The layer runs twice: once over all T tokens up to its attention, where ``_attend`` takes the keys and values
        and raises; then, by the ordinary call after this hook, over the last positions only, where ``_attend``
        puts those keys and values in. So norms, biases, fused projections and residuals of a family need no fork.
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
                f"the last layer of {self.spec.model_type} never reached its attention"
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
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Causal attention of the last Q of T positions; (B, Q, H, E).

        Args:
            query: (B, H, Q, E), already rotated.
            key: (B, K, T, E); ``value`` likewise.
            attention_mask: None, see ``_answer_attention``.
        """
        if self._collecting:
            raise _KeysValuesCollected(key, value)
        if attention_mask is not None or softcap is not None or s_aux is not None:
            raise ValueError(
                f"{type(module).__name__} asks for a mask, a softcap or attention sinks"
            )
        if self._last_keys_values is not None:
            key, value = self._last_keys_values
        num_keys = key.shape[2]
        window = sliding_window if sliding_window and sliding_window < num_keys else None
        if self._kernel == "flash_attention_2":
            return _flash_attention(query, key, value, scaling, window), None
        if window is None and query.shape[2] == num_keys:
            out = causal_attention(query, key, value, scaling)
        else:
            out = banded_attention(query, key, value, scaling=scaling, window=window)
        return out.transpose(1, 2).contiguous(), None

    # ------------------------------------------------------------------------------------------- whether it applies

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
        """Compare the short way with the family's own forward on a few tokens: a wrong guess costs time, not truth."""
        input_ids = torch.arange(_PROBE_TOKENS, device=self._device)[None] % self.spec.vocab_size
        plain = self._answer_logits(input_ids, 3, False, _PROBE_TOKENS).float()
        try:
            short = self._answer_logits(input_ids, 3, True, _PROBE_TOKENS // 2).float()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            logger.warning("%s is scored by its own forward: %s", self.spec.architecture, error)
            return False
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        difference = float((short - plain).norm() / plain.norm())
        if not difference <= tolerance:
            logger.warning(
                "%s is scored by its own forward: logits differ by %.1e",
                self.spec.architecture,
                difference,
            )
        return difference <= tolerance


class _KeysValuesCollected(Exception):  # noqa: N818 - a way out of the last layer, not an error
    """Leaves the last layer's forward once its keys and values (B, K, T, E) are known; the rest is not needed."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values


@contextmanager
def _mlp_in_chunks(layer: nn.Module, chunk_tokens: int) -> Iterator[None]:
    """Run a layer's dense MLP on ``chunk_tokens`` tokens at a time: nothing in the model is as wide as its inside."""
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
