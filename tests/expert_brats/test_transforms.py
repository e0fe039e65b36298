"""Regions to labels, the network's grid, and the contrast augmentation."""

import torch
from monai.data import MetaTensor
from monai.transforms import Invertd

from brats_expert.transforms import RandTissueContrastd, RegionsToLabelsd, network_grid


def test_dictionary_form_leaves_other_items_alone():
    items = {"pred": torch.ones(3, 2, 2, 2), "request": "{}"}
    result = RegionsToLabelsd(keys="pred")(items)
    assert result["pred"].shape == (1, 2, 2, 2)
    assert result["request"] == "{}"
    assert items["pred"].shape == (3, 2, 2, 2)


def test_grid_without_spacing_changes_nothing():
    image = MetaTensor(torch.rand(4, 6, 7, 8), affine=torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0])))
    assert torch.equal(network_grid(None)({"image": image})["image"], image)


def test_grid_with_spacing_is_ras_cropped_to_the_head_and_comes_back_exactly_in_shape():
    volume = torch.zeros(1, 30, 34, 25)
    volume[:, 8:20, 6:26, 5:21] = 1.0
    image = MetaTensor(volume, affine=torch.diag(torch.tensor([-1.0, -1.0, 1.2, 1.0])))
    grid = network_grid(2.0)
    moved = grid({"image": image})["image"]
    assert torch.allclose(moved.affine[:3, :3].double(), torch.eye(3).double() * 2)
    assert all(now < before / 1.5 for now, before in zip(moved.shape[1:], volume.shape[1:], strict=True))
    inverted = Invertd(keys="pred", transform=grid, orig_keys="image", nearest_interp=False)(
        {"image": moved, "pred": MetaTensor(moved.as_tensor().clone(), affine=moved.affine)}
    )["pred"]
    assert inverted.shape == volume.shape
    back, true = inverted.as_tensor() > 0.5, volume > 0.5
    assert 2 * (back & true).sum() / (back.sum() + true.sum()) > 0.9


def test_contrast_changes_inside_the_head_only_and_each_sequence_differently():
    image = torch.zeros(4, 8, 8, 8)
    image[:, 2:6, 2:6, 2:6] = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    augment = RandTissueContrastd(keys="image", prob=1.0).set_random_state(seed=3)
    changed = augment({"image": image})["image"]
    assert torch.equal(changed == 0, image == 0)
    assert not torch.allclose(changed[0], changed[1])
    order = image[0, 2:6, 2:6, 2:6].flatten().argsort()
    assert torch.equal(changed[0, 2:6, 2:6, 2:6].flatten().argsort(), order), "the order of intensities is kept"


def test_contrast_survives_a_sequence_that_is_empty_in_the_crop():
    image = torch.zeros(4, 4, 4, 4)
    assert torch.equal(RandTissueContrastd(keys="image", prob=1.0)({"image": image})["image"], image)
