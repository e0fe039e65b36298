"""Label maps as viewers want them: their format, and which label is which structure."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from monai.data import ITKWriter
from scipy import ndimage

from vila_m3_common.errors import UserError, check_choice
from vila_m3_common.volumes import dicom_files, load_volume

# More of a label than this part may not lie outside the image that it belongs to.
MAX_OUTSIDE = 0.1
EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha")


def write_label_map(source: Path, extension: str = ".nii.gz", is_compressed: bool = True) -> Path:
    """Write a label map for a viewer, as uint8 in the geometry of ``source``; the caller removes the file.

    Args:
        source: NIfTI label map of an expert.
        extension: one of ``EXTENSIONS``.
        is_compressed: whether NRRD and MetaImage are compressed; the NIfTI formats say so themselves.

    Raises:
        UserError: if the extension is another one.
    """
    check_choice(extension, EXTENSIONS, "result_extension")
    with tempfile.NamedTemporaryFile(suffix=extension, delete=False) as file:
        target = Path(file.name)
    if extension == ".nii.gz":
        shutil.copyfile(source, target)
        return target
    image = nib.Nifti1Image.from_filename(source)
    array = np.asarray(image.dataobj).astype(np.uint8)
    if extension == ".nii":
        nib.save(nib.Nifti1Image(array, image.affine), target)
        return target
    writer = ITKWriter(output_dtype=np.uint8)
    writer.set_data_array(array, channel_dim=None)
    writer.set_metadata({"affine": image.affine}, resample=False)
    writer.write(str(target), compression=is_compressed)
    return target


def label_names(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return structure -> label of what a label map holds, in ascending order of the labels.

    Slicer gives segments their names by this order, so nothing that the map lacks may stand here.

    Args:
        rows: of :func:`vila_m3_composite.service.labels.label_rows`.
    """
    return {str(row["name"]): int(row["label"]) for row in rows}


def label_info(rows: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any]]:
    """Return what MONAI Label makes the segments of a DICOM SEG of, one entry for each label in ascending order."""
    return [
        {
            "name": row["name"],
            "idx": row["label"],
            "description": row["name"],
            "color": list(bytes.fromhex(str(row["rgb"])[1:])),
            "model_name": model,
        }
        for row in rows
    ]


def read_names(info: Mapping[str, Any]) -> dict[int, str]:
    """Return label -> structure of a label that was saved, from what the viewer said of it; empty if it said nothing.

    Slicer and OHIF number the segments of a label that they save by themselves, and tell the numbers in ``label_info``.
    The labels that this app saved carry the names in ``params``.

    Args:
        info: of MONAI Label's datastore.
    """
    rows = info.get("label_info")
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        return {
            int(row["idx"]): str(row["name"])
            for row in rows
            if isinstance(row, Mapping) and "name" in row and str(row.get("idx", "")).isdigit()
        }
    names = (info.get("params") or {}).get("label_names") or {}
    return {int(label): str(name) for name, label in names.items()}


def read_segment_names(folder: Path) -> dict[int, str]:
    """Return segment number -> structure of the DICOM SEG in a folder; empty when there is none.

    A SEG that comes from a DICOMweb server is turned into a label map of its segment numbers.
    """
    for path in dicom_files(folder) if folder.is_dir() else []:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        segments = dataset.get("SegmentSequence")
        if segments:
            return {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in segments}
    return {}


def load_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a saved label map: ids ``(X, Y, Z)`` uint8 and the affine ``(4, 4)``.

    Raises:
        UserError: if it cannot be read, or is empty.
    """
    volume = load_volume(path)
    return np.rint(volume.array).astype(np.uint8), volume.affine


def on_grid(labels: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray) -> np.ndarray:
    """Bring a label map onto the grid of an image: a DICOM SEG, for one, leaves out the slices without labels.

    Args:
        labels: ``(X, Y, Z)`` ids.
        affine: of the labels, voxel index to RAS position in mm.
        shape: of the image.
        target: affine of the image.

    Returns:
        Ids of ``shape``, those of the nearest voxels.

    Raises:
        UserError: if much of it lies outside the image.
    """
    if labels.shape == tuple(shape) and np.allclose(affine, target, atol=1e-3):
        return labels
    step = np.round(np.linalg.inv(affine) @ target, 6)
    moved = ndimage.affine_transform(labels, step[:3, :3], step[:3, 3], output_shape=tuple(shape), order=0)
    volumes = [
        float((array > 0).sum()) * abs(float(np.linalg.det(grid[:3, :3])))
        for array, grid in ((moved, target), (labels, affine))
    ]
    if volumes[0] < (1 - MAX_OUTSIDE) * volumes[1]:
        raise UserError(f"the label {labels.shape} lies beside the image {tuple(shape)}; it is of another image")
    return moved
