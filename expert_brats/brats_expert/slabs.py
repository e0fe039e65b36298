"""Inference of a SegResNet in slabs, for less memory: the same layers and weights, a few planes at a time.

The released network at its window of 240 x 240 x 160 voxels holds 590 MB in every feature map of its first level.
Run layer by layer it keeps several of them: the skip connection, the input, the normalised input and the output of a
convolution, and copies in the layout of the convolution library. Here normalisation, activation and convolution run
together on slabs of a few planes, by statistics over the whole map, and results are added in place. On the first
level the map between the two convolutions of a block is not kept either: it is computed once for its statistics and
once more for the second convolution. One large map is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import SegResNet
from monai.utils import UpsampleMode
from torch import nn
from torch.nn import functional

Transform = Callable[[torch.Tensor], torch.Tensor]


class SlabInferer(SlidingWindowInferer):
    """A sliding window whose network, a ``SegResNet`` in evaluation mode, runs in slabs.

    Args:
        roi_size: see ``monai.inferers.SlidingWindowInferer``.
        sw_batch_size: the same.
        overlap: the same.
        slab_size: planes along x that are computed at a time; fewer need less memory.
    """

    def __init__(self, roi_size: list[int], sw_batch_size: int = 1, overlap: float = 0.25, slab_size: int = 8) -> None:
        super().__init__(roi_size=roi_size, sw_batch_size=sw_batch_size, overlap=overlap)
        self.slab_size = slab_size

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the network's output for ``inputs`` ``(B, C, X, Y, Z)``."""
        return super().__call__(inputs, partial(run_in_slabs, network, slab_size=self.slab_size), *args, **kwargs)


def run_in_slabs(network: nn.Module, image: torch.Tensor, slab_size: int = 8) -> torch.Tensor:
    """Return what a network makes of an image, computed in slabs.

    Args:
        network: a SegResNet with group normalisation, in evaluation mode, or its DistributedDataParallel.
        image: ``(B, C, X, Y, Z)``.
        slab_size: planes along x that are computed at a time.

    Returns:
        ``(B, 3, X, Y, Z)`` logits; rounding differs from ``network(image)`` in the last digits.

    Raises:
        TypeError: if the network is no SegResNet.
        RuntimeError: if it is in training mode, where dropout and gradients need the whole maps.
    """
    network = getattr(network, "module", network)
    if not isinstance(network, SegResNet):
        raise TypeError(f"only a SegResNet runs in slabs, given was a {type(network).__name__}")
    if network.training:
        raise RuntimeError("the network is in training mode; slabs are for inference, call eval() first")
    with torch.no_grad():
        return _run(network, image, slab_size)


def _run(network: SegResNet, image: torch.Tensor, slab_size: int) -> torch.Tensor:
    features = convolve(image, _conv_of(network.convInit), slab_size)
    skipped = []
    for level, down in enumerate(network.down_layers):
        entrance, *blocks = down
        if not isinstance(entrance, nn.Identity):
            features = convolve(features, _conv_of(entrance), slab_size)
        _run_blocks(blocks, features, slab_size, keeps_inner=level > 0)
        skipped.append(features)
    skipped.pop()  # the deepest features go on themselves
    for up, blocks in zip(network.up_samples, network.up_layers, strict=True):
        larger = skipped.pop()
        _add_upsampled(larger, features, up, slab_size, network.upsample_mode)
        features = larger
        _run_blocks(list(blocks), features, slab_size, keeps_inner=bool(skipped))
    if not network.use_conv_final:
        return features
    norm, activation, conv = network.conv_final
    prepare = _normalize(norm, activation, Moments.of(features, slab_size))
    return convolve(features, _conv_of(conv), slab_size, prepare)


def _run_blocks(blocks: list[ResBlock], features: torch.Tensor, slab_size: int, keeps_inner: bool) -> None:
    """Run residual blocks; each adds its result to the features in place."""
    for block in blocks:
        first = _normalize(block.norm1, block.act, Moments.of(features, slab_size))
        if keeps_inner:
            inner = convolve(features, _conv_of(block.conv1), slab_size, first)
            second = _normalize(block.norm2, block.act, Moments.of(inner, slab_size))
            for start, end in _slabs(len(inner[0, 0]), slab_size):
                features[:, :, start:end] += convolve_planes(inner, _conv_of(block.conv2), start, end, second)
        else:
            add_block(features, block, first, max(slab_size, 2))


def add_block(features: torch.Tensor, block: ResBlock, first: Transform, slab_size: int) -> None:
    """Add a block's result to its input in place, without keeping the map between its two convolutions.

    Args:
        features: ``(B, C, X, Y, Z)``.
        block: with kernels of 3.
        first: the block's first normalisation and activation.
        slab_size: at least 2.
    """
    conv1, conv2, count = _conv_of(block.conv1), _conv_of(block.conv2), features.shape[2]
    moments = Moments()
    for start, end in _slabs(count, slab_size):
        moments.add(convolve_planes(features, conv1, start, end, first))
    second = _normalize(block.norm2, block.act, moments)
    pending: tuple[int, int, torch.Tensor] | None = None
    for start, end in _slabs(count, slab_size):
        low, high = max(start - 1, 0), min(end + 1, count)
        inner = convolve_planes(features, conv1, low, high, first)
        if pending:  # a slab is overwritten when the next one, which looks two planes back, has been read
            features[:, :, pending[0] : pending[1]] += pending[2]
        result = convolve_planes(inner, conv2, start - low, end - low, second, is_cut=(low > 0, high < count))
        pending = (start, end, result)
    if pending:
        features[:, :, pending[0] : pending[1]] += pending[2]


def _add_upsampled(
    larger: torch.Tensor, features: torch.Tensor, up: nn.Sequential, slab_size: int, mode: UpsampleMode
) -> None:
    """Add ``up(features)``, of twice the size, to ``larger`` in place."""
    conv, upsample = up
    narrow = conv(features)
    if mode != UpsampleMode.NONTRAINABLE:
        larger += upsample(narrow)
        return
    count = narrow.shape[2]
    for start, end in _slabs(count, max(slab_size // 2, 1)):
        low, high = max(start - 1, 0), min(end + 1, count)  # linear interpolation looks one plane around
        part = upsample(narrow[:, :, low:high])
        larger[:, :, 2 * start : 2 * end] += part[:, :, 2 * (start - low) : 2 * (end - low)]


def _slabs(count: int, slab_size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, slab_size):
        yield start, min(start + slab_size, count)


def _conv_of(layer: nn.Module) -> nn.Conv3d:
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
        for start, end in _slabs(features.shape[2], slab_size):
            moments.add(features[:, :, start:end])
        return moments

    def add(self, slab: torch.Tensor) -> None:
        """Take up the voxels of ``(B, C, x, Y, Z)``."""
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


def _normalize(norm: nn.GroupNorm, activation: nn.Module, moments: Moments) -> Transform:
    """Return group normalisation and activation of a slab, by the moments of the whole map."""
    mean, variance = moments.grouped(norm.num_groups)
    scale = torch.rsqrt(variance + norm.eps) * norm.weight
    offset = norm.bias - mean * scale
    scale, offset = scale.float()[:, :, None, None, None], offset.float()[:, :, None, None, None]
    return lambda slab: activation(torch.addcmul(offset, slab, scale))


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
    for start, end in _slabs(count, slab_size):
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
