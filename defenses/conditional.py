"""The diffusion model of CIFAR-10: one network that can be told a class, or told that there is none."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor

from assay.defenses.checkpoints import WEIGHTS, load_packaged, read_manifest
from assay.defenses.denoiser import Denoiser
from assay.defenses.networks_cifar10 import labelled_unet
from assay.defenses.schedule import Sigma, column

CIFAR10 = "cifar10/diffusion.safetensors"


class LabelledDenoiser(Denoiser):
    """An EDM-preconditioned network with a label for its second input, the label k standing for none.

    The preconditioning is `EDMDenoiser`'s (Karras et al. 2022, table 1); that one has a head for every class, which
    costs a single call and needs a network made for it. Training drops labels at random (Ho & Salimans 2022,
    arXiv 2207.12598), so that label k answers for all images.

    Args:
        network: a diffusers U-Net with k + 1 class embeddings.
        n_classes: k.
        sigma_data: σ_d.
        sigma_range: what it can be asked for.
        time_scale: the network's time is this times ln(σ)/4.
    """

    def __init__(
        self,
        network: UNet2DModel,
        n_classes: int = 10,
        sigma_data: float = 0.5,
        sigma_range: tuple[float, float] = (0.002, 80.0),
        time_scale: float = 250.0,
    ) -> None:
        super().__init__(sigma_range=sigma_range)
        self.network = network
        self.n_classes = n_classes
        self.sigma_data = sigma_data
        self.time_scale = time_scale

    def predict(self, x: Tensor, sigma: Sigma, labels: Tensor) -> Tensor:
        """E[x_0 | x, label], `x (n, c, h, w)`, `labels (n,)` int64 in 0 … k; one network call."""
        given = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        scale = column(given, x)
        total = (scale**2 + self.sigma_data**2).sqrt()
        times = self.time_scale / 4 * given.log()
        output = self.network(x / total, times, class_labels=labels, return_dict=False)[0]
        predicted: Tensor = (self.sigma_data / total) ** 2 * x + scale * self.sigma_data / total * output.to(x.dtype)
        return predicted

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`: with the label that stands for none."""
        return self.predict(x, sigma, torch.full((len(x),), self.n_classes, device=x.device))

    def denoise_each(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise_each`; costs k network calls."""
        return self.denoise_some(x, sigma, torch.arange(self.n_classes, device=x.device).expand(len(x), -1))

    def denoise_some(self, x: Tensor, sigma: Sigma, classes: Tensor) -> Tensor:
        """See `Denoiser.denoise_some`; costs m network calls."""
        m = classes.shape[1]
        given = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)).repeat_interleave(m)
        clean = self.predict(x.repeat_interleave(m, 0), given, classes.reshape(-1))
        return clean.reshape(len(x), m, *x.shape[1:])


def cifar10_files() -> dict[str, Path]:
    """The packaged diffusion model's file by name; empty where none was trained."""
    return {CIFAR10: WEIGHTS / CIFAR10} if CIFAR10 in read_manifest() else {}


def cifar10_denoiser() -> LabelledDenoiser:
    """The packaged diffusion model of CIFAR-10; `python -m assay.defenses.train cifar10 --only diffusion` makes it.

    Raises:
        IntegrityError: where the manifest doesn't list it, or the file is another one.
    """
    denoiser = LabelledDenoiser(labelled_unet())
    load_packaged(denoiser, CIFAR10)
    return denoiser
