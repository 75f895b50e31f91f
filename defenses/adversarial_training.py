"""Adversarial training with PGD (Madry et al. 2018, arXiv 1706.06083, eq. 2.1).

One network serves both digits boards. It was trained under linf at ε = 1/5 alone (see `train`), so
its ℓ2 row shows what linf training gives against another threat, not what ℓ2 training could.
"""

from __future__ import annotations

from pathlib import Path

from assay.card import Card
from assay.data import describe
from assay.defense import DefenseSpec
from assay.defenses.checkpoints import WEIGHTS, load_packaged, packaged
from assay.defenses.networks import DigitsCNN
from assay.defenses.undefended import Classifier

DIGITS = "digits/adversarial_training.safetensors"

CARD = Card(
    name="adversarial_training",
    title="Adversarial training (PGD-7)",
    summary="A CNN trained on PGD-7 examples under linf at 1/5; the same weights stand on the l2 board.",
    source="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    url="https://arxiv.org/abs/1706.06083",
    datasets=("digits",),
    weights=packaged(DIGITS),
    network_calls=1,
    gradient_calls=1,
)


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load(dataset)` reads."""
    return {DIGITS: WEIGHTS / DIGITS}


def load(dataset: str) -> Classifier:
    """The adversarially trained classifier."""
    network = DigitsCNN()
    load_packaged(network, DIGITS)
    return Classifier(CARD, network, describe(dataset).n_classes)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
