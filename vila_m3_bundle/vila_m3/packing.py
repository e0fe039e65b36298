"""Several conversations in one row, and several rows in one batch: padding and packing of spliced sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .configuration import IGNORED_LABEL, IMAGE_TOKEN_ID


@dataclass(frozen=True)
class Spliced:
    """A padded batch of embedded sequences.

    Args:
        inputs_embeds: ``(B, L, hidden)``, zeros at padding.
        attention_mask: ``(B, L)`` bool, False at padding.
        position_ids: ``(B, L)``.
        labels: ``(B, L)``, ``IGNORED_LABEL`` at images and padding.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor


def expand_image_places(
    tokens: Sequence[int], tokens_per_image: int, labels: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Give every visual token its own place: ``[1, -200, 2]`` with 3 tokens an image -> ``[1, -200, -200, -200, 2]``.

    Args:
        tokens: token ids with one ``IMAGE_TOKEN_ID`` per image.
        tokens_per_image: places of one image.
        labels: one per token; None supervises nothing.

    Returns:
        Expanded tokens and labels.
    """
    expanded: list[int] = []
    targets: list[int] = []
    for token, label in zip(tokens, labels or [IGNORED_LABEL] * len(tokens), strict=True):
        is_image = token == IMAGE_TOKEN_ID
        expanded += [token] * (tokens_per_image if is_image else 1)
        targets += [IGNORED_LABEL] * tokens_per_image if is_image else [label]
    return expanded, targets


def collapse_image_places(tokens: Sequence[int], tokens_per_image: int) -> list[int]:
    """Undo :func:`expand_image_places`.

    Raises:
        ValueError: if a run of image places is no multiple of ``tokens_per_image``.
    """
    collapsed: list[int] = []
    run = 0
    for token in [*tokens, None]:
        if token == IMAGE_TOKEN_ID:
            run += 1
            continue
        if run % tokens_per_image:
            raise ValueError(f"{run} image places in a row are no multiple of {tokens_per_image}")
        collapsed += [IMAGE_TOKEN_ID] * (run // tokens_per_image)
        run = 0
        if token is not None:
            collapsed.append(token)
    return collapsed


def pad_rows(rows: Sequence[torch.Tensor], value: float, side: str = "right") -> torch.Tensor:
    """Stack rows ``(L_i, ...)`` of different lengths to ``(B, max L, ...)``."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def splice(
    embeddings: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    padding_side: str = "right",
    max_length: int | None = None,
) -> Spliced:
    """Cut embedded sequences at ``max_length`` and pad them to a batch.

    Args:
        embeddings: one ``(L_i, hidden)`` per sequence, images in their places.
        labels: one ``(L_i,)`` per sequence.
        padding_side: ``right`` or ``left``.
        max_length: longest sequence in tokens; what is beyond is cut off, even within an image.

    Returns:
        The batch; position ids count within each sequence and are 0 at padding.
    """
    embeddings = [row[:max_length] for row in embeddings]
    labels = [row[:max_length] for row in labels]
    positions = [torch.arange(len(row), device=row.device) for row in embeddings]
    masks = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in embeddings]
    return Spliced(
        pad_rows(embeddings, 0.0, padding_side),
        pad_rows(masks, False, padding_side),
        pad_rows(positions, 0, padding_side),
        pad_rows(labels, IGNORED_LABEL, padding_side),
    )


def plan_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return which sequences stand in which row, from the longest to the shortest as VILA packs them.

    Args:
        lengths: of the sequences, in tokens.
        width: of a row; a longer sequence has a row of its own.
    """
    rows: list[list[int]] = []
    used = width + 1
    for index in torch.sort(torch.tensor(lengths), descending=True).indices.tolist():
        if used + lengths[index] > width:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += lengths[index]
    return rows


def pack(batch: Spliced, padding_value: float = 0.0) -> Spliced:
    """Put short sequences behind each other in one row, for training; the batch's width stays the bound.

    Sequences are taken from the longest to the shortest and appended to the last row while they fit, as VILA
    does. Positions restart with every sequence, which tells an attention kernel for variable lengths where
    one ends; at padding they are -1.

    Args:
        batch: padded sequences.
        padding_value: of the embeddings at padding. VILA writes the pad token's id there, which nothing reads.
    """
    width = batch.attention_mask.shape[1]
    rows = plan_rows(batch.attention_mask.sum(dim=1).tolist(), width)
    kept = [[(index, batch.attention_mask[index]) for index in row] for row in rows]
    embeddings = [torch.cat([batch.inputs_embeds[index][mask] for index, mask in row]) for row in kept]
    labels = [torch.cat([batch.labels[index][mask] for index, mask in row]) for row in kept]
    positions = [torch.cat([torch.arange(int(mask.sum()), device=mask.device) for _, mask in row]) for row in kept]
    masks = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in labels]
    packed = Spliced(
        pad_rows(embeddings, padding_value),
        pad_rows(masks, False),
        pad_rows(positions, -1),
        pad_rows(labels, IGNORED_LABEL),
    )
    return _widen(packed, width, padding_value)


def _widen(batch: Spliced, width: int, padding_value: float) -> Spliced:
    """Pad a batch on the right to a width."""
    extra = width - batch.labels.shape[1]
    pad = torch.nn.functional.pad
    return Spliced(
        pad(batch.inputs_embeds, (0, 0, 0, extra), value=padding_value),
        pad(batch.attention_mask, (0, extra), value=False),
        pad(batch.position_ids, (0, extra), value=-1),
        pad(batch.labels, (0, extra), value=IGNORED_LABEL),
    )
