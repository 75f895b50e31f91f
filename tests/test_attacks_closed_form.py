"""Attacks against defenses whose worst case is known exactly: "it reached the optimum", not "it went down"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.attack import Evaluation, Target
from assay.attacks import losses
from assay.attacks.apgd import _Run, apgd, checkpoints
from assay.attacks.bpda import bpda
from assay.attacks.eot import Standing, all_wrong, badness
from assay.attacks.pgd import pgd
from assay.attacks.square import square
from assay.attacks.surrogate import surrogate
from assay.attacks.through_chain import through_chain
from assay.attacks.transfer import transfer
from assay.attacks.uniform import uniform
from assay.card import Card, Handle, Traits, Votes
from assay.chain import Chain
from assay.defense import Defense, Stages
from assay.errors import InputError
from assay.noise import Noise
from assay.norms import Ball, distance
from assay.threat import ThreatModel

N, K, SIDE = 64, 5, 6


class Linear(Defense):
    """`logits = W z + b` where z is the image, purified where a subclass purifies; float64."""

    def __init__(self, k: int = K, *, stochastic: bool = False, handles: Sequence[Handle] = (), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.card = Card(
            name="linear", title="Linear", summary="", traits=Traits(stochastic=stochastic), handles=tuple(handles)
        )
        self.n_classes = k
        self.weight = torch.randn(k, SIDE * SIDE, generator=generator, dtype=torch.float64)
        self.bias = -0.5 * self.weight.sum(1)  # grey is equally far from all classes

    def classify(self, x: Tensor, noise: Noise) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.classify(x, noise)


class Quantised(Linear):
    """A linear classifier behind 8 grey levels: piecewise constant, so its own gradient is zero everywhere."""

    def __init__(self) -> None:
        super().__init__(handles=("stages",))

    @staticmethod
    def purify(x: Tensor, noise: Noise) -> Tensor:
        return (x * 7).round() / 7

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.classify(self.purify(x, noise), noise)

    def stages(self) -> Stages:
        return Stages(self.purify, self.classify)


class Shrinking(Linear):
    """Ten steps, each pulling the image a tenth of the way to grey: linear, at a known smaller contrast."""

    def __init__(self, **options: Any) -> None:
        super().__init__(handles=("chain", "surrogate"), **options)

    def chain(self, steps: int = 10, pull: float = 0.1) -> Chain:
        def start(x: Tensor, noise: Noise) -> Tensor:
            return x

        def step(state: Any, x: Tensor, noise: Noise) -> Tensor:
            return state + pull * (0.5 - state)

        return Chain(start, [step] * steps).then(self.classify)

    def surrogate(self, steps: int) -> Chain:
        return self.chain(steps, 1 - 0.9 ** (10 / steps))

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise)


class Jittered(Linear):
    """Weights drawn anew for each answer: W + 2 N, so that a single draw's gradient is mostly noise."""

    def __init__(self) -> None:
        super().__init__(2, stochastic=True)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        weight = self.weight + 2 * noise.normal("weight", shape=self.weight.shape, like=self.weight)
        return (weight @ x.flatten(1)[:, :, None]).squeeze(2) + self.bias


