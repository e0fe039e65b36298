"""What the label ids of each BraTS release mean; real label maps of ../shared."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brats_expert.labels import CONVENTIONS, LABEL_NAMES, labels_to_regions, regions_to_labels
from vila_m3_common.errors import UserError
from vila_m3_common.measure import measure_labels
from vila_m3_common.volumes import load_volume


def row(*ids: float) -> torch.Tensor:
    return torch.tensor(ids).reshape(1, -1, 1, 1)


@pytest.mark.parametrize("run", ["seed0_roi64", "recipe_roi64", "seed0_bundle_roi"])
def test_label_map_equals_the_file_that_the_released_bundle_writes(golden, run):
    with np.load(golden / "brats" / f"pred3_{run}.npz") as stored:
        regions = torch.from_numpy(stored[stored.files[0]])
    expected = np.asarray(nib.load(golden / "brats" / f"labels_{run}.nii.gz").dataobj)
    assert np.array_equal(regions_to_labels(regions)[0].numpy(), expected)


def test_enhancing_wins_over_core_and_core_over_whole_tumor():
    # columns: nothing, whole only, core without whole, enhancing without core, all three
    regions = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 1]]).reshape(3, 5, 1, 1)
    assert regions_to_labels(regions).flatten().tolist() == [0, 2, 1, 4, 4]


@pytest.mark.parametrize(
    ("convention", "ids", "expected"),
    [
        ("brats2018", (0, 1, 2, 4), (0, 1, 2, 4)),
        ("brats2023", (0, 1, 2, 3), (0, 1, 2, 4)),
        ("brats2013", (0, 1, 2, 3, 4), (0, 1, 2, 1, 4)),
        ("decathlon", (0, 1, 2, 3), (0, 2, 1, 4)),
    ],
)
def test_ids_of_every_release_come_to_1_2_and_4(convention, ids, expected):
    assert regions_to_labels(labels_to_regions(row(*ids), convention)).flatten().tolist() == list(expected)


def test_labels_to_regions_and_back_is_the_identity():
    labels = row(0, 1, 2, 4, 4, 0, 2)
    assert torch.equal(regions_to_labels(labels_to_regions(labels)), labels)


def test_a_region_that_a_release_does_not_draw_is_not_a_number():
    core, whole, enhancing = labels_to_regions(row(0, 1, 2), "brats2012").reshape(3, 3)
    assert (core.tolist(), whole.tolist()) == ([0, 0, 1], [0, 1, 1])
    assert torch.isnan(enhancing).all()


def test_ids_stored_as_floats_are_read():
    assert torch.equal(labels_to_regions(row(0.0, 0.9999, 2.0002, 4.0)), labels_to_regions(row(0, 1, 2, 4)))


@pytest.mark.parametrize("value", [0.5, float("nan"), -1.0])
def test_fractions_are_refused(value):
    with pytest.raises(UserError, match="holds fractions, negative numbers or NaN, which are no ids"):
        labels_to_regions(row(0, 1, value))


def test_ids_of_another_release_are_refused():
    message = r"ids \[3\], which brats2018 does not use \(\[0, 1, 2, 4\]\); give the label_convention that it follows"
    with pytest.raises(UserError, match=message):
        labels_to_regions(row(0, 1, 2, 3))


def test_an_unknown_release_is_refused_with_the_nearest_name():
    message = "unknown label_convention 'brats2108'; did you mean 'brats2018'.* allowed: brats2018"
    with pytest.raises(UserError, match=message):
        labels_to_regions(row(0), "brats2108")


def test_every_release_draws_core_and_whole_tumor():
    assert all(core and whole and set(core) <= set(whole) for core, whole, _ in CONVENTIONS.values())


@pytest.mark.parametrize("patient", [1, 2, 3])
def test_real_label_maps_of_2013_hold_all_regions(shared: Path, patient: int):
    """Five ids; of the four sequences only FLAIR and T1c are there, so that the network cannot read these cases."""
    folder = shared / "data" / "mri" / "brats_2013_flair_t1c" / f"brats_2013_pat000{patient}_1"
    truth = load_volume(folder / "OTMultiClass.nii.gz")
    stored = torch.tensor(truth.array)[None]
    with pytest.raises(UserError, match=r"ids \[3\], which brats2018 does not use"):
        labels_to_regions(stored, "brats2018")
    regions = labels_to_regions(stored, "brats2013")
    core, whole, enhancing = (int(region.sum()) for region in regions)
    counts = np.bincount(truth.array.astype(int).ravel())
    assert (core, whole, enhancing) == (counts[[1, 3, 4]].sum(), counts[1:].sum(), counts[4])
    labels = regions_to_labels(regions)[0].numpy()
    rows = measure_labels(labels, truth.affine, LABEL_NAMES)
    assert sum(row["volume_ml"] for row in rows) == pytest.approx(whole / 1000)  # 1 mm voxels


def test_the_real_label_map_of_2012_lacks_enhancing_tumor(shared: Path):
    truth = load_volume(shared / "data" / "mri" / "brats_hg0015" / "BRATS_HG0015_truth.mha")
    core, whole, enhancing = labels_to_regions(torch.tensor(truth.array)[None], "brats2012")
    assert (int(core.sum()), int(whole.sum())) == (int((truth.array == 2).sum()), int((truth.array > 0).sum()))
    assert torch.isnan(enhancing).all()
