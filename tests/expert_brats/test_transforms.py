"""Regions to labels, the network's grid, and the contrast augmentation."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd, LoadImage
from stored_axes import stored_as

from brats_expert.transforms import LoadRegionsd, LoadSequencesd, RandTissueContrastd, RegionsToLabelsd, network_grid
from vila_m3_common.errors import UserError
from vila_m3_common.phantoms import mri_phantom


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


@pytest.fixture
def loaded(small_phantom):
    """The small phantom's image, and a function that writes its label map as an array on some grid and loads it."""
    paths = [str(small_phantom / name) for name in ("t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz")]
    return LoadSequencesd(keys="image")({"image": paths, "label": str(small_phantom / "label.nii.gz")})


def load_label(loaded, folder, change, **settings):
    volume = nib.load(loaded["label"])
    array, affine = change(np.asarray(volume.dataobj), volume.affine)
    nib.save(nib.Nifti1Image(array, affine), folder / "label.nii.gz")
    load = LoadRegionsd(keys="label", image_key="image", **settings)
    return load({**loaded, "label": str(folder / "label.nii.gz")})["label"]


def test_image_and_regions_lie_on_one_grid(loaded):
    labels = np.asarray(nib.load(loaded["label"]).dataobj)
    item = LoadRegionsd(keys="label", image_key="image")(loaded)
    assert item["image"].shape == (4, 24, 28, 20)
    assert item["label"].shape == (3, 24, 28, 20)
    assert torch.equal(item["image"].affine, item["label"].affine)
    for region, ids in zip(item["label"], ((1, 4), (1, 2, 4), (4,)), strict=True):
        assert np.array_equal(region.numpy() > 0, np.isin(labels, ids))
    assert item["label"].meta["filename_or_obj"].endswith("label.nii.gz")


def test_the_voxels_are_those_that_monais_reader_gives(loaded, small_phantom):
    paths = [str(small_phantom / name) for name in ("t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz")]
    expected = LoadImage(image_only=True)(paths)
    assert torch.equal(loaded["image"].as_tensor(), expected.as_tensor().float())
    assert torch.allclose(loaded["image"].affine, expected.affine)


@pytest.mark.parametrize(
    "change",
    [
        lambda array, affine: stored_as(array, affine, "LPS"),
        lambda array, affine: stored_as(array, affine, "SRA"),
        lambda array, affine: (array.astype(np.float64), affine),
        lambda array, affine: (array[..., None], affine),
    ],
    ids=["LPS", "other axes", "floats", "4-D with one frame"],
)
def test_a_label_map_stored_otherwise_gives_the_same_regions(loaded, tmp_path, change):
    expected = LoadRegionsd(keys="label", image_key="image")(loaded)["label"]
    assert torch.equal(load_label(loaded, tmp_path, change).as_tensor(), expected.as_tensor())


def test_a_label_map_on_another_grid_is_refused(loaded, tmp_path):
    with pytest.raises(UserError, match=r"label.nii.gz .* and t1c.nii.gz .* do not lie on the same grid"):
        load_label(loaded, tmp_path, lambda array, affine: (array[..., 1:], affine))


def test_training_refuses_a_release_without_enhancing_tumor():
    with pytest.raises(UserError, match="brats2012 labels no enhancing tumor; training needs all of tumor core, whole"):
        LoadRegionsd(keys="label", image_key="image", convention="brats2012")
    LoadRegionsd(keys="label", image_key="image", convention="brats2012", needs_all_regions=False)


def test_a_wrong_order_is_refused_when_a_case_is_loaded(tmp_path):
    image = np.moveaxis(mri_phantom(2, True, (48, 56, 40), 4.0).image[[3, 1, 0, 2]], 0, -1)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(UserError, match="look like flair, t1, t1c, t2"):
        LoadSequencesd(keys="image")({"image": str(tmp_path / "x.nii.gz")})
    ordered = LoadSequencesd(keys="image", sequence_order=["flair", "t1", "t1c", "t2"])
    loaded = ordered({"image": str(tmp_path / "x.nii.gz")})["image"]
    assert np.array_equal(loaded[0].numpy(), image[..., 2])
