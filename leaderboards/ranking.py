"""Ranks of many rows at once: whom a paired test finds significantly better than whom.

The tests are those of `assay.statistics`, with the same answers; what is gained is that thousands of rows can be
compared. Discordant samples of all deterministic pairs come from one matrix product. Of the pairs with a stochastic
row, those far from the level are decided by the normal approximation of the permutation test's distribution, and only
the rest are permuted, together where they differ on equally many samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from assay.statistics import EXACT_PAIRS, RESAMPLES

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]

LEVEL = 0.05
"""Two rows get different ranks where a paired test's p-value lies below this; no correction for many rows."""
_BLOCK, _PAIRS = 128, 8192
"""Rows and pairs compared at a time, so that no matrix grows with the square of the rows."""
_FEW = 0.04
"""A larger kurtosis means that few differences decide, too few for an approximation: those pairs are permuted."""
_MARGIN = 0.01
"""Over four standard errors of a p-value of `LEVEL` that comes from `RESAMPLES` sign patterns."""


def ranks(scores: Matrix, stochastic: Mask) -> list[int]:
    """1 + the number of rows that are significantly better, for each row.

    Args:
        scores: `(rows, n)` in [0, 1], each row's score for the same samples; 0 or 1 in rows that are not stochastic.
        stochastic: `(rows,)`; two deterministic rows are counts and get McNemar's exact test, any others the paired
            permutation test.
    """
    better = np.zeros(len(scores), dtype=np.int64)
    drawn, counted = np.nonzero(stochastic)[0], np.nonzero(~stochastic)[0]
    everybody = np.arange(len(scores))
    most, means = _most_losses(scores.shape[1]), scores.mean(axis=1)
    close: list[tuple[Indices, Indices]] = []
    for these, others in ((counted, counted), (counted, drawn), (drawn, everybody)):
        right = scores[others]
        for start in range(0, len(these) if len(others) else 0, _BLOCK):
            block = these[start : start + _BLOCK]
            # Entry [i, j]: row j has the larger mean and is to be compared with row i of the block.
            ahead = means[others][None, :] > means[block, None]
            if others is counted:
                found = ahead & _counted(scores[block], right, most)
            else:
                found, (i, j) = _permuted(scores[block], right, ahead)
                close.append((block[i], others[j]))
            better[block] += found.sum(axis=1)
    if close:
        i, j = (np.concatenate(side) for side in zip(*close, strict=True))
        np.add.at(better, i, _p_values(scores, i, j) < LEVEL)
    return [1 + int(count) for count in better]


def _most_losses(n: int) -> Indices:
    """For each number of discordant samples up to n, the most losses with which McNemar's p lies below the level."""
    return np.asarray(stats.binom.ppf(LEVEL / 2, np.arange(n + 1), 0.5) - 1, dtype=np.int64)


def _counted(left: Matrix, right: Matrix, most: Indices) -> Mask:
    """Whether McNemar's test tells rows of 0 and 1 apart."""
    # Whole numbers far below 2^24: single precision is exact, and twice as fast.
    low, high = left.astype(np.float32), right.astype(np.float32)
    common = low @ high.T
    wins = (high.sum(axis=1)[None, :] - common).astype(np.int64)
    losses = (low.sum(axis=1)[:, None] - common).astype(np.int64)
    found: Mask = losses <= most[wins + losses]
    return found


def _permuted(left: Matrix, right: Matrix, ahead: Mask) -> tuple[Mask, tuple[Indices, Indices]]:
    """Which rows that are `ahead` the permutation test surely finds better, and the pairs too close to say."""
    # Sums over samples of (a - b)^2 and (a - b)^4, from products of powers.
    (a, a2, a3), (b, b2, b3) = _powers(left), _powers(right)
    gap = b.sum(axis=1)[None, :] - a.sum(axis=1)[:, None]
    variance = np.maximum(a2.sum(axis=1)[:, None] + b2.sum(axis=1)[None, :] - 2 * (a @ b.T), 1e-12)
    z = gap / np.sqrt(variance)
    # Hoeffding: p <= 2 exp(-z^2 / 2), whatever the differences. Oleszkiewicz (1996): p >= 1/10 where z <= 1.
    found: Mask = ahead & (2 * np.exp(-(z**2) / 2) < LEVEL - _MARGIN)
    i, j = np.nonzero(ahead & ~found & (z > 1))
    if not len(i):
        return found, (i, j)
    fourth = (a2**2).sum(axis=1)[:, None] + (b2**2).sum(axis=1)[None, :] - 4 * (a3 @ b.T + a @ b3.T) + 6 * (a2 @ b2.T)
    kurtosis = fourth[i, j] / variance[i, j] ** 2
    p, error = _approximate(z[i, j], kurtosis, variance[i, j])
    close = (np.abs(p - LEVEL) <= error) | (kurtosis > _FEW)
    found[i, j] = ~close & (p < LEVEL)
    return found, (i[close], j[close])


def _powers(scores: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    return scores, scores**2, scores**3


def _approximate(z: Matrix, kurtosis: Matrix, variance: Matrix) -> tuple[Matrix, Matrix]:
    """The permutation test's p by Edgeworth's series to the fourth cumulant, and how far off it may be.

    Args:
        z: the sum of differences over the root of the sum of their squares, `variance`.
        kurtosis: the sum of fourth powers over the square of the sum of squares.
    """
    density = stats.norm.pdf(z)
    p = 2 * stats.norm.sf(z) - density * kurtosis / 6 * (z**3 - 3 * z)
    # Sums of differences that are all 1, or all 1 and 1/2, lie on a grid, and a whole point of it may fall either way.
    grid = np.where(kurtosis * variance > 0.95, 1.0, 0.5)
    return p, _MARGIN + 2 * density * grid / np.sqrt(variance) + kurtosis / 4


def _p_values(scores: Matrix, low: Indices, high: Indices) -> Matrix:
    """`assay.statistics.paired_permutation` for pairs of rows, together where they differ on equally many samples."""
    p = np.ones(len(low))
    parts = [slice(start, start + _PAIRS) for start in range(0, len(low), _PAIRS)]
    sizes = np.concatenate([(scores[high[part]] != scores[low[part]]).sum(axis=1) for part in parts] or [low])
    generator = np.random.Generator(np.random.PCG64(0))
    # Each test draws its signs row by row from the start of one stream: fewer samples take a shorter piece of it.
    stream = 2.0 * generator.integers(0, 2, size=RESAMPLES * int(sizes.max(initial=0)), dtype=np.int8) - 1
    for size in np.unique(sizes[sizes > 0]):
        alike = np.nonzero(sizes == size)[0]
        for part in (alike[start : start + _BLOCK] for start in range(0, len(alike), _BLOCK)):
            apart = scores[high[part]] - scores[low[part]]
            differences = apart[apart != 0].reshape(len(part), size)
            observed = np.abs(differences.sum(axis=1)) - 1e-9 * np.abs(differences).sum(axis=1)
            if size <= EXACT_PAIRS:
                signs = 2.0 * (np.arange(2**size)[:, None] >> np.arange(size) & 1) - 1
                p[part] = (np.abs(signs @ differences.T) >= observed).mean(axis=0)
            else:
                signs = stream[: RESAMPLES * size].reshape(RESAMPLES, size)
                p[part] = (1 + (np.abs(signs @ differences.T) >= observed).sum(axis=0)) / (RESAMPLES + 1)
    return p
