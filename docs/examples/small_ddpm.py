"""A diffusion model of 32×32 colour images in an architecture of its own, as code that makes a denoiser:

    SMALL_DDPM=weights.pth assay run diffpure --board cifar10-linf --trust \\
        -O denoiser=docs/examples/small_ddpm.py:make -O level=60 -O steps=6

The network predicts the noise in the variance-preserving image x_t, DDPM's usual parametrisation, on the linear
schedule with T = 1000. A `Denoiser` that implements `eps` is all that the purifiers need; how it turns into a
predicted image, a score or a step is theirs.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.defenses.denoiser import Denoiser

TIMES = 128
"""The width of the time's embedding."""


class Block(nn.Module):
    """Two convolutions, with the time added between them, and a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, after), nn.GroupNorm(8, after)
        self.time_proj = nn.Linear(TIMES, after)
        self.res = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`x (n, before, h, w)`, `time (n, 128)` to `(n, after, h, w)`."""
        found = F.silu(self.norm1(self.conv1(x))) + self.time_proj(time)[:, :, None, None]
        shortcut: Tensor = self.res(x)
        return F.silu(self.norm2(self.conv2(found))) + shortcut


class Time(nn.Module):
    """Levels to sines and cosines, then to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMES, TIMES), nn.SiLU(), nn.Linear(TIMES, TIMES))

    def forward(self, t: Tensor) -> Tensor:
        """`t (n,)` to `(n, 128)`."""
        half = TIMES // 2
        frequencies = (-math.log(10_000) / half * torch.arange(half, device=t.device)).exp()
        angles = t[:, None] * frequencies
        embedding: Tensor = self.mlp(torch.cat((angles.sin(), angles.cos()), 1))
        return embedding


class SmallUNet(nn.Module):
    """32×32 down to 16×16 and back, 64 and 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Time()
        self.in_conv = nn.Conv2d(3, 64, 3, padding=1)
        self.down1, self.down2, self.mid = Block(64, 64), Block(64, 128), Block(128, 128)
        self.up1, self.up2 = Block(256, 64), Block(128, 64)
        self.out_conv = nn.Conv2d(64, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`x (n, 3, 32, 32)` in [-1, 1] and noised, `t (n,)` its level, to the noise in it."""
        time = self.time(t)
        first = self.down1(self.in_conv(x), time)
        second = self.down2(F.avg_pool2d(first, 2), time)
        found = self.up1(torch.cat((self.mid(second, time), second), 1), time)
        found = self.up2(torch.cat((F.interpolate(found, scale_factor=2.0), first), 1), time)
        noise: Tensor = self.out_conv(found)
        return noise


class SmallDDPM(Denoiser):
    """`SmallUNet` on the linear schedule, T = 1000: level t is the network's time t - 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SmallUNet()

    def eps(self, x_t: Tensor, t: int | float | Tensor) -> Tensor:
        """See `Denoiser.eps`."""
        times = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t)) - 1
        noise: Tensor = self.network(x_t, times)
        return noise


def make() -> SmallDDPM:
    """The denoiser with the weights in the file that SMALL_DDPM names."""
    denoiser = SmallDDPM()
    denoiser.network.load_state_dict(torch.load(os.environ["SMALL_DDPM"], map_location="cpu", weights_only=True))
    return denoiser
