"""The guide of robust guidance: a classifier that also tells what its last linear layer sees."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from assay.data import describe
from assay.defenses.behind import behind_files, take_classifier
from assay.defenses.checkpoints import WEIGHTS, load_packaged
from assay.defenses.networks import DigitsCNN
from assay.defenses.networks_cifar10 import NarrowResNet18
from assay.errors import InputError

DIGITS = "digits/guide.safetensors"
CIFAR10 = "cifar10/guide.safetensors"


class Guide(nn.Module):
    """c_φ: one pass of a classifier that gives its logits and its penultimate features.

    Args:
        network: images in [0, 1] to logits; the last thing it does has to be a linear layer.
        shape: one image's `(c, h, w)`.

    Raises:
        InputError: where no linear layer gives the network's logits.
    """

    head: nn.Linear

    def __init__(self, network: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.body, self.head = _parted(network, shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x (n, c, h, w)` in [0, 1] to logits `(n, k)` and features `(n, d)`."""
        features = self.body(x)
        return self.head(features), features


@torch.no_grad()
def _parted(network: nn.Module, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Linear]:
    """What comes before the last linear layer, and that layer: one after the other they are the network."""
    parameter = next(network.parameters(), torch.zeros(()))
    x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0)).to(parameter)
    network = copy.deepcopy(network).eval()
    logits = network(x)
    # Modules are listed as they were declared, so the last one is tried first, and what it does is looked at.
    for name, head in reversed([(n, m) for n, m in network.named_modules() if n and isinstance(m, nn.Linear)]):
        network.set_submodule(name, nn.Identity())
        try:
            features = network(x)
            if features.ndim == 2 and torch.equal(head(features), logits):
                return network, head
        except RuntimeError:
            pass  # what follows it expects another shape
        network.set_submodule(name, head)
    raise InputError(
        "a guide needs features: expected a classifier whose logits come from a linear layer, "
        f"{type(network).__name__} has none at its end."
    )


def guide_files(source: str, dataset: str) -> dict[str, Path]:
    """The weight files that `take_guide` reads, by name, and the file of a user's code."""
    if source:
        return behind_files(source, dataset, "guide")
    name = CIFAR10 if dataset == "cifar10" else DIGITS
    return {name: WEIGHTS / name}


def take_guide(source: str, dataset: str) -> Guide:
    """The guide that a source names, see `assay.defenses.behind`; for an empty one the packaged guide of a data set.

    Raises:
        InputError: for a source that can't be used, a network that doesn't recognise the data set's images, or that
            doesn't end in a linear layer.
        IntegrityError: where no guide of the data set is packaged.
    """
    shape = describe(dataset).shape
    if source:
        return Guide(take_classifier(source, dataset, "guide"), shape)
    network = NarrowResNet18(32) if dataset == "cifar10" else DigitsCNN()
    load_packaged(network, *guide_files("", dataset))
    return Guide(network, shape)
