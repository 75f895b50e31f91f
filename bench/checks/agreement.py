"""Ways of asking a defense, and whether two give the same answer: exactly, or at least in distribution."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from assay.bounds import wrong_at_most
from assay.checks.subject import Subject, gap
from assay.noise import Noise
from assay.norms import Ball

TOLERANCE = 1e-3
"""Largest change put down to float32 kernels that differ with the mode, the layout or the batch's size."""

RELATIVE = 1e-2
"""Relative change of logits that weighs as much as `TOLERANCE` does in probabilities: of a saturated answer nothing
else shows."""

ROUNDING = 1e-4
"""Of the largest logit, before the row's mean is taken off: a thousand float32 roundings."""

REPEATS = 6
"""Answers of either way that are compared where they need not be equal."""

Way = Callable[[Tensor, Noise], Tensor]
"""`(x, noise) -> logits (n, k)`."""


def change(a: Tensor, b: Tensor) -> Tensor:
    """`(n,)` float64: the largest change of probabilities, or of centred logits relative to them in like units.

    Whatever the scale of the logits: of two rows, relative to the larger one, or to the median row of the batch where
    that is larger still, since a row that happens to be near 0 is as inexact as its neighbours.
    """
    if not len(a):
        return a.new_zeros(0, dtype=torch.float64)
    one, two = (each.detach().double() for each in (a, b))
    first, second = (each - each.mean(1, keepdim=True) for each in (one, two))
    size = torch.maximum(first.abs().amax(1), second.abs().amax(1))
    # What lies far from 0 is rounded by as much before it is centred.
    offset = ROUNDING * torch.maximum(one.abs().amax(1), two.abs().amax(1))
    size = torch.maximum(size, size.median()) + offset + torch.finfo(torch.float64).tiny
    relative = (first - second).abs().amax(1) / size * (TOLERANCE / RELATIVE)
    return torch.maximum(gap(one, two), relative.nan_to_num(nan=1.0))


def apart(one: Way, other: Way, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """`(n,)`: where two stochastic ways don't draw the true class's probability from one distribution, beyond chance.

    Of `REPEATS` probabilities of each way, with noise of their own, all of one way's lie above all of the other's:
    if the distributions are the same that happens with probability 2 / C(2r, r), whatever they are. All rows are
    False where no more do so than chance explains.
    """
    firsts, seconds = (
        torch.stack([_of_class(way(x, noise.child(name, i)), y) for i in range(REPEATS)])
        for name, way in (("one", one), ("other", other))
    )
    separate = (firsts.amin(0) - seconds.amax(0) > TOLERANCE) | (seconds.amin(0) - firsts.amax(0) > TOLERANCE)
    by_chance = wrong_at_most(len(x), 2 / math.comb(2 * REPEATS, REPEATS))
    return separate if int(separate.sum()) > by_chance else torch.zeros_like(separate)


def _of_class(logits: Tensor, y: Tensor) -> Tensor:
    return logits.detach().double().softmax(1).gather(1, y[:, None]).squeeze(1)


@dataclass
class Ledger:
    """What was compared, and how far it was off, as a multiple of what is allowed."""

    subject: Subject
    changes: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = torch.zeros(len(self.subject.x), dtype=torch.bool)

    def compare(
        self,
        what: str,
        expected: Tensor,
        ask: Callable[[], Tensor],
        *,
        limit: float = TOLERANCE,
        rows: slice = slice(None),
        may_refuse: bool = False,
    ) -> None:
        """Asks, and compares the answers with those expected of `rows` of the subject."""
        try:
            answer = ask()
            got = answer.detach()
        except Exception:
            if not may_refuse:
                raise
            self.refuse(what)
            return
        changes = change(expected, got).cpu()
        # A subclass may answer the questions that are put to it, such as a loss, as it likes.
        self.note(what, changes if type(answer) is Tensor else torch.ones_like(changes), limit, rows)

    def refuse(self, what: str) -> None:
        """Keeps what the defense would not do."""
        self.refused += [] if what in self.refused else [what]

    def note(self, what: str, changes: Tensor, limit: float, rows: slice = slice(None)) -> None:
        """Keeps the largest change, and the samples above the limit."""
        self.changes[what] = max(self.changes.get(what, 0.0), float(changes.max()) if len(changes) else 0.0)
        if bool((changes > limit).any()):
            self.bad += [] if what in self.bad else [what]
            self.rows[rows] |= changes > limit


def quietly(way: Way, x: Tensor, noise: Noise) -> Tensor:
    """The answers without a gradient."""
    with torch.no_grad():
        return way(x, noise)


def counted(subject: Subject, way: Way, cost: int) -> Way:
    """The same function, whose calls are the examination's."""

    def run(x: Tensor, noise: Noise) -> Tensor:
        subject._counted().calls.forward += torch.bincount(noise.slots, minlength=len(subject.x)) * cost
        return way(x, noise)

    return run


@contextlib.contextmanager
def hooked(module: nn.Module, *, backward: bool) -> Iterator[Callable[[], bool]]:
    """Hooks that do nothing on every module, for the while; yields whether they are all there still."""
    handles = []
    quiet = contextlib.ExitStack()
    try:
        if backward:
            # Torch warns of inner gradients, which are nobody's fault here.
            quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        for part in module.modules():
            if backward:
                handles.append(part.register_full_backward_hook(lambda module, given, taken: None))
            else:
                handles.append(part.register_forward_hook(lambda module, given, result: None))
                handles.append(part.register_forward_pre_hook(lambda module, given: None))
        yield lambda: all(handle.id in (handle.hooks_dict_ref() or ()) for handle in handles)
    finally:
        for handle in handles:
            handle.remove()
        quiet.close()


class _Onlooker(TorchDispatchMode):
    """Sees every operation and does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def watched(way: Way, x: Tensor, noise: Noise) -> Tensor:
    """The answer under a dispatch mode, as tracing has it."""
    with torch.no_grad(), _Onlooker():  # type: ignore[no-untyped-call]  # torch's
        return way(x, noise)


def stepped(subject: Subject, gradient: Tensor) -> Tensor:
    """One step along the gradient over the whole budget; at random where there is no gradient."""
    ball = Ball(subject.threat, subject.x)
    still = (gradient.flatten(1) == 0).all(1) | ~gradient.flatten(1).isfinite().all(1)
    random = subject.noise.child("direction").normal(shape=subject.x.shape[1:], like=subject.x)
    return ball.step(subject.x, torch.where(still[:, None, None, None], random, gradient), ball.eps)
