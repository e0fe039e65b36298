"""One expert on one image, as a viewer asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila_m3_common.agent import refusal
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertResult, ModelCard
from vila_m3_common.standalone import request_for
from vila_m3_common.study import Study, open_study

from ..service.labels import label_rows
from .label_maps import label_info, label_names
from .models import ViewerModels

PROMPTS = ("label_prompt", "points", "point_labels")


@dataclass(frozen=True)
class Wish:
    """What a viewer asks an expert for.

    Args:
        argument: as a trigger's argument; empty for the expert's default.
        prompts: ``label_prompt``, ``points``, ``point_labels``, see :class:`vila_m3_common.expert.ExpertRequest`.
        modality: ``CT``, ``MRI`` or ``CXR`` to overrule what the image tells.
        slice_index: RAS index of the slice that notes refer to; None takes the middle.
        axis: 0 sagittal, 1 coronal, 2 axial.
    """

    argument: str = ""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    modality: str | None = None
    slice_index: int | None = None
    axis: int = 2

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Wish:
        """Read the parameters of a request; others are MONAI Label's own and are not looked at.

        Raises:
            UserError: if one of them has another type.
        """
        prompts = {name: params[name] for name in PROMPTS if params.get(name) is not None}
        return cls(
            argument=_text(params, "argument") or "",
            prompts=prompts,
            modality=_text(params, "modality"),
            slice_index=whole_number(params, "slice_index"),
            axis=2 if (axis := whole_number(params, "axis")) is None else axis,
        )


def _text(params: Mapping[str, Any], name: str) -> str | None:
    """Return a text; a list is what viewers send of an option that nobody has touched."""
    value = params.get(name)
    if value in (None, "") or isinstance(value, list):
        return None
    if not isinstance(value, str):
        raise UserError(f"{name} is {value!r}; give a text")
    return value


def whole_number(params: Mapping[str, Any], name: str) -> int | None:
    """Return a whole number of a request, None where there is none.

    Raises:
        UserError: if it is something else.
    """
    value = params.get(name)
    if value in (None, ""):
        return None
    if isinstance(value, bool) or not str(value).lstrip("-").isdigit():
        raise UserError(f"{name} is {value!r}; give a whole number")
    return int(value)


def open_for(card: ModelCard, image: str | Path, modality: str | None = None) -> Study:
    """Open an image for an expert that a user chose.

    Where nothing tells the modality it is taken as the expert's.

    Raises:
        UserError: if the image cannot be read, or is none that the expert reads.
    """
    study = open_study(image, modality)
    if study.modality == "unknown" and card.study_modality:
        study = open_study(image, card.study_modality)
    reason = refusal(card, study)
    if reason:
        raise UserError(f"{card.name} was not run: {reason}. If that is wrong, give the modality")
    return study


def run_on(models: ViewerModels, name: str, image: str | Path, wish: Wish, folder: Path) -> ExpertResult:
    """Run an expert on an image; its files go to ``folder``.

    Raises:
        UserError: if image or wish cannot be used.
    """
    with models.lock:
        card = models.expert(name).card
        message = card.unknown_argument_message(wish.argument)
        if message:
            raise UserError(message)
        study = open_for(card, image, wish.modality)
        request = request_for(study, wish.argument, wish.slice_index, wish.axis, folder, card.name.lower())
        return models.run(name, dataclasses.replace(request, prompts=dict(wish.prompts)))


def describe_result(result: ExpertResult, model: str) -> dict[str, Any]:
    """Return what a viewer is told of a result beside the label map, ready for JSON.

    ``label_names`` and ``label_info`` name the labels of the label map, and no others.
    """
    rows = label_rows(result)
    record = result.to_record()
    return {
        "label_names": label_names(rows),
        "label_info": label_info(rows, model),
        "measurements": record["measurements"],
        "notes": record["notes"],
    }


def describe_scores(result: ExpertResult, findings: Mapping[str, int]) -> dict[str, Any]:
    """Return the scores of a classification in MONAI Label's form, ready for JSON.

    Args:
        result: of the expert.
        findings: finding -> its number.
    """
    prediction = [
        {"idx": findings.get(name, number), "label": name, "score": round(score, 6)}
        for number, (name, score) in enumerate(result.scores.items())
    ]
    return {"prediction": prediction, "measurements": result.measurements, "notes": result.notes}
