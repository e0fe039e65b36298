"""Four sequences on one grid, in an order that is checked: phantoms, real scans of ../shared, and what is refused."""

import itertools
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from stored_axes import stored_as

from brats_expert.expert import BratsRequest
from brats_expert.sequences import CLEARLY_BETTER, BrainScan, check_scan, judge_order, load_scan, scan_notes
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.phantoms import VolumePhantom
from vila_m3_common.phantoms import mri_phantom as draw_phantom
from vila_m3_common.study import SEQUENCES
from vila_m3_common.volumes import load_volume

NAMES = ("t1c", "t1n", "t2w", "t2f")
UNTOLD = ("a", "b", "c", "d")
REAL_CASES = {
    "brats_gli_00001": ("t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz"),
    "brats_hg0015": tuple(f"BRATS_HG0015_{name}.mha" for name in ("T1C", "T1", "T2", "FLAIR")),
}
ORDERS = [order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def phantom() -> VolumePhantom:
    """A tumour that takes up contrast, so that T1c can be told from T1."""
    return draw_phantom(2, has_tumor=True, shape=(48, 56, 40), spacing=4.0)


@pytest.fixture
def write(tmp_path: Path, phantom: VolumePhantom) -> Callable[..., list[str]]:
    """Write the phantom's sequences under given names, each by its own affine and array if given."""

    def run(names=NAMES, affines=None, arrays=None) -> list[str]:
        paths = []
        for index, name in enumerate(names):
            array = phantom.image[index] if arrays is None else arrays[index]
            affine = phantom.affine if affines is None else affines[index]
            path = tmp_path / f"{name}.nii.gz"
            nib.save(nib.Nifti1Image(array.astype(np.float32), affine), path)
            paths.append(str(path))
        return paths

    return run


def write_four_d(path: Path, phantom: VolumePhantom, order=(0, 1, 2, 3)) -> str:
    nib.save(nib.Nifti1Image(np.moveaxis(phantom.image[list(order)], 0, -1), phantom.affine), path)
    return str(path)


def request(*paths: str) -> ExpertRequest:
    return ExpertRequest(tuple(paths))


# order


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 0, 3, 2)])
def test_names_decide_over_the_order_of_the_list(write, order) -> None:
    paths = write()
    scan = load_scan([paths[index] for index in order])
    assert scan.order_source == "names"
    for name, path in zip(SEQUENCES, paths, strict=True):
        np.testing.assert_array_equal(scan.volume(name).array, load_volume(path).array)


def test_four_files_without_telling_names_are_taken_by_position_when_they_look_right(write) -> None:
    paths = write(UNTOLD)
    assert BratsRequest()(request(*paths)) == {"image": paths}
    assert scan_notes(load_scan(paths)) == []


def test_files_in_another_order_are_refused_with_the_order_that_they_show(write, phantom) -> None:
    paths = write(UNTOLD, arrays=phantom.image[[3, 1, 0, 2]])
    with pytest.raises(UserError, match="look like flair, t1, t1c, t2, not like t1c, t1, t2, flair; if so add --seq"):
        BratsRequest()(request(*paths))


def test_a_four_d_file_in_another_order_is_refused_and_read_with_its_order_given(tmp_path, phantom) -> None:
    path = write_four_d(tmp_path / "decathlon.nii.gz", phantom, (3, 1, 0, 2))
    with pytest.raises(UserError, match=r"add --sequence_order \"\['flair', 't1', 't1c', 't2'\]\", else --sequence"):
        BratsRequest()(request(path))
    order = ["flair", "t1", "t1c", "t2"]
    assert BratsRequest(order)(request(path)) == {"image": path}
    scan = load_scan([path], order)
    assert np.array_equal(np.stack(scan.channels), phantom.image)
    assert scan_notes(scan) == []


def test_an_order_that_the_user_insists_on_is_kept_with_a_note(tmp_path, phantom) -> None:
    path = write_four_d(tmp_path / "x.nii.gz", phantom, (3, 1, 0, 2))
    assert BratsRequest(list(SEQUENCES))(request(path)) == {"image": path}
    assert scan_notes(load_scan([path], SEQUENCES)) == [
        "sequence_order says t1c, t1, t2, flair, but the intensities look like flair, t1, t1c, t2; check the files."
    ]


def test_names_that_the_intensities_contradict_are_followed_with_a_note(write, phantom) -> None:
    paths = write(arrays=phantom.image[[0, 1, 3, 2]])
    BratsRequest()(request(*paths))
    (note,) = scan_notes(load_scan(paths))
    assert note.startswith("The file names say t1c, t1, t2, flair, but the intensities look like t1c, t1, flair, t2")


