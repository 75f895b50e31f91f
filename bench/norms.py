"""Lp balls inside the box: the only code that knows what one is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.noise import Noise
from assay.threat import BOX, Norm, ThreatModel

TOLERANCE = 1e-7
"""How far outside the ball or the box a float32 candidate may lie: one rounding of pixel arithmetic."""

_SHRINK = 1 - 1e-9
"""An l2 projection aims this far inside, so that float64's own rounding can't leave the ball."""


def distance(norm: Norm, a: Tensor, b: Tensor) -> Tensor:
    """Row-wise distance, `(n,)`, computed in float64 whatever the inputs' dtype."""
    difference = (a.double() - b.double()).flatten(1)
    if norm == "linf":
        return difference.abs().amax(1) if difference.shape[1] else difference.sum(1)
    length: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return length


def violation(norm: Norm, eps: float, z: Tensor, x: Tensor) -> Tensor:
    """By how much each row of `z` leaves the ball around `x` or the box, `(n,)` float64.

    0 where it leaves neither, NaN where `z` is not finite; compare with `TOLERANCE`.
    """
    low, high = BOX
    pixels = z.double().flatten(1)
    outside = torch.maximum(low - pixels, pixels - high).amax(1)
    excess = torch.maximum(distance(norm, z, x) - eps, outside).clamp_min(0)
    return torch.where(pixels.isfinite().all(1), excess, torch.full_like(excess, math.nan))


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Ball:
    """The images a threat model allows around each row of `x`.

    Args:
        threat: norm and radius.
        x: centres, `(n, c, h, w)` in [0, 1].
        eps: another radius than the threat's (for an eps curve), in pixel units.

    Projected points lie in the ball and the box when measured in float64, not only up to rounding.

    >>> from fractions import Fraction
    >>> ball = Ball(ThreatModel("linf", Fraction(1, 4)), torch.tensor([[0.0, 0.5]]))
    >>> ball.project(torch.tensor([[-1.0, 1.0]]))
    tensor([[0.0000, 0.7500]])
    """

    def __init__(self, threat: ThreatModel, x: Tensor, *, eps: float | None = None) -> None:
        self.threat = threat
        self.norm = threat.norm
        self.eps = float(threat.eps) if eps is None else eps
        self.x = x
        if self.norm == "linf":
            centre = x.double()
            low = _towards((centre - self.eps).clamp(*BOX), x)
            high = _towards((centre + self.eps).clamp(*BOX), x)
            # float64 pixels: the bound's own rounding can be an ulp more than eps away.
            self._low = torch.where(centre - low.double() > self.eps, torch.nextafter(low, x), low)
            self._high = torch.where(high.double() - centre > self.eps, torch.nextafter(high, x), high)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Ball:
        """The balls of a subset of the rows."""
        return Ball(self.threat, self.x[rows], eps=self.eps)

    def project(self, z: Tensor) -> Tensor:
        """A point of the ball and the box near each row of `z`.

        linf: the exact projection. l2: `z` is pulled back along its radius, then clipped to the
        box, which can only shorten it: feasible, though not the nearest feasible point.
        """
        if self.norm == "linf":
            return torch.minimum(torch.maximum(z, self._low), self._high)
        step = z.double() - self.x.double()
        length = torch.linalg.vector_norm(step.flatten(1), dim=1)
        scale = torch.where(length > self.eps, self.eps * _SHRINK / length.clamp_min(1e-300), torch.ones_like(length))
        # Points already inside are passed through untouched, so that projecting twice changes nothing.
        inside = _per_row(scale == 1, z)
        pulled = _towards(self.x.double() + step * _per_row(scale, z), self.x)
        return torch.where(inside, z, pulled).clamp(*BOX)

    def random_point(self, noise: Noise, *tag: str | int) -> Tensor:
        """A point drawn uniformly from the ball, then clipped to the box; `x`'s shape."""
        shape = self.x.shape[1:]
        if self.norm == "linf":
            step = 2 * noise.uniform("ball", *tag, shape=shape, like=self.x) - 1
            return self.project(self.x + self.eps * step)
        direction = self.steepest(noise.normal("ball", *tag, shape=shape, like=self.x))
        radius = noise.uniform("radius", *tag, shape=(), like=self.x) ** (1 / max(1, shape.numel()))
        return self.project(self.x + self.eps * _per_row(radius, direction) * direction)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit-norm direction that increases the loss fastest to first order.

        linf: the gradient's sign; l2: the gradient over its length. Entries that are not finite
        count as 0, and a zero gradient gives a zero step: a defense can't stop an attack with a NaN.
        """
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        if self.norm == "linf":
            return gradient.sign()
        largest = _per_row(gradient.flatten(1).abs().amax(1), gradient)
        # Dividing by the largest entry first keeps tiny and huge gradients from under- and overflowing.
        scaled = torch.where(largest > 0, gradient / largest, torch.zeros_like(gradient))
        length = _per_row(torch.linalg.vector_norm(scaled.flatten(1), dim=1), gradient)
        return torch.where(length > 0, scaled / length.clamp_min(1e-12), scaled)

    def step(self, z: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """One projected ascent step of length `alpha` (a number, or one a row) from `z`."""
        size = _per_row(alpha, z) if isinstance(alpha, Tensor) else alpha
        return self.project(z + size * self.steepest(gradient))

    def distance(self, z: Tensor) -> Tensor:
        """Distance of each row of `z` from its centre, `(n,)` float64."""
        return distance(self.norm, z, self.x)


def _towards(values: Tensor, centre: Tensor) -> Tensor:
    """`values` (float64) in `centre`'s dtype, each rounded to the side where `centre` is."""
    rounded = values.to(centre.dtype)
    further = (rounded.double() - centre.double()).abs() > (values - centre.double()).abs()
    return torch.where(further, torch.nextafter(rounded, centre), rounded)
