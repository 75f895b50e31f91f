from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from assay import bounds
from assay.errors import InputError

ALPHA = 0.001
counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def _upper_tail(k: int, n: int, p: float) -> Fraction:
    """P(Bin(n, p) >= k) in exact arithmetic."""
    hit = Fraction(p)
    return sum((math.comb(n, j) * hit**j * (1 - hit) ** (n - j) for j in range(k, n + 1)), start=Fraction(0))


@pytest.mark.parametrize(("draws", "largest"), [(100, 1.50), (1000, 2.46), (10_000, 3.20), (100_000, 3.81)])
def test_largest_radius(draws: int, largest: float) -> None:
    radius = float(bounds.radius(bounds.lower_bound(draws, draws, ALPHA), 1.0))
    assert radius == pytest.approx(largest, abs=0.006)
    assert radius <= stats.norm.ppf(ALPHA ** (1 / draws))
    assert float(bounds.radius(bounds.lower_bound(draws, draws, ALPHA), 0.25)) == pytest.approx(radius / 4)


def test_lower_bound_at_the_ends() -> None:
    draws = np.array([1, 10, 10**5, 10**9])
    assert (bounds.lower_bound(0, draws, ALPHA) == 0).all()
    assert (bounds.upper_bound(draws, draws, ALPHA) == 1).all()
    exact = ALPHA ** (1 / draws)
    low = bounds.lower_bound(draws, draws, ALPHA)
    assert (low < exact).all()
    np.testing.assert_allclose(1 - low, -np.expm1(math.log(ALPHA) / draws), rtol=1e-6)
    np.testing.assert_allclose(bounds.upper_bound(0, draws, ALPHA), -np.expm1(math.log(ALPHA) / draws), rtol=2e-9)


@given(counts, st.sampled_from([0.05, 0.001, 1e-6]))
def test_bounds_agree_with_scipy(count: tuple[int, int], alpha: float) -> None:
    k, n = count
    test = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact")
    assert float(bounds.lower_bound(k, n, alpha)) == pytest.approx(test.low, rel=1e-7, abs=2e-9)
    test = stats.binomtest(k, n, alternative="less").proportion_ci(1 - alpha, method="exact")
    assert float(bounds.upper_bound(k, n, alpha)) == pytest.approx(test.high, rel=1e-7)


@pytest.mark.parametrize(("k", "n"), [(1, 5), (3, 5), (5, 5), (1, 60), (30, 60), (59, 60), (60, 60), (99, 100)])
@pytest.mark.parametrize("alpha", [0.5, 0.001, 1e-9])
def test_bounds_are_sound_in_exact_arithmetic(k: int, n: int, alpha: float) -> None:
    low = float(bounds.lower_bound(k, n, alpha))
    assert _upper_tail(k, n, low) <= Fraction(alpha)
    assert _upper_tail(k, n, low + 2e-9) > Fraction(alpha), "no lower than it says"
    # P(Bin(n, p) <= n - k) at the upper bound for n - k hits
    misses = 1 - _upper_tail(n - k + 1, n, float(bounds.upper_bound(n - k, n, alpha)))
    assert misses <= Fraction(alpha)


@given(counts, st.sampled_from([0.3, 0.001]))
def test_bounds_mirror_each_other_and_grow_with_the_hits(count: tuple[int, int], alpha: float) -> None:
    k, n = count
    low, high = float(bounds.lower_bound(k, n, alpha)), float(bounds.upper_bound(k, n, alpha))
    assert 0 <= low <= k / n <= high <= 1
    assert low == pytest.approx(1 - float(bounds.upper_bound(n - k, n, alpha)), abs=1e-15)
    assert float(bounds.lower_bound(k + 1, n + 1, alpha)) >= low
    assert float(bounds.lower_bound(k, n + 1, alpha)) <= low
    assert float(bounds.lower_bound(k, n, alpha / 2)) <= low


def test_bounds_are_vectorised() -> None:
    hits = np.arange(51)
    together = bounds.lower_bound(hits[:, None], [50, 80], ALPHA)
    assert together.shape == (51, 2)
    assert together[17, 1] == bounds.lower_bound(17, 80, ALPHA)
    assert bounds.lower_bound(np.array([], dtype=np.int64), 10, ALPHA).shape == (0,)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.999])
def test_coverage_by_exact_sums(p: float) -> None:
    for n in (10, 100, 1000):
        hits = np.arange(n + 1)
        wrong = bounds.lower_bound(hits, n, 0.05) > p
        assert stats.binom.pmf(hits, n, p) @ wrong <= 0.05


