"""The hooks that make VISTA3D an expert: request -> dataset item, run's output -> expert turn."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.prompts import Variant, ct_feedback
from vila_m3_common.segmentation import SegmentationView, view_segmentation
from vila_m3_common.slices import window_ct
from vila_m3_common.volumes import Volume, load_volume

from .labels import (
    MARKED_OBJECT,
    NewClasses,
    argument_ids,
    label_table,
    point_class,
    prompt_ids,
    spoken_names,
    tumor_names,
)
from .points import check_inside, read_points

# A prompt of fewer classes than this was typed by a person, who wants to know about each.
FEW = 6


class Vista3dRequest:
    """The ``expert_request`` hook.

    The prompts of a request, where it has some, stand in place of those given here.

    Args:
        label_prompt: class names, ids or groups for every request; overrides the request's argument.
        points: clicks ``[[x, y, z], ...]``, voxel indices of the image; overrides the request's argument.
            ``label_prompt`` then names the marked class, or none.
        point_labels: 1 (inside) or 0 (outside) for each point; None takes all as inside.
        new_classes: see :func:`.labels.read_new_classes`.
    """

    def __init__(
        self,
        label_prompt: Any = None,
        points: Any = None,
        point_labels: Any = None,
        new_classes: NewClasses = None,
    ) -> None:
        self.label_prompt = label_prompt
        self.points = points
        self.point_labels = point_labels
        self.new_classes = new_classes

    def __call__(self, request: ExpertRequest) -> dict[str, Any]:
        """Return the dataset item: ``image`` (path), and ``label_prompt`` (class ids), ``points``, ``point_labels``.

        Raises:
            UserError: if the argument or a prompt is unknown, or the image is no single CT volume.
        """
        volume = _ct_volume(request.image_paths)
        own = {"label_prompt": self.label_prompt, "points": self.points, "point_labels": self.point_labels}
        given = request.prompts or own
        label_prompt = given.get("label_prompt")
        clicks = read_points(given.get("points"), given.get("point_labels"))
        if clicks is not None:
            check_inside(clicks, volume.array.shape)
            point_class(label_prompt)
            prompts = {"points": clicks.coordinates, "point_labels": clicks.labels}
            return {"image": request.image_paths[0], "label_prompt": label_prompt, **prompts}
        ids = argument_ids(request.argument) if label_prompt is None else prompt_ids(label_prompt, self.new_classes)
        return {"image": request.image_paths[0], "label_prompt": ids}


def _ct_volume(image_paths: Sequence[str]) -> Volume:
    if len(image_paths) != 1:
        raise UserError(
            f"VISTA3D reads one CT volume, but was given {len(image_paths)} images; give one file or series"
        )
    volume = load_volume(image_paths[0])
    if volume.array.ndim != 3:
        raise UserError(f"{volume.path.name} is 4-D {volume.array.shape}; VISTA3D reads one 3-D CT volume")
    return volume


class Vista3dFeedback:
    """The ``expert_feedback`` hook.

    Args:
        variant: ``trained`` or ``served``, see :mod:`vila_m3_common.prompts`.
        point_note: what to tell a user of points about the weights; None when there is nothing to tell.
        new_classes: see :func:`.labels.read_new_classes`.
    """

    def __init__(
        self, variant: Variant = "trained", point_note: str | None = None, new_classes: NewClasses = None
    ) -> None:
        self.variant = variant
        self.point_note = point_note
        self.new_classes = new_classes

    def __call__(self, output: Mapping[str, Any]) -> ExpertResult:
        """Turn the label map of a run into text, overlays, measurements and notes.

        Args:
            output: ``pred`` (1, X, Y, Z) class ids in the geometry of the image file; ``request`` (JSON);
                ``label_prompt`` (JSON list of the prompted ids; empty for points without a class).
        """
        request = ExpertRequest.from_json(output["request"])
        labels = np.asarray(output["pred"].cpu())[0].astype(np.uint8)
        volume = load_volume(request.image_paths[0])
        prompted = json.loads(output["label_prompt"]) or [MARKED_OBJECT]
        names = spoken_names(prompted, self.new_classes)
        view = view_segmentation(
            labels=labels,
            volume=volume,
            grey_volume=window_ct(volume.array),
            names=names,
            request=request,
            title="VISTA3D",
            findings=tumor_names(),
            is_ct=True,
        )
        pairs = [(color, names[label]) for label, color in view.colors.items() if label in names]
        return ExpertResult(
            text=ct_feedback(pairs, request.question, self.variant),
            images=(view.picture,),
            overlay_path=view.overlay_path,
            label_map_path=view.label_map_path,
            legend=merge_legend(pairs),
            measurements=view.measurements,
            notes=[*view.notes, *_missing(prompted, names, view), *self._point_notes(output)],
        )

    def _point_notes(self, output: Mapping[str, Any]) -> list[str]:
        return [self.point_note] if self.point_note and output.get("clicks") else []


def merge_legend(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return colour -> structures; colours repeat after 16, so one may stand for several, joined by commas."""
    legend: dict[str, list[str]] = defaultdict(list)
    for color, name in pairs:
        legend[color].append(name)
    return {color: ", ".join(names) for color, names in legend.items()}


def _missing(prompted: Sequence[int], names: Mapping[int, str], view: SegmentationView) -> list[str]:
    """Name what was asked for and not found, which the expert turn leaves out silently: tumours, or all of a few."""
    found = {row["label"] for row in view.measurements}
    tumors = label_table().tumors
    missing = [label for label in prompted if label not in found and (label in tumors or len(prompted) < FEW)]
    return [f"No {names[label]} was found in the volume." for label in missing]
