"""Intervals for the numbers in a record and paired tests between records; thin over scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
EXACT_PAIRS = 12


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


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p-value of McNemar's test that two rows are equally often right.

    Args:
        a, b: 0 or 1 for each sample, the same samples in the same order. Only samples on which the
            two differ say anything (McNemar 1947); under the null they fall either way alike.

    Raises:
        ValueError: for no samples, different lengths, or anything but 0 and 1.
    """
    first, second = _paired(a, b)
    if not np.isin(first, (0.0, 1.0)).all() or not np.isin(second, (0.0, 1.0)).all():
        raise ValueError("expected 0 or 1 for each sample; expectations are compared by paired_permutation.")
    wins, losses = int((first > second).sum()), int((first < second).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def paired_permutation(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p-value of the paired permutation test that two rows' mean scores are equal.

    Under the null each sample's difference is as likely to have the other sign (Fisher 1935). All
    sign patterns are tried where there are few; otherwise `RESAMPLES` of them from a fixed seed,
    the observed one counted in, so p is never 0: the same scores, the same p.

    Args:
        a, b: a score in [0, 1] for each sample, the same samples in the same order.

    Raises:
        ValueError: for no samples, or different lengths.
    """
    first, second = _paired(a, b)
    differences = (first - second)[first != second]  # equal pairs change no pattern's sum
    if differences.size == 0:
        return 1.0
    # Sums that are equal on paper may differ in the last bits.
    observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if differences.size <= EXACT_PAIRS:
        patterns = np.arange(2**differences.size)[:, None] >> np.arange(differences.size) & 1
        return float((np.abs((2 * patterns - 1) @ differences) >= observed).mean())
    generator = np.random.Generator(np.random.PCG64(0))
    extreme = 1
    for _ in range(RESAMPLES // 1000):  # in blocks: all signs at once would be gigabytes for 10,000 samples
        signs = 2.0 * generator.integers(0, 2, size=(1000, differences.size), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return extreme / (RESAMPLES + 1)


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise ValueError(f"expected two equally long lists of scores, got {first.shape} and {second.shape}.")
    return first, second
