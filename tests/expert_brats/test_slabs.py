"""A network in slabs gives what the network gives."""

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet
from torch import nn

from brats_expert.slabs import SlabInferer, run_in_slabs

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
