"""The diffusion classifier: the class whose conditional denoiser explains the image best.

`logit_y = −Σ_i w_i · E‖D(x + σ_i·ε, σ_i, y) − x‖²` (Chen et al. 2023, arXiv 2305.15241; Li et al. 2023,
arXiv 2303.16203), with EDM's training weights, or with those of the evidence lower
bound: then the logits bound log p(x | y), and their softmax is Bayes' rule under equal priors.

It is attacked as it answers: the forward pass is differentiable through every denoised image. The
released code of the noised variants cuts its graph on the way, so that gradients taken from it are
those of another loss; under attacks without that fault, plain diffusion classifiers on CIFAR-10 fell
to about 5 % (linf 8/255). No number from a cut graph says anything about this defense.

With the option `bound` b the squared error of a pixel saturates at b² (`assay.certificates.diffusion_errors`). That
makes the *expected* sum certifiable: what is certified is the class with the smallest expectation over all noise. The
defense's own answer is one draw of the sum, with its noise, and no draw has a radius. Without `bound` it certifies
nothing, for an error that no draw has shown may be arbitrarily large.

With the option `denoiser` it runs on a class-conditional U-Net that a user brings, on digits or cifar10,
at a network call a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from assay.card import Card, Traits
from assay.certificates.diffusion_errors import ClassErrors
from assay.chain import Chain, State
from assay.data import describe
from assay.defense import Defense
from assay.defenses.checkpoints import load_packaged, packaged
from assay.defenses.class_errors import Comparison, Grid, Level, Sift, Spacing, Weighting, plain_levels
from assay.defenses.conditional import cifar10_denoiser, cifar10_files
from assay.defenses.denoiser import Denoiser, EDMDenoiser, encode
from assay.defenses.denoiser_sources import take_denoiser
from assay.defenses.recipes import digits_heads
from assay.defenses.variants import ON_UNET, counted, unet_files, with_files, with_traits
from assay.errors import InputError
from assay.foreign import OpenSpec
from assay.noise import Noise

DIGITS = "digits/heads.safetensors"
PAPER_GRID = Grid(1e-4, 3.0, 126)
"""The paper's levels, in [−1, 1] units. An image's σ is never 0, so neither is the lowest."""
DIGITS_GRID = Grid(0.3, 3.0, 6, "log")
"""Of 200 training images, .965 are right with these six levels and .985 with 126 from .02 to 3."""
CERTIFICATE = "diffusion_isoperimetric"
"""Of a classifier whose errors are bounded: much the tighter of the two routes."""
EVERY = 4
"""Sift-and-refine's coarse grid: every so many-th level, where it is asked for."""

CARD = Card(
    name="diffusion_classifier",
    title="Diffusion classifier",
    summary="Answers with the class whose conditional denoiser restores the noised image best, over 6 noise levels.",
    source="Chen et al., Robust Classification via a Single Diffusion Model, ICML 2024",
    url="https://arxiv.org/abs/2305.15241",
    choices=(
        "6 noise levels, even in ln σ from .3 to 3, one noise sample each, instead of 126 even in σ",
        "the weights of the evidence lower bound; EDM's training weights are an option",
        "all classes from one call of a network with a head a class",
    ),
    traits=Traits(stochastic=True, iterative=True),
    handles=("chain", "surrogate"),
    datasets=ON_UNET,
    weights=packaged(DIGITS, *cifar10_files()),
    network_calls=6,
    gradient_calls=6,
)


