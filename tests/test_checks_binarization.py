"""The binarization test: planted adversarial examples, attacks that find them and attacks that can't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay import data
from assay.attack import Target
from assay.card import Card, Traits, Votes
from assay.checks import Subject
from assay.checks.binarization import THRESHOLD, check
from assay.checks.binary_head import BinaryDefense, Heads, with_own_features
from assay.checks.planting import DETERMINISTIC, plant
from assay.defense import Defense
from assay.finding import Finding
from assay.noise import Noise
from assay.norms import Ball
from assay.registry import ATTACKS, DEFENSES
from assay.threat import Norm, ThreatModel

RADII: dict[Norm, Fraction] = {"linf": Fraction(1, 10), "l2": Fraction(1, 2)}
NORMS: Sequence[Norm] = ("linf", "l2")
STEPS = {"steps": 20}


def subject(defense: Defense, norm: Norm = "linf", n: int = 8) -> Subject:
    ids = data.board_ids("digits")[:n]
    x, y = data.load("digits", ids)
    return Subject(defense, x, y, ids, Noise.from_seed(0, ids).child("preflight"), ThreatModel(norm, RADII[norm]))


def run(name: str, attack: str | Callable[..., Tensor], norm: Norm = "linf", n: int = 8, **options: Any) -> Finding:
    function = ATTACKS[attack].attack if isinstance(attack, str) else attack
    return check(subject(DEFENSES[name].build("digits"), norm, n), function, {**STEPS, **options})


# Attacks that no number should rest on.


def identity(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, **options: Any) -> Tensor:
    return x.clone()


def downhill(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, **options: Any) -> Tensor:
    ball, z = Ball(threat, x), x
    for i in range(20):
        found = target.gradient(z, (y,), nn.CrossEntropyLoss(reduction="none"), noise.child(i))
        z = ball.step(z, -found.gradient, ball.eps / 8)
    return z


def outside(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, **options: Any) -> Tensor:
    found = target.gradient(x, (y,), nn.CrossEntropyLoss(reduction="none"), noise)
    return (x + 3 * float(threat.eps) * found.gradient.sign()).clamp(0, 1)


def not_a_number(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, **options: Any) -> Tensor:
    return x * torch.nan


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["undefended", "adversarial_training"])
@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_honest_attacks_on_honest_networks_pass(name: str, attack: str, norm: Norm) -> None:
    found = run(name, attack, norm)
    assert found.status == "pass"
    assert found.value is not None
    assert found.value >= 0.95
    assert found.data["random_success"] < 0.05
    assert found.data["tested"] >= 24


@pytest.mark.parametrize("attack", [identity, downhill, outside, not_a_number])
@pytest.mark.parametrize("name", ["undefended", "random_resize"])
def test_broken_attacks_are_flagged(name: str, attack: Callable[..., Tensor]) -> None:
    found = run(name, attack)
    assert found.status == "flag"
    assert found.value is not None
    assert found.value < 0.2
    assert found.samples


def test_a_step_of_no_length_is_flagged() -> None:
    found = run("undefended", "pgd", alpha=0.0)
    assert found.status == "flag"
    assert found.value is not None
    assert found.value < 0.2


class Masked(Defense):
    """The undefended network behind `before` and in front of `after`."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.card = Card(name="masked", title="Masked", summary="")
        self.n_classes = 10
        self.network = DEFENSES["undefended"].build("digits")
        self.before, self.after = before, after
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.after(self.network.draw(self.before(x), noise))


def same(z: Tensor) -> Tensor:
    return z


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "severed": (Tensor.detach, same),
    "severed late": (same, Tensor.detach),
    "quantised pixels": (lambda x: (x * 8).round() / 8, same),
    "quantised logits": (same, lambda z: z.mul(4).round() / 4),
    "saturated": (same, lambda z: 1e4 * z),
    "reversed": (lambda x: 2 * x.detach() - x, same),
    "staircase": (lambda x: x.detach() + 0.1 * torch.sin(1e4 * x) * 1e-4, same),
}


@pytest.mark.parametrize("mask", list(MASKS))
def test_masked_gradients_are_flagged(mask: str) -> None:
    found = check(subject(Masked(*MASKS[mask])), ATTACKS["pgd"].attack, STEPS)
    assert found.status == "flag"
    assert found.value is None or found.value < THRESHOLD


