"""Purification by diffusion: noise an image up to a level, then walk the reverse process back.

Written against `Denoiser`, so that one purifier runs on every denoiser; other purifiers compose the
same parts (`grid`, `posterior_step`) with steps of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from assay.chain import Chain, State, Step
from assay.defenses.denoiser import Denoiser
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


def posterior_step(denoiser: Denoiser, x_t: Tensor, x_0: Tensor, t: int, s: int, noise: Noise) -> Tensor:
    """A draw of x_s from q(x_s | x_t, x_0), s < t: one ancestral step (Ho et al. 2020, eq. 6–7, respaced).

    All images in the denoiser's data range. s = 0 has no variance and returns `x_0`.
    """
    if s == 0:
        return x_0
    at, to = denoiser.alpha_bar(t, x_t), denoiser.alpha_bar(s, x_t)
    kept = at / to
    mean = (to.sqrt() * (1 - kept) * x_0 + kept.sqrt() * (1 - to) * x_t) / (1 - at)
    variance = (1 - to) / (1 - at) * (1 - kept)
    return mean + variance.sqrt() * noise.normal("z", shape=x_t.shape[1:], like=x_t)


@dataclass(frozen=True)
class Purifier:
    """Diffuses to a level and denoises back (Nie et al. 2022, arXiv 2205.07460).

    Attributes:
        denoiser: predicts the noise.
        level: t*, in the denoiser's levels. More removes more of an attack, and of the image.
        steps: reverse steps, one network call each.
    """

    denoiser: Denoiser
    level: int
    steps: int

    def start(self, x: Tensor, noise: Noise) -> Tensor:
        """`x_{t*}` of pixels `x (n, c, h, w)` in [0, 1]."""
        z = noise.normal("z", shape=x.shape[1:], like=x)
        return self.denoiser.diffuse(self.denoiser.encode(x), self.level, z)

    def step(self, t: int, s: int) -> Step:
        """The reverse step from level t to level s."""

        def reverse(state: State, x: Tensor, noise: Noise) -> State:
            assert isinstance(state, Tensor)
            return posterior_step(self.denoiser, state, self.denoiser.denoise(state, t), t, s, noise)

        return reverse

    def readout(self, state: State, x: Tensor, noise: Noise) -> Tensor:
        """The purified pixels, not clipped: a clip would end the gradient of every saturated pixel."""
        assert isinstance(state, Tensor)
        return self.denoiser.decode(state)

    def chain(self) -> Chain:
        """The process: pixels `(n, c, h, w)` in [0, 1] to purified pixels, about in [0, 1]."""
        levels = grid(self.level, self.steps)
        steps = [self.step(t, s) for t, s in pairwise(levels)]
        return Chain(self.start, steps, self.readout, network_calls=self.steps)
