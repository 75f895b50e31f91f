"""The smallest drop that a paired comparison of so many samples can find, before or after it is made."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from assay.errors import InputError

POWER = 0.8
"""The probability with which a drop of the smallest detectable size is found."""
LEAST_ALPHA = 0.001
"""A permutation test's p-value is made of 10,000 patterns and goes no lower than a fraction of this."""


def require_samples(n: int, alpha: float, comparisons: int = 2) -> None:
    """Refuses what could show no drop, however great: a guard that can't fail guards nothing.

    Raises:
        InputError: for an alpha outside [`LEAST_ALPHA`, 0.5), or too few samples.
    """
    if not LEAST_ALPHA <= alpha < 0.5:
        raise InputError(f"alpha must lie between {LEAST_ALPHA} and 0.5, got {alpha}.")
    least = math.ceil(math.log2(comparisons / alpha))
    if n < least:
        raise InputError(
            f"{n} samples can't show a drop at alpha = {alpha:g}, even if all of them fall: compare at least {least}."
        )


def detectable_flips(n: int, standing: float, rising: float, level: float) -> float | None:
    """The smallest drop that McNemar's exact one-sided test finds with probability `POWER`, exactly.

    Each of n samples falls with probability drop + rising and rises with probability rising, independently.

    Args:
        standing: the share that can fall at all; None is returned where even its loss is found too seldom.
    """
    disagree = np.arange(n + 1)
    needed = stats.binom.isf(level, disagree, 0.5) + 1  # falls among so many that differ

    def power(drop: float) -> float:
        falling = rising + drop
        if falling + rising <= 0:
            return 0.0
        found = stats.binom.sf(needed - 1, disagree, falling / (falling + rising))
        return float(stats.binom.pmf(disagree, n, min(1.0, falling + rising)) @ found)

    return _smallest(power, max(0.0, min(standing, 1 - rising) - rising))


def detectable_shift(before: NDArray[np.float64], after: NDArray[np.float64], level: float) -> float | None:
    """About the smallest drop of the mean that the permutation test finds with probability `POWER`.

    By the normal approximation: samples that fall lose the mean score of those standing, beside differences between
    samples as great as those seen here.
    """
    standing = before[before > 0]
    if not standing.size:
        return None
    squared = float(stats.norm.isf(level) + stats.norm.isf(1 - POWER)) ** 2
    lost, noise, n = float(standing.mean()), float((before - after).var()), len(before)
    drop = (squared * lost + math.sqrt((squared * lost) ** 2 + 4 * n * squared * noise)) / (2 * n)
    return drop if drop <= before.mean() else None


def _smallest(power: Callable[[float], float], most: float) -> float | None:
    if power(most) < POWER:
        return None
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high
