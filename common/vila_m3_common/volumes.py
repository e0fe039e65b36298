"""Reading images: volumes (NIfTI, NRRD, MetaImage, DICOM series) and radiographs (PNG, JPEG, DICOM)."""

from __future__ import annotations

import functools
import logging
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from monai.transforms import LoadImage
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image, UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from .dicom_series import check_series
from .errors import UserError
from .pictures import check_one_frame, is_deep, scale_to_bytes, to_rgb

try:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
except ImportError:  # pydicom 2, which MONAI Label needs
    from pydicom.pixel_data_handlers import apply_modality_lut, apply_voi_lut  # type: ignore[no-redef]

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
RADIOGRAPH_SUFFIXES = (".png", ".jpg", ".jpeg")
SMALLEST_VOXEL_MM = 1e-3
# Largest cosine between two axes, of half a degree; headers are written with few decimals.
LARGEST_SHEAR = 0.009

# What the readers raise for a damaged file.
_READ_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)

# Both log what no user can act on: odd tags in valid files, and a GPU decoder that is not installed.
for _name in ("pydicom", "monai.data.nvimgcodec_pydicom_plugin"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Volume:
    """A 3-D image as stored in its file.

    Args:
        array: ``(X, Y, Z)`` or ``(X, Y, Z, C)`` float32.
        affine: ``(4, 4)``, voxel index to RAS position in mm.
        path: file or DICOM folder it came from.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the array's axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether the file name ends with one of ``suffixes``, in any case."""
    return path.name.lower().endswith(suffixes)


def is_dicom(path: Path) -> bool:
    """Return whether the file carries the DICOM preamble, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_files(folder: Path) -> list[Path]:
    """Return the DICOM files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and is_dicom(path))


def check_file(path: Path) -> None:
    """Raise a UserError unless ``path`` is a readable, non-empty file or an existing folder."""
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path.name} is empty (0 bytes); give the complete image file")


def load_volume(path: str | Path) -> Volume:
    """Read a volume, once: the same unchanged file comes from memory on the next call.

    Raises:
        UserError: if the file is missing, empty, unreadable, not 3-D, constant, or holds NaN or infinity; if its
            axes are sheared; if a DICOM series is no volume, see :func:`.dicom_series.check_series`.
    """
    path = Path(path)
    check_file(path)
    files = dicom_files(path) if path.is_dir() else [path]
    stamps = [file.stat() for file in files]
    return _load_volume(path.resolve(), tuple((stamp.st_mtime_ns, stamp.st_size) for stamp in stamps))


def forget_volumes() -> None:
    """Drop the volumes that :func:`load_volume` keeps; for a program that erases the files of its users."""
    _load_volume.cache_clear()


