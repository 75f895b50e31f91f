"""How each network of CIFAR-10 is trained: a table of recipes, every one of them with a toy of itself.

Steps are for one H200. The multiply-adds of a forward pass were counted (torch's FlopCounterMode), a training step
taken as three of them, each TRADES attack step as two, and 60 to 80 TFLOP/s assumed of the GPU's 790 in 16 bits,
as small convolutions leave most of it idle. No GPU was at hand: `minutes` are these estimates, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from assay.defenses import fitting_cifar10 as losses
from assay.defenses.augment import Augment, crop_and_flip, flip
from assay.defenses.conditional import LabelledDenoiser
from assay.defenses.denoiser import Denoiser, ScoreDenoiser, decode, encode
from assay.defenses.denoiser_sources import check_denoiser, psnr, smoke_sigmas
from assay.defenses.networks import ScoreNet
from assay.defenses.networks_cifar10 import NarrowResNet18, SelectedNet, labelled_unet
from assay.defenses.recipes import SCORE_RANGE, cifar10_score
from assay.defenses.schedule import column
from assay.defenses.training import Loss, Plan
from assay.errors import InputError
from assay.threat import parse_eps

Measured = dict[str, float]
BATCH = 250
"""Images in one pass of a measurement."""
ATTACKED = 1000
"""How many images PGD is measured on."""
SEED = 0
"""Of measurements, whatever training's own was."""


@dataclass(frozen=True)
class Recipe:
    """How one weight file is made.

    Attributes:
        build: the untrained network; `toy` the same in small.
        loss, augment, plan: of training; `toy_plan` the plan of the toy.
        measure: `(network, x, y)` to what the manifest says of it; images in [0, 1].
        floor: the clean accuracy below which a classifier is not written; None for denoisers.
        parts: what `torch.compile` gets, of the network.
        minutes: on one H200, estimated.
        options: what else the manifest says of the training; `size` what it says of the network, and not of a toy.
    """

    build: Callable[[], nn.Module]
    toy: Callable[[], nn.Module]
    loss: Loss
    augment: Augment
    plan: Plan
    toy_plan: Plan
    measure: Callable[[Any, Tensor, Tensor], Measured]
    parts: Callable[[Any], Sequence[nn.Module]]
    minutes: float
    floor: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    size: dict[str, Any] = field(default_factory=dict)

    def identity(self, *, toy: bool, seed: int, minutes: float | None) -> dict[str, Any]:
        """Everything that the trained weights depend on, beside data and machine."""
        plan = asdict(self.toy_plan if toy else self.plan)
        if minutes:
            plan = {**plan, "steps": None, "minutes": minutes}
        return {**self.options, **({"toy": True} if toy else self.size), **plan, "seed": seed}

    def check(self, network: nn.Module, x: Tensor, measured: Measured, *, toy: bool) -> None:
        """The smoke test that weights have to pass before they are written.

        Raises:
            InputError: for a denoiser that doesn't denoise, or a classifier below its floor.
        """
        if isinstance(network, Denoiser):
            check_denoiser(network, x[:8])
            return
        floor = 0.0 if toy else self.floor or 0.0
        # Written so that NaN fails.
        if not measured["clean_accuracy"] >= floor:
            raise InputError(
                f"the classifier has a clean accuracy of {measured['clean_accuracy']:.3f}, expected at least "
                f"{floor:g}: it was trained for too short a time, or something is wrong."
            )


