"""Selection by hand, grafts against exact gradients, linear optima, and defenses whose draws pull apart."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.attack import Target
from assay.attacks import diffhammer as module
from assay.attacks import losses
from assay.attacks.apgd import apgd
from assay.attacks.bpda import bpda
from assay.attacks.diffhammer import Draws, averaged, diffhammer, select, step_sizes, unit, weighted
from assay.attacks.eot import Standing
from assay.attacks.pgd import pgd
from assay.card import Card, Handle, Traits
from assay.defense import Defense, Stages
from assay.errors import InputError, ThreatViolation
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel

SIDE = 4
D = SIDE * SIDE
LINF = ThreatModel("linf", "1/10")  # type: ignore[arg-type]
TOWARDS = torch.tensor([[1.0, -1.0] * 8], dtype=torch.float64).view(1, SIDE, SIDE)


def made(margins: list[float], signs: list[float], scale: float = 1.0) -> Draws:
    """One sample's draws: their margins, and gradients that are multiples of one direction."""
    gradients = torch.stack([sign * scale * TOWARDS for sign in signs])[None]
    values = torch.tensor([margins], dtype=torch.float64) * scale
    return Draws(values, gradients, torch.zeros(1, len(margins), 2, dtype=torch.float64))


def chosen(draws: Draws, eps: float = 0.1, **options: Any) -> tuple[list[float], int]:
    """Weights and representative under linf, in a ball that no box cuts: a move changes a margin by 1.6."""
    move = lambda gradient: eps * gradient.sign()  # noqa: E731
    weights, representative = select(draws, move, **{"sharpness": 5.0, "rounds": 5, **options})
    assert weights.shape == (1, len(draws.margins[0]))
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    return weights[0].tolist(), int(representative)


def test_draws_that_pull_apart_are_not_averaged() -> None:
    """Five against three, all just within reach: their mean is a quarter of a gradient, the selection is the five."""
    weights, representative = chosen(made([-1.0] * 8, [1, 1, -1, 1, -1, 1, 1, -1]))
    assert sum(weights[i] for i in (0, 1, 3, 5, 6)) > 0.99
    assert representative in (0, 1, 3, 5, 6)


def test_an_even_split_is_decided_all_the_same() -> None:
    weights, representative = chosen(made([-1.0] * 4, [1, -1, 1, -1]))
    side = [representative % 2, representative % 2 + 2]
    assert sum(weights[i] for i in side) > 0.99


def test_the_side_that_is_nearer_wins() -> None:
    for nearer in (0, 1):
        margins = [-1.0, -1.0, -1.0, -1.0]
        margins[nearer] = margins[nearer + 2] = -0.8
        assert chosen(made(margins, [1, -1, 1, -1]))[1] % 2 == nearer


def test_draws_that_cannot_fall_have_no_say() -> None:
    """Most draws are forty moves from falling and have ten times the gradient, the other way."""
    weights, representative = chosen(made([-600, -600, -600, -1, -1], [-10, -10, -10, 1, 1]))
    assert sum(weights[3:]) > 0.99
    assert representative >= 3


def test_where_none_can_fall_the_nearest_is_attacked() -> None:
    weights, _ = chosen(made([-1e6, -1e5, -2e3], [1, 1, 1]))
    assert weights[2] > 0.99


def test_fallen_draws_keep_their_weight() -> None:
    weights, _ = chosen(made([3.0, 2.0, -0.5], [1, 1, 1]))
    assert weights == pytest.approx([1 / 3] * 3, abs=0.01)


def test_the_formula_by_hand() -> None:
    """q_i = sigmoid(λ·(L_i + ⟨r, g_i⟩)/u), with u = 1.6 · 2, the larger change."""
    weights, representative = chosen(made([-2.0, -3.5], [1.0, 2.0]))
    q = torch.sigmoid(5.0 * torch.tensor([-2.0 + 1.6, -3.5 + 3.2], dtype=torch.float64) / 3.2)
    assert weights == pytest.approx((q / q.sum()).tolist(), rel=1e-9)
    assert representative == 1
    assert chosen(made([-2.0, -3.5], [1.0, 2.0]), sharpness=1e-9)[0] == pytest.approx([0.5, 0.5])


