from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, special, stats

from assay import bounds, sequential
from assay.errors import InputError
from assay.sequential import CLAIMED, GIVEN_UP, UNDECIDED, RadiusClaims, log_e_value, log_futility, null_probability

ALPHA = 0.001
Process = Callable[[ArrayLike, ArrayLike, ArrayLike], NDArray[np.float64]]
processes = pytest.mark.parametrize("process", [log_e_value, log_futility])

# Hit rates of the samples that a smoothed CIFAR-10 network classifies rightly (20 quantiles at
# sigma = 0.25, rebuilt from the logs that Cohen et al. published); every fourth sample is wrong.
HIT_RATES = (
    0.5918, 0.6673, 0.7479, 0.8237, 0.8633, 0.9037, 0.9371, 0.963, 0.9756, 0.989,
    0.994, 0.9967, 0.9986, 0.9994, 0.9998, 1.0, 1.0, 1.0, 1.0, 1.0,
)  # fmt: skip


def _ever(process: Process, p: float, p0: float, cap: int, batch: int, level: float = ALPHA) -> tuple[float, float]:
    """Exactly, with hit rate p: the probability that the process ever reaches 1/level, and the mean draws."""
    step = stats.binom.pmf(np.arange(batch + 1), batch, p)
    alive, lowest, reached, draws = np.ones(1), 0, 0.0, 0.0
    for n in range(batch, cap + 1, batch):
        draws += batch * alive.sum()
        alive = np.convolve(alive, step)
        crossed = process(lowest + np.arange(alive.size), n, p0) >= -math.log(level) + sequential.LOG_SLACK
        reached += alive[crossed].sum()
        alive[crossed] = 0
        kept = np.flatnonzero(alive > 1e-30)  # what is dropped could add 1e-26 to `reached`
        if kept.size == 0:
            break
        alive, lowest = alive[kept[0] : kept[-1] + 1], lowest + kept[0]
    return float(reached), float(draws)


