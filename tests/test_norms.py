from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.noise import Noise
from assay.norms import TOLERANCE, Ball, distance, violation
from assay.threat import Norm, ThreatModel

NORMS: tuple[Norm, ...] = ("linf", "l2")
DTYPES = (torch.float32, torch.float64)
RADII = tuple(Fraction(text) for text in ("0", "1/100000", "1/255", "8/255", "1/5", "1/2", "3/4", "1", "2"))

pixel = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 1e-40, 1e-8, 1 - 2**-24, 8 / 255]),
    st.floats(0, 1, width=32),
)
anything = st.one_of(
    st.sampled_from([0.0, 1.0, -0.0, 1e30, -1e30, 1e-40, 0.5 + 8 / 255, 0.5 - 8 / 255]),
    st.floats(-3, 3, width=32),
)


@st.composite
def balls(draw: st.DrawFn, norms: tuple[Norm, ...] = NORMS) -> tuple[Ball, Tensor]:
    """A ball around a few images, and points anywhere."""
    rows, pixels = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(DTYPES))
    threat = ThreatModel(draw(st.sampled_from(norms)), draw(st.sampled_from(RADII)))
    x = draw(st.lists(pixel, min_size=rows * pixels, max_size=rows * pixels))
    z = draw(st.lists(anything, min_size=rows * pixels, max_size=rows * pixels))
    shape = (rows, 1, 1, pixels)
    return Ball(threat, torch.tensor(x, dtype=dtype).reshape(shape)), torch.tensor(z, dtype=dtype).reshape(shape)


@settings(max_examples=300, deadline=None)
@given(balls())
def test_a_projection_lies_in_ball_and_box_exactly(case: tuple[Ball, Tensor]) -> None:
    ball, z = case
    projected = ball.project(z)
    assert projected.shape == z.shape
    assert projected.dtype == z.dtype
    assert violation(ball.norm, ball.eps, projected, ball.x).max() == 0


@settings(max_examples=300, deadline=None)
@given(balls())
def test_projecting_twice_changes_nothing(case: tuple[Ball, Tensor]) -> None:
    ball, z = case
    once = ball.project(z)
    assert torch.equal(ball.project(once), once)


@settings(max_examples=300, deadline=None)
@given(balls(), st.floats(0, 1))
def test_points_inside_stay_where_they_are(case: tuple[Ball, Tensor], share: float) -> None:
    ball, z = case
    inside = ball.x + share * (ball.project(z) - ball.x)
    rows = violation(ball.norm, ball.eps, inside, ball.x) == 0  # the arithmetic above may round outwards
    assert torch.equal(ball.project(inside)[rows], inside[rows])
    assert torch.equal(ball.project(ball.x), ball.x)


@settings(max_examples=200, deadline=None)
@given(balls(("linf",)))
def test_the_linf_projection_is_the_nearest_point(case: tuple[Ball, Tensor]) -> None:
    ball, z = case
    x, eps = ball.x.double(), ball.eps
    nearest = z.double().clamp(x - eps, x + eps).clamp(0, 1)
    assert (ball.project(z).double() - nearest).abs().max() <= torch.finfo(z.dtype).eps


@settings(max_examples=200, deadline=None)
@given(balls(("l2",)))
def test_the_l2_projection_keeps_the_direction_where_the_box_is_far(case: tuple[Ball, Tensor]) -> None:
    ball, z = case
    centre = torch.full_like(ball.x, 0.5)
    small = Ball(ball.threat, centre, eps=min(ball.eps, 0.4))
    step = (z - ball.x).double().clamp(-10, 10)
    length = torch.linalg.vector_norm(step.flatten(1), dim=1).reshape(-1, 1, 1, 1)
    expected = 0.5 + step * (small.eps / length.clamp_min(1e-30)).clamp_max(1)
    result = small.project((centre.double() + step).to(z.dtype)).double()
    assert (result - expected).abs().max() <= 4 * torch.finfo(z.dtype).eps + 1e-8


@pytest.mark.parametrize("norm", NORMS)
def test_the_ends_of_the_box(norm: Norm) -> None:
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    ball = Ball(ThreatModel(norm, Fraction(1, 4)), x)
    assert ball.project(torch.full_like(x, 7.0)).flatten().tolist() == pytest.approx([0.25, 1.0], abs=1e-7)
    assert ball.project(torch.full_like(x, -7.0)).flatten().tolist() == pytest.approx([0.0, 0.75], abs=1e-7)


