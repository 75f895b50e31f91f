"""Purification by diffusion: noise an image up to a level, then walk the reverse process back.

Written against `Denoiser`, in `x = x_0 + σ·ε` form, so that one purifier runs on every denoiser;
a variance-preserving process is the same one at another scale. Other purifiers subclass
`Purifier` and change its step, or compose `grid` and `posterior` with steps of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, Self

from torch import Tensor

from assay.chain import Chain, State, Step
from assay.defenses.denoiser import Denoiser, check_sigmas, decode, encode
from assay.errors import InputError
from assay.noise import Noise


def grid(level: int, steps: int) -> tuple[int, ...]:
    """`steps + 1` falling noise levels, from `level` to 0, as evenly spaced as integers allow.

    Raises:
        InputError: unless `1 <= steps <= level`.
    """
    if not 1 <= steps <= level:
        raise InputError(f"a purifier from level {level} takes 1 to {level} steps, got {steps}.")
    return tuple(round(level * (steps - i) / steps) for i in range(steps + 1))


def posterior(x: Tensor, x_0: Tensor, sigma: float, lower: float) -> tuple[Tensor, float]:
    """Mean and variance of the image at noise `lower` < `sigma`, given that at `sigma` and the clean one.

    Ho et al. 2020, eq. 6–7, in `x = x_0 + σ·ε` form: with r = lower²/σ², mean r·x + (1−r)·x_0 and
    variance lower²·(1−r).
    """
    ratio = lower**2 / sigma**2
    return ratio * x + (1 - ratio) * x_0, lower**2 * (1 - ratio)


def sample(mean: Tensor, variance: float, noise: Noise) -> Tensor:
    """A draw of N(mean, variance), or the mean itself where there is no variance."""
    if variance == 0:
        return mean
    return mean + math.sqrt(variance) * noise.normal("z", shape=mean.shape[1:], like=mean)


class ImagePurifier(Protocol):
    """What a defense needs of the purifier before its classifier."""

    @property
    def denoiser(self) -> Denoiser:
        """Its network."""

    def chain(self) -> Chain:
        """The process: pixels `(n, c, h, w)` in [0, 1] to purified pixels, about in [0, 1]."""

    def shortened(self, steps: int) -> Self:
        """The same process in at most `steps` >= 1 steps."""


@dataclass(frozen=True)
class Purifier:
    """Diffuses to a level and denoises back (Nie et al. 2022, arXiv 2205.07460).

    Attributes:
        denoiser: predicts the clean image.
        level: t*, in the levels of the denoiser's schedule. More removes more of an attack, and of the image.
        steps: reverse steps, one network call each.
    """

    denoiser: Denoiser
    level: int
    steps: int

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The falling σ of the process, the last 0, `(steps + 1,)`."""
        return tuple(self.denoiser.schedule.sigma(t) for t in grid(self.level, self.steps))

    def start(self, x: Tensor, noise: Noise) -> Tensor:
        """Pixels `x (n, c, h, w)` in [0, 1] with the noise of the level, in [−1, 1] units."""
        image = encode(x)
        return image + self.sigmas[0] * noise.normal("z", shape=x.shape[1:], like=x)

    def step(self, sigma: float, lower: float) -> Step:
        """The reverse step from one σ to the next lower one."""

        def reverse(state: State, x: Tensor, noise: Noise) -> State:
            assert isinstance(state, Tensor)
            return sample(*posterior(state, self.denoiser.denoise(state, sigma), sigma, lower), noise)

        return reverse

    def readout(self, state: State, x: Tensor, noise: Noise) -> Tensor:
        """The purified pixels, not clipped: a clip would end the gradient of every saturated pixel."""
        assert isinstance(state, Tensor)
        return decode(state)

    def shortened(self, steps: int) -> Self:
        """The same level, so the same total noise, in at most `steps` >= 1 reverse steps."""
        return replace(self, steps=min(steps, self.steps))

    def chain(self) -> Chain:
        """The process: pixels `(n, c, h, w)` in [0, 1] to purified pixels, about in [0, 1].

        Raises:
            InputError: where it needs a noise level that the denoiser was not made for.
        """
        check_sigmas(self.denoiser, self.sigmas[:-1], f"level {self.level}")
        steps = [self.step(sigma, lower) for sigma, lower in pairwise(self.sigmas)]
        return Chain(self.start, steps, self.readout, network_calls=self.steps)