def test_radius_of_a_half_space() -> None:
    """P(x + noise behind the plane) = Phi(distance / sigma): the radius is the distance."""
    distance = np.array([0.1, 0.5, 1.0])
    radius = bounds.radius(special.ndtr(distance / 0.25), 0.25)
    assert (radius <= distance).all()
    np.testing.assert_allclose(radius, distance, rtol=1e-9)


def test_an_abstention_never_counts_as_certified() -> None:
    radius = bounds.radius([0.0, 0.4, 0.5, np.nextafter(0.5, 0)], 0.5)
    assert (radius == bounds.ABSTAIN).all()
    for r in (0.0, 0.25):
        assert not (radius > r).any()
        assert not (radius >= r).any()
        assert not (~(radius < r)).any(), "NaN would"
    assert bounds.radius(np.nextafter(0.5, 1), 0.5) > 0


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.floats(1e-3, 10))
def test_radius_grows_with_the_bound(p: float, q: float, sigma: float) -> None:
    low, high = sorted((p, q))
    assert bounds.radius(low, sigma) <= bounds.radius(high, sigma)


def test_two_class_radius() -> None:
    # with p_B = 1 - p_A both forms agree; a smaller runner-up certifies more, a larger bound is capped
    one = float(bounds.radius(0.8, 0.5))
    assert float(bounds.two_class_radius(0.8, 0.2, 0.5)) == pytest.approx(one)
    assert float(bounds.two_class_radius(0.8, 0.9, 0.5)) == pytest.approx(one)
    closed = 0.25 * (special.ndtri(0.8) - special.ndtri(0.05))
    two = float(bounds.two_class_radius(0.8, 0.05, 0.5))
    assert one < two <= closed
    assert two == pytest.approx(closed)
    # below one half, but ahead of everybody else
    assert bounds.radius(0.4, 0.5) == bounds.ABSTAIN
    assert bounds.two_class_radius(0.4, 0.3, 0.5) == pytest.approx(0.25 * (special.ndtri(0.4) - special.ndtri(0.3)))
    assert (bounds.two_class_radius([0.3, 0.3, 0.0, 0.0], [0.3, 0.6, 1.0, 1e-9], 0.5) == bounds.ABSTAIN).all()


def test_the_largest_other_count_bounds_every_other_class() -> None:
    """Exactly, for a trinomial: p_A's or any other class's bound fails with probability at most alpha."""
    p, n, alpha = (0.5, 0.26, 0.24), 40, 0.05
    failure = 0.0
    for a in range(n + 1):
        b = np.arange(n - a + 1)
        mass = stats.multinomial.pmf(np.stack([np.full_like(b, a), b, n - a - b], -1), n, p)
        low = bounds.lower_bound(a, n, alpha / 2)
        other = bounds.upper_bound(np.maximum(b, n - a - b), n, alpha / 2)
        failure += float(mass @ ((low > p[0]) | (other < p[1])))
    assert failure <= alpha


def test_floor_radius_never_rounds_up() -> None:
    assert bounds.floor_radius([0.2999999, 0.25, 0.0, bounds.ABSTAIN]).tolist() == [0.299, 0.25, 0.0, -math.inf]
    values = np.random.Generator(np.random.PCG64(0)).uniform(0, 4, 10_000)
    for digits in (0, 3, 12):
        floored = bounds.floor_radius(values, digits)
        assert (floored <= values).all()
        assert (values - floored < 1.01 * 10.0**-digits).all()


@given(st.lists(st.integers(0, 60), min_size=2, max_size=5).filter(any), st.sampled_from([0.05, 0.001]))
def test_predict_agrees_with_scipy(votes: list[int], alpha: float) -> None:
    second, first = sorted(votes)[-2:]
    clear = stats.binomtest(first, first + second, 0.5).pvalue <= alpha
    assert int(bounds.predict(votes, alpha)) == (votes.index(first) if clear else bounds.NO_CLASS)


def test_predict_is_vectorised() -> None:
    votes = np.array([[[100, 0, 0], [0, 5, 95]], [[50, 50, 0], [40, 60, 0]]])
    assert bounds.predict(votes, ALPHA).tolist() == [[0, 2], [-1, -1]]


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [20, 200, 2000])
def test_bernstein_covers_bernoulli_scores(p: float, n: int) -> None:
    ones = np.arange(n + 1)
    bound = bounds.bernstein_lower_bound(ones, ones, n, 0.05)
    assert stats.binom.pmf(ones, n, p) @ (bound > p) <= 0.05
    assert (bound <= bounds.lower_bound(ones, n, 0.05) + 1e-12).all(), "nothing beats the exact bound on counts"