def _each(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([function(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)])


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that the network gets right."""
    return float(_each(lambda a, b: network(a).argmax(1) == b, x, y).double().mean())


def _noised(x: Tensor, sigma: float | Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=Generator().manual_seed(SEED))
    return x + column(sigma, x) * noise.to(x)


def noisy(network: nn.Module, x: Tensor, y: Tensor, *, sigma: float) -> Measured:
    """Accuracy on the images as they are and with Gaussian noise."""
    return {"clean_accuracy": accuracy(network, x, y), "noisy_accuracy": accuracy(network, _noised(x, sigma), y)}


def robust(network: nn.Module, x: Tensor, y: Tensor, *, eps: str, steps: int) -> Measured:
    """Accuracy on the images as they are, and that of the first `ATTACKED` under PGD on the cross-entropy."""
    generator, radius = Generator(x.device).manual_seed(SEED), float(parse_eps(eps))

    def attacked(a: Tensor, b: Tensor) -> Tensor:
        def wrong(z: Tensor) -> Tensor:
            return nn.functional.cross_entropy(network(z), b)

        logits: Tensor = network(losses.ascend(a, radius, steps, wrong, generator))
        return logits.argmax(1) == b

    under_attack = _each(attacked, x[:ATTACKED], y[:ATTACKED]).double().mean()
    return {"clean_accuracy": accuracy(network, x, y), "pgd_accuracy": float(under_attack)}


@torch.no_grad()
def selected(network: SelectedNet, x: Tensor, y: Tensor) -> Measured:
    """One noisy pass an image at the selector's level for a target of .5, and the spread of those levels."""
    means = _each(lambda a, b: network.selector(a, 0.5)[0], x, y)
    return {
        "clean_accuracy": accuracy(network.classifier, x, y),
        "noisy_accuracy": accuracy(network.classifier, _noised(x, means.exp()), y),
        "median_sigma": float(means.median().exp()),
        "spread_of_log_sigma": float(means.std()),
    }


def _without_label(denoiser: Denoiser, sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: denoiser.denoise(x, sigma)


def _with_label(denoiser: Denoiser, sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: denoiser.denoise_some(x, sigma, y[:, None])[:, 0]


@torch.no_grad()
def denoising(denoiser: Denoiser, x: Tensor, y: Tensor) -> Measured:
    """PSNR in dB of the first `ATTACKED` images at the smoke test's levels: noisy, denoised, and told the class."""
    x, y = x[:ATTACKED], y[:ATTACKED]
    found = {}
    for sigma in smoke_sigmas(denoiser):
        noised = _noised(encode(x), sigma)
        clean = _each(_without_label(denoiser, sigma), noised, y)
        found[f"psnr_noisy_{sigma:g}"] = psnr(decode(noised), x)
        found[f"psnr_{sigma:g}"] = psnr(decode(clean), x)
        if denoiser.n_classes:
            told = _each(_with_label(denoiser, sigma), noised, y)
            found[f"psnr_with_label_{sigma:g}"] = psnr(decode(told), x)
    return found


def _whole(network: nn.Module) -> Sequence[nn.Module]:
    return [network]


def _inner(denoiser: Any) -> Sequence[nn.Module]:
    return [denoiser.network]


def _both(network: SelectedNet) -> Sequence[nn.Module]:
    return [network.selector, network.classifier]


def _sgd(steps: int) -> Plan:
    return Plan(steps, 512, 0.2, "sgd", decay=5e-4)


_TOY = Plan(16, 16, 0.02, "sgd", decay=5e-4, half_life=300, log_every=4)
_TOY_ADAM = Plan(32, 16, 5e-3, "adam", half_life=300, log_every=4)
_EDM: dict[str, Any] = {"mean": -1.2, "std": 1.2, "drop": 0.2}
_TRADES: dict[str, Any] = {"eps": "8/255", "steps": 10, "beta": 6.0}
_GUIDE: dict[str, Any] = {"eps": "8/255", "steps": 5, "beta": 6.0, "noise": 0.3}
_SELECTOR: dict[str, Any] = {"targets": [0.1, 1.0], "probe": 0.1, "kl": 0.1, "width": 0.5, "draws": 2}

CIFAR10: dict[str, Recipe] = {
    "diffusion": Recipe(
        build=lambda: LabelledDenoiser(labelled_unet()),
        toy=lambda: LabelledDenoiser(labelled_unet((8, 16), 1, 8)),
        loss=partial(losses.diffusion, **_EDM),
        augment=flip,
        plan=Plan(7000, 512, 1e-3, "adam", half_life=500_000),
        toy_plan=_TOY_ADAM,
        measure=denoising,
        parts=_inner,
        minutes=9.7,
        options={"edm": _EDM},
        size={"channels": [96, 128, 128]},
    ),
    "noise_classifier": Recipe(
        build=NarrowResNet18,
        toy=lambda: NarrowResNet18(4),
        loss=partial(losses.noisy, sigma=0.25),
        augment=crop_and_flip,
        plan=_sgd(4800),
        toy_plan=_TOY,
        measure=partial(noisy, sigma=0.25),
        parts=_whole,
        minutes=1.4,
        floor=0.5,
        options={"sigma": 0.25},
        size={"width": 48},
    ),
    "trades": Recipe(
        build=NarrowResNet18,
        toy=lambda: NarrowResNet18(4),
        loss=partial(losses.trades, **_TRADES),
        augment=crop_and_flip,
        plan=_sgd(2900),
        toy_plan=_TOY,
        measure=partial(robust, eps="8/255", steps=20),
        parts=_whole,
        minutes=7.0,
        floor=0.6,
        options={"trades": _TRADES},
        size={"width": 48},
    ),
    "score": Recipe(
        build=cifar10_score,
        toy=lambda: ScoreDenoiser(ScoreNet(3, 8), SCORE_RANGE),
        loss=losses.score,
        augment=flip,
        plan=Plan(4000, 512, 1e-3, "adam", half_life=200_000),
        toy_plan=_TOY_ADAM,
        measure=denoising,
        parts=_inner,
        minutes=2.5,
        options={"range": list(SCORE_RANGE)},
        size={"width": 128},
    ),
    "selector": Recipe(
        build=SelectedNet,
        toy=lambda: SelectedNet(4),
        loss=partial(losses.variational, **_SELECTOR),
        augment=crop_and_flip,
        plan=Plan(3900, 512, 2e-3, "adam"),
        toy_plan=_TOY_ADAM,
        measure=selected,
        parts=_both,
        minutes=1.2,
        floor=0.4,
        options={"variational": _SELECTOR},
        size={"width": 32},
    ),
    "guide": Recipe(
        build=lambda: NarrowResNet18(32),
        toy=lambda: NarrowResNet18(4),
        loss=partial(losses.trades, **_GUIDE),
        augment=crop_and_flip,
        plan=_sgd(2400),
        toy_plan=_TOY,
        measure=partial(robust, eps="8/255", steps=20),
        parts=_whole,
        minutes=2.0,
        floor=0.45,
        options={"trades": _GUIDE},
        size={"width": 32},
    ),
}