def test_distances_are_measured_in_float64() -> None:
    a = torch.full((1, 1, 1, 2), 0.25)
    b = torch.full((1, 1, 1, 2), 0.25 + 2**-24)
    assert distance("linf", a, b).dtype == torch.float64
    assert distance("linf", a, b).item() == 2**-24
    assert distance("l2", a, b).item() == pytest.approx(math.sqrt(2) * 2**-24, rel=1e-14)


def test_a_violation_is_the_excess_over_ball_or_box() -> None:
    x = torch.tensor([0.5, 0.5, 0.9, 0.5], dtype=torch.float64).reshape(4, 1, 1, 1)
    z = torch.tensor([0.6, 0.8, 1.05, math.nan], dtype=torch.float64).reshape(4, 1, 1, 1)
    found = violation("linf", 0.2, z, x)
    assert found[:3].tolist() == pytest.approx([0, 0.1, 0.05])
    assert found[3].isnan()
    assert not bool((found <= TOLERANCE)[3])
    assert len(violation("l2", 0.2, z[:0], x[:0])) == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_steepest_step_wins_against_every_other(norm: Norm, dtype: torch.dtype) -> None:
    noise = Noise.from_seed(0, 16)
    like = torch.zeros(16, 1, 2, 3, dtype=dtype)
    ball = Ball(ThreatModel(norm, Fraction(1, 10)), like + 0.5)
    gradient = noise.normal("gradient", shape=(1, 2, 3), like=like)
    best = (ball.steepest(gradient) * gradient).flatten(1).sum(1)
    dual = gradient.flatten(1).abs().sum(1) if norm == "linf" else gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(best, dual)
    for i in range(50):
        other = ball.random_point(noise, i) - ball.x
        assert ((other * gradient).flatten(1).sum(1) <= best * 0.1 * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1.0, 1e30])
def test_the_size_of_a_gradient_does_not_matter(norm: Norm, scale: float) -> None:
    ball = Ball(ThreatModel(norm, Fraction(1, 10)), torch.full((1, 1, 1, 2), 0.5))
    step = ball.steepest(torch.tensor([scale, 0.0]).reshape(1, 1, 1, 2))
    assert step.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_zero_or_not_finite_gives_a_finite_step(norm: Norm) -> None:
    ball = Ball(ThreatModel(norm, Fraction(1, 10)), torch.full((3, 1, 1, 2), 0.5))
    gradient = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, -math.inf]]).reshape(3, 1, 1, 2)
    assert ball.steepest(gradient).reshape(3, 2).tolist() == [[0, 0], [0, 1], [0, 0]]
    assert violation(norm, ball.eps, ball.step(ball.x, gradient, 1.0), ball.x).max() == 0


def test_random_points_fill_the_ball_evenly() -> None:
    x = torch.full((20000, 1, 1, 2), 0.5, dtype=torch.float64)
    noise = Noise.from_seed(0, len(x))
    flat = Ball(ThreatModel("linf", Fraction(1, 4)), x).random_point(noise) - x
    assert flat.mean().abs() < 0.005
    assert flat.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.02)
    disc = Ball(ThreatModel("l2", Fraction(1, 4)), x).distance(
        Ball(ThreatModel("l2", Fraction(1, 4)), x).random_point(noise)
    )
    # In a disc the share within half the radius is a quarter.
    assert (disc < 0.125).double().mean().item() == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_point_belongs_to_its_row(norm: Norm) -> None:
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    ball, noise = Ball(ThreatModel(norm, Fraction(1, 5)), x), Noise.from_seed(0, 6)
    rows = torch.tensor([4, 1])
    points = ball.random_point(noise, "try", 3)
    assert torch.equal(points[rows], ball[rows].random_point(noise[rows], "try", 3))
    assert violation(norm, ball.eps, points, x).max() == 0
    assert not torch.equal(points, ball.random_point(noise, "try", 4))


def test_a_step_may_have_its_own_length_in_each_row() -> None:
    x = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    ball = Ball(ThreatModel("linf", Fraction(1, 4)), x)
    moved = ball.step(x, torch.ones_like(x), torch.tensor([0.125, 0.5], dtype=torch.float64))
    assert moved.flatten().tolist() == [0.625, 0.75]


def test_another_radius_can_be_asked_for() -> None:
    x = torch.full((1, 1, 1, 1), 0.5)
    ball = Ball(ThreatModel("linf", Fraction(1, 4)), x, eps=0.5)
    assert ball.project(x + 3).item() == 1.0
    assert ball[:1].eps == 0.5
