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


def test_halving_spends_its_draws_on_candidates_that_are_hard_to_tell_apart() -> None:
    shortlist = Shortlist(_images(0.0, 0.0), keep=4)
    for value in (0.1, 0.2, 0.3, 0.4):
        shortlist.offer(torch.arange(2), _images(value, 10 + value), torch.tensor([5, 5]))
    asked: list[tuple[int, int, int]] = []

    def count(points: torch.Tensor, index: torch.Tensor, draws: int, number: int) -> torch.Tensor:
        asked.append((len(points), draws, number))
        assert index.tolist() == sorted(index.tolist())
        # The right answers of a candidate: none for .3; of the others the fewer, the larger the value.
        value = (10 * points.flatten()).round() % 100
        return torch.where(value == 3, 0, draws - value).long()

    best = shortlist.choose(torch.arange(2), ((4, 10), (2, 20), (1, 5)), count)
    assert asked == [(8, 10, 0), (4, 20, 1), (2, 5, 2)]
    assert [round(v, 1) for v in best.flatten().tolist()] == [0.3, 10.3]
    one = shortlist.choose(torch.tensor([1]), ((4, 10),), count)
    assert round(one.item(), 1) == 10.3


def test_a_round_counts_what_the_rounds_before_it_saw() -> None:
    shortlist = Shortlist(_images(0.0), keep=2)
    for value in (0.1, 0.2):
        shortlist.offer(torch.tensor([0]), _images(value), torch.tensor([5]))
    first, second = shortlist.points[0].flatten().tolist()
    # The first leads by 6 after a long round; a short round in favour of the second doesn't turn that.
    counts = {(0, round(first, 1)): 0, (0, round(second, 1)): 6, (1, round(first, 1)): 3, (1, round(second, 1)): 0}

    def count(points: torch.Tensor, index: torch.Tensor, draws: int, number: int) -> torch.Tensor:
        return torch.tensor([counts[number, round(value, 1)] for value in points.flatten().tolist()])

    best = shortlist.choose(torch.tensor([0]), ((2, 10), (2, 3)), count)
    assert round(best.item(), 1) == round(first, 1)


def _state(shortlist: Shortlist) -> tuple[torch.Tensor, torch.Tensor]:
    return shortlist.scores, shortlist.points
