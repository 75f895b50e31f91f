"""A loss at every step: the same process, exact gradients, the clean path of the same noise, and a masked readout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.attack import Forward, Target
from assay.attacks import step_losses
from assay.attacks.step_losses import deviation, lead, leading, trajectory, with_deviations
from assay.attacks.through_chain import through_chain
from assay.card import Card, Traits
from assay.chain import Chain, State
from assay.defense import Defense
from assay.errors import InputError
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel

N, K, SIDE, STEPS = 6, 3, 4, 3
LINF = ThreatModel("linf", "1/10")  # type: ignore[arg-type]


def images(n: int = N, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = torch.randn(K, SIDE * SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classify(state: State, x: Tensor, noise: Noise) -> Tensor:
    part = state if isinstance(state, Tensor) else state[0]
    return (part * x).flatten(1) @ WEIGHT.T


def blur(z: Tensor, noise: Noise) -> Tensor:
    jitter = 0.1 * noise.normal("z", shape=z.shape[1:], like=z)
    return 0.7 * z.tanh() + 0.3 * z.mean((1, 2, 3), keepdim=True) + jitter


def single() -> Chain:
    return Chain(lambda x, noise: blur(x, noise), [lambda s, x, noise: blur(s, noise)] * STEPS, classify)  # type: ignore[arg-type]


def tuple_of_one() -> Chain:
    return Chain(lambda x, noise: (blur(x, noise),), [lambda s, x, noise: (blur(s[0], noise),)] * STEPS, classify)


def accumulator() -> Chain:
    """Its first tensor is no image and starts at 0, as the sums of a diffusion classifier do."""

    def start(x: Tensor, noise: Noise) -> State:
        return x.new_zeros(len(x), K), torch.arange(len(x))

    def step(state: State, x: Tensor, noise: Noise) -> State:
        sums, rows = state
        return sums + blur(x, noise).flatten(1) @ WEIGHT.T, rows

    return Chain(start, [step] * STEPS)


def counter() -> Chain:
    """A state that leads with integers, of which nothing can be asked."""
    return Chain(
        lambda x, noise: (torch.zeros(len(x), dtype=torch.int64), x),
        [lambda s, x, noise: (s[0] + 1, blur(s[1], noise))] * STEPS,
        lambda s, x, noise: classify(s[1], x, noise),
    )


CHAINS: list[Callable[[], Chain]] = [single, tuple_of_one, accumulator, counter]
each_chain = pytest.mark.parametrize("make", CHAINS)


class Process(Defense):
    """A defense that is a chain."""

    def __init__(self, chain: Chain, k: int = K, *, stochastic: bool = False) -> None:
        super().__init__()
        self.card = Card(
            name="process",
            title="Process",
            summary="",
            traits=Traits(stochastic=stochastic, iterative=True),
            handles=("chain",),
        )
        self.n_classes = k
        self._chain = chain

    def chain(self) -> Chain:
        return self._chain

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self._chain(x, noise, mode="full")


@each_chain
def test_the_process_itself_is_unchanged(make: Callable[[], Chain]) -> None:
    chain, noise = make(), Noise.from_seed(0, N)
    reference, answer = trajectory(chain, images(), noise)
    assert torch.equal(answer, chain(images(), noise))
    assert len(reference) == STEPS + 1
    z = images(seed=5)
    assert torch.equal(with_deviations(chain, reference)(z, noise)[:, :-1], chain(z, noise))


@each_chain
def test_the_extra_column_is_the_mean_deviation(make: Callable[[], Chain]) -> None:
    chain, noise, z = make(), Noise.from_seed(0, N), images(seed=5)
    (reference, _), (states, _) = trajectory(chain, images(), noise), trajectory(chain, z, noise)
    expected = torch.zeros(N, dtype=torch.float64)
    for state, at in zip(states, reference, strict=True):
        s, r = state.double(), at.double()
        total = (s**2).sum(1) + (r**2).sum(1)
        expected += torch.where(total > 0, 2 * ((s - r) ** 2).sum(1) / total, 0.0) / (STEPS + 1)
    found = with_deviations(chain, reference)(z, noise)[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    if make is not counter:
        assert (found > 1e-3).all()


@each_chain
def test_the_replayed_gradient_is_that_of_the_whole_graph(make: Callable[[], Chain]) -> None:
    chain, noise = make(), Noise.from_seed(0, N)
    carried = with_deviations(chain, trajectory(chain, images(), noise)[0])
    slopes = []
    for mode in ("exact", "full"):
        z = images(seed=5).requires_grad_()
        carried(z, noise, mode=mode).sum().backward()
        assert z.grad is not None
        slopes.append(z.grad)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-12)


def test_deviation_by_hand() -> None:
    like = torch.zeros((), dtype=torch.float64)
    zero, one, two = (torch.full((1, 5), value, dtype=torch.float64) for value in (0.0, 1.0, 2.0))
    assert deviation(one, one, like).item() == 0
    assert deviation(two, one, like).item() == pytest.approx(2 / 5)
    assert deviation(10 * two, 10 * one, like).item() == pytest.approx(2 / 5)  # no unit
    assert deviation(-one, one, like).item() == 4
    assert deviation(1.001 * one, one, like).item() == pytest.approx(1e-6, rel=2e-3)  # relative mean square
    still = zero.clone().requires_grad_()
    value = deviation(still, zero, like)
    (slope,) = torch.autograd.grad(value.sum(), still)
    assert value.item() == 0
    assert not slope.any()  # not NaN
    assert deviation((one, zero), one, like).item() == 0
    assert leading(torch.zeros(4)).shape == (4, 1)


def differentiated(
    monkeypatch: pytest.MonkeyPatch, defense: Defense, x: Tensor, noise: Noise, **options: Any
) -> Forward:
    """What `step_losses` hands to its optimizer."""
    caught: list[Forward] = []

    def spy(optimizer: str, target: Target, x: Tensor, *rest: Any, forward: Forward, **more: Any) -> Tensor:
        caught.append(forward)
        return x

    monkeypatch.setattr(step_losses, "ascend", spy)
    y = torch.zeros(len(x), dtype=torch.int64)
    step_losses.step_losses(Target(defense, 99), x, y, LINF, noise, **options)
    return caught[0]


@each_chain
def test_each_row_is_held_against_its_own_image_under_its_own_noise(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Chain]
) -> None:
    """At the clean images nothing deviates, whichever rows and draws are asked for, and in whatever order."""
    x, noise = images(9), Noise.from_seed(0, 12)[torch.tensor([11, 3, 7, 0, 1, 2, 9, 10, 8])]
    forward = differentiated(monkeypatch, Process(make(), stochastic=True), x, noise)
    for rows in (torch.arange(9), torch.tensor([8, 0, 4]), torch.tensor([2])):
        drawn = noise[rows].child("anything").draws(4)
        z = x[rows].repeat_interleave(4, 0)
        answer = forward(z.requires_grad_(), drawn)
        assert isinstance(answer, tuple)
        assert not answer[1].any()
        moved = forward(z.detach() + 0.05, drawn)
        assert isinstance(moved, tuple)
        assert bool((moved[1] > 0).all()) == (make is not counter)


def test_looking_costs_no_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x, noise = Process(single()), images(), Noise.from_seed(0, N)
    forward = differentiated(monkeypatch, defense, x, noise)
    with torch.no_grad():
        plain = forward(x, noise)
        assert isinstance(plain, Tensor)
        assert torch.equal(plain, defense.draw(x, noise))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_full_budget_adds_about_the_weight(monkeypatch: pytest.MonkeyPatch, norm: Any) -> None:
    """A process that passes the image on: white images moved by all that the ball allows."""
    chain = Chain(lambda x, noise: x, [lambda s, x, noise: s] * STEPS, classify)
    x, noise = torch.ones(2, 1, SIDE, SIDE, dtype=torch.float64), Noise.from_seed(0, 2)
    monkeypatch.setattr(f"{__name__}.LINF", ThreatModel(norm, "1/1000"))  # type: ignore[arg-type]
    forward = differentiated(monkeypatch, Process(chain), x, noise, weight=3.0)
    moved = forward(Ball(LINF, x).step(x, -x, 1 / 1000), noise)
    assert isinstance(moved, tuple)
    torch.testing.assert_close(moved[1], 3.0 * lead(chain(x, noise)), rtol=2e-3, atol=0)


def test_lead_is_what_the_answer_has_to_lose() -> None:
    assert lead(torch.tensor([[1.0, 4.0, 2.5], [7.0, 0.0, 0.0], [3.0, 3.0, 0.0]])).tolist() == [1.5, 7.0, 1.0]


class Pooled(Defense):
    """Averages the image, then answers with the grey level it falls in: no gradient at all, and no purified image.

    Level 0 of 2 is a mean within .05 of .5; everything else is level 1.
    """

    def __init__(self, tolerance: float = 0.05) -> None:
        super().__init__()
        self.card = Card(name="pooled", title="Pooled", summary="", traits=Traits(iterative=True), handles=("chain",))
        self.n_classes = 2
        self._tolerance = tolerance

    def chain(self) -> Chain:
        def readout(state: State, x: Tensor, noise: Noise) -> Tensor:
            assert isinstance(state, Tensor)
            off = ((state.flatten(1)[:, 0] - 0.5).abs() > self._tolerance).to(x.dtype)
            return torch.stack([1 - off, off], 1) + 0 * state.flatten(1)

        return Chain(lambda x, noise: x.mean((1, 2, 3), keepdim=True), [lambda s, x, noise: s] * 2, readout)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("optimizer", ["apgd", "pgd"])
def test_breaks_what_has_no_gradient_but_a_path(norm: Any, optimizer: str) -> None:
    """The mean can move by eps, or eps / side in l2: twice the tolerance; a random point moves it a tenth of that."""
    threat = ThreatModel(norm, "1/10" if norm == "linf" else "2/5")  # type: ignore[arg-type]
    x = 0.5 + 0.2 * (images(20) - 0.5)
    x = x - x.mean((1, 2, 3), keepdim=True) + 0.5
    y, noise, defense = torch.zeros(20, dtype=torch.int64), Noise.from_seed(0, 20), Pooled()

    def standing(z: Tensor) -> int:
        return int((defense(z, noise).argmax(1) == y).sum())

    common: dict[str, Any] = {"steps": 20, "optimizer": optimizer}
    assert standing(step_losses.step_losses(Target(defense, 20), x, y, threat, noise, **common)) == 0
    assert standing(through_chain(Target(defense, 20), x, y, threat, noise, **common)) >= 18
    assert standing(step_losses.step_losses(Target(defense, 20), x, y, threat, noise, weight=0.0, **common)) >= 18


class Shrinking(Defense):
    """Ten linear steps towards grey, two classes: the exact worst margin is known in either norm."""

    contrast = 0.9**10

    def __init__(self, *, stochastic: bool = False) -> None:
        super().__init__()
        self.card = Card(
            name="shrinking",
            title="Shrinking",
            summary="",
            traits=Traits(stochastic=stochastic, iterative=True),
            handles=("chain",),
        )
        self.n_classes = 2
        self._sigma = 0.01 if stochastic else 0.0
        self.slope = torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def margins(self, x: Tensor) -> Tensor:
        """Of class 1 over class 0, without noise."""
        return self.contrast * ((x - 0.5).flatten(1) @ self.slope) - 1

    def chain(self) -> Chain:
        def step(state: State, x: Tensor, noise: Noise) -> State:
            assert isinstance(state, Tensor)
            return state + 0.1 * (0.5 - state) + self._sigma * noise.normal("z", shape=x.shape[1:], like=x)

        def readout(state: State, x: Tensor, noise: Noise) -> Tensor:
            assert isinstance(state, Tensor)
            margin = (state - 0.5).flatten(1) @ self.slope - 1
            return torch.stack([torch.zeros_like(margin), margin], 1)

        return Chain(lambda x, noise: x, [step] * 10, readout)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise)


@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", "1/20"), ("l2", "1/5")])
def test_comes_near_a_linear_optimum(norm: Any, eps: Any, stochastic: bool) -> None:
    """Nine tenths of the exact gain: the deviation is symmetric, so it bends the path without deciding its side."""
    defense, threat = Shrinking(stochastic=stochastic), ThreatModel(norm, eps)
    x, noise = 0.5 + 0.2 * (images(32) - 0.5), Noise.from_seed(0, 32)
    y = torch.zeros(32, dtype=torch.int64)
    direction = defense.slope.sign() if norm == "linf" else defense.slope / defense.slope.norm()
    clean = defense.margins(x)
    best = defense.contrast * float(threat.eps) * float(direction @ defense.slope)
    assert (clean + best < 0).all()  # nothing breaks, so every search goes to its end
    options: dict[str, Any] = {"steps": 40, "eot": 4}
    z = step_losses.step_losses(Target(defense, 32), x, y, threat, noise, **options)
    gained = (defense.margins(z) - clean) / best
    assert gained.min() > 0.9
    assert gained.max() < 1 + 1e-9


def test_costs_a_clean_run_for_each_gradient() -> None:
    """steps · eot gradients, as many clean runs, a last look, and ten draws for each of three on the shortlist."""
    defense, nothing = Shrinking(stochastic=True), ThreatModel("linf", "1/1000000")  # type: ignore[arg-type]
    x, y, noise = images(), torch.zeros(N, dtype=torch.int64), Noise.from_seed(0, N)
    target = Target(defense, N)
    step_losses.step_losses(target, x * 0 + 0.5, y, nothing, noise, steps=5, eot=3, restarts=2)
    assert target.calls.backward.tolist() == [5 * 3 * 2] * N
    assert target.calls.forward.tolist() == [(2 * 5 + 1) * 3 * 2 + 3 * 10] * N


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_below_zero_is_refused(weight: float) -> None:
    x, y, noise = images(), torch.zeros(N, dtype=torch.int64), Noise.from_seed(0, N)
    with pytest.raises(InputError, match="weight of at least 0"):
        step_losses.step_losses(Target(Shrinking(), N), x, y, LINF, noise, weight=weight)


def test_an_empty_ball_is_no_division_by_zero() -> None:
    x, y, noise = images(), torch.zeros(N, dtype=torch.int64), Noise.from_seed(0, N)
    z = step_losses.step_losses(Target(Shrinking(), N), x, y, ThreatModel("linf", "0"), noise, steps=2)  # type: ignore[arg-type]
    assert torch.equal(z, x)
