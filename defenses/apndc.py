"""APNDC, the approximate-posterior noised diffusion classifier (Chen et al. 2024, arXiv 2402.02316).

The noised image is denoised once without a class, `x̂_0 = D(x_τ, τ)`, and the diffusion classifier
compares the classes on x̂_0 with new noise of the levels from τ up:
`logit_y = −Σ_i w_i · E‖D(x̂_0 + σ_i·ε, σ_i, y) − x̂_0‖²`.

The variant `renoise="noised"` adds noise to x_τ itself, `x_i = x_τ + ε·√(σ_i²−τ²)`, and still compares
with x̂_0; nothing is then purified before the classifier, so it offers no `stages`, and its card says so.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from assay.card import Card, Traits
from assay.defense import DefenseSpec, Stages
from assay.defenses.checkpoints import packaged
from assay.defenses.class_errors import Grid, Level, Sift, Spacing, Weighting, plain_levels
from assay.defenses.conditional import cifar10_files
from assay.defenses.denoiser import Denoiser, decode, encode
from assay.defenses.diffusion_classifier import DIGITS, EVERY, load_denoiser, sifting, weight_files
from assay.defenses.noised_diffusion import SIGMA, VOTES, NoisedDiffusionClassifier, described_noised, noised_grid
from assay.defenses.variants import ON_UNET, with_traits, without_handle
from assay.errors import InputError
from assay.noise import Noise

Renoise = Literal["denoised", "noised"]
DIGITS_GRID = Grid(2 * SIGMA, 3.0, 4, "log")

CARD = Card(
    name="apndc",
    title="APNDC (σ = .25)",
    summary="A majority of 16 noised images, each denoised in one step and then given to a diffusion classifier.",
    source="Chen et al., Your Diffusion Model is Secretly a Certifiably Robust Classifier, NeurIPS 2024",
    url="https://arxiv.org/abs/2402.02316",
    choices=(
        "4 noise levels, even in ln σ from .5 to 3 in [-1, 1] units, one noise sample each, instead of 126 even in σ",
        "all classes from one call of a network with a head a class, so that sift-and-refine saves nothing and is off",
        "16 votes for a prediction",
    ),
    traits=Traits(stochastic=True, purifies=True, iterative=True, non_differentiable=True, certifies=True),
    handles=("stages", "chain", "surrogate", "components", "votes", "certified"),
    certificate="smoothing",
    votes=VOTES,
    datasets=ON_UNET,
    weights=packaged(DIGITS, *cifar10_files()),
    # One call for x̂_0, and one a level.
    network_calls=5,
    gradient_calls=5,
)


class APNDC(NoisedDiffusionClassifier):
    """The approximate posterior.

    Args:
        renoise: what the levels' noise is added to: `"denoised"`, x̂_0, or `"noised"`, x_τ. The card must fit.
        denoiser, sigma, grid, samples, sift, rows, card: see `NoisedDiffusionClassifier`.
        weighting: `"training"`, the default, or `"elbo"`.

    Raises:
        InputError: for another `renoise`, and as `NoisedDiffusionClassifier` does.
    """

    own_card: ClassVar[Card] = CARD
    own_weighting: ClassVar[Weighting] = "training"
    start_calls: ClassVar[int] = 1

    def __init__(
        self,
        denoiser: Denoiser,
        sigma: float = SIGMA,
        grid: Grid | None = None,
        weighting: Weighting | None = None,
        *,
        renoise: Renoise = "denoised",
        samples: int = 1,
        sift: Sift | None = None,
        rows: int = 512,
        card: Card | None = None,
    ) -> None:
        if renoise not in ("denoised", "noised"):
            raise InputError(f"renoise must be denoised or noised, got {renoise!r}.")
        self.renoise = renoise
        super().__init__(denoiser, sigma, grid, weighting, samples=samples, sift=sift, rows=rows, card=card)

    def levels(self, grid: Grid) -> tuple[Level, ...]:
        """The diffusion classifier's, with noise of σ_i, or of √(σ_i²−τ²) on an image that has τ already."""
        plain = plain_levels(grid.sigmas, self.weighting)
        if self.renoise == "denoised":
            return plain
        return tuple(replace(level, spread=math.sqrt(max(0.0, level.sigma**2 - self.tau**2))) for level in plain)

    def given(self, x_tau: Tensor) -> tuple[Tensor, Tensor]:
        """x̂_0 for target, by way of its pixels, so that it is bitwise what `stages` hands on; see `renoise`."""
        restored = encode(self.denoised(x_tau))
        return (restored if self.renoise == "denoised" else x_tau), restored

    def denoised(self, x_tau: Tensor) -> Tensor:
        """x̂_0 in pixels, about in [0, 1], not clipped."""
        return decode(self.denoiser.denoise(x_tau, self.tau))

    def stages(self) -> Stages:
        """Noise and one denoising; the diffusion classifier.

        Raises:
            InputError: where the levels' noise is added to x_τ: the classifier then sees more than x̂_0.
        """
        if self.renoise == "noised":
            raise InputError("APNDC with renoise='noised' has no stages: its classifier sees the noised image too.")

        def purify(x: Tensor, noise: Noise) -> Tensor:
            return self.denoised(self.noised(x, noise.child("start")))

        def classify(x: Tensor, noise: Noise) -> Tensor:
            return self.comparison(self.grid).everything(encode(x), encode(x), noise)

        return Stages(purify, classify)


def load(
    dataset: str,
    *,
    renoise: Renoise = "denoised",
    sigma: float = SIGMA,
    votes: int = VOTES.draws,
    weighting: Weighting = APNDC.own_weighting,
    levels: int = DIGITS_GRID.levels,
    highest: float = DIGITS_GRID.highest,
    spacing: Spacing = DIGITS_GRID.spacing,
    samples: int = 1,
    keep: int = 0,
    every: int = EVERY,
) -> APNDC:
    """APNDC with the card's choices.

    Args:
        dataset: digits, or cifar10 where its weights are packaged: it needs a denoiser that works with and without a
            class, and takes none of a user's.
        renoise: what the levels' noise is added to: denoised, x̂_0, or noised, x_τ.
        sigma: the smoothing noise's standard deviation in pixel units.
        votes: draws of the majority.
        weighting: training or elbo.
        levels, highest, spacing: the levels from τ up, in [−1, 1] units; spacing is linear or log.
        samples: noise samples a level.
        keep, every: sift-and-refine, see `Sift`; without it where keep is 0.

    Raises:
        InputError: for a number or a name outside its range.
    """
    grid, sift = noised_grid(sigma, levels, highest, spacing), sifting(keep, every)
    defense = APNDC(load_denoiser(dataset), sigma, grid, weighting, renoise=renoise, samples=samples, sift=sift)
    usual = ("denoised", SIGMA, VOTES.draws, APNDC.own_weighting, DIGITS_GRID, 1, None)
    if dataset != "digits" or (renoise, sigma, votes, weighting, grid, samples, sift) != usual:
        to = "it" if renoise == "denoised" else "the noised one"
        summary = f"denoises it in one step, and compares how well each class restores that image from noise on {to}"
        card = CARD.model_copy(update={"summary": summary})
        if renoise == "noised":
            # The classifier sees the noised image too: there is no half that purifies.
            card = with_traits(without_handle(card, "stages"), purifies=False)
        defense.card = described_noised(defense, card, votes, weight_files(dataset))
    return defense


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
