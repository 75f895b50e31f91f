"""Diffusion classifiers of an image that is noised already: the base of the two noised diffusion classifiers.

Chen et al. 2024 (arXiv 2402.02316) classify `x_τ = x + τ·ε` so that the classifier can be smoothed: a
majority over draws of ε has a radius to certify. A pixel-unit σ in [0, 1] is τ = 2σ here. The grid
of noise levels starts at τ; `epndc` and `apndc` differ in how they go on from it.

A draw is one noised answer, differentiable; the defense answers by majority of its draws, which has
no gradient. What the certificate smooths is the draw without its first noise: it sees x_τ and nothing else of the
image. Sift-and-refine, where it is on, prunes classes inside each draw and never from the clean image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from assay.card import Card, Votes
from assay.certificate import Smoothed
from assay.defenses.class_errors import Grid, Sift, Spacing, Weighting
from assay.defenses.denoiser import Denoiser, encode
from assay.defenses.diffusion_classifier import DiffusionClassifier, described
from assay.defenses.variants import answers_from, counted, with_votes
from assay.errors import InputError
from assay.noise import Noise

SIGMA = 0.25
"""The smoothing noise's standard deviation in pixel units."""
VOTES = Votes(draws=16, how="majority")
PAPER_HIGHEST, PAPER_LEVELS = 3.0, 126


class NoisedDiffusionClassifier(DiffusionClassifier):
    """Adds the smoothing noise; a subclass says what it adds up over the levels.

    Args:
        denoiser: one that knows the k classes.
        sigma: of the smoothing noise, in pixel units.
        grid: the noise levels, in [−1, 1] units, from τ = 2·sigma; by default the paper's 126 up to 3.
        weighting: by default the subclass's.
        samples, sift, rows: see `DiffusionClassifier`.
        card: by default the registry's, which is for the digits boards' options.

    Raises:
        InputError: for a grid that does not start at τ, and as `DiffusionClassifier` does.
    """

    own_card: ClassVar[Card]
    own_weighting: ClassVar[Weighting]

    def __init__(
        self,
        denoiser: Denoiser,
        sigma: float = SIGMA,
        grid: Grid | None = None,
        weighting: Weighting | None = None,
        *,
        samples: int = 1,
        sift: Sift | None = None,
        rows: int = 512,
        card: Card | None = None,
    ) -> None:
        self.tau = 2 * sigma
        grid = grid or Grid(self.tau, PAPER_HIGHEST, PAPER_LEVELS)
        if not math.isclose(grid.lowest, self.tau):
            raise InputError(
                f"the grid must start at the image's noise, τ = 2σ = {self.tau:g}; it starts at {grid.lowest:g}."
            )
        super().__init__(
            denoiser,
            grid,
            self.own_weighting if weighting is None else weighting,
            samples=samples,
            sift=sift,
            rows=rows,
            card=card or self.own_card,
        )

    def noised(self, x: Tensor, noise: Noise) -> Tensor:
        """x_τ: pixels `(n, c, h, w)` in [0, 1] to [−1, 1] units, with the smoothing noise."""
        return encode(x) + self.tau * noise.normal("smoothing", shape=x.shape[1:], like=x)

    def given(self, x_tau: Tensor) -> tuple[Tensor, Tensor]:
        """What noise is added to, and what denoised images are compared with, from the noised image."""
        return x_tau, x_tau

    def start(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """See `DiffusionClassifier.start`."""
        return self.given(self.noised(x, noise))

    def certified(self) -> Smoothed:
        """The classification of an image that is noised already, and the noise."""

        def classify(noised: Tensor, noise: Noise) -> Tensor:
            return self.comparison(self.grid).everything(*self.given(encode(noised)), noise)

        return Smoothed(self.tau / 2, classify)

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`base`: the classifier without the smoothing noise, told that the image has it."""
        return {"base": lambda x, noise: self.comparison(self.grid).everything(*self.given(encode(x)), noise)}


def noised_grid(sigma: float, levels: int, highest: float, spacing: Spacing) -> Grid:
    """The levels of an image that has the smoothing noise already.

    Raises:
        InputError: for a smoothing noise that isn't below the highest level, and as `Grid` does.
    """
    if not 0 < 2 * sigma < highest:
        raise InputError(
            f"the noise levels rise from τ = 2·sigma: expected 0 < 2·sigma < highest = {highest:g}, "
            f"got sigma = {sigma:g}."
        )
    return Grid(2 * sigma, highest, levels, spacing)


def described_noised(defense: NoisedDiffusionClassifier, card: Card, votes: int, files: Mapping[str, Path]) -> Card:
    """The card of a noised diffusion classifier with other options; see `described`.

    Args:
        card: the registry's, with what is the subclass's own; the summary gets the noise and the votes.

    Raises:
        InputError: for fewer than one vote.
    """
    sigma = defense.tau / 2
    changes = {"summary": f"Noises the image (σ = {sigma:g}), {card.summary}; {answers_from(votes)}."}
    if sigma != SIGMA:
        changes["title"] = card.title.partition(" (")[0]
    changed = with_votes(card.model_copy(update=changes), votes)
    return described(defense, changed, files, (f"{counted(votes, 'vote')} for a prediction",))
