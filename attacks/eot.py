"""The samples that still stand: one place for early stopping, expectation over draws and the choice of candidates.

Every attack shows each point it evaluates to one `Standing`, which remembers the best and says
which samples are done. The logits that came with a gradient are that evaluation: no point is paid
for twice. For a target that answers at random the draws that guided the search have flattered
the points it liked, so leaving the batch and the final choice each take a second set of draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.attack import Evaluation, Forward, Loss, Target
from assay.attacks.losses import NamedLoss, margin, pick
from assay.card import Votes
from assay.defense import aggregate
from assay.errors import InputError
from assay.noise import Noise

CONFIRMING_DRAWS = 10
"""The fewest fresh draws that must all be wrong before a sample of a stochastic target is given up as broken."""
SHORTLIST = 3
"""Candidates a sample keeps for the final choice, where the draws that found them can't be trusted."""


def require_positive(**options: int) -> None:
    """Refuses counts below 1.

    Raises:
        InputError: naming the option.
    """
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")


def mean_answer(logits: Tensor) -> Tensor:
    """`(n, draws, k)` logits to `(n, k)`: the log of the mean probability, or a single draw's logits as they are."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(-1).logsumexp(1)


def badness(logits: Tensor, y: Tensor, votes: Votes) -> Tensor:
    """One number to rank candidates by, `(n,)` float64: draws `(n, draws, k)` first, then the mean answer's margin.

    What counts of the draws is the share whose answer is not `y`; under a majority vote, by how
    much the leading wrong class's share exceeds that of `y`. A defense that averages logits or
    probabilities is judged by the margin of that average alone.
    """
    averaged = votes.draws > 1 and votes.how != "majority"
    slack = margin(aggregate(logits, votes) if averaged else mean_answer(logits), y).double()
    squashed = slack / (1 + slack.abs())
    if averaged:
        return squashed
    answers = F.one_hot(logits.argmax(-1), logits.shape[-1]).double().mean(1)
    counted = 1 - pick(answers, y) if votes.draws == 1 else margin(answers, y)
    # In a quarter of one draw's weight, the margin can never outrank a draw.
    return counted + 0.25 / logits.shape[1] * squashed


def all_wrong(logits: Tensor, y: Tensor, votes: Votes) -> Tensor:
    """Whether no draw of a sample's answer is right, nor what the defense makes of them together; `(n,)`."""
    wrong = (logits.argmax(-1) != y[:, None]).all(1)
    # The mean of logits that are all wrong, each in favour of another class, can be right.
    return wrong & (aggregate(logits, votes).argmax(-1) != y) if votes.draws > 1 else wrong


