from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.attack import Evaluation, Target
from assay.card import Card, Traits, Votes
from assay.chain import Chain
from assay.defense import Defense, ForeignModule, aggregate
from assay.errors import DefenseError, ThreatViolation
from assay.noise import Noise

Draw = Callable[[Tensor, Noise], Tensor]


class Made(Defense):
    """A defense made of a function, three classes; remembers the sizes of its calls."""

    def __init__(self, draw: Draw, *, votes: Votes | None = None, **card: Any) -> None:
        super().__init__()
        self.card = Card(name="made", title="Made", summary="A test's.", votes=votes or Votes(), **card)
        self.n_classes = 3
        self.sizes: list[int] = []
        self._draw = draw

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        assert len(x) == len(noise)
        self.sizes.append(len(x))
        return self._draw(x, noise)

    def chain(self) -> Chain:
        return Chain(lambda x, noise: x, [])


WEIGHT = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain(x: Tensor, noise: Noise) -> Tensor:
    return (x.flatten(1) @ WEIGHT.to(x.dtype)).tanh()


def noisy(x: Tensor, noise: Noise) -> Tensor:
    return plain(x + 0.1 * noise.normal("x", shape=x.shape[1:], like=x), noise)


def batch(n: int) -> tuple[Tensor, Tensor, Noise]:
    x = torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(n) % 3, Noise.from_seed(0, n)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


def same(a: Evaluation, b: Evaluation) -> None:
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.gradient, b.gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-12)


def test_calls_are_charged_to_the_samples_that_caused_them() -> None:
    told: list[int] = []
    target = Target(Made(noisy), 5, on_calls=told.append)
    x, y, noise = batch(5)
    target.draws(x, noise)
    target.draws(x[1:3], noise[1:3], 4)
    rows = torch.tensor([4, 0])
    target.gradient(x[rows], (y[rows],), cross_entropy, noise[rows], draws=3)
    assert target.calls.forward.tolist() == [1 + 3, 1 + 4, 1 + 4, 1, 1 + 3]
    assert target.calls.backward.tolist() == [3, 0, 0, 0, 3]
    assert sum(told) == int(target.calls.forward.sum())


def test_a_vote_costs_its_draws() -> None:
    defense = Made(noisy, votes=Votes(draws=7))
    target = Target(defense, 2)
    x, _, noise = batch(2)
    target.answer(x, noise, repeats=3)
    assert target.calls.forward.tolist() == [21, 21]
    assert defense.sizes == [42]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("draws", [1, 4])
def test_chunks_change_nothing(rows: int, draws: int) -> None:
    x, y, noise = batch(6)
    whole, chunked = Target(Made(noisy), 6), Target(Made(noisy), 6, rows=rows)
    torch.testing.assert_close(chunked.draws(x, noise, draws), whole.draws(x, noise, draws), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        chunked.answer(x, noise, repeats=2), whole.answer(x, noise, repeats=2), rtol=0, atol=1e-12
    )
    same(
        chunked.gradient(x, (y,), cross_entropy, noise, draws=draws),
        whole.gradient(x, (y,), cross_entropy, noise, draws=draws),
    )
    assert torch.equal(chunked.calls.forward, whole.calls.forward)
    assert torch.equal(chunked.calls.backward, whole.calls.backward)
    assert isinstance(chunked.defense, Made)
    assert max(chunked.defense.sizes) <= max(rows, draws)


def test_a_subset_of_the_rows_gets_the_same_answers() -> None:
    x, y, noise = batch(6)
    target, rows = Target(Made(noisy), 6), torch.tensor([5, 2])
    torch.testing.assert_close(target.draws(x[rows], noise[rows], 3), target.draws(x, noise, 3)[rows])
    part = target.gradient(x[rows], (y[rows],), cross_entropy, noise[rows], draws=3)
    whole = target.gradient(x, (y,), cross_entropy, noise, draws=3)
    torch.testing.assert_close(part.gradient, whole.gradient[rows])


