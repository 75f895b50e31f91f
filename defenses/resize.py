"""Resizing inside a defense: a network that wants another size than the board's images, with its gradient.

A board's threat model holds at the size of its images, 224×224 on ImageNet. A model that was trained at 256 or 288
gets them resized by the defense itself, so that an attack's gradient passes through the resizing and its
perturbation is counted before it.
"""

from __future__ import annotations

from torch import Tensor, eye, float64, nn


class Resize(nn.Module):
    """Bilinear resizing of square images, antialiased where they shrink: values in [0, 1] stay there.

    The map is linear along each side, so it is written as two matrix products, whose gradient is the same on every
    device and in every run; interpolation's own sums in no fixed order on a GPU.

    Args:
        source: the side of the images `(n, c, source, source)` that come.
        side: the side of those that leave. Where both are equal, images pass unchanged.
    """

    weight: Tensor

    def __init__(self, source: int, side: int) -> None:
        super().__init__()
        self.source, self.side = source, side
        basis = eye(source, dtype=float64)[None, None]
        weight = nn.functional.interpolate(basis, (side, source), mode="bilinear", align_corners=False, antialias=True)
        # No weight of the network's: its file doesn't hold it.
        self.register_buffer("weight", weight[0, 0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(n, c, source, source)` to `(n, c, side, side)`."""
        if self.source == self.side:
            return x
        weight = self.weight.to(x)
        return weight @ x @ weight.T