def test_an_order_that_cannot_be_told_is_taken_with_a_note(tmp_path) -> None:
    healthy = draw_phantom(0, has_tumor=False, shape=(48, 56, 40), spacing=4.0)  # nothing takes up contrast
    path = write_four_d(tmp_path / "x.nii.gz", healthy)
    BratsRequest()(request(path))
    (note,) = scan_notes(load_scan([path]))
    assert note == "The sequences were taken to be t1c, t1, t2, flair; the intensities neither confirm nor deny it."


def test_the_name_of_a_link_counts_not_that_of_its_file(write, tmp_path) -> None:
    """Data managers such as git-annex keep files under hashes and link to them by name."""
    links = []
    for path, name in zip(write(UNTOLD), ("flair", "t2", "t1", "t1c"), strict=True):
        (tmp_path / f"{name}.nii.gz").symlink_to(path)
        links.append(tmp_path / f"{name}.nii.gz")
    scan = load_scan(links)
    assert scan.order_source == "names"
    assert np.array_equal(scan.volume("flair").array, load_volume(tmp_path / "a.nii.gz").array)


def test_one_name_that_stands_in_another_place_is_refused(write) -> None:
    paths = write(("a", "b", "flair", "d"))
    with pytest.raises(UserError, match=r"flair.nii.gz looks like flair, but stands where t1c, t1, t2, flair were"):
        BratsRequest()(request(*paths))


@pytest.mark.parametrize("order", [["t1c", "t1", "t2"], ["t1c", "t1", "t2", "t2"], ["t1ce", "t1", "t2", "flair"]])
def test_an_order_that_does_not_name_each_sequence_once_is_refused(write, order) -> None:
    with pytest.raises(UserError, match="is not usable; give each of t1c, t1, t2, flair once"):
        BratsRequest(order)(request(*write()))


@pytest.mark.parametrize("case", REAL_CASES)
def test_every_wrong_order_of_a_real_scan_is_told_from_the_right_one(shared: Path, case: str) -> None:
    paths = [shared / "data" / "mri" / case / name for name in REAL_CASES[case]]
    channels = [load_volume(path).array[::2, ::2, ::2] for path in paths]
    seen, lead = judge_order(channels)
    assert seen == SEQUENCES
    assert lead > CLEARLY_BETTER
    for order in ORDERS:
        seen, lead = judge_order([channels[index] for index in order])
        assert seen == tuple(SEQUENCES[index] for index in order)
        assert lead > CLEARLY_BETTER


@pytest.mark.parametrize("seed", range(6))
def test_the_right_order_of_a_phantom_is_never_refused(seed: int) -> None:
    channels = draw_phantom(seed, has_tumor=bool(seed % 3), shape=(48, 56, 40), spacing=4.0).image
    seen, lead = judge_order(channels)
    assert seen == SEQUENCES or lead < CLEARLY_BETTER


def test_too_few_voxels_tell_no_order() -> None:
    assert judge_order(draw_phantom(1, True, (12, 14, 10), 16.0).image) == (SEQUENCES, 0.0)


# grid


@pytest.mark.parametrize("codes", ["LPS", "RAS", "ASR", "LPI"])
def test_a_sequence_stored_along_other_axes_is_turned_to_the_t1c(write, phantom, codes: str) -> None:
    array, affine = stored_as(phantom.image[2], phantom.affine, codes)
    paths = write(affines=[phantom.affine, phantom.affine, affine, phantom.affine],
                  arrays=[phantom.image[0], phantom.image[1], array, phantom.image[3]])  # fmt: skip
    scan = load_scan(paths)
    assert np.array_equal(np.stack(scan.channels), phantom.image)
    np.testing.assert_allclose(scan.affine, phantom.affine)


def test_rounded_headers_are_one_grid(write, phantom) -> None:
    rounded = phantom.affine.copy()
    rounded[:3, 3] += 0.1  # 0.025 of a 4 mm voxel
    paths = write(affines=[phantom.affine, rounded, phantom.affine, rounded])
    assert len(load_scan(paths).channels) == 4


def other_grids(phantom: VolumePhantom) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    t2, affine = phantom.image[2], phantom.affine
    moved, thick, turned = affine.copy(), affine.copy(), affine.copy()
    moved[0, 3] += 12
    thick[:3, 2] *= 1.25
    angle = np.radians(10)
    turned[:2, :2] = 4 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return {
        "moved": (t2, moved),
        "thicker slices": (t2, thick),
        "oblique": (t2, turned),
        "a slice less": (t2[..., :-1], affine),
        "half the resolution": (t2[::2, ::2, ::2], affine @ np.diag([2, 2, 2, 1])),
    }


