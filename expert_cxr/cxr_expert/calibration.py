"""Calibration of the findings: from a network's score to a probability, and to yes, no or uncertain.

Per finding and on a labelled set, a temperature (with a bias) or an isotonic curve is fitted, a threshold is chosen
and a band of uncertainty around it is stated. Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve

from vila_m3_common.errors import UserError
from vila_m3_common.prompts import CXR_FINDINGS

from .network import CxrEnsemble, normalize_operating_point

logger = logging.getLogger(__name__)

Method = Literal["temperature", "isotonic"]
# Keeps the logit of a score of 0 or 1 finite.
_EDGE = 1e-12
BIN_COUNT = 10


@dataclass(frozen=True)
class FindingCalibration:
    """What was fitted for one finding.

    Args:
        method: how it was fitted.
        threshold: probability above which the finding is present.
        band: probabilities between which the finding is uncertain.
        slope: 1 / temperature, by which the score's logit is multiplied.
        bias: is added to that logit.
        curve: for an isotonic fit, points ``(score, probability)`` with rising scores, interpolated between.
    """

    method: Method
    threshold: float
    band: tuple[float, float]
    slope: float = 1.0
    bias: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """Map ``(N,)`` scores in 0..1 to probabilities."""
        if self.method == "isotonic":
            known, values = np.array(self.curve).T
            return np.interp(scores, known, values)
        return _sigmoid(self.slope * _logit(scores) + self.bias)


class Calibration:
    """The calibration of an ensemble; findings without one keep their score and the threshold 0.5.

    Args:
        findings: finding -> what was fitted.
    """

    def __init__(self, findings: Mapping[str, FindingCalibration]) -> None:
        self.findings = dict(findings)

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Map ``(N, 18)`` scores to probabilities of the same shape."""
        probabilities = np.array(scores, dtype=np.float64)
        for finding, fitted in self.findings.items():
            column = CXR_FINDINGS.index(finding)
            probabilities[:, column] = fitted.probability(probabilities[:, column])
        return probabilities

    def decide(self, scores: np.ndarray) -> np.ndarray:
        """Map ``(N, 18)`` scores to 0..1 with each finding's threshold at 0.5, as operating points are."""
        thresholds = [self.findings[name].threshold if name in self.findings else 0.5 for name in CXR_FINDINGS]
        probabilities = torch.from_numpy(self.probabilities(scores))
        return normalize_operating_point(probabilities, torch.tensor(thresholds, dtype=torch.float64)).numpy()

    def uncertain(self, scores: np.ndarray) -> list[list[str]]:
        """Return for each of ``(N, 18)`` scores the findings whose probability lies in their band."""
        probabilities = self.probabilities(scores)
        bands = {CXR_FINDINGS.index(name): fitted.band for name, fitted in self.findings.items()}
        return [
            [CXR_FINDINGS[column] for column, (low, high) in sorted(bands.items()) if low < row[column] <= high]
            for row in probabilities
        ]


def _logit(scores: np.ndarray) -> np.ndarray:
    clipped = np.clip(scores, _EDGE, 1 - _EDGE)
    return np.log(clipped / (1 - clipped))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def fit_calibration(
    scores: np.ndarray, labels: np.ndarray, method: Method = "temperature", min_positives: int = 8, kept: float = 0.95
) -> Calibration:
    """Fit every finding with enough positives and negatives.

    Args:
        scores: ``(N, 18)`` of the network.
        labels: ``(N, 18)``, 1, 0, or NaN for unknown.
        method: ``temperature`` fits slope and bias of the score's logit by maximum likelihood, ``isotonic`` a rising
            step curve, which needs more images.
        min_positives: findings with fewer positives or fewer negatives are left as they are.
        kept: see :func:`choose_band`.

    Raises:
        UserError: if the method is unknown or no finding has enough labels.
    """
    if method not in ("temperature", "isotonic"):
        raise UserError(f"unknown calibration method {method!r}; valid: temperature, isotonic")
    findings = {}
    for column, finding in enumerate(CXR_FINDINGS):
        known = ~np.isnan(labels[:, column])
        truth, score = labels[known, column], scores[known, column]
        if min(truth.sum(), (1 - truth).sum()) < min_positives:
            continue
        fitted = fit_finding(score, truth, method, kept)
        if fitted is not None:
            findings[finding] = fitted
    if not findings:
        raise UserError(
            f"no finding could be calibrated: none has {min_positives} images with and {min_positives} without it "
            "whose scores rise with it; give more labelled images"
        )
    return Calibration(findings)


