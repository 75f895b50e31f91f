"""Variational randomized smoothing (Hase et al. 2024, arXiv 2407.11844): every image gets a noise level of its own.

A selector network reads the image and a target level and answers with a log-normal q(σ | x); it was
trained together with the classifier (`fitting_variational`), with a KL term that ties q to the
target. At test time, with probes x + τ·η_j,

    σ̄(x) = clip(median_j median of q(σ | x + τ·η_j), σ_min, σ_max),

and the answer is the majority of votes of `f(x + σ̄(x)·ε_i)`. The target is an input: one training
serves all. All levels are standard deviations in pixel units. Our reconstruction from the abstract.

Two noises. All votes of one answer share one σ̄, drawn once: a certificate speaks of Gaussian noise
of a single level, and votes at several levels would be draws of a mixture of Gaussians. A single
`draw`, which attacks average over, draws the probes afresh along with ε, so that expectation over
draws runs over both noises. Gradients go to x through the median (to the probe that is the median,
with none past the clip) as well as through the noised image; the component `frozen` is the control
without the first path, and `relaxed` softens median and clip.

The selector trained on digits does depend on its input: on 200 training images at the target .5,
σ̄ has the median .27 and 90 % of the images lie between .24 and .31. The gradient through it is the
smaller part: without it, a draw's gradient changes by a tenth of its norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.card import Card, Traits, Votes
from assay.chain import Chain, State
from assay.data import describe
from assay.defense import Defense, DefenseSpec, aggregate
from assay.defenses.checkpoints import WEIGHTS, load_packaged, packaged
from assay.defenses.schedule import column
from assay.defenses.selector import NoiseSelector, VariationalNet
from assay.defenses.variants import with_files, with_votes
from assay.errors import InputError
from assay.noise import Noise

DIGITS = "digits/variational_smoothing.safetensors"
TARGET = 0.5
"""The target level that the selector is told, in pixel units. It settles near half of it."""
PROBE = 0.1
"""τ, in training (see `recipes`) and at test time, in pixel units."""
PROBES = 7
VOTES = 64
BOUNDS = (0.15, 0.4)
"""σ_min and σ_max in pixel units: wider than what clean images get."""
TEMPERATURE = 0.02
"""Of the relaxed chain, in units of ln σ: about the spread of ln σ over an image's probes."""

CARD = Card(
    name="variational_smoothing",
    title="Variational smoothing (target .5)",
    summary="A selector gives each image its own noise level; a jointly trained CNN answers by a majority of votes.",
    source="Hase et al., Variational Randomized Smoothing for Sample-Wise Adversarial Robustness, 2024",
    url="https://arxiv.org/abs/2407.11844",
    reconstruction=True,
    choices=(
        "q(σ|x) is log-normal; the KL term is to a log-normal around the target with .5 for the width of ln σ",
        "the selector sees x + .1 η in training as at test time, one σ and two noises an image",
        "the target is log-uniform in [.1, 1] for each training image; .5 at test time gives σ of about .27",
        "σ is the median of 7 probes, clipped to [.15, .4]; all votes of an answer share it",
    ),
    traits=Traits(stochastic=True, non_differentiable=True),
    handles=("chain", "relaxed", "components", "votes"),
    votes=Votes(draws=VOTES, how="majority"),
    datasets=("digits",),
    weights=packaged(DIGITS),
    # One call of the selector a probe, and one of the classifier.
    network_calls=PROBES + 1,
    gradient_calls=PROBES + 1,
)


def soft_median(values: Tensor, temperature: float) -> Tensor:
    """A mean of `values (n, m)` that weighs those in the middle: `(n,)`, the median as the temperature falls to 0.

    The median is the value with the least sum of distances to the others (m odd); here each has
    the weight softmax(−sum of distances / temperature). With a high temperature it is the mean.
    """
    distances = (values[:, :, None] - values[:, None]).abs().sum(2)
    return ((-distances / temperature).softmax(1) * values).sum(1)


def soft_clip(values: Tensor, low: float, high: float, temperature: float) -> Tensor:
    """A smooth clip to [low, high] that has a gradient everywhere; the clip itself as the temperature falls to 0."""
    beta = 1 / temperature
    return low + F.softplus(values - low, beta) - F.softplus(values - high, beta)