def test_an_attack_that_undoes_the_mask_passes() -> None:
    assert run("bit_depth", "pgd").status == "flag"
    assert run("bit_depth", "bpda").status == "pass"
    assert run("saturated_logits", "apgd", loss="ce").status == "flag"
    # Two classes have no third logit: DLR becomes the margin.
    assert run("saturated_logits", "apgd", loss="dlr-targeted").status == "pass"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["smoothing", "random_resize"])
def test_stochastic_defenses_are_tested_in_the_mean(name: str, norm: Norm) -> None:
    found = run(name, "apgd", norm, eot=4)
    assert found.status == "pass"
    assert found.data["tested"] >= 4


def test_the_chain_leads_to_the_heads() -> None:
    defense = DEFENSES["diffpure"].build("digits")
    given = subject(defense, n=2)
    base = with_own_features(defense, given.x, given.noise, given.target())
    assert base.n_classes > 10
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, base.n_classes, generator=generator)
    binary = BinaryDefense(base, Heads(torch.zeros_like(weight), weight, torch.zeros(2)))
    with torch.no_grad():
        expected = binary.draw(given.x, given.noise)
        stages = binary.stages()
        assert expected.shape == (2, 2)
        assert torch.allclose(binary.chain()(given.x, given.noise), expected)
        assert stages.classify(stages.purify(given.x, given.noise), given.noise).shape == (2, 2)
        assert binary.surrogate(2)(given.x, given.noise).shape == (2, 2)
        # Each row is read by its own slot's head, wherever the row is.
        assert torch.allclose(binary.draw(given.x[1:], given.noise[1:]), expected[1:], atol=1e-4)
    assert set(binary.card.handles) == {"stages", "chain", "surrogate"}
    x = given.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(binary.chain()(x, given.noise)[:, 1].sum(), x)
    assert bool((slope != 0).any())


def test_features_are_found_by_what_happens() -> None:
    def dims(defense: Defense) -> int:
        given = subject(defense, n=4)
        before = {name: value.clone() for name, value in defense.state_dict().items()}
        base = with_own_features(defense, given.x, given.noise, given.target())
        assert all(torch.equal(value, before[name]) for name, value in defense.state_dict().items())
        assert not any(module._forward_hooks for module in defense.modules())
        assert defense.n_classes == 10
        return base.n_classes

    assert dims(DEFENSES["undefended"].build("digits")) > 10
    assert dims(Masked(same, same)) > 10
    # What comes behind the last layer is the defense's too.
    assert dims(Masked(same, lambda z: z.round())) == 10
    assert dims(DEFENSES["diffusion_classifier"].build("digits")) == 10
    closed_over = Masked(same, same)
    network = closed_over.network
    closed_over.draw = lambda x, noise: network.draw(x, noise)  # type: ignore[method-assign]
    assert dims(closed_over) == 10


class Constant(Defense):
    def __init__(self, spread: float = 0.0, draws: int = 1) -> None:
        super().__init__()
        votes = Votes(draws=draws, how="majority")
        self.card = Card(
            name="constant", title="Constant", summary="", traits=Traits(stochastic=spread > 0), votes=votes
        )
        self.n_classes = 10
        self.spread = spread

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.spread * noise.normal("z", shape=(10,), like=x)


