"""Which of many attacks' candidates is each sample's strongest, where scores are themselves random."""

from __future__ import annotations

import torch
from torch import Tensor

KEEP = 8
"""Candidates a sample of a stochastic defense keeps for the last choice."""
SELECTION = 4
"""The last choice takes this many times the board's draws, so that it is not led by luck."""


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
