from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from assay.noise import Noise

F32 = torch.zeros((), dtype=torch.float32)
F64 = torch.zeros((), dtype=torch.float64)
Sample = Callable[[Noise], Tensor]

SAMPLES: dict[str, Sample] = {
    "normal": lambda noise: noise.normal("tag", shape=(2, 5), like=F32),
    "uniform": lambda noise: noise.uniform("tag", shape=(2, 5), like=F32),
    "integers": lambda noise: noise.integers("tag", shape=(2, 5), high=1000, like=F32),
    "child": lambda noise: noise.child("inner", 3).normal(shape=(5,), like=F64),
}
GOLDEN_KEYS = [-7630914146075767618, 2312875286860545645, 3173208664545989076, -6427214774328439252]
GOLDEN_UNIFORM = [0.3308425915184122, 0.016517304864592353, 0.3479851523399353, 0.8296150531934993]
GOLDEN_NORMAL = [-0.7573684268733756, -1.6005818813561474, -2.394956902032905, -1.9559512479130605]
GOLDEN_INTEGERS = [645, 466, 173, 550]
GOLDEN_SEED = 5623924989341575472

samples = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


@samples
def test_a_stream_can_be_replayed(sample: Sample) -> None:
    noise = Noise.from_seed(7, 4)
    first = sample(noise)
    sample(noise.child("in between"))
    assert torch.equal(sample(noise), first)
    assert torch.equal(sample(Noise.from_seed(7, 4)), first)


@samples
def test_a_subset_of_the_rows_sees_what_it_saw_in_the_batch(sample: Sample) -> None:
    noise = Noise.from_seed(7, 6)
    whole = sample(noise)
    index, mask = torch.tensor([5, 0, 3]), torch.tensor([True, False, False, True, True, False])
    assert torch.equal(sample(noise[index]), whole[index])
    assert torch.equal(sample(noise[mask]), whole[mask])
    assert torch.equal(sample(noise[2:4]), whole[2:4])
    assert torch.equal(sample(noise[mask][1:]), whole[mask][1:])
    assert len(sample(noise[:0])) == 0


@samples
def test_rows_belong_to_identities_not_to_positions(sample: Sample) -> None:
    ids = [30, 2, 11]
    assert torch.equal(sample(Noise.from_seed(1, ids)), sample(Noise.from_seed(1, 31))[ids])


@samples
@given(n=st.integers(1, 4), few=st.integers(1, 5), more=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_more_draws_begin_with_the_fewer(sample: Sample, n: int, few: int, more: int) -> None:
    noise = Noise.from_seed(3, n)
    short = sample(noise.draws(few)).unflatten(0, (n, few))
    long = sample(noise.draws(few + more)).unflatten(0, (n, few + more))
    assert torch.equal(long[:, :few], short)


@samples
def test_draws_of_a_subset_are_the_subset_of_the_draws(sample: Sample) -> None:
    noise, rows = Noise.from_seed(3, 5), torch.tensor([4, 1])
    whole = sample(noise.draws(3)).unflatten(0, (5, 3))
    assert torch.equal(sample(noise[rows].draws(3)).unflatten(0, (2, 3)), whole[rows])


def test_slots_survive_subsetting_folding_and_children() -> None:
    noise = Noise.from_seed(0, [70, 80, 90])
    assert noise.slots.tolist() == [0, 1, 2]
    assert noise[torch.tensor([2, 0])].child("a").draws(2).slots.tolist() == [2, 2, 0, 0]


@samples
def test_seed_tag_row_and_draw_each_make_another_stream(sample: Sample) -> None:
    noise = Noise.from_seed(0, 2)
    others = [
        Noise.from_seed(1, 2),
        noise.child(),
        noise.child("a"),
        noise.child("b"),
        noise.child("a", "b"),
        noise.child("a").child("b"),
        noise.child(1),
        noise.child("1"),
        noise.draws(2)[::2],
        noise.draws(2)[1::2],
    ]
    values = [sample(each) for each in (noise, *others)]
    rows = torch.cat(values).flatten(1).double()
    assert len(rows.unique(dim=0)) == len(rows)


def test_kinds_of_values_do_not_share_bits() -> None:
    noise = Noise.from_seed(0, 1)
    uniform = noise.uniform("normal", "x", shape=(4,), like=F64)
    again = noise.uniform("x", shape=(4,), like=F64)
    radius = noise.normal("x", shape=(8,), like=F64).reshape(4, 2).norm(dim=1)
    for values in (uniform, again):
        assert not torch.allclose((-2 * values.log()).sqrt(), radius.reshape(1, 4), atol=1e-4)


def test_values_are_pinned_for_ever() -> None:
    """Records are replayed from their seeds: a change of these numbers is a change of every record."""
    noise = Noise.from_seed(2026, [3, 5]).child("golden", 1).draws(2)
    assert noise.keys.tolist() == GOLDEN_KEYS
    assert noise.uniform("u", shape=(1,), like=F64).flatten().tolist() == GOLDEN_UNIFORM
    assert noise.normal("n", shape=(1,), like=F64).flatten().tolist() == pytest.approx(GOLDEN_NORMAL, rel=1e-12)
    assert noise.integers("i", shape=(1,), high=1000, like=F64).flatten().tolist() == GOLDEN_INTEGERS
    assert noise.seed() == GOLDEN_SEED


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    for sample in SAMPLES.values():
        sample(Noise.from_seed(0, 3).draws(2))
    Noise.from_seed(0, 3).seed()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    first = [sample(Noise.from_seed(0, 3)) for sample in SAMPLES.values()]
    torch.manual_seed(2)
    second = [sample(Noise.from_seed(0, 3)) for sample in SAMPLES.values()]
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("like", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(200_000,), (1,)], ids=["along one row", "across rows"])
def test_the_distributions_are_what_they_are_called(like: Tensor, shape: tuple[int, ...]) -> None:
    noise = Noise.from_seed(11, 200_000 // shape[0])
    normal = noise.normal("ks", shape=shape, like=like).flatten().double().numpy()
    uniform = noise.uniform("ks", shape=shape, like=like).flatten().double().numpy()
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert 0 <= uniform.min() <= uniform.max() < 1
    n = len(normal)
    # mean, variance, skewness, kurtosis, each within 4 standard errors
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normal**power).mean() - moment) < 4 * math.sqrt(variance / n)
    assert 4.0 < abs(normal).max() < 6.8