@functools.lru_cache(maxsize=6)
def _load_volume(path: Path, _stamps: tuple[tuple[int, int], ...]) -> Volume:
    array, affine = _read(path)
    if array.ndim == 2 or (array.ndim == 3 and min(array.shape) == 1):
        raise UserError(
            f"{path.name} is 2-D {array.shape}; a volume with at least 2 slices along every axis is needed. "
            "For a DICOM series give its folder; a chest X-ray is read as PNG, JPEG or DICOM"
        )
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4):
        raise UserError(
            f"{path.name} has {array.ndim} axes {array.shape}; 3 (x, y, z) or 4 (x, y, z, channel) are read"
        )
    _check_axes(affine, path)
    _check_intensities(array, path)
    array.setflags(write=False)
    return Volume(array, affine, path)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.is_dir():
        files = dicom_files(path)
        if not files:
            raise UserError(f"folder {path.name} holds no DICOM files; give a file or the folder of one DICOM series")
        check_series(files, path.name)
    elif not has_suffix(path, VOLUME_SUFFIXES) and not is_dicom(path):
        raise UserError(
            f"{path.name} is no image this program reads; allowed: {', '.join(VOLUME_SUFFIXES)}, "
            f"DICOM, and {', '.join(RADIOGRAPH_SUFFIXES)} for X-rays"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = LoadImage(image_only=True, dtype=np.float32)(str(path))
    except _READ_ERRORS as error:
        kind = "DICOM series" if path.is_dir() else "image"
        raise UserError(
            f"{path.name} cannot be read as {kind}; the file is damaged or not what its name says"
        ) from error
    return np.asarray(image), np.asarray(image.affine, dtype=np.float64)


def _check_axes(affine: np.ndarray, path: Path) -> None:
    """Refuse geometry that slices and measurements cannot be taken from."""
    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or (lengths < SMALLEST_VOXEL_MM).any():
        raise UserError(
            f"{path.name} has no usable geometry (voxel size {', '.join(f'{step:g}' for step in lengths)} mm); "
            "write it again with the affine of the original image"
        )
    cosines = np.abs((columns / lengths).T @ (columns / lengths) - np.eye(3))
    if cosines.max() > LARGEST_SHEAR:
        raise UserError(
            f"the axes of {path.name} are sheared by {np.degrees(np.arcsin(min(cosines.max(), 1.0))):.1f} degrees (a "
            "tilted gantry?); resample it to a rectangular grid first"
        )


def _check_intensities(array: np.ndarray, path: Path) -> None:
    bad_count = array.size - int(np.isfinite(array).sum())
    if bad_count:
        raise UserError(
            f"{path.name} holds {bad_count} voxels that are NaN or infinite; "
            "replace them (for CT by -1024 HU) and try again"
        )
    if float(array.min()) == float(array.max()):
        raise UserError(f"{path.name} is constant (every voxel is {float(array.flat[0]):g}); give the image itself")


def load_radiograph(path: str | Path) -> np.ndarray:
    """Read a radiograph as ``(H, W)`` float32 in 0..255, bright bone.

    Colour images keep channel 0 (as TorchXRayVision does), 16-bit images are scaled from their own
    range, DICOM gets its modality scale and its VOI window, MONOCHROME1 is inverted, and padding is left out of
    the range.

    Raises:
        UserError: if the file is missing, empty, unreadable or constant.
    """
    path = Path(path)
    check_file(path)
    array = _read_dicom_frame(path) if is_dicom(path) else _read_picture(path)
    if float(array.min()) == float(array.max()):
        raise UserError(f"{path.name} is constant (every pixel is {float(array.flat[0]):g}); give the image itself")
    return array


def load_picture(path: str | Path) -> np.ndarray:
    """Read a PNG or JPEG as ``(H, W, 3)`` uint8; 16-bit grey is scaled from its own range."""
    path = Path(path)
    check_file(path)
    with _open_picture(path) as image:
        return to_rgb(image, path.name)


def _open_picture(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path.name} cannot be read as a picture; allowed: {', '.join(RADIOGRAPH_SUFFIXES)}"
        ) from error
    check_one_frame(image, path.name)
    return image


def _read_picture(path: Path) -> np.ndarray:
    with _open_picture(path) as image:
        if is_deep(image):
            return scale_to_bytes(np.asarray(image, dtype=np.float32))
        array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"), dtype=np.float32)
    return array if array.ndim == 2 else array[..., 0]


def _read_dicom_frame(path: Path) -> np.ndarray:
    try:
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array
    except (InvalidDicomError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path.name} has no pixels that can be decoded: {error}") from error
    if pixels.ndim == 3 and pixels.shape[-1] == 3:
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise UserError(f"{path.name} holds {pixels.shape[0]} frames; a radiograph has one")
    # The window's numbers are those of the modality scale (DICOM PS3.3 C.11.2), so the scale comes first.
    values = np.asarray(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset), dtype=np.float32)
    array = scale_to_bytes(values, pixels != dataset.get("PixelPaddingValue"))
    return 255.0 - array if dataset.get("PhotometricInterpretation") == "MONOCHROME1" else array
