"""EPNDC, the exact-posterior noised diffusion classifier (Chen et al. 2024, arXiv 2402.02316).

The noised image x_τ is the data of a diffusion process of its own, `x_{i+1} = x_τ + ε·√(σ_{i+1}²−τ²)` on a
grid from σ_0 = τ. A level compares the mean q̄ of the image one level below, given x_{i+1} and x_τ, with
the mean p̄_y that the denoiser of class y gives it:

    q̄ = [(σ_{i+1}²−σ_i²)·x_τ + (σ_i²−τ²)·x_{i+1}] / (σ_{i+1}²−τ²)
    p̄_y = [(σ_{i+1}²−σ_i²)·D(x_{i+1}, σ_{i+1}, y) + σ_i²·x_{i+1}] / σ_{i+1}²
    logit_y = −Σ_i w_i · E‖q̄ − p̄_y‖²

With s² = σ_{i+1}²−τ² and Δ = σ_{i+1}²−σ_i² this is `q̄ − p̄_y = Δ/σ_{i+1}² · (x_τ − τ²/s·ε − D)`, the form that
is computed: nothing cancels in it. The weight of the Gaussians' KL divergence is
`w_i = s²/(2(σ_i²−τ²)Δ)`. At i = 0 it is infinite: there x_τ is decoded with variance Δ, so that
w_0 = 1/(2Δ), which keeps the lower bound on log p_τ(x_τ | y) and its limit. At τ = 0 the whole sum is
the diffusion classifier with the weights of the evidence lower bound.

What the logits tend to, up to what all classes share, is log p_τ(x_τ | y): as the samples of a level grow,
the grid gets finer, and its top reaches where the noised classes are one. Their root mean square error on
an analytic mixture of three classes (`python -m benchmarks.ndc_convergence`), by levels and highest σ:

    samples a level   126 to 3   126 to 100   500 to 100   2000 to 100
                  1     .4327        .4648        .2978         .1533
                  4     .2327        .2629        .1438         .0759
                 16     .1306        .1718        .0825         .0363
                 64     .1176        .1622        .0723         .0282
                256     .1199        .1655        .0717         .0240

At first it falls as 1/√samples, then to a floor that falls with the grid's width (the KL weight takes the
variance of q̄ for that of p̄, at the lowest levels a good part too little). The top is left out of the
sum: `E log p_σ_T(x_T | y)`, which at σ_T = 3 is worth about .04 here and more for images with more pixels.

With the option `denoiser` it runs on a class-conditional U-Net that a user brings, on digits or cifar10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from assay.card import Card, Traits
from assay.defenses.checkpoints import packaged
from assay.defenses.class_errors import Grid, Level, Spacing, Weighting, training_weight
from assay.defenses.conditional import cifar10_files
from assay.defenses.diffusion_classifier import DIGITS, EVERY, load_denoiser, sifting, weight_files
from assay.defenses.noised_diffusion import SIGMA, VOTES, NoisedDiffusionClassifier, described_noised, noised_grid
from assay.defenses.variants import ON_UNET
from assay.errors import InputError
from assay.foreign import OpenSpec

DIGITS_GRID = Grid(2 * SIGMA, 3.0, 5, "log")

CARD = Card(
    name="epndc",
    title="EPNDC (σ = .25)",
    summary="A majority of 16 noised images, each classified by how well a class-conditional diffusion explains it.",
    source="Chen et al., Your Diffusion Model is Secretly a Certifiably Robust Classifier, NeurIPS 2024",
    url="https://arxiv.org/abs/2402.02316",
    choices=(
        "5 noise levels, even in ln σ from .5 to 3 in [-1, 1] units, one noise sample each, instead of 126 even in σ",
        "all classes from one call of a network with a head a class, so that sift-and-refine saves nothing and is off",
        "16 votes for a prediction",
    ),
    traits=Traits(stochastic=True, iterative=True, non_differentiable=True, certifies=True),
    handles=("chain", "surrogate", "components", "votes", "certified"),
    certificate="smoothing",
    votes=VOTES,
    datasets=ON_UNET,
    weights=packaged(DIGITS, *cifar10_files()),
    network_calls=5,
    gradient_calls=5,
)


def exact_levels(sigmas: Sequence[float], weighting: Weighting = "kl") -> tuple[Level, ...]:
    """The table of the exact posterior: a level for every step up of the rising `sigmas`, the first of which is τ.

    Args:
        sigmas: τ = σ_0 … σ_T in [−1, 1] units.
        weighting: `"kl"`; or `"training"`, `w(σ_i)·σ_{i+1}²s² / [4(σ_{i+1}−σ_i)²(σ_i²−τ²)]` with EDM's training
            weight for w. (With the evidence lower bound's weight for w this is the KL weight
            again, up to the width of the grid.)

    Raises:
        InputError: for another weighting.
    """
    if weighting not in ("kl", "training"):
        raise InputError(f"the weighting of the exact posterior must be kl or training, got {weighting!r}.")
    tau = sigmas[0]
    table = []
    for low, high in pairwise(sigmas):
        added, gap = high**2 - tau**2, high**2 - low**2
        # The variance of the image one level below; the decoder's at the bottom.
        below = low**2 - tau**2 or gap
        if weighting == "kl":
            weight = added / (2 * below * gap)
        else:
            weight = training_weight(low, high - low) * high**2 * added / (4 * (high - low) ** 2 * below)
        spread = math.sqrt(added)
        table.append(Level(high, spread, weight * (gap / high**2) ** 2, tau**2 / spread))
    return tuple(table)


class EPNDC(NoisedDiffusionClassifier):
    """The exact posterior: a grid of L levels makes L steps up from τ; `weighting` is `"kl"` or `"training"`."""

    own_card: ClassVar[Card] = CARD
    own_weighting: ClassVar[Weighting] = "kl"

    def levels(self, grid: Grid) -> tuple[Level, ...]:
        """See `exact_levels`."""
        return exact_levels(replace(grid, levels=grid.levels + 1).sigmas, self.weighting)


def load(
    dataset: str,
    *,
    denoiser: str = "",
    sigma: float = SIGMA,
    votes: int = VOTES.draws,
    weighting: Weighting = EPNDC.own_weighting,
    levels: int = DIGITS_GRID.levels,
    highest: float = DIGITS_GRID.highest,
    spacing: Spacing = DIGITS_GRID.spacing,
    samples: int = 1,
    keep: int = 0,
    every: int = EVERY,
) -> EPNDC:
    """EPNDC with the card's choices.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: a class-conditional one, see `assay.defenses.denoiser_sources`; empty for the packaged one.
        sigma: the smoothing noise's standard deviation in pixel units.
        votes: draws of the majority.
        weighting: kl or training, see `exact_levels`.
        levels, highest, spacing: the steps up from τ, in [−1, 1] units; spacing is linear or log.
        samples: noise samples a level.
        keep, every: sift-and-refine, see `Sift`; without it where keep is 0.

    Raises:
        InputError: for a denoiser that can't be used, or a number or a name outside its range.
    """
    grid, sift = noised_grid(sigma, levels, highest, spacing), sifting(keep, every)
    defense = EPNDC(load_denoiser(dataset, denoiser), sigma, grid, weighting, samples=samples, sift=sift)
    usual = (SIGMA, VOTES.draws, EPNDC.own_weighting, DIGITS_GRID, 1, None)
    if dataset != "digits" or denoiser or (sigma, votes, weighting, grid, samples, sift) != usual:
        summary = "compares how well a class-conditional diffusion explains it under each class"
        card, files = CARD.model_copy(update={"summary": summary}), weight_files(dataset, denoiser=denoiser)
        defense.card = described_noised(defense, card, votes, files)
    return defense


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser",))
