"""Which of many attacks' candidates is each sample's strongest, where scores are themselves random."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Round = tuple[int, int]
"""Candidates a sample that take part, and the draws each of them gets."""
Count = Callable[[Tensor, Tensor, int, int], Tensor]
"""`(points, rows, draws, round) -> ` right answers of each point in so many fresh draws, `(len(points),)`."""


class Shortlist:
    """Each sample's strongest candidates so far, by right answers in the board's draws.

    With ten attacks and twenty draws the lowest score often belongs to a lucky candidate rather
    than to the strongest, and its fresh score then overstates robustness. So several are kept, and
    the harness chooses among them on draws of their own.

    Args:
        x: the clean images `(n, c, h, w)`, in whose place candidates step.
        keep: how many to keep; 1 is right where scores are certain.
    """

    def __init__(self, x: Tensor, keep: int) -> None:
        self.points = x[:, None].repeat(1, keep, *[1] * (x.ndim - 1))
        self.scores = torch.full((len(x), keep), torch.iinfo(torch.int64).max)

    @property
    def keep(self) -> int:
        """Candidates a sample."""
        return self.points.shape[1]

    def offer(self, rows: Tensor, candidates: Tensor, correct: Tensor) -> None:
        """Takes in candidates `(len(rows), c, h, w)` of some samples, with their right answers `(len(rows),)`.

        Of equal scores the earlier candidate stays.
        """
        worst, slot = self.scores[rows].max(1)
        better = correct < worst
        self.points[rows[better], slot[better]] = candidates[better].to(self.points)
        self.scores[rows[better], slot[better]] = correct[better]

    def lowest(self) -> tuple[Tensor, Tensor]:
        """Each sample's lowest score `(n,)` and the candidate that has it `(n, c, h, w)`."""
        scores, slot = self.scores.min(1)
        return scores, self.pick(slot)

    def pick(self, slot: Tensor) -> Tensor:
        """One candidate a sample, by its place in the list `(n,)`."""
        return self.points[torch.arange(len(slot)), slot]

    def choose(self, rows: Tensor, rounds: Sequence[Round], count: Count) -> Tensor:
        """The strongest candidate of some samples, `(len(rows), c, h, w)`, by successive halving.

        Each round judges the candidates that the rounds before left with the fewest right answers
        in all, on draws of its own; the last round's lowest total wins. Most calls go to the few
        candidates that are hard to tell apart.
        """
        left = torch.arange(self.keep).expand(len(rows), -1)
        totals = torch.zeros(len(rows), self.keep, dtype=torch.int64)
        for number, (kept, draws) in enumerate(rounds):
            order = totals.argsort(dim=1, stable=True)[:, :kept]
            left, totals = left.gather(1, order), totals.gather(1, order)
            index = rows.repeat_interleave(left.shape[1])
            right = count(self.points[index, left.flatten()], index, draws, number)
            totals = totals + right.view(totals.shape)
        best = left.gather(1, totals.argmin(1, keepdim=True)).squeeze(1)
        return self.points[rows, best]
