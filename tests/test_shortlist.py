from __future__ import annotations

import torch

from assay.shortlist import Shortlist


def _images(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None]


def test_the_strongest_candidates_stay_and_ties_keep_the_earlier() -> None:
    shortlist = Shortlist(_images(0.0, 0.0), keep=2)
    both = torch.arange(2)
    shortlist.offer(both, _images(0.1, 0.1), torch.tensor([9, 9]))
    shortlist.offer(both, _images(0.2, 0.2), torch.tensor([5, 12]))
    shortlist.offer(both, _images(0.3, 0.3), torch.tensor([5, 9]))
    kept = [sorted(zip(s.tolist(), p.flatten().tolist(), strict=True)) for s, p in zip(*_state(shortlist), strict=True)]
    assert [[(s, round(v, 1)) for s, v in row] for row in kept] == [[(5, 0.2), (5, 0.3)], [(9, 0.1), (9, 0.3)]]
    scores, best = shortlist.lowest()
    assert scores.tolist() == [5, 9]
    assert round(best[0].item(), 1) in (0.2, 0.3)
    assert round(best[1].item(), 1) == 0.1


def test_a_subset_of_samples_changes_no_other() -> None:
    shortlist = Shortlist(_images(0.0, 0.0, 0.0), keep=1)
    shortlist.offer(torch.arange(3), _images(0.1, 0.2, 0.3), torch.tensor([7, 7, 7]))
    shortlist.offer(torch.tensor([1]), _images(0.9), torch.tensor([3]))
    scores, best = shortlist.lowest()
    assert scores.tolist() == [7, 3, 7]
    assert [round(v, 1) for v in best.flatten().tolist()] == [0.1, 0.9, 0.3]


def _state(shortlist: Shortlist) -> tuple[torch.Tensor, torch.Tensor]:
    return shortlist.scores, shortlist.points
