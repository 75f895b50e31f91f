"""What the packaged weights can do: clean accuracy, and how far a plain attack takes them."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from assay import data
from assay.defense import Defense
from assay.defenses.checkpoints import read_manifest
from assay.errors import InputError
from assay.noise import Noise
from assay.norms import Ball
from assay.registry import DEFENSES
from assay.threat import ThreatModel, parse_eps

HAS_DATA = data.DATA_VARIABLE in os.environ


@pytest.fixture(scope="module")
def test_split() -> tuple[Tensor, Tensor]:
    return data.load("digits", data.test_ids("digits"))


def accuracy(defense: Defense, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        logits = defense(x, Noise.from_seed(0, len(x)))
    return float((logits.argmax(1) == y).double().mean())


@pytest.mark.parametrize(
    ("name", "least"),
    [("adversarial_training", 0.97), ("smoothing", 0.97), ("diffpure", 0.88), ("bit_depth", 0.9)],
)
def test_clean_accuracy(name: str, least: float, test_split: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:200] for part in test_split)
    assert accuracy(DEFENSES[name].build("digits"), x, y) >= least


def test_undefended_clean_accuracy_on_the_whole_test_split(test_split: tuple[Tensor, Tensor]) -> None:
    assert accuracy(DEFENSES["undefended"].build("digits"), *test_split) >= 0.97


@pytest.mark.parametrize("name", ["undefended", "adversarial_training"])
def test_the_manifest_s_accuracy_is_the_defense_s(name: str, test_split: tuple[Tensor, Tensor]) -> None:
    stated = read_manifest()[f"digits/{name}.safetensors"]["test"]["clean_accuracy"]
    assert accuracy(DEFENSES[name].build("digits"), *test_split) == pytest.approx(stated, abs=0.004)


@pytest.mark.parametrize(("name", "low", "high"), [("undefended", 0, 0.1), ("adversarial_training", 0.6, 0.85)])
def test_pgd_falls_to_the_known_scale(name: str, low: float, high: float, test_split: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:200] for part in test_split)
    defense, noise = DEFENSES[name].build("digits"), Noise.from_seed(0, 200)
    ball = Ball(ThreatModel("linf", parse_eps("1/5")), x)
    z, standing = x.clone(), torch.ones(200, dtype=torch.bool)
    for _ in range(20):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(defense(z, noise), y, reduction="sum"), z)
        z = ball.step(z.detach(), gradient, 0.025)
        standing &= defense(z, noise).argmax(1) == y
    assert low <= float(standing.double().mean()) <= high


def test_purification_undoes_part_of_an_attack_on_the_classifier_alone(test_split: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:200] for part in test_split)
    undefended, noise = DEFENSES["undefended"].build("digits"), Noise.from_seed(0, 200)
    ball = Ball(ThreatModel("linf", parse_eps("1/5")), x)
    z = x.clone()
    for _ in range(20):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(undefended(z, noise), y, reduction="sum"), z)
        z = ball.step(z.detach(), gradient, 0.025)
    assert accuracy(DEFENSES["diffpure"].build("digits"), z, y) > accuracy(undefended, z, y) + 0.3


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(InputError, match="smoothing has weights for digits, not for 'cifar10'"):
        DEFENSES["smoothing"].build("cifar10")


def test_the_carried_resnet_loads_and_answers() -> None:
    defense = DEFENSES["undefended"].build("cifar10")
    x = torch.full((1, 3, 32, 32), 0.5)
    assert defense(x, Noise.from_seed(0, 1)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DATA, reason="ASSAY_DATA names no folder with cifar10")
def test_the_carried_resnet_has_its_stated_accuracy() -> None:
    defense = DEFENSES["undefended"].build("cifar10")
    right = 0
    for start in range(0, 1000, 100):
        x, y = data.load("cifar10", range(start, start + 100))
        with torch.no_grad():
            right += int((defense(x, Noise.from_seed(0, 100)).argmax(1) == y).sum())
    assert right == 937
