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
from assay.defenses import diffpure
from assay.defenses.behind import take_classifier
from assay.defenses.checkpoints import data_sets, packaged
from assay.defenses.denoiser import decode
from assay.defenses.diffpure import DENOISER, DiffPure
from assay.defenses.guidance import TEMPERATURE, GuidedPurifier, label_log_probability, label_weights
from assay.defenses.guide import CIFAR10 as CIFAR10_GUIDE
from assay.defenses.guide import DIGITS as GUIDE
from assay.defenses.guide import Guide, guide_files, take_guide
from assay.defenses.purifier import posterior
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.variants import (
    ON_UNET,
    check_scale,
    counted,
    unet_or_taken,
    with_files,
    with_purifier,
    with_traits,
    without_handle,
)
from assay.foreign import OpenSpec
from assay.noise import Noise

LEVEL = 150
STEPS = 5
LABEL_SCALE = 20.0
DISTANCE_SCALE = 1.0


@dataclass(frozen=True, kw_only=True)
class TowardsFeatures(GuidedPurifier):
    """Guided by the label and by the features that a guide finds in the input.

    Attributes:
        guide: pixels in [0, 1] to logits `(n, k)` and features `(n, d)`.
        label_scale: s·a; 0 leaves the label out.
        distance_scale: s·b, for a distance summed over features; 0 leaves it out.
        temperature: 0 for the defense; above it the label becomes softmax(logits/temperature), for gradients alone.
    """

    guide: Guide
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
    datasets=tuple(name for name in data_sets(GUIDE, CIFAR10_GUIDE) if name in ON_UNET),
    weights=packaged(DENOISER, CLASSIFIER, GUIDE),
    # The guide on the input, the denoiser in each step, the guide in each but the last, the classifier.
    network_calls=2 * STEPS + 1,
    gradient_calls=2 * (2 * STEPS + 1),
)


class RobustGuidance(DiffPure):
    """Purification guided by an adversarially trained network, before a classifier of any kind."""

    purifier: TowardsFeatures
    guide: Guide

    def __init__(self, purifier: TowardsFeatures, classifier: nn.Module, n_classes: int, card: Card = CARD) -> None:
        super().__init__(purifier, classifier, n_classes, card)
        self.guide = purifier.guide

    def relaxed(self) -> Chain:
        """The same process with softmax(logits/`TEMPERATURE`) of the guide instead of its label."""
        return self.before_classifier(replace(self.purifier, temperature=TEMPERATURE).chain())

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`classifier`, without the purifier, and `guide`."""
        return {**super().components(), "guide": lambda x, noise: self.guide(x)[0]}


def weight_files(dataset: str, *, denoiser: str = "", classifier: str = "", guide: str = "") -> dict[str, Path]:
    """The weight files that `load` reads."""
    behind = diffpure.weight_files(dataset, denoiser=denoiser, classifier=classifier)
    return {**behind, **guide_files(guide, dataset)}


def load(
    dataset: str,
    *,
    denoiser: str = "",
    classifier: str = "",
    guide: str = "",
    level: int = LEVEL,
    steps: int = STEPS,
    label_scale: float = LABEL_SCALE,
    distance_scale: float = DISTANCE_SCALE,
) -> RobustGuidance:
    """Robust guidance before a classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser` and a `guide`.
        denoiser: see `assay.defenses.denoiser_sources`; empty for the packaged one.
        classifier: see `assay.defenses.behind`; empty for the undefended one.
        guide: a classifier likewise, one that ends in a linear layer; empty for the packaged one.
        level: t*, in levels of the denoiser's schedule.
        steps: reverse steps; the last one is not guided.
        label_scale: s·a; 0 leaves the label out.
        distance_scale: s·b, for a distance summed over the guide's features; 0 leaves the distance out.

    Raises:
        InputError: for a denoiser, a classifier or a guide that can't be used, or a number outside its range.
    """
    c_phi = take_guide(guide, dataset)
    network = unet_or_taken(denoiser, dataset, DENOISER)
    purifier = TowardsFeatures(
        network, level, steps, guide=c_phi, label_scale=label_scale, distance_scale=distance_scale
    )
    purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    options = (level, steps, label_scale, distance_scale)
    if dataset != "digits" or denoiser or classifier or guide or options != (LEVEL, STEPS, LABEL_SCALE, DISTANCE_SCALE):
        files = weight_files(dataset, denoiser=denoiser, classifier=classifier, guide=guide)
        card = with_files(_described(purifier, _told(guide, dataset)), files)
    return RobustGuidance(purifier, take_classifier(classifier, dataset), describe(dataset).n_classes, card)


def _told(guide: str, dataset: str) -> str:
    """What the card says of the guide."""
    if guide:
        return "the guide is another classifier, which the option `guide` names"
    if dataset == "cifar10":
        return "the guide: a ResNet-18, trained by TRADES (linf 8/255) on images with noise of up to .3 in pixels"
    return CARD.choices[2]


def _described(purifier: TowardsFeatures, guide: str) -> Card:
    """The card of another guidance."""
    level, steps, features = purifier.level, purifier.steps, purifier.guide.head.in_features
    summary = (
        f"Diffuses the image to t* = {level} of 1000 and takes {counted(steps, 'step')} back, each but the last guided "
        "by the label and the features that its guide finds in the input; then classifies."
    )
    choices = (
        CARD.choices[0],
        f"scales {purifier.label_scale:g} and {purifier.distance_scale:g}, the distance summed over {features} "
        "penultimate features",
        guide,
        f"t* = {level}; {counted(steps, 'ancestral step')} on a respaced grid, the last of which has no variance",
        CARD.choices[4],
    )
    # A single step is the last one: there is no guidance then.
    card = with_traits(with_purifier(CARD, purifier.chain()), inner_gradient=steps > 1)
    if steps > 1 and purifier.label_scale > 0:
        return card.model_copy(update={"summary": summary, "choices": (*choices, CARD.choices[6])})
    # The label does nothing, soft or not.
    return without_handle(card.model_copy(update={"summary": summary, "choices": choices}), "relaxed")


SPEC = OpenSpec(
    CARD,
    load,
    Path(__file__),
    weight_files,
    needs=("denoiser", "guide"),
    code=("denoiser", "classifier", "guide"),
)
