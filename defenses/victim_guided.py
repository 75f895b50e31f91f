"""Distribution transfer with victim guidance, after Chen, Yan & Dong (arXiv 2311.13841), rebuilt from its abstract.

The input is diffused to a level t*, and the reverse process is guided by the protected classifier f,
the victim, towards a label ŷ. In `x = x_0 + σ·ε` form every step predicts

    x̃_0 = D(z, σ) + s·σ²·∇_z log p_f(ŷ | ·),

which is `ε̃ = ε − s·√(1−ᾱ_t)·∇_{x_t} log p_f(ŷ | ·)`, and takes an ancestral step; f then classifies. Which ŷ and
where f is evaluated the abstract does not say; both are options here. The default was chosen by clean
accuracy, and by accuracy under a short exact attack, on training images, which the weights have seen too. With
the option `denoiser` it runs on what a user brings, on digits or cifar10.

The packaged victim is smooth. The gradient of a victim of ReLUs jumps wherever one of them turns on, and with it the
process: a card with such a victim declares that it is not differentiable, which makes further attacks mandatory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from assay.card import Card, Traits
from assay.chain import Chain, inner_gradient
from assay.data import describe
from assay.defenses.behind import take_classifier
from assay.defenses.checkpoints import packaged
from assay.defenses.denoiser import decode
from assay.defenses.diffpure import DENOISER, DiffPure, weight_files
from assay.defenses.guidance import (
    TEMPERATURE,
    GuidedPurifier,
    gradient_through,
    has_kinks,
    label_log_probability,
    label_weights,
)
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
from assay.errors import InputError
from assay.foreign import OpenSpec
from assay.noise import Noise

LabelOf = Literal["hard", "soft", "x0"]
Where = Literal["x_t", "x0hat"]

LEVEL = 120
STEPS = 3
SCALE = 1.0
TARGET: LabelOf = "x0"
AT: Where = "x0hat"


@dataclass(frozen=True, kw_only=True)
class TowardsLabel(GuidedPurifier):
    """Guided by the victim's log-probability of a label.

    Attributes:
        victim: pixels in [0, 1] to logits `(n, k)`.
        scale: s; 0 is plain purification.
        target: `"hard"`, the victim's label on the input; `"soft"`, all its probabilities on the input
            (the gradient is that of −KL(p_f(·|x) ‖ p_f)); `"x0"`, at every step its label on the
            predicted image D(z, σ).
        at: where log p is taken: `"x_t"`, at z itself; `"x0hat"`, at D(z, σ), so that its gradient goes
            through the denoiser.
        temperature: 0 for the defense; above it labels become softmax(logits/temperature), for gradients alone.
    """

    victim: nn.Module
    scale: float
    target: LabelOf
    at: Where
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in get_args(LabelOf) or self.at not in get_args(Where):
            raise InputError(
                f"target must be one of {', '.join(get_args(LabelOf))} and at one of {', '.join(get_args(Where))}, "
                f"got {self.target!r} and {self.at!r}."
            )
        check_scale("scale", self.scale)

    @property
    def network_calls(self) -> int:
        """The victim once on the input for its label, then a denoiser and a victim a step, or two victims."""
        labels = 1 if self.target != "x0" else self.rounds * self.steps * (self.at == "x_t")
        return self.rounds * self.steps * 2 + labels

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """The label on the input as weights `(n, k)`, unless each step chooses its own."""
        if self.target == "x0":
            return ()
        return (label_weights(self.victim(x), 1.0 if self.target == "soft" else self.temperature),)

    def mean(
        self, z: Tensor, kept: tuple[Tensor, ...], x: Tensor, sigma: float, lower: float, noise: Noise
    ) -> tuple[Tensor, float]:
        """See `GuidedPurifier.mean`."""
        x_0, gradient = self.predict(z, kept, sigma)
        return posterior(z, x_0 + self.scale * sigma**2 * gradient, sigma, lower)

    def predict(self, z: Tensor, kept: tuple[Tensor, ...], sigma: float) -> tuple[Tensor, Tensor]:
        """D(z, σ), and ∇_z log p of the label."""
        if self.at == "x0hat":
            return gradient_through(
                lambda point: self.denoiser.denoise(point, sigma),
                lambda x_0: self.log_p(self.victim(decode(x_0)), *kept),
                z,
            )
        x_0 = self.denoiser.denoise(z, sigma)
        weights = kept[0] if kept else label_weights(self.victim(decode(x_0)), self.temperature)
        return x_0, inner_gradient(lambda point: label_log_probability(self.victim(decode(point)), weights), z)

    def guide(self, z: Tensor) -> Tensor:
        """The victim's logits whose gradient with respect to `z` guides the first step."""
        at = z if self.at == "x_t" else self.denoiser.denoise(z, self.sigmas[0])
        logits: Tensor = self.victim(decode(at))
        return logits

    def log_p(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        """The label's log-probability `(n,)`; without weights, that of the logits' own label, the largest.

        Its soft form T·log Σ_j p_j^{1/T} has the gradient Σ_j w_j ∇ log p_j with w = softmax(logits/T).
        """
        if weights is not None:
            return label_log_probability(logits, weights)
        log_p = logits.log_softmax(1)
        if self.temperature > 0:
            return self.temperature * (log_p / self.temperature).logsumexp(1)
        return log_p.amax(1)


CARD = Card(
    name="victim_guided",
    title="Victim guidance",
    summary=f"Diffuses the image to t* = {LEVEL} of 1000 and takes {STEPS} steps back, each guided towards the label "
    "that the classifier itself gives to the image predicted at that step; then classifies.",
    source="Chen, Yan & Dong, Adversarial Defense Based on Distribution Transfer, 2023",
    url="https://arxiv.org/abs/2311.13841",
    reconstruction=True,
    choices=(
        "rebuilt from the abstract, which names neither the label, nor where it is evaluated, nor a scale or sampler",
        "the label is the victim's on the predicted image, taken anew at every step, and log p is taken there too: the "
        "label of the input itself, put in its place, makes purification follow the attack (20 training images, the "
        "best of several short attacks: 1 % of draws right, against 19 % with this one)",
        f"s = {SCALE:g}, t* = {LEVEL}, one round of {STEPS} ancestral steps on a respaced grid, which leaves s alone",
        "f sees images with σ·ε added, not the variance-preserving x_t, where log p is taken at x_t",
        f"relaxed: labels become softmax(logits/{TEMPERATURE:g})",
    ),
    traits=Traits(stochastic=True, purifies=True, iterative=True, inner_gradient=True),
    handles=("stages", "chain", "surrogate", "relaxed", "components"),
    datasets=ON_UNET,
    weights=packaged(DENOISER, CLASSIFIER),
    # The denoiser and the victim in each step, and the victim at the end.
    network_calls=2 * STEPS + 1,
    gradient_calls=2 * (2 * STEPS + 1),
)


class VictimGuided(DiffPure):
    """Purification guided by the classifier that it protects."""

    purifier: TowardsLabel

    def relaxed(self) -> Chain:
        """The same process towards softmax(logits/`TEMPERATURE`) instead of a hard label."""
        return self.before_classifier(replace(self.purifier, temperature=TEMPERATURE).chain())


def load(
    dataset: str,
    *,
    denoiser: str = "",
    classifier: str = "",
    level: int = LEVEL,
    steps: int = STEPS,
    rounds: int = 1,
    scale: float = SCALE,
    target: LabelOf = TARGET,
    at: Where = AT,
) -> VictimGuided:
    """Victim guidance before, and by, a classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: see `assay.defenses.denoiser_sources`; empty for the packaged one.
        classifier: the victim, see `assay.defenses.behind`; empty for the undefended one.
        level: t*, in levels of the denoiser's schedule.
        steps: reverse steps of a round.
        rounds: times that the image is diffused and denoised.
        scale, target, at: see `TowardsLabel`.

    Raises:
        InputError: for a denoiser or classifier that can't be used, or a number or a name outside its range.
    """
    network, victim = unet_or_taken(denoiser, dataset, DENOISER), take_classifier(classifier, dataset)
    purifier = TowardsLabel(network, level, steps, rounds, victim=victim, scale=scale, target=target, at=at)
    purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    options = (level, steps, rounds, scale, target, at)
    if dataset != "digits" or denoiser or classifier or options != (LEVEL, STEPS, 1, SCALE, TARGET, AT):
        files = weight_files(dataset, denoiser=denoiser, classifier=classifier)
        jumps = scale > 0 and has_kinks(purifier.guide, torch.zeros(1, *describe(dataset).shape))
        card = with_traits(with_files(_described(purifier), files), non_differentiable=jumps)
    return VictimGuided(purifier, victim, describe(dataset).n_classes, card)


def _described(purifier: TowardsLabel) -> Card:
    """The card of another guidance."""
    label = {
        "hard": "the label that the classifier gives to the input",
        "soft": "the probabilities that the classifier gives to the input",
        "x0": "the label that the classifier gives to the image predicted at that step",
    }[purifier.target]
    where = {"x_t": "the noised image", "x0hat": "the predicted image"}[purifier.at]
    taken, times = counted(purifier.steps, "step"), f", {purifier.rounds} times" if purifier.rounds > 1 else ""
    summary = (
        f"Diffuses the image to t* = {purifier.level} and takes {taken} back{times}, each guided towards {label}; "
        "then classifies."
    )
    # Probabilities are no discrete choice: nothing is left to soften. Neither is it without guidance.
    relaxed = purifier.target != "soft" and purifier.scale > 0
    choices = (
        CARD.choices[0],
        f"the label is {label}, and log p is taken of {where}",
        f"s = {purifier.scale:g}, t* = {purifier.level}, {counted(purifier.rounds, 'round')} of "
        f"{counted(purifier.steps, 'ancestral step')} on a respaced grid, which leaves s alone",
        *CARD.choices[3 : 5 if relaxed else 4],
    )
    card = with_purifier(CARD, purifier.chain()).model_copy(update={"summary": summary, "choices": choices})
    return card if relaxed else without_handle(card, "relaxed")


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser", "classifier"))
