"""Denoisers: the one interface that every diffusion defense is written against.

A denoiser predicts the clean image behind `x = x_0 + σ·ε`, ε standard normal (EDM's variance-exploding
form; `schedule` converts to DDPM's). All images in this module are in [−1, 1], and σ in its units.
Five kinds implement it: an ε-predicting diffusers U-Net, an EDM-preconditioned network, a score
network, an energy whose gradient is the score, a Gaussian denoiser of photographs (FDnCNN, FFDNet),
and, in `mixture`, the closed form that is the tests' oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from assay.chain import inner_gradient
from assay.defenses.schedule import Schedule, Sigma, alpha_bar_of, column, linear_schedule, to_exploding
from assay.errors import InputError

Level = int | float | Tensor
"""A level of a schedule: one for the whole batch, or `(n,)` with one a row; may be fractional."""


def encode(x: Tensor) -> Tensor:
    """Pixels in [0, 1] to [−1, 1]."""
    return 2 * x - 1


def decode(x: Tensor) -> Tensor:
    """[−1, 1] to pixels in [0, 1]; not clipped."""
    return (x + 1) / 2


class Denoiser(nn.Module):
    """Predicts clean images. A subclass implements `denoise`, or `eps`; the other follows from it.

    Attributes:
        schedule: its levels, by which purifiers choose σ.
        sigma_range: the lowest and highest σ that it can be asked for.
        n_classes: k where it also predicts the image given each class, otherwise 0.
    """

    schedule: Schedule
    sigma_range: tuple[float, float]
    n_classes: int = 0

    def __init__(self, schedule: Schedule | None = None, sigma_range: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.schedule = schedule or linear_schedule()
        self.sigma_range = sigma_range or (0.0, self.schedule.sigma(self.schedule.levels))

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """E[x_0 | x], `x (n, c, h, w)`, unclipped; sigma > 0."""
        if type(self).eps is Denoiser.eps:
            raise NotImplementedError(f"{type(self).__name__} must implement denoise(x, sigma) or eps(x_t, t).")
        given = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
        x_t = x * column(alpha_bar_of(given), x).sqrt()
        # (x_t − √(1−ᾱ)·ε)/√ᾱ, written with x and σ.
        return x - column(given, x) * self.eps(x_t, self.schedule.level(given))

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """The predicted noise in the variance-preserving `x_t (n, c, h, w)` at level t ≥ 1."""
        x, sigma = to_exploding(x_t, self.alpha_bar(t))
        return (x - self.denoise(x, sigma)) / column(sigma, x)

    def alpha_bar(self, t: Level) -> Tensor:
        """ᾱ(t) in float64, a scalar or `(n,)`; between levels ln σ is interpolated."""
        if isinstance(t, int):
            return self.schedule.alpha_bars[t]
        level = torch.as_tensor(t, dtype=torch.float64).cpu()
        below = level.floor().long().clamp(1, self.schedule.levels - 1)
        logs = self.schedule.sigmas.log()
        return alpha_bar_of(torch.lerp(logs[below], logs[below + 1], level - below).exp())

    def denoise_each(self, x: Tensor, sigma: Sigma) -> Tensor:
        """E[x_0 | x, class] for every class, `(n, k, c, h, w)`.

        Raises:
            InputError: where the denoiser knows no classes.
        """
        raise InputError(f"{type(self).__name__} is not class-conditional; a diffusion classifier needs one that is.")

    def denoise_some(self, x: Tensor, sigma: Sigma, classes: Tensor) -> Tensor:
        """The same for m classes a row, `classes (n, m)` int64: `(n, m, c, h, w)`."""
        each = self.denoise_each(x, sigma)
        return each.gather(1, classes[..., None, None, None].expand(-1, -1, *each.shape[2:]))

    def score(self, x: Tensor, sigma: Sigma) -> Tensor:
        """∇ log p_σ(x) = (E[x_0 | x] − x)/σ² (Tweedie's formula)."""
        return (self.denoise(x, sigma) - x) / column(sigma, x) ** 2


class UNetDenoiser(Denoiser):
    """A diffusers U-Net on a DDPM schedule.

    Args:
        network: called with diffusers' times 0 … T−1, fractional between levels; level t is time t−1.
        schedule: by default the linear one with T = 1000.
        prediction: what the network predicts: `epsilon`, `v_prediction` or `sample`. Channels beyond
            the image's (a learned variance) are left out.
        n_classes: k where the network takes class labels, one row a class and image.
    """

    def __init__(
        self,
        network: UNet2DModel,
        schedule: Schedule | None = None,
        prediction: str = "epsilon",
        n_classes: int = 0,
    ) -> None:
        super().__init__(schedule)
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"prediction must be epsilon, v_prediction or sample, got {prediction!r}.")
        self.network = network
        self.prediction = prediction
        self.n_classes = n_classes

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """See `Denoiser.eps`.

        Raises:
            InputError: where the network takes class labels.
        """
        if self.n_classes:
            raise InputError("this U-Net takes class labels: it predicts no image without one.")
        return self._eps(x_t, t)

    def _eps(self, x_t: Tensor, t: Level, **labels: Tensor) -> Tensor:
        time = t - 1 if isinstance(t, int) else (torch.as_tensor(t) - 1).to(x_t)
        predicted: Tensor = self.network(x_t, time, **labels, return_dict=False)[0][:, : x_t.shape[1]]
        if self.prediction == "epsilon":
            return predicted
        alpha_bar = column(self.alpha_bar(t), x_t)
        if self.prediction == "sample":
            return (x_t - alpha_bar.sqrt() * predicted) / (1 - alpha_bar).sqrt()
        return alpha_bar.sqrt() * predicted + (1 - alpha_bar).sqrt() * x_t

    def denoise_each(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise_each`; costs k network calls."""
        if not self.n_classes:
            return super().denoise_each(x, sigma)
        return self.denoise_some(x, sigma, torch.arange(self.n_classes, device=x.device).expand(len(x), -1))

    def denoise_some(self, x: Tensor, sigma: Sigma, classes: Tensor) -> Tensor:
        """See `Denoiser.denoise_some`; costs m network calls."""
        m = classes.shape[1]
        given = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x)).repeat_interleave(m)
        rows = x.repeat_interleave(m, 0)
        x_t = rows * column(alpha_bar_of(given), rows).sqrt()
        noise = self._eps(x_t, self.schedule.level(given), class_labels=classes.reshape(-1))
        return (rows - column(given, rows) * noise).reshape(len(x), m, *x.shape[1:])


class EDMDenoiser(Denoiser):
    """An EDM-preconditioned network, optionally with a head for every class (Karras et al. 2022, table 1).

    `D(x, σ) = c_skip·x + c_out·F(c_in·x, c_noise)`, `c_skip = σ_d²/(σ²+σ_d²)`, `c_out = σσ_d/√(σ²+σ_d²)`,
    `c_in = 1/√(σ²+σ_d²)`, `c_noise = ln(σ)/4`. With `n_classes` the network has k + 1 images for
    output, one a class and the last without one, so that all classes cost a single call (Chen et al.
    2023, arXiv 2305.15241, section 3.4, "multi-head diffusion").

    Args:
        network: a diffusers U-Net; gets `time_scale · c_noise` as its time.
        channels: of an image.
        sigma_data: σ_d.
        sigma_range: what it was trained on.
    """

    def __init__(
        self,
        network: UNet2DModel,
        channels: int = 1,
        n_classes: int = 0,
        sigma_data: float = 0.5,
        sigma_range: tuple[float, float] = (0.002, 80.0),
        time_scale: float = 250.0,
    ) -> None:
        super().__init__(sigma_range=sigma_range)
        self.network = network
        self.channels = channels
        self.n_classes = n_classes
        self.sigma_data = sigma_data
        self.time_scale = time_scale

    def heads(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Every head's prediction of the clean image, `(n, k + 1, c, h, w)`; one network call."""
        given = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        scale = column(given, x)
        total = (scale**2 + self.sigma_data**2).sqrt()
        times = self.time_scale / 4 * given.log()
        output: Tensor = self.network(x / total, times, return_dict=False)[0]
        images = output.unflatten(1, (-1, self.channels))
        skip, out = (self.sigma_data / total) ** 2, scale * self.sigma_data / total
        predicted: Tensor = skip[:, None] * x[:, None] + out[:, None] * images
        return predicted

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`: the head without a class."""
        return self.heads(x, sigma)[:, -1]

    def denoise_each(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise_each`; one network call for all classes."""
        if not self.n_classes:
            return super().denoise_each(x, sigma)
        return self.heads(x, sigma)[:, :-1]


class ScoreDenoiser(Denoiser):
    """A score network, conditioned on its level by division: `s(x, σ) = f(x)/σ` (Song & Ermon 2020, arXiv 2006.09011).

    Args:
        network: images `(n, c, h, w)` to `f` of the same shape.
        sigma_range: the geometric range of levels that it was trained on.
    """

    def __init__(self, network: nn.Module, sigma_range: tuple[float, float]) -> None:
        super().__init__(sigma_range=sigma_range)
        self.network = network

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`: x + σ²·s(x, σ)."""
        predicted: Tensor = x + column(sigma, x) * self.network(x)
        return predicted

    def score(self, x: Tensor, sigma: Sigma) -> Tensor:
        """s(x, σ) itself."""
        score: Tensor = self.network(x) / column(sigma, x)
        return score


class EnergyDenoiser(Denoiser):
    """An energy E(x) whose negative gradient, over σ, is the score: `s(x, σ) = −∇E(x)/σ`.

    A forward pass takes a gradient of its own (the trait `inner_gradient`).

    Args:
        network: images `(n, c, h, w)` to energies `(n,)`.
        sigma_range: the geometric range of levels that it was trained on.
    """

    def __init__(self, network: nn.Module, sigma_range: tuple[float, float]) -> None:
        super().__init__(sigma_range=sigma_range)
        self.network = network

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`: x + σ²·s(x, σ)."""
        return x - column(sigma, x) * inner_gradient(self.network, x)

    def score(self, x: Tensor, sigma: Sigma) -> Tensor:
        """s(x, σ) itself."""
        return -inner_gradient(self.network, x) / column(sigma, x)


class GaussianDenoiser(Denoiser):
    """A network that removes Gaussian noise of a stated level from photographs, as FDnCNN and FFDNet do.

    Args:
        network: `(x, sigma) -> x_0` with images in [0, 1] and sigma `(n,)` in their units.
        highest: the highest level it was trained for, in pixel units.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], highest: float = 75 / 255) -> None:
        super().__init__(sigma_range=(0.0, 2 * highest))
        self.network = network

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`."""
        pixels = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)) / 2
        return encode(self.network(decode(x), pixels))


def check_sigmas(denoiser: Denoiser, sigmas: Sequence[float], what: str) -> None:
    """Refuses levels that a denoiser was not made for.

    Raises:
        InputError: for a σ outside its range.
    """
    low, high = denoiser.sigma_range
    outside = [sigma for sigma in sigmas if not low <= sigma <= high * (1 + 1e-9) or not math.isfinite(sigma)]
    if outside:
        raise InputError(
            f"{what} needs σ = {outside[0]:.4g} (in [−1, 1] units); {type(denoiser).__name__} is usable from "
            f"{low:.4g} to {high:.4g}. Choose a lower level or another denoiser."
        )


def small_unet(channels: Sequence[int] = (16, 16), outputs: int = 1) -> UNet2DModel:
    """A U-Net for the digits boards: 1×8×8 images, two resolutions, no attention; `outputs` images."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=outputs,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        add_attention=False,
    )
