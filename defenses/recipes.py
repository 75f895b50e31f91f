"""How each packaged network is trained: a table of recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.certificates.lipschitz import LIPSCHITZ, LipschitzNet, certified_radius
from assay.data import describe, load, test_ids, train_split
from assay.defenses.denoiser import (
    Denoiser,
    EDMDenoiser,
    EnergyDenoiser,
    ScoreDenoiser,
    UNetDenoiser,
    encode,
    small_unet,
)
from assay.defenses.fitting import (
    Advance,
    Perturb,
    fit_classifier,
    fit_denoiser,
    fit_heads,
    fit_score,
    fit_trades,
    gaussian,
    pgd,
    unchanged,
)
from assay.defenses.fitting_variational import fit_variational
from assay.defenses.lipschitz_networks import MaxMinNet, fit_lipschitz
from assay.defenses.networks import LARGEST, DigitsCNN, EnergyNet, ScoreNet, resize_and_pad
from assay.defenses.schedule import column
from assay.defenses.selector import VariationalNet
from assay.noise import Noise
from assay.threat import Norm

SCORE_RANGE = (0.05, 2.0)
"""σ of the score and energy models, geometric, in [−1, 1] units."""
HEADS_RANGE = (0.02, 6.0)
"""σ of the class-conditional model: beyond the diffusion classifiers' grid on both sides."""


def digits_heads() -> EDMDenoiser:
    """The class-conditional model of the digits boards: one head a class and one without a class."""
    return EDMDenoiser(small_unet(outputs=11), n_classes=10, sigma_range=HEADS_RANGE)


def digits_score() -> ScoreDenoiser:
    """The score model of the digits boards."""
    return ScoreDenoiser(ScoreNet(), SCORE_RANGE)


def cifar10_score() -> ScoreDenoiser:
    """The score network of CIFAR-10, untrained."""
    return ScoreDenoiser(ScoreNet(3, 128), SCORE_RANGE)


def digits_energy() -> EnergyDenoiser:
    """The energy model of the digits boards."""
    return EnergyDenoiser(EnergyNet(width=16), SCORE_RANGE)


