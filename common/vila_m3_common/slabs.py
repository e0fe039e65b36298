"""Layers of a 3-D network in slabs, for less memory: the same weights, a few planes along x at a time.

Run layer by layer a network keeps several maps of its first level: the skip connection, the input, the normalised
input and the output of a convolution, and copies in the layout of the convolution library. Here normalisation,
activation and convolution run together on slabs of a few planes, by statistics over the whole map, and results are
added in place. A bundle puts these parts together in the order of its network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

Transform = Callable[[torch.Tensor], torch.Tensor]
Norm = nn.GroupNorm | nn.InstanceNorm3d


@dataclass(frozen=True)
class ResidualBlock:
    """A pre-activation block: ``x + conv2(act2(norm2(conv1(act1(norm1(x))))))``, with kernels of 3."""

    norm1: Norm
    act1: nn.Module
    conv1: nn.Conv3d
    norm2: Norm
    act2: nn.Module
    conv2: nn.Conv3d


def run_block(features: torch.Tensor, block: ResidualBlock, slab_size: int, keeps_inner: bool = True) -> None:
    """Run a residual block; it adds its result to the features ``(B, C, X, Y, Z)`` in place.

    Args:
        features: the block's input.
        block: its layers.
        slab_size: planes along x that are computed at a time.
        keeps_inner: whether the map between the convolutions is kept; else it is computed twice, the first time for
            its statistics.
    """
    first = normalize(block.norm1, block.act1, Moments.of(features, slab_size))
    if not keeps_inner:
        add_block(features, block, first, max(slab_size, 2))
        return
    inner = convolve(features, block.conv1, slab_size, first)
    second = normalize(block.norm2, block.act2, Moments.of(inner, slab_size))
    for start, end in slabs(inner.shape[2], slab_size):
        features[:, :, start:end] += convolve_planes(inner, block.conv2, start, end, second)


def add_block(features: torch.Tensor, block: ResidualBlock, first: Transform, slab_size: int) -> None:
    """Add a block's result to its input in place, without keeping the map between its two convolutions.

    Args:
        features: ``(B, C, X, Y, Z)``.
        block: its layers.
        first: the block's first normalisation and activation.
        slab_size: at least 2.
    """
    count = features.shape[2]
    moments = Moments()
    for start, end in slabs(count, slab_size):
        moments.add(convolve_planes(features, block.conv1, start, end, first))
    second = normalize(block.norm2, block.act2, moments)
    pending: tuple[int, int, torch.Tensor] | None = None
    for start, end in slabs(count, slab_size):
        low, high = max(start - 1, 0), min(end + 1, count)
        inner = convolve_planes(features, block.conv1, low, high, first)
        if pending:  # a slab is overwritten when the next one, which looks two planes back, has been read
            features[:, :, pending[0] : pending[1]] += pending[2]
        result = convolve_planes(inner, block.conv2, start - low, end - low, second, is_cut=(low > 0, high < count))
        pending = (start, end, result)
    if pending:
        features[:, :, pending[0] : pending[1]] += pending[2]


def slabs(count: int, slab_size: int) -> Iterator[tuple[int, int]]:
    """Yield first plane and the plane after the last of each slab of ``count`` planes."""
    for start in range(0, count, slab_size):
        yield start, min(start + slab_size, count)


def conv_of(layer: nn.Module) -> nn.Conv3d:
    """Return the convolution in MONAI's wrapper."""
    (conv,) = (part for part in layer.modules() if isinstance(part, nn.Conv3d))
    return conv