def fit_finding(score: np.ndarray, truth: np.ndarray, method: Method, kept: float = 0.95) -> FindingCalibration | None:
    """Fit one finding from ``(N,)`` scores and labels 0/1; None if its score does not rise with the label."""
    if method == "isotonic":
        isotonic = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(score, truth)
        points = zip(isotonic.X_thresholds_.tolist(), isotonic.y_thresholds_.tolist(), strict=True)
        draft = FindingCalibration("isotonic", 0.5, (0.5, 0.5), curve=tuple(points))
    else:
        regression = LogisticRegression(C=np.inf).fit(_logit(score)[:, None], truth)
        slope, bias = float(regression.coef_[0, 0]), float(regression.intercept_[0])
        draft = FindingCalibration("temperature", 0.5, (0.5, 0.5), slope, bias)
    probability = draft.probability(score)
    if draft.slope <= 0 or probability.min() == probability.max():
        return None
    threshold = choose_threshold(probability, truth)
    band = choose_band(probability, truth, threshold, kept)
    return FindingCalibration(draft.method, threshold, band, draft.slope, draft.bias, draft.curve)


def choose_threshold(probability: np.ndarray, truth: np.ndarray) -> float:
    """Return the threshold with the largest sum of sensitivity and specificity (Youden's index).

    It lies halfway between the two probabilities that it parts.
    """
    false_rate, true_rate, thresholds = roc_curve(truth, probability, drop_intermediate=False)
    lowest_yes = thresholds[int(np.argmax(true_rate - false_rate))]
    below = probability[probability < lowest_yes]
    # Inside 0..1, so that both halves of the scale around it have a width.
    return float(np.clip((lowest_yes + below.max()) / 2 if len(below) else lowest_yes / 2, _EDGE, 1 - _EDGE))


def choose_band(probability: np.ndarray, truth: np.ndarray, threshold: float, kept: float) -> tuple[float, float]:
    """Return the probabilities between which a finding is uncertain.

    Below the lower one, at most ``1 - kept`` of the positives are missed; above the upper one, at most ``1 - kept`` of
    the negatives are called present. Where both hold at the threshold itself, the band is empty.
    """
    low = float(np.quantile(probability[truth == 1], 1 - kept, method="lower"))
    high = float(np.quantile(probability[truth == 0], kept, method="higher"))
    return min(low, threshold), max(high, threshold)


def expected_calibration_error(truth: np.ndarray, probability: np.ndarray, bin_count: int = BIN_COUNT) -> float:
    """Return the mean distance of stated and true frequency over bins of equal width, weighted by their images."""
    return float(sum(share * abs(stated - true) for share, stated, true in reliability(truth, probability, bin_count)))


def reliability(truth: np.ndarray, probability: np.ndarray, bin_count: int = BIN_COUNT) -> list[tuple[float, ...]]:
    """Return ``(share of the images, mean probability, frequency of the finding)`` of every bin that holds images."""
    bins = np.minimum((probability * bin_count).astype(int), bin_count - 1)
    return [
        (float((bins == number).mean()), float(probability[bins == number].mean()), float(truth[bins == number].mean()))
        for number in np.unique(bins)
    ]


def fingerprint(network: CxrEnsemble) -> str:
    """Return a checksum of the heads of all members, which every training changes."""
    digest = hashlib.sha256()
    for name, member in network.classifiers.items():
        digest.update(name.encode())
        for parameter in list(member.parameters())[-2:]:
            digest.update(parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def save_calibration(
    calibration: Calibration, path: str | Path, network: CxrEnsemble, facts: Mapping[str, Any]
) -> Path:
    """Write a calibration as JSON.

    Args:
        calibration: what to write.
        path: the file.
        network: the ensemble that it was fitted for.
        facts: what a reader should know of the fit, such as the number of images.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    findings = {name: asdict(fitted) for name, fitted in calibration.findings.items()}
    record = {"weights": fingerprint(network), "models": list(network.classifiers), **facts, "findings": findings}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def load_calibration(path: str | Path | None, network: CxrEnsemble) -> Calibration | None:
    """Read the calibration of an ensemble; None if there is none, or if it was fitted for other weights.

    Raises:
        UserError: if the file is no calibration.
    """
    if not path or not Path(path).is_file():
        return None
    path = Path(path)
    try:
        record = json.loads(path.read_text())
        findings = {name: _finding_from(values) for name, values in record["findings"].items()}
        weights = record["weights"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no calibration ({error}); fit one with configs/calibrate.json") from error
    unknown = findings.keys() - set(CXR_FINDINGS)
    if unknown:
        raise UserError(f"{path} calibrates unknown findings {sorted(unknown)}; fit it with configs/calibrate.json")
    if weights != fingerprint(network):
        logger.warning("%s was fitted for other weights and is left out; fit it with configs/calibrate.json", path.name)
        return None
    return Calibration(findings)


def _finding_from(values: Mapping[str, Any]) -> FindingCalibration:
    curve = tuple((float(score), float(probability)) for score, probability in values["curve"])
    low, high = values["band"]
    return FindingCalibration(**{**values, "curve": curve, "band": (float(low), float(high))})


def split_groups(groups: Sequence[Any]) -> np.ndarray:
    """Return ``(N,)`` bool, True for about half of the groups; the images of a group stay together."""
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    return (np.random.default_rng(0).permutation(len(names)) % 2 == 0)[members]
