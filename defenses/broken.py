"""Defenses known to be broken. They calibrate a board: where one does well, the board is broken.

Bit-depth reduction (Xu, Evans & Qi 2018, "Feature squeezing", arXiv 1704.01155) has a zero gradient
almost everywhere, so gradient attacks see nothing to follow; BPDA (Athalye, Carlini & Wagner 2018,
arXiv 1802.00420) replaces its backward pass by the identity and undoes it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from assay.card import Card, Traits
from assay.data import describe
from assay.defense import Defense, DefenseSpec, Stages
from assay.defenses.checkpoints import packaged
from assay.defenses.undefended import DIGITS, load_network
from assay.defenses.undefended import weight_files as undefended_files
from assay.noise import Noise

BITS = 2

BIT_DEPTH_CARD = Card(
    name="bit_depth",
    title="Bit-depth reduction (2 bits)",
    summary="Pixels rounded to 4 levels before the undefended classifier. Known to be broken by BPDA.",
    source="Xu, Evans and Qi, Feature Squeezing, NDSS 2018; broken by Athalye, Carlini and Wagner, ICML 2018",
    url="https://arxiv.org/abs/1704.01155",
    traits=Traits(purifies=True, non_differentiable=True),
    handles=("stages",),
    datasets=("digits",),
    weights=packaged(DIGITS),
    network_calls=1,
    known_broken=True,
)


class BitDepth(Defense):
    """Rounds pixels to `2^bits` evenly spaced levels, then classifies."""

    def __init__(self, network: nn.Module, bits: int, n_classes: int) -> None:
        super().__init__()
        self.card = BIT_DEPTH_CARD
        self.n_classes = n_classes
        self.network = network
        self.highest = (1 << bits) - 1

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        """The quantised image, `(n, c, h, w)` in [0, 1]; its gradient is zero."""
        return torch.round(x * self.highest) / self.highest

    def classify(self, x: Tensor, noise: Noise) -> Tensor:
        """The undefended classifier's logits `(n, k)`."""
        logits: Tensor = self.network(x)
        return logits

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits `(n, k)` of the quantised image."""
        return self.classify(self.purify(x, noise), noise)

    def stages(self) -> Stages:
        """Quantisation and classifier."""
        return Stages(self.purify, self.classify)


def load(dataset: str) -> BitDepth:
    """Bit-depth reduction before the undefended classifier."""
    return BitDepth(load_network(dataset), BITS, describe(dataset).n_classes)


BIT_DEPTH = DefenseSpec(BIT_DEPTH_CARD, load, Path(__file__), undefended_files)
