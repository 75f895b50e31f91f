"""The `eot` check against linear defenses whose gradients have a known ratio of signal to noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from assay import data
from assay.card import Card, Traits, Votes
from assay.checks import Subject
from assay.checks.eot import (
    DRAWS,
    GRID,
    LEAST,
    MOST,
    check,
    clip,
    closed_form,
    cosine,
    enough,
    gram,
    moves,
    recommended_draws,
)
from assay.defense import Defense
from assay.finding import Finding
from assay.noise import Noise
from assay.registry import DEFENSES
from assay.threat import ThreatModel

SHAPE = (1, 16, 16)
D = math.prod(SHAPE)
W = torch.linspace(-1, 1, D) / torch.linspace(-1, 1, D).norm()

Slope = Callable[[Tensor, Noise], Tensor]


class Noisy(Defense):
    """Two classes with logits `(0, g · x + s)`: the margin's gradient in a draw is ±g, which `slope` draws `(n, d)`."""

    def __init__(self, slope: Slope, *, votes: int = 1, shift: Slope | None = None, stochastic: bool = True) -> None:
        super().__init__()
        votes_ = Votes(draws=votes, how="probabilities")
        self.card = Card(name="noisy", title="N", summary="", traits=Traits(stochastic=stochastic), votes=votes_)
        self.n_classes = 2
        self.slope, self.shift = slope, shift

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logit = (self.slope(x, noise) * x.flatten(1)).sum(1)
        if self.shift is not None:
            logit = logit + self.shift(x, noise)
        return torch.stack([torch.zeros_like(logit), logit], 1)


def with_ratio(ratio: float) -> Slope:
    """g = w + noise with |E g|² / tr Var g = ratio."""
    scale = 1 / math.sqrt(D * ratio)
    return lambda x, noise: W + scale * noise.normal("g", shape=(D,), like=x)


def heavy(x: Tensor, noise: Noise) -> Tensor:
    """One draw in 32 is a hundred times as long."""
    rare = noise.uniform("rare", shape=(1,), like=x) < 1 / 32
    return with_ratio(0.1)(x, noise) * torch.where(rare, 100.0, 1.0)


def rare_only(x: Tensor, noise: Noise) -> Tensor:
    """Three draws in four have no gradient."""
    return with_ratio(0.5)(x, noise) * (noise.uniform("rare", shape=(1,), like=x) < 0.25)


def subject(defense: Defense, n: int = 10, seed: int = 0) -> Subject:
    ids = tuple(range(100, 100 + n))
    x = Noise.from_seed(7, ids).uniform("x", shape=SHAPE, like=torch.zeros(()))
    return Subject(defense, x, torch.arange(n) % 2, ids, Noise.from_seed(seed, ids), ThreatModel("l2", Fraction(1, 2)))


def examine(defense: Defense, n: int = 10, seed: int = 0) -> Finding:
    found = check(subject(defense, n, seed))
    assert found.check == "eot"
    assert found.message
    assert Finding.model_validate_json(found.model_dump_json()) == found
    return found


def expected_count(ratio: float) -> int:
    return next(k for k in GRID if closed_form(k * ratio) < 0.05)


@pytest.mark.parametrize(("ratio", "count"), [(8.0, 1), (1.3, 4), (0.4, 16), (0.23, 20), (0.16, 32), (0.045, 128)])
def test_the_count_of_a_known_ratio_is_known(ratio: float, count: int) -> None:
    found = examine(Noisy(with_ratio(ratio)))
    assert expected_count(ratio) == count == found.data["raw"] == found.data["closed_form"]
    # The draws are of one length, so that clipping changes little.
    assert GRID.index(found.data["clipped_count"]) == pytest.approx(GRID.index(count), abs=1)
    assert found.data["count"] == recommended_draws(found.data)
    assert found.data["count"] == min(MOST, max(LEAST, found.data["clipped_count"]))
    assert found.data["ratio"] == pytest.approx(ratio, rel=0.25)
    assert found.data["cosine"] == pytest.approx([k * ratio / (k * ratio + 1) for k in DRAWS], abs=0.05)
    assert found.data["moves"] == pytest.approx([closed_form(k * ratio) for k in DRAWS], abs=0.02)
    assert found.status == "pass"


