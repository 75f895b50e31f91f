"""Noise levels, and the one place where the two ways of writing a noised image are converted.

Variance exploding, as in EDM (Karras et al. 2022, arXiv 2206.00364): `x = x_0 + σ·ε`. Variance
preserving, as in DDPM (Ho et al. 2020, arXiv 2006.11239, eq. 4): `x_t = √ᾱ·x_0 + √(1−ᾱ)·ε`. They
are one image at two scales, `x = x_t / √ᾱ` with `σ = √((1−ᾱ)/ᾱ)`, so `ᾱ = 1/(1+σ²)`. Images are in
[−1, 1] here; a standard deviation in pixel units of [0, 1] is half of σ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from assay.errors import InputError

Sigma = float | Tensor
"""A standard deviation in [−1, 1] units: one for the whole batch, or `(n,)` with one a row."""


def column(values: float | Tensor, like: Tensor) -> Tensor:
    """Values in the dtype and device of `like (n, …)`, shaped to multiply it: a scalar, or `(n, 1, …)`."""
    tensor = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1)) if tensor.ndim else tensor


def sigma_of(alpha_bar: Tensor) -> Tensor:
    """σ = √((1−ᾱ)/ᾱ)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_bar_of(sigma: Tensor) -> Tensor:
    """ᾱ = 1/(1+σ²)."""
    return 1 / (1 + sigma**2)


def to_exploding(x_t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """`x = x_t/√ᾱ` and its σ; `alpha_bar` is a scalar or `(n,)`, and so is σ."""
    return x_t / column(alpha_bar, x_t).sqrt(), sigma_of(alpha_bar)


def to_preserving(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`x_t = √ᾱ·x` and its ᾱ; `sigma` is a scalar or `(n,)`, and so is ᾱ."""
    alpha_bar = alpha_bar_of(sigma)
    return x * column(alpha_bar, x).sqrt(), alpha_bar


@dataclass(frozen=True, eq=False)
class Schedule:
    """The levels t = 0 … T of a discrete diffusion process; level 0 is the image itself.

    Attributes:
        alpha_bars: `(T + 1,)` float64, ᾱ(0) = 1 first, falling. diffusers' time t−1 is level t.
    """

    alpha_bars: Tensor

    @property
    def levels(self) -> int:
        """T, the highest level."""
        return len(self.alpha_bars) - 1

    @cached_property
    def sigmas(self) -> Tensor:
        """σ(0) = 0, …, σ(T), `(T + 1,)` float64, rising."""
        return sigma_of(self.alpha_bars)

    def sigma(self, t: int) -> float:
        """σ of an integer level.

        Raises:
            InputError: for one outside 0 … T.
        """
        if not 0 <= t <= self.levels:
            raise InputError(f"the schedule has levels 0 to {self.levels}, got {t}.")
        return float(self.sigmas[t])

    def level(self, sigma: Tensor) -> Tensor:
        """The level of a σ, fractional, float64: ln σ is interpolated between levels, and clamped to 1 … T."""
        table = self.sigmas[1:].log().to(sigma.device)
        value = sigma.double().log()
        above = torch.searchsorted(table, value.contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return (above + (value - low) / (high - low)).clamp(1, len(table))


def linear_schedule(levels: int = 1000) -> Schedule:
    """The linear DDPM schedule, β from 1e-4 to .02 (Ho et al. 2020, section 4)."""
    diffusion = DDPMScheduler(num_train_timesteps=levels, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    return Schedule(with_start(diffusion.alphas_cumprod))


def with_start(alphas_cumprod: Tensor) -> Tensor:
    """diffusers' `alphas_cumprod (T,)` with the clean image's ᾱ = 1 in front, `(T + 1,)` float64."""
    return torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double()])
