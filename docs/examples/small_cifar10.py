"""Small CIFAR-10 classifiers whose weights are published without code, as one would write them for `assay run`:

    assay run classifier --board cifar10-linf --trust -O architecture=docs/examples/small_cifar10.py:ResNet4b \\
        -O weights=abcrown_resnet4b.pth -O mean=cifar10

A purifier's options `classifier` and `guide` take no weights beside the code, so that code loads its own:

    RESNET4B=abcrown_resnet4b.pth assay run robust_guidance --board cifar10-linf --trust -O denoiser=ffdnet.pth \\
        -O guide=docs/examples/small_cifar10.py:loaded -O level=100 -O steps=2

`RESNET20=… -O classifier=docs/examples/small_cifar10.py:resnet20` is the other one.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cnn() -> nn.Sequential:
    """Two convolutions and two linear layers: the small network of the certified training literature."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


class Plain(nn.Module):
    """A basic block without batch norm."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        change = before != after or stride != 1
        self.shortcut = nn.Sequential(*([nn.Conv2d(before, after, 1, stride=stride)] if change else []))

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, before, h, w)` to `(n, after, h / stride, w / stride)`."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet4b(nn.Module):
    """Two stages of two basic blocks without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Plain(16, 32, 2), Plain(32, 32, 1))
        self.layer2 = nn.Sequential(Plain(32, 32, 2), Plain(32, 32, 1))
        self.linear1, self.linear2 = nn.Linear(512, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(n, 3, 32, 32)` to logits `(n, 10)`."""
        x = self.layer2(self.layer1(F.relu(self.conv1(x))))
        logits: Tensor = self.linear2(F.relu(self.linear1(x.flatten(1))))
        return logits


class Basic(nn.Module):
    """A basic block whose shortcut has no parameters: every second pixel, zeros for the new channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.extra = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, before, h, w)` to `(n, after, h / stride, w / stride)`."""
        kept = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + kept)


class ResNet20(nn.Module):
    """Three stages of three basic blocks, 16, 32 and 64 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(n, 3, 32, 32)` to logits `(n, 10)`."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits

    @staticmethod
    def _stage(before: int, after: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Basic(before, after, stride), Basic(after, after, 1), Basic(after, after, 1))


class Normalised(nn.Module):
    """A network of normalised images, for images in [0, 1]."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(n, 3, 32, 32)` in [0, 1] to logits `(n, 10)`."""
        logits: Tensor = self.network((x - self.get_buffer("mean")) / self.get_buffer("std"))
        return logits


def loaded() -> Normalised:
    """`ResNet4b` with the weights in the file that RESNET4B names."""
    network = ResNet4b()
    weights = torch.load(os.environ["RESNET4B"], map_location="cpu", weights_only=True)
    network.load_state_dict(weights["state_dict"])
    return Normalised(network, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def resnet20() -> Normalised:
    """`ResNet20` with the weights in the file that RESNET20 names, whose keys begin with `module.`."""
    network = ResNet20()
    weights = torch.load(os.environ["RESNET20"], map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): value for name, value in weights["state_dict"].items()})
    return Normalised(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
