"""The hooks that make VISTA3D an expert: request -> dataset item, run's output -> expert turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.prompts import Variant, ct_feedback
from vila_m3_common.segmentation import SegmentationView, view_segmentation
from vila_m3_common.slices import window_ct
from vila_m3_common.volumes import load_volume

from .labels import argument_ids, label_table, prompt_ids, spoken_names, tumor_names


class Vista3dRequest:
    """The ``expert_request`` hook.

    Args:
        label_prompt: class names, ids or groups for every request; overrides the request's argument.
    """

    def __init__(self, label_prompt: Any = None) -> None:
        self.label_prompt = label_prompt

    def __call__(self, request: ExpertRequest) -> dict[str, Any]:
        """Return the dataset item: ``image`` (path) and ``label_prompt`` (class ids).

        Raises:
            UserError: if the argument or the prompt is unknown, or the image is no single CT volume.
        """
        ids = argument_ids(request.argument) if self.label_prompt is None else prompt_ids(self.label_prompt)
        return {"image": _ct_path(request.image_paths), "label_prompt": ids}


def _ct_path(image_paths: Sequence[str]) -> str:
    if len(image_paths) != 1:
        raise UserError(
            f"VISTA3D reads one CT volume, but was given {len(image_paths)} images; give one file or series"
        )
    volume = load_volume(image_paths[0])
    if volume.array.ndim != 3:
        raise UserError(f"{volume.path.name} is 4-D {volume.array.shape}; VISTA3D reads one 3-D CT volume")
    return image_paths[0]


class Vista3dFeedback:
    """The ``expert_feedback`` hook.

    Args:
        variant: ``trained`` or ``served``, see :mod:`vila_m3_common.prompts`.
    """

    def __init__(self, variant: Variant = "trained") -> None:
        self.variant = variant

    def __call__(self, output: Mapping[str, Any]) -> ExpertResult:
        """Turn the label map of a run into text, overlays, measurements and notes.

        Args:
            output: ``pred`` (1, X, Y, Z) class ids in the geometry of the image file; ``request`` (JSON);
                ``label_prompt`` (JSON list of the prompted ids).
        """
        request = ExpertRequest.from_json(output["request"])
        labels = np.asarray(output["pred"].cpu())[0].astype(np.uint8)
        volume = load_volume(request.image_paths[0])
        names = spoken_names()
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
            notes=[*view.notes, *_missing_tumors(output["label_prompt"], view)],
        )


def merge_legend(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return colour -> structures; colours repeat after 16, so one may stand for several, joined by commas."""
    legend: dict[str, list[str]] = defaultdict(list)
    for color, name in pairs:
        legend[color].append(name)
    return {color: ", ".join(names) for color, names in legend.items()}


def _missing_tumors(label_prompt: str, view: SegmentationView) -> list[str]:
    """Name the tumours that were asked for and not found; the expert turn leaves them out silently."""
    found = {row["name"] for row in view.measurements}
    asked = {label_table().names[label] for label in prompt_ids(label_prompt)}
    return [f"No {name} was found in the volume." for name in tumor_names() if name in asked - found]