@pytest.mark.parametrize("defense", [Constant(), Constant(1.0), Constant(1.0, 8)])
def test_where_nothing_can_be_planted_nothing_is_claimed(defense: Defense) -> None:
    found = check(subject(defense), ATTACKS["pgd"].attack, STEPS)
    assert (found.status, found.value) == ("flag", None)
    assert "could be planted" in found.message


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_has_its_closed_form(conftest_linear: Defense, images: Tensor, norm: Norm) -> None:
    x = images[:16]
    given = Subject(
        conftest_linear,
        x,
        torch.zeros(16, dtype=torch.int64),
        range(16),
        Noise.from_seed(0, 16),
        ThreatModel(norm, Fraction(1, 10)),
    )
    target = given.target()
    base = with_own_features(conftest_linear, x, given.noise, target)
    assert base.n_classes == 16  # the pixels
    planted = plant(given, base, DETERMINISTIC, 1, given.noise)
    assert bool(planted.sound.all())
    binary = BinaryDefense(base, planted.heads)
    with torch.no_grad():
        here, edge = (binary.draw(z, given.noise).diff(dim=1)[:, 0] for z in (x, planted.edge))
        logits = conftest_linear.draw(x, given.noise).topk(2).values
    assert torch.allclose(-here, logits[:, 0] - logits[:, 1], rtol=1e-3)
    assert bool((edge > 0).all())
    # The highest score in the ball: to the first order, which is all there is.
    ball = Ball(given.threat, x)
    best = ball.project(x + 10 * ball.eps * ball.steepest(planted.heads.weight.to(x).view_as(x)))
    with torch.no_grad():
        assert bool((binary.draw(best, given.noise).diff(dim=1)[:, 0] > 0).all())
    assert bool((planted.chance < 0.05).all())
    assert check(given, ATTACKS["apgd"].attack, STEPS).value == 1.0


@pytest.fixture
def conftest_linear(linear: Defense) -> Defense:
    return linear


def test_one_image_is_enough_and_the_same_seed_gives_the_same_finding() -> None:
    one = run("undefended", "pgd", n=1)
    assert one == run("undefended", "pgd", n=1)
    assert one.data["planted"] == 4


@pytest.mark.parametrize("n", [2, 11, 33])
def test_any_number_of_images_will_do(n: int) -> None:
    found = run("saturated_logits", "pgd", n=n, loss="margin")
    assert found.status == "pass"
    assert found.data["planted"] >= n


def test_calls_are_counted() -> None:
    given = subject(DEFENSES["undefended"].build("digits"), n=8)
    check(given, identity)
    # Features and their copy; 641 points a sample; the margin; image, edge point and candidate of 4 boundaries each.
    assert given.calls == (8 * (2 + 641 + 1 + 4 * 3), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DEFENSES if "digits" in DEFENSES[name].card.datasets])
def test_every_registered_defense_can_be_tested(name: str) -> None:
    found = run(name, "apgd")
    assert found.status in ("pass", "flag")
    assert found.data["tested"] + found.data["left_to_chance"] == found.data["planted"]


def test_runs_that_aimed_at_several_classes_become_restarts() -> None:
    seen: dict[str, Any] = {}

    def attack(target: Any, x: Tensor, y: Tensor, threat: Any, noise: Noise, **options: Any) -> Tensor:
        seen.update(options)
        return x

    ids = data.board_ids("digits")[:4]
    x, y = data.load("digits", ids)
    defense = DEFENSES["undefended"].build("digits")
    made = Subject(defense, x, y, ids, Noise.from_seed(0, ids), ThreatModel("l2", Fraction(3, 4)))
    check(made, attack, {"steps": 7, "loss": "dlr-targeted", "targets": 9, "restarts": 2})
    assert seen == {"steps": 7, "loss": "margin", "restarts": 18}
    seen.clear()
    check(made, attack, {"loss": "ce", "restarts": 2})
    assert seen == {"loss": "ce", "restarts": 2}


def test_a_longer_search_is_spent_on_what_the_shorter_one_missed() -> None:
    rows: list[int] = []

    def attack(target: Any, x: Tensor, y: Tensor, threat: Any, noise: Noise, **options: Any) -> Tensor:
        rows.append(len(x))
        return ATTACKS["pgd"].attack(target, x, y, threat, noise, **options) if options else x

    ids = data.board_ids("digits")[:4]
    x, y = data.load("digits", ids)

    def made() -> Subject:
        defense = DEFENSES["undefended"].build("digits")
        return Subject(defense, x, y, ids, Noise.from_seed(0, ids), ThreatModel("linf", Fraction(1, 5)))

    alone, both = check(made(), attack), check(made(), attack, {}, {"steps": 20})
    assert (alone.value, both.value) == (0.0, 1.0)
    assert rows == [16, 16, alone.data["planted"]]
    rows.clear()
    assert check(made(), attack, {"steps": 20}, {"steps": 40}).value == 1
    assert rows == [16], "nothing was missed"