def test_bernstein_closed_form() -> None:
    scores = np.random.Generator(np.random.PCG64(0)).beta(8, 2, size=(3, 5000))
    bound = bounds.bernstein_lower_bound(scores.sum(1), (scores**2).sum(1), 5000, ALPHA)
    log_term = math.log(2 / ALPHA)
    expected = scores.mean(1) - np.sqrt(2 * scores.var(1, ddof=1) * log_term / 5000) - 7 * log_term / (3 * 4999)
    np.testing.assert_allclose(bound, expected, atol=2e-9)
    assert (bound < expected).all()
    # scores of little spread are bounded far better than as votes of the same mean
    assert (bound > bounds.lower_bound(4000, 5000, ALPHA)).any()
    # equal scores have no variance, and rounding must not make it negative
    assert bounds.bernstein_lower_bound(700.0, 490.0, 1000, ALPHA) == pytest.approx(0.7 - 7 * log_term / (3 * 999))


@pytest.mark.parametrize(("m", "wrong"), [(500, 4), (10_000, 21), (0, 0)])
def test_dataset_confidence(m: int, wrong: int) -> None:
    assert bounds.wrong_at_most(m, ALPHA) == wrong
    assert bounds.dataset_confidence([m, wrong // 2], m, ALPHA).tolist() == [m - wrong, 0]
    assert stats.binom.sf(wrong, max(m, 1), ALPHA) <= 0.001


@settings(max_examples=30)
@given(st.integers(1, 2000), st.sampled_from([0.001, 0.01, 0.2]), st.sampled_from([0.9, 0.999]))
def test_wrong_at_most_is_the_quantile(m: int, alpha: float, level: float) -> None:
    wrong = bounds.wrong_at_most(m, alpha, level=level)
    assert stats.binom.cdf(wrong, m, alpha) >= level * (1 - 1e-12)
    assert wrong == 0 or stats.binom.cdf(wrong - 1, m, alpha) < level


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bounds.lower_bound(11, 10, ALPHA), "hits first"),
        (lambda: bounds.lower_bound(-1, 10, ALPHA), "0 <= hits"),
        (lambda: bounds.lower_bound([3, 4], [10, 0], ALPHA), "4 of 0"),
        (lambda: bounds.lower_bound([1, 2, 3], [10, 20], ALPHA), "broadcast"),
        (lambda: bounds.lower_bound(0.9, 1, ALPHA), "raw counts"),
        (lambda: bounds.lower_bound(True, 1, ALPHA), "raw counts"),
        (lambda: bounds.upper_bound(5, 10, 0.0), "alpha"),
        (lambda: bounds.upper_bound(5, 10, math.nan), "alpha"),
        (lambda: bounds.radius(1.0, 0.25), "not the rate"),
        (lambda: bounds.radius(math.nan, 0.25), "p_lower"),
        (lambda: bounds.radius(0.9, 0.0), "sigma"),
        (lambda: bounds.radius(0.9, [0.25, math.inf]), "sigma"),
        (lambda: bounds.two_class_radius(0.9, 0.0, 0.25), "p_other"),
        (lambda: bounds.floor_radius(math.nan), "ABSTAIN"),
        (lambda: bounds.floor_radius(0.1, 13), "digits"),
        (lambda: bounds.predict([5], ALPHA), "two classes"),
        (lambda: bounds.predict([[5, 1], [0, 0]], ALPHA), "draw before"),
        (lambda: bounds.predict([5, -1], ALPHA), "non-negative"),
        (lambda: bounds.bernstein_lower_bound(1.0, 1.0, 1, ALPHA), "at least 2"),
        (lambda: bounds.bernstein_lower_bound(11.0, 11.0, 10, ALPHA), "scores in"),
        (lambda: bounds.bernstein_lower_bound(5.0, 2.0, 10, ALPHA), "scores in"),
        (lambda: bounds.bernstein_lower_bound(math.nan, 2.0, 10, ALPHA), "scores in"),
        (lambda: bounds.dataset_confidence(11, 10, ALPHA), "0 to m = 10"),
        (lambda: bounds.dataset_confidence(5, 10, ALPHA, level=1.0), "level"),
        (lambda: bounds.wrong_at_most(-1, ALPHA), "m:"),
    ],
)
def test_bad_input(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "expected" in str(caught.value)
