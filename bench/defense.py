"""Defenses: a module from images and noise to logits, the handles adaptive attacks use, and adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from assay.card import Card, Handle, Traits, Votes
from assay.chain import Chain
from assay.errors import InputError
from assay.noise import Noise

__all__ = ["Card", "Defense", "DefenseSpec", "ForeignModule", "Handle", "Stages", "Traits", "Votes", "aggregate"]


@dataclass(frozen=True)
class Stages:
    """The two halves of a purifying defense.

    `purify(x, noise) -> (n, c, h, w)`, about in [0, 1] (a purifier need not clip), and
    `classify(x, noise) -> logits (n, k)`.
    """

    purify: Callable[[Tensor, Noise], Tensor]
    classify: Callable[[Tensor, Noise], Tensor]


class Defense(nn.Module):
    """A deterministic function of `(x, noise)`, with a card.

    A subclass sets `card` and `n_classes`, implements `draw`, and overrides the handles that its
    card lists. `forward` then averages `card.votes.draws` draws in the declared way.
    """

    card: Card
    n_classes: int

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """One draw of the answer: `x (n, c, h, w)` in [0, 1] to logits `(n, k)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement draw(x, noise).")

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        """The answer: logits `(n, k)`, or log-probabilities where the votes average probabilities."""
        votes = self.card.votes
        if votes.draws == 1:
            return self.draw(x, noise)
        logits = self.draw(x.repeat_interleave(votes.draws, 0), noise.draws(votes.draws))
        return aggregate(logits.unflatten(0, (len(x), votes.draws)), votes)

    def stages(self) -> Stages:
        """Purifier and classifier, for BPDA and ablations."""
        raise NotImplementedError("this defense has no stages handle")

    def chain(self) -> Chain:
        """One draw of the answer, `x -> logits (n, k)`, as a chain."""
        raise NotImplementedError("this defense has no chain handle")

    def surrogate(self, steps: int) -> Chain:
        """The same process in at most `steps` steps with the same total noise, `x -> logits (n, k)`."""
        raise NotImplementedError("this defense has no surrogate handle")

    def components(self) -> Mapping[str, Callable[[Tensor, Noise], Tensor]]:
        """Named inner classifiers `(x, noise) -> logits (n, k)`, for transfer attacks."""
        raise NotImplementedError("this defense has no components handle")

    def votes(self) -> Votes:
        """How many draws the defense itself averages, and how."""
        return self.card.votes


def aggregate(logits: Tensor, votes: Votes) -> Tensor:
    """`(n, draws, k)` logits of single draws to the answer `(n, k)` under the declared aggregation.

    Majority votes become log vote shares, floored at half a vote, and have no gradient.
    """
    if votes.how == "logits":
        return logits.mean(1)
    if votes.how == "probabilities":
        return logits.log_softmax(-1).logsumexp(1) - torch.log(torch.tensor(float(logits.shape[1])))
    share = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(1)
    return share.clamp_min(0.5 / logits.shape[1]).log()


class ForeignModule(Defense):
    """Any `nn.Module` from images in [0, 1] to logits, as a defense.

    Where `card.traits.stochastic`, the module may draw from torch's global generator: each call
    then runs with that generator forked and seeded from the noise, so that the same noise gives
    the same answer. Its draws follow the batch, not the sample: dropping rows changes them.
    """

    def __init__(self, module: nn.Module, card: Card, n_classes: int) -> None:
        super().__init__()
        self.card = card
        self.n_classes = n_classes
        self.module = module

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """One call of the module."""
        if not self.card.traits.stochastic:
            logits: Tensor = self.module(x)
            return logits
        devices = [x.device.index or 0] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(noise.seed())
            drawn: Tensor = self.module(x)
        return drawn


@dataclass(frozen=True)
class DefenseSpec:
    """A defense that can be listed without loading its weights.

    Attributes:
        card: what its author declares.
        load: `dataset name -> Defense`, in evaluation mode, parameters frozen.
        source: the file that implements it, hashed into records.
        weight_files: the weight files that `load(dataset)` reads, by name; hashed into records.
    """

    card: Card
    load: Callable[[str], Defense]
    source: Path | None = None
    weight_files: Callable[[str], Mapping[str, Path]] = field(default=lambda dataset: {})

    def build(self, dataset: str, device: str = "cpu") -> Defense:
        """Loads the defense for a data set onto a device, in evaluation mode, parameters frozen.

        Raises:
            InputError: when there are no weights for the data set.
        """
        if self.card.datasets and dataset not in self.card.datasets:
            raise InputError(f"{self.card.name} has weights for {', '.join(self.card.datasets)}, not for {dataset!r}.")
        defense = self.load(dataset).to(device).eval()
        return defense.requires_grad_(False)
