"""Scores with bootstrap intervals, and paired comparisons of two runs.

Every score is a :class:`Measure`: a function of how much each question counts. A bootstrap replicate counts some
patients twice and others not at all; a permutation counts, question by question, one run's answer or the other's. So
one interface serves means, F1, corpus BLEU and ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sklearn.metrics import roc_auc_score

REPLICATES = 2000
PERMUTATIONS = 10_000
# Replicates at once; bounds the memory that weights of many questions take.
_CHUNK = 200


class Measure(Protocol):
    """A score of a list of questions."""

    @property
    def count(self) -> int:
        """Number of questions that count."""

    def evaluate(self, weights: np.ndarray) -> np.ndarray:
        """Return the score for each row of weights, ``(R, questions)`` to ``(R,)``; NaN where it is undefined."""

    def join(self, other: Any) -> Measure:
        """Return the measure over this run's questions followed by another run's."""


@dataclass(frozen=True)
class SumMeasure:
    """A score that depends on sums over questions alone, such as a mean, F1 or corpus BLEU.

    Args:
        parts: ``(questions, parts)``, what each question adds.
        combine: ``(R, parts)`` sums to ``(R,)`` scores.
        count: number of questions that count.
    """

    parts: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    count: int

    def evaluate(self, weights: np.ndarray) -> np.ndarray:
        """See :class:`Measure`."""
        return self.combine(weights @ self.parts)

    def join(self, other: SumMeasure) -> SumMeasure:
        """See :class:`Measure`."""
        return SumMeasure(np.vstack([self.parts, other.parts]), self.combine, self.count + other.count)


@dataclass(frozen=True)
class AurocMeasure:
    """The area under the ROC curve, averaged over findings; ties count half.

    Args:
        truths: ``(questions,)``, 0 or 1.
        scores: ``(questions,)``, higher means more likely present.
        strata: ``(questions,)``, the finding of each question; one that is all present or all absent is left out.
    """

    truths: np.ndarray
    scores: np.ndarray
    strata: np.ndarray

    @property
    def count(self) -> int:
        """See :class:`Measure`."""
        return len(self.truths)

    def evaluate(self, weights: np.ndarray) -> np.ndarray:
        """See :class:`Measure`."""
        return np.array([self._one(row) for row in weights])

    def _one(self, weights: np.ndarray) -> float:
        areas = []
        for stratum in np.unique(self.strata):
            chosen = (self.strata == stratum) & (weights > 0)
            if 0 < self.truths[chosen].sum() < chosen.sum():
                areas.append(roc_auc_score(self.truths[chosen], self.scores[chosen], sample_weight=weights[chosen]))
        return float(np.mean(areas)) if areas else float("nan")

    def join(self, other: AurocMeasure) -> AurocMeasure:
        """See :class:`Measure`."""
        pairs = ((self.truths, other.truths), (self.scores, other.scores), (self.strata, other.strata))
        return AurocMeasure(*(np.concatenate(pair) for pair in pairs))


def mean_measure(values: Sequence[float], counted: Sequence[bool] | None = None) -> SumMeasure:
    """Return the mean of one value per question, over those that are counted (all by default).

    Raises:
        ValueError: if there are no values, or one is not finite.
    """
    scores = _checked(values)
    chosen = np.ones(len(scores)) if counted is None else np.asarray(counted, dtype=float)
    return SumMeasure(np.stack([scores * chosen, chosen], axis=1), _mean, int(chosen.sum()))


def _mean(sums: np.ndarray) -> np.ndarray:
    return divide(sums[:, 0], sums[:, 1])


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; 0/0 is NaN without a warning."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator / denominator)


def value_of(measure: Measure) -> float:
    """Return the score in which every question counts once."""
    return float(measure.evaluate(np.ones((1, _length(measure))))[0])


def _length(measure: Measure) -> int:
    return len(measure.parts) if isinstance(measure, SumMeasure) else measure.count


def measure_interval(measure: Measure, groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a score, resampling whole groups (patients).

    Args:
        measure: the score.
        groups: who each question belongs to; questions of one patient are drawn together.
        seed: of the draws.
    """
    members, count = _members(groups)
    score = _by_group(measure, members, count)
    return _percentiles(np.concatenate([score(chunk) for chunk in _draw_groups(count, seed)]))


def _members(groups: Sequence[str]) -> tuple[np.ndarray, int]:
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    return members, len(names)