def test_the_gradient_is_that_of_the_mean_loss_over_draws() -> None:
    x, y, noise = batch(4)
    found = Target(Made(noisy), 4).gradient(x, (y,), cross_entropy, noise, draws=5)
    point = x.clone().requires_grad_()
    logits = noisy(point.repeat_interleave(5, 0), noise.draws(5)).unflatten(0, (4, 5))
    loss = torch.stack([cross_entropy(logits[:, j], y) for j in range(5)]).mean(0)
    (slope,) = torch.autograd.grad(loss.sum(), point)
    same(found, Evaluation(loss.detach(), slope, logits.detach()))


def test_a_voting_defense_is_attacked_through_its_mean_probability() -> None:
    x, y, noise = batch(4)
    found = Target(Made(noisy, votes=Votes(draws=9, how="majority")), 4).gradient(
        x, (y,), cross_entropy, noise, draws=5
    )
    point = x.clone().requires_grad_()
    logits = noisy(point.repeat_interleave(5, 0), noise.draws(5)).unflatten(0, (4, 5))
    loss = -logits.softmax(-1).mean(1).log()[torch.arange(4), y]
    (slope,) = torch.autograd.grad(loss.sum(), point)
    same(found, Evaluation(loss.detach(), slope, logits.detach()))


def test_another_forward_can_be_attacked() -> None:
    x, y, noise = batch(4)
    target = Target(Made(plain), 4)
    other: Draw = lambda x, noise: 2 * plain(x, noise)  # noqa: E731
    torch.testing.assert_close(target.draws(x, noise, forward=other), 2 * target.draws(x, noise))
    found = target.gradient(x, (y,), cross_entropy, noise, forward=other)
    torch.testing.assert_close(found.logits[:, 0], 2 * plain(x, noise))
    assert target.calls.backward.tolist() == [1] * 4


class Cramped:
    """Raises torch's own error for a call of more than `most` rows."""

    def __init__(self, draw: Draw, most: int) -> None:
        self.draw, self.most, self.refused = draw, most, 0

    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        if len(x) > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError(f"{len(x)} rows do not fit")
        return self.draw(x, noise)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_a_call_that_does_not_fit_is_halved_and_the_size_kept(most: int) -> None:
    x, y, noise = batch(16)
    cramped = Cramped(noisy, most)
    target, roomy = Target(Made(cramped), 16), Target(Made(noisy), 16)
    torch.testing.assert_close(target.draws(x, noise), roomy.draws(x, noise), rtol=0, atol=1e-12)
    refused = cramped.refused
    assert refused == math.ceil(math.log2(16 / most))
    same(target.gradient(x, (y,), cross_entropy, noise), roomy.gradient(x, (y,), cross_entropy, noise))
    assert cramped.refused == refused
    assert torch.equal(target.calls.forward, roomy.calls.forward)
    assert torch.equal(target.calls.backward, roomy.calls.backward)


def test_draws_are_halved_with_their_sample() -> None:
    x, y, noise = batch(8)
    target, roomy = Target(Made(Cramped(noisy, 9)), 8), Target(Made(noisy), 8)
    same(
        target.gradient(x, (y,), cross_entropy, noise, draws=4), roomy.gradient(x, (y,), cross_entropy, noise, draws=4)
    )


def test_one_sample_that_does_not_fit_is_the_end() -> None:
    x, y, noise = batch(4)
    target = Target(Made(Cramped(noisy, 0)), 4)
    with pytest.raises(torch.OutOfMemoryError):
        target.draws(x, noise)
    with pytest.raises(torch.OutOfMemoryError):
        target.gradient(x, (y,), cross_entropy, noise, draws=3)


@pytest.mark.parametrize("wrong", [lambda z: z[:, :2], lambda z: z[:-1], lambda z: z[:, None], lambda z: z.sum()])
def test_a_wrong_shape_is_named(wrong: Callable[[Tensor], Tensor]) -> None:
    x, y, noise = batch(4)
    target = Target(Made(lambda x, noise: wrong(plain(x, noise))), 4)
    for call in (lambda: target.draws(x, noise), lambda: target.gradient(x, (y,), cross_entropy, noise)):
        with pytest.raises(DefenseError, match=r"made returned logits of shape .* expected \(4, 3\)") as error:
            call()
        assert error.value.sample_ids == (0, 1, 2, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [2, 100])
