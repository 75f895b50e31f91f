"""Defenses known to be broken. They calibrate a board: where one does well, the board is broken.

`bit_depth` (Xu, Evans & Qi 2018, "Feature squeezing", arXiv 1704.01155) has a zero gradient almost
everywhere, so gradient attacks see nothing to follow; BPDA (Athalye, Carlini & Wagner 2018, arXiv
1802.00420) replaces its backward pass by the identity and undoes it. `saturated_logits` multiplies
the logits until the softmax is exactly one-hot in float32, so that the cross-entropy of every image
it gets right has a gradient of zero; margins have not, and neither does AutoAttack's DLR loss care
for the scale (Croce & Hein 2020, arXiv 2003.01690, section 4). `random_resize` (Xie et al. 2018,
arXiv 1711.01991) resizes and pads at random, which stops attacks on one fixed network alone:
averaging the gradient over draws undoes it (Athalye et al. 2018, section 5.3).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from assay.card import Card, Traits
from assay.data import describe
from assay.defense import Defense, DefenseSpec
from assay.defenses.checkpoints import WEIGHTS, load_packaged, packaged
from assay.defenses.networks import LARGEST, DigitsCNN, resize_and_pad
from assay.defenses.purified import PurifiedClassifier
from assay.defenses.undefended import DIGITS, load_network
from assay.defenses.undefended import weight_files as undefended_files
from assay.noise import Noise

RESIZED = "digits/random_resize.safetensors"
BITS = 2
SCALE = 1e4
"""With margins of a few tenths and more, e^(−SCALE · margin) is 0 in float32, and so is the gradient."""

BIT_DEPTH_CARD = Card(
    name="bit_depth",
    title="Bit-depth reduction (2 bits)",
    summary="Pixels rounded to 4 levels before the undefended classifier. Known to be broken by BPDA.",
    source="Xu, Evans and Qi, Feature Squeezing, NDSS 2018; broken by Athalye, Carlini and Wagner, ICML 2018",
    url="https://arxiv.org/abs/1704.01155",
    traits=Traits(purifies=True, non_differentiable=True),
    handles=("stages", "components"),
    datasets=("digits",),
    weights=packaged(DIGITS),
    network_calls=1,
    gradient_calls=1,
    known_broken=True,
)

SATURATED_CARD = Card(
    name="saturated_logits",
    title="Saturated logits (×10⁴)",
    summary="The undefended classifier with its logits times 10,000: the cross-entropy's gradient vanishes.",
    source="Gradient masking as in Papernot et al., Practical Black-Box Attacks, AsiaCCS 2017; undone by margin losses",
    url="https://arxiv.org/abs/1602.02697",
    datasets=("digits",),
    weights=packaged(DIGITS),
    network_calls=1,
    gradient_calls=1,
    known_broken=True,
)

RANDOM_RESIZE_CARD = Card(
    name="random_resize",
    title="Random resize and pad",
    summary="Resizes the image to 8, 9 or 10 pixels a side, pads it to 10 at a random place, scales back.",
    source="Xie et al., Mitigating Adversarial Effects Through Randomization, ICLR 2018; broken by Athalye et al. 2018",
    url="https://arxiv.org/abs/1711.01991",
    choices=(
        "the padded image is scaled back to 8x8 because the classifier takes no other size",
        "the classifier is trained under this resizing: 8x8 digits do not survive it otherwise",
    ),
    traits=Traits(stochastic=True, purifies=True),
    handles=("stages", "components"),
    datasets=("digits",),
    weights=packaged(RESIZED),
    network_calls=1,
    gradient_calls=1,
    known_broken=True,
)


class BitDepth(PurifiedClassifier):
    """Rounds pixels to `2^bits` evenly spaced levels, then classifies."""

    def __init__(self, network: nn.Module, bits: int, n_classes: int) -> None:
        super().__init__(network, n_classes, BIT_DEPTH_CARD)
        self.highest = (1 << bits) - 1

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        """The quantised image, `(n, c, h, w)` in [0, 1]; its gradient is zero."""
        return torch.round(x * self.highest) / self.highest


class SaturatedLogits(Defense):
    """A classifier whose logits are multiplied by `scale`; its answers are those of the network."""

    def __init__(self, network: nn.Module, scale: float, n_classes: int) -> None:
        super().__init__()
        self.card = SATURATED_CARD
        self.n_classes = n_classes
        self.network = network
        self.scale = scale

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """The scaled logits `(n, k)`; the noise is ignored."""
        logits: Tensor = self.scale * self.network(x)
        return logits


class RandomResize(PurifiedClassifier):
    """Resizes and pads an image at random, then classifies it at the size that it came in.

    Args:
        network: images `(n, c, h, w)` to logits.
        largest: side of the padded image; the image gets a side of h … largest pixels, a place in it,
            each with the same probability.
    """

    def __init__(self, network: nn.Module, largest: int, n_classes: int) -> None:
        super().__init__(network, n_classes, RANDOM_RESIZE_CARD)
        self.largest = largest

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        """The image after `resize_and_pad`."""
        return resize_and_pad(x, noise, self.largest)


def load(dataset: str) -> BitDepth:
    """Bit-depth reduction before the undefended classifier."""
    return BitDepth(load_network(dataset), BITS, describe(dataset).n_classes)


BIT_DEPTH = DefenseSpec(BIT_DEPTH_CARD, load, Path(__file__), undefended_files)


def load_saturated(dataset: str) -> SaturatedLogits:
    """Saturated logits of the undefended classifier."""
    return SaturatedLogits(load_network(dataset), SCALE, describe(dataset).n_classes)


def load_random_resize(dataset: str) -> RandomResize:
    """Random resizing before a classifier trained under it."""
    network = DigitsCNN()
    load_packaged(network, RESIZED)
    return RandomResize(network, LARGEST, describe(dataset).n_classes)


def resize_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load_random_resize(dataset)` reads."""
    return {RESIZED: WEIGHTS / RESIZED}


SATURATED_LOGITS = DefenseSpec(SATURATED_CARD, load_saturated, Path(__file__), undefended_files)
RANDOM_RESIZE = DefenseSpec(RANDOM_RESIZE_CARD, load_random_resize, Path(__file__), resize_files)
