"""Adaptive denoising purification (Yoon, Hwang & Lee 2021, arXiv 2106.06041): climb a score model, then classify.

The image gets Gaussian noise and then follows the score for a few steps, each of a length that the
score's own curvature sets (section 3.2). In pixels x in [0, 1], with `s` the score in their units,

    g = s(x),  g' = s(x + η·g),  z = ⟨g, g'⟩/⟨g, g⟩,  α = clip(λ·η/(1 − z), 1e-5, .1),  x ← clip(x + α·g),

η = 1e-3 and λ = .05. The score model works on y = 2x − 1, so that s(x) = 2·∇_y log p(y): the chain
rule, and the only place where units meet. Everything is differentiated, α and the clips included.

Both clips are part of the definition. On digits, where half of the pixels are 0, 37 % of all pixels
lie outside [0, 1] once noised and have no gradient in that draw, and each step clips another 15 to
18 % of them. Which pixels those are changes with the noise, so that a mean over draws sees all of
them. `stages` lets BPDA pass the clips by.

A sample whose α is at most .001 stops: it takes neither that step nor another. The batch goes on
with it, so that a draw's cost does not depend on its rows; rows that have stopped are carried along.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from assay.card import Aggregation, Card, Claim, Traits, Votes
from assay.chain import Chain, State
from assay.data import describe
from assay.defense import DefenseSpec
from assay.defenses.behind import behind_files, take_classifier
from assay.defenses.checkpoints import WEIGHTS, data_sets, load_packaged, packaged, trained
from assay.defenses.denoiser import Denoiser, check_sigmas, encode
from assay.defenses.denoiser_sources import denoiser_files, take_denoiser
from assay.defenses.purified import IteratedPurification
from assay.defenses.recipes import cifar10_score, digits_energy, digits_score
from assay.defenses.schedule import column
from assay.defenses.undefended import DIGITS as CLASSIFIER
from assay.defenses.undefended import load_network
from assay.defenses.variants import with_files, with_traits, with_votes
from assay.errors import InputError, nearest
from assay.foreign import OpenSpec
from assay.noise import Noise

SCORE = "digits/score.safetensors"
CIFAR10 = "cifar10/score.safetensors"
ENERGY = "digits/energy.safetensors"
NOISE = 0.25
"""The injected noise's standard deviation in pixel units."""
LEVEL = 0.5
"""The σ at which the score is read, in [−1, 1] units: that of the injected noise."""
STEPS = 4
RATE = 0.05
"""λ, the paper's."""
RUNS = 8
THREAT = "cifar10 linf 8/255"


def step_size(g: Tensor, ahead: Tensor, eta: float, rate: float, bounds: tuple[float, float]) -> Tensor:
    """α = clip(λ·η/(1 − z), low, high) with z = ⟨g, g'⟩/⟨g, g⟩, `(n,)`.

    Where the score grows along itself (z > 1) the formula is negative and α the lower bound; at
    z = 1 it is infinite and α the upper one.

    Args:
        g: the score at x, `(n, c, h, w)`; `ahead` is that at x + η·g.
        eta, rate: η and λ.
        bounds: low and high.
    """
    low, high = bounds
    square = g.square().flatten(1).sum(1)
    # 1 − z as ⟨g, g − g'⟩/⟨g, g⟩, which loses fewer digits; a score of zero has no direction, and α is low.
    bend = (g * (g - ahead)).flatten(1).sum(1) / square.clamp_min(torch.finfo(g.dtype).tiny)
    # Clipped as a denominator: the same α, and no infinity for the gradient to multiply by zero.
    size = (rate * eta / bend.clamp_min(rate * eta / high)).clamp_min(low)
    return torch.where((bend < 0) | (square == 0), low, size)


