"""Paired tests against their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from assay.statistics import EXACT_PAIRS, RESAMPLES, mcnemar, paired_permutation


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (6, 0), (0, 6), (8, 3), (40, 12)])
def test_mcnemar_is_the_binomial_test_on_discordant_pairs(wins: int, losses: int) -> None:
    a = [1.0] * wins + [0.0] * losses + [1.0] * 30 + [0.0] * 30
    b = [0.0] * wins + [1.0] * losses + [1.0] * 30 + [0.0] * 30
    tail = sum(stats.binom.pmf(k, wins + losses, 0.5) for k in range(min(wins, losses) + 1))
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(a, b) == mcnemar(b, a)


@pytest.mark.parametrize("pairs", [1, 5, 6, EXACT_PAIRS])
def test_few_pairs_that_all_fall_one_way_have_an_exact_p(pairs: int) -> None:
    a = [0.5] * pairs + [0.3] * 20
    b = [0.2] * pairs + [0.3] * 20
    assert paired_permutation(a, b) == pytest.approx(2 / 2**pairs)


def test_many_pairs_agree_with_the_exact_test_of_signs() -> None:
    # Differences of one size: the permutation test is then the sign test, whose p is known.
    a = np.array([0.75] * 30 + [0.25] * 16)
    b = np.array([0.25] * 30 + [0.75] * 16)
    exact = stats.binomtest(16, 46).pvalue
    assert paired_permutation(a.tolist(), b.tolist()) == pytest.approx(exact, abs=4 * np.sqrt(exact / RESAMPLES))


def test_the_permutation_test_is_replayable_and_symmetric() -> None:
    scores = np.random.Generator(np.random.PCG64(3)).uniform(size=(2, 200))
    a, b = scores.tolist()
    assert paired_permutation(a, b) == paired_permutation(a, b) == paired_permutation(b, a)


def test_p_is_one_without_a_difference_and_never_zero() -> None:
    assert paired_permutation([0.1, 0.9], [0.1, 0.9]) == 1
    assert mcnemar([1, 0], [1, 0]) == 1
    assert paired_permutation([1.0] * 100, [0.0] * 100) == pytest.approx(1 / (RESAMPLES + 1))


@pytest.mark.parametrize("test", [mcnemar, paired_permutation])
@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 0.0])])
def test_unequal_or_empty_lists_are_refused(test: object, a: list[float], b: list[float]) -> None:
    assert callable(test)
    with pytest.raises(ValueError, match="equally long"):
        test(a, b)


def test_mcnemar_refuses_expectations() -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5], [1.0])