@processes
@pytest.mark.parametrize("p0", [0.5, 0.6914624612740131, 0.97, 0.9986])
def test_the_process_is_a_martingale_at_p0(process: Process, p0: float) -> None:
    """E of the next value is the value: exact for any counts, and wrong for nearly any wrong formula."""
    draws = np.array([0, 1, 7, 100, 5000, 100_000])
    rates = np.clip(p0 + np.linspace(-3, 3, 7)[:, None] * np.sqrt(p0 * (1 - p0) / np.maximum(draws, 1)), 0, 1)
    hits = np.floor(rates * draws).astype(np.int64)
    now = process(hits, draws, p0)
    after = np.logaddexp(
        math.log(p0) + process(hits + 1, draws + 1, p0), math.log1p(-p0) + process(hits, draws + 1, p0)
    )
    assert np.isfinite(now).all()
    np.testing.assert_allclose(after, now, atol=1e-8)
    assert float(process(0, 0, p0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("hits", "draws"), [(0, 3), (5, 5), (40, 50), (20, 50)])
def test_the_process_is_the_mixture(hits: int, draws: int) -> None:
    """Against the integral of likelihood ratios; q = sin^2(t) makes the Beta(1/2, 1/2) prior uniform in t."""
    p0 = 0.7

    def ratio(t: float) -> float:
        q = math.sin(t) ** 2
        return (q / p0) ** hits * ((1 - q) / (1 - p0)) ** (draws - hits)

    edge = math.asin(math.sqrt(p0))
    above = integrate.quad(ratio, edge, math.pi / 2)[0] / (math.pi / 2 - edge)
    below = integrate.quad(ratio, 0, edge)[0] / edge
    assert float(log_e_value(hits, draws, p0)) == pytest.approx(math.log(above), abs=1e-7)
    assert float(log_futility(hits, draws, p0)) == pytest.approx(math.log(below), abs=1e-7)


def test_null_probability_is_rounded_up() -> None:
    r = np.array([0.0, 0.25, 1.0, 3.0])
    p0 = null_probability(r, 0.5)
    assert (p0 > special.ndtr(r / 0.5)).all()
    np.testing.assert_allclose(1 - p0, special.ndtr(-r / 0.5), rtol=1e-8, atol=2e-16)
    assert null_probability(100.0, 0.1) < 1
    assert RadiusClaims(3, [0.1, 100.0], sigma=0.1, cap=sequential.MAX_DRAWS).state[0].tolist() == [UNDECIDED, GIVEN_UP]


@pytest.mark.parametrize("r", [0.5, 1.0, 2.0, 3.0])
def test_false_certification_by_dynamic_programming(r: float) -> None:
    """All paths of 200 batches of 100, at the worst p that must not be certified: p = Phi(r / sigma)."""
    p = float(special.ndtr(r))
    wrong, _ = _ever(log_e_value, p, float(null_probability(r, 1.0)), 20_000, 100)
    assert 0.1 * ALPHA < wrong <= ALPHA  # and not vacuous: within a factor of ten of what is allowed


@pytest.mark.slow
@pytest.mark.parametrize("r", [0.0, 1.0, 2.0])
def test_false_certification_after_every_draw(r: float) -> None:
    p = float(special.ndtr(r))
    wrong, _ = _ever(log_e_value, p, float(null_probability(r, 1.0)), 5000, 1)
    assert 0.5 * ALPHA < wrong <= ALPHA


@pytest.mark.parametrize("below", [0.001, 0.01])
def test_below_p0_false_certification_is_rarer(below: float) -> None:
    p = float(special.ndtr(1.0))
    p0 = float(null_probability(1.0, 1.0))
    assert _ever(log_e_value, p - below, p0, 20_000, 100)[0] < _ever(log_e_value, p, p0, 20_000, 100)[0]


def test_false_futility_by_dynamic_programming() -> None:
    p0 = float(null_probability(1.0, 1.0))
    for p in (p0, p0 + 0.01):
        assert _ever(log_futility, p, p0, 20_000, 100, level=0.01)[0] <= 0.01


@pytest.mark.parametrize(("p", "draws"), [(0.86, 10_000), (0.88, 2000), (0.90, 1000), (0.95, 300)])
def test_power_above_p0(p: float, draws: int) -> None:
    """p0 = 0.841: certified all but surely, long before a fixed 100,000 draws."""
    power, mean = _ever(log_e_value, p, float(null_probability(1.0, 1.0)), 10 * draws, 100)
    assert power > 0.999
    assert mean < draws


def _run(claims: RadiusClaims, rates: NDArray[np.float64], batch: int = 100, seed: int = 0) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    while (rows := claims.undecided).size:
        claims.update(generator.binomial(batch, rates[rows]), batch, rows)


def test_draws_saved_on_realistic_hit_rates() -> None:
    rates = np.tile((*HIT_RATES, *[0.5] * 7), 20)
    right = rates != 0.5
    claims = RadiusClaims(rates.size, [0.25], sigma=0.25)
    claims.give_up(np.flatnonzero(~right))
    _run(claims, rates)
    truth = right & (rates > special.ndtr(1.0))
    assert (claims.claimed[:, 0] == truth).mean() > 0.99
    assert not (claims.claimed[:, 0] & ~truth).any()
    assert claims.draws.mean() < 100_000 / 40
    fixed = bounds.radius(bounds.lower_bound((rates * 100_000).astype(np.int64), 100_000, ALPHA), 0.25) > 0.25
    assert abs(claims.claimed[:, 0].mean() - (right & fixed).mean()) < 0.01


def test_over_claims_of_the_whole_procedure() -> None:
    """20,000 samples at the true radius 0.5 exactly: claims at 0.5 or beyond are wrong."""
    claims = RadiusClaims(20_000, [0.25, 0.5, 0.75], sigma=0.5, alpha=0.05, beta=0.05, cap=2000)
    _run(claims, np.full(20_000, special.ndtr(1.0)))
    assert claims.claimed[:, 0].mean() > 0.9
    wrong = claims.claimed[:, 1]
    assert 0 < wrong.sum() <= stats.binom.ppf(0.9999, wrong.size, 0.05)
    assert claims.claimed[:, 2].sum() <= wrong.sum()
    # the only other way out before the cap is futility
    lost = (claims.state[:, 0] == GIVEN_UP).sum()
    assert lost <= stats.binom.ppf(0.9999, wrong.size, 0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 100]), st.sampled_from([50, 1000]))
def test_invariants(seed: int, batch: int, cap: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    rates = generator.beta(5, 0.5, size=40)
    radii = [0.0, 0.2, 0.25, 0.5, 1.0]
    claims = RadiusClaims(40, radii, sigma=0.4, cap=cap)
    before = claims.state.copy()
    while (rows := claims.undecided).size:
        size = np.minimum(batch, cap - claims.draws[rows])
        claims.update(generator.binomial(size, rates[rows]), size)
        decided = before != UNDECIDED
        assert (claims.state[decided] == before[decided]).all(), "decisions are final"
        before = claims.state.copy()
    assert (claims.claimed == np.logical_and.accumulate(claims.claimed, axis=1)).all(), "gatekeeping"
    assert (claims.draws <= cap).all()
    assert (claims.at_draws <= claims.draws[:, None]).all()
    again = sequential.recheck(claims.at_hits, claims.at_draws, radii, sigma=0.4, alpha=ALPHA)
    assert (again == claims.claimed).all()
    number = claims.claimed.sum(1)
    assert (claims.radius == np.where(number > 0, np.take(radii, number - 1), bounds.ABSTAIN)).all()


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(0.01, 0.99))
def test_more_hits_are_more_evidence(draws: int, p0: float) -> None:
    hits = np.arange(draws + 1)
    assert (np.diff(log_e_value(hits, draws, p0)[np.isfinite(log_e_value(hits, draws, p0))]) > -1e-9).all()
    assert (np.diff(log_futility(hits, draws, p0)[np.isfinite(log_futility(hits, draws, p0))]) < 1e-9).all()
    assert log_e_value(draws + 1, draws + 1, p0) >= log_e_value(draws, draws, p0) - 1e-9