@dataclass(frozen=True)
class AdaptivePurifier:
    """Noise, then steps up the score whose lengths adapt to each sample.

    Attributes:
        denoiser: its score is climbed.
        level: σ at which the score is read, in [−1, 1] units.
        steps: at most; two network calls each.
        randomized: False leaves the noise out: a deterministic purifier.
        noise: the injected noise's standard deviation, in pixel units.
        rate: λ.
        eta: η, how far ahead the score is probed, in units of the score.
        bounds: the least and largest α.
        stop: a sample stops once its α is at most this.
    """

    denoiser: Denoiser
    level: float
    steps: int
    randomized: bool = True
    noise: float = NOISE
    rate: float = RATE
    eta: float = 1e-3
    bounds: tuple[float, float] = (1e-5, 0.1)
    stop: float = 1e-3

    def score(self, x: Tensor) -> Tensor:
        """∇ log p in pixel units, `(n, c, h, w)`."""
        return 2 * self.denoiser.score(encode(x), self.level)

    def start(self, x: Tensor, noise: Noise) -> Tensor:
        """The noised and clipped pixels; in the deterministic form the pixels themselves."""
        if not self.randomized:
            return x
        return (x + self.noise * noise.normal("z", shape=x.shape[1:], like=x)).clamp(0, 1)

    def step(self, state: State, x: Tensor, noise: Noise) -> Tensor:
        """One step of the samples that still move. One that has stopped would find the same α again: it stays."""
        assert isinstance(state, Tensor)
        g = self.score(state)
        alpha = step_size(g, self.score(state + self.eta * g), self.eta, self.rate, self.bounds)
        taken = (state + column(alpha, state) * g).clamp(0, 1)
        return torch.where(alpha.reshape(-1, 1, 1, 1) > self.stop, taken, state)

    def shortened(self, steps: int) -> AdaptivePurifier:
        """At most `steps` >= 1 steps, longer by as much as they are fewer."""
        fewer = min(steps, self.steps)
        return replace(self, steps=fewer, rate=self.rate * self.steps / fewer)

    def chain(self) -> Chain:
        """The process: pixels `(n, c, h, w)` in [0, 1] to purified pixels in [0, 1].

        Raises:
            InputError: for fewer than one step, or a level that the denoiser was not made for.
        """
        if self.steps < 1 or not self.rate > 0:
            raise InputError(f"a purifier takes at least 1 step and a rate above 0, got {self.steps} and {self.rate}.")
        check_sigmas(self.denoiser, [self.level], "the score's level")
        return Chain(self.start, [self.step] * self.steps, network_calls=2 * self.steps)


CARD = Card(
    name="adp",
    title="ADP",
    summary=f"Noise of .25, then {STEPS} adaptive steps up a score network; logits averaged over {RUNS} runs.",
    source="Yoon, Hwang and Lee, Adversarial Purification with Score-based Generative Models, ICML 2021",
    url="https://arxiv.org/abs/2106.06041",
    choices=(
        f"at most {STEPS} steps and {RUNS} runs instead of 10 and 10: on 8x8 digits later steps change little",
        f"the score is read at σ = {LEVEL} in [-1, 1] units, the level of the injected noise",
        "a step whose size is at most .001 is not taken",
    ),
    traits=Traits(stochastic=True, purifies=True, iterative=True),
    handles=("stages", "chain", "surrogate", "components", "votes"),
    votes=Votes(draws=RUNS, how="logits"),
    datasets=data_sets(SCORE, CIFAR10),
    weights=packaged(*trained(SCORE, CIFAR10), CLASSIFIER),
    # Two calls of the score model a step, and one of the classifier.
    network_calls=2 * STEPS + 1,
    # The chain runs every part again in its backward pass.
    gradient_calls=2 * (2 * STEPS + 1),
    claims=(
        Claim(value=0.6971, threat=THREAT, attack="the authors' BPDA with EOT", source="Yoon et al. 2021"),
        Claim(value=0.337, threat=THREAT, attack="exact gradient, EOT 200", source="Croce et al. 2022"),
    ),
)

ENERGY_CARD = CARD.model_copy(
    update={
        "name": "adp_energy",
        "title": "ADP (energy)",
        "summary": f"Noise of .25, then {STEPS} adaptive steps down an energy; logits averaged over {RUNS} runs.",
        "choices": (*CARD.choices, "E(x) = ½‖x − r(x)‖² with a small U-shaped network r"),
        "traits": Traits(stochastic=True, purifies=True, iterative=True, inner_gradient=True),
        "datasets": ("digits",),
        "weights": packaged(ENERGY, CLASSIFIER),
        "claims": (),
    }
)


class AdaptivePurification(IteratedPurification):
    """An adaptive purifier before a classifier; one draw is one run.

    Args:
        purifier: the process.
        classifier: images to logits.
        n_classes: k.
        card: its votes are the paper's S runs, and how they are averaged: logits, probabilities or majority.
    """

    def __init__(self, purifier: AdaptivePurifier, classifier: nn.Module, n_classes: int, card: Card = CARD) -> None:
        super().__init__(purifier, classifier, n_classes, card)