def test_gradients_that_are_noise_alone_are_flagged() -> None:
    made = subject(Noisy(lambda x, noise: noise.normal("g", shape=(D,), like=x)))
    found = check(made)
    assert found.status == "flag"
    assert "transfer" in found.message
    assert found.samples == tuple(made.ids[:8])
    assert found.data["raw"] is found.data["clipped_count"] is None
    assert recommended_draws(found.data) == MOST
    assert made.calls == (8 * 144, 8 * 144)


def test_rare_huge_gradients_rule_the_mean_and_clipping_tames_them() -> None:
    found = examine(Noisy(heavy))
    assert found.data["raw"] is None
    assert found.data["cosine"][3] < 0.5 < found.data["clipped"][3]
    assert found.status == "pass"
    assert GRID.index(found.data["clipped_count"]) == pytest.approx(GRID.index(expected_count(0.1)), abs=1)
    assert recommended_draws(found.data) == found.data["clipped_count"] == 64
    assert "plain averaging takes over 128" in found.message
    # The tail costs more than the closed form of one ratio says; clipped draws keep to it.
    assert found.data["closed_form"] < 128
    assert found.data["clipped"] == pytest.approx([0.1 * k / (0.1 * k + 1) for k in DRAWS], abs=0.05)
    assert found.data["clipped"][2] > found.data["cosine"][2] + 0.15


def test_draws_without_a_gradient_are_noise_too() -> None:
    found = examine(Noisy(rare_only))
    # The mean is w / 4, and the mean square of a gradient (1 + 2) / 4.
    ratio = (1 / 16) / (3 / 4 - 1 / 16)
    assert found.data["raw"] == expected_count(ratio) == 64
    assert found.data["cosine"][3] == pytest.approx(64 * ratio / (64 * ratio + 1), abs=0.05)
    assert found.data["clipped"] == pytest.approx(found.data["cosine"], abs=0.05)


def test_a_deterministic_defense_costs_nothing() -> None:
    made = subject(Noisy(lambda x, noise: W.expand(len(x), D), stochastic=False))
    found = check(made)
    assert (found.status, recommended_draws(found.data), made.calls) == ("pass", 1, (0, 0))


@pytest.mark.parametrize("votes", [1, 4])
@pytest.mark.parametrize("broken", ["none", "zero", "nan"])
def test_no_gradient_at_all_is_flagged_and_never_an_error(broken: str, votes: int) -> None:
    class Severed(Noisy):
        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            logits = noise.normal("z", shape=(2,), like=x)
            if broken == "none":
                return logits
            if broken == "zero":
                return logits + 0 * x.flatten(1)[:, :2]
            return logits + (0 * x.flatten(1)[:, :2]).sqrt()

    found = examine(Severed(with_ratio(1.0), votes=votes))
    assert found.status == "flag"
    assert "No draw has a gradient" in found.message
    assert found.data["alive"] == 0
    assert recommended_draws(found.data) == LEAST


def test_images_without_a_gradient_do_not_count_as_noise() -> None:
    def some(x: Tensor, noise: Noise) -> Tensor:
        return with_ratio(1.3)(x, noise) * (noise.slots < 5)[:, None]

    found = examine(Noisy(some))
    assert (found.data["alive"], found.data["raw"], found.status) == (5, 4, "pass")
    assert found.samples == (105, 106, 107)


def test_the_loss_of_a_mean_settles_more_slowly_than_the_mean_of_losses() -> None:
    # The mean probability of the class behind is that of the few draws that answer it.
    def shift(x: Tensor, noise: Noise) -> Tensor:
        return 6 * noise.normal("shift", shape=(), like=x)

    made = subject(Noisy(with_ratio(1.0), votes=8, shift=shift))
    voting, single = check(made), examine(Noisy(with_ratio(1.0), shift=shift))
    assert made.calls == (8 * 356, 8 * 356)
    assert single.data["raw"] == 8
    assert voting.data["raw"] is None or voting.data["raw"] > 8
    assert voting.data["cosine"][3] < single.data["cosine"][3]


