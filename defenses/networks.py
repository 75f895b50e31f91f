"""The classifiers that defenses are built on: images `(n, c, h, w)` in [0, 1] to logits `(n, k)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.noise import Noise

LARGEST = 10
"""Side of the padded image of `random_resize`; the digit is resized to 8, 9 or 10 pixels."""


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

    def features(self, x: Tensor) -> Tensor:
        """`x (n, 1, 8, 8)` in [0, 1] to what the linear layer sees, `(n, 32 · width)`."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, 1, 8, 8)` in [0, 1] to logits `(n, k)`."""
        logits: Tensor = self.head(self.features(x))
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


class ScoreNet(nn.Module):
    """Images to images of their shape, fully convolutional with one skip over two resolutions: a small score model.

    It is told no noise level: `ScoreDenoiser` divides its output by σ.

    Args:
        channels: of the image; `width` of the first resolution.
    """

    def __init__(self, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle1 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.middle2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)`, h and w even, to the same shape."""
        top = F.silu(self.enter(x))
        low = F.silu(self.down(top))
        low = low + F.silu(self.middle2(F.silu(self.middle1(low))))
        up = F.silu(self.up(F.interpolate(low, scale_factor=2.0, mode="nearest")))
        image: Tensor = self.leave(F.silu(self.join(torch.cat([top, up], 1))))
        return image


class EnergyNet(nn.Module):
    """Images to energies `(n,)`: half the squared distance between the image and what `ScoreNet` makes of it.

    `E(x) = ½‖x − r(x)‖²` is the form of Saremi & Hyvärinen 2019 (arXiv 1903.02334, section 2): its
    gradient is near x − r(x), so that training starts from a sensible score.
    """

    def __init__(self, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.restore = ScoreNet(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)` to energies `(n,)`."""
        energy: Tensor = 0.5 * (x - self.restore(x)).square().flatten(1).sum(1)
        return energy


def resize_and_pad(x: Tensor, noise: Noise, largest: int) -> Tensor:
    """Images `x (n, c, h, h)` resized to h … largest pixels a side, padded at random and scaled back to h."""
    smallest = x.shape[-1]
    side = smallest + noise.integers("side", shape=(), high=largest - smallest + 1, like=x)
    corner = noise.uniform("corner", shape=(2,), like=x)
    padded = torch.zeros(*x.shape[:2], largest, largest, dtype=x.dtype, device=x.device)
    # One resize for each of the few sizes, placed by shifting; rows of other sizes are left out by weight.
    for size in range(smallest, largest + 1):
        resized = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        room = largest - size + 1
        places = (corner * room).long().clamp_max(room - 1)
        for top in range(room):
            for left in range(room):
                here = (side == size) & (places[:, 0] == top) & (places[:, 1] == left)
                shifted = F.pad(resized, (left, room - 1 - left, top, room - 1 - top))
                padded = padded + here.to(x)[:, None, None, None] * shifted
    return F.interpolate(padded, size=x.shape[-2:], mode="bilinear", align_corners=False)
