"""Image features of VISTA3D in slabs: the same layers and weights, two maps of the first level in memory."""

from __future__ import annotations

import torch
from monai.networks.blocks import UnetResBlock
from monai.networks.nets import SegResNetDS2
from monai.networks.nets.segresnet_ds import SegResBlock
from monai.networks.nets.vista3d import VISTA3D
from torch import nn

from vila_m3_common.slabs import (
    Moments,
    ResidualBlock,
    conv_of,
    convolve,
    convolve_planes,
    normalize,
    run_block,
    scale_and_offset,
    slabs,
)


def features_in_slabs(network: VISTA3D, window: torch.Tensor, slab_size: int) -> torch.Tensor:
    """Return what :func:`.network.image_features` returns; rounding differs in the last digits.

    Args:
        network: a VISTA3D in evaluation mode whose encoder has isotropic kernels and one level of output.
        window: ``(B, 1, X, Y, Z)``, intensities scaled to 0..1.
        slab_size: planes along x that are computed at a time.

    Returns:
        ``(B, C, X, Y, Z)``.

    Raises:
        ValueError: if the window cannot be halved as often as the encoder does.
    """
    encoder = network.image_encoder
    if not encoder.is_valid_shape(window):
        raise ValueError(f"window {tuple(window.shape[2:])} is not divisible by {encoder.shape_factor()}")
    with torch.no_grad():
        features = _encode(encoder, window, slab_size)
        for block in network.class_head.image_post_mapping:
            run_post_activation_block(features, block.layer, slab_size)
    return features


def _encode(network: SegResNetDS2, window: torch.Tensor, slab_size: int) -> torch.Tensor:
    """Run encoder and the decoder of class prompts."""
    encoder = network.encoder
    features = convolve(window, encoder.conv_init, slab_size)
    skipped = []
    for level in encoder.layers:
        _run_blocks(level["blocks"], features, slab_size)
        skipped.append(features)
        if isinstance(level["downsample"], nn.Conv3d):
            features = convolve(features, level["downsample"], slab_size)
    skipped.pop()  # the deepest features go on themselves
    for level in network.up_layers_auto:
        larger = skipped.pop()
        add_upsampled(larger, features, level["upsample"], slab_size)
        features = larger
        _run_blocks(level["blocks"], features, slab_size)
    return convolve(features, network.up_layers_auto[-1]["head"], slab_size)


def _run_blocks(blocks: nn.Sequential, features: torch.Tensor, slab_size: int) -> None:
    for block in blocks:
        assert isinstance(block, SegResBlock)
        layers = ResidualBlock(block.norm1, block.act1, block.conv1, block.norm2, block.act2, block.conv2)
        run_block(features, layers, slab_size)


def add_upsampled(larger: torch.Tensor, features: torch.Tensor, up: nn.Module, slab_size: int) -> None:
    """Add ``up(features)`` to ``larger``, of twice the size, in place.

    Args:
        larger: ``(B, C, 2X, 2Y, 2Z)``.
        features: ``(B, C', X, Y, Z)``.
        up: transposed convolution with kernel 3, stride 2, padding 1, which looks one plane ahead.
        slab_size: planes of ``larger`` along x that are computed at a time.
    """
    count = features.shape[2]
    for start, end in slabs(count, max(slab_size // 2, 1)):
        part = up(features[:, :, start : min(end + 1, count)])
        larger[:, :, 2 * start : 2 * end] += part[:, :, : 2 * (end - start)]


def run_post_activation_block(features: torch.Tensor, block: UnetResBlock, slab_size: int) -> None:
    """Replace features by ``lrelu(x + norm2(conv2(lrelu(norm1(conv1(x))))))``, in place.

    The second convolution takes the place of the first one's result: a slab is overwritten when the next one, which
    looks one plane back, has been computed.
    """
    conv2, count = conv_of(block.conv2), features.shape[2]
    inner = convolve(features, conv_of(block.conv1), slab_size)
    first = normalize(block.norm1, block.lrelu, Moments.of(inner, slab_size))
    moments = Moments()
    pending: tuple[int, int, torch.Tensor] | None = None
    for start, end in slabs(count, slab_size):
        result = convolve_planes(inner, conv2, start, end, first)
        moments.add(result)
        if pending:
            inner[:, :, pending[0] : pending[1]] = pending[2]
        pending = (start, end, result)
    if pending:
        inner[:, :, pending[0] : pending[1]] = pending[2]
    scale, offset = scale_and_offset(block.norm2, moments)
    for start, end in slabs(count, slab_size):
        normed = torch.addcmul(offset, inner[:, :, start:end], scale)
        features[:, :, start:end] = block.lrelu(normed.add_(features[:, :, start:end]))