def test_an_answer_that_is_not_finite_names_its_samples(bad: float, rows: int) -> None:
    x, y, noise = batch(6)
    x[4:] = 0

    def fragile(x: Tensor, noise: Noise) -> Tensor:
        return torch.where((x.flatten(1).sum(1) == 0)[:, None], bad, plain(x, noise))

    target, rows_of = Target(Made(fragile), 6, rows=rows), torch.tensor([5, 1, 0])
    with pytest.raises(DefenseError, match="not finite") as error:
        target.draws(x[rows_of], noise[rows_of], 2)
    assert error.value.sample_ids == (5,)
    with pytest.raises(DefenseError, match="not finite"):
        target.gradient(x, (y,), cross_entropy, noise)


def test_calls_before_a_crash_are_counted() -> None:
    x, y, noise = batch(6)

    def crash(x: Tensor, noise: Noise) -> Tensor:
        if bool((noise.slots == 4).any()):
            raise KeyError("layer4")
        return noisy(x, noise)

    target = Target(Made(crash), 6, rows=6)
    with pytest.raises(DefenseError):
        target.gradient(x, (y,), cross_entropy, noise, draws=3)
    assert target.calls.forward.tolist() == target.calls.backward.tolist() == [3, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("clip", [False, True])
def test_a_draw_may_write_into_its_input(clip: bool) -> None:
    x, y, noise = batch(3)
    kept = x.clone()
    writes, scales = Made(lambda x, noise: noisy(x.mul_(0.5), noise)), Made(lambda x, noise: noisy(0.5 * x, noise))
    first, second = (
        Target(made, 3).gradient(x, (y,), cross_entropy, noise, draws=4, clip=clip) for made in (writes, scales)
    )
    same(first, second)
    assert torch.equal(x, kept)


def test_a_crash_names_the_error_and_the_samples() -> None:
    def crash(x: Tensor, noise: Noise) -> Tensor:
        raise KeyError("layer4")

    x, _, noise = batch(6)
    with pytest.raises(DefenseError, match=r"made raised KeyError: 'layer4'") as error:
        Target(Made(crash), 6).draws(x[3:5], noise[3:5])
    assert error.value.sample_ids == (3, 4)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_black_box_has_answers_only() -> None:
    x, y, noise = batch(3)
    target = Target(Made(plain, handles=("chain",)), 3, white_box=False)
    assert target.draws(x, noise).shape == (3, 1, 3)
    assert not target.draws(x.requires_grad_(), noise).requires_grad
    with pytest.raises(ThreatViolation, match="gradient"):
        target.gradient(x, (y,), cross_entropy, noise)
    with pytest.raises(ThreatViolation, match="'chain'"):
        target.handle("chain")


def test_only_handles_on_the_card_are_handed_out() -> None:
    target = Target(Made(plain, handles=("chain",)), 3)
    assert isinstance(target.handle("chain")(), Chain)
    with pytest.raises(ThreatViolation, match="no 'stages' handle"):
        target.handle("stages")


@pytest.mark.parametrize(
    "severed",
    [
        lambda x, noise: plain(x.detach(), noise),
        lambda x, noise: plain(x.round(), noise),
        lambda x, noise: plain(x, noise).detach(),
        lambda x, noise: plain(x.detach(), noise).requires_grad_(),
    ],
)
def test_a_severed_graph_has_a_zero_gradient(severed: Draw) -> None:
    x, y, noise = batch(3)
    found = Target(Made(severed), 3).gradient(x, (y,), cross_entropy, noise)
    assert torch.equal(found.gradient, torch.zeros_like(x))
    assert found.loss.isfinite().all()


def test_an_empty_batch_is_answered() -> None:
    x, y, noise = batch(0)
    target = Target(Made(noisy), 0)
    assert target.draws(x, noise, 4).shape == (0, 4, 3)
    assert target.answer(x, noise).shape == (0, 1, 3)
    found = target.gradient(x, (y,), cross_entropy, noise, draws=2)
    assert found.gradient.shape == x.shape
    assert found.logits.shape == (0, 2, 3)


def test_what_was_given_is_not_changed() -> None:
    x, y, noise = batch(3)
    kept = x.clone()
    Target(Made(noisy), 3).gradient(x, (y,), cross_entropy, noise, draws=2)
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert x.grad is None


def shift(x: Tensor, noise: Noise) -> Tensor:
    """A part from images to images: not linear, noisy."""
    return x**2 + 0.1 * noise.normal("shift", shape=x.shape[1:], like=x)


def test_pushed_images_are_those_of_the_draws() -> None:
    x, _, noise = batch(4)
    target = Target(Made(plain), 4)
    rows, folded = x.repeat_interleave(3, 0).requires_grad_(), noise.draws(3)
    pushed = target.push(rows, folded, shift)
    assert pushed.shape == (12, 3, 2, 2)
    assert not pushed.requires_grad
    assert torch.equal(pushed, shift(rows.detach(), folded))
    assert torch.equal(target.push(x, noise, shift), shift(x, noise))
    assert target.calls.forward.tolist() == [3 + 1] * 4
    assert not target.calls.backward.any()


def test_pushed_images_may_have_another_shape() -> None:
    x, _, noise = batch(4)
    assert Target(Made(plain), 4).push(x, noise, lambda x, noise: x[..., :1]).shape == (4, 3, 2, 1)


def test_a_pull_back_is_the_transposed_jacobian() -> None:
    x, _, noise = batch(4)
    target, cotangent = Target(Made(plain), 4), x.flip(0) - 0.5
    torch.testing.assert_close(target.pull_back(x, noise, shift, cotangent), 2 * x * cotangent)
    assert target.calls.forward.tolist() == [1] * 4
    assert target.calls.backward.tolist() == [1] * 4
    severed = target.pull_back(x, noise, lambda x, noise: shift(x.detach(), noise), cotangent)
    assert torch.equal(severed, torch.zeros_like(x))
    unused = target.pull_back(x, noise, lambda x, noise: torch.zeros_like(x).requires_grad_(), cotangent)
    assert torch.equal(unused, torch.zeros_like(x))


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_chunks_change_no_push_and_no_pull_back(rows: int) -> None:
    x, _, noise = batch(6)
    subset = torch.tensor([4, 1, 2])
    target = Target(Made(plain), 6, rows=rows)
    rows_, folded = x.repeat_interleave(3, 0), noise.draws(3)
    torch.testing.assert_close(target.push(rows_, folded, shift), shift(rows_, folded), rtol=0, atol=1e-12)
    torch.testing.assert_close(target.pull_back(x[subset], noise[subset], shift, x[subset]), 2 * x[subset] ** 2)
    assert target.calls.forward.tolist() == [3, 4, 4, 3, 4, 3]
    assert target.calls.backward.tolist() == [0, 1, 1, 0, 1, 0]


def test_parts_that_do_not_fit_are_halved() -> None:
    x, _, noise = batch(8)
    target, roomy = Target(Made(plain), 8), Target(Made(plain), 8)
    rows, folded = x.repeat_interleave(2, 0), noise.draws(2)
    assert torch.equal(target.push(rows, folded, Cramped(shift, 3)), roomy.push(rows, folded, shift))
    torch.testing.assert_close(target.pull_back(x, noise, Cramped(shift, 1), x), 2 * x**2)
    assert target.calls.forward.tolist() == [3] * 8


def test_a_part_that_crashes_is_the_defenses_fault() -> None:
    def crash(x: Tensor, noise: Noise) -> Tensor:
        raise KeyError("unet")

    x, _, noise = batch(6)
    target = Target(Made(plain), 6)
    for call in (lambda: target.push(x, noise, crash), lambda: target.pull_back(x, noise, crash, x)):
        with pytest.raises(DefenseError, match=r"made raised KeyError: 'unet'"):
            call()


def test_a_black_box_hands_out_no_parts() -> None:
    x, _, noise = batch(3)
    target = Target(Made(plain), 3, white_box=False)
    with pytest.raises(ThreatViolation, match="gradient"):
        target.push(x, noise, shift)
    with pytest.raises(ThreatViolation, match="gradient"):
        target.pull_back(x, noise, shift, x)


def test_no_rows_are_pushed_and_pulled_back() -> None:
    x, _, noise = batch(0)
    target = Target(Made(plain), 0)
    assert target.push(x, noise, shift).shape == x.shape
    assert target.pull_back(x, noise, shift, x).shape == x.shape


def test_what_a_forward_computes_beside_its_answer_is_charged_by_row() -> None:
    told: list[int] = []
    target, noise = Target(Made(plain), 4, on_calls=told.append), Noise.from_seed(0, 4)
    target.charge(noise[torch.tensor([3, 1])].draws(5))
    assert target.calls.forward.tolist() == [0, 5, 0, 5]
    assert not target.calls.backward.any()
    assert told == [10]


@pytest.mark.parametrize("votes", [Votes(), Votes(draws=9, how="majority")], ids=["plain", "voting"])
@pytest.mark.parametrize("rows", [2, 100])
def test_a_bonus_is_added_to_the_loss_and_its_gradient(votes: Votes, rows: int) -> None:
    x, y, noise = batch(4)

    def rewarded(z: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        jitter = noise.uniform("bonus", shape=(), like=z)
        return noisy(z, noise), (1 + jitter) * (z**2).flatten(1).sum(1)

    target = Target(Made(noisy, votes=votes), 4, rows=rows)
    found = target.gradient(x, (y,), cross_entropy, noise, draws=5, forward=rewarded)
    without = target.gradient(x, (y,), cross_entropy, noise, draws=5)
    share = 1 + noise.draws(5).uniform("bonus", shape=(), like=x).view(4, 5).mean(1)
    same(
        found,
        Evaluation(
            without.loss + share * (x**2).flatten(1).sum(1),
            without.gradient + share[:, None, None, None] * 2 * x,
            without.logits,
        ),
    )
    torch.testing.assert_close(target.draws(x, noise, 5, forward=rewarded), without.logits)  # a look has no bonus


LOGITS = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 5.0]]], dtype=torch.float64)


