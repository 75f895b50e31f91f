"""What a check of a defense is given, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from assay.checks.ambient import Ambient
from assay.defense import Defense
from assay.noise import Noise
from assay.target import Evaluation, Target
from assay.threat import ThreatModel


@dataclass(frozen=True)
class Asked:
    """A question and its answer, in memory that nobody else has.

    Attributes:
        x, noise: what was asked, of some of the subject's images `x` as `images`.
        logits: `(n, k)`, detached.
        gradient: `(n, c, h, w)` of the cross-entropy, where it was asked for.
    """

    images: Tensor
    x: Tensor
    noise: Noise
    logits: Tensor
    gradient: Tensor | None = None


@dataclass
class Memory:
    """The very first answer and gradient that a defense gave, and how often it was asked for them again."""

    answer: Asked | None = None
    gradient: Asked | None = None
    asked_again: int = 0


@dataclass(frozen=True)
class Subject:
    """A defense under examination, and a few of the board's images.

    Attributes:
        defense: in evaluation mode.
        x: `(n, c, h, w)` in [0, 1], `y`: `(n,)` labels, `ids`: their sample ids.
        noise: n rows, a stream that nothing else uses.
        threat: the board's.
        targets: those that checks were handed; their calls are the examination's cost.
        memory: what the defense said first; `constancy` asks again.
        ambient: the process as it was before the defense was called.
    """

    defense: Defense
    x: Tensor
    y: Tensor
    ids: Sequence[int]
    noise: Noise
    threat: ThreatModel = field(default_factory=lambda: ThreatModel("linf", Fraction(1, 10)))
    targets: list[Target] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    ambient: Ambient = field(default_factory=Ambient)

    def target(self, *, white_box: bool = True) -> Target:
        """The defense as an attack sees it; its calls count as the examination's."""
        made = Target(self.defense, len(self.x), white_box=white_box)
        self.targets.append(made)
        return made

    @property
    def calls(self) -> tuple[int, int]:
        """Samples passed forward and backward so far, by this examination."""
        forward = sum(int(target.calls.forward.sum()) for target in self.targets)
        return forward, sum(int(target.calls.backward.sum()) for target in self.targets)

    def answer(self, rows: Tensor | slice = slice(None), noise: Noise | None = None, x: Tensor | None = None) -> Tensor:
        """The defense's answers as it gives them, votes included, without a gradient and without chunks.

        Args:
            rows: of the images and of the noise.
            noise: n rows, by default the subject's.
            x: n images in place of the subject's.
        """
        streams = self.noise if noise is None else noise
        images = self.x if x is None else x
        counted = self._counted()
        asked, stream = images[rows], streams[rows]
        # Copies are made before the call, which may write to what it is given.
        kept = self._copies(asked, stream) if self.memory.answer is None and len(asked) else None
        with torch.no_grad():
            logits: Tensor = self.defense(asked, stream)
        counted.calls.forward += torch.bincount(stream.slots, minlength=len(self.x)) * self.votes
        if kept is not None and isinstance(logits, Tensor):
            self.memory.answer = Asked(*kept, logits.detach().clone())
        return logits

    def gradient(self) -> Evaluation:
        """One draw's cross-entropy and its gradient, at all images with the subject's noise."""
        kept = self._copies(self.x, self.noise)
        found = self.target().gradient(self.x, (self.y,), cross_entropy, self.noise)
        if self.memory.gradient is None:
            self.memory.gradient = Asked(*kept, found.logits[:, 0].clone(), found.gradient.clone())
        return found

    def _copies(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Noise]:
        return self.x.clone(), x.clone(), Noise(noise.keys.clone(), noise.slots.clone())

    @property
    def votes(self) -> int:
        """Draws of one answer."""
        return self.defense.card.votes.draws

    def ids_of(self, mask: Tensor) -> tuple[int, ...]:
        """The sample ids where a boolean mask over the rows holds."""
        return tuple(self.ids[i] for i in mask.nonzero().flatten().tolist())

    def charge(self, cost: int) -> None:
        """Counts so many forward calls of every image, which the defense answered by a way of its own."""
        self._counted().calls.forward += torch.bincount(self.noise.slots, minlength=len(self.x)) * cost

    def _counted(self) -> Target:
        """The target in whose name answers without chunks are counted."""
        return self.targets[0] if self.targets else self.target()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """`(n,)`."""
    return functional.cross_entropy(logits, y, reduction="none")


def gap(a: Tensor, b: Tensor) -> Tensor:
    """`(n,)`: the largest difference of two batches of probabilities, which no scale of logits hides.

    1, the most there can be, where either is not finite.
    """
    return (a.double().softmax(1) - b.double().softmax(1)).abs().amax(1).nan_to_num(nan=1.0)
