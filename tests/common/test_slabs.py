"""Layers in slabs give what the layers give."""

import pytest
import torch
from torch import nn

from vila_m3_common.slabs import Moments, convolve, convolve_planes, normalize


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (5, 1)])
@pytest.mark.parametrize("slab_size", [1, 2, 5])
def test_a_convolution_in_slabs_is_the_convolution(kernel: int, stride: int, slab_size: int) -> None:
    torch.manual_seed(1)
    conv = nn.Conv3d(2, 3, kernel, stride, padding=kernel // 2)
    features = torch.randn(2, 2, 11, 8, 6)
    with torch.no_grad():
        expected = conv(torch.relu(features))
        found = convolve(features, conv, slab_size, torch.relu)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_planes_of_a_cut_map_need_their_neighbours() -> None:
    conv, features = nn.Conv3d(2, 3, 3, padding=1), torch.randn(1, 2, 11, 8, 6)
    with torch.no_grad():
        found = convolve_planes(features[:, :, 3:8], conv, 1, 4, is_cut=(True, True))
        assert torch.allclose(found, conv(features)[:, :, 4:7], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="planes 0 to 4 need neighbours that are not at hand"):
        convolve_planes(features[:, :, 3:8], conv, 0, 4, is_cut=(True, True))


def test_moments_gathered_in_slabs_are_those_of_the_whole() -> None:
    features = torch.randn(2, 16, 13, 6, 5) * 3 + 40  # a mean far above the deviation is where sums of squares fail
    mean, variance = Moments.of(features, 4).grouped(8)
    groups = features.double().reshape(2, 8, -1)
    assert torch.allclose(mean[:, ::2], groups.mean(dim=2), atol=1e-5)
    assert torch.allclose(variance[:, ::2], groups.var(dim=2, unbiased=False), rtol=1e-5)
    assert torch.equal(mean[:, ::2], mean[:, 1::2])


@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_norm_by_moments_is_the_norm(affine: bool) -> None:
    norm = nn.InstanceNorm3d(4, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    features = torch.randn(2, 4, 7, 5, 6) * 3 + 2
    with torch.no_grad():
        found = normalize(norm, nn.ReLU(), Moments.of(features, 3))(features)
        assert torch.allclose(found, torch.relu(norm(features)), rtol=0, atol=1e-5)