class Moments:
    """Mean and variance of every channel, gathered slab by slab (Chan, Golub and LeVeque 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.square_sum = torch.zeros(())

    @classmethod
    def of(cls, features: torch.Tensor, slab_size: int) -> Moments:
        """Return the moments of ``(B, C, X, Y, Z)``."""
        moments = cls()
        for start, end in slabs(features.shape[2], slab_size):
            moments.add(features[:, :, start:end])
        return moments

    def add(self, slab: torch.Tensor) -> None:
        """Take up the voxels of ``(B, C, x, Y, Z)``."""
        slab = slab.float()
        count = slab[0, 0].numel()
        mean = slab.mean(dim=(2, 3, 4), keepdim=True)
        square_sum = (slab - mean).square_().sum(dim=(2, 3, 4)).double()
        mean = mean.flatten(1).double()
        if self.count:
            total = self.count + count
            apart = mean - self.mean
            square_sum = self.square_sum + square_sum + apart.square() * self.count * count / total
            mean = self.mean + apart * count / total
        self.count, self.mean, self.square_sum = self.count + count, mean, square_sum

    def grouped(self, group_count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance of groups of channels, each ``(B, C)``, the same for all channels of a group."""
        means = self.mean.unflatten(1, (group_count, -1))
        mean = means.mean(dim=2, keepdim=True)
        within = self.square_sum.unflatten(1, (group_count, -1)) / self.count
        variance = (within + (means - mean).square()).mean(dim=2, keepdim=True)
        return mean.expand_as(means).flatten(1), variance.expand_as(means).flatten(1)


def normalize(norm: Norm, activation: nn.Module, moments: Moments) -> Transform:
    """Return group or instance normalisation and activation of a slab, by the moments of the whole map."""
    scale, offset = scale_and_offset(norm, moments)
    return lambda slab: activation(torch.addcmul(offset, slab, scale))


def scale_and_offset(norm: Norm, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a normalisation multiplies each channel by and adds to it, ``(B, C, 1, 1, 1)`` float32."""
    group_count = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
    mean, variance = moments.grouped(group_count)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -mean * scale
    if norm.bias is not None:
        offset = offset + norm.bias
    return scale.float()[:, :, None, None, None], offset.float()[:, :, None, None, None]


def _as_is(slab: torch.Tensor) -> torch.Tensor:
    return slab


def convolve(features: torch.Tensor, conv: nn.Conv3d, slab_size: int, prepare: Transform = _as_is) -> torch.Tensor:
    """Convolve a volume slab by slab.

    Args:
        features: ``(B, C, X, Y, Z)``.
        conv: its layer, zero-padded, without dilation.
        slab_size: planes of the output along x that are computed at a time.
        prepare: what is done to each slab before; acts on every voxel alone.

    Returns:
        ``(B, C', X', Y', Z')``, as ``conv(prepare(features))``.
    """
    count = (features.shape[2] + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1
    output: torch.Tensor | None = None
    for start, end in slabs(count, slab_size):
        result = convolve_planes(features, conv, start, end, prepare)
        if output is None:
            output = result.new_empty((*result.shape[:2], count, *result.shape[3:]))
        output[:, :, start:end] = result
    assert output is not None
    return output


def convolve_planes(
    features: torch.Tensor,
    conv: nn.Conv3d,
    start: int,
    end: int,
    prepare: Transform = _as_is,
    is_cut: tuple[bool, bool] = (False, False),
) -> torch.Tensor:
    """Compute the planes ``start`` to ``end`` (exclusive) of a convolution.

    Args:
        features: ``(B, C, X, Y, Z)``, the planes at hand.
        conv: its layer, zero-padded, without dilation.
        start: first plane of the output, counted from the first plane at hand.
        end: the plane after the last.
        prepare: what is done to the planes before.
        is_cut: whether the map goes on below and above the planes at hand, which then hold the neighbours; where it
            ends it is padded with zeros.

    Raises:
        ValueError: if a neighbour of a cut map is not at hand.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    first, last = start * stride - padding, (end - 1) * stride - padding + kernel
    below, above = max(-first, 0), max(last - features.shape[2], 0)
    if (is_cut[0] and below) or (is_cut[1] and above):
        raise ValueError(f"planes {start} to {end} need neighbours that are not at hand")
    slab = prepare(features[:, :, max(first, 0) : min(last, features.shape[2])])
    slab = functional.pad(slab, (0, 0, 0, 0, below, above))
    return functional.conv3d(slab, conv.weight, conv.bias, conv.stride, (0, *conv.padding[1:]))
