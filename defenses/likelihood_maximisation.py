"""Likelihood maximisation (Chen et al. 2023, arXiv 2305.15241): move the image to where it is likelier.

Within an linf ball around the input, a few gradient steps decrease the diffusion loss

    L(z) = E_{σ,ε} ‖ε_θ(z + σ·ε, σ) − ε‖² = E_{σ,ε} ‖D(z + σ·ε, σ) − z‖²/σ²,

whose negative bounds the log-likelihood from below; each step draws one level and one noise. The
result goes to the undefended classifier. A step follows the gradient over its root mean square, not
its sign, so that the process has useful derivatives; the projection to the ball is a clamp to
x ± η, whose gradient goes to x where it binds. With the option `denoiser` it runs on what a user
brings, on digits or cifar10.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from assay.card import Card, Traits
from assay.chain import Chain, State, inner_gradient
from assay.data import describe
from assay.defenses.behind import take_classifier
from assay.defenses.checkpoints import packaged
from assay.defenses.denoiser import Denoiser, check_sigmas, decode, encode
from assay.defenses.diffpure import DENOISER, DiffPure, weight_files
from assay.defenses.guidance import has_kinks
from assay.defenses.schedule import column
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.variants import ON_UNET, counted, unet_or_taken, with_files, with_purifier, with_traits
from assay.errors import InputError
from assay.foreign import OpenSpec
from assay.noise import Noise

RADIUS = 0.2
STEPS = 4
STEP_SIZE = 0.1
SIGMAS = (0.4, 0.6)


@dataclass(frozen=True)
class LikelihoodMaximiser:
    """Gradient steps down the diffusion loss, inside a ball.

    Attributes:
        denoiser: predicts the clean image.
        steps: gradient steps, one call of the denoiser each.
        step_size: the root mean square of a step, in pixel units.
        radius: η, the linf distance that the image may move, in pixel units.
        sigmas: levels are drawn uniformly between these two, in [−1, 1] units.
    """

    denoiser: Denoiser
    steps: int
    step_size: float
    radius: float
    sigmas: tuple[float, float]

    def loss(self, z: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """The diffusion loss `(n,)`, a mean over pixels, of `z (n, c, h, w)` in [−1, 1] for one draw of `(σ, ε)`."""
        error = (self.denoiser.denoise(z + column(sigma, z) * eps, sigma) - z) / column(sigma, z)
        return error.square().flatten(1).mean(1)

    def step(self, state: State, x: Tensor, noise: Noise) -> State:
        """One step down the gradient, and the projection."""
        assert isinstance(state, Tensor)
        low, high = self.sigmas
        sigma = low + (high - low) * noise.uniform("sigma", shape=(), like=x)
        eps = noise.normal("eps", shape=x.shape[1:], like=x)
        gradient = inner_gradient(lambda z: self.loss(z, sigma, eps), state)
        size = gradient.square().flatten(1).mean(1).add(torch.finfo(x.dtype).tiny).sqrt()
        moved = state - 2 * self.step_size * gradient / column(size, x)
        image = encode(x)
        return torch.minimum(torch.maximum(moved, image - 2 * self.radius), image + 2 * self.radius)

    def readout(self, state: State, x: Tensor, noise: Noise) -> Tensor:
        """Pixels, not clipped; see `Purifier.readout`."""
        assert isinstance(state, Tensor)
        return decode(state)

    def shortened(self, steps: int) -> Self:
        """At most `steps` >= 1 steps, longer so that they reach as far."""
        fewer = min(steps, self.steps)
        return replace(self, steps=fewer, step_size=self.step_size * self.steps / fewer)

    def chain(self) -> Chain:
        """The process: pixels `(n, c, h, w)` in [0, 1] to pixels at most `radius` from them.

        Raises:
            InputError: for fewer than one step, a length that is not above 0, or levels that don't rise
                or that the denoiser was not made for.
        """
        if self.steps < 1:
            raise InputError(f"likelihood maximisation takes at least 1 step, got {self.steps}.")
        if not (self.step_size > 0 and self.radius > 0):
            raise InputError(
                f"likelihood maximisation needs a step and a radius above 0, got {self.step_size:g} and "
                f"{self.radius:g}."
            )
        low, high = self.sigmas
        if not 0 < low <= high:
            raise InputError(f"noise levels are drawn between 0 < lowest <= highest, got {low:g} and {high:g}.")
        check_sigmas(self.denoiser, self.sigmas, "likelihood maximisation")
        return Chain(lambda x, noise: encode(x), [self.step] * self.steps, self.readout, self.steps)


def _before(which: str) -> str:
    return f"before {which} classifier; the paper's own system puts it before a diffusion classifier"


CARD = Card(
    name="likelihood_maximisation",
    title="Likelihood maximisation",
    summary=f"Takes {STEPS} gradient steps down the diffusion loss, at most {RADIUS:g} (linf) away, then classifies.",
    source="Chen et al., Robust Classification via a Single Diffusion Model, ICML 2024",
    url="https://arxiv.org/abs/2305.15241",
    reconstruction=True,
    choices=(
        "steps along the gradient over its root mean square, where the authors' code takes 5 Adam steps",
        f"{STEPS} steps of {STEP_SIZE:g} (root mean square, in pixels) within linf {RADIUS:g}, the digits board's "
        f"radius; one σ and one ε a step, σ uniform from {SIGMAS[0]:g} to {SIGMAS[1]:g} in [-1, 1] units as in the "
        "authors' code",
        "the error is weighted as that of ε, by 1/σ²; a step's length does not depend on it",
        _before("the undefended"),
        "surrogate: fewer steps, each longer, so that they reach as far",
    ),
    traits=Traits(stochastic=True, purifies=True, iterative=True, inner_gradient=True),
    handles=("stages", "chain", "surrogate", "components"),
    datasets=ON_UNET,
    weights=packaged(DENOISER, CLASSIFIER),
    network_calls=STEPS + 1,
    # The chain runs every step once more to differentiate it.
    gradient_calls=2 * (STEPS + 1),
)


def load(
    dataset: str,
    *,
    denoiser: str = "",
    classifier: str = "",
    steps: int = STEPS,
    step_size: float = STEP_SIZE,
    radius: float = RADIUS,
    lowest: float = SIGMAS[0],
    highest: float = SIGMAS[1],
) -> DiffPure:
    """Likelihood maximisation before a classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: see `assay.defenses.denoiser_sources`; empty for the packaged one.
        classifier: see `assay.defenses.behind`; empty for the undefended one.
        steps: gradient steps.
        step_size: the root mean square of a step, in pixel units.
        radius: η, in pixel units.
        lowest, highest: the range of noise levels, in [−1, 1] units.

    Raises:
        InputError: for a denoiser or classifier that can't be used, or a number outside its range.
    """
    network = unet_or_taken(denoiser, dataset, DENOISER)
    purifier = LikelihoodMaximiser(network, steps, step_size, radius, (lowest, highest))
    process = purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    options = (steps, step_size, radius, lowest, highest)
    if dataset != "digits" or denoiser or classifier or options != (STEPS, STEP_SIZE, RADIUS, *SIGMAS):
        taken = counted(steps, "gradient step")
        # A step follows the gradient of the denoiser's error, which jumps where the denoiser is made of ReLUs.
        image = torch.zeros(1, *describe(dataset).shape)
        jumps = has_kinks(lambda z: network.denoise(z, lowest), image)
        card = with_files(
            with_traits(with_purifier(CARD, process), non_differentiable=jumps),
            weight_files(dataset, denoiser=denoiser, classifier=classifier),
            summary=f"Takes {taken} down the diffusion loss, at most {radius:g} (linf) away, then classifies.",
            choices=(
                CARD.choices[0],
                f"{taken} of {step_size:g} (root mean square, in pixels) within linf {radius:g}; one σ and one ε a "
                f"step, σ uniform from {lowest:g} to {highest:g} in [-1, 1] units",
                CARD.choices[2],
                _before("another" if classifier else "the undefended"),
                *CARD.choices[4:],
            ),
        )
    return DiffPure(purifier, take_classifier(classifier, dataset), describe(dataset).n_classes, card)


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser", "classifier"))
