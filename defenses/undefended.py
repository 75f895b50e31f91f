"""No defense: the classifiers that the boards' attacks are calibrated on, and transfer from.

digits: a small CNN trained in the plain way. cifar10: the ResNet-18 that `pyautoattack` carries.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor, nn

from assay.card import Card
from assay.data import describe
from assay.defense import Defense, DefenseSpec
from assay.defenses.checkpoints import WEIGHTS, load_packaged, load_weights, packaged
from assay.defenses.networks import DigitsCNN, ResNet18
from assay.errors import InputError
from assay.noise import Noise

DIGITS = "digits/undefended.safetensors"
CIFAR10 = "pyautoattack/model_test.pt"
_CIFAR10_SHA256 = "399f52da9f914c323fa5a6096d60f460a3449a59b64a6405200c1e629f8425a7"

CARD = Card(
    name="undefended",
    title="Undefended",
    summary="A classifier trained without any thought of attacks: a small CNN on digits, a ResNet-18 on cifar10.",
    datasets=("digits", "cifar10"),
    weights={**packaged(DIGITS), CIFAR10: _CIFAR10_SHA256},
    network_calls=1,
    gradient_calls=1,
)


class Classifier(Defense):
    """A network alone: deterministic, one forward pass."""

    def __init__(self, card: Card, network: nn.Module, n_classes: int) -> None:
        super().__init__()
        self.card = card
        self.n_classes = n_classes
        self.network = network

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """The network's logits `(n, k)`; the noise is ignored."""
        logits: Tensor = self.network(x)
        return logits


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load(dataset)` reads.

    Raises:
        InputError: when it belongs to a package that is not installed.
    """
    if dataset == "digits":
        return {DIGITS: WEIGHTS / DIGITS}
    package = importlib.util.find_spec("pyautoattack")
    if package is None or package.origin is None:
        raise InputError("the cifar10 classifier comes with pyautoattack 0.2.0, which is not installed: install it.")
    return {CIFAR10: Path(package.origin).parent / "examples" / "model_test.pt"}


def load_network(dataset: str) -> nn.Module:
    """The plain classifier of a data set, for defenses that stand in front of one."""
    if dataset == "digits":
        network: nn.Module = DigitsCNN()
        load_packaged(network, DIGITS)
    else:
        network = ResNet18()
        load_weights(network, weight_files(dataset)[CIFAR10], _CIFAR10_SHA256)
    return network


def load(dataset: str) -> Classifier:
    """The undefended classifier of a data set."""
    return Classifier(CARD, load_network(dataset), describe(dataset).n_classes)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
