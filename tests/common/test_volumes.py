import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_ct_series, write_dicom
from PIL import Image

from vila_m3_common.errors import UserError
from vila_m3_common.volumes import load_picture, load_radiograph, load_volume


def save_nifti(array: np.ndarray, path: Path) -> Path:
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return path


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_a_volume_keeps_its_array_and_geometry(tmp_path: Path) -> None:
    volume = load_volume(save_nifti(ramp(4, 5, 6), tmp_path / "v.nii.gz"))
    np.testing.assert_array_equal(volume.array, ramp(4, 5, 6))
    assert volume.spacing == pytest.approx((1.0, 2.0, 3.0))


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path: Path) -> None:
    path = save_nifti(ramp(4, 5, 6), tmp_path / "v.nii.gz")
    first = load_volume(path)
    assert load_volume(path) is first
    save_nifti(ramp(4, 5, 7), path)
    assert load_volume(path).array.shape == (4, 5, 7)


def test_the_shared_array_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_volume(save_nifti(ramp(4, 5, 6), tmp_path / "v.nii.gz")).array[0, 0, 0] = 1


def test_a_dicom_series_is_read_from_its_folder(tmp_path: Path) -> None:
    volume = load_volume(write_ct_series(tmp_path / "series"))
    assert volume.array.shape == (5, 6, 4)
    assert sorted(volume.array[0, 0].tolist()) == [-1000.0, -999.0, -998.0, -997.0]


def test_one_trailing_channel_is_dropped(tmp_path: Path) -> None:
    assert load_volume(save_nifti(ramp(4, 5, 6, 1), tmp_path / "v.nii.gz")).array.shape == (4, 5, 6)


def make_missing(folder: Path) -> Path:
    return folder / "absent.nii.gz"


def make_empty(folder: Path) -> Path:
    (folder / "empty.nii.gz").touch()
    return folder / "empty.nii.gz"


def make_text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no image")
    return folder / "notes.txt"


def make_damaged(folder: Path) -> Path:
    (folder / "damaged.nii.gz").write_bytes(gzip.compress(b"not a nifti header"))
    return folder / "damaged.nii.gz"


def make_truncated(folder: Path) -> Path:
    whole = save_nifti(np.random.default_rng(0).normal(size=(20, 20, 20)), folder / "truncated.nii.gz")
    whole.write_bytes(whole.read_bytes()[:2000])
    return whole


def make_corrupt(folder: Path) -> Path:
    """A NIfTI whose compressed stream is broken in the middle."""
    whole = save_nifti(np.random.default_rng(0).normal(size=(20, 20, 20)), folder / "corrupt.nii.gz")
    content = bytearray(whole.read_bytes())
    content[5000:5200] = b"x" * 200
    whole.write_bytes(content)
    return whole


def make_slice(folder: Path) -> Path:
    return save_nifti(ramp(8, 8, 1), folder / "slice.nii.gz")


def make_five_d(folder: Path) -> Path:
    return save_nifti(ramp(2, 3, 4, 2, 2), folder / "five.nii.gz")


def make_nan(folder: Path) -> Path:
    array = ramp(4, 5, 6)
    array[0, 0, :2] = np.nan, np.inf
    return save_nifti(array, folder / "nan.nii.gz")


def make_constant(folder: Path) -> Path:
    return save_nifti(np.full((4, 5, 6), 7), folder / "constant.nii.gz")