def test_votes_by_majority_are_log_shares() -> None:
    answer = aggregate(LOGITS, Votes(draws=4, how="majority"))
    torch.testing.assert_close(answer.exp(), torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    nobody = aggregate(LOGITS[:, :1], Votes(draws=1, how="majority"))
    torch.testing.assert_close(nobody.exp(), torch.tensor([[1.0, 0.5, 0.5]], dtype=torch.float64))


def test_votes_by_probability_are_the_mean_probability() -> None:
    answer = aggregate(LOGITS, Votes(draws=4, how="probabilities"))
    torch.testing.assert_close(answer.exp(), LOGITS.softmax(-1).mean(1))


def test_votes_by_logits_are_the_mean() -> None:
    torch.testing.assert_close(aggregate(LOGITS, Votes(draws=4)), LOGITS.mean(1))


@pytest.mark.parametrize("how", ["logits", "probabilities", "majority"])
def test_an_answer_is_the_aggregate_of_its_draws(how: Any) -> None:
    x, _, noise = batch(3)
    votes = Votes(draws=5, how=how)
    target = Target(Made(noisy, votes=votes), 3)
    torch.testing.assert_close(target.answer(x, noise)[:, 0], aggregate(target.draws(x, noise, 5), votes))


class Dicey(nn.Module):
    """Draws from torch's global generator, as foreign defenses do."""

    def forward(self, x: Tensor) -> Tensor:
        return plain(x + torch.randn_like(x), Noise.from_seed(0, len(x)))


def test_a_foreign_module_draws_from_the_noise_and_leaves_the_generator_alone() -> None:
    card = Card(name="dicey", title="Dicey", summary="A test's.", traits=Traits(stochastic=True))
    defense, (x, _, noise) = ForeignModule(Dicey(), card, 3), batch(4)
    before = torch.get_rng_state()
    first = defense(x, noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(defense(x, noise), first)
    assert not torch.equal(defense(x, noise.child("other")), first)


def test_a_defense_is_never_asked_about_no_image() -> None:
    """Much code reshapes to `(n, -1)`, which nobody can do to an empty batch."""
    defense = Made(lambda x, noise: plain(x.reshape(x.size(0), -1), noise))
    x, y, noise = batch(4)
    target = Target(defense, 4)
    leaf = x[:0].clone().requires_grad_()
    graph = target.forward_graph(leaf, noise[:0])
    assert target.answer(x[:0], noise[:0]).shape == (0, 1, 3)
    assert target.gradient(x[:0], (y[:0],), cross_entropy, noise[:0]).gradient.shape == (0, 3, 2, 2)
    assert graph.shape == (0, 3)
    assert torch.autograd.grad(graph.sum(), leaf)[0].shape == (0, 3, 2, 2)
    assert defense.sizes == []
