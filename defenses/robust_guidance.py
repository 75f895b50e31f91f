"""Robust guidance, after Lin et al. (arXiv 2403.16067): a guide trained against attacks, a diffusion model that is not.

An auxiliary network c_φ, trained adversarially on noised images, guides every reverse step of mean μ
and variance v:

    μ̃ = μ + s·v·∇_z [a·log p_φ(y | z) − b·‖c_φ(z) − c_φ(x)‖²]

y is c_φ's label on the input x, and the distance is taken between its penultimate features. Two paths
lead from x into the guidance, y and c_φ(x), beside the diffused image itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from assay.card import Card, Traits
from assay.chain import Chain, inner_gradient
from assay.data import describe
from assay.defense import DefenseSpec
from assay.defenses import diffpure
from assay.defenses.checkpoints import WEIGHTS, load_packaged, packaged
from assay.defenses.denoiser import UNetDenoiser, decode, small_unet
from assay.defenses.diffpure import DENOISER, DiffPure
from assay.defenses.guidance import TEMPERATURE, GuidedPurifier, label_log_probability, label_weights
from assay.defenses.networks import DigitsCNN
from assay.defenses.purifier import posterior
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.undefended import load_network
from assay.defenses.variants import check_scale, counted, with_purifier, with_traits, without_handle
from assay.noise import Noise

GUIDE = "digits/guide.safetensors"
LEVEL = 150
STEPS = 5
LABEL_SCALE = 20.0
DISTANCE_SCALE = 1.0


class Guide(nn.Module):
    """c_φ: one pass of a classifier that gives its logits and its penultimate features.

    Args:
        network: the classifier.
    """

    def __init__(self, network: DigitsCNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x (n, c, h, w)` in [0, 1] to logits `(n, k)` and features `(n, d)`."""
        features = self.network.features(x)
        return self.network.head(features), features


@dataclass(frozen=True, kw_only=True)
class TowardsFeatures(GuidedPurifier):
    """Guided by the label and by the features that a guide finds in the input.

    Attributes:
        guide: pixels in [0, 1] to logits `(n, k)` and features `(n, d)`.
        label_scale: s·a; 0 leaves the label out.
        distance_scale: s·b, for a distance summed over features; 0 leaves it out.
        temperature: 0 for the defense; above it the label becomes softmax(logits/temperature), for gradients alone.
    """

    guide: nn.Module
    label_scale: float
    distance_scale: float
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("label_scale", self.label_scale)
        check_scale("distance_scale", self.distance_scale)

    @property
    def network_calls(self) -> int:
        """The guide on the input; the denoiser in every step, and the guide in all but each round's last."""
        return 1 + self.rounds * (2 * self.steps - 1)

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """The label as weights `(n, k)`, and the features `(n, d)`."""
        logits, features = self.guide(x)
        return label_weights(logits, self.temperature), features

    def mean(
        self, z: Tensor, kept: tuple[Tensor, ...], x: Tensor, sigma: float, lower: float, noise: Noise
    ) -> tuple[Tensor, float]:
        """See `GuidedPurifier.mean`. The last step has no variance, and so no guidance."""
        weights, features = kept
        mean, variance = posterior(z, self.denoiser.denoise(z, sigma), sigma, lower)
        if variance == 0:
            return mean, variance

        def agreement(point: Tensor) -> Tensor:
            logits, found = self.guide(decode(point))
            distance: Tensor = (found - features).square().sum(1)
            return self.label_scale * label_log_probability(logits, weights) - self.distance_scale * distance

        return mean + variance * inner_gradient(agreement, z), variance


