"""Bootstrap intervals and a paired permutation test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REPLICATES = 2000


def bootstrap_interval(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean, resampling whole groups (patients).

    Args:
        values: one score per question.
        groups: who each question belongs to; questions of one patient are drawn together.
        seed: of the draws.

    Raises:
        ValueError: if there are no values, or one is not finite.
    """
    scores = _checked(values)
    _, members = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(members, weights=scores)
    counts = np.bincount(members)
    draws = np.random.default_rng(seed).integers(0, len(sums), (REPLICATES, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def permutation_p_value(first: Sequence[float], second: Sequence[float], groups: Sequence[str], seed: int = 0) -> float:
    """Return the two-sided p-value of the paired difference of two runs: signs flipped by group, 10,000 times."""
    differences = _checked(first) - _checked(second)
    _, members = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(members, weights=differences)
    generator = np.random.default_rng(seed)
    count = 0
    for _ in range(10):
        signs = generator.choice((-1.0, 1.0), (1000, len(sums)))
        count += int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return (count + 1) / 10001


def _checked(values: Sequence[float]) -> np.ndarray:
    scores = np.asarray(values, dtype=float)
    if not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{len(scores)} scores, {int((~np.isfinite(scores)).sum())} of them not finite")
    return scores
