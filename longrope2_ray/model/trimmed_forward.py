"""The forward pass of a needle document: only what the logits of its last positions need.

Shapes: B batch (always 1), T tokens, Q queries, H heads, K key/value heads, E head size, D model
width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longrope2_ray.model.attention import (
    banded_attention,
    causal_attention,
    decoder_layers,
    flash_attention,
    route_attention,
)
from longrope2_ray.recipe.model import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION_NAME = "longrope2_answer_attention"


class TrimmedForward:
    """Trims a model's forward pass to its last positions; memory stays linear in T.

    Nothing is computed that their logits do not need: no (T, T) mask, the last layer's queries and
    MLP only where they stand, and the MLP in chunks of tokens. It works on any family whose
    attention goes through transformers' attention interface.

    Args:
        model: a causal language model from ``load_model``.
        shape: the model's shape.

    Attributes:
        applies: whether the model is of such a family.
    """

    def __init__(self, model: "PreTrainedModel", shape: ModelShape) -> None:
        self._shape = shape
        self._config = model.config.get_text_config()
        self._kernel: str = self._config._attn_implementation
        self._layers = decoder_layers(model, shape.num_layers)
        self._num_queries = 0
        self._collecting = False
        self._last_keys_values: tuple[torch.Tensor, torch.Tensor] | None = None
        layer_types = set(getattr(self._config, "layer_types", None) or ())
        self.applies = (
            self._kernel in ("sdpa", "flash_attention_2")
            and bool(getattr(model, "_supports_attention_backend", False))
            and layer_types <= {"full_attention", "sliding_attention"}
            and bool(self._layers)
        )

    @contextmanager
    def trimmed(self, num_queries: int, chunk_tokens: int) -> Iterator[None]:
        """Trim the passes of a ``with`` block to their last ``num_queries`` positions.

        A way back that computes layers again has to end inside the block.

        Args:
            chunk_tokens: tokens that go through an MLP at a time.
        """
        with ExitStack() as stack:
            stack.enter_context(self._answer_attention(num_queries))
            for layer in self._layers:
                stack.enter_context(_mlp_in_chunks(layer, chunk_tokens))
            yield

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """Keep only the inputs of every layer but the last, and compute the rest again on the way
        back."""
        with ExitStack() as stack:
            for layer in self._layers[:-1]:
                stack.enter_context(_recomputed(layer))
            yield

    @contextmanager
    def _answer_attention(self, num_queries: int) -> Iterator[None]:
        """Route attention through ``_attend`` and trim the last layer, for one forward pass."""
        route_attention(self._config, _ATTENTION_NAME, self._attend)
        self._num_queries = num_queries
        last = self._layers[-1]
        hooks = (
            last.register_forward_pre_hook(self._trim, with_kwargs=True),
            last.register_forward_hook(self._forget),
        )
        try:
            yield
        finally:
            for hook in hooks:
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
                f"the last layer of {self._shape.model_type} never reached its attention"
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

    def _forget(self, *_: object) -> None:
        """Forward hook of the last layer: on the way back others attend again, to their own."""
        self._last_keys_values = None

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


class _KeysValuesCollected(Exception):  # noqa: N818 - a way out of the last layer, not an error
    """Ends the last layer's forward once its keys and values (B, K, T, E) are known."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values


@contextmanager
def _recomputed(layer: nn.Module) -> Iterator[None]:
    """Keep nothing of a layer but its input for the way back."""
    forward = layer.forward
    replaced = layer.__dict__.get("forward")  # accelerate puts its own forward on the instance
    layer.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        del layer.forward
        if replaced is not None:
            layer.forward = replaced


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
