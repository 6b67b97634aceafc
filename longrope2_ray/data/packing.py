"""Packing documents into segments of two windows."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Window = Literal["short", "long"]


@dataclass(frozen=True, eq=False)
class Segment:
    """One training example of exactly L tokens.

    Attributes:
        input_ids: (L,) int64 tokens.
        cu_seqlens: (documents + 1,) int32 starts of the documents, from 0, then L.
        window: ``short`` has the original RoPE and attention within a document, ``long`` the
            rescaled RoPE and full attention.
    """

    input_ids: np.ndarray
    cu_seqlens: np.ndarray
    window: Window


@dataclass(frozen=True, eq=False)
class Packed:
    """Segments, and how many tokens are in none.

    Attributes:
        segments: in order.
        truncated_tokens: cut off at a segment's end.
        left_over_tokens: of the last segment, which was not filled.
    """

    segments: list[Segment]
    truncated_tokens: int
    left_over_tokens: int


def pack(
    documents: Iterable[np.ndarray], window: Window, length: int, original_length: int
) -> Packed:
    """Concatenate documents, in their order, into segments of exactly ``length`` tokens.

    A document that crosses a segment's end is cut there. Its rest is dropped, except that in the
    long window a rest of more than ``original_length`` tokens begins the next segment, as a
    document of its own.

    Raises:
        ValueError: if a document belongs to the other window.
    """
    segments: list[Segment] = []
    parts: list[np.ndarray] = []
    filled = truncated = 0
    for document in documents:
        if (len(document) <= original_length) != (window == "short"):
            raise ValueError(
                f"documents: expected those of the {window} window, got one of "
                f"{len(document)} tokens"
            )
        rest = document
        while len(rest):
            part, rest = rest[: length - filled], rest[length - filled :]
            parts.append(part)
            filled += len(part)
            if filled == length:
                starts = np.cumsum([0, *map(len, parts)], dtype=np.int32)
                segments.append(Segment(np.concatenate(parts).astype(np.int64), starts, window))
                parts, filled = [], 0
                if window == "short" or len(rest) <= original_length:
                    truncated += len(rest)
                    break
    return Packed(segments, truncated, filled)
