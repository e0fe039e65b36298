"""Inference of a SegResNet in slabs, for less memory: the same layers and weights, a few planes at a time.

The released network at its window of 240 x 240 x 160 voxels holds 590 MB in every feature map of its first level.
Run layer by layer it keeps several of them: input, normalised input and output of a convolution, and copies in the
layout of the convolution library. Here normalisation, activation and convolution of a block run together on slabs of
a few planes, from statistics over the whole map, and results are added in place, so that two maps are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import SegResNet
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
    features = convolve_slabs(image, _conv_of(network.convInit), slab_size)
    skipped = []
    for down in network.down_layers:
        entrance, *blocks = down
        if not isinstance(entrance, nn.Identity):
            features = convolve_slabs(features, _conv_of(entrance), slab_size)
        features = _run_blocks(blocks, features, slab_size)
        skipped.append(features)
    skipped.pop()  # the deepest features go on themselves
    for up, blocks in zip(network.up_samples, network.up_layers, strict=True):
        sampled = up(features)
        features = skipped.pop().add_(sampled)
        del sampled  # as large as a map of the level above
        features = _run_blocks(list(blocks), features, slab_size)
    if not network.use_conv_final:
        return features
    norm, activation, conv = network.conv_final
    return convolve_slabs(features, _conv_of(conv), slab_size, _normalize(norm, activation, features))


def _run_blocks(blocks: list[ResBlock], features: torch.Tensor, slab_size: int) -> torch.Tensor:
    """Run residual blocks; each adds its result to the features in place."""
    for block in blocks:
        inner = convolve_slabs(features, _conv_of(block.conv1), slab_size, _normalize(block.norm1, block.act, features))
        convolve_slabs(
            inner, _conv_of(block.conv2), slab_size, _normalize(block.norm2, block.act, inner), added_to=features
        )
    return features


def _conv_of(layer: nn.Module) -> nn.Conv3d:
    """Return the convolution in MONAI's wrapper."""
    (conv,) = (part for part in layer.modules() if isinstance(part, nn.Conv3d))
    return conv


def _normalize(norm: nn.GroupNorm, activation: nn.Module, features: torch.Tensor) -> Transform:
    """Return group normalisation and activation of a slab, by the statistics of the whole ``features``."""
    batch, channels = features.shape[:2]
    grouped = features.view(batch, norm.num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, unbiased=False)
    per_channel = channels // norm.num_groups
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(per_channel, dim=1) * norm.weight
    offset = norm.bias - mean.repeat_interleave(per_channel, dim=1) * scale
    scale, offset = scale.view(batch, channels, 1, 1, 1), offset.view(batch, channels, 1, 1, 1)
    return lambda slab: activation(torch.addcmul(offset, slab, scale))


def convolve_slabs(
    features: torch.Tensor,
    conv: nn.Conv3d,
    slab_size: int,
    prepare: Transform = lambda slab: slab,
    added_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve a volume slab by slab.

    Args:
        features: ``(B, C, X, Y, Z)``.
        conv: its layer, zero-padded, without dilation.
        slab_size: planes of the output along x that are computed at a time.
        prepare: what is done to each slab before; acts on every voxel alone.
        added_to: the result is added to this tensor in place; None makes a new one.

    Returns:
        ``(B, C', X', Y', Z')``, as ``conv(prepare(features))``.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    plane_count = features.shape[2]
    out_count = (plane_count + 2 * padding - kernel) // stride + 1
    output = added_to
    for start in range(0, out_count, slab_size):
        end = min(start + slab_size, out_count)
        first, last = start * stride - padding, (end - 1) * stride - padding + kernel
        slab = prepare(features[:, :, max(first, 0) : min(last, plane_count)])
        slab = functional.pad(slab, (0, 0, 0, 0, max(-first, 0), max(last - plane_count, 0)))
        result = functional.conv3d(slab, conv.weight, conv.bias, conv.stride, (0, *conv.padding[1:]))
        if output is None:
            output = result.new_empty((*result.shape[:2], out_count, *result.shape[3:]))
        if added_to is None:
            output[:, :, start:end] = result
        else:
            output[:, :, start:end] += result
    assert output is not None
    return output