class DiffusionClassifier(Defense):
    """Classes compared by their denoising errors; the noised classifiers are subclasses.

    Args:
        denoiser: one that knows the k classes.
        grid: the noise levels, in [−1, 1] units.
        weighting: `"training"` (EDM's, the paper's choice) or `"elbo"`.
        samples: noise samples a level and draw.
        sift: sift-and-refine, for denoisers where every class costs a call; None compares all on every level.
        rows: the most rows in one network call.
        card: another card than the registry's, for other options.

    Raises:
        InputError: for a denoiser without classes or levels that it was not made for.
    """

    start_calls: ClassVar[int] = 0
    """Network calls before the first level."""
    bound: float = 0.0
    """Where a pixel's error saturates, in [−1, 1] units; 0 for squares."""

    def __init__(
        self,
        denoiser: Denoiser,
        grid: Grid = PAPER_GRID,
        weighting: Weighting = "training",
        *,
        samples: int = 1,
        sift: Sift | None = None,
        rows: int = 512,
        card: Card = CARD,
    ) -> None:
        super().__init__()
        self.card = card
        self.n_classes = denoiser.n_classes
        self.denoiser = denoiser
        self.grid = grid
        self.weighting = weighting
        self.samples = samples
        self.sift = sift
        self.rows = rows
        self.comparison(grid)  # refuses a denoiser or levels that do not fit

    def levels(self, grid: Grid) -> tuple[Level, ...]:
        """What is added up over the levels of a grid."""
        return plain_levels(grid.sigmas, self.weighting)

    def start(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """What noise is added to, and what denoised images are compared with; from pixels to [−1, 1] units."""
        return encode(x), encode(x)

    def comparison(self, grid: Grid) -> Comparison:
        """The process over a grid."""
        return Comparison(self.denoiser, self.levels(grid), self.samples, self.sift, self.rows, self.bound)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits `(n, k)`: what the chain gives, with all levels in one batch."""
        image, target = self.start(x, noise.child("start"))
        return self.comparison(self.grid).everything(image, target, noise)

    def chain(self) -> Chain:
        """One step a noise level; the state holds the errors so far."""
        return self.surrogate(self.grid.levels)

    def surrogate(self, steps: int) -> Chain:
        """The same range of noise in at most `steps` levels.

        Raises:
            InputError: for fewer than one step.
        """
        if steps < 1:
            raise InputError(f"a surrogate takes at least 1 step, got {steps}.")
        comparison = self.comparison(self.grid.shorter(steps))

        def start(x: Tensor, noise: Noise) -> State:
            return comparison.begin(*self.start(x, noise))

        return comparison.chain(start, self.start_calls)


class BoundedClassifier(DiffusionClassifier):
    """Classes compared by errors that saturate: the expected answer has a certificate.

    Args:
        denoiser: see `DiffusionClassifier`.
        bound: b, where a pixel's error saturates, in [−1, 1] units.
        grid, weighting, samples, rows: see there. No class is sifted out: the certificate compares all of them.
        card: another than that of the card's grid with this bound.

    Raises:
        InputError: for a bound that is not positive, and as `DiffusionClassifier` does.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        bound: float,
        grid: Grid = DIGITS_GRID,
        weighting: Weighting = "elbo",
        *,
        samples: int = 1,
        rows: int = 512,
        card: Card | None = None,
    ) -> None:
        if not bound > 0:
            raise InputError(f"bound must be a positive finite number, or 0 for squared errors, got {bound:g}.")
        self.bound = bound
        super().__init__(denoiser, grid, weighting, samples=samples, rows=rows, card=card or certifying(CARD, bound))

    def certified(self) -> ClassErrors:
        """The expected errors of all classes."""
        sigmas = self.grid.sigmas

        def denoise(noised: Tensor, level: int) -> Tensor:
            return self.denoiser.denoise_each(noised, noised.new_full((len(noised),), sigmas[level]))

        return ClassErrors(sigmas, tuple(level.weight for level in self.levels(self.grid)), self.bound, denoise)


def certifying(card: Card, bound: float) -> Card:
    """The card of a classifier whose errors are bounded."""
    choice = f"a pixel's squared error e² is replaced by {bound:g}²·(1 - exp(-e²/{bound:g}²))"
    handles = (*card.handles, "certified")
    changes = {"handles": handles, "certificate": CERTIFICATE, "choices": (*card.choices, choice)}
    return with_traits(card.model_copy(update=changes), certifies=True)


def weight_files(dataset: str, *, denoiser: str = "") -> dict[str, Path]:
    """The weight files that `load` reads."""
    return unet_files(denoiser, dataset, DIGITS)


def load_denoiser(dataset: str, source: str = "") -> Denoiser:
    """The class-conditional denoiser of a data set.

    Args:
        source: see `assay.defenses.denoiser_sources`; empty for the packaged one.

    Raises:
        InputError: for a source that can't be used, or that doesn't know the data set's classes.
    """
    n_classes = describe(dataset).n_classes
    if source:
        return take_denoiser(source, dataset, n_classes)
    denoiser: Denoiser
    if dataset == "cifar10":
        denoiser = cifar10_denoiser()
    else:
        denoiser = digits_heads()
        load_packaged(denoiser, DIGITS)
    assert denoiser.n_classes == n_classes
    return denoiser


