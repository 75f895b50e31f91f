"""Randomized smoothing (Cohen, Rosenfeld & Kolter 2019, arXiv 1902.02918).

The answer is the class that a noise-trained network gives most often to the image plus Gaussian
noise. Noised pixels are not clipped: the theory is about the Gaussian, and the network was trained
on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from assay.card import Card, Traits, Votes
from assay.certificate import Smoothed
from assay.data import describe
from assay.defense import Defense, DefenseSpec
from assay.defenses.checkpoints import WEIGHTS, data_sets, load_packaged, packaged, trained
from assay.defenses.networks import DigitsCNN
from assay.defenses.networks_cifar10 import NarrowResNet18
from assay.defenses.variants import answers_from, with_traits, with_votes
from assay.errors import InputError
from assay.noise import Noise

DIGITS = "digits/smoothing.safetensors"
CIFAR10 = "cifar10/noise_classifier.safetensors"
SIGMA = 0.25
"""The noise's standard deviation in pixel units, in training (see `train`) and in every answer."""

CARD = Card(
    name="smoothing",
    title="Randomized smoothing (σ = .25)",
    summary="A noise-trained CNN that answers by a majority of 64 noisy draws.",
    source="Cohen, Rosenfeld and Kolter, Certified Adversarial Robustness via Randomized Smoothing, ICML 2019",
    url="https://arxiv.org/abs/1902.02918",
    traits=Traits(stochastic=True, non_differentiable=True, certifies=True),
    handles=("components", "votes", "certified"),
    certificate="smoothing",
    votes=Votes(draws=64, how="majority"),
    datasets=data_sets(DIGITS, CIFAR10),
    weights=packaged(*trained(DIGITS, CIFAR10)),
    network_calls=1,
    gradient_calls=1,
)


class Smoothing(Defense):
    """A network under Gaussian noise; one draw is one noisy pass.

    Args:
        network: images to logits, trained under this noise.
        sigma: the noise's standard deviation in pixel units.
        n_classes: k.
        card: another card than the registry's, for other votes.
        temperature: of the probabilities, where those are averaged.

    Raises:
        InputError: for a temperature that is not positive.
    """

    def __init__(
        self, network: nn.Module, sigma: float, n_classes: int, card: Card = CARD, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.card = card
        self.n_classes = n_classes
        self.network = network
        self.sigma = sigma
        self.temperature = temperature
        self.certified()  # refuses a noise level or a temperature that is none

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits `(n, k)` of `x + σz`, divided by the temperature."""
        logits: Tensor = self.network(x + self.sigma * noise.normal("z", shape=x.shape[1:], like=x))
        return logits if self.temperature == 1 else logits / self.temperature

    def certified(self) -> Smoothed:
        """The network and its noise."""
        return Smoothed(self.sigma, lambda noised, noise: self.network(noised), self.temperature)

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`base`: the network without noise."""
        return {"base": lambda x, noise: self.network(x)}


def weight_files(dataset: str) -> dict[str, Path]:
    """The weight file that `load(dataset)` reads."""
    name = CIFAR10 if dataset == "cifar10" else DIGITS
    return {name: WEIGHTS / name}


def load(
    dataset: str, *, votes: int = CARD.votes.draws, sigma: float = SIGMA, soft: bool = False, temperature: float = 1.0
) -> Smoothing:
    """The smoothed classifier, under the noise that it was trained with.

    Args:
        dataset: digits, or cifar10 where its weights are packaged.
        votes: draws of an answer.
        sigma: the noise's standard deviation in pixel units; the network was trained under .25.
        soft: average the draws' probabilities in place of their votes (Salman et al. 2019), and certify that mean.
        temperature: of those probabilities.

    Raises:
        InputError: for fewer than one vote, a noise level or temperature that is not positive, or a temperature
            where votes are counted, which it doesn't change.
    """
    if temperature != 1 and not soft:
        raise InputError(f"temperature = {temperature:g} changes probabilities, not votes; it needs soft=true.")
    network = NarrowResNet18() if dataset == "cifar10" else DigitsCNN()
    load_packaged(network, *weight_files(dataset))
    card = CARD
    if (votes, sigma, soft) != (CARD.votes.draws, SIGMA, False):
        how = f"averages the probabilities of {votes} such draws" if soft else answers_from(votes)
        title = "Soft randomized smoothing" if soft else "Randomized smoothing"
        title += f" (σ = {SIGMA:g})".replace("0.", ".") if sigma == SIGMA else ""
        summary = f"A noise-trained CNN, given noise of {sigma:g} in every draw; {how}."
        card = with_votes(CARD, votes).model_copy(update={"summary": summary, "title": title})
        if soft:
            changes = {"votes": Votes(draws=votes, how="probabilities"), "certificate": "soft_smoothing"}
            card = with_traits(card.model_copy(update=changes), non_differentiable=False)
    return Smoothing(network, sigma, describe(dataset).n_classes, card, temperature)


SPEC = DefenseSpec(CARD, load, Path(__file__), weight_files)
