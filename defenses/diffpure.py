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
from assay.defense import DefenseSpec
from assay.defenses.checkpoints import WEIGHTS, packaged
from assay.defenses.conditional import cifar10_denoiser, cifar10_files
from assay.defenses.denoiser_sources import denoiser_files
from assay.defenses.purified import IteratedPurification
from assay.defenses.purifier import ImagePurifier, Purifier
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.undefended import load_network
from assay.defenses.undefended import weight_files as classifier_files
from assay.defenses.variants import counted, unet_or_taken, with_files, with_purifier

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
    datasets=("digits", "cifar10") if cifar10_files() else ("digits",),
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


def weight_files(dataset: str, *, denoiser: str = "") -> dict[str, Path]:
    """The weight files that `load` reads."""
    if denoiser:
        files = denoiser_files(denoiser)
    else:
        files = cifar10_files() if dataset == "cifar10" else {DENOISER: WEIGHTS / DENOISER}
    return {**files, **classifier_files(dataset)}


def load(dataset: str, *, denoiser: str = "", level: int = LEVEL, steps: int = STEPS) -> DiffPure:
    """DiffPure before the undefended classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: see `assay.defenses.denoiser_sources`; empty for the packaged one.
        level: t*, in levels of the denoiser's schedule.
        steps: reverse steps.

    Raises:
        InputError: for a denoiser that can't be used, or a level or number of steps outside its range.
    """
    trained = dataset == "cifar10" and not denoiser
    network = cifar10_denoiser() if trained else unet_or_taken(denoiser, dataset, DENOISER)
    purifier = Purifier(network, level, steps)
    process = purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    if denoiser or trained or (level, steps) != (LEVEL, STEPS):
        taken = counted(steps, "ancestral step")
        card = with_files(
            with_purifier(CARD, process),
            weight_files(dataset, denoiser=denoiser),
            summary=f"Diffuses the image to t* = {level}, takes {taken} back, then classifies.",
            choices=CARD.choices[:1],
        )
    return DiffPure(purifier, load_network(dataset), describe(dataset).n_classes, card)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",))
