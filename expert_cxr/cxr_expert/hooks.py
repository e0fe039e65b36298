"""The hooks that make the classifier an expert of VILA-M3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.prompts import CXR_FINDINGS, CXR_TRAINED_ORDER, Variant, cxr_feedback

from .figure import draw_scores
from .network import CxrEnsemble


def expert_request(request: ExpertRequest) -> dict[str, str]:
    """Return the dataset item of a request: the path of the radiograph.

    Raises:
        UserError: if the request does not hold exactly one image.
    """
    if len(request.image_paths) != 1:
        raise UserError(f"CXR reads one frontal chest X-ray, but was given {len(request.image_paths)} images; give one")
    return {"image": request.image_paths[0]}


class CxrFeedback:
    """Turns the scores of a run into the expert turn.

    Args:
        network: the ensemble that made them; it knows which findings nobody was trained for.
        variant: ``trained`` or ``served``, see :mod:`vila_m3_common.prompts`.
    """

    def __init__(self, network: CxrEnsemble, variant: Variant = "trained") -> None:
        if variant not in ("trained", "served"):
            raise UserError(f"unknown feedback_variant {variant!r}; valid: trained, served")
        self.network = network
        self.variant: Variant = variant

    def __call__(self, output: Mapping[str, Any]) -> ExpertResult:
        """Return text, scores, the bar chart and a note about findings that have no trained head.

        Args:
            output: ``pred``, ``(18,)`` scores in 0..1, and ``request``, the JSON of the request.
        """
        request = ExpertRequest.from_json(output["request"])
        values = torch.as_tensor(output["pred"]).flatten().tolist()
        by_head = dict(zip(CXR_FINDINGS, values, strict=True))
        scores = {finding: by_head[finding] for finding in CXR_TRAINED_ORDER}
        untrained = self.network.untrained_findings
        chart_path = request.file("_scores.png")
        draw_scores(scores, untrained, "CXR: scores, 0.5 is the threshold").save(chart_path)
        return ExpertResult(
            text=cxr_feedback(scores, request.question, self.variant),
            overlay_path=chart_path,
            scores=scores,
            notes=untrained_notes(untrained),
        )


def untrained_notes(untrained: tuple[str, ...]) -> list[str]:
    """Return one sentence that names the findings without a trained head, or nothing."""
    if not untrained:
        return []
    names = ", ".join(finding.lower().replace("_", " ") for finding in untrained)
    return [
        f"The loaded weights have no trained and calibrated head for {names}; a 'no' there is only a missing answer."
    ]
