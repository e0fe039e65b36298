"""Attention in rows of several conversations: each conversation by itself, so that a row costs what its parts cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

NAME = "packed_sdpa"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spans: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within spans; without spans, as transformers' ``sdpa`` does.

    A mask over a whole row would make its cost grow with the square of the row's length.

    Args:
        module: the attention layer.
        query: ``(B, heads, L, channels)``.
        key: as ``query``, or with fewer heads.
        value: as ``key``.
        attention_mask: not read where there are spans.
        spans: of each row, the lengths of its conversations (and of its padding), which sum to ``L``.
        kwargs: of transformers' attention functions.

    Returns:
        ``(B, L, heads, channels)``, and None for weights.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = []
    for row, lengths in enumerate(spans):
        parts = zip(*(part[row : row + 1].split(list(lengths), dim=2) for part in (query, key, value)), strict=True)
        rows.append(torch.cat([_attend(module, *part, **kwargs) for part in parts], dim=1))
    return torch.cat(rows), None


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Let a language model attend within spans where it uses ``sdpa``; return whether it does now."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def spans_of(position_ids: torch.Tensor) -> list[list[int]]:
    """Return the lengths of the runs of each row: ``[[0, 1, 2, 0, 1, -1, -1]]`` gives ``[[3, 2, 1, 1]]``."""
    width = position_ids.shape[1]
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = torch.diff(position_ids, dim=1) != 1
    spans = []
    for row in starts.cpu():
        edges = [*row.nonzero()[:, 0].tolist(), width]
        spans.append([end - start for start, end in zip(edges, edges[1:], strict=False)])
    return spans