@pytest.mark.parametrize("votes", [1, 8])
def test_votes_are_clipped_within_the_mean_that_they_make(votes: int) -> None:
    class Even(Noisy):
        """All draws answer 1/2, so that their votes weigh the same: the loss of the mean has the mean gradient."""

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return super().draw(x - x.detach(), noise)

    made = subject(Even(heavy, votes=votes))
    found = check(made)
    assert made.calls == (8 * (356 if votes > 1 else 144),) * 2  # clipping asks for no further gradient
    assert found.data["clipped"][2:] == pytest.approx([0.1 * k / (0.1 * k + 1) for k in DRAWS[2:]], abs=0.1)
    assert found.data["clipped"][3] > found.data["cosine"][3] + 0.3
    assert found.data["clipped_moves"][3] < 0.05 < found.data["moves"][3]
    assert found.data["raw"] is None
    assert recommended_draws(found.data) <= 64


def test_votes_that_agree_need_no_more_draws_than_the_protocol_asks() -> None:
    found = examine(Noisy(with_ratio(1.0), votes=8))
    assert (found.status, found.data["raw"], found.data["count"]) == ("pass", 8, LEAST)


@pytest.mark.parametrize("votes", [1, 4])
@pytest.mark.parametrize("n", [0, 1])
def test_few_images_are_enough_to_run(n: int, votes: int) -> None:
    found = examine(Noisy(with_ratio(1.0), votes=votes), n=n)
    assert found.data["images"] == n


def test_the_same_seed_gives_the_same_finding_and_no_global_generator_moves() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (examine(Noisy(with_ratio(0.3)), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("given", "draws"),
    [
        ({}, LEAST),
        ({"count": 64}, 64),
        ({"count": 1}, 1),
        ({"count": 500}, MOST),
        ({"count": None}, LEAST),
        ({"count": True}, LEAST),
        ({"count": 0}, LEAST),
        ({"count": math.nan}, LEAST),
        ({"count": "64"}, LEAST),
    ],
)
def test_recommended_draws_of_any_data(given: dict[str, object], draws: int) -> None:
    assert recommended_draws(given) == draws


def test_the_count_between_what_was_measured() -> None:
    for ratio in (0.045, 0.07, 0.14, 0.23, 0.3, 0.8, 1.4, 3.0, 9.0):
        assert enough(DRAWS, [closed_form(k * ratio) for k in DRAWS]) == expected_count(ratio)
        assert enough([1], [closed_form(ratio)]) == expected_count(ratio)
    assert enough(DRAWS, [0.0] * 4) == 1
    assert enough(DRAWS, [1.0] * 4) is None
    # 4 draws agreed because they had not met what 64 did.
    assert enough(DRAWS, [0.2, 0.01, 0.01, 0.1]) is None


def test_cosines_and_moves_of_inner_products_are_those_of_the_gradients() -> None:
    gradients = Noise.from_seed(0, 2).normal(shape=(4, 3), like=torch.zeros((), dtype=torch.float64)) + 0.5
    first, second = gradients[:, :2].mean(1), gradients[:, 2:].mean(1)
    products = gram(gradients * 1e30)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return torch.cosine_similarity(a, b, dim=1)

    assert torch.allclose(cosine(products, 2), between(first, second))
    joined = first + second
    assert torch.allclose(moves(products, 2), 1 - (between(first, joined) + between(second, joined)) / 2)
    norms = gradients.norm(dim=2, keepdim=True)
    short = gradients * (norms.median(1, keepdim=True).values / norms).clamp_max(1)
    assert torch.allclose(cosine(clip(products)), cosine(gram(short)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DEFENSES if DEFENSES[name].card.traits.stochastic])
def test_gradients_of_every_registered_defense_say_something(name: str) -> None:
    ids = data.board_ids("digits")[:16]
    x, y = data.load("digits", ids)
    noise = Noise.from_seed(0, ids).child("preflight")
    found = check(Subject(DEFENSES[name].build("digits"), x, y, ids, noise))
    assert found.status == "pass", found.message
    assert LEAST <= recommended_draws(found.data) <= GRID[-1]
