"""The hooks that make the classifier an expert of VILA-M3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.prompts import CXR_FINDINGS, CXR_TRAINED_ORDER, Variant, cxr_feedback, spoken

from .calibration import Calibration
from .figure import draw_scores
from .network import CxrEnsemble
from .suitability import find_doubts


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
        calibration: moves each finding's threshold to 0.5 and knows which scores are uncertain; None takes the
            scores as they are.
        vlm_reads_uncertain: whether the VLM was trained on the word ``uncertain``. Otherwise an uncertain finding is
            reported to it as yes or no, and the user is told.
    """

    def __init__(
        self,
        network: CxrEnsemble,
        variant: Variant = "trained",
        calibration: Calibration | None = None,
        vlm_reads_uncertain: bool = False,
    ) -> None:
        if variant not in ("trained", "served"):
            raise UserError(f"unknown feedback_variant {variant!r}; valid: trained, served")
        self.network = network
        self.variant: Variant = variant
        self.calibration = calibration
        self.vlm_reads_uncertain = vlm_reads_uncertain

    def __call__(self, output: Mapping[str, Any]) -> ExpertResult:
        """Return text, scores, the bar chart, and notes about what the scores do not tell.

        Args:
            output: ``pred``, ``(18,)`` scores in 0..1, and ``request``, the JSON of the request.
        """
        request = ExpertRequest.from_json(output["request"])
        raw = torch.as_tensor(output["pred"]).detach().cpu().double().numpy().reshape(1, -1)
        values = self.calibration.decide(raw)[0] if self.calibration else raw[0]
        uncertain = self.calibration.uncertain(raw)[0] if self.calibration else []
        by_head = dict(zip(CXR_FINDINGS, values.tolist(), strict=True))
        scores = {finding: by_head[finding] for finding in CXR_TRAINED_ORDER}
        untrained = self.network.untrained_findings
        chart_path = request.file("_scores.png")
        draw_scores(scores, untrained, "CXR: scores, 0.5 is the threshold").save(chart_path)
        told = uncertain if self.vlm_reads_uncertain else ()
        return ExpertResult(
            text=cxr_feedback(scores, request.question, self.variant, told),
            overlay_path=chart_path,
            scores=scores,
            measurements=self._probabilities(raw, uncertain),
            notes=[*doubt_notes(request.image_paths[0]), *untrained_notes(untrained), *uncertain_notes(uncertain)],
        )

    def _probabilities(self, raw: np.ndarray, uncertain: Sequence[str]) -> list[dict[str, Any]]:
        if self.calibration is None:
            return []
        by_head = dict(zip(CXR_FINDINGS, self.calibration.probabilities(raw)[0].tolist(), strict=True))
        return [
            {
                "name": spoken(finding),
                "probability": round(by_head[finding], 4),
                "threshold": round(fitted.threshold, 4),
                "is_uncertain": finding in uncertain,
            }
            for finding, fitted in self.calibration.findings.items()
        ]


def doubt_notes(path: str) -> list[str]:
    """Return one sentence if the file may be no frontal chest X-ray."""
    doubts = find_doubts(path)
    return [f"The scores hold for frontal chest X-rays only, but {'; '.join(doubts)}."] if doubts else []


def uncertain_notes(uncertain: Sequence[str]) -> list[str]:
    """Return one sentence that names the findings whose probability lies in their uncertain band."""
    if not uncertain:
        return []
    names = ", ".join(map(spoken, uncertain))
    return [f"Uncertain by the calibration, whatever the answer says: {names}."]


def untrained_notes(untrained: tuple[str, ...]) -> list[str]:
    """Return one sentence that names the findings without a trained head, or nothing."""
    if not untrained:
        return []
    names = ", ".join(map(spoken, untrained))
    return [
        f"The loaded weights have no trained and calibrated head for {names}; a 'no' there is only a missing answer."
    ]
