"""The multimodal projectors of VILA-1.5: vision features -> LLM embeddings."""

from __future__ import annotations

import re

import torch
from torch import nn

from vila_m3_common.errors import UserError


class SpaceToDepth(nn.Module):
    """Join each 2 x 2 block of vision tokens into one token with four times the channels.

    An odd grid is padded with zeros at its lower and right edge. The four channel groups of a block
    come in the order (0,0), (0,1), (1,0), (1,1) (row, column), the joined tokens in **column-major** order,
    as in the VILA version that trained the released weights.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(N, G*G, C)`` in row-major order -> ``(N, ceil(G/2)**2, 4*C)`` in column-major order."""
        count, tokens, channels = features.shape
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"{tokens} vision tokens do not form a square grid")
        grid = features.reshape(count, side, side, channels)
        if side % 2:
            grid = nn.functional.pad(grid, (0, 0, 0, 1, 0, 1))
        blocks = torch.cat([grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=-1)
        return blocks.transpose(1, 2).reshape(count, -1, 4 * channels)


class MultimodalProjector(nn.Module):
    """Vision tokens -> LLM embeddings; parameter names are those of the released ``mm_projector`` files.

    Args:
        kind: ``mlp_downsample`` (released VILA-M3), ``linear``, ``mlp2x_gelu``, ``mlp3x_gelu`` and so on.
        vision_size: channels of a vision token.
        hidden_size: width of the LLM.

    Raises:
        UserError: for another kind.
    """

    def __init__(self, kind: str, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.layers = _build_layers(kind, vision_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(N, T, vision_size)`` -> ``(N, T', hidden_size)``."""
        return self.layers(features)


def token_count(kind: str, vision_token_count: int) -> int:
    """Return how many LLM tokens ``vision_token_count`` vision tokens of one image become."""
    if kind != "mlp_downsample":
        return vision_token_count
    return ((round(vision_token_count**0.5) + 1) // 2) ** 2


def _build_layers(kind: str, vision_size: int, hidden_size: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(vision_size, hidden_size)
    if kind == "mlp_downsample":
        return nn.Sequential(
            SpaceToDepth(),
            nn.LayerNorm(4 * vision_size, eps=1e-5),
            nn.Linear(4 * vision_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )
    depth = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if depth is None:
        raise UserError(f"unknown projector type {kind!r}; valid: linear, mlp2x_gelu, mlp3x_gelu, mlp_downsample")
    layers: list[nn.Module] = [nn.Linear(vision_size, hidden_size)]
    for _ in range(1, int(depth[1])):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
