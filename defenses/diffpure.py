"""DiffPure (Nie et al. 2022, arXiv 2205.07460): diffuse the image to a level t*, denoise it back, classify.

On digits: a small class-unconditional U-Net under the linear DDPM schedule, T = 1000, ancestral
steps on a respaced grid, and the undefended classifier, which never saw a purified image. The
purified image is not clipped before the classifier, so it may leave [0, 1] by a few hundredths: a
clip would end the gradient of every saturated pixel, of which digits have many. Level and steps
were chosen on training images, which the weights have seen too, never on a board's.

On cifar10: the class-conditional model of `conditional`, told no class, where its weights are packaged; the
paper's t* there are 100 (linf) and 75 (l2). With the option `denoiser` it runs on what a user brings, on digits or
cifar10. A Gaussian denoiser gives the same process in its variance-exploding form; its levels are those of the
linear schedule.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from assay.card import Card, Traits
from assay.data import describe
from assay.defenses.behind import behind_files, take_classifier
from assay.defenses.checkpoints import packaged
from assay.defenses.conditional import cifar10_files
from assay.defenses.purified import IteratedPurification
from assay.defenses.purifier import ImagePurifier, Purifier
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.variants import ON_UNET, counted, unet_files, unet_or_taken, with_files, with_purifier
from assay.foreign import OpenSpec

DENOISER = "digits/denoiser.safetensors"
LEVEL = 150
STEPS = 10

CARD = Card(
    name="diffpure",
    title="DiffPure",
    summary="Diffuses the image to t* = 150 of 1000, takes 10 ancestral steps back, then classifies.",
    source="Nie et al., Diffusion Models for Adversarial Purification, ICML 2022",
    url="https://arxiv.org/abs/2205.07460",
    choices=(
        "DDPM ancestral sampling on a respaced grid instead of the paper's reverse SDE solver",
        "t* = 150 for both norms: 8x8 digits need more noise than the paper's .1 and .075",
    ),
    traits=Traits(stochastic=True, purifies=True, iterative=True),
    handles=("stages", "chain", "surrogate", "components"),
    datasets=ON_UNET,
    weights=packaged(DENOISER, CLASSIFIER, *cifar10_files()),
    # One call of the denoiser a step, and one of the classifier.
    network_calls=STEPS + 1,
    # The chain runs every part again in its backward pass.
    gradient_calls=2 * (STEPS + 1),
)


class DiffPure(IteratedPurification):
    """Diffusion purification before a classifier; the guided purifiers are this with another `purifier`.

    Args:
        purifier: the process that cleans images.
        classifier: images to logits.
        n_classes: k.
        card: another card than the registry's, for another process.
    """

    def __init__(self, purifier: ImagePurifier, classifier: nn.Module, n_classes: int, card: Card = CARD) -> None:
        super().__init__(purifier, classifier, n_classes, card)


def weight_files(dataset: str, *, denoiser: str = "", classifier: str = "") -> dict[str, Path]:
    """The weight files that `load` reads."""
    return {**unet_files(denoiser, dataset, DENOISER), **behind_files(classifier, dataset)}


def load(dataset: str, *, denoiser: str = "", classifier: str = "", level: int = LEVEL, steps: int = STEPS) -> DiffPure:
    """DiffPure before a classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: see `assay.defenses.denoiser_sources`; empty for the packaged one.
        classifier: see `assay.defenses.behind`; empty for the undefended one.
        level: t*, in levels of the denoiser's schedule.
        steps: reverse steps.

    Raises:
        InputError: for a denoiser or classifier that can't be used, or a level or number of steps outside its range.
    """
    purifier = Purifier(unet_or_taken(denoiser, dataset, DENOISER), level, steps)
    process = purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    if dataset != "digits" or denoiser or classifier or (level, steps) != (LEVEL, STEPS):
        taken = counted(steps, "ancestral step")
        card = with_files(
            with_purifier(CARD, process),
            weight_files(dataset, denoiser=denoiser, classifier=classifier),
            summary=f"Diffuses the image to t* = {level}, takes {taken} back, then classifies.",
            choices=CARD.choices[:1],
        )
    return DiffPure(purifier, take_classifier(classifier, dataset), describe(dataset).n_classes, card)


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser", "classifier"))
