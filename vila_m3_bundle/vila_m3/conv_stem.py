"""A vision tower for trainings from scratch on few images: SigLIP's, with convolutions in place of its patches.

A patch embedding has to learn from data what convolutions have by construction; with some hundred images that decides
(https://arxiv.org/abs/2106.14881 found it with a million).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers import initialization as start

from vila_m3_common.errors import UserError

_GROUPS = 8


class ConvStemConfig(SiglipVisionConfig):
    """Shape of the tower.

    Args:
        stem_channels: channels behind each halving of the picture's side, multiples of 8.
        kwargs: of :class:`transformers.SiglipVisionConfig`; ``patch_size`` is what the halvings make.

    Raises:
        UserError: if the patch size is another one, or channels do not divide into groups.
    """

    model_type = "conv_stem_siglip"

    def __init__(self, stem_channels: Sequence[int] = (32, 64, 128), **kwargs: Any) -> None:
        self.stem_channels = list(stem_channels)
        side = 2 ** len(self.stem_channels)
        if kwargs.setdefault("patch_size", side) != side or any(count % _GROUPS for count in self.stem_channels):
            raise UserError(
                f"stem_channels {self.stem_channels} with patch_size {kwargs['patch_size']} make no tower; give "
                f"multiples of {_GROUPS}, one for each halving, and patch_size {side}"
            )
        super().__init__(**kwargs)


class _LastConvolution(nn.Conv2d):
    """Starts at zero, so that the block around it starts as nothing."""


class _Residual(nn.Module):
    """Two convolutions 3 x 3 beside a path that changes nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, channels),
            nn.SiLU(),
            _LastConvolution(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.layers(values)


class ConvStem(nn.Module):
    """Pictures -> one vector for each patch, by convolutions that halve the side.

    Args:
        config: of the tower.
    """

    def __init__(self, config: ConvStemConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = config.num_channels
        for place, channels in enumerate(config.stem_channels):
            side = 3 if place else 5
            layers += [
                nn.Conv2d(before, channels, side, stride=2, padding=side // 2, bias=False),
                nn.GroupNorm(_GROUPS, channels),
                nn.SiLU(),
            ]
            # At the full resolution these would cost more than all that follows.
            layers += [_Residual(channels)] if place else []
            before = channels
        self.layers = nn.Sequential(*layers)
        self.out = nn.Conv2d(before, config.hidden_size, 1)

    @property
    def weight(self) -> torch.Tensor:
        """Tells dtype and device, where a patch embedding has its only weight."""
        return self.out.weight

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(N, 3, S, S)`` -> ``(N, hidden, S / patch, S / patch)``."""
        return self.out(self.layers(pixel_values.contiguous(memory_format=torch.channels_last)))


class ConvStemModel(SiglipVisionModel):
    """The tower; its parameters are SigLIP's but for ``embeddings.patch_embedding``.

    Args:
        config: its shape.
    """

    config: ConvStemConfig
    config_class = ConvStemConfig

    def __init__(self, config: ConvStemConfig) -> None:
        super().__init__(config)
        self.embeddings.patch_embedding = ConvStem(config)  # type: ignore[assignment]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start smaller than SigLIP does, which in a training of a few hundred steps is ahead."""
        if isinstance(module, _LastConvolution):
            start.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            start.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                start.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            start.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            super()._init_weights(module)
