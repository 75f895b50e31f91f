"""Denoised smoothing with a diffusion model (Carlini et al. 2023, arXiv 2206.10550, algorithm 1).

Randomized smoothing whose base classifier denoises before it classifies: the noised image `x + σz`
is denoised in one shot, E[x_0 | x + σz] at exactly that noise level, and goes to a classifier that
was never trained on noise. σ in pixels of [0, 1] is 2σ for the denoiser, whose images are in [−1, 1].

On digits: the small class-unconditional U-Net under the linear DDPM schedule, at the (fractional)
level whose noise is σ, and the undefended classifier. Neither the noised nor the denoised image is
clipped. With the option `denoiser` it runs on what a user brings, on digits or cifar10.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from assay.card import Card, Traits, Votes
from assay.certificate import Smoothed
from assay.data import describe
from assay.defenses.behind import behind_files, take_classifier
from assay.defenses.checkpoints import packaged
from assay.defenses.denoiser import Denoiser, check_sigmas, decode, encode
from assay.defenses.purified import PurifiedClassifier
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.variants import ON_UNET, unet_files, unet_or_taken, with_files, with_votes
from assay.foreign import OpenSpec
from assay.noise import Noise

DENOISER = "digits/denoiser.safetensors"
SIGMA = 0.25
"""The noise's standard deviation in pixel units."""
VOTES = 32

CARD = Card(
    name="denoised_smoothing",
    title="Denoised smoothing (σ = .25)",
    summary=f"One-shot diffusion denoising of a noised image, then classification; a majority of {VOTES} such draws.",
    source="Carlini et al., (Certified!!) Adversarial Robustness for Free!, ICLR 2023",
    url="https://arxiv.org/abs/2206.10550",
    traits=Traits(stochastic=True, purifies=True, non_differentiable=True, certifies=True),
    handles=("stages", "components", "votes", "certified"),
    certificate="smoothing",
    votes=Votes(draws=VOTES, how="majority"),
    datasets=ON_UNET,
    weights=packaged(DENOISER, CLASSIFIER),
    # The denoiser and the classifier, once each.
    network_calls=2,
    gradient_calls=2,
)


class DenoisedSmoothing(PurifiedClassifier):
    """A classifier behind a one-shot denoiser, under Gaussian noise; one draw is one noised pass.

    Args:
        denoiser: predicts the clean image.
        classifier: images to logits.
        sigma: the noise's standard deviation in pixel units.
        n_classes: k.
        card: another card than the registry's, for another number of votes.

    Raises:
        InputError: for a noise level that the denoiser was not made for.
    """

    def __init__(
        self, denoiser: Denoiser, classifier: nn.Module, sigma: float, n_classes: int, card: Card = CARD
    ) -> None:
        super().__init__(classifier, n_classes, card)
        check_sigmas(denoiser, [2 * sigma], f"a noise of {sigma:g} in pixels")
        self.denoiser = denoiser
        self.sigma = sigma

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        """`x (n, c, h, w)` noised and denoised: pixels about in [0, 1], not clipped."""
        return self.restore(x + self.sigma * noise.normal("z", shape=x.shape[1:], like=x))

    def restore(self, noised: Tensor) -> Tensor:
        """Pixels under the smoothing noise to denoised ones, both `(n, c, h, w)`."""
        return decode(self.denoiser.denoise(encode(noised), 2 * self.sigma))

    def certified(self) -> Smoothed:
        """Denoiser and classifier together, and the noise. A denoiser told another level costs accuracy alone."""
        return Smoothed(self.sigma, lambda noised, noise: self.classify(self.restore(noised), noise))


def weight_files(dataset: str, *, denoiser: str = "", classifier: str = "") -> dict[str, Path]:
    """The weight files that `load` reads."""
    return {**unet_files(denoiser, dataset, DENOISER), **behind_files(classifier, dataset)}


def load(
    dataset: str, *, denoiser: str = "", classifier: str = "", sigma: float = SIGMA, votes: int = VOTES
) -> DenoisedSmoothing:
    """The smoothed pair of denoiser and classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: see `assay.defenses.denoiser_sources`; empty for the packaged one.
        classifier: see `assay.defenses.behind`; empty for the undefended one.
        sigma: the noise's standard deviation in pixel units.
        votes: draws of the majority.

    Raises:
        InputError: for a denoiser or classifier that can't be used, or a noise level or number of votes outside its
            range.
    """
    network = unet_or_taken(denoiser, dataset, DENOISER)
    card = CARD
    if dataset != "digits" or denoiser or classifier or (sigma, votes) != (SIGMA, VOTES):
        card = with_files(
            with_votes(CARD, votes),
            weight_files(dataset, denoiser=denoiser, classifier=classifier),
            title="Denoised smoothing",
            summary=f"One-shot denoising of an image under noise of {sigma:g}; a majority of {votes} such draws.",
        )
    return DenoisedSmoothing(network, take_classifier(classifier, dataset), sigma, describe(dataset).n_classes, card)


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser", "classifier"))
