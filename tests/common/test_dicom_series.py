"""Series that make no volume are refused with the reason; odd but sound ones are read where they are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_ct_series, write_dicom
from monai.transforms import LoadImage

from vila_m3_common.errors import UserError
from vila_m3_common.slices import to_ras
from vila_m3_common.volumes import load_volume

AXIAL = np.array([[1.0, 0, 0], [0, 1.0, 0]])


def write_series(
    folder: Path,
    steps: list[float] | None = None,
    directions: np.ndarray = AXIAL,
    shift_per_mm: tuple[float, float, float] = (0, 0, 0),
    **tags: object,
) -> Path:
    """Write slices at ``steps`` mm along their normal, shifted by ``shift_per_mm`` for every mm; slice k holds k."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(*directions)
    for k, place in enumerate(steps or [0, 2, 4, 6, 8]):
        position = place * normal + place * np.array(shift_per_mm) + [10, 20, 30]
        pixels = np.full((6, 5), k)
        pixels[0, 0] = 100
        write_dicom(
            folder / f"{k}.dcm", pixels, position=tuple(position), orientation=tuple(directions.ravel()), **tags
        )
    return folder


def missing_slice(folder: Path) -> Path:
    return write_series(folder, [0, 2, 4, 8, 10])


def uneven_slices(folder: Path) -> Path:
    return write_series(folder, [0, 2, 4, 5.5, 7.5, 9.5])


def repeated_slices(folder: Path) -> Path:
    return write_series(folder, [0, 0, 2, 2, 4, 4])


def tilted_gantry(folder: Path) -> Path:
    """Slices tilted by 12 degrees about x while the table moves along z."""
    angle = np.radians(12)
    directions = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)]])
    return write_series(
        folder, directions=directions, shift_per_mm=(0, np.tan(angle) * np.cos(angle), np.tan(angle) * np.sin(angle))
    )


def localizer_among_them(folder: Path) -> Path:
    write_series(folder)
    write_dicom(folder / "localizer.dcm", np.ones((6, 5)), position=(0, 0, 100), orientation=(0, 1, 0, 0, 0, -1))
    return folder


def another_size(folder: Path) -> Path:
    write_series(folder)
    write_dicom(folder / "large.dcm", np.ones((12, 10)), position=(10, 20, 40))
    return folder


def another_spacing(folder: Path) -> Path:
    write_series(folder)
    write_dicom(folder / "fine.dcm", np.ones((6, 5)), position=(10, 20, 40), spacing=0.5)
    return folder


def no_positions(folder: Path) -> Path:
    folder.mkdir()
    for k in range(3):
        write_dicom(folder / f"{k}.dcm", np.full((6, 5), k), orientation=None)
    return folder


def multi_frame(folder: Path) -> Path:
    folder.mkdir()
    write_dicom(folder / "enhanced.dcm", np.ones((4, 6, 5)))
    return folder


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            missing_slice,
            r"slices are missing .* in folder s: after the one at 34 mm the next is 4 mm away, elsewhere 2 mm",
        ),
        (uneven_slices, r"unevenly spaced in folder s: after the one at 34 mm the next is 1.5 mm away, elsewhere 2 mm"),
        (repeated_slices, r"folder s holds several slices at one position \(time points or reconstructions\?\)"),
        (tilted_gantry, r"the gantry was tilted: .* shifted against each other by 12.0 degrees.*dcm2niix"),
        (localizer_among_them, r"the slices in folder s are not parallel \(a localizer among them\?\)"),
        (another_size, r"the slices in folder s differ in size or pixel spacing"),
        (another_spacing, r"the slices in folder s differ in size or pixel spacing"),
        (no_positions, r"without position or orientation of the slice \(ImagePositionPatient"),
        (multi_frame, r"folder s holds a multi-frame DICOM file, which is not read; convert it to NIfTI"),
    ],
)
def test_a_series_that_is_no_volume_is_refused(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_volume(write(tmp_path / "s"))


def test_an_oblique_series_is_read_where_it_lies(tmp_path: Path) -> None:
    """Rotated by 20 degrees about x without a shift: oblique, not tilted."""
    angle = np.radians(20)
    directions = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)]])
    volume = load_volume(write_series(tmp_path / "s", directions=directions))
    assert volume.spacing == pytest.approx((1, 1, 2))
    corner = volume.affine @ [*np.argwhere(volume.array == 100)[0], 1]
    np.testing.assert_allclose(corner[:3], [-10, -20, 30], atol=1e-4)  # LPS to RAS


def test_slices_may_be_stored_from_head_to_foot(tmp_path: Path) -> None:
    volume = load_volume(write_series(tmp_path / "s", [8, 6, 4, 2, 0]))
    ras = to_ras(volume.array, volume.affine)
    assert ras[0, 0].tolist() == [4, 3, 2, 1, 0]  # slice 4 lies lowest


def test_a_changed_slice_is_read_again(tmp_path: Path) -> None:
    folder = write_ct_series(tmp_path / "s")
    before = load_volume(folder).array.max()
    write_dicom(folder / "1.2.3_0.dcm", np.full((6, 5), 3000), series="1.2.3", intercept=-1024.0)
    assert load_volume(folder).array.max() == 1976 > before


def test_the_real_series_is_read_and_refused_without_one_of_its_slices(shared: Path, tmp_path: Path) -> None:
    real = shared / "data/ct/example_ct_dicom"
    assert load_volume(real).array.shape == (512, 512, 20)
    copy = tmp_path / "s"
    shutil.copytree(real, copy, copy_function=shutil.copyfile)
    sorted(copy.iterdir())[9].unlink()
    with pytest.raises(UserError, match=r"slices are missing .* the next is 4 mm away, elsewhere 2 mm"):
        load_volume(copy)
    assert LoadImage(image_only=True)(str(copy)).shape == (512, 512, 19)  # the reader itself does not notice