def make_empty_folder(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


def make_two_series(folder: Path) -> Path:
    write_ct_series(folder / "mixed", series="1.2.3")
    return write_ct_series(folder / "mixed", series="1.2.4")


def make_single_slice(folder: Path) -> Path:
    return write_ct_series(folder / "single", count=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_missing, r"absent.nii.gz does not exist; check the path"),
        (make_empty, r"empty.nii.gz is empty \(0 bytes\); give the complete image file"),
        (make_text, r"notes.txt is no image this program reads; allowed: .nii.gz, .nii, .nrrd, .*DICOM"),
        (make_damaged, r"damaged.nii.gz cannot be read as image; the file is damaged or not what its name says"),
        (make_truncated, r"truncated.nii.gz cannot be read as image; the file is damaged"),
        (make_corrupt, r"corrupt.nii.gz cannot be read as image; the file is damaged"),
        (
            make_slice,
            r"slice.nii.gz is 2-D \(8, 8, 1\); a volume with at least 2 slices .* DICOM series give its folder",
        ),
        (make_five_d, r"five.nii.gz has 5 axes \(2, 3, 4, 2, 2\); 3 \(x, y, z\) or 4"),
        (make_nan, r"nan.nii.gz holds 2 voxels that are NaN or infinite; replace them \(for CT by -1024 HU\)"),
        (make_constant, r"constant.nii.gz is constant \(every voxel is 7\); give the image itself"),
        (make_empty_folder, r"folder nothing holds no DICOM files; give a file or the folder of one DICOM series"),
        (make_two_series, r"folder mixed holds 2 DICOM series; put the one to read into its own folder"),
        (make_single_slice, r"folder single holds a single slice; give the folder with the whole series"),
    ],
)
def test_a_volume_that_cannot_be_used_is_refused(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_volume(make(tmp_path))


def save_picture(array: np.ndarray, path: Path) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_a_radiograph_keeps_its_grey_values(tmp_path: Path) -> None:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    np.testing.assert_array_equal(load_radiograph(save_picture(grey, tmp_path / "x.png")), grey)


def test_a_coloured_radiograph_keeps_its_first_channel(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_radiograph(save_picture(rgb, tmp_path / "x.png")), rgb[..., 0])


def test_sixteen_bit_pictures_are_scaled_from_their_own_range(tmp_path: Path) -> None:
    deep = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    path = save_picture(deep, tmp_path / "x.png")
    np.testing.assert_allclose(load_radiograph(path), [[0, 63.75], [127.5, 255]])
    assert load_picture(path)[..., 2].tolist() == [[0, 63], [127, 255]]


def test_monochrome1_is_turned_so_that_bone_is_bright(tmp_path: Path) -> None:
    pixels = np.array([[0, 1000], [2000, 4000]])
    plain = load_radiograph(write_dicom(tmp_path / "a.dcm", pixels, "CR"))
    inverted = load_radiograph(write_dicom(tmp_path / "b.dcm", pixels, "CR", photometric="MONOCHROME1"))
    np.testing.assert_allclose(plain, [[0, 63.75], [127.5, 255]])
    np.testing.assert_allclose(inverted, 255 - plain)


def test_the_window_of_a_dicom_radiograph_counts_in_the_modality_scale(tmp_path: Path) -> None:
    pixels = np.array([[0, 100], [200, 300]])
    window = {"WindowCenter": 400, "WindowWidth": 401}
    found = load_radiograph(write_dicom(tmp_path / "a.dcm", pixels, "DX", RescaleSlope=2, **window))
    np.testing.assert_allclose(found, [[0, 0], [127.5, 255]], atol=0.7)
    plain = load_radiograph(write_dicom(tmp_path / "b.dcm", pixels, "DX", **window))
    np.testing.assert_allclose(plain, [[0, 0], [0, 255]], atol=1.5)


def test_padding_does_not_count_for_the_range_of_a_radiograph(tmp_path: Path) -> None:
    pixels = np.array([[0, 1000], [1500, 2000]])
    found = load_radiograph(write_dicom(tmp_path / "a.dcm", pixels, "CR", PixelPaddingValue=0))
    np.testing.assert_allclose(found, [[0, 0], [127.5, 255]])


def test_a_dicom_radiograph_in_colour_keeps_its_first_channel(tmp_path: Path) -> None:
    colored = np.stack([np.array([[0, 50], [100, 200]]), np.zeros((2, 2)), np.zeros((2, 2))], axis=-1)
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    tags |= {"NumberOfFrames": 1, "Rows": 2, "Columns": 2, "PixelData": colored.astype(np.uint8).tobytes()}
    path = write_dicom(tmp_path / "a.dcm", np.zeros((2, 2)), "OT", photometric="RGB", **tags)
    np.testing.assert_allclose(load_radiograph(path), [[0, 63.75], [127.5, 255]])


def test_a_radiograph_of_several_frames_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "cine.dcm", ramp(3, 4, 5), "CR")
    with pytest.raises(UserError, match="cine.dcm holds 3 frames; a radiograph has one"):
        load_radiograph(path)


def test_a_dicom_file_without_pixels_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "report.dcm", ramp(4, 5), "CR")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match="report.dcm has no pixels that can be decoded"):
        load_radiograph(path)


def test_a_constant_radiograph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"blank.png is constant \(every pixel is 0\); give the image itself"):
        load_radiograph(save_picture(np.zeros((8, 8), np.uint8), tmp_path / "blank.png"))


def test_text_named_png_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(UserError, match="x.png cannot be read as a picture; allowed: .png, .jpg, .jpeg"):
        load_picture(tmp_path / "x.png")
