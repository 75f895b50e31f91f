"""Denoisers: the one interface that every diffusion defense is written against.

A denoiser knows noise levels t = 0 … T. At level t an image `x_0` has become
`x_t = √ᾱ(t)·x_0 + √(1−ᾱ(t))·ε` with ε standard normal (Ho et al. 2020, arXiv 2006.11239, eq. 4);
ᾱ(0) = 1, the image itself. Inside the diffusion process pixels live in the denoiser's own range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

Level = int | Tensor
"""A noise level: one for the whole batch, or `(n,)` int64 with one a row."""


def linear_alpha_bars(levels: int = 1000) -> Tensor:
    """ᾱ(0), …, ᾱ(T) of the linear DDPM schedule (β from 1e-4 to .02), `(T + 1,)` float64."""
    schedule = DDPMScheduler(num_train_timesteps=levels, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    return torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod.double()])


class Denoiser(nn.Module):
    """Predicts the noise in a noised image. Subclasses implement `eps`.

    Args:
        alpha_bars: `(T + 1,)`, ᾱ(0) = 1 first, falling.
        data_range: the interval that stands for pixel values [0, 1] inside the process.
    """

    alpha_bars: Tensor

    def __init__(self, alpha_bars: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__()
        self.register_buffer("alpha_bars", alpha_bars.double(), persistent=False)
        self.data_range = data_range

    @property
    def levels(self) -> int:
        """T, the highest noise level."""
        return len(self.alpha_bars) - 1

    def alpha_bar(self, t: Level, like: Tensor) -> Tensor:
        """ᾱ(t) in the dtype of `like (n, c, h, w)`, shaped to multiply it: a scalar, or `(n, 1, 1, 1)`."""
        values = self.alpha_bars[t].to(like.dtype)
        return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """The predicted noise in `x_t (n, c, h, w)` at level t ≥ 1, in `x_t`'s shape."""
        raise NotImplementedError(f"{type(self).__name__} must implement eps(x_t, t).")

    def denoise(self, x_t: Tensor, t: Level) -> Tensor:
        """The expected clean image `(x_t − √(1−ᾱ)·eps)/√ᾱ`, unclipped, in the data range."""
        alpha_bar = self.alpha_bar(t, x_t)
        return (x_t - (1 - alpha_bar).sqrt() * self.eps(x_t, t)) / alpha_bar.sqrt()

    def diffuse(self, x_0: Tensor, t: Level, z: Tensor) -> Tensor:
        """`x_t` from a clean image in the data range and standard normal `z`, both `(n, c, h, w)`."""
        alpha_bar = self.alpha_bar(t, x_0)
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * z

    def encode(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] to the data range."""
        low, high = self.data_range
        return low + (high - low) * x

    def decode(self, x_0: Tensor) -> Tensor:
        """The data range to pixels in [0, 1]; not clipped."""
        low, high = self.data_range
        return (x_0 - low) / (high - low)


class UNetDenoiser(Denoiser):
    """A class-unconditional diffusers U-Net that predicts noise, on the linear DDPM schedule.

    Args:
        network: called with times 0 … T−1 as diffusers counts them; time t−1 is level t here.
    """

    def __init__(self, network: UNet2DModel, data_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__(linear_alpha_bars(), data_range)
        self.network = network

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """See `Denoiser.eps`."""
        predicted: Tensor = self.network(x_t, t - 1, return_dict=False)[0]
        return predicted


def digits_unet(channels: Sequence[int] = (16, 16)) -> UNet2DModel:
    """The U-Net of the digits boards: 1×8×8, two resolutions, no attention."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        add_attention=False,
    )


class MixtureDenoiser(Denoiser):
    """The exact denoiser of a mixture of isotropic Gaussians: everything it predicts is a closed form.

    Under p_0 = Σ_j w_j N(μ_j, s_j² I) the noised density is
    p_t = Σ_j w_j N(√ᾱ μ_j, (ᾱ s_j² + 1 − ᾱ) I), and eps = −√(1−ᾱ) ∇ log p_t. It is the oracle of
    every diffusion defense's tests.

    Args:
        weights: `(m,)`, positive, summing to 1.
        means: `(m, c, h, w)` in the data range.
        stds: `(m,)`, s_j ≥ 0.
        alpha_bars, data_range: see `Denoiser`.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        stds: Tensor,
        alpha_bars: Tensor | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(linear_alpha_bars() if alpha_bars is None else alpha_bars, data_range)
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    def _components(self, x_t: Tensor, t: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ᾱ `(n or 1, 1)`, residuals `(n, m, d)`, variances `(n or 1, m)`, log joint densities `(n, m)`."""
        alpha_bar = self.alpha_bar(t, x_t).reshape(-1, 1)
        residuals = x_t.flatten(1)[:, None] - alpha_bar.sqrt()[..., None] * self.means.flatten(1)
        variances = alpha_bar * self.stds**2 + 1 - alpha_bar
        squared = residuals.square().sum(-1) / variances
        joint = self.weights.log() - 0.5 * (squared + residuals.shape[-1] * (2 * math.pi * variances).log())
        return alpha_bar, residuals, variances, joint

    def log_density(self, x_t: Tensor, t: Level) -> Tensor:
        """log p_t(x_t), `(n,)`."""
        return self._components(x_t, t)[3].logsumexp(1)

    def posterior(self, x_t: Tensor, t: Level) -> Tensor:
        """The probability of each component given `x_t`, `(n, m)`."""
        return self._components(x_t, t)[3].softmax(1)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """See `Denoiser.eps`."""
        alpha_bar, residuals, variances, joint = self._components(x_t, t)
        weighted = joint.softmax(1) / variances
        score = -(weighted[..., None] * residuals).sum(1)
        return (-(1 - alpha_bar).sqrt() * score).reshape(x_t.shape)
