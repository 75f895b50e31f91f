"""Diffusion classifiers of an image that is noised already: the base of the two noised diffusion classifiers.

Chen et al. 2024 (arXiv 2402.02316) classify `x_τ = x + τ·ε` so that the classifier can be smoothed: a
majority over draws of ε has a radius to certify. A pixel-unit σ in [0, 1] is τ = 2σ here. The grid
of noise levels starts at τ; `epndc` and `apndc` differ in how they go on from it.

A draw is one noised answer, differentiable; the defense answers by majority of its draws, which has
no gradient. The cards do not say `certifies`: the project has no certificates yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from assay.card import Card, Votes
from assay.defenses.class_errors import Grid, Sift, Weighting
from assay.defenses.denoiser import Denoiser, encode
from assay.defenses.diffusion_classifier import DiffusionClassifier
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
            weighting or self.own_weighting,
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

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`base`: the classifier without the smoothing noise, told that the image has it."""
        return {"base": lambda x, noise: self.comparison(self.grid).everything(*self.given(encode(x)), noise)}