def worst_margins(weight: Tensor, bias: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The exact maximum over the boxes [low, high] of each logit above the right one, `(n, k)`; 0 for itself."""
    slope = weight[None] - weight[y][:, None]
    worst = torch.where(slope > 0, high.flatten(1)[:, None], low.flatten(1)[:, None])
    return (slope * worst).sum(2) + bias[None] - bias[y][:, None]


def box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)


def robust(worst: Tensor) -> Tensor:
    return (worst <= 0).all(1)


def survivors(defense: Defense, z: Tensor, y: Tensor) -> Tensor:
    return defense(z, Noise.from_seed(99, len(z))).argmax(1) == y


def images(defense: Defense, *, spread: float = 1.0, n: int = N) -> tuple[Tensor, Tensor, Noise]:
    """Images in `.5 ± spread / 2`, labelled as the defense labels them: everything is correct to begin with."""
    x = torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = 0.5 + spread * (x - 0.5)
    y = defense(x, Noise.from_seed(98, n)).argmax(1)
    return x, y, Noise.from_seed(0, n)


LINF = ThreatModel("linf", "1/40")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (pgd, {"loss": "margin-targeted", "targets": 4}),
        (apgd, {"loss": "margin-targeted", "targets": 4, "steps": 20}),
        (apgd, {"loss": "dlr-targeted", "targets": 4, "steps": 20}),
        (apgd, {"loss": "dlr-targeted", "targets": 99, "steps": 20}),
        (apgd, {"loss": "ce-targeted", "targets": 4, "steps": 20}),
        (apgd, {"loss": "margin", "restarts": 10}),
        (apgd, {"loss": "dlr", "restarts": 10}),
        (apgd, {"loss": "ce", "restarts": 10}),
        (pgd, {"loss": "margin", "restarts": 10}),
    ],
)
def test_linf_robust_set_is_exact(attack: Any, options: dict[str, Any]) -> None:
    defense = Linear()
    x, y, noise = images(defense)
    exact = robust(worst_margins(defense.weight, defense.bias, y, *box(x, 1 / 40)))
    assert 0.15 < exact.double().mean() < 0.85  # the case decides something
    z = attack(Target(defense, N), x, y, LINF, noise, **options)
    assert torch.equal(survivors(defense, z, y), exact)


def test_linf_two_classes_reach_the_exact_margin() -> None:
    defense = Linear(2)
    x, y, noise = images(defense)
    threat = ThreatModel("linf", "1/200")  # type: ignore[arg-type]
    worst = worst_margins(defense.weight, defense.bias, y, *box(x, 1 / 200)).gather(1, 1 - y[:, None]).squeeze(1)
    for attack in (pgd, apgd):
        for loss in ("ce", "margin"):
            z = attack(Target(defense, N), x, y, threat, noise, loss=loss, steps=20)
            reached = losses.margin(defense(z, noise), y)
            held = worst < 0  # a broken sample's search ends at the boundary
            assert held.any()
            torch.testing.assert_close(reached[held], worst[held], rtol=0, atol=1e-9)
            assert (reached[~held] > 0).all()


def radii(defense: Linear, x: Tensor, y: Tensor) -> Tensor:
    """Each image's exact l2 distance to the nearest wrong half-space (the box plays no part)."""
    logits = defense(x, Noise.from_seed(0, len(x)))
    gap = logits.gather(1, y[:, None]) - logits
    length = torch.linalg.vector_norm(defense.weight[None] - defense.weight[y][:, None], dim=2)
    return (gap / length).scatter(1, y[:, None], math.inf).amin(1)


@pytest.mark.parametrize(
    ("attack", "options", "factor"),
    [
        (apgd, {"loss": "dlr-targeted", "targets": 4}, 1.001),
        (apgd, {"loss": "margin-targeted", "targets": 4}, 1.001),
        (pgd, {"loss": "margin-targeted", "targets": 4}, 1.02),
        (apgd, {"loss": "margin", "restarts": 5}, 1.001),
        (apgd, {"loss": "ce"}, 1.5),
    ],
)
def test_l2_breaks_what_lies_a_factor_inside(attack: Any, options: dict[str, Any], factor: float) -> None:
    defense = Linear()
    x, y, noise = images(defense, spread=0.2)
    radius = radii(defense, x, y)
    eps = 1 / 40
    assert (radius < eps / factor).sum() > 10
    assert (radius > eps).sum() > 10
    z = attack(Target(defense, N), x, y, ThreatModel("l2", "1/40"), noise, **options)  # type: ignore[arg-type]
    standing = survivors(defense, z, y)
    assert not standing[radius < eps / factor].any()
    assert standing[radius > eps].all()


@pytest.mark.parametrize(("norm", "eps", "factor"), [("linf", "1/200", 1.25), ("l2", "1/40", 1.6)])
def test_square_breaks_what_lies_a_factor_inside(norm: Any, eps: Any, factor: float) -> None:
    defense = Linear()
    x, y, noise = images(defense, spread=0.2)
    threat = ThreatModel(norm, eps)
    radius = radii(defense, x, y) if norm == "l2" else linf_radii(defense, x, y)
    easy, hard = radius < float(threat.eps) / factor, radius > float(threat.eps)
    assert easy.sum() > 5
    assert hard.sum() > 5
    z = square(Target(defense, N, white_box=False), x, y, threat, noise, queries=2000)
    standing = survivors(defense, z, y)
    assert not standing[easy].any()
    assert standing[hard].all()


def linf_radii(defense: Linear, x: Tensor, y: Tensor) -> Tensor:
    logits = defense(x, Noise.from_seed(0, len(x)))
    gap = logits.gather(1, y[:, None]) - logits
    length = (defense.weight[None] - defense.weight[y][:, None]).abs().sum(2)
    return (gap / length).scatter(1, y[:, None], math.inf).amin(1)


def test_uniform_breaks_what_lies_far_inside() -> None:
    defense = Linear()
    x, y, noise = images(defense, spread=0.2)
    radius = linf_radii(defense, x, y)
    threat = ThreatModel("linf", "1/100")  # type: ignore[arg-type]
    easy, hard = radius < 0.01 / 10, radius > 0.01
    assert easy.sum() > 5
    z = uniform(Target(defense, N, white_box=False), x, y, threat, noise, tries=50)
    standing = survivors(defense, z, y)
    assert not standing[easy].any()
    assert standing[hard].all()
    few = survivors(defense, uniform(Target(defense, N), x, y, threat, noise, tries=1), y)
    assert standing.sum() < few.sum()


def test_bpda_is_exact_where_the_gradient_is_zero() -> None:
    defense = Quantised()
    x, y, noise = images(defense)
    threat = ThreatModel("linf", "1/25")  # type: ignore[arg-type]
    # Quantisation is monotone, so what the ball's image reaches is the box of its quantised corners.
    low, high = (defense.purify(corner, noise) for corner in box(x, 1 / 25))
    exact = robust(worst_margins(defense.weight, defense.bias, y, low, high))
    assert 0.1 < exact.double().mean() < 0.7
    for optimizer in ("pgd", "apgd"):
        z = bpda(Target(defense, N), x, y, threat, noise, loss="margin-targeted", optimizer=optimizer)
        assert torch.equal(survivors(defense, z, y), exact)
    plain = pgd(Target(defense, N), x, y, threat, noise, loss="margin-targeted")
    assert survivors(defense, plain, y).sum() > exact.sum() + 10


@pytest.mark.parametrize("optimizer", ["pgd", "apgd"])
def test_through_chain_is_exact_on_a_linear_chain(optimizer: str) -> None:
    defense = Shrinking()
    x, y, noise = images(defense)
    contrast = 0.9**10
    low, high = (0.5 + contrast * (corner - 0.5) for corner in box(x, 1 / 40))
    exact = robust(worst_margins(defense.weight, defense.bias, y, low, high))
    assert 0.15 < exact.double().mean() < 0.85
    options: dict[str, Any] = {"loss": "margin-targeted", "optimizer": optimizer}
    z = through_chain(Target(defense, N), x, y, LINF, noise, **options)
    assert torch.equal(survivors(defense, z, y), exact)


def test_surrogate_is_exact_where_the_shorter_process_is_equal() -> None:
    defense = Shrinking()
    x, y, noise = images(defense)
    low, high = (0.5 + 0.9**10 * (corner - 0.5) for corner in box(x, 1 / 40))
    exact = robust(worst_margins(defense.weight, defense.bias, y, low, high))
    target = Target(defense, N)
    z = surrogate(target, x, y, LINF, noise, chain_steps=2, loss="margin-targeted")
    assert torch.equal(survivors(defense, z, y), exact)


def test_surrogate_needs_the_defense_to_confirm() -> None:
    class Different(Shrinking):
        """Its shorter process answers wrong for every image; the defense itself never does."""

        def surrogate(self, steps: int) -> Chain:
            def start(x: Tensor, noise: Noise) -> Tensor:
                return x

            def flipped(z: Tensor, noise: Noise) -> Tensor:
                return -100 * self.classify(z, noise)

            return Chain(start, []).then(flipped)

    defense = Different()
    x, y, noise = images(defense)
    target = Target(defense, N)
    tiny = ThreatModel("linf", "1/100000")  # type: ignore[arg-type]
    z = surrogate(target, x, y, tiny, noise, steps=30)
    assert survivors(defense, z, y).all()
    # 30 gradients and a last look at the shorter process; confirmations thin out: 1, 2, 4, … apart; three judged.
    assert target.calls.backward.tolist() == [30] * N
    assert 31 + 3 <= int(target.calls.forward.max()) <= 31 + 5 + 3


def test_transfer_breaks_the_classifier_alone_without_asking_the_target() -> None:
    class Behind(Linear):
        """Another function than its classifier; counts how often it is asked."""

        asked = 0

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            type(self).asked += 1
            return self.classify(x.flip(3), noise)

        def stages(self) -> Stages:
            return Stages(lambda x, noise: x.flip(3), self.classify)

    defense = Behind(handles=("stages",))
    x = torch.rand(N, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = Noise.from_seed(0, N)
    y = defense.classify(x, noise).argmax(1)
    worst = worst_margins(defense.weight, defense.bias, y, *box(x, 1 / 40)).scatter(1, y[:, None], -math.inf).amax(1)
    z = transfer(Target(defense, N), x, y, LINF, noise, steps=50, restarts=5)
    reached = losses.margin(defense.classify(z, noise), y)
    assert Behind.asked == 0
    # Not only past the boundary: as far as the ball allows.
    assert (reached > worst - 1e-6).sum() >= N - 4  # the rest lie at another class's corner
    clean = losses.margin(defense.classify(x, noise), y)
    assert ((reached - clean) / (worst - clean)).min() > 0.8


def test_transfer_attacks_the_source_it_is_given() -> None:
    defense, other = Linear(seed=1), Linear()
    x, y, noise = images(other)
    target, source = Target(defense, N), Target(other, N)
    z = transfer(target, x, y, LINF, noise, source=source, loss="margin", steps=20)
    assert not target.calls.forward.any()
    assert source.calls.backward.tolist() == [20] * N
    exact = robust(worst_margins(other.weight, other.bias, y, *box(x, 1 / 40)))
    assert survivors(other, z, y).sum() <= exact.sum() + 3


def test_eot_follows_the_expected_gradient() -> None:
    defense = Jittered()
    x, _, noise = images(defense, spread=0.5)
    y = defense.classify(x, noise).argmax(1)
    threat = ThreatModel("linf", "1/100")  # type: ignore[arg-type]
    clean = losses.margin(defense.classify(x, noise), y)
    worst = worst_margins(defense.weight, defense.bias, y, *box(x, 1 / 100)).gather(1, 1 - y[:, None]).squeeze(1)
    assert ((worst - clean) > 0.1).all()

    def gained(attack: Any, **options: Any) -> float:
        z = attack(Target(defense, N), x, y, threat, noise, loss="margin", **options)
        return float(((losses.margin(defense.classify(z, noise), y) - clean) / (worst - clean)).mean())

    for attack in (pgd, apgd):
        many, one = gained(attack, steps=40, eot=60), gained(attack, steps=40, eot=1)
        assert many > 0.8
        assert many > one + 0.15


class Quadratic(Defense):
    """The margin of class 1 over class 0 is `-1 - Σ a_i (x_i - c_i)²`: never broken, with a known optimum."""

    def __init__(self, curvature: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.card = Card(name="quadratic", title="Quadratic", summary="")
        self.n_classes = 2
        self.curvature, self.centre = curvature, centre

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        height = -1 - (self.curvature * (x - self.centre) ** 2).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(height), height], dim=1)


@pytest.mark.parametrize(("norm", "eps"), [("linf", "1/10"), ("l2", "1/2")])
@pytest.mark.parametrize("inside", [True, False])
def test_apgd_reaches_a_quadratic_optimum_that_fixed_steps_circle(norm: Any, eps: Any, inside: bool) -> None:
    """Steps of 2 · eps overshoot an optimum in the ball for ever; only halving them and restarting settles."""
    threat = ThreatModel(norm, eps)
    generator = torch.Generator().manual_seed(3)
    curvature = 10 ** (2 * torch.rand(1, SIDE, SIDE, generator=generator, dtype=torch.float64))  # condition 100
    x = torch.full((8, 1, SIDE, SIDE), 0.5, dtype=torch.float64)
    offset = torch.randn(1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    offset = offset / offset.abs().amax() if norm == "linf" else offset / offset.norm()
    centre = 0.5 + float(threat.eps) * (0.7 if inside else 3) * offset
    if inside:
        best = torch.zeros((), dtype=torch.float64)
    elif norm == "linf":
        nearest = torch.minimum(torch.maximum(centre, x[0] - 0.1), x[0] + 0.1)
        best = (curvature * (nearest - centre) ** 2).sum()
    else:  # min Σ a (δ - d)² on ‖δ‖ = eps: δ = a d / (a + λ), λ by bisection
        low, high = 0.0, 1e6
        shift = centre - 0.5
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (curvature * shift / (curvature + middle)).norm() > 0.5 else (low, middle)
        best = (curvature * (curvature * shift / (curvature + low) - shift) ** 2).sum()
    y = torch.zeros(8, dtype=torch.int64)
    defense = Quadratic(curvature, centre)

    def excess(z: Tensor) -> Tensor:
        return (curvature * (z - centre) ** 2).flatten(1).sum(1) - best

    noise = Noise.from_seed(0, 8)
    found = excess(apgd(Target(defense, 8), x, y, threat, noise, loss="margin", steps=200))
    circling = excess(
        pgd(Target(defense, 8), x, y, threat, noise, loss="margin", steps=200, alpha=2 * float(threat.eps))
    )
    start = excess(x)
    assert (found > -1e-9).all()
    assert (found < 1e-3 * start).all()
    if inside:
        assert (circling > 100 * found).all()


def test_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10)[0] == 3
    assert checkpoints(1) == [1]


def _run(**state: Tensor) -> _Run:
    run = _Run.begin(torch.arange(4), torch.zeros(4, 1, 1, 2, dtype=torch.float64), eps=1.0)
    for name, value in state.items():
        setattr(run, name, value)
    return run


def test_apgd_carries_a_quarter_of_the_last_move_on() -> None:
    """x' = x + .75 (P(x + η s) − x) + .25 (x − x_before), the paper's steps 4 and 5, where nothing is clipped."""
    x = torch.full((4, 1, 1, 2), 0.5, dtype=torch.float64)
    before, gradient = x - 0.02, torch.ones_like(x)
    run = _run(z=x, previous=before, gradient=gradient, step=torch.full((4,), 0.1, dtype=torch.float64))
    ball = Ball(ThreatModel("linf", "1/2"), x)  # type: ignore[arg-type]
    run.advance(ball, first=False)
    torch.testing.assert_close(run.z, x + 0.75 * 0.1 + 0.25 * 0.02)
    assert torch.equal(run.previous, x)
    run = _run(z=x, previous=x, gradient=gradient, step=torch.full((4,), 0.1, dtype=torch.float64))
    run.advance(ball, first=True)
    torch.testing.assert_close(run.z, x + 0.1)


def test_apgd_halves_on_either_condition() -> None:
    """Condition 1: under .75 of a window's iterations rose. Condition 2: no gain since a checkpoint that kept η."""
    flags, loss = torch.tensor([False, False, True, False]), torch.tensor([5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    run = _run(
        rises=torch.tensor([7.0, 8.0, 8.0, 8.0], dtype=torch.float64),
        halved=flags,
        best_loss=loss,
        best_loss_at_checkpoint=torch.tensor([4.0, 4.0, 5.0, 5.0], dtype=torch.float64),
        best=torch.ones(4, 1, 1, 2, dtype=torch.float64),
    )
    run.check(window=10, rho=0.75)
    assert run.halved.tolist() == [True, False, False, True]
    assert run.step.tolist() == [1, 2, 2, 1]
    assert run.z[:, 0, 0, 0].tolist() == [1, 0, 0, 1]  # and starts again from the best point
    assert not run.rises.any()


@pytest.mark.parametrize(("attack", "options"), [(pgd, {}), (apgd, {}), (apgd, {"loss": "margin-targeted"})])
def test_every_iteration_draws_anew(attack: Any, options: dict[str, Any]) -> None:
    seen: list[Tensor] = []

    class Recording(Jittered):
        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            seen.append(noise.keys)
            return super().draw(x, noise)

    defense = Recording()
    x, y, noise = images(defense, n=2)
    seen.clear()
    tiny = ThreatModel("linf", "1/100000")  # type: ignore[arg-type]
    attack(Target(defense, 2), x, y, tiny, noise, steps=6, eot=3, restarts=2, **options)
    judged = 2 * 3 * 10  # the shortlist of three shares its draws
    keys = torch.cat(seen)
    assert len(keys.unique()) == len(keys) - judged * 2 // 3


def test_pgd_starts_at_the_image_where_told() -> None:
    defense = Linear()
    x, y, noise = images(defense)
    short = {"steps": 1, "alpha": 1e-4}
    z = pgd(Target(defense, N), x, y, LINF, noise, random_start=False, **short)  # type: ignore[arg-type]
    assert (distance("linf", z, x) <= 1.0001e-4).all()
    z = pgd(Target(defense, N), x, y, LINF, noise, **short)  # type: ignore[arg-type]
    assert (distance("linf", z, x) > 0.01).all()


def test_surrogate_has_the_papers_start_and_step() -> None:
    asked: list[int] = []

    class Asked(Shrinking):
        def surrogate(self, steps: int) -> Chain:
            asked.append(steps)
            return super().surrogate(steps)

    defense = Asked()
    x, y, noise = images(defense)
    threat = ThreatModel("linf", "8/255")  # type: ignore[arg-type]
    z = surrogate(Target(defense, N), x, y, threat, noise, steps=1, chain_steps=4)
    assert asked == [4]
    still = survivors(defense, x, y)
    assert distance("linf", z, x)[still].max() == pytest.approx(0.007, abs=1e-9)


@pytest.mark.parametrize("attack", [pgd, apgd])
@pytest.mark.parametrize("restarts", [1, 3])
def test_no_model_call_is_spent_twice(attack: Any, restarts: int) -> None:
    defense = Linear()
    x, y, noise = images(defense)
    nothing = ThreatModel("linf", "1/1000000")  # type: ignore[arg-type]
    target = Target(defense, N)
    attack(target, x, y, nothing, noise, steps=7, restarts=restarts)
    assert target.calls.backward.tolist() == [7 * restarts] * N
    assert target.calls.forward.tolist() == [8 * restarts] * N


def test_broken_samples_leave_at_once() -> None:
    defense = Linear()
    x, y, noise = images(defense)
    target = Target(defense, N)
    pgd(target, x, (y + 1) % K, LINF, noise, steps=20)
    assert int(target.calls.forward.sum()) < 1.2 * N


class Coin(Defense):
    """Wrong with a probability that each image's first pixel states, whatever the rest of it is."""

    def __init__(self) -> None:
        super().__init__()
        self.card = Card(name="coin", title="Coin", summary="", traits=Traits(stochastic=True))
        self.n_classes = 2

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        wrong = noise.uniform("coin", shape=(), like=x) < x[:, 0, 0, 0]
        return torch.stack([(~wrong).to(x.dtype), wrong.to(x.dtype)], dim=1)


def _coins(probabilities: list[float]) -> tuple[Tensor, Tensor, Noise]:
    x = torch.tensor(probabilities, dtype=torch.float64)[:, None, None, None].expand(-1, 1, 2, 2).clone()
    return x, torch.zeros(len(x), dtype=torch.int64), Noise.from_seed(5, len(x))


def test_one_unlucky_draw_is_no_success() -> None:
    x, y, noise = _coins([0.5] * 200 + [1.0] * 20 + [0.0] * 20)
    standing = Standing(Target(Coin(), len(x)), x, y, noise, eot=1)
    for i in range(5):
        standing.look(standing.rows, x[standing.rows], noise.child(i))
    left = torch.zeros(len(x), dtype=torch.bool)
    left[standing.rows] = True
    assert left[:200].sum() >= 195  # each would need ten wrong draws in a row
    assert not left[200:220].any()
    assert left[220:].all()


def test_confirmations_back_off() -> None:
    x, y, noise = _coins([0.97])
    target = Target(Coin(), 1)
    standing = Standing(target, x, y, noise, eot=1)
    for i in range(64):
        if len(standing.rows):
            standing.look(standing.rows, x, noise.child(i))
    assert int(target.calls.forward.sum()) <= 64 + 10 * 7


def test_the_choice_rests_on_draws_that_had_no_part_in_the_search() -> None:
    """The stand-in praises the first point shown and blames the second; the defense knows better."""

    def liar(z: Tensor, noise: Noise) -> Tensor:
        wrong = (z[:, 0, 0, 0] < 0.5).to(z.dtype)
        return torch.stack([1 - wrong, wrong], dim=1)

    bad, good = 0.1, 0.9
    x, y, noise = _coins([0.0] * 50)
    standing = Standing(Target(Coin(), 50), x, y, noise, eot=20, forward=liar)
    for i, value in enumerate((bad, good, bad)):
        standing.look(standing.rows, torch.full_like(x, value), noise.child(i))
    assert (standing.result()[:, 0, 0, 0] == good).all()


def test_badness_ranks_draws_before_margins_and_votes_as_the_defense_does() -> None:
    y = torch.tensor([0, 0])
    # Two draws, three classes. The first sample is wrong once, narrowly; the second never, however narrowly.
    logits = torch.tensor([[[1.0, 1.1, 0], [9, 0, 0]], [[1.1, 1.0, 0], [1.1, 1.0, 0]]], dtype=torch.float64)
    one = badness(logits, y, Votes())
    assert one[0] > one[1]
    # Averaged logits turn it round: nine units of margin against a tenth.
    mean = badness(logits, y, Votes(draws=8, how="logits"))
    assert mean[0] < mean[1]
    # A majority vote that its wrong draws split between two classes stands; one that they agree on falls.
    split = torch.eye(3, dtype=torch.float64)[torch.tensor([[0, 0, 1, 2, 2], [0, 0, 1, 1, 1]])]
    plain, voted = badness(split, y, Votes()), badness(split, y, Votes(draws=5, how="majority"))
    assert (plain[0] - plain[1]).abs() < 0.25 / 5
    assert voted[1] - voted[0] > 0.15


def test_all_wrong_answers_whose_mean_is_right_are_no_success() -> None:
    logits = torch.tensor([[[9.0, 10, 0], [9.0, 0, 10]]])
    y = torch.tensor([0])
    assert all_wrong(logits, y, Votes())
    assert not all_wrong(logits, y, Votes(draws=8, how="logits"))
    assert all_wrong(logits, y, Votes(draws=8, how="majority"))


def test_square_is_not_fooled_by_lucky_draws() -> None:
    """Under noise four times the attack's whole effect the search must still climb the expected margin."""

    class Noisy(Linear):
        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return self.classify(x, noise) + noise.normal("logits", shape=(self.n_classes,), like=x)

    defense = Noisy(2, stochastic=True)
    x, _, noise = images(defense, spread=0.5, n=32)
    y = defense.classify(x, noise).argmax(1)
    threat = ThreatModel("linf", "1/100")  # type: ignore[arg-type]
    clean = losses.margin(defense.classify(x, noise), y)
    worst = worst_margins(defense.weight, defense.bias, y, *box(x, 1 / 100)).gather(1, 1 - y[:, None]).squeeze(1)
    z = square(Target(defense, 32, white_box=False), x, y, threat, noise, queries=400, eot=10)
    gained = (losses.margin(defense.classify(z, noise), y) - clean) / (worst - clean)
    assert gained.mean() > 0.5


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_square_bumps_have_unit_length(side: int) -> None:
    from assay.attacks.square import _bumps

    assert _bumps(side, torch.zeros(1, dtype=torch.float64)).norm().item() == pytest.approx(1, abs=1e-12)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    y, t = torch.tensor([0]), torch.tensor([2])
    assert losses.margin(logits, y).item() == -2
    assert losses.dlr(logits, y).item() == pytest.approx(-2 / 3)
    assert losses.margin_targeted(logits, y, t).item() == -3
    assert losses.dlr_targeted(logits, y, t).item() == pytest.approx(-3 / 3.5)
    assert losses.ce(logits, y).item() == pytest.approx(-logits.log_softmax(1)[0, 0].item())
    assert losses.ce_targeted(logits, y, t).item() == pytest.approx(logits.log_softmax(1)[0, 2].item())
    assert losses.log_margin(logits.softmax(1), y).item() == pytest.approx(-2)
    wrong = torch.tensor([1])
    assert losses.margin(logits, wrong).item() == 2
    assert losses.dlr(logits, wrong).item() == pytest.approx(2 / 3)
    # Rescaled logits have the same DLR: a defense can't hide its gradient behind a temperature.
    assert losses.dlr(1e-3 * logits, y).item() == pytest.approx(-2 / 3)


def test_losses_say_what_they_need() -> None:
    with pytest.raises(InputError, match="at least 4 classes, the target has 3; use 'margin-targeted'"):
        losses.named("dlr-targeted", 3)
    with pytest.raises(InputError, match="at least 3 classes"):
        losses.named("dlr", 2)
    with pytest.raises(InputError, match="Did you mean 'margin'"):
        losses.named("margn", 10)


def test_the_gradient_step_is_the_evaluations() -> None:
    """`climb` hands back the target's own evaluation: same loss, gradient and logits."""
    defense = Linear()
    x, y, noise = images(defense)
    standing = Standing(Target(defense, N), x, y, noise)
    evaluation, stands = standing.climb(standing.rows, x, losses.ce, (y,), noise)
    assert isinstance(evaluation, Evaluation)
    probabilities = evaluation.logits[:, 0].softmax(1)
    slope = (probabilities @ defense.weight - defense.weight[y]).view_as(x)
    torch.testing.assert_close(evaluation.gradient, slope)
    assert stands.all()
    assert torch.equal(distance("linf", standing.result(), x), torch.zeros(N, dtype=torch.float64))