@pytest.mark.parametrize("kind", ["moved", "thicker slices", "oblique", "a slice less", "half the resolution"])
def test_a_sequence_on_another_grid_is_refused(write, phantom, kind: str) -> None:
    array, affine = other_grids(phantom)[kind]
    paths = write(affines=[phantom.affine, phantom.affine, affine, phantom.affine],
                  arrays=[phantom.image[0], phantom.image[1], array, phantom.image[3]])  # fmt: skip
    with pytest.raises(
        UserError, match=r"t2w.nii.gz \(.* mm from .* and t1c.nii.gz .* do not lie on the same grid; reg"
    ):
        BratsRequest()(request(*paths))


def test_files_of_one_frame_are_read_as_3_d(write, phantom) -> None:
    paths = write(arrays=[channel[..., None] for channel in phantom.image])
    assert np.array_equal(np.stack(load_scan(paths).channels), phantom.image)


# what is no scan of four sequences


def test_one_sequence_alone_is_refused(write) -> None:
    with pytest.raises(UserError, match=r"t1c.nii.gz has shape \(48, 56, 40\); BRATS needs \(x, y, z, 4\)"):
        BratsRequest()(request(write()[0]))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_four_d_file_with_another_number_of_channels_is_refused(tmp_path, phantom, count: int) -> None:
    image = np.moveaxis(np.resize(phantom.image, (count, *phantom.labels.shape)), 0, -1)
    nib.save(nib.Nifti1Image(image, phantom.affine), tmp_path / "x.nii.gz")
    with pytest.raises(UserError, match=rf"x.nii.gz has shape \(48, 56, 40, {count}\); BRATS needs \(x, y, z, 4\)"):
        BratsRequest()(request(str(tmp_path / "x.nii.gz")))


def test_two_files_are_refused(write) -> None:
    with pytest.raises(UserError, match="BRATS was given 2 images; give four files"):
        BratsRequest()(request(*write()[:2]))


def test_a_four_d_file_among_the_sequences_is_refused(write, phantom) -> None:
    four = np.moveaxis(phantom.image, 0, -1)
    paths = write(UNTOLD, arrays=[phantom.image[0], four, phantom.image[2], phantom.image[3]])
    with pytest.raises(UserError, match=r"b.nii.gz has shape \(48, 56, 40, 4\); each of the four sequences is 3-D"):
        BratsRequest()(request(*paths))


def test_a_constant_channel_is_named(tmp_path, phantom) -> None:
    image = np.moveaxis(phantom.image.copy(), 0, -1)
    image[..., 2] = 0
    nib.save(nib.Nifti1Image(image, phantom.affine), tmp_path / "x.nii.gz")
    with pytest.raises(UserError, match=r"t2 of x.nii.gz is constant \(0\); BRATS needs all four sequences"):
        BratsRequest()(request(str(tmp_path / "x.nii.gz")))


def test_the_same_sequence_given_twice_is_refused(write, phantom) -> None:
    with pytest.raises(UserError, match="t1c and t1 of t1c.nii.gz hold the same voxels; give each sequence once"):
        BratsRequest()(request(*write(arrays=phantom.image[[0, 0, 2, 3]])))


def test_a_scan_with_skull_gets_a_note(write, phantom) -> None:
    noise = np.random.default_rng(0).uniform(1, 30, phantom.image.shape)
    paths = write(arrays=phantom.image + noise)
    BratsRequest()(request(*paths))
    assert any(note.startswith("The scan has no empty background") for note in scan_notes(load_scan(paths)))


def test_a_real_scan_whose_background_is_not_zero_is_refused(shared: Path) -> None:
    """BraTS 2013 cases come z-scored over the whole volume, air included, and with two of the four sequences."""
    folder = shared / "data" / "mri" / "brats_2013_flair_t1c" / "brats_2013_pat0001_1"
    t1c, flair = (load_volume(folder / f"{name}_subtrMeanDivStd.nii.gz") for name in ("T1c", "Flair"))
    scan = BrainScan((t1c.array, t1c.array, flair.array, flair.array), t1c.affine, t1c.path, "names")
    with pytest.raises(UserError, match=r"background of t1c of T1c_.* is -4.75.* \(8\d% of the voxels\), not 0"):
        check_scan(scan)
