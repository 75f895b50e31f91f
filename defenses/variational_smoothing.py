"""Variational randomized smoothing (Hase et al. 2024, arXiv 2407.11844): every image gets a noise level of its own.

A selector network reads the image and a target level and answers with a log-normal q(σ | x); it was
trained together with the classifier (`fitting_variational`), with a KL term that ties q to the
target. At test time the median of q is clipped to [σ_min, σ_max] and rounded, in ln σ, to the nearest of
L levels, evenly spaced in ln σ from σ_min to σ_max; with probes x + τ·η_j,

    σ̄(x) = median_j round(clip(median of q(σ | x + τ·η_j), σ_min, σ_max)),

and the answer is the majority of votes of `f(x + σ̄(x)·ε_i)`. The target is an input: one training
serves all. All levels are standard deviations in pixel units. Our reconstruction from the abstract.

The levels are a fixed finite grid, so that each can be certified, and with them whatever an attacker makes
the selector choose (`assay.certificates.selected_smoothing`). Narrow bounds certify more, because the
least certain level decides: at the default target training images get levels between .23 and .33 before
rounding, and the bounds are .22 and .34. With τ = .1, up to 100,000 probes can't show that any level is out
of reach within 1/4; with τ = .3, 2,000 can, which certifies 97 in place of 92.5 % of 200 training images there.

Two noises. All votes of one answer share one σ̄, drawn once: a certificate speaks of Gaussian noise
of a single level, and votes at several levels would be draws of a mixture of Gaussians. A single
`draw`, which attacks average over, draws the probes afresh along with ε, so that expectation over
draws runs over both noises.

Rounding has no gradient: a draw's goes to x through the noised image alone. `relaxed` softens median and
clip and leaves the rounding out, so that its gradient goes through the selector too. On digits the two are
nearly parallel: over training images the median of their cosines is above .99.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.card import Card, Traits, Votes
from assay.certificates.selected_smoothing import SelectedSmoothing
from assay.chain import Chain, State
from assay.data import describe
from assay.defense import Defense, DefenseSpec, aggregate
from assay.defenses.checkpoints import WEIGHTS, data_sets, load_packaged, packaged, read_manifest, trained
from assay.defenses.networks_cifar10 import SelectedNet
from assay.defenses.schedule import column
from assay.defenses.selector import NoiseSelector, VariationalNet
from assay.defenses.variants import with_files, with_traits, with_votes
from assay.errors import InputError
from assay.noise import Noise

DIGITS = "digits/variational_smoothing.safetensors"
CIFAR10 = "cifar10/selector.safetensors"
TARGET = 0.5
"""The target level that the selector is told, in pixel units. It settles near half of it."""
PROBE = 0.1
"""τ, in training (see `recipes`) and at test time, in pixel units."""
PROBES = 7
VOTES = 64
BOUNDS = (0.22, 0.34)
"""σ_min and σ_max in pixel units on digits: a little wider than what training images get."""
SPREADS = 3
"""On cifar10 the bounds lie so many standard deviations of ln σ, as measured after training, around its median."""
LEVELS = 4
RHO = 1e-3
"""With what probability an answer's level may lie outside the certified set of levels."""
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
        "the selector sees x + .1 η in training, one σ and two noises an image",
        "the target is log-uniform in [.1, 1] for each training image; .5 at test time gives σ of about .27",
        "σ is the median of 7 probes x + .1 η, each rounded to one of 4 levels from .22 to .34, evenly spaced in ln σ",
        "all votes of an answer share one σ",
        "the certificate lets a level lie outside the certified set with probability ρ = .001",
    ),
    traits=Traits(stochastic=True, non_differentiable=True, certifies=True),
    handles=("chain", "relaxed", "components", "votes", "certified"),
    certificate="selected_smoothing",
    votes=Votes(draws=VOTES, how="majority"),
    datasets=data_sets(DIGITS, CIFAR10),
    weights=packaged(*trained(DIGITS, CIFAR10)),
    # One call of the selector a probe, and one of the classifier.
    network_calls=PROBES + 1,
    gradient_calls=PROBES + 1,
)