@pytest.mark.parametrize("cap", [1, 50, 1000, 100_000])
def test_most_misses_is_where_the_cap_certifies(cap: int) -> None:
    p0 = null_probability([0.0, 0.5, 1.0, 2.5, 3.5], 1.0)
    most = sequential.most_misses(cap, p0, ALPHA)
    level = -math.log(ALPHA) + sequential.LOG_SLACK
    for misses, null in zip(most.tolist(), p0.tolist(), strict=True):
        assert misses < 0 or float(log_e_value(cap - misses, cap, null)) >= level
        assert misses == cap or float(log_e_value(cap - misses - 1, cap, null)) < level


def test_what_is_out_of_reach_is_given_up_at_once() -> None:
    claims = RadiusClaims(2, [0.5, 3.0], sigma=1.0, cap=100)
    assert claims.state.tolist() == [[UNDECIDED, GIVEN_UP]] * 2
    claims.update([50, 20], [50, 40])
    assert claims.state.tolist() == [[CLAIMED, GIVEN_UP], [GIVEN_UP, GIVEN_UP]]
    assert claims.undecided.size == 0
    assert claims.radius.tolist() == [0.5, bounds.ABSTAIN]
    assert claims.at_draws[:, 0].tolist() == [50, 40]


def test_the_cap_ends_it() -> None:
    """In between neither certain nor futile: up to the cap, and then given up."""
    claims = RadiusClaims(1, [0.25], sigma=0.25, cap=1000)
    claims.update([430], 500)
    assert claims.undecided.tolist() == [0]
    claims.update([430], 500)
    assert claims.state.tolist() == [[GIVEN_UP]]
    assert (claims.at_hits.tolist(), claims.at_draws.tolist()) == ([[860]], [[1000]])


def test_a_radius_waits_for_the_smaller_ones() -> None:
    """Were a larger radius to cross alone, it would be claimed with the smaller one or fall with it."""
    claims = RadiusClaims(2, [0.1, 0.2], sigma=0.25)
    claims._crossed[:, 1] = True  # from counts, it takes an alpha near 1
    claims.update([70, 20], 100)
    assert claims.state.tolist() == [[UNDECIDED, UNDECIDED], [GIVEN_UP, GIVEN_UP]]
    claims.update([100], 100)
    assert claims.state[0].tolist() == [CLAIMED, CLAIMED]


def test_batches_of_one_sample_do_not_touch_the_others() -> None:
    alone, together = RadiusClaims(1, [0.1, 0.2], sigma=0.25), RadiusClaims(3, [0.1, 0.2], sigma=0.25)
    for hits in (70, 75, 78):
        alone.update([hits], 100)
        together.update([hits], 100, rows=[1])
    assert together.state[1].tolist() == alone.state[0].tolist()
    assert together.draws.tolist() == [0, 300, 0]
    assert (together.state[[0, 2]] == UNDECIDED).all()


def _claims() -> RadiusClaims:
    claims = RadiusClaims(3, [0.1], sigma=0.25, cap=500)
    claims.update([100], 100, rows=[2])
    return claims


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RadiusClaims(3, [], sigma=0.25), "list of radii"),
        (lambda: RadiusClaims(3, [0.5, 0.25], sigma=0.25), "sort them"),
        (lambda: RadiusClaims(3, [-0.5], sigma=0.25), "radii"),
        (lambda: RadiusClaims(3, [0.5], sigma=0.0), "sigma"),
        (lambda: RadiusClaims(3, [0.5], sigma=0.25, alpha=1.0), "alpha"),
        (lambda: RadiusClaims(3, [0.5], sigma=0.25, beta=0.0), "beta"),
        (lambda: RadiusClaims(3, [0.5], sigma=0.25, cap=0), "cap"),
        (lambda: log_e_value(5, 4, 0.5), "hits"),
        (lambda: log_futility(5, 6, 1.0), "p0"),
        (lambda: _claims().update([1, 2], 10, rows=[0, 0]), "distinct"),
        (lambda: _claims().update([1], 10, rows=[2]), "undecided"),
        (lambda: _claims().update([1], 10, rows=[3]), "undecided"),
        (lambda: _claims().update([1], 10, rows=[0.5]), "indices"),
        (lambda: _claims().update([1, 2, 3], 10), "each of 2 rows"),
        (lambda: _claims().update([1, 2], 0), "hits"),
        (lambda: _claims().update([1, 2], 501), "cap"),
        (lambda: _claims().give_up([2]), "undecided"),
        (lambda: sequential.recheck([[1]], [[1]], [0.5], sigma=0.25, alpha=2.0), "alpha"),
    ],
)
def test_bad_input(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "expected" in str(caught.value)


def test_a_refused_batch_counts_nothing() -> None:
    claims = _claims()
    with pytest.raises(InputError):
        claims.update([100, 400], [100, 501])
    assert claims.draws.tolist() == [0, 0, 100]
