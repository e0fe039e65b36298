"""VISTA3D in slabs gives the features that it gives layer by layer."""

import pytest
import torch
from monai.networks.nets import SegResNetDS2
from monai.networks.nets.vista3d import VISTA3D, ClassMappingClassify, PointMappingSAM
from torch import nn

from vista3d_expert.inferer import PromptInferer
from vista3d_expert.network import image_features, nano_vista3d
from vista3d_expert.slabs import features_in_slabs

# Sums in another order differ in the last digits of float32; features are of order 1.
TOLERANCE = 2e-5


def deep_vista3d() -> VISTA3D:
    """The blocks per level of ``vista3d132``, narrower."""
    encoder = SegResNetDS2(
        in_channels=1, blocks_down=(1, 2, 2, 4, 4), norm="instance", out_channels=8, init_filters=8, dsdepth=1
    )
    head, points = ClassMappingClassify(512, 8), PointMappingSAM(feature_size=8, n_classes=512, last_supported=132)
    return VISTA3D(image_encoder=encoder, class_head=head, point_head=points)


def randomised(network: VISTA3D) -> VISTA3D:
    for part in network.modules():  # fresh normalisations scale by 1 and shift by 0
        if isinstance(part, nn.InstanceNorm3d) and part.affine:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return network.eval()


@pytest.mark.parametrize("build", [deep_vista3d, nano_vista3d])
@pytest.mark.parametrize("slab_size", [1, 3, 8, 100])
def test_the_features_are_those_of_the_layers(build, slab_size: int) -> None:
    torch.manual_seed(0)
    network, window = randomised(build()), torch.rand(2, 1, 48, 32, 32)
    kept = window.clone()
    with torch.no_grad():
        expected = image_features(network, window)
    found = features_in_slabs(network, window, slab_size)
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(window, kept)


def test_a_window_that_the_encoder_cannot_halve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window \(20, 32, 32\) is not divisible by"):
        features_in_slabs(nano_vista3d().eval(), torch.rand(1, 1, 20, 32, 32), 8)


def test_bfloat16_gives_the_features_within_its_rounding() -> None:
    torch.manual_seed(0)
    network, window = randomised(nano_vista3d()), torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = features_in_slabs(network, window, 5), image_features(network, window)
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("label_ids", [[1], [1, 3, 5, 6], list(range(3, 22))])
def test_the_label_map_in_slabs_is_that_of_whole_windows(label_ids: list[int]) -> None:
    torch.manual_seed(0)
    network, volume = randomised(nano_vista3d()), torch.rand(1, 1, 44, 30, 32)
    whole = PromptInferer((32, 32, 32))(volume, network, label_ids)
    in_slabs = PromptInferer((32, 32, 32), slab_size=5)(volume, network, label_ids)
    assert len(whole.unique()) > 1
    assert (in_slabs != whole).float().mean() < 1e-3  # random logits lie close to each other
