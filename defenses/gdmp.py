"""GDMP (Wang et al. 2022, arXiv 2205.14969): rounds of diffusing and denoising, guided towards the input.

Every reverse step of mean μ and variance v is moved against the gradient of the distance between its
image and the input, which is noised to the same level anew:

    μ̃ = μ − s·σ·v·∇_z ‖z − (x + σ·ε')‖²

The gradient of the squared distance is a closed form, so no network is differentiated. On digits:
the denoiser of `diffpure` and the undefended classifier; level, rounds, steps and scale were chosen
on training images, which the weights have seen too, never on a board's. With the option `denoiser` it
runs on what a user brings, on digits or cifar10.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from assay.card import Card, Traits
from assay.data import describe
from assay.defenses.behind import take_classifier
from assay.defenses.checkpoints import packaged
from assay.defenses.denoiser import encode
from assay.defenses.diffpure import DENOISER, DiffPure, weight_files
from assay.defenses.guidance import GuidedPurifier
from assay.defenses.purifier import posterior
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.variants import ON_UNET, check_scale, counted, unet_or_taken, with_files, with_purifier
from assay.foreign import OpenSpec
from assay.noise import Noise

LEVEL = 100
ROUNDS = 2
STEPS = 4
SCALE = 10.0


@dataclass(frozen=True, kw_only=True)
class TowardsInput(GuidedPurifier):
    """Guided by the squared distance to the noised input.

    Attributes:
        scale: s, in [−1, 1] units; 0 is plain purification.
    """

    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("scale", self.scale)

    def mean(
        self, z: Tensor, kept: tuple[Tensor, ...], x: Tensor, sigma: float, lower: float, noise: Noise
    ) -> tuple[Tensor, float]:
        """See `GuidedPurifier.mean`. The last step has no variance, and so no guidance."""
        mean, variance = posterior(z, self.denoiser.denoise(z, sigma), sigma, lower)
        noised = encode(x) + sigma * noise.normal("input", shape=x.shape[1:], like=x)
        return mean - self.scale * sigma * variance * 2 * (z - noised), variance


CARD = Card(
    name="gdmp",
    title="GDMP",
    summary=f"Diffuses the image to t* = {LEVEL} of 1000 and takes {STEPS} steps back, {ROUNDS} times, each step "
    "guided towards the input; then classifies.",
    source="Wang et al., Guided Diffusion Model for Adversarial Purification, 2022",
    url="https://arxiv.org/abs/2205.14969",
    reconstruction=True,
    choices=(
        "the squared distance alone guides; the paper's other distance, SSIM, is left out",
        f"t* = {LEVEL} and {ROUNDS} rounds of {STEPS} respaced steps, where the authors' CIFAR-10 settings have t* = "
        "36 and 4 rounds without respacing; a respaced step has a larger variance and so a larger pull",
        f"the scale is s·σ with s = {SCALE:g} for a distance summed over pixels in [−1, 1]; the authors' is also "
        "proportional to σ",
    ),
    traits=Traits(stochastic=True, purifies=True, iterative=True),
    handles=("stages", "chain", "surrogate", "components"),
    datasets=ON_UNET,
    weights=packaged(DENOISER, CLASSIFIER),
    network_calls=ROUNDS * STEPS + 1,
    # The chain runs every step once more to differentiate it.
    gradient_calls=2 * (ROUNDS * STEPS + 1),
)


def load(
    dataset: str,
    *,
    denoiser: str = "",
    classifier: str = "",
    level: int = LEVEL,
    steps: int = STEPS,
    rounds: int = ROUNDS,
    scale: float = SCALE,
) -> DiffPure:
    """GDMP before a classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: see `assay.defenses.denoiser_sources`; empty for the packaged one.
        classifier: see `assay.defenses.behind`; empty for the undefended one.
        level: t*, in levels of the denoiser's schedule.
        steps: reverse steps of a round.
        rounds: times that the image is diffused and denoised.
        scale: s; 0 leaves the guidance out.

    Raises:
        InputError: for a denoiser or classifier that can't be used, or a number outside its range.
    """
    network = unet_or_taken(denoiser, dataset, DENOISER)
    purifier = TowardsInput(network, level, steps, rounds, scale=scale)
    process = purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    if dataset != "digits" or denoiser or classifier or (level, steps, rounds, scale) != (LEVEL, STEPS, ROUNDS, SCALE):
        times = f", {rounds} times" if rounds > 1 else ""
        card = with_files(
            with_purifier(CARD, process),
            weight_files(dataset, denoiser=denoiser, classifier=classifier),
            summary=f"Diffuses the image to t* = {level} and takes {counted(steps, 'step')} back{times}, each but a "
            "round's last guided towards the input; then classifies.",
            choices=(
                CARD.choices[0],
                f"t* = {level} and {counted(rounds, 'round')} of {counted(steps, 'respaced step')}",
                f"the scale is s·σ with s = {scale:g} for a distance summed over pixels in [−1, 1]",
            ),
        )
    return DiffPure(purifier, take_classifier(classifier, dataset), describe(dataset).n_classes, card)


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser", "classifier"))
