"""Intervals for the numbers in a record; thin over scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


def clopper_pearson(successes: int, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval for a binomial proportion (Clopper & Pearson 1934).

    Raises:
        ValueError: unless `0 <= successes <= n` and `n >= 1`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}.")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def mean_interval(scores: Sequence[float], *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval for the mean of per-sample scores in [0, 1].

    Scores of 0 and 1 alone are counts and get Clopper–Pearson. Expectations over draws get a
    percentile bootstrap over samples, from a fixed seed: the same scores, the same interval. A
    bootstrap of equal scores has no width; it is then the widest Clopper–Pearson interval around
    the two nearest counts, so that 200 equal scores don't look like certainty.

    Raises:
        ValueError: for no scores, or a score outside [0, 1].
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("expected at least one score, all in [0, 1].")
    if np.isin(values, (0.0, 1.0)).all():
        return clopper_pearson(int(values.sum()), values.size, confidence=confidence)
    if np.ptp(values) == 0:
        total = values[0] * values.size
        low = clopper_pearson(int(np.floor(total)), values.size, confidence=confidence)[0]
        high = clopper_pearson(int(np.ceil(total)), values.size, confidence=confidence)[1]
        return low, high
    generator = np.random.Generator(np.random.PCG64(0))
    # A multinomial over samples is the bootstrap's resampling without its index matrix.
    counts = generator.multinomial(values.size, np.full(values.size, 1 / values.size), size=RESAMPLES)
    means = counts @ values / values.size
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(min(low, values.mean())), float(max(high, values.mean()))
