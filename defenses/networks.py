"""The classifiers that defenses are built on: images `(n, c, h, w)` in [0, 1] to logits `(n, k)`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DigitsCNN(nn.Module):
    """Three convolutions and a linear layer on 1×8×8 images.

    Smooth activations (SiLU) keep finite differences and second derivatives meaningful.

    Args:
        width: channels of the first convolution; the other two have twice as many.
        n_classes: k.
    """

    def __init__(self, width: int = 32, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width * 16, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, 1, 8, 8)` in [0, 1] to logits `(n, k)`."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class _Residual(nn.Module):
    """Two 3×3 convolutions with batch norm, and a projection beside them where the shape changes."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out_channels:
            self.shortcut.append(nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32×32 images (He et al. 2016, arXiv 1512.03385, the CIFAR stem: one 3×3 convolution, no pooling).

    Parameter names are those of the checkpoint that `pyautoattack` carries; inputs in [0, 1] are
    not normalised.
    """

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1), _Residual(64, 64, 1))
        self.layer2 = nn.Sequential(_Residual(64, 128, 2), _Residual(128, 128, 1))
        self.layer3 = nn.Sequential(_Residual(128, 256, 2), _Residual(256, 256, 1))
        self.layer4 = nn.Sequential(_Residual(256, 512, 2), _Residual(512, 512, 1))
        self.linear = nn.Linear(512, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, 3, 32, 32)` in [0, 1] to logits `(n, k)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits
