"""Feedback of a segmentation: label map file, overlays, measurements; the text is the caller's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from . import overlay, slices
from .expert import ExpertRequest
from .measure import find_midline, measure_labels
from .volumes import Volume


@dataclass
class SegmentationView:
    """One segmentation seen through one slice.

    Args:
        colors: label id -> colour name, of the labels present in the slice.
        picture: the overlay for the VLM, ``(H, W, 3)`` uint8.
        overlay_path: the overlay with legend for people.
        label_map_path: the NIfTI label map in the input's geometry.
        measurements: see :func:`vila_m3_common.measure.measure_labels`.
        midline: RAS x in mm of the plane between left and right.
        notes: where findings lie outside the slice.
    """

    colors: dict[int, str]
    picture: np.ndarray
    overlay_path: Path
    label_map_path: Path
    measurements: list[dict[str, Any]]
    midline: float
    notes: list[str] = field(default_factory=list)


def view_segmentation(
    labels: np.ndarray,
    volume: Volume,
    grey_volume: np.ndarray,
    names: Mapping[int, str],
    request: ExpertRequest,
    title: str,
    findings: tuple[str, ...] = (),
    is_ct: bool = False,
) -> SegmentationView:
    """Save a label map, draw its overlays and measure it.

    Args:
        labels: ``(X, Y, Z)`` ids on the grid of ``volume``.
        volume: the (first) input image; gives affine and shape.
        grey_volume: ``(X, Y, Z)`` uint8 on the same grid, the picture below the overlay.
        names: id -> structure name; ids without a name still take a colour, as in the reference.
        request: slice, axis and output files.
        title: caption of the overlay figure.
        findings: structures whose position is worth a note when the slice misses them (tumours).
        is_ct: whether ``volume`` is in HU, so that the mean inside each label is measured.
    """
    affine = volume.affine
    label_path = request.file("_labels.nii.gz")
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), label_path)
    midline = find_midline(volume.array, affine)
    image = volume.array if is_ct else None
    measurements = measure_labels(labels, affine, names, image, request.axis, midline)
    ras_labels, ras_grey = slices.to_ras(labels, affine), slices.to_ras(grey_volume, affine)
    index = slices.check_slice(ras_labels.shape, request.slice_index, request.axis)
    grey = slices.take_slice(ras_grey, index, request.axis)
    plane = slices.take_slice(ras_labels, index, request.axis)
    colors = overlay.assign_colors(np.unique(plane).tolist())
    caption = f"{title}, {slices.AXIS_NAMES[request.axis]} slice {index} of {ras_labels.shape[request.axis] - 1}"
    spacing = [step for axis, step in enumerate(slices.ras_spacing(affine)) if axis != request.axis]
    figure = overlay.overlay_figure(grey, plane, colors, names, caption, (spacing[1], spacing[0]))
    overlay_path = request.file("_overlay.png")
    figure.save(overlay_path)
    notes = slice_notes(measurements, findings, {names.get(label) for label in colors}, index)
    picture = overlay.blend(grey, plane, colors)
    return SegmentationView(colors, picture, overlay_path, label_path, measurements, midline, notes)


def slice_notes(
    measurements: list[dict[str, Any]], findings: tuple[str, ...], shown: set[str | None], index: int
) -> list[str]:
    """Say where each finding is largest, and whether the slice that the VLM saw misses it."""
    notes = []
    for row in measurements:
        if row["name"] not in findings:
            continue
        place = f"{row['name']} is largest in {row['slice_axis']} slice {row['largest_slice']}"
        if row["name"] in shown:
            notes.append(f"{place}.")
        else:
            notes.append(f"{place}, outside the slice that the VLM saw ({index}); ask again with that slice_index.")
    return notes
