"""Robust guidance: the moved mean in closed form, both terms and both paths, and its gradient."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.defenses.checkpoints import load_packaged
from assay.defenses.guide import DIGITS as GUIDE
from assay.defenses.guide import Guide
from assay.defenses.networks import DigitsCNN
from assay.defenses.purifier import Purifier, posterior
from assay.defenses.robust_guidance import SPEC, RobustGuidance, TowardsFeatures
from assay.errors import InputError
from assay.noise import Noise
from assay.registry import resolve_defense

checks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("guided_checks.py"))))


class ToyGuide(nn.Module):
    """A smooth network's logits, and its hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        network = checks.curved()
        assert isinstance(network, nn.Sequential)
        self.hidden, self.head = network[:3], network[3]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.hidden(x)
        return self.head(features), features


TERMS = {"label": (3.0, 0.0), "features": (0.0, 2.0), "both": (3.0, 2.0)}
terms = pytest.mark.parametrize(("label", "distance"), TERMS.values(), ids=TERMS)


def guided(label: float, distance: float, **changes: Any) -> TowardsFeatures:
    scales = {"label_scale": label, "distance_scale": distance}
    return TowardsFeatures(checks.mixture(), 300, 3, guide=ToyGuide(), **scales, **changes)


@pytest.fixture(scope="module")
def defense() -> RobustGuidance:
    built = SPEC.build("digits").double()
    assert isinstance(built, RobustGuidance)
    return built


@terms
def test_without_scales_it_is_diffpure(label: float, distance: float) -> None:
    x, noise = checks.images(), Noise.from_seed(0, 3)
    plain = Purifier(checks.mixture(), 300, 3).chain()(x, noise)
    assert torch.equal(guided(0.0, 0.0).chain()(x, noise), plain)
    assert not torch.allclose(guided(label, distance).chain()(x, noise), plain)


@terms
def test_the_mean_moves_by_the_variance_times_the_gradient(label: float, distance: float) -> None:
    purifier, sigma, lower = guided(label, distance), 0.6, 0.4
    x, z = checks.images(), 2 * checks.images(6)[3:] - 1
    unguided, variance = posterior(z, purifier.denoiser.denoise(z, sigma), sigma, lower)
    point = z.clone().requires_grad_()
    (logits, features), (given, wanted) = purifier.guide((point + 1) / 2), purifier.guide(x)
    log_p = logits.log_softmax(1)[torch.arange(3), given.argmax(1)]
    (slope,) = torch.autograd.grad((label * log_p - distance * (features - wanted).square().sum(1)).sum(), point)
    mean, found = purifier.mean(z, purifier.keep(x), x, sigma, lower, Noise.from_seed(0, 3))
    assert found == variance == pytest.approx(lower**2 * (1 - lower**2 / sigma**2))
    assert torch.allclose(mean, unguided + variance * slope, atol=1e-12)


def test_the_last_step_is_not_guided() -> None:
    purifier, x, z = guided(3.0, 2.0), checks.images(), checks.images(6)[3:]
    mean, variance = purifier.mean(z, purifier.keep(x), x, 0.3, 0.0, Noise.from_seed(0, 3))
    assert variance == 0
    assert torch.equal(mean, purifier.denoiser.denoise(z, 0.3))


@terms
def test_guidance_brings_the_guide_s_view_nearer_to_the_input_s(label: float, distance: float) -> None:
    x, noise = checks.images(200), Noise.from_seed(0, 200)

    def agreement(label: float, distance: float) -> tuple[float, float]:
        purifier = guided(label, distance)
        logits, features = purifier.guide(purifier.chain()(x, noise))
        given, wanted = purifier.guide(x)
        chosen = logits.log_softmax(1)[torch.arange(len(x)), given.argmax(1)]
        return float(chosen.mean()), float((features - wanted).square().sum(1).mean())

    plain, pulled = agreement(0.0, 0.0), agreement(label, distance)
    if label:
        assert pulled[0] > plain[0] + 0.02
    if distance:
        assert pulled[1] < 0.95 * plain[1]


@terms
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_gradient_on_a_mixture(label: float, distance: float, temperature: float) -> None:
    purifier = guided(label, distance, temperature=temperature, rounds=2)
    checks.check_gradient(purifier.chain().then(lambda z, noise: checks.curved()(z)), checks.images())


@terms
def test_second_order_terms_matter(label: float, distance: float) -> None:
    checks.check_second_order(guided(label, distance).chain(), checks.images())


def test_the_gradient_and_second_order_on_digits(defense: RobustGuidance) -> None:
    for chain in (defense.chain(), defense.relaxed()):
        checks.check_gradient(chain, checks.digits())
        checks.check_second_order(chain, checks.digits())


