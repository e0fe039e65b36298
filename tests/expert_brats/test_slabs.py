"""A network in slabs gives what the network gives."""

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet
from torch import nn

from brats_expert.slabs import Moments, SlabInferer, convolve, convolve_planes, run_in_slabs

# Sums in another order differ in the last digits of float32; logits are of order 1.
TOLERANCE = 1e-5


def make_network(**settings) -> SegResNet:
    torch.manual_seed(0)
    released = {"blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "init_filters": 16, "dropout_prob": 0.2}
    network = SegResNet(spatial_dims=3, in_channels=4, out_channels=3, **{**released, **settings})
    for part in network.modules():  # fresh normalisations scale by 1 and shift by 0
        if isinstance(part, nn.GroupNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return network.eval()


@pytest.mark.parametrize("slab_size", [1, 3, 8, 100])
def test_the_released_network_in_slabs_gives_the_same_logits(slab_size: int) -> None:
    network, image = make_network(), torch.randn(1, 4, 24, 16, 16)
    kept = image.clone()
    with torch.no_grad():
        expected = network(image)
    assert torch.allclose(run_in_slabs(network, image, slab_size), expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(image, kept)


def test_a_batch_and_other_widths_give_the_same_logits() -> None:
    network = make_network(init_filters=8, blocks_down=[1, 1, 2, 2], blocks_up=[2, 1, 1], dropout_prob=None)
    image = torch.randn(2, 4, 16, 24, 8) * torch.tensor([1.0, 7.0]).reshape(2, 1, 1, 1, 1)
    with torch.no_grad():
        expected = network(image)
    assert torch.allclose(run_in_slabs(network, image), expected, rtol=0, atol=TOLERANCE)


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


@pytest.mark.parametrize("mode", ["deconv", "pixelshuffle"])
def test_other_ways_of_upsampling_give_the_same_logits(mode: str) -> None:
    network, image = make_network(upsample_mode=mode), torch.randn(1, 4, 16, 16, 8)
    with torch.no_grad():
        assert torch.allclose(run_in_slabs(network, image, 3), network(image), rtol=0, atol=TOLERANCE)


def test_the_sliding_window_in_slabs_gives_the_same_logits() -> None:
    network, image = make_network(), torch.randn(1, 4, 24, 16, 14)
    with torch.no_grad():
        expected = SlidingWindowInferer(roi_size=(16, 16, 16), overlap=0.5)(image, network)
        found = SlabInferer(roi_size=[16, 16, 16], overlap=0.5, slab_size=4)(image, network)
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_other_networks_and_training_are_refused() -> None:
    image = torch.zeros(1, 4, 8, 8, 8)
    with pytest.raises(TypeError, match="only a SegResNet runs in slabs, given was a Identity"):
        run_in_slabs(nn.Identity(), image)
    with pytest.raises(RuntimeError, match=r"the network is in training mode; .* call eval\(\) first"):
        run_in_slabs(make_network().train(), image)