class Standing:
    """Which samples of a batch are unbroken, and the worst points found for all of them.

    A deterministic sample is broken by one wrong answer. A sample of a stochastic target is broken
    when all draws of an evaluation are wrong and so is a second, independent set of at least as
    many. After a second set that disagrees, a sample waits twice as many evaluations as before for
    its next one. A stand-in's (`forward`'s) wrong answer counts only once the target confirms it.

    Args:
        target: what is attacked.
        x, y, noise: the whole batch, `(n, c, h, w)`, `(n,)` and n rows.
        eot: draws an evaluation; 1 is used where the target is deterministic.
        clip: shortens the gradients of the steepest draws before they are averaged, see `Target.gradient`.
        forward: differentiated and evaluated in place of the target's own draw.
        judge: gives the second draws in place of the target's own draw.
        stop: False keeps every sample in the batch to the end, for points that go as far as they can.
    """

    def __init__(
        self,
        target: Target,
        x: Tensor,
        y: Tensor,
        noise: Noise,
        *,
        eot: int = 1,
        clip: bool = False,
        forward: Forward | None = None,
        judge: Forward | None = None,
        stop: bool = True,
    ) -> None:
        require_positive(eot=eot)
        self.target, self.x, self.y, self.noise = target, x, y, noise
        self._votes = target.card.votes
        self.draws = eot if target.stochastic else 1
        self._clip, self._forward, self._judge, self._stop = clip, forward, judge, stop
        self._second = max(eot, CONFIRMING_DRAWS) if target.stochastic else 1
        self._certain = not target.stochastic and forward is judge
        keep = 1 if self._certain else SHORTLIST
        self._points = x.detach()[:, None].repeat(1, keep, *[1] * (x.ndim - 1))
        self._scores = torch.full((len(x), keep), -torch.inf, dtype=torch.float64, device=x.device)
        self._broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._wait = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self._patience = torch.ones_like(self._wait)

    @property
    def rows(self) -> Tensor:
        """The samples that still stand, as indices into the batch."""
        return (~self._broken).nonzero().squeeze(1)

    def runs(self, loss: NamedLoss, restarts: int, targets: int) -> Iterator[tuple[Noise, tuple[Tensor, ...]]]:
        """For each restart, and for a targeted loss each target class: its noise, and the loss's labels.

        Targets are the runners-up of the answer at `x`, best first, as in Croce & Hein 2020. Ends
        early when nothing stands.
        """
        require_positive(restarts=restarts, targets=targets)
        if not len(self.rows):
            return
        aims: list[Tensor | None] = [None]
        if loss.targeted:
            logits, _ = self.look(self.rows, self.x, self.noise.child("clean"))
            others = mean_answer(logits).scatter(1, self.y[:, None], -torch.inf)
            order = others.argsort(dim=1, descending=True, stable=True)
            aims = list(order.T[: min(targets, self.target.n_classes - 1)])
        for restart in range(restarts):
            for i, aim in enumerate(aims):
                if len(self.rows):
                    yield self.noise.child("run", restart, i), (self.y,) if aim is None else (self.y, aim)

    def climb(
        self, rows: Tensor, z: Tensor, loss: Loss, labels: tuple[Tensor, ...], noise: Noise
    ) -> tuple[Evaluation, Tensor]:
        """Loss and gradient at the points `z` of the samples `rows`, and which of them still stand `(len(rows),)`.

        `labels` and `noise` are the whole batch's.
        """
        drawn = noise[rows]
        given = tuple(label[rows] for label in labels)
        evaluation = self.target.gradient(
            z, given, loss, drawn, draws=self.draws, forward=self._forward, clip=self._clip
        )
        return evaluation, self._see(rows, z, evaluation.logits, drawn)

    def look(self, rows: Tensor, z: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Logits `(len(rows), draws, k)` at the points `z`, and which samples still stand."""
        drawn = noise[rows]
        logits = self.target.draws(z, drawn, self.draws, forward=self._forward)
        return logits, self._see(rows, z, logits, drawn)

    def show(self, rows: Tensor, z: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        """Which samples still stand `(len(rows),)`, given logits `(len(rows), draws, k)` at `z` that an attack has.

        For attacks that take a defense apart: what they computed on the way is an evaluation. `noise`
        is the whole batch's and only its children are used, so it may be what gave the logits.
        """
        return self._see(rows, z, logits, noise[rows])

    def _see(self, rows: Tensor, z: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        score = badness(logits, self.y[rows], self._votes)
        weakest, slot = self._scores[rows].min(1)
        better = score > weakest
        self._points[rows[better], slot[better]] = z[better]
        self._scores[rows[better], slot[better]] = score[better]
        if not self._stop:
            return torch.ones_like(better)
        broken = all_wrong(logits, self.y[rows], self._votes)
        if not self._certain:
            broken = self._confirm(rows, z, broken, noise)
        if bool(broken.any()):
            self._broken[rows[broken]] = True
            self._points[rows[broken], 0] = z[broken]
        return ~broken

    def _confirm(self, rows: Tensor, z: Tensor, suspected: Tensor, noise: Noise) -> Tensor:
        self._wait[rows] -= 1
        due = (suspected & (self._wait[rows] <= 0)).nonzero().squeeze(1)
        confirmed = torch.zeros_like(suspected)
        if len(due):
            second = noise.child("confirm")[due]
            logits = self.target.draws(z[due], second, self._second, forward=self._judge)
            confirmed[due] = all_wrong(logits, self.y[rows[due]], self._votes)
            self._patience[rows[due]] *= 2
            self._wait[rows[due]] = self._patience[rows[due]]
        return confirmed

    def result(self) -> Tensor:
        """For each sample the point that broke it, or the worst one found, `(n, c, h, w)`.

        Where draws are random, or a stand-in was evaluated, the shortlist is judged again on draws
        that had no part in choosing it, the same for all candidates of a sample.
        """
        rows, keep = self.rows, self._points.shape[1]
        if keep > 1 and len(rows):
            index = rows.repeat_interleave(keep)
            fresh = self.noise.child("select")[index]
            logits = self.target.draws(self._points[rows].flatten(0, 1), fresh, self._second, forward=self._judge)
            choice = badness(logits, self.y[index], self._votes).view(-1, keep).argmax(1)
            self._points[rows, 0] = self._points[rows, choice]
        return self._points[:, 0].clone()
