"""The hooks that make this bundle an expert: a request becomes a dataset item, a label map becomes feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vila_m3_common import prompts, slices
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.measure import measure_labels
from vila_m3_common.segmentation import slice_notes, view_segmentation
from vila_m3_common.study import SEQUENCES
from vila_m3_common.volumes import Volume

from .labels import LABEL_NAMES, REGION_LABELS
from .sequences import check_scan, load_scan, scan_notes


class BratsRequest:
    """Turns a request into the dataset item, after checking that the network can read the images.

    Args:
        sequence_order: see :func:`brats_expert.sequences.load_scan`.
    """

    def __init__(self, sequence_order: Sequence[str] | None = None) -> None:
        self.sequence_order = sequence_order

    def __call__(self, request: ExpertRequest) -> dict[str, Any]:
        """Return the dataset item for a request.

        Args:
            request: with four image paths, or with one 4-D file of the sequences (channels last).

        Returns:
            ``{"image": ...}``, the list of four files or the one file.

        Raises:
            UserError: if the images are not four sequences on one grid, in the order they are said to have.
        """
        paths = list(request.image_paths)
        check_scan(load_scan(paths, self.sequence_order))
        return {"image": paths if len(paths) > 1 else paths[0]}


class BratsFeedback:
    """Turns the label map of a run into the expert turn, the overlay and the measurements.

    Args:
        variant: form of the text, see :mod:`vila_m3_common.prompts`.
        overlay_sequence: the sequence below the overlay: ``t1c``, ``t1``, ``t2`` or ``flair``.
        sequence_order: as given to :class:`BratsRequest`.

    Raises:
        UserError: if variant or sequence is unknown.
    """

    def __init__(
        self,
        variant: prompts.Variant = "trained",
        overlay_sequence: str = "t1c",
        sequence_order: Sequence[str] | None = None,
    ) -> None:
        if overlay_sequence not in SEQUENCES:
            raise UserError(f"unknown overlay_sequence {overlay_sequence!r}; allowed: {', '.join(SEQUENCES)}")
        if variant not in ("trained", "served"):
            raise UserError(f"unknown feedback_variant {variant!r}; allowed: trained, served")
        self.variant = variant
        self.overlay_sequence = overlay_sequence
        self.sequence_order = sequence_order

    def __call__(self, output: Mapping[str, Any]) -> ExpertResult:
        """Describe one run.

        Args:
            output: ``request``, the request as JSON, and ``pred``, the label map ``(1, X, Y, Z)`` of 0, 1, 2
                and 4 on the grid of the T1c.
        """
        request = ExpertRequest.from_json(output["request"])
        labels = np.asarray(output["pred"].cpu())[0].astype(np.uint8)
        scan = load_scan(request.image_paths, self.sequence_order)
        volume = scan.volume(self.overlay_sequence)
        grey = slices.scale_min_max(volume.array, float(volume.array.min()), float(volume.array.max()))
        view = view_segmentation(labels, volume, grey, LABEL_NAMES, request, "BRATS")
        regions = measure_regions(labels, volume.affine, request.axis, view.midline)
        return ExpertResult(
            text=prompts.brats_feedback(list(view.colors), view.colors, request.question, self.variant),
            images=(view.picture,),
            overlay_path=view.overlay_path,
            label_map_path=view.label_map_path,
            legend={color: LABEL_NAMES.get(label, f"label {label}") for label, color in view.colors.items()},
            measurements=view.measurements + regions,
            notes=[*_notes(regions, bool(view.colors), _slice_index(request, volume)), *scan_notes(scan)],
        )


def measure_regions(
    labels: np.ndarray, affine: np.ndarray, axis: int, midline: float | None = None
) -> list[dict[str, Any]]:
    """Measure tumour core and whole tumour.

    Args:
        labels: ``(X, Y, Z)`` BraTS ids.
        affine: ``(4, 4)``, voxel index to RAS position in mm.
        axis: RAS axis of the slices that are measured.
        midline: RAS x in mm of the plane between left and right; None leaves the side out.

    Returns:
        Rows as of :func:`vila_m3_common.measure.measure_labels`, with ``labels`` (the ids of the region) in
        place of ``label``; a region that is empty has no row.
    """
    rows = []
    for name, ids in REGION_LABELS.items():
        inside = np.isin(labels, ids).astype(np.uint8)
        for row in measure_labels(inside, affine, {1: name}, axis=axis, midline=midline):
            del row["label"]
            rows.append({**row, "labels": list(ids)})
    return rows


def _slice_index(request: ExpertRequest, volume: Volume) -> int:
    ras = slices.to_ras(volume.array, volume.affine)
    return slices.check_slice(ras.shape, request.slice_index, request.axis)


def _notes(regions: list[dict[str, Any]], is_in_slice: bool, index: int) -> list[str]:
    if not regions:
        return ["No tumor was found in the whole volume."]
    return slice_notes(regions, ("whole tumor",), {"whole tumor"} if is_in_slice else set(), index)