@pytest.mark.parametrize("high", [2, 7, 10, 1000])
def test_integers_are_even(high: int) -> None:
    values = Noise.from_seed(5, 100).integers("chi", shape=(1000,), high=high, like=F32)
    counts = torch.bincount(values.flatten(), minlength=high)
    assert len(counts) == high
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("high", [0, -3, 1 << 31])
def test_integers_below_nothing_are_refused(high: int) -> None:
    with pytest.raises(ValueError, match="high"):
        Noise.from_seed(0, 1).integers(shape=(1,), high=high, like=F32)


def test_integers_below_one_are_zero() -> None:
    assert Noise.from_seed(0, 3).integers(shape=(4,), high=1, like=F32).abs().sum() == 0


def test_streams_are_uncorrelated() -> None:
    size = 100_000
    noise = Noise.from_seed(0, 8)
    streams = [
        *noise.normal("a", shape=(size,), like=F64),
        *noise.normal("b", shape=(size,), like=F64)[:2],
        *noise.child("a").normal("a", shape=(size,), like=F64)[:2],
        *noise[:2].draws(2).normal("a", shape=(size,), like=F64),
        *Noise.from_seed(1, 2).normal("a", shape=(size,), like=F64),
        noise.normal("a", shape=(size,), like=F64)[0].roll(1),
        noise.normal("a", shape=(size,), like=F64)[0].roll(2),
    ]
    values = torch.stack(streams)
    for transformed in (values, values**2 - 1, values.abs() - math.sqrt(2 / math.pi)):
        correlation = torch.corrcoef(transformed).fill_diagonal_(0)
        assert correlation.abs().max() < 5 / math.sqrt(size)


def test_neighbouring_rows_are_uncorrelated() -> None:
    values = Noise.from_seed(0, 100_000).normal("a", shape=(2,), like=F64)
    columns = torch.stack([values[:-1, 0], values[1:, 0], values[:-1, 1], values[1:, 1]])
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 5 / math.sqrt(len(values))


def test_precisions_agree() -> None:
    noise = Noise.from_seed(0, 50)
    for values in (noise.normal, noise.uniform):
        low, high = values("p", shape=(1000,), like=F32), values("p", shape=(1000,), like=F64)
        assert low.dtype == torch.float32
        assert high.dtype == torch.float64
        # float32's logarithm is coarse next to a radius of 0, so a few normal values differ visibly.
        assert (low.double() - high).abs().max() < 1e-3
        assert (low.double() - high).abs().mean() < 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    noise = Noise.from_seed(0, 4)
    assert noise.normal(shape=shape, like=F32).shape == (4, *shape)
    assert noise.uniform(shape=shape, like=F32).shape == (4, *shape)
    assert noise.integers(shape=shape, high=3, like=F32).shape == (4, *shape)


def test_a_longer_value_begins_with_the_shorter() -> None:
    noise = Noise.from_seed(0, 4)
    assert torch.equal(noise.normal(shape=(9,), like=F32)[:, :5], noise.normal(shape=(5,), like=F32))


def test_a_foreign_seed_depends_on_every_row_and_on_the_tag() -> None:
    noise = Noise.from_seed(0, 4)
    seeds = {
        noise.seed(),
        noise[1:].seed(),
        noise[:3].seed(),
        noise[torch.tensor([1, 0, 2, 3])].seed(),
        noise.child("a").seed(),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)
