from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from assay.statistics import EXACT_PAIRS, clopper_pearson, mcnemar, mean_interval, paired_permutation


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95]))
def test_clopper_pearson_is_the_beta_quantiles(counts: tuple[int, int], confidence: float) -> None:
    k, n = counts
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, k, n - k + 1) if k else 0.0
    high = beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0
    assert clopper_pearson(k, n, confidence=confidence) == pytest.approx((low, high), abs=1e-9)


def test_clopper_pearson_of_the_textbook() -> None:
    assert clopper_pearson(0, 10) == pytest.approx((0, 1 - 0.025 ** (1 / 10)))
    assert clopper_pearson(10, 10) == pytest.approx((0.025 ** (1 / 10), 1))


@pytest.mark.parametrize("n", [1, 2, 5, 13, 30])
def test_clopper_pearson_covers_at_least_as_often_as_it_says(n: int) -> None:
    intervals = np.array([clopper_pearson(k, n) for k in range(n + 1)])
    for p in np.linspace(0.01, 0.99, 99):
        holds = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
        assert binom.pmf(np.arange(n + 1), n, p)[holds].sum() >= 0.95


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_clopper_pearson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"got {k} of {n}"):
        clopper_pearson(k, n)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_counts_get_clopper_pearson(scores: list[float]) -> None:
    assert mean_interval(scores) == clopper_pearson(int(sum(scores)), len(scores))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_an_interval_holds_its_mean_and_stays_in_the_unit_interval(scores: list[float]) -> None:
    low, high = mean_interval(scores)
    assert 0 <= low <= np.mean(scores) + 1e-12
    assert np.mean(scores) - 1e-12 <= high <= 1


def test_the_bootstrap_is_deterministic_and_touches_no_global_generator() -> None:
    scores = np.linspace(0, 1, 50).tolist()
    np.random.seed(3)  # noqa: NPY002 (the global generator is what is watched)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert mean_interval(scores) == mean_interval(scores)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_the_bootstrap_agrees_with_the_normal_approximation() -> None:
    scores = np.random.default_rng(1).uniform(0, 1, 400)
    error = 1.96 * scores.std() / 20
    assert mean_interval(scores.tolist()) == pytest.approx((scores.mean() - error, scores.mean() + error), abs=0.003)


@pytest.mark.parametrize("n", [1, 3, 200])
def test_equal_scores_are_no_certainty(n: int) -> None:
    low, high = mean_interval([0.55] * n)
    assert low == pytest.approx(clopper_pearson(int(np.floor(0.55 * n)), n)[0], abs=1e-9)
    assert high == pytest.approx(clopper_pearson(int(np.ceil(0.55 * n)), n)[1], abs=1e-9)
    assert low < 0.55 < high


@pytest.mark.parametrize("scores", [[], [0.5, 1.1], [-0.1], [float("nan")]])
def test_mean_interval_refuses_what_is_no_score(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        mean_interval(scores)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_a_fair_coin_on_the_samples_that_differ(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    wins, losses = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    n = wins + losses
    tail = sum(comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_refuses_expectations() -> None:
    with pytest.raises(ValueError, match="paired_permutation"):
        mcnemar([0.5, 1], [0, 1])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=7))
def test_few_pairs_are_permuted_exactly(pairs: list[tuple[int, int]]) -> None:
    differences = [a - b for a, b in pairs]
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(pairs))]  # fmt: skip
    exact = sum(value >= abs(sum(differences)) for value in sums) / len(sums)
    assert paired_permutation([a / 20 for a, _ in pairs], [b / 20 for _, b in pairs]) == pytest.approx(exact)


def test_many_pairs_are_sampled_deterministically_and_never_give_zero() -> None:
    better, worse = [0.9] * 100, [0.1] * 100
    assert 0 < paired_permutation(better, worse) < 1e-3
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 4 * EXACT_PAIRS))
    assert paired_permutation(a, b) == paired_permutation(a, b)


def test_the_permutation_test_holds_its_level() -> None:
    rng = np.random.default_rng(5)
    small = [paired_permutation(*rng.integers(0, 21, size=(2, 10)) / 20) <= 0.05 for _ in range(400)]
    assert binom.sf(sum(small) - 1, 400, 0.05) > 1e-3


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="equally long"):
        paired_permutation([0, 1], [0])
    with pytest.raises(ValueError, match="equally long"):
        mcnemar([], [])
