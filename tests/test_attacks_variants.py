"""`through_chain`'s variants and `transfer` on components, against closed forms."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.attack import Forward, Target
from assay.attacks import losses
from assay.attacks.through_chain import through_chain
from assay.attacks.transfer import transfer
from assay.card import Card, Handle, Traits
from assay.chain import Chain, State, inner_gradient
from assay.defense import Defense, Stages
from assay.errors import InputError, ThreatViolation
from assay.noise import Noise
from assay.norms import TOLERANCE, violation
from assay.threat import ThreatModel

SIDE = 4
D = SIDE * SIDE
LINF = ThreatModel("linf", "1/20")  # type: ignore[arg-type]


def batch(n: int = 16, low: float = 0.2, high: float = 0.8) -> tuple[Tensor, Tensor, Noise]:
    x = torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return low + (high - low) * x, torch.zeros(n, dtype=torch.int64), Noise.from_seed(0, n)


class Toy(Defense):
    """Two classes; a subclass gives the margin of class 1, the wrong one."""

    def __init__(self, handles: tuple[Handle, ...], *, stochastic: bool = False) -> None:
        super().__init__()
        self.card = Card(
            name="toy",
            title="Toy",
            summary="",
            traits=Traits(stochastic=stochastic, iterative=True, purifies=True),
            handles=handles,
        )
        self.n_classes = 2

    @staticmethod
    def logits(margin: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Guided(Toy):
    """One step against the gradient of E(s) = Σ a·s³ / 3, then a linear margin w · s − 100, never positive.

    s' = s − a·s², so that the margin's exact slope is w·(1 − 2·a·s): for a = 2 the second-order
    term turns its sign wherever s > 1/4. Without that term the slope is w.
    """

    curvature = 2.0

    def __init__(self) -> None:
        super().__init__(("chain",))
        self.weight = torch.randn(D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def chain(self) -> Chain:
        def step(state: State, x: Tensor, noise: Noise) -> State:
            assert isinstance(state, Tensor)
            return state - inner_gradient(lambda s: (self.curvature * s**3 / 3).flatten(1).sum(1), state)

        def readout(state: State, x: Tensor, noise: Noise) -> Tensor:
            assert isinstance(state, Tensor)
            return self.logits(state.flatten(1) @ self.weight - 100)

        return Chain(lambda x, noise: x, [step], readout)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise)

    def margins(self, x: Tensor) -> Tensor:
        return (x - self.curvature * x**2).flatten(1) @ self.weight - 100


def differentiated(monkeypatch: pytest.MonkeyPatch, defense: Defense, **options: Any) -> Forward:
    """What `through_chain` hands to its optimizer."""
    caught: list[Forward] = []

    def spy(optimizer: str, target: Target, x: Tensor, *rest: Any, forward: Forward, **more: Any) -> Tensor:
        caught.append(forward)
        return x

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("assay.attacks.through_chain"), "ascend", spy)
        x, y, noise = batch()
        through_chain(Target(defense, len(x)), x, y, LINF, noise, **options)
    return caught[0]


def test_first_order_lacks_the_second_order_term_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, (x, y, noise) = Guided(), batch()
    target = Target(defense, len(x))
    found = {
        variant: target.gradient(
            x, (y,), losses.margin, noise, forward=differentiated(monkeypatch, defense, variant=variant)
        )
        for variant in ("exact", "first-order")
    }
    weight = defense.weight.view(1, 1, SIDE, SIDE).expand_as(x)
    torch.testing.assert_close(found["first-order"].gradient, weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found["exact"].gradient, weight * (1 - 2 * defense.curvature * x), rtol=1e-12, atol=1e-14
    )
    assert torch.equal(found["exact"].logits, found["first-order"].logits)  # the forward pass is the defense's


def test_the_second_order_term_decides_who_reaches_the_optimum() -> None:
    """Away from s = 1/4 the margin is monotone in each pixel, so the optimum is a corner of the ball."""
    defense, (x, y, noise) = Guided(), batch(low=0.35, high=0.9)
    assert (x > 0.25 + 1 / 20).all()
    corner = x + torch.where(-defense.weight > 0, 1.0, -1.0).view(1, SIDE, SIDE) / 20
    best = defense.margins(corner)
    clean = defense.margins(x)

    def gained(variant: str) -> Tensor:
        z = through_chain(Target(defense, len(x)), x, y, LINF, noise, variant=variant, steps=20)
        return (defense.margins(z) - clean) / (best - clean)

    torch.testing.assert_close(gained("exact"), torch.ones(len(x), dtype=torch.float64), rtol=0, atol=1e-6)
    assert gained("first-order").max() < 0.6  # it climbs the wrong way, and keeps the best of what it met


class Labelled(Toy):
    """A margin that a hard label of the image gates: between labels there is no gradient.

    The label is whether ⟨w, x − .5⟩ exceeds a threshold; the relaxed process has a sigmoid there.
    """

    def __init__(self, *, lies: bool = False, handles: tuple[Handle, ...] = ("chain", "relaxed")) -> None:
        super().__init__(handles)
        self.weight = torch.randn(D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.reach = float(self.weight.abs().sum()) / 20
        self._lies = lies

    def label(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight - 0.8 * self.reach

    def _process(self, decide: Callable[[Tensor], Tensor]) -> Chain:
        return Chain(lambda x, noise: decide(self.label(x)), [lambda s, x, noise: s])

    def chain(self) -> Chain:
        return self._process(lambda value: self.logits((value > 0).double() - 0.5) + 0 * value[:, None])

    def relaxed(self) -> Chain:
        if self._lies:
            return self._process(lambda value: self.logits(1 + value.sigmoid()))
        return self._process(lambda value: self.logits(value.sigmoid() - 0.5))

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise)


def right(defense: Defense, z: Tensor) -> int:
    return int((defense.draw(z, Noise.from_seed(9, len(z))).argmax(1) == 0).sum())


@pytest.mark.parametrize("optimizer", ["apgd", "pgd"])
def test_relaxed_finds_what_a_hard_choice_hides(optimizer: str) -> None:
    defense, (x, y, noise) = Labelled(), batch(low=0.5, high=0.5)
    assert right(defense, x) == len(x)
    hard, soft = (
        through_chain(Target(defense, len(x)), x, y, LINF, noise, variant=variant, optimizer=optimizer, steps=20)
        for variant in ("exact", "relaxed")
    )
    assert right(defense, hard) == len(x)
    assert right(defense, soft) == 0
    assert (violation("linf", 1 / 20, soft, x) <= TOLERANCE).all()


def test_what_the_relaxed_process_gets_wrong_counts_only_where_the_defense_agrees() -> None:
    """A relaxed process that is always wrong: confirmations thin out, and nothing leaves the batch."""
    defense, (x, y, noise) = Labelled(lies=True), batch(low=0.5, high=0.5)
    target = Target(defense, len(x))
    tiny = ThreatModel("linf", "1/100000")  # type: ignore[arg-type]
    z = through_chain(target, x, y, tiny, noise, variant="relaxed", steps=30)
    assert right(defense, z) == len(x)
    assert target.calls.backward.tolist() == [30] * len(x)
    assert 31 + 3 <= int(target.calls.forward.max()) <= 31 + 5 + 3


def test_variants_say_what_they_need() -> None:
    defense, (x, y, noise) = Guided(), batch()
    target = Target(defense, len(x))
    with pytest.raises(InputError, match=r"no variant called 'first_order'.*Did you mean 'first-order'"):
        through_chain(target, x, y, LINF, noise, variant="first_order")
    with pytest.raises(ThreatViolation, match="no 'relaxed' handle"):
        through_chain(target, x, y, LINF, noise, variant="relaxed")
    with pytest.raises(ThreatViolation, match="no 'chain' handle"):
        through_chain(Target(Labelled(handles=("relaxed",)), len(x)), x, y, LINF, noise, variant="first-order")


class Gated(Toy):
    """Two linear classifiers; the first pixel, whose rounding no attack here can change, says which one answers."""

    def __init__(self, handles: tuple[Handle, ...] = ("stages", "components"), *, stochastic: bool = False) -> None:
        super().__init__(handles, stochastic=stochastic)
        generator = torch.Generator().manual_seed(6)
        self.weight = torch.randn(2, D, generator=generator, dtype=torch.float64)
        self.weight[:, 0] = 0
        self.asked = 0

    def margin(self, x: Tensor, which: int) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight[which] - 1

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        self.asked += len(x)
        gate = x[:, 0, 0, 0] > 0.5
        return self.logits(torch.where(gate, self.margin(x, 1), self.margin(x, 0)))

    def stages(self) -> Stages:
        return Stages(lambda x, noise: x, lambda x, noise: self.logits(self.margin(x, 0)))

    def components(self) -> Mapping[str, Callable[[Tensor, Noise], Tensor]]:
        return {
            "first": lambda x, noise: self.logits(self.margin(x, 0)),
            "second": lambda x, noise: self.logits(self.margin(x, 1)),
        }


def gated_batch() -> tuple[Tensor, Tensor, Noise, Tensor]:
    x, y, noise = batch(32, 0.4, 0.6)
    gate = torch.arange(32) % 2 == 1
    x[:, 0, 0, 0] = torch.where(gate, 0.9, 0.1)
    return x, y, noise, gate


def worst(defense: Gated, x: Tensor, which: int) -> Tensor:
    """The exact highest margin of one of the classifiers in the ball (no box is near)."""
    return defense.margin(x, which) + defense.weight[which].abs().sum() / 20


@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
def test_the_targets_own_draws_choose_among_components(stochastic: bool) -> None:
    defense = Gated(stochastic=stochastic)
    x, y, noise, gate = gated_batch()
    target = Target(defense, 32)
    z = transfer(target, x, y, LINF, noise, source="components", steps=10)
    reached = torch.where(gate, defense.margin(z, 1), defense.margin(z, 0))
    best = torch.where(gate, worst(defense, x, 1), worst(defense, x, 0))
    torch.testing.assert_close(reached, best, rtol=0, atol=1e-9)
    draws = 10 if stochastic else 1
    assert defense.asked == 2 * draws * 32
    # Each component: two losses, ten gradients, a look, a shortlist's second look where draws are random, a choice.
    each = 2 * (11 + (3 * draws if stochastic else 0)) + 2 * draws
    assert target.calls.forward.tolist() == [2 * each + 2 * draws] * 32
    assert target.calls.backward.tolist() == [2 * 2 * 10] * 32


def test_components_go_further_than_the_classifier_alone() -> None:
    """The classifier behind the purifier answers for half of the images; its adversarial examples miss the rest."""
    defense = Gated()
    x, y, noise, gate = gated_batch()
    z = transfer(Target(defense, 32), x, y, LINF, noise, source=None, steps=10)
    assert defense.asked == 0
    torch.testing.assert_close(defense.margin(z, 0), worst(defense, x, 0), rtol=0, atol=1e-9)
    assert (defense.margin(z, 1) < worst(defense, x, 1) - 0.1)[gate].all()


def test_without_components_the_classifier_stands_in() -> None:
    defense = Gated(handles=("stages",))
    x, y, noise, _ = gated_batch()
    options: dict[str, Any] = {"steps": 10}
    alone = transfer(Target(defense, 32), x, y, LINF, noise, source=None, **options)
    assert torch.equal(alone, transfer(Target(defense, 32), x, y, LINF, noise, source="components", **options))
    assert defense.asked == 0


def test_transfer_says_what_it_needs() -> None:
    x, y, noise, _ = gated_batch()
    with pytest.raises(InputError, match=r"no source called 'component'.*Did you mean 'components'"):
        transfer(Target(Gated(), 32), x, y, LINF, noise, source="component")
    with pytest.raises(ThreatViolation, match="no 'stages' handle"):
        transfer(Target(Gated(handles=()), 32), x, y, LINF, noise, source="components")
    with pytest.raises(ThreatViolation, match="black-box"):
        transfer(Target(Gated(), 32, white_box=False), x, y, LINF, noise, source="components")

    class Nothing(Gated):
        def components(self) -> Mapping[str, Callable[[Tensor, Noise], Tensor]]:
            return {}

    with pytest.raises(InputError, match="names none"):
        transfer(Target(Nothing(), 32), x, y, LINF, noise, source="components")


def test_an_empty_batch_asks_nobody() -> None:
    defense = Gated()
    x, y, noise, _ = gated_batch()
    z = transfer(Target(defense, 32), x[:0], y[:0], LINF, noise[:0], source="components")
    assert z.shape == (0, 1, SIDE, SIDE)
    assert defense.asked == 0