def level_grid(bounds: tuple[float, float], levels: int) -> tuple[float, ...]:
    """So many levels from σ_min to σ_max, evenly spaced in ln σ; a single one is their geometric mean.

    Raises:
        InputError: for bounds that are not positive or not in order, or fewer than one level.
    """
    low, high = bounds
    if not 0 < low <= high < math.inf or (levels > 1 and low == high):
        raise InputError(f"the noise's bounds must be positive and in order, got {bounds}.")
    if levels < 1:
        raise InputError(f"the noise needs at least 1 level, got {levels}.")
    if levels == 1:
        return (math.sqrt(low * high),)
    return tuple(low * (high / low) ** (i / (levels - 1)) for i in range(levels))


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
        bounds: σ_min and σ_max, in pixel units; `levels` how many noise levels there are between them.
        temperature: of the relaxed chain, in units of ln σ.
        card: another card than the registry's, for another number of votes.

    Raises:
        InputError: for an even number of probes, which has no single median, a target that isn't positive,
            bounds out of order, or no level.
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
        levels: int = LEVELS,
        temperature: float = TEMPERATURE,
        card: Card = CARD,
    ) -> None:
        super().__init__()
        if probes < 1 or probes % 2 == 0:
            raise InputError(f"the median needs an odd number of probes, got {probes}.")
        if target <= 0:
            raise InputError(f"the target level must be positive, got {target}.")
        self.card = card
        self.n_classes = n_classes
        self.selector = selector
        self.classifier = classifier
        self.target = target
        self.probe = probe
        self.probes = probes
        self.bounds = bounds
        self.levels = level_grid(bounds, levels)
        self.temperature = temperature

    def choices(self, x: Tensor, noise: Noise) -> Tensor:
        """ln σ for each of an image's probes, `(n, probes)`."""
        z = noise.normal("probe", shape=(self.probes, *x.shape[1:]), like=x)
        means: Tensor = self.selector((x[:, None] + self.probe * z).flatten(0, 1), self.target)[0]
        return means.reshape(len(x), self.probes)

    def rounded(self, log_sigma: Tensor) -> Tensor:
        """The index of the level nearest to each ln σ, of any shape; int64."""
        grid = torch.tensor(self.levels, device=log_sigma.device, dtype=log_sigma.dtype).log()
        # What lies past the ends is nearest to them, so that this clips too.
        return torch.bucketize(log_sigma, (grid[1:] + grid[:-1]) / 2)

    @torch.no_grad()
    def level(self, x: Tensor, noise: Noise) -> Tensor:
        """σ̄, `(n,)` in pixel units: one of `levels`."""
        index = self.rounded(self.choices(x, noise)).median(1).values
        return torch.tensor(self.levels, device=x.device, dtype=x.dtype)[index]

    def soft_level(self, x: Tensor, noise: Noise) -> Tensor:
        """σ̄ with median and clip softened and without the rounding, `(n,)`."""
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
        """The same with a soft median and a soft clip, not rounded: the selector has a gradient."""
        return Chain(self.soft_level, [self.add_noise], self.classify, network_calls=self.probes + 1)

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`base`: the classifier without noise."""
        return {"base": lambda x, noise: self.classify(x, x, noise)}

    def certified(self) -> SelectedSmoothing:
        """The levels, what chooses among them, and the classifier."""

        def choose(probed: Tensor, noise: Noise) -> Tensor:
            return self.rounded(self.selector(probed, self.target)[0])

        return SelectedSmoothing(
            self.levels, self.probe, self.probes, choose, lambda noised, noise: self.classifier(noised), RHO
        )


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load(dataset)` reads."""
    name = CIFAR10 if dataset == "cifar10" else DIGITS
    return {name: WEIGHTS / name}


def own_bounds(dataset: str) -> tuple[float, float]:
    """σ_min and σ_max of the packaged network, in pixel units, to three figures."""
    if dataset != "cifar10":
        return BOUNDS
    measured = read_manifest()[CIFAR10]["test"]
    factor = math.exp(SPREADS * measured["spread_of_log_sigma"])
    low, high = measured["median_sigma"] / factor, measured["median_sigma"] * factor
    return float(f"{low:.3g}"), float(f"{high:.3g}")


def load(
    dataset: str,
    *,
    target: float = TARGET,
    tau: float = PROBE,
    probes: int = PROBES,
    votes: int = VOTES,
    levels: int = LEVELS,
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
) -> VariationalSmoothing:
    """The smoothed classifier and its selector.

    Args:
        dataset: digits, or cifar10 where its weights are packaged.
        target: the level that the selector is told, in pixel units; it was trained on .1 to 1.
        tau: the selector's noise, in pixel units.
        probes: over how many of them the median is taken; odd.
        votes: draws of the majority.
        levels: how many noise levels there are from `sigma_min` to `sigma_max`, evenly spaced in ln σ.
        sigma_min: the lowest level, in pixel units; 0 for the network's own, .22 on digits.
        sigma_max: the highest; 0 for the network's own, .34 on digits.

    Raises:
        InputError: for a target that isn't positive, an even number of probes, no votes, bounds out of order, or no
            level.
    """
    network = SelectedNet() if dataset == "cifar10" else VariationalNet()
    load_packaged(network, *weight_files(dataset))
    card = CARD
    low, high = own_bounds(dataset)
    bounds = (sigma_min or low, sigma_max or high)
    sigma_min, sigma_max = bounds
    if (target, tau, probes, votes, levels, bounds) != (TARGET, PROBE, PROBES, VOTES, LEVELS, BOUNDS):
        choices = (
            *CARD.choices[:2],
            f"target {target:g}; σ is the median of {probes} probes x + {tau:g} η, each rounded to one of {levels} "
            f"levels from {sigma_min:g} to {sigma_max:g}, evenly spaced in ln σ",
            *CARD.choices[-2:],
        )
        changes = {"title": "Variational smoothing", "network_calls": probes + 1, "gradient_calls": probes + 1}
        card = with_files(with_votes(CARD, votes), weight_files(dataset), choices=choices, **changes)
        # A single vote has a gradient, but not to the selector.
        card = with_traits(card, non_differentiable=True)
    n_classes = describe(dataset).n_classes
    return VariationalSmoothing(
        network.selector, network.classifier, n_classes, target, tau, probes, bounds, levels, card=card
    )


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
