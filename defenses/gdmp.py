"""GDMP (Wang et al. 2022, arXiv 2205.14969): rounds of diffusing and denoising, guided towards the input.

Every reverse step of mean μ and variance v is moved against the gradient of the distance between its
image and the input, which is noised to the same level anew:

    μ̃ = μ − s·σ·v·∇_z ‖z − (x + σ·ε')‖²

The gradient of the squared distance is a closed form, so no network is differentiated. On digits:
the denoiser of `diffpure` and the undefended classifier; level, rounds, steps and scale were chosen
on training images, which the weights have seen too, never on a board's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from assay.card import Card, Traits
from assay.data import describe
from assay.defense import DefenseSpec
from assay.defenses.checkpoints import load_packaged, packaged
from assay.defenses.denoiser import UNetDenoiser, encode, small_unet
from assay.defenses.diffpure import DENOISER, DiffPure, weight_files
from assay.defenses.guidance import GuidedPurifier
from assay.defenses.purifier import posterior
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.undefended import load_network
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
    datasets=("digits",),
    weights=packaged(DENOISER, CLASSIFIER),
    network_calls=ROUNDS * STEPS + 1,
    # The chain runs every step once more to differentiate it.
    gradient_calls=2 * (ROUNDS * STEPS + 1),
)


def load(dataset: str) -> DiffPure:
    """GDMP before the undefended classifier."""
    denoiser = UNetDenoiser(small_unet())
    load_packaged(denoiser, DENOISER)
    purifier = TowardsInput(denoiser, LEVEL, STEPS, ROUNDS, scale=SCALE)
    return DiffPure(purifier, load_network(dataset), describe(dataset).n_classes, CARD)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
