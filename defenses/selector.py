"""A network that chooses the noise level of a smoothed classifier image by image, and the divergence it is held by.

Hase et al. 2024, arXiv 2407.11844 (known to us from its abstract; the networks are our own). All
levels are standard deviations in pixel units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.defenses.networks import DigitsCNN
from assay.defenses.schedule import Sigma, column


class NoiseSelector(nn.Module):
    """`q(σ | x)`, log-normal, given a target level: images to the mean and standard deviation of ln σ.

    The untrained selector gives every image the target itself, with a spread of `std`.

    Args:
        channels: of the image; `width` of the first convolution.
        std: the standard deviation of ln σ before training.
    """

    def __init__(self, channels: int = 1, width: int = 16, std: float = 0.3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width * 16, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias[1:], math.log(std))
        nn.init.zeros_(self.head.bias[:1])

    def forward(self, x: Tensor, target: Sigma) -> tuple[Tensor, Tensor]:
        """`x (n, c, h, w)` in [0, 1], possibly noised, and the target level, one or `(n,)`; both results `(n,)`."""
        aim = torch.as_tensor(target, dtype=x.dtype, device=x.device).expand(len(x)).log()
        features = torch.cat([x, column(aim, x).expand_as(x[:, :1])], 1)
        for conv in (self.conv1, self.conv2, self.conv3):
            features = F.silu(conv(features))
        shift, log_std = self.head(F.adaptive_avg_pool2d(features, 4).flatten(1)).unbind(1)
        return aim + shift, log_std.exp()


class VariationalNet(nn.Module):
    """A selector and the classifier trained with it, kept in one weight file."""

    def __init__(self) -> None:
        super().__init__()
        self.selector = NoiseSelector()
        self.classifier = DigitsCNN()


def divergence(mean: Tensor, std: Tensor, target: Tensor, width: float) -> Tensor:
    """KL of a log-normal from the one whose median is the target, `(n,)`.

    A change of variables leaves a KL as it is, so this is the one between two normals of ln σ:
    `ln(ρ/s) + (s² + (m − ln target)²)/(2ρ²) − ½`.

    Args:
        mean, std: m and s of ln σ, `(n,)`.
        target: the median of the reference, `(n,)`, in pixel units.
        width: ρ, the reference's standard deviation of ln σ.
    """
    return (width / std).log() + (std**2 + (mean - target.log()) ** 2) / (2 * width**2) - 0.5