def _score_files(dataset: str) -> dict[str, Path]:
    name = CIFAR10 if dataset == "cifar10" else SCORE
    return {name: WEIGHTS / name}


def weight_files(dataset: str, *, denoiser: str = "", classifier: str = "") -> dict[str, Path]:
    """The weight files that `load` reads."""
    files = denoiser_files(denoiser) if denoiser else _score_files(dataset)
    return {**files, **behind_files(classifier, dataset)}


def energy_files(dataset: str) -> dict[str, Path]:
    """The weight files that `load_energy(dataset)` reads."""
    return {ENERGY: WEIGHTS / ENERGY, CLASSIFIER: WEIGHTS / CLASSIFIER}


def load(
    dataset: str,
    *,
    denoiser: str = "",
    classifier: str = "",
    randomized: bool = True,
    sigma: float = NOISE,
    steps: int = STEPS,
    rate: float = RATE,
    votes: int = RUNS,
    average: str = "logits",
) -> AdaptivePurification:
    """ADP on a score network, before a classifier.

    Args:
        dataset: digits, or cifar10 where its weights are packaged or with a `denoiser`.
        denoiser: whose score is climbed, see `assay.defenses.denoiser_sources`; empty for the packaged score network.
        classifier: see `assay.defenses.behind`; empty for the undefended one.
        randomized: False leaves the noise out; such a purifier answers from one run.
        sigma: the injected noise's standard deviation in pixel units; the score is read at its level.
        steps: at most.
        rate: λ. A Gaussian denoiser of one level has a score of slope −1/σ², so that a step removes about
            this share of the noise; at the paper's .05 most of it is still there after ten.
        votes: runs that are averaged.
        average: what is averaged: logits, probabilities or majority.

    Raises:
        InputError: for a denoiser or classifier that can't be used, or a noise level, a number or a name outside its
            range.
    """
    network: Denoiser
    if denoiser:
        network = take_denoiser(denoiser, dataset)
    else:
        network = cifar10_score() if dataset == "cifar10" else digits_score()
        load_packaged(network, *_score_files(dataset))
    purifier = AdaptivePurifier(network, 2 * sigma, steps, randomized, sigma, rate)
    purifier.chain()  # refuses what can't run, before anything does
    card = CARD
    options = (randomized, sigma, steps, rate, votes, average)
    if dataset != "digits" or denoiser or classifier or options != (True, NOISE, STEPS, RATE, RUNS, "logits"):
        files = weight_files(dataset, denoiser=denoiser, classifier=classifier)
        card = with_files(_averaging(average, votes, randomized), files, **_described(purifier))
    return AdaptivePurification(purifier, take_classifier(classifier, dataset), describe(dataset).n_classes, card)


def _averaging(average: str, votes: int, randomized: bool) -> Card:
    """The card with another average over other runs: one where all runs are the same."""
    if average not in get_args(Aggregation):
        raise InputError(f"a defense can't average {average!r}.{nearest(average, get_args(Aggregation))}")
    card = with_traits(CARD, stochastic=randomized, non_differentiable=average == "majority")
    card = card.model_copy(update={"votes": CARD.votes.model_copy(update={"how": average})})
    return with_votes(card, votes if randomized else 1)


def _described(purifier: AdaptivePurifier) -> dict[str, Any]:
    noise = f"Noise of {purifier.noise:g}, then" if purifier.randomized else "No noise;"
    return {
        "summary": f"{noise} {purifier.steps} adaptive steps up a score, then the classifier.",
        "choices": (
            f"the score is read at σ = {purifier.level:g} in [-1, 1] units, λ = {purifier.rate:g}",
            *CARD.choices[2:],
        ),
        "network_calls": 2 * purifier.steps + 1,
        "gradient_calls": 2 * (2 * purifier.steps + 1),
    }


def load_energy(dataset: str) -> AdaptivePurification:
    """ADP on the energy, before the undefended classifier."""
    denoiser = digits_energy()
    load_packaged(denoiser, ENERGY)
    purifier = AdaptivePurifier(denoiser, LEVEL, STEPS)
    return AdaptivePurification(purifier, load_network(dataset), describe(dataset).n_classes, ENERGY_CARD)


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("denoiser",), code=("denoiser", "classifier"))
ADP_ENERGY = DefenseSpec(ENERGY_CARD, load_energy, Path(__file__), energy_files)
