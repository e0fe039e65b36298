"""Inference of a SegResNet in slabs, for less memory: the same layers and weights, a few planes at a time.

The released network at its window of 240 x 240 x 160 voxels holds 590 MB in every feature map of its first level. On
that level the map between the two convolutions of a block is not kept either: it is computed once for its statistics
and once more for the second convolution. One large map is left.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import SegResNet
from monai.utils import UpsampleMode
from torch import nn

from vila_m3_common.slabs import Moments, ResidualBlock, conv_of, convolve, normalize, run_block, slabs


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
    features = convolve(image, conv_of(network.convInit), slab_size)
    skipped = []
    for level, down in enumerate(network.down_layers):
        entrance, *blocks = down
        if not isinstance(entrance, nn.Identity):
            features = convolve(features, conv_of(entrance), slab_size)
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
    prepare = normalize(norm, activation, Moments.of(features, slab_size))
    return convolve(features, conv_of(conv), slab_size, prepare)


def _run_blocks(blocks: list[ResBlock], features: torch.Tensor, slab_size: int, keeps_inner: bool) -> None:
    """Run residual blocks; each adds its result to the features in place."""
    for block in blocks:
        conv1, conv2 = conv_of(block.conv1), conv_of(block.conv2)
        layers = ResidualBlock(block.norm1, block.act, conv1, block.norm2, block.act, conv2)
        run_block(features, layers, slab_size, keeps_inner)


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
    for start, end in slabs(count, max(slab_size // 2, 1)):
        low, high = max(start - 1, 0), min(end + 1, count)  # linear interpolation looks one plane around
        part = upsample(narrow[:, :, low:high])
        larger[:, :, 2 * start : 2 * end] += part[:, :, 2 * (start - low) : 2 * (end - low)]
