"""Adversarial training with PGD (Madry et al. 2018, arXiv 1706.06083, eq. 2.1).

Two networks, one trained under linf at ε = 1/5, the other under ℓ2 at 3/4 (see `recipes`), both on both
digits boards: each row on the other's board shows what training gives against another threat.
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
DIGITS_L2 = "digits/adversarial_training_l2.safetensors"

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

L2_CARD = CARD.model_copy(
    update={
        "name": "adversarial_training_l2",
        "title": "Adversarial training (PGD-7, ℓ2)",
        "summary": "A CNN trained on PGD-7 examples under l2 at 3/4; the same weights stand on the linf board.",
        "weights": packaged(DIGITS_L2),
    }
)


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load(dataset)` reads."""
    return {DIGITS: WEIGHTS / DIGITS}


def weight_files_l2(dataset: str) -> dict[str, Path]:
    """The weight file that `load_l2(dataset)` reads."""
    return {DIGITS_L2: WEIGHTS / DIGITS_L2}


def _load(file: str, card: Card, dataset: str) -> Classifier:
    network = DigitsCNN()
    load_packaged(network, file)
    return Classifier(card, network, describe(dataset).n_classes)


def load(dataset: str) -> Classifier:
    """The classifier trained under linf."""
    return _load(DIGITS, CARD, dataset)


def load_l2(dataset: str) -> Classifier:
    """The classifier trained under ℓ2."""
    return _load(DIGITS_L2, L2_CARD, dataset)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
L2 = DefenseSpec(L2_CARD, load_l2, Path(__file__), weight_files_l2)