CARD = Card(
    name="robust_guidance",
    title="Robust guidance",
    summary=f"Diffuses the image to t* = {LEVEL} of 1000 and takes {STEPS} steps back, guided by the label and the "
    "features that an adversarially trained network finds in the input; then classifies with the undefended network.",
    source="Lin et al., Adversarial Guided Diffusion Models for Adversarial Purification, Neural Networks 2025",
    url="https://arxiv.org/abs/2403.16067",
    reconstruction=True,
    choices=(
        "rebuilt from the abstract; the two terms have scales of their own",
        f"scales {LABEL_SCALE:g} and {DISTANCE_SCALE:g}, the distance summed over 1024 penultimate features",
        "the guide: the digits CNN, trained by TRADES (linf 1/5) on images with noise of up to .3 in pixels",
        f"t* = {LEVEL} instead of 70: 8x8 digits need more noise; {STEPS} ancestral steps on a respaced grid, "
        "whose larger variances pull more, and whose last step has none",
        "log p and the features are taken of z decoded to pixels, without scaling to the variance-preserving x_t",
        "the final classifier is the undefended one; another can be given",
        f"relaxed: the guide's label becomes softmax(logits/{TEMPERATURE:g})",
    ),
    traits=Traits(stochastic=True, purifies=True, iterative=True, inner_gradient=True),
    handles=("stages", "chain", "surrogate", "relaxed", "components"),
    datasets=("digits",),
    weights=packaged(DENOISER, CLASSIFIER, GUIDE),
    # The guide on the input, the denoiser in each step, the guide in each but the last, the classifier.
    network_calls=2 * STEPS + 1,
    gradient_calls=2 * (2 * STEPS + 1),
)


class RobustGuidance(DiffPure):
    """Purification guided by an adversarially trained network, before a classifier of any kind."""

    purifier: TowardsFeatures

    def __init__(self, purifier: TowardsFeatures, classifier: nn.Module, n_classes: int, card: Card = CARD) -> None:
        super().__init__(purifier, classifier, n_classes, card)
        self.guide = purifier.guide

    def relaxed(self) -> Chain:
        """The same process with softmax(logits/`TEMPERATURE`) of the guide instead of its label."""
        return self.before_classifier(replace(self.purifier, temperature=TEMPERATURE).chain())

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`classifier`, without the purifier, and `guide`."""
        return {**super().components(), "guide": lambda x, noise: self.guide(x)[0]}


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight files that `load(dataset)` reads."""
    return {**diffpure.weight_files(dataset), GUIDE: WEIGHTS / GUIDE}


def load(
    dataset: str,
    *,
    level: int = LEVEL,
    steps: int = STEPS,
    label_scale: float = LABEL_SCALE,
    distance_scale: float = DISTANCE_SCALE,
) -> RobustGuidance:
    """Robust guidance before the undefended classifier.

    Args:
        dataset: digits, the only one with a guide.
        level: t*, in levels of the linear schedule.
        steps: reverse steps; the last one is not guided.
        label_scale: s·a; 0 leaves the label out.
        distance_scale: s·b; 0 leaves the distance out.

    Raises:
        InputError: for a number outside its range.
    """
    denoiser, network = UNetDenoiser(small_unet()), DigitsCNN()
    load_packaged(denoiser, DENOISER)
    load_packaged(network, GUIDE)
    purifier = TowardsFeatures(
        denoiser, level, steps, guide=Guide(network), label_scale=label_scale, distance_scale=distance_scale
    )
    process = purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    if (level, steps, label_scale, distance_scale) != (LEVEL, STEPS, LABEL_SCALE, DISTANCE_SCALE):
        summary = (
            f"Diffuses the image to t* = {level} of 1000 and takes {counted(steps, 'step')} back, each but the last "
            "guided by the label and the features that an adversarially trained network finds in the input; then "
            "classifies with the undefended network."
        )
        choices = (
            CARD.choices[0],
            f"scales {label_scale:g} and {distance_scale:g}, the distance summed over 1024 penultimate features",
            CARD.choices[2],
            f"t* = {level}; {counted(steps, 'ancestral step')} on a respaced grid, the last of which has no variance",
            *CARD.choices[4:6],
        )
        # A single step is the last one: there is no guidance then.
        guided = with_traits(with_purifier(CARD, process), inner_gradient=steps > 1)
        card = guided.model_copy(update={"summary": summary, "choices": choices})
        if steps > 1 and label_scale > 0:
            card = card.model_copy(update={"choices": (*choices, CARD.choices[6])})
        else:
            card = without_handle(card, "relaxed")  # the label does nothing, soft or not
    return RobustGuidance(purifier, load_network(dataset), describe(dataset).n_classes, card)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