@pytest.mark.parametrize(
    ("part", "temperature", "matters"),
    [(0, 0.0, False), (0, 0.5, True), (1, 0.0, True)],
    ids=["y", "soft y", "feature"],
)
def test_both_paths_from_the_input_are_in_the_gradient(part: int, temperature: float, matters: bool) -> None:
    class Severed(TowardsFeatures):
        def keep(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(kept.detach() if i == part else kept for i, kept in enumerate(super().keep(x)))

    x, noise = checks.images(), Noise.from_seed(0, 3)
    whole = guided(3.0, 2.0, temperature=temperature)
    severed = Severed(**{name: getattr(whole, name) for name in whole.__dataclass_fields__})
    same = torch.allclose(
        checks.gradient(whole.chain(), x, noise), checks.gradient(severed.chain(), x, noise), atol=1e-9
    )
    assert same != matters


def test_a_cold_relaxation_is_the_defense() -> None:
    x, noise = checks.images(), Noise.from_seed(0, 3)
    hard = guided(3.0, 2.0)
    cold, warm = (replace(hard, temperature=value).chain()(x, noise) for value in (1e-4, 0.5))
    assert torch.allclose(cold, hard.chain()(x, noise), atol=1e-6)
    assert not torch.allclose(warm, hard.chain()(x, noise), atol=1e-6)


def test_the_guide_s_features_are_what_its_last_layer_sees(defense: RobustGuidance) -> None:
    logits, features = defense.guide(checks.digits())
    network = DigitsCNN().double()
    load_packaged(network, GUIDE)
    assert torch.equal(defense.guide.head(features), logits)
    assert torch.equal(network(checks.digits()), logits)
    assert torch.equal(network.features(checks.digits()), features)
    assert features.shape == (2, 1024)


def test_components_are_the_classifier_and_the_guide(defense: RobustGuidance) -> None:
    x, noise = checks.digits(), Noise.from_seed(0, 2)
    components = defense.components()
    assert torch.equal(components["classifier"](x, noise), defense.classifier(x))
    assert torch.equal(components["guide"](x, noise), defense.guide(x)[0])


def test_replay(defense: RobustGuidance) -> None:
    checks.check_replay(defense, checks.digits())


def test_calls_are_as_declared(defense: RobustGuidance) -> None:
    card = defense.card
    networks = [defense.denoiser.network, defense.guide, defense.classifier]
    assert checks.calls(defense, networks, checks.digits(3)) == (card.network_calls, card.gradient_calls)
    assert defense.chain().network_calls == card.network_calls
    assert defense.surrogate(3).network_calls == 7


class Odd(nn.Module):
    """A classifier whose last declared linear layer is not the last that runs."""

    def __init__(self, ends: str = "head") -> None:
        super().__init__()
        self.head = nn.Linear(12, 10)
        self.inner = nn.Linear(64, 12)
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(x.flatten(1)).relu())
        return logits.log_softmax(1) if self.ends == "log_softmax" else logits


def test_a_guide_is_parted_at_the_linear_layer_that_runs_last() -> None:
    network = Odd().eval()
    guide, x = Guide(network, (1, 8, 8)), checks.digits().float()
    logits, features = guide(x)
    assert guide.head.in_features == 12
    assert torch.equal(features, network.inner(x.flatten(1)).relu())
    assert torch.equal(logits, network(x))
    # The network that was given stays whole.
    assert isinstance(network.head, nn.Linear)


@pytest.mark.parametrize("network", [Odd("log_softmax"), nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())])
def test_a_network_that_ends_otherwise_is_no_guide(network: nn.Module) -> None:
    with pytest.raises(InputError, match="whose logits come from a linear layer"):
        Guide(network, (1, 8, 8))


def test_another_guide_classifier_and_denoiser(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "from assay.defenses.checkpoints import load_packaged\n"
        "from assay.defenses.networks import DigitsCNN\n"
        "def robust():\n"
        "    network = DigitsCNN()\n"
        "    load_packaged(network, 'digits/adversarial_training.safetensors')\n"
        "    return network\n"
    )
    x, noise = checks.digits().float(), Noise.from_seed(0, 2)
    spec = resolve_defense("robust_guidance", trust=True)
    usual, named, coded = (
        spec.build("digits", options=options)
        for options in ({}, {"guide": "adversarial_training"}, {"guide": f"{code}:robust"})
    )
    assert torch.equal(named(x, noise), coded(x, noise))
    assert not torch.equal(named(x, noise), usual(x, noise))
    assert named.card.weights.keys() == spec.files("digits", {"guide": "adversarial_training"}).keys()
    assert "guide/mine.py" in coded.card.weights
    # Nothing on the card speaks of the guide that isn't there.
    assert "TRADES" not in " ".join((named.card.summary, *named.card.choices))
    assert spec.recorded("digits", {"guide": f"{code}:robust"}) == {"guide": "mine.py:robust"}
    with pytest.raises(InputError, match=r"no classifier 'adversarial'"):
        spec.build("digits", options={"guide": "adversarial"})


def test_on_cifar10_it_asks_for_what_is_not_packaged() -> None:
    if "cifar10" in SPEC.card.datasets:
        pytest.skip("trained weights of CIFAR-10 are packaged")
    with pytest.raises(InputError, match=r"Give it --option denoiser=…"):
        SPEC.build("cifar10")
    with pytest.raises(InputError, match=r"Give it --option guide=…"):
        SPEC.build("cifar10", options={"denoiser": "x.pth"})
