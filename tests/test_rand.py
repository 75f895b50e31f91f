"""AutoAttack's `rand` on a defense that abstains by chance, where all that it says has a closed form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyautoattack
import pytest
import torch
import typer
from typer.testing import CliRunner

from assay.attack import Target
from assay.attacks.autoattack import autoattack
from assay.noise import Noise
from assay.threat import ThreatModel


def _rand() -> ModuleType:
    """`benchmarks.rand`, which is in no package that a test could import."""
    path = Path(__file__).parents[1] / "benchmarks" / "rand.py"
    spec = importlib.util.spec_from_file_location("benchmarks_rand", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = _rand()
N, DRAWS, ITERATIONS = 600, 20, 2
"""The closed forms hold for any number of iterations that reaches the corner of the ball."""


@pytest.fixture(scope="module", params=[0.1, 0.4], ids=lambda p: f"p={p}")
def chance(request: pytest.FixtureRequest) -> float:
    return float(request.param)


def within(found: float, exact: float, spread: float) -> None:
    """Four standard errors: about one run in 16,000 would stray, and this one's seed is fixed."""
    assert abs(found - exact) <= 4 * spread + 1e-12, f"{found} is far from {exact} ± {spread}"


def binomial(share: float, n: int) -> float:
    return float((share * (1 - share) / n) ** 0.5)


def test_three_single_draws_decide_where_no_attack_does_anything(chance: float) -> None:
    row = bench.coin_row(chance, bench.HELD, N, draws=DRAWS, iterations=ITERATIONS)
    q = 1 - chance
    within(row["reported"].value, q**3, binomial(q**3, N))
    # What it hands over is as harmless as it was; so says the expected accuracy of our own attack's points.
    for column in ("clean", "examples", "expected"):
        within(row[column].value, q, binomial(q, N * DRAWS))
    exact = bench.closed_form(chance, bench.HELD, DRAWS)
    assert exact.reported == pytest.approx(q**3)
    for rule in ("worst_of_n", "majority"):
        share = getattr(exact.rules, rule)
        within(row[rule].value, share, binomial(share, N))
    assert row["reported"].high < row["expected"].low


def test_a_skipped_sample_is_counted_as_robust_and_handed_over_unchanged(chance: float) -> None:
    """Every image here has a point where the defense is always wrong; ours finds it, rand misses some by luck."""
    row = bench.coin_row(chance, bench.LOST, N, draws=DRAWS, iterations=ITERATIONS)
    exact = bench.closed_form(chance, bench.LOST, DRAWS)
    q = 1 - chance
    assert exact.reported == pytest.approx(chance**2 * q**3)
    within(row["reported"].value, exact.reported, binomial(exact.reported, N))
    unchanged = exact.examples / q
    # Which images come back as they were is one draw each; how these are scored, 20 more.
    within(row["examples"].value, exact.examples, q * binomial(unchanged, N) + binomial(exact.examples, N * DRAWS))
    assert row["examples"].value > row["reported"].value
    for rule in ("expected", "worst_of_n", "majority"):
        assert row[rule].value == 0
    if chance == 0.4:
        assert row["reported"].value > row["expected"].value  # overstated


def test_the_closed_form_of_what_is_handed_over_counts_every_path() -> None:
    """Each path of a sample through the draws that `rand` takes, one by one, where every class can be changed."""
    p = 0.4
    right, unchanged = 0.0, 0.0
    for weight, standing, as_it_was in _paths(p):
        right += weight * standing
        unchanged += weight * as_it_was
    exact = bench.closed_form(p, bench.LOST, DRAWS)
    assert exact.reported == pytest.approx(right)
    assert exact.examples == pytest.approx((1 - p) * unchanged)


def _paths(p: float) -> list[tuple[float, bool, bool]]:
    """(probability, counted as robust, returned unchanged), following the package's source draw by draw."""
    open_, closed = [1 - p], [(p, False, True)]  # the first draw, on the image
    for _attack in ("apgd-ce", "apgd-dlr"):
        following = []
        for weight in open_:
            closed.append((weight * (1 - p), False, False))  # taken up, broken, confirmed: it is always wrong there
            closed.append((weight * p * p, False, True))  # skipped, and wrong in the draw that judges
            following.append(weight * p * (1 - p))  # skipped, and right
        open_ = following
    return closed + [(weight, True, True) for weight in open_]


def test_the_closed_form_of_a_majority_counts_a_tie_as_wrong() -> None:
    rules = bench.closed_form(0.5, bench.HELD, 2).rules
    assert (rules.expected, rules.worst_of_n, rules.majority) == (0.5, 0.25, pytest.approx(0.25))


def test_our_adapter_returns_what_the_package_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attacks/autoattack.py` with `version="rand"`: the same samples, from the same noise."""
    prescribed = pyautoattack.AutoAttack._set_version

    def shortened(suite: pyautoattack.AutoAttack, version: str) -> None:
        prescribed(suite, version)
        suite.apgd.n_iter = ITERATIONS

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", shortened)
    n = 8
    x, y = bench.tiles(n)
    threat, noise = ThreatModel("linf", bench.LOST), Noise.from_seed(1, n)
    state = torch.random.get_rng_state()
    _, alone = bench.rand(Target(bench.Coin(0.4).eval(), n), x, y, threat, noise, iterations=ITERATIONS)
    assert torch.equal(torch.random.get_rng_state(), state)
    through = autoattack(Target(bench.Coin(0.4).eval(), n), x, y, threat, noise, version="rand")
    assert torch.allclose(through, alone, atol=1e-6)
    assert not torch.equal(alone, x)


def table(*arguments: str) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(bench.main)
    return CliRunner().invoke(app, arguments)


def test_the_table_has_the_closed_forms_beside_what_was_measured() -> None:
    done = table("--coins", "4", "--p", "0.4", "--iterations", "1")
    assert done.exit_code == 0, done.output
    assert "21.6" in done.output  # (1 − p)³
    assert "3.5" in done.output  # p²(1 − p)³
    assert done.output.count("4 images") == 2


@pytest.mark.slow
def test_the_table_has_a_row_for_a_registered_defense() -> None:
    done = table("random_resize", "--n", "2", "--coins", "2", "--p", "0.4", "--iterations", "1", "--eps", "1/50")
    assert done.exit_code == 0, done.output
    assert "random_resize, 2 images" in done.output


def test_the_table_refuses_a_deterministic_defense() -> None:
    done = table("undefended")
    assert done.exit_code == 2
    assert "deterministic" in done.output