def _by_group(measure: Measure, members: np.ndarray, count: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the score as a function of weights of groups, ``(R, count)``; sums are added up per group once."""
    if not isinstance(measure, SumMeasure):
        return lambda weights: measure.evaluate(weights[:, members])
    parts = np.zeros((count, measure.parts.shape[1]))
    np.add.at(parts, members, measure.parts)
    return SumMeasure(parts, measure.combine, measure.count).evaluate


def _draw_groups(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each group is drawn, ``(chunk, count)``, ``REPLICATES`` rows in all."""
    generator = np.random.default_rng(seed)
    for start in range(0, REPLICATES, _CHUNK):
        draws = generator.integers(0, count, (min(_CHUNK, REPLICATES - start), count))
        offsets = np.arange(len(draws))[:, None] * count
        yield np.bincount((draws + offsets).ravel(), minlength=draws.size).reshape(draws.shape).astype(float)


def _percentiles(replicates: np.ndarray) -> tuple[float, float]:
    if np.isnan(replicates).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(replicates, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same questions.

    Args:
        first: score of the first run.
        second: score of the second.
        difference: second minus first.
        interval: 95 % bootstrap interval of the difference.
        p_value: two-sided, of the paired permutation test.
        count: number of questions.
    """

    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    count: int


def compare(
    first: Measure, second: Measure, groups: Sequence[str], seed: int = 0, permutations: int = PERMUTATIONS
) -> Comparison:
    """Compare two runs; ``groups[i]`` is whose question ``i`` of both is.

    The permutation test exchanges the two runs' answers, a patient at a time: if the runs did not differ, every
    exchange would be as likely as what was seen.
    """
    members, count = _members(groups)
    # The second run's questions are groups of their own, so that a weight chooses between the two runs.
    score = _by_group(first.join(second), np.concatenate([members, members + count]), 2 * count)
    unused, once = np.zeros((1, count)), np.ones((1, count))
    values = score(np.vstack([np.hstack([once, unused]), np.hstack([unused, once])]))
    difference = float(values[1] - values[0])
    draws = []
    for chunk in _draw_groups(count, seed):
        none = np.zeros_like(chunk)
        draws.append(score(np.hstack([none, chunk])) - score(np.hstack([chunk, none])))
    p_value = _exchange(score, count, difference, seed, permutations)
    interval = _percentiles(np.concatenate(draws))
    return Comparison(float(values[0]), float(values[1]), difference, interval, p_value, first.count)


def _exchange(
    score: Callable[[np.ndarray], np.ndarray], count: int, difference: float, seed: int, permutations: int
) -> float:
    if np.isnan(difference):
        return float("nan")
    generator = np.random.default_rng(seed)
    extreme, done = 0, 0
    while done < permutations:
        size = min(_CHUNK, permutations - done)
        swapped = generator.integers(0, 2, (size, count)).astype(float)
        change = score(np.hstack([swapped, 1 - swapped])) - score(np.hstack([1 - swapped, swapped]))
        # Undefined exchanges (no positive left) count as extreme, which can only make the test more careful.
        extreme += int((~(np.abs(change) < abs(difference) - 1e-9)).sum())
        done += size
    return (extreme + 1) / (permutations + 1)


def bootstrap_interval(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean, resampling whole groups (patients).

    Args:
        values: one score per question.
        groups: who each question belongs to; questions of one patient are drawn together.
        seed: of the draws.

    Raises:
        ValueError: if there are no values, or one is not finite.
    """
    return measure_interval(mean_measure(values), groups, seed)


def score(values: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """Return ``{value, interval, count}`` of a mean, the interval at 95 %."""
    if not values:
        return {"value": None, "interval": None, "count": 0}
    return {
        "value": sum(values) / len(values),
        "interval": list(bootstrap_interval(values, groups)),
        "count": len(values),
    }


def permutation_p_value(first: Sequence[float], second: Sequence[float], groups: Sequence[str], seed: int = 0) -> float:
    """Return the two-sided p-value of the paired difference of two runs' means, exchanged by group.

    Raises:
        ValueError: if there are no values, or one is not finite.
    """
    return compare(mean_measure(first), mean_measure(second), groups, seed).p_value


def _checked(values: Sequence[float]) -> np.ndarray:
    scores = np.asarray(values, dtype=float)
    if not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{len(scores)} scores, {int((~np.isfinite(scores)).sum())} of them not finite")
    return scores
