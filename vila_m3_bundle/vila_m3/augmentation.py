"""Pictures varied for training: cut, moved, turned, brighter or darker; never mirrored, as left and right matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate

from vila_m3_common.training import process_rank


class Augmentation:
    """Varies each picture by chance; what a step does follows from the seed and the step's number alone.

    Args:
        strength: 1 for the full range: a window of 0.78 to 1.05 of the side, sides out of proportion by up to 10%,
            moved by up to 5% of the side, turned by up to 10 degrees, gamma 0.7 to 1.4, contrast 0.75 to 1.25,
            brightness by up to 6% and noise of up to 2% of the range. 0 changes nothing.
        seed: of the draws.
        side: S' of what comes out; larger pictures that come in keep a window of them sharp. None takes theirs.
    """

    def __init__(self, strength: float = 1.0, seed: int = 0, side: int | None = None) -> None:
        self.strength = strength
        self.seed = seed
        self.side = side

    def __call__(self, pixels: torch.Tensor, step: int, micro: int = 0) -> torch.Tensor:
        """Vary pictures.

        Args:
            pixels: ``(N, 3, S, S)``, black at -1 and white at 1.
            step: of the optimizer.
            micro: number of the micro-batch in the step.

        Returns:
            New pictures ``(N, 3, S', S')``; what lies outside the old ones is black.
        """
        side = self.side or pixels.shape[-1]
        if not len(pixels):
            return pixels.new_zeros(0, 3, side, side)
        if not self.strength:
            if side == pixels.shape[-1]:
                return pixels
            return interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        generator = torch.Generator().manual_seed(hash((self.seed, step, micro, process_rank())) % 2**63)

        def draw(low: float, high: float) -> torch.Tensor:
            drawn = torch.rand(len(pixels), generator=generator) * (high - low) + low
            return (drawn * self.strength).to(pixels.device)

        values = _move(pixels / 2 + 0.5, side, draw)
        column = (-1, 1, 1, 1)
        values = values.clamp(1e-4, 1) ** draw(-0.35, 0.35).exp().view(column)
        values = values * (1 + draw(-0.25, 0.25)).view(column) + draw(-0.06, 0.06).view(column)
        noise = torch.randn(values.shape, generator=generator).to(values)
        return (values + noise * draw(0, 0.02).view(column) - 0.5) * 2


def _move(values: torch.Tensor, size: int, draw: Callable[[float, float], torch.Tensor]) -> torch.Tensor:
    """Cut another window out of each picture and bring it to a side of ``size``; outside there are zeros."""
    side, stretch = 1 + draw(-0.22, 0.05), draw(-0.1, 0.1).exp()
    angle = draw(-10, 10) * (math.pi / 180)
    cos, sin = angle.cos() * side, angle.sin() * side
    rows = [
        torch.stack([cos * stretch, -sin, draw(-0.1, 0.1)], 1),
        torch.stack([sin, cos / stretch, draw(-0.1, 0.1)], 1),
    ]
    grid = affine_grid(torch.stack(rows, 1), [*values.shape[:2], size, size], align_corners=False)
    return grid_sample(values, grid, align_corners=False)