def sifting(keep: int, every: int) -> Sift | None:
    """Sift-and-refine from options; None where no number of classes is given.

    Raises:
        InputError: for a coarse grid without a number of classes, or one that is the whole grid.
    """
    if not keep and every != EVERY:
        raise InputError(f"every = {every} is the coarse grid of sift-and-refine, which needs keep, the classes kept.")
    if keep and every < 2:
        raise InputError(f"sift-and-refine first takes every 2nd level, or fewer; got every = {every}.")
    return Sift(keep, every) if keep else None


def described(defense: DiffusionClassifier, card: Card, files: Mapping[str, Path], more: Sequence[str] = ()) -> Card:
    """What all diffusion classifiers' cards say of their options.

    Args:
        defense: as it was built.
        card: the registry's, with what is the subclass's own.
        files: the denoiser's, by name.
        more: further choices.
    """
    grid, sift, chain = defense.grid, defense.sift, defense.chain()
    spaced = "ln σ" if grid.spacing == "log" else "σ"
    levels = f"{counted(grid.levels, 'noise level')}, even in {spaced} from {grid.lowest:g} to {grid.highest:g}"
    choices = [
        f"{levels} in [-1, 1] units, {counted(defense.samples, 'noise sample')} each",
        f"the weighting {defense.weighting!r}",
        "all classes from one call of a network with a head a class"
        if isinstance(defense.denoiser, EDMDenoiser)
        else "a network call a class",
    ]
    if sift is not None:
        choices.append(f"sift-and-refine: all classes at one level in {sift.every}, the best {sift.keep} at the others")
    # A draw is one batch, not the chain: its backward pass runs nothing again.
    calls = {"network_calls": chain.network_calls, "gradient_calls": chain.network_calls}
    changed = with_traits(card, iterative=len(chain) > 1)
    return with_files(changed, files, choices=(*choices, *more), **calls)


def load(
    dataset: str,
    *,
    denoiser: str = "",
    weighting: Weighting = "elbo",
    levels: int = DIGITS_GRID.levels,
    lowest: float = DIGITS_GRID.lowest,
    highest: float = DIGITS_GRID.highest,
    spacing: Spacing = DIGITS_GRID.spacing,
    samples: int = 1,
    keep: int = 0,
    every: int = EVERY,
    bound: float = 0.0,
) -> DiffusionClassifier:
    """The diffusion classifier with the card's choices.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: a class-conditional one, see `assay.defenses.denoiser_sources`; empty for the packaged one.
        weighting: training (EDM's, the paper's choice) or elbo.
        levels, lowest, highest, spacing: the grid of noise levels, in [−1, 1] units; spacing is linear or log.
        samples: noise samples a level.
        keep, every: sift-and-refine, see `Sift`; without it where keep is 0.
        bound: where a pixel's error saturates, in [−1, 1] units, which makes the classifier certifiable; 0 for
            squared errors.

    Raises:
        InputError: for a denoiser that can't be used, a number or a name outside its range, or a bound together
            with sift-and-refine, which the certificate doesn't cover.
    """
    if bound and keep:
        raise InputError("bound certifies the errors of all classes, and keep leaves some out; give one of them.")
    grid, sift = Grid(lowest, highest, levels, spacing), sifting(keep, every)
    network = load_denoiser(dataset, denoiser)
    if bound:
        defense: DiffusionClassifier = BoundedClassifier(network, bound, grid, weighting, samples=samples)
    else:
        defense = DiffusionClassifier(network, grid, weighting, samples=samples, sift=sift)
    options = (weighting, grid, samples, sift, bound)
    if dataset != "digits" or denoiser or options != ("elbo", DIGITS_GRID, 1, None, 0.0):
        summary = (
            "Answers with the class whose conditional denoiser restores the noised image best, over "
            f"{counted(levels, 'noise level')}."
        )
        card = described(
            defense, CARD.model_copy(update={"summary": summary}), weight_files(dataset, denoiser=denoiser)
        )
        defense.card = certifying(card, bound) if bound else card
    return defense


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser",))
