"""Networks that remove Gaussian noise of a stated level from photographs: `(x, sigma) -> x_0`, pixels in [0, 1].

Both were made for colour images and σ up to 75/255 in pixel units; `GaussianDenoiser` turns them
into a `Denoiser`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def level_maps(sigma: Tensor, channels: int, like: Tensor) -> Tensor:
    """Constant images `(n, channels, h, w)` of each row's σ `(n,)`, in the size and dtype of `like (n, c, h, w)`."""
    return sigma.to(like)[:, None, None, None].expand(-1, channels, *like.shape[2:])


class FDnCNN(nn.Module):
    """A plain stack of 3×3 convolutions that is told the noise level and answers with the clean image.

    The flexible form of DnCNN (Zhang et al. 2017, arXiv 1608.03981), without batch norm.

    Args:
        width: channels between the convolutions.
        depth: convolutions.
    """

    def __init__(self, width: int = 64, depth: int = 20) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(4, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """`x (n, 3, h, w)`, about in [0, 1], and `sigma (n,)` in its units, to the clean image, unclipped."""
        image: Tensor = self.layers(torch.cat([x, level_maps(sigma, 1, x)], 1))
        return image


class FFDNet(nn.Module):
    """DnCNN on the four 2×2 phases of the image at once; it predicts the noise.

    Zhang, Zuo & Zhang 2018, arXiv 1710.04026, section 3.

    Args:
        width: channels between the convolutions.
        depth: convolutions; all but the first and the last have batch norm.
    """

    def __init__(self, width: int = 96, depth: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + 12, width, 3, padding=1, bias=False), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 12, 3, padding=1, bias=False))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """`x (n, 3, h, w)`, h and w even, about in [0, 1], and `sigma (n,)`, to the clean image, unclipped."""
        phases = _split(x)
        noise = self.layers(torch.cat([level_maps(sigma, 3, phases), phases], 1))
        return x - _join(noise)


# As pixel_unshuffle and pixel_shuffle, which give another number of channels for a batch of no images.


def _split(x: Tensor) -> Tensor:
    """The 2×2 phases of `x (n, c, h, w)` as `(n, 4c, h/2, w/2)`: channel 4·colour + phase, as the weights expect."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def _join(phases: Tensor) -> Tensor:
    """The image `(n, c, h, w)` of which these are the phases."""
    n, c, h, w = phases.shape
    return phases.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
