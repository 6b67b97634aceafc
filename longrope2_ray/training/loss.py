"""The loss of a segment, and whether a model's family can be trained with it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longrope2_ray.training.attention import SegmentAttention
from longrope2_ray.training.batches import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 16


class SegmentLoss(nn.Module):
    """A causal language model whose forward returns the summed NLL of its targets.

    Args:
        model: a model with a linear language head.
        chunk_tokens: tokens whose logits exist at once.
    """

    def __init__(self, model: "PreTrainedModel", chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self._chunk_tokens = chunk_tokens

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the NLL of a segment's targets, a float32 scalar, in nats.

        Args:
            input_ids: (1, t) token ids.
            position_ids: (1, t) positions.
            targets: (1, t) next tokens, ``IGNORED`` where there is none.
        """
        hidden = self.model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted in zip(
            hidden.split(self._chunk_tokens), targets[0].split(self._chunk_tokens), strict=True
        ):
            total = total + checkpoint(self._chunk, rows, wanted, use_reentrant=False)
        return total

    def _chunk(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def require_trainable(loss: SegmentLoss, vocab_size: int) -> None:
    """Try a few tokens on the model as it was loaded, before it is sharded.

    The loss must be the model's own, and documents must not leak into each other.

    Raises:
        ValueError: if the family does something else with its logits, such as scaling or capping
            them; if its layers carry something from one document of a segment into the next, as
            recurrent ones do; if it fails at all.
    """
    model, family = loss.model, type(loss.model).__name__
    text, training = model.config.get_text_config(), model.training
    kernel = text._attn_implementation
    model.eval()
    try:
        own, found, leaked = _probe(loss, vocab_size)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"model.path: {family} cannot be trained here: {reason}") from error
    finally:
        text._attn_implementation = kernel
        model.train(training)
    if not math.isclose(own, found, rel_tol=1e-3):
        raise ValueError(
            f"model.path: {family} makes its loss of more than decoder and language head "
            f"({own:.4f} against {found:.4f}), which training does not support"
        )
    if not leaked <= 1e-5 * found:
        raise ValueError(
            f"model.path: {family} carries something from one document of a segment into the next "
            f"(its loss moves by {leaked:.1e}), as recurrent and convolution layers do; training "
            f"needs attention layers alone"
        )


@torch.no_grad()
def _probe(loss: SegmentLoss, vocab_size: int) -> tuple[float, float, float]:
    """Return three numbers about one document, in nats.

    Its NLL by the family's own forward; its NLL by ``loss``; and how much the latter changes with
    another document before it in the segment.
    """
    device = next(loss.parameters()).device
    document = torch.arange(_PROBE_TOKENS, device=device) % vocab_size
    positions = torch.arange(_PROBE_TOKENS, device=device)
    logits = loss.model(input_ids=document[None], use_cache=False).logits[0].float()
    own = nn.functional.cross_entropy(logits[:-1], document[1:], reduction="sum")
    attention = SegmentAttention(loss.model, "sdpa", None)

    def nll(documents: Sequence[torch.Tensor]) -> float:
        """Return the NLL of the last document of a segment."""
        count = len(documents)
        attention.ranges = np.arange(count + 1, dtype=np.int32) * _PROBE_TOKENS
        targets = torch.full((count * _PROBE_TOKENS,), IGNORED, device=device)
        targets[-_PROBE_TOKENS:-1] = document[1:]
        return float(
            loss(torch.cat(list(documents))[None], positions.repeat(count)[None], targets[None])
        )

    behind = [nll([other, document]) for other in (document, document.flip(0))]
    return float(own), nll([document]), abs(behind[0] - behind[1])
