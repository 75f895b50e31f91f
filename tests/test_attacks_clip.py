"""Draws whose gradients are cut to their sample's median length, against values computed by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.attack import Evaluation, Target
from assay.card import Card, Traits, Votes
from assay.chain import Chain
from assay.defense import Defense, Stages
from assay.noise import Noise
from assay.registry import ATTACKS
from assay.target import shortened
from assay.threat import ThreatModel

N, D, DRAWS = 3, 16, 7
SHAPE = (1, 4, 4)
CLIPPING: Mapping[str, dict[str, Any]] = {
    "pgd": {},
    "apgd": {},
    "bpda": {},
    "through_chain": {},
    "surrogate": {"chain_steps": 1},
    "step_losses": {"weight": 0.0},
}
"""The attacks that offer `clip`, and what else makes them differentiate `Steep` alone."""

Slope = Callable[[Noise, Tensor], Tensor]


class _Bent(torch.autograd.Function):
    """The identity, whose gradient is multiplied row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return slope * factor[:, None], None


class Steep(Defense):
    """Two classes with logits `(0, g · x)`, where a draw's `slope` makes g, `(n, d)`; `bend` spoils its gradient."""

    def __init__(self, slope: Slope, *, bend: Slope | None = None, votes: int = 1, stochastic: bool = True) -> None:
        super().__init__()
        self.card = Card(
            name="steep",
            title="Steep",
            summary="",
            traits=Traits(stochastic=stochastic, iterative=True),
            votes=Votes(draws=votes, how="probabilities"),
            handles=("stages", "chain", "surrogate"),
        )
        self.n_classes = 2
        self.slope, self.bend = slope, bend

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        flat = x.flatten(1)
        if self.bend is not None:
            flat = _Bent.apply(flat, self.bend(noise, x))
        logit = (self.slope(noise, x) * flat).sum(1)
        return torch.stack([torch.zeros_like(logit), logit], 1)

    def chain(self) -> Chain:
        keep, read = (lambda state, x, noise: state), (lambda state, x, noise: self.draw(state, noise))
        return Chain(lambda x, noise: x, [keep], read)

    def surrogate(self, steps: int) -> Chain:
        return self.chain()

    def stages(self) -> Stages:
        return Stages(lambda x, noise: x.clone(), self.draw)


def directions(noise: Noise, like: Tensor) -> Tensor:
    g = noise.normal("g", shape=(D,), like=like)
    return g / g.norm(dim=1, keepdim=True)


def tailed(noise: Noise, like: Tensor) -> Tensor:
    """Lengths from 1e-3 to 1e3."""
    return directions(noise, like) * 10 ** (6 * noise.uniform("size", shape=(1,), like=like) - 3)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Noise]:
    noise = Noise.from_seed(0, N)
    return noise.uniform("x", shape=SHAPE, like=torch.zeros((), dtype=dtype)), torch.tensor([0, 1, 0]), noise


def rise(logits: Tensor, y: Tensor) -> Tensor:
    """The wrong logit above the right one: the gradient of a draw is g for class 0, −g for class 1."""
    return (logits[:, 1] - logits[:, 0]) * (1 - 2 * y)


