"""Random changes to training images `(n, c, h, w)`, drawn from a generator on the images' device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Augment = Callable[[Tensor, Generator], Tensor]


def uniform(rows: int, generator: Generator) -> Tensor:
    """One number in [0, 1) a row, `(rows,)`."""
    return torch.rand(rows, generator=generator, device=generator.device)


def normal(like: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of the shape and dtype of `like`."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def flip(x: Tensor, generator: Generator) -> Tensor:
    """Mirrors every image with probability one half."""
    mirrored = uniform(len(x), generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def crop_and_flip(x: Tensor, generator: Generator, pad: int = 4) -> Tensor:
    """Shifts every image by up to `pad` pixels, black coming in at the edges, and mirrors half of them."""
    n, _, height, width = x.shape
    padded = F.pad(flip(x, generator), (pad, pad, pad, pad))
    top, left = (torch.randint(2 * pad + 1, (n,), generator=generator, device=x.device) for _ in range(2))
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    # Indexing on both sides of the channels puts these last.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