class VariationalSmoothing(Defense):
    """A classifier under Gaussian noise whose level a selector chooses for each image.

    Args:
        selector: q(σ | x).
        classifier: images to logits, trained with it.
        n_classes: k.
        target: the level that the selector is told, in pixel units.
        probe: τ, in pixel units; `probes` how many, odd.
        bounds: σ_min and σ_max, in pixel units.
        temperature: of the relaxed chain, in units of ln σ.
        card: another card than the registry's, for another number of votes.

    Raises:
        InputError: for an even number of probes, which has no single median, a target that isn't positive, or
            bounds out of order.
    """

    def __init__(
        self,
        selector: NoiseSelector,
        classifier: nn.Module,
        n_classes: int,
        target: float = TARGET,
        probe: float = PROBE,
        probes: int = PROBES,
        bounds: tuple[float, float] = BOUNDS,
        temperature: float = TEMPERATURE,
        card: Card = CARD,
    ) -> None:
        super().__init__()
        if probes < 1 or probes % 2 == 0:
            raise InputError(f"the median needs an odd number of probes, got {probes}.")
        if target <= 0:
            raise InputError(f"the target level must be positive, got {target}.")
        if not 0 < bounds[0] <= bounds[1]:
            raise InputError(f"the noise's bounds must be positive and in order, got {bounds}.")
        self.card = card
        self.n_classes = n_classes
        self.selector = selector
        self.classifier = classifier
        self.target = target
        self.probe = probe
        self.probes = probes
        self.bounds = bounds
        self.temperature = temperature

    def choices(self, x: Tensor, noise: Noise) -> Tensor:
        """ln σ for each of an image's probes, `(n, probes)`."""
        z = noise.normal("probe", shape=(self.probes, *x.shape[1:]), like=x)
        means: Tensor = self.selector((x[:, None] + self.probe * z).flatten(0, 1), self.target)[0]
        return means.reshape(len(x), self.probes)

    def level(self, x: Tensor, noise: Noise) -> Tensor:
        """σ̄, `(n,)` in pixel units."""
        return self.choices(x, noise).median(1).values.exp().clamp(*self.bounds)

    def soft_level(self, x: Tensor, noise: Noise) -> Tensor:
        """σ̄ with median and clip softened, `(n,)`."""
        middle = soft_median(self.choices(x, noise), self.temperature)
        low, high = (math.log(bound) for bound in self.bounds)
        return soft_clip(middle, low, high, self.temperature).exp()

    def add_noise(self, sigma: State, x: Tensor, noise: Noise) -> Tensor:
        """`x + σ̄·ε`, not clipped."""
        assert isinstance(sigma, Tensor)
        return x + column(sigma, x) * noise.normal("z", shape=x.shape[1:], like=x)

    def classify(self, state: State, x: Tensor, noise: Noise) -> Tensor:
        """The classifier's logits `(n, k)` of noised pixels."""
        logits: Tensor = self.classifier(state)
        return logits

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits `(n, k)` of one noised image, whose level comes from probes of this draw's own: the chain itself."""
        # Three short parts: to run them again in the backward pass would save no memory worth a second call.
        return self.chain()(x, noise, mode="full")

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        """The answer, log vote shares `(n, k)`; its votes share one σ̄ an image."""
        votes = self.card.votes
        if votes.draws == 1:
            return self.draw(x, noise)
        sigma = self.level(x, noise.child("start")).repeat_interleave(votes.draws, 0)
        rows = x.repeat_interleave(votes.draws, 0)
        logits = self.classifier(self.add_noise(sigma, rows, noise.draws(votes.draws)))
        return aggregate(logits.unflatten(0, (len(x), votes.draws)), votes)

    def chain(self) -> Chain:
        """The level, the noise, the classifier; the state is σ̄ and then the noised image."""
        return Chain(self.level, [self.add_noise], self.classify, network_calls=self.probes + 1)

    def relaxed(self) -> Chain:
        """The same with a soft median and a soft clip."""
        return Chain(self.soft_level, [self.add_noise], self.classify, network_calls=self.probes + 1)

    def _frozen(self, x: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            sigma = self.level(x, noise.child("start"))
        noised = self.add_noise(sigma, x, noise.child("step", 0))
        return self.classify(noised, x, noise)

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`frozen`: a draw with no gradient through the selector; `base`: the classifier without noise."""
        return {"frozen": self._frozen, "base": lambda x, noise: self.classify(x, x, noise)}


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load(dataset)` reads."""
    return {DIGITS: WEIGHTS / DIGITS}


def load(
    dataset: str, *, target: float = TARGET, tau: float = PROBE, probes: int = PROBES, votes: int = VOTES
) -> VariationalSmoothing:
    """The smoothed classifier and its selector.

    Args:
        dataset: digits.
        target: the level that the selector is told, in pixel units; it was trained on .1 to 1.
        tau: the selector's noise, in pixel units.
        probes: over how many of them the median is taken; odd.
        votes: draws of the majority.

    Raises:
        InputError: for a target that isn't positive, an even number of probes, or no votes.
    """
    network = VariationalNet()
    load_packaged(network, DIGITS)
    card = CARD
    if (target, tau, probes, votes) != (TARGET, PROBE, PROBES, VOTES):
        choices = (*CARD.choices[:2], f"target {target:g}, σ the median of {probes} probes under noise of {tau:g}")
        changes = {"title": "Variational smoothing", "network_calls": probes + 1, "gradient_calls": probes + 1}
        card = with_files(with_votes(CARD, votes), weight_files(dataset), choices=choices, **changes)
    n_classes = describe(dataset).n_classes
    return VariationalSmoothing(network.selector, network.classifier, n_classes, target, tau, probes, card=card)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