def resized(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Resizes and pads at random, as the calibrator `random_resize` does."""
    return resize_and_pad(x, Noise.from_seed(int(torch.randint(1 << 31, ())), len(x)), LARGEST)


@dataclass(frozen=True)
class Recipe:
    """How one weight file is made.

    Attributes:
        build: the untrained network.
        fit: `(network, x, y, advance, epochs=…)`.
        measure: `(network, x, y) -> ` what the manifest says of it, on the test split.
        options: what the manifest says of the training; `epochs` among them.
    """

    build: Callable[[], nn.Module]
    fit: Callable[..., None]
    measure: Callable[[Any, Tensor, Tensor], dict[str, float]]
    options: dict[str, Any]

    def run(self, seed: int, advance: Advance, epochs: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Trained weights, and what was measured on the test split."""
        x, y = load("digits", train_split("digits"))
        x_test, y_test = load("digits", test_ids("digits"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build()
            self.fit(network, x, y, advance, epochs=epochs)
            return network.state_dict(), self.measure(network.eval(), x_test, y_test)


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that the network gets right."""
    return float((network(x).argmax(1) == y).double().mean())


def clean(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy on the images as they are."""
    return {"clean_accuracy": accuracy(network, x, y)}


def noisy(perturb: Perturb) -> Callable[[nn.Module, Tensor, Tensor], dict[str, float]]:
    """Accuracy on the images as they are and as perturbed in training."""
    return lambda network, x, y: {
        "clean_accuracy": accuracy(network, x, y),
        "noisy_accuracy": accuracy(network, perturb(network, x, y), y),
    }


def robust(eps: str, norm: Norm = "linf") -> Callable[[nn.Module, Tensor, Tensor], dict[str, float]]:
    """Accuracy on the images as they are and under 20 steps of PGD."""
    return lambda network, x, y: {
        "clean_accuracy": accuracy(network, x, y),
        "pgd_accuracy": accuracy(network, pgd(eps, 20, norm)(network, x, y), y),
    }


@torch.no_grad()
def noise_error(denoiser: Denoiser, x: Tensor, y: Tensor) -> dict[str, float]:
    """The mean squared error of eps over images and levels 50, 100, …, 400; 1 is what eps = 0 would have."""
    errors = []
    for t in range(50, 401, 50):
        sigma, z = denoiser.schedule.sigma(t), torch.randn_like(x)
        noised = encode(x) + sigma * z
        errors.append(F.mse_loss((noised - denoiser.denoise(noised, sigma)) / sigma, z))
    return {"noise_error": float(torch.stack(errors).mean())}


@torch.no_grad()
def smoothed(network: VariationalNet, x: Tensor, y: Tensor) -> dict[str, float]:
    """One noisy pass an image at the selector's level for a target of .5, and the spread of those levels."""
    means, _ = network.selector(x, 0.5)
    noised = x + column(means.exp(), x) * torch.randn_like(x)
    return {
        "clean_accuracy": accuracy(network.classifier, x, y),
        "noisy_accuracy": accuracy(network.classifier, noised, y),
        "median_sigma": float(means.median().exp()),
        "spread_of_log_sigma": float(means.std()),
    }


@torch.no_grad()
def certified(network: MaxMinNet, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, and the shares of images that are right and have more than these certified radii."""
    net = LipschitzNet(describe("digits").shape, network.described())
    radius = torch.from_numpy(certified_radius(net.logits(x).numpy(), LIPSCHITZ.knobs(net)))
    right = network(x).argmax(1) == y
    shares = {f"certified_{r:g}": float((right & (radius > r)).double().mean()) for r in (0.25, 0.5, 0.75, 1.0)}
    return {"clean_accuracy": float(right.double().mean()), **shares}


DIGITS: dict[str, Recipe] = {
    "undefended": Recipe(DigitsCNN, partial(fit_classifier, perturb=unchanged), clean, {"epochs": 60}),
    "adversarial_training": Recipe(
        DigitsCNN,
        partial(fit_classifier, perturb=pgd("1/5", 7)),
        clean,
        {"epochs": 80, "attack": "pgd", "eps": "1/5", "steps": 7},
    ),
    "adversarial_training_l2": Recipe(
        DigitsCNN,
        partial(fit_classifier, perturb=pgd("3/4", 7, "l2")),
        robust("3/4", "l2"),
        {"epochs": 80, "attack": "pgd", "norm": "l2", "eps": "3/4", "steps": 7},
    ),
    "smoothing": Recipe(
        DigitsCNN,
        partial(fit_classifier, perturb=gaussian(0.25)),
        noisy(gaussian(0.25)),
        {"epochs": 80, "sigma": 0.25},
    ),
    "denoiser": Recipe(
        lambda: UNetDenoiser(small_unet()),
        partial(fit_denoiser, ema=0.999),
        noise_error,
        {"epochs": 700, "ema": 0.999},
    ),
    "trades": Recipe(
        DigitsCNN,
        partial(fit_trades, eps="1/5", steps=7, beta=6.0),
        robust("1/5"),
        {"epochs": 80, "attack": "trades", "eps": "1/5", "steps": 7, "beta": 6.0},
    ),
    "guide": Recipe(
        DigitsCNN,
        partial(fit_trades, eps="1/5", steps=5, beta=6.0, noise=0.3),
        robust("1/5"),
        {"epochs": 80, "attack": "trades", "eps": "1/5", "steps": 5, "beta": 6.0, "noise": 0.3},
    ),
    "random_resize": Recipe(
        DigitsCNN,
        partial(fit_classifier, perturb=resized),
        noisy(resized),
        {"epochs": 60, "largest": LARGEST},
    ),
    "heads": Recipe(
        digits_heads,
        partial(fit_heads, ema=0.999, mean=-0.6, std=1.2),
        noise_error,
        {"epochs": 800, "ema": 0.999, "mean": -0.6, "std": 1.2, "range": list(HEADS_RANGE)},
    ),
    "score": Recipe(
        digits_score,
        partial(fit_score, ema=0.999),
        noise_error,
        {"epochs": 400, "ema": 0.999, "range": list(SCORE_RANGE)},
    ),
    "energy": Recipe(
        digits_energy,
        partial(fit_score, ema=0.999),
        noise_error,
        {"epochs": 400, "ema": 0.999, "range": list(SCORE_RANGE)},
    ),
    "variational_smoothing": Recipe(
        VariationalNet,
        partial(fit_variational, targets=(0.1, 1.0), probe=0.1, kl=0.1, width=0.5, draws=2),
        smoothed,
        {"epochs": 200, "targets": [0.1, 1.0], "probe": 0.1, "kl": 0.1, "width": 0.5, "draws": 2},
    ),
    "lipschitz": Recipe(
        MaxMinNet,
        partial(fit_lipschitz, offset=1.0, temperature=0.25),
        certified,
        {"epochs": 80, "offset": 1.0, "temperature": 0.25},
    ),
}