def test_expectation_and_maximisation_take_turns() -> None:
    """Round by round, written out; a step in l2, where draws that are not parallel change its direction by degrees."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(1, 6, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    margins = -torch.rand(1, 6, generator=generator, dtype=torch.float64)
    move = lambda gradient: 0.3 * unit(gradient)  # noqa: E731
    draws = Draws(margins, gradients, torch.zeros(1, 6, 2))
    flat = gradients[0].flatten(1)
    seen = []
    for rounds in (1, 2, 5):
        weights, representative = select(draws, move, sharpness=5.0, rounds=rounds)
        direction = flat[representative[0]]
        for _ in range(rounds):
            gain = flat @ (0.3 * direction / direction.norm())
            q = torch.sigmoid(5.0 * (margins[0] + gain) / gain.abs().max())
            direction = (q[:, None] * flat).sum(0) / q.sum()
        torch.testing.assert_close(weights[0], q / q.sum(), rtol=1e-9, atol=1e-12)
        seen.append(weights)
    assert (seen[0] - seen[1]).abs().max() > 0.01
    assert (seen[1] - seen[2]).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e5])
def test_the_scale_of_the_logits_does_not_matter(scale: float) -> None:
    margins, signs = [-1.0, -0.7, -2.0, 0.3], [1.0, -1.0, 0.5, 2.0]
    whole, other = chosen(made(margins, signs)), chosen(made(margins, signs, scale))
    assert other[0] == pytest.approx(whole[0], rel=1e-6)
    assert other[1] == whole[1]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_useless_gradients_leave_finite_weights(bad: float) -> None:
    draws = made([-1.0, -1.0, -1.0], [1, 1, 1])
    draws.gradients[:, 0] = bad
    weights, representative = chosen(draws)
    assert all(0 <= weight <= 1 for weight in weights)
    assert representative > 0
    draws.gradients[:] = bad
    assert chosen(draws)[0] == pytest.approx([1 / 3] * 3)


def test_one_draw_is_the_plain_gradient() -> None:
    assert chosen(made([-4.0], [1])) == ([1.0], 0)


def test_weighted_sums_and_unit_vectors() -> None:
    gradients = torch.randn(2, 3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([[1.0, 0, 0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    found = weighted(weights, gradients)
    torch.testing.assert_close(found[0], gradients[0, 0])
    torch.testing.assert_close(found[1], sum(w * g for w, g in zip(weights[1], gradients[1], strict=True)))
    torch.testing.assert_close(unit(1e-200 * found).flatten(1).norm(dim=1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(unit(1e200 * found), unit(found))
    assert not unit(torch.full((1, 1, 2, 2), float("nan"))).any()
    assert not unit(torch.zeros(1, 1, 2, 2)).any()


def test_the_direction_remembers_by_the_papers_schedule() -> None:
    past, gradient = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 7.0]]]])
    past[..., 0] = 1
    for i, share in ((0, 1.0), (3, 0.5), (24, 0.2)):
        found = averaged(past, gradient, i).flatten()
        torch.testing.assert_close(found, torch.tensor([1 - share, share]))
    assert torch.equal(averaged(past, torch.full_like(past, float("nan")), 3), 0.5 * past)


def test_steps_fall_from_the_diameter_and_can_cross_the_ball() -> None:
    sizes = step_sizes(0.5, 10)
    assert sizes[0] == 1.0
    assert sizes == sorted(sizes, reverse=True)
    assert all(size > 0 for size in sizes)
    assert step_sizes(0.5, 1) == [1.0]


def test_the_look_ahead_is_a_feasible_step() -> None:
    x = torch.full((1, 1, SIDE, SIDE), 0.98, dtype=torch.float64)
    ball = Ball(LINF, x)
    move = module._look_ahead(ball, x, 0.2, torch.ones_like(x))
    torch.testing.assert_close(move, torch.full_like(x, 0.02))  # the box ends there
    resized = torch.ones(1, 1, 2, 2, dtype=torch.float64)  # a purifier that shrinks images
    torch.testing.assert_close(module._look_ahead(ball, x, 0.2, resized), 0.2 * resized)


class Modes(Defense):
    """Each draw shows its mode in pixel 0 of the purified image, and the classifier reads the rest of it in that mode.

    With s = ⟨u, z − .5⟩ / 16, u = ±1: in mode b the margin of class 1 over class 0, the right one, is
    `slope_b · s − gap_b`. A linf ball of radius eps around grey allows |s| up to eps · 15/16.
    """

    def __init__(self, slopes: list[float], gaps: list[float], shares: list[float], *, mirror: bool = False) -> None:
        super().__init__()
        handles: tuple[Handle, ...] = ("stages",)
        self.card = Card(
            name="modes", title="Modes", summary="", traits=Traits(stochastic=True, purifies=True), handles=handles
        )
        self.n_classes = 2
        self.slopes = torch.tensor(slopes, dtype=torch.float64)
        self.gaps = torch.tensor(gaps, dtype=torch.float64)
        self._ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
        self._mirror = mirror

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        mode = (noise.uniform("mode", shape=(), like=x)[:, None] >= self._ends[None, :-1]).sum(1)
        if self._mirror:  # the purifier itself does what the mode asks; the classifier can't tell them apart
            body = 0.5 + torch.where(mode == 0, 1.0, -1.0)[:, None] * (x.flatten(1) - 0.5)
            mode = torch.zeros_like(mode)
        else:
            body = x.flatten(1)
        return torch.cat([mode[:, None].to(x.dtype), body[:, 1:]], 1).view_as(x)

    def classify(self, x: Tensor, noise: Noise) -> Tensor:
        mode = x.detach().flatten(1)[:, 0].long()
        along = (x - 0.5).flatten(1)[:, 1:] @ TOWARDS.flatten()[1:] / D
        margin = self.slopes[mode] * along - self.gaps[mode]
        return torch.stack([torch.zeros_like(margin), margin], 1)

    def stages(self) -> Stages:
        return Stages(self.purify, self.classify)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.classify(self.purify(x, noise.child("purify")), noise.child("classify"))


def wrong_share(defense: Defense, z: Tensor, y: Tensor, draws: int = 200) -> Tensor:
    """The share of fresh draws that each image gets wrong, `(n,)`."""
    noise = Noise.from_seed(99, len(z)).draws(draws)
    answers = defense.draw(z.repeat_interleave(draws, 0), noise).argmax(1).view(-1, draws)
    return (answers != y[:, None]).double().mean(1)


def grey(n: int = 16) -> tuple[Tensor, Tensor, Noise]:
    x = torch.full((n, 1, SIDE, SIDE), 0.5, dtype=torch.float64)
    return x, torch.zeros(n, dtype=torch.int64), Noise.from_seed(0, n)


BUDGET: dict[str, Any] = {"steps": 20, "eot": 16, "loss": "margin"}


@pytest.mark.parametrize("graft", [True, False], ids=["graft", "exact"])
@pytest.mark.parametrize("mirror", [False, True], ids=["classifier", "purifier"])
def test_breaks_one_of_two_opposite_modes_where_their_mean_breaks_none(mirror: bool, graft: bool) -> None:
    """Half the draws fall at s > .09, half at s < −.09, of .094 within reach; the mean gradient is 0 in expectation."""
    defense = Modes([10.0, -10.0] if not mirror else [10.0, 10.0], [0.9, 0.9], [0.5, 0.5], mirror=mirror)
    x, y, noise = grey()
    found = wrong_share(
        defense, diffhammer(Target(defense, 16), x, y, LINF, noise, restarts=1, graft=graft, **BUDGET), y
    )
    assert ((found - 0.5).abs() < 0.15).all()  # one mode of two, in every sample: no point breaks more
    plain = wrong_share(defense, pgd(Target(defense, 16), x, y, LINF, noise, **BUDGET), y)
    assert plain.mean() < 0.25
    assert found.mean() > plain.mean() + 0.25


@pytest.mark.parametrize("attack", [pgd, apgd, partial(bpda, optimizer="apgd")], ids=["pgd", "apgd", "bpda"])
def test_is_not_led_away_by_draws_that_cannot_be_broken(attack: Any) -> None:
    """Three draws in five have ten times the slope, the other way, and an unreachable gap: they rule every mean."""
    defense = Modes([-100.0, 10.0], [1000.0, 0.7], [0.6, 0.4])
    x, y, noise = grey()
    assert not wrong_share(defense, attack(Target(defense, 16), x, y, LINF, noise, **BUDGET), y).any()
    found = wrong_share(defense, diffhammer(Target(defense, 16), x, y, LINF, noise, restarts=1, **BUDGET), y)
    assert ((found - 0.4).abs() < 0.15).all()


def test_what_cannot_be_broken_stands() -> None:
    defense = Modes([10.0, -10.0], [0.95, 0.95], [0.5, 0.5])
    x, y, noise = grey(4)
    z = diffhammer(Target(defense, 4), x, y, LINF, noise, restarts=1, **BUDGET)
    assert not wrong_share(defense, z, y).any()


class Linear(Defense):
    """A linear purifier before a linear two-class classifier, with additive noise or none; unbroken in these balls."""

    def __init__(self, *, stochastic: bool = False, handles: tuple[Handle, ...] = ("stages",)) -> None:
        super().__init__()
        self.card = Card(
            name="linear",
            title="Linear",
            summary="",
            traits=Traits(stochastic=stochastic, purifies=True),
            handles=handles,
        )
        self.n_classes = 2
        generator = torch.Generator().manual_seed(2)
        self._sigma = 0.05 if stochastic else 0.0
        self._mix = 0.5 * torch.eye(D, dtype=torch.float64) + 0.1 * torch.randn(D, D, generator=generator).double()
        self._head = torch.randn(D, generator=generator, dtype=torch.float64)
        self.slope = self._mix @ self._head

    def margins(self, x: Tensor) -> Tensor:
        """Of class 1 over class 0, without noise."""
        return (x - 0.5).flatten(1) @ self.slope - 2

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        jitter = self._sigma * noise.normal("z", shape=x.shape[1:], like=x) if self._sigma else 0.0
        return 0.5 + ((x - 0.5).flatten(1) @ self._mix).view_as(x) + jitter

    def classify(self, x: Tensor, noise: Noise) -> Tensor:
        margin = (x - 0.5).flatten(1) @ self._head - 2
        return torch.stack([torch.zeros_like(margin), margin], 1)

    def stages(self) -> Stages:
        return Stages(self.purify, self.classify)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.classify(self.purify(x, noise.child("a")), noise.child("b"))


@pytest.mark.parametrize("graft", [True, False], ids=["graft", "exact"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize(("norm", "eps", "share"), [("linf", "1/20", 1 - 1e-9), ("l2", "1/5", 0.99)])
def test_reaches_a_linear_optimum(norm: Any, eps: Any, share: float, stochastic: bool, graft: bool) -> None:
    defense, threat = Linear(stochastic=stochastic), ThreatModel(norm, eps)
    x = 0.5 + 0.2 * (torch.rand(32, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double() - 0.5)
    y, noise = torch.zeros(32, dtype=torch.int64), Noise.from_seed(0, 32)
    direction = defense.slope.sign() if norm == "linf" else defense.slope / defense.slope.norm()
    clean = defense.margins(x)
    best = float(threat.eps) * float(direction @ defense.slope)
    assert (clean + best < -0.5).all()  # nothing breaks, so every search goes to its end
    z = diffhammer(Target(defense, 32), x, y, threat, noise, steps=20, restarts=1, eot=4, graft=graft)
    gained = (defense.margins(z) - clean) / best
    assert gained.min() > share
    assert gained.max() < 1 + 1e-9


def test_a_graft_is_exact_where_all_draws_share_a_jacobian() -> None:
    defense = Linear(stochastic=True)
    x, y, noise = grey(5)
    target, labels = Target(defense, 5), (y,)
    exact, grafted = module._Exact(target, 4), module._Grafted(target, 4)
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = []
    for source in (exact, grafted):
        draws = source.draw(x, labels, losses.margin, noise)
        path = torch.tensor([0, 3, 2, 1, 0])
        slopes.append(source.pull_back(x, noise, path, weighted(weights, draws.gradients)))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes[0], weights.sum(1)[:, None, None, None] * defense.slope.view(1, 1, SIDE, SIDE))


def test_a_graft_goes_back_through_the_draw_that_it_names() -> None:
    """Mirrored draws have opposite Jacobians: the sign tells the path."""
    defense = Modes([10.0, 10.0], [9.0, 9.0], [0.5, 0.5], mirror=True)
    x, _, noise = grey(6)
    source = module._Grafted(Target(defense, 6), 5)
    for j in range(5):
        path = torch.full((6,), j)
        pulled = source.pull_back(x, noise, path, TOWARDS.expand(6, 1, SIDE, SIDE).contiguous())
        drawn = noise.draws(5)[torch.arange(6) * 5 + j].child("purify")
        flipped = defense.purify(x + 0.1, drawn).flatten(1)[:, 1] < 0.5
        expected = torch.where(flipped, -1.0, 1.0)[:, None] * TOWARDS.flatten()[None, 1:]
        torch.testing.assert_close(pulled.flatten(1)[:, 1:], expected.double())


def test_what_was_computed_on_the_way_is_the_evaluation() -> None:
    """The logits of the draws are those of a look at the same noise: no point is paid for twice."""
    defense = Linear(stochastic=True)
    x, y, noise = grey(5)
    target = Target(defense, 5)
    source = module._Grafted(target, 4)
    draws = source.draw(x, (y,), losses.margin, noise)
    logits, _ = Standing(target, x, y, noise, eot=4, forward=source.forward).look(torch.arange(5), x, noise)
    assert torch.equal(draws.logits, logits)
    assert torch.equal(draws.margins, (logits[..., 1] - logits[..., 0]))
    exact = module._Exact(target, 4).draw(x, (y,), losses.margin, noise)
    assert torch.equal(exact.logits, target.draws(x, noise, 4))


@pytest.mark.parametrize(
    ("stochastic", "graft", "forward", "backward"),
    [
        (True, True, 2 * 5 * (2 * 4 + 1) + 2 * 4 + 30, 2 * 5 * (4 + 1)),
        (True, False, 2 * 5 * 4 + 2 * 4 + 30, 2 * 5 * 4),
        (False, True, 2 * 5 * 3 + 2 + 3, 2 * 5 * 2),
        (False, False, 2 * 5 + 2, 2 * 5),
    ],
)
def test_costs_what_it_says(stochastic: bool, graft: bool, forward: int, backward: int) -> None:
    defense, nothing = Linear(stochastic=stochastic), ThreatModel("linf", "1/1000000")  # type: ignore[arg-type]
    x, y, noise = grey(3)
    target = Target(defense, 3)
    diffhammer(target, x, y, nothing, noise, steps=5, restarts=2, eot=4, graft=graft)
    assert target.calls.forward.tolist() == [forward] * 3
    assert target.calls.backward.tolist() == [backward] * 3


def test_stages_that_disagree_with_the_defense_break_nothing() -> None:
    class Braggart(Linear):
        """Its stages get everything wrong; the defense itself never does."""

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), 2) + 0 * x.flatten(1)[:, :2]

        def classify(self, x: Tensor, noise: Noise) -> Tensor:
            return -super().classify(x, noise)

    defense = Braggart()
    x, y, noise = grey(3)
    target = Target(defense, 3)
    diffhammer(target, x, y, LINF, noise, steps=10, restarts=1)
    assert target.calls.backward.tolist() == [10 * 2] * 3  # nobody left


def test_exact_gradients_need_no_stages() -> None:
    defense = Linear(handles=())
    x, y, noise = grey(3)
    with pytest.raises(ThreatViolation, match="no 'stages' handle"):
        diffhammer(Target(defense, 3), x, y, LINF, noise, steps=1)
    diffhammer(Target(defense, 3), x, y, LINF, noise, steps=1, graft=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharpness": 0.0}, "sharpness must be above 0"),
        ({"sharpness": float("nan")}, "sharpness must be above 0"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"loss": "ce"}, "whose sign tells a wrong draw"),
        ({"loss": "margn"}, "Did you mean 'margin'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    x, y, noise = grey(3)
    with pytest.raises(InputError, match=message):
        diffhammer(Target(Linear(), 3), x, y, LINF, noise, **options)
