"""Writes small DICOM files for the tests."""

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid


def write_dicom(
    path: Path,
    pixels: np.ndarray,
    modality: str | None = "CT",
    series: str = "1.2.3",
    position: tuple[float, float, float] = (0.0, 0.0, 0.0),
    photometric: str = "MONOCHROME2",
    intercept: float = 0.0,
    orientation: tuple[float, ...] | None = (1, 0, 0, 0, 1, 0),
    spacing: float = 1.0,
    **tags: object,
) -> Path:
    """Write one frame ``(rows, columns)`` or several ``(frames, rows, columns)`` of uint16 pixels; position in LPS mm.

    ``tags`` are set last, by their keywords.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, "1.2"
    if modality:
        dataset.Modality = modality
    if pixels.ndim == 3:
        dataset.NumberOfFrames = pixels.shape[0]
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelSpacing, dataset.SliceThickness = [spacing, spacing], 1.0
    if orientation is not None:
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(position), list(orientation)
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, intercept
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_ct_series(folder: Path, count: int = 4, series: str = "1.2.3", modality: str | None = "CT") -> Path:
    """Write ``count`` axial slices; slice k holds k - 1000 HU in one corner and 0 HU elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        pixels = np.full((6, 5), 1024)
        pixels[0, 0] = 24 + k
        name = f"{series}_{k}.dcm"
        write_dicom(folder / name, pixels, modality, series, position=(0.0, 0.0, float(k)), intercept=-1024.0)
    return folder