def log_loss(logits: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")


def by_hand(parts: Tensor) -> Tensor:
    """Parts `(n, draws, d)`, each cut to the lower median length of the living, summed."""
    total = torch.zeros_like(parts[:, 0])
    for i, sample in enumerate(parts):
        lengths = [math.sqrt(sum(float(value) ** 2 for value in part)) for part in sample]
        alive = [length for length in lengths if math.isfinite(length) and length > 0]
        for part, length in zip(sample, lengths, strict=True):
            if length in alive:
                total[i] += part * min(1.0, statistics.median_low(alive) / length)
    return total


def found(defense: Defense, clip: bool, loss: Any = rise, draws: int = DRAWS, rows: int | None = None) -> Evaluation:
    x, y, noise = batch()
    return Target(defense, N, rows=rows).gradient(x, (y,), loss, noise, draws=draws, clip=clip)


def slopes(defense: Steep) -> Tensor:
    """Every draw's gradient of `rise`, `(n, draws, d)`."""
    x, y, noise = batch()
    g = defense.slope(noise.draws(DRAWS), x).unflatten(0, (N, DRAWS))
    return g * (1 - 2 * y)[:, None, None]


@pytest.mark.parametrize("rows", [None, 1, 2 * DRAWS])
def test_the_mean_of_clipped_draws_is_the_one_computed_by_hand(rows: int | None) -> None:
    defense = Steep(tailed)
    made, plain = found(defense, True, rows=rows), found(defense, False)
    torch.testing.assert_close(made.gradient.flatten(1), by_hand(slopes(defense)) / DRAWS, rtol=1e-9, atol=1e-12)
    assert torch.equal(made.loss, plain.loss)
    assert torch.equal(made.logits, plain.logits)
    assert made.unclipped is not None
    torch.testing.assert_close(made.unclipped, plain.gradient, rtol=1e-9, atol=1e-12)
    assert plain.unclipped is None
    # A thousandth of the range of lengths is left.
    assert (made.gradient.flatten(1).norm(dim=1) < plain.gradient.flatten(1).norm(dim=1) / 2).all()


def test_the_votes_are_clipped_by_their_share_in_the_loss_of_the_mean() -> None:
    defense = Steep(tailed, votes=9)
    made, plain = found(defense, True, log_loss), found(defense, False, log_loss)
    # −log mean_j p_j has the derivative −(p_j / Σ p) · (1 − p_j) · ∂(margin of the right class) by copy j.
    _, y, _ = batch()
    right = plain.logits.softmax(-1)[torch.arange(N)[:, None], torch.arange(DRAWS), y[:, None]]
    parts = (right / right.sum(1, keepdim=True) * (1 - right))[:, :, None] * slopes(defense)
    torch.testing.assert_close(plain.gradient.flatten(1), parts.sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(made.gradient.flatten(1), by_hand(parts), rtol=1e-9, atol=1e-12)


def alike(noise: Noise, like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, D, dtype=like.dtype).expand(len(noise), D)


@pytest.mark.parametrize(("votes", "slope"), [(1, directions), (1, alike), (9, alike)])
def test_draws_of_one_length_are_left_alone(votes: int, slope: Slope) -> None:
    defense = Steep(slope, votes=votes)
    torch.testing.assert_close(found(defense, True).gradient, found(defense, False).gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("votes", [1, 9])
def test_a_draw_whose_gradient_is_not_finite_counts_as_zero(bad: float, votes: int) -> None:
    def bend(noise: Noise, like: Tensor) -> Tensor:
        spoilt = noise.uniform("spoilt", shape=(), like=like) < 0.3
        return torch.where(spoilt, bad, 1.0)

    x, _, noise = batch()
    spoilt = ~bend(noise.draws(DRAWS), x).isfinite().view(N, DRAWS)
    assert spoilt.any()
    assert not spoilt.all(1).any()
    defense = Steep(directions, bend=bend)
    assert not found(defense, False).gradient.isfinite().all()
    made = found(defense, True).gradient
    expected = slopes(defense).masked_fill(spoilt[:, :, None], 0).sum(1) / DRAWS
    torch.testing.assert_close(made.flatten(1), expected)
    assert found(Steep(directions, bend=bend, votes=votes), True).gradient.isfinite().all()


def test_draws_without_a_gradient_have_no_say_in_the_median() -> None:
    def bend(noise: Noise, like: Tensor) -> Tensor:
        return (noise.uniform("alive", shape=(), like=like) < 0.4).to(like.dtype)

    x, _, noise = batch()
    alive = bend(noise.draws(DRAWS), x).view(N, DRAWS, 1)
    defense = Steep(tailed, bend=bend)
    expected = by_hand(slopes(defense) * alive) / DRAWS
    torch.testing.assert_close(found(defense, True).gradient.flatten(1), expected, rtol=1e-9, atol=1e-12)
    assert (alive.sum(1) < DRAWS / 2).any()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_lengths_neither_over_nor_underflow(scale: float) -> None:
    parts = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [0.3, 0.4], [0.0, 0.0]]])
    expected = torch.tensor([[[0.6, 0.8], [0.0, 1.0], [0.3, 0.4], [0.0, 0.0]]])
    torch.testing.assert_close(shortened(parts * scale) / scale, expected)


