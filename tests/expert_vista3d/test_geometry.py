"""However a CT is stored, the same structures are found at the same places, and the label map lies on its grid."""

from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.data import ITKWriter
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)

from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.slices import to_ras
from vila_m3_common.volumes import load_volume

# The network sees the voxels as they are stored (nothing is resampled) in one window, so results compare exactly.
ROI = 40


@pytest.fixture(scope="module", params=[3.0, 8.0], ids=["real", "phantom"])
def scan(request: pytest.FixtureRequest, shared: Path, small_case: Path) -> tuple[np.ndarray, float]:
    """A crop of the real CT at 3 mm, or a phantom at 8 mm: HU in RAS, and the spacing."""
    if request.param == 3.0:
        return load_volume(shared / "data/ct/example_ct.nii.gz").array[30:70, 30:66, 30:62], 3.0
    return load_volume(small_case / "image.nii.gz").array, 8.0


@pytest.fixture(scope="module")
def expert(scan: tuple[np.ndarray, float], bundle_root: Path) -> Iterator[BundleExpert]:
    opened = BundleExpert(
        bundle_root, {"device": "cpu", "spacing": scan[1], "roi_size": [ROI] * 3, "min_tumor_ml": 0.0}
    )
    yield opened
    opened.close()


def run(expert: BundleExpert, path: Path, folder: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """Return the label map as written, and turned to RAS."""
    result = expert.run(ExpertRequest((str(path),), "everything", output_dir=str(folder)))
    written = nib.load(result.label_map_path)
    return written, to_ras(np.asarray(written.dataobj), written.affine)


@pytest.fixture(scope="module")
def expected(
    scan: tuple[np.ndarray, float], expert: BundleExpert, tmp_path_factory: pytest.TempPathFactory
) -> np.ndarray:
    folder = tmp_path_factory.mktemp("ras")
    labels = run(expert, as_ras(*scan, folder), folder)[1]
    assert len(np.unique(labels)) > 5
    return labels


def save(array: np.ndarray, affine: np.ndarray, folder: Path, name: str = "ct.nii.gz") -> Path:
    nib.save(nib.Nifti1Image(array, affine), folder / name)
    return folder / name


def as_ras(array: np.ndarray, spacing: float, folder: Path) -> Path:
    return save(array, np.diag([spacing, spacing, spacing, 1]), folder)


def as_lps(array: np.ndarray, spacing: float, folder: Path) -> Path:
    """Negative steps along x and y, as DICOM and ITK store."""
    affine = np.diag([-spacing, -spacing, spacing, 1])
    affine[:2, 3] = (np.array(array.shape[:2]) - 1) * spacing
    return save(array[::-1, ::-1], affine, folder)


def as_sagittal_slices(array: np.ndarray, spacing: float, folder: Path) -> Path:
    affine = np.array([[0, 0, spacing, 0], [0, -spacing, 0, 99], [spacing, 0, 0, 0], [0, 0, 0, 1.0]])
    return save(np.transpose(array, (2, 1, 0))[:, ::-1], affine, folder)


def as_oblique(array: np.ndarray, spacing: float, folder: Path) -> Path:
    """The patient lies turned by 15 degrees about two axes."""
    angle = np.radians(15)
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x * spacing
    affine[:3, 3] = 40, -300, 1000
    return save(array, affine, folder)


def as_one_frame(array: np.ndarray, spacing: float, folder: Path) -> Path:
    return save(array[..., None], np.diag([spacing, spacing, spacing, 1]), folder)


def as_scaled_integers(array: np.ndarray, spacing: float, folder: Path) -> Path:
    image = nib.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1]))
    image.header.set_data_dtype(np.int16)
    nib.save(image, folder / "ct.nii.gz")
    return folder / "ct.nii.gz"


def as_meta_image(array: np.ndarray, spacing: float, folder: Path) -> Path:
    writer = ITKWriter(output_dtype=np.float32)
    writer.set_data_array(array, channel_dim=None)
    writer.set_metadata({"affine": np.diag([spacing, spacing, spacing, 1])})
    writer.write(folder / "ct.mha")
    return folder / "ct.mha"


Store = Callable[[np.ndarray, float, Path], Path]


@pytest.mark.parametrize(
    "store", [as_lps, as_sagittal_slices, as_oblique, as_one_frame, as_scaled_integers, as_meta_image]
)
def test_the_same_is_found_however_the_scan_is_stored(
    store: Store, scan: tuple[np.ndarray, float], expert: BundleExpert, expected: np.ndarray, tmp_path: Path
) -> None:
    path = store(*scan, tmp_path)
    written, labels = run(expert, path, tmp_path)
    volume = load_volume(path)
    assert written.shape == volume.array.shape
    np.testing.assert_allclose(written.affine, volume.affine, atol=1e-4)
    assert written.get_data_dtype() == np.uint8
    assert (labels != expected).mean() < 1e-3  # float rounding at the border of two structures


@pytest.mark.parametrize("store", [as_ras, as_lps, as_oblique])
def test_preprocessing_is_that_of_the_model_zoo(store: Store, bundle_root: Path, shared: Path, tmp_path: Path) -> None:
    """Its transforms in its order: an image stored from the other end is resampled from that end."""
    array = load_volume(shared / "data/ct/example_ct.nii.gz").array[30:71, 30:66, 30:62]
    path = str(store(array, 2.9, tmp_path))
    parser = ConfigParser()
    parser.read_config([str(bundle_root / "configs" / name) for name in ("inference.json", "size_full.json")])
    ours = parser.get_parsed_content("preprocessing")({"image": path})["image"]
    zoo = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Spacingd("image", pixdim=(1.5, 1.5, 1.5), mode="bilinear"),
            CropForegroundd("image", source_key="image", margin=10, allow_smaller=True),
            ScaleIntensityRanged("image", -963.8247715525971, 1053.678477684517, 0, 1, clip=True),
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )({"image": path})["image"]
    assert ours.shape == zoo.shape
    np.testing.assert_allclose(ours.numpy(), zoo.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.affine, zoo.affine, atol=1e-5)
