"""TRADES (Zhang et al. 2019, arXiv 1901.08573, eq. 3): accuracy traded against a smooth answer in the ball.

Like `adversarial_training` trained under linf at ε = 1/5 alone (see `recipes`); the same weights stand
on the ℓ2 board. On cifar10, where weights are packaged, at 8/255.
"""

from __future__ import annotations

from pathlib import Path

from assay.card import Card
from assay.data import describe
from assay.defense import DefenseSpec
from assay.defenses.checkpoints import WEIGHTS, data_sets, load_packaged, packaged, trained
from assay.defenses.networks import DigitsCNN
from assay.defenses.networks_cifar10 import NarrowResNet18
from assay.defenses.undefended import Classifier

DIGITS = "digits/trades.safetensors"
CIFAR10 = "cifar10/trades.safetensors"

CARD = Card(
    name="trades",
    title="TRADES (β = 6)",
    summary="A CNN trained with TRADES under linf at 1/5; the same weights stand on the l2 board.",
    source="Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019",
    url="https://arxiv.org/abs/1901.08573",
    datasets=data_sets(DIGITS, CIFAR10),
    weights=packaged(*trained(DIGITS, CIFAR10)),
    network_calls=1,
    gradient_calls=1,
)


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load(dataset)` reads."""
    name = CIFAR10 if dataset == "cifar10" else DIGITS
    return {name: WEIGHTS / name}


def load(dataset: str) -> Classifier:
    """The classifier trained with TRADES."""
    network = NarrowResNet18() if dataset == "cifar10" else DigitsCNN()
    load_packaged(network, *weight_files(dataset))
    return Classifier(CARD, network, describe(dataset).n_classes)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