def test_no_gradient_and_no_rows_are_no_error() -> None:
    for parts in (torch.zeros(2, 5, 1, 2, 2), torch.full((2, 5, 1, 2, 2), math.nan)):
        assert torch.equal(shortened(parts), torch.zeros(2, 5, 1, 2, 2))
    assert shortened(torch.zeros(0, 5, 1, 2, 2)).shape == (0, 5, 1, 2, 2)
    x, y, noise = batch()
    severed = Target(Steep(directions), N).gradient(
        x, (y,), rise, noise, draws=3, clip=True, forward=lambda z, noise: torch.zeros(len(z), 2, dtype=z.dtype)
    )
    assert torch.equal(severed.gradient, torch.zeros_like(x))
    empty = Target(Steep(directions), N).gradient(x[:0], (y[:0],), rise, noise[:0], draws=3, clip=True)
    assert empty.gradient.shape == (0, *SHAPE)


def test_clipping_costs_no_call_and_one_draw_is_never_clipped() -> None:
    x, y, noise = batch()
    target, sizes = Target(Steep(tailed), N), []
    target.defense.register_forward_hook(lambda *_: sizes.append(1))
    made = target.gradient(x, (y,), rise, noise, draws=DRAWS, clip=True)
    assert target.calls.forward.tolist() == target.calls.backward.tolist() == [DRAWS] * N
    single, plain = found(Steep(tailed), True, draws=1), found(Steep(tailed), False, draws=1)
    assert torch.equal(single.gradient, plain.gradient)
    assert single.unclipped is None
    assert not made.gradient.requires_grad


def test_a_bonus_is_clipped_with_the_draw_that_earns_it() -> None:
    defense = Steep(tailed)

    def rewarded(z: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        return defense.draw(z, noise), z.flatten(1).sum(1)

    x, y, noise = batch()
    made = Target(defense, N).gradient(x, (y,), rise, noise, draws=DRAWS, forward=rewarded, clip=True)
    torch.testing.assert_close(made.gradient.flatten(1), by_hand(slopes(defense) + 1) / DRAWS, rtol=1e-9, atol=1e-12)


class Watched(Target):
    """Remembers how it was asked for gradients."""

    asked: list[tuple[int, bool]]

    def gradient(self, *given: Any, **options: Any) -> Evaluation:
        self.asked = [*getattr(self, "asked", []), (options["draws"], options["clip"])]
        return super().gradient(*given, **options)


def run(name: str, target: Target, **options: Any) -> Tensor:
    x, y, noise = batch()
    threat = ThreatModel("l2", "1/1000")  # type: ignore[arg-type]
    z: Tensor = ATTACKS[name].attack(target, x, y, threat, noise, loss="margin", **CLIPPING[name], **options)
    return z


@pytest.mark.parametrize("name", CLIPPING)
def test_every_attack_passes_the_option_on(name: str) -> None:
    target, plain = Watched(Steep(tailed), N), Watched(Steep(tailed), N)
    run(name, target, steps=2, eot=4, clip=True)
    run(name, plain, steps=2, eot=4, clip=False)
    assert target.asked == [(4, True)] * 2
    assert plain.asked == [(4, False)] * 2
    assert torch.equal(target.calls.forward, plain.calls.forward)


@pytest.mark.parametrize("name", CLIPPING)
def test_a_deterministic_defense_is_attacked_as_without(name: str) -> None:
    defense = Steep(alike, stochastic=False)
    first, second = (run(name, Target(defense, N), steps=4, eot=4, clip=clip) for clip in (True, False))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_rare_huge_draws_do_not_rule_the_ascent(name: str) -> None:
    """One draw in five is a thousand times as steep and says nothing; the rest agree on w."""
    w = torch.linspace(-1, 2, D, dtype=torch.float64)
    w = w / w.norm()

    def slope(noise: Noise, like: Tensor) -> Tensor:
        rare = noise.uniform("rare", shape=(1,), like=like) < 0.2
        return torch.where(rare, 1000 * directions(noise, like), w + 0.1 * directions(noise, like))

    x, _, noise = batch()
    y, threat = torch.zeros(N, dtype=torch.int64), ThreatModel("l2", "1/100")  # type: ignore[arg-type]
    calm = Steep(lambda noise, like: w.expand(len(noise), D)).draw

    def gain(clip: bool) -> Tensor:
        z = ATTACKS[name].attack(
            Target(Steep(slope), N), x, y, threat, noise, steps=12, eot=20, clip=clip, judge=calm, stop=False
        )
        gained: Tensor = (z - x).flatten(1) @ w / float(threat.eps)
        return gained

    assert gain(True).mean() > gain(False).mean() + 0.2
    assert gain(True).mean() > 0.8
