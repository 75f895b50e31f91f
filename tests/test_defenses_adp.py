"""ADP: its step against closed forms, its process, its runs, its gradient, and what it does on the digits."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from assay import data
from assay.card import Aggregation, Votes
from assay.chain import Chain
from assay.defense import Defense, aggregate
from assay.defenses.adp import ADP_ENERGY, CARD, SPEC, AdaptivePurification, AdaptivePurifier, step_size
from assay.defenses.denoiser import EnergyDenoiser
from assay.defenses.mixture import MixtureDenoiser
from assay.errors import InputError
from assay.noise import Noise

MU, STD, LEVEL = 0.2, 0.6, 0.5
SHAPE = (1, 4, 4)
# One Gaussian has the score −(x − μ)/(s² + σ²): in pixels, with both lengths halved, −(x − m)/v.
CENTRE, VARIANCE = (MU + 1) / 2, (STD**2 + LEVEL**2) / 4


def gaussian(std: float = STD) -> MixtureDenoiser:
    one = torch.ones(1, dtype=torch.float64)
    return MixtureDenoiser(one, torch.full((1, *SHAPE), MU, dtype=torch.float64), std * one)


def two_images() -> MixtureDenoiser:
    means = torch.stack([torch.full(SHAPE, -0.4), torch.full(SHAPE, 0.4)]).double()
    return MixtureDenoiser(torch.full((2,), 0.5).double(), means, torch.full((2,), 0.3).double())


def images(n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return low + (high - low) * x


def linear() -> nn.Module:
    layer = nn.Linear(16, 3).double()
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer.weight.data, layer.bias.data = weight, torch.zeros(3, dtype=torch.float64)
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


def gradient(chain: Chain, x: Tensor, noise: Noise, mode: str) -> Tensor:
    point = x.clone().requires_grad_()
    logits = chain(point, noise, mode="full" if mode == "full" else "exact")
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), point)
    return slope


def test_the_score_is_in_pixel_units() -> None:
    x = images(3)
    assert torch.allclose(AdaptivePurifier(gaussian(), LEVEL, 1).score(x), -(x - CENTRE) / VARIANCE, atol=1e-12)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.05, 0.05 * VARIANCE), (1.0, 0.1), (1e-6, 1e-5)],
    ids=["inside the bounds", "the upper bound", "the lower bound"],
)
def test_alpha_on_a_gaussian_is_the_rate_times_its_variance(rate: float, expected: float) -> None:
    # g' = g·(1 − η/v), so that z = 1 − η/v and α = λ·v, whatever x is.
    purifier, x = AdaptivePurifier(gaussian(), LEVEL, 1), images(5)
    g = purifier.score(x)
    alpha = step_size(g, purifier.score(x + 1e-3 * g), 1e-3, rate, (1e-5, 0.1))
    assert torch.allclose(alpha, torch.full((5,), expected).double(), rtol=1e-9)


def test_alpha_is_the_formula_for_any_pair_of_scores() -> None:
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(50, *SHAPE, generator=generator, dtype=torch.float64)
    ahead = g + 1e-3 * torch.randn(50, *SHAPE, generator=generator, dtype=torch.float64)
    z = (g * ahead).flatten(1).sum(1) / (g * g).flatten(1).sum(1)
    # Numbers on both sides of z = 1, where the formula's sign changes.
    assert 0 < int((z > 1).sum()) < 50
    expected = (0.05 * 1e-3 / (1 - z)).clamp(1e-5, 0.1)
    assert torch.allclose(step_size(g, ahead, 1e-3, 0.05, (1e-5, 0.1)), expected, rtol=1e-6)


def test_alpha_and_its_gradient_are_finite_where_the_formula_is_not() -> None:
    straight = torch.ones(1, *SHAPE, requires_grad=True)
    nothing = torch.zeros(1, *SHAPE, requires_grad=True)
    for g, expected in ((straight, 0.1), (nothing, 1e-5)):  # z = 1, and 0/0
        alpha = step_size(g, g * 1.0, 1e-3, 0.05, (1e-5, 0.1))
        assert alpha.tolist() == [pytest.approx(expected)]
        if alpha.requires_grad:
            (slope,) = torch.autograd.grad(alpha.sum(), g, allow_unused=True)
            assert slope is None or bool(slope.isfinite().all())


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_gaussian_is_contracted_to_its_mean_by_the_rate_a_step(steps: int) -> None:
    purifier = AdaptivePurifier(gaussian(), LEVEL, steps, randomized=False, rate=0.3, bounds=(1e-5, 1.0))
    x = images(4)
    purified = purifier.chain()(x, Noise.from_seed(0, 4))
    assert torch.allclose(purified, CENTRE + 0.7**steps * (x - CENTRE), atol=1e-9)


def test_the_image_is_noised_and_clipped_before_the_first_step() -> None:
    noise, x = Noise.from_seed(0, 4000), torch.full((4000, *SHAPE), 0.1).double()
    noised = AdaptivePurifier(gaussian(), LEVEL, 1).start(x, noise)
    assert float(noised.min()) == 0
    assert float(noised.max()) <= 1
    # P(.1 + .25 z < 0) = Φ(−.4); 64,000 values deviate by .002.
    assert float((noised == 0).double().mean()) == pytest.approx(0.5 * math.erfc(0.4 / 2**0.5), abs=0.01)
    assert torch.equal(noised, (x + 0.25 * noise.normal("z", shape=SHAPE, like=x)).clamp(0, 1))


def test_the_deterministic_form_has_no_noise() -> None:
    chain = AdaptivePurifier(two_images(), LEVEL, 4, randomized=False).chain()
    x = images(3)
    assert torch.equal(chain(x, Noise.from_seed(0, 3)), chain(x, Noise.from_seed(1, 3)))
    randomized = AdaptivePurifier(two_images(), LEVEL, 4).chain()
    assert not torch.equal(randomized(x, Noise.from_seed(0, 3)), randomized(x, Noise.from_seed(1, 3)))


def test_a_sample_whose_step_is_too_small_stays_where_it_is_for_good() -> None:
    purifier = AdaptivePurifier(two_images(), LEVEL, 6, randomized=False)
    x = torch.linspace(0, 1, 41).double().reshape(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    g = purifier.score(x)
    alpha = step_size(g, purifier.score(x + 1e-3 * g), 1e-3, 0.05, (1e-5, 0.1))
    # Between the two images the density is convex along the score: z > 1.
    assert 0 < int((alpha <= 1e-3).sum()) < 41
    states: list[Tensor] = []

    def look(i: int, state: Tensor | tuple[Tensor, ...]) -> None:
        assert isinstance(state, Tensor)
        states.append(state)

    purifier.chain()(x, Noise.from_seed(0, 41), observe=look)
    moved = torch.stack([(after != before).flatten(1).any(1) for before, after in pairwise(states)])
    assert torch.equal(moved[0], alpha > 1e-3)
    assert not bool((moved[1:] & ~moved[:-1]).any())


@pytest.mark.parametrize("how", ["logits", "probabilities", "majority"])
def test_the_answer_aggregates_the_runs(how: Aggregation) -> None:
    card = CARD.model_copy(update={"votes": Votes(draws=5, how=how)})
    defense = AdaptivePurification(AdaptivePurifier(two_images(), LEVEL, 3), linear(), 3, card)
    x, noise = images(4), Noise.from_seed(0, 4)
    runs = torch.stack([defense.draw(x, noise.draws(5)[torch.arange(4) * 5 + j]) for j in range(5)], 1)
    assert torch.allclose(defense(x, noise), aggregate(runs, card.votes), atol=1e-12)
    assert float((runs - runs[:, :1]).abs().max()) > 1e-3


class _Bowl(nn.Module):
    """An energy whose curvature differs from pixel to pixel and from place to place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.4, 1.0, 16, dtype=torch.float64).reshape(SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * (x - 0.1).square() + 0.2 * (x - 0.1) ** 4).flatten(1).sum(1)


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("randomized", [False, True])
def test_the_gradient_is_its_finite_difference_and_the_full_graph_s(energy: bool, randomized: bool) -> None:
    denoiser = EnergyDenoiser(_Bowl(), (0.05, 2.0)).requires_grad_(False) if energy else two_images()
    purifier = AdaptivePurifier(denoiser, LEVEL, 3, randomized, noise=0.02, rate=0.3)
    defense = AdaptivePurification(purifier, linear(), 3)
    # The two images' score changes its sign at .5; away from there and from 0 and 1 all is smooth.
    x, noise = images(3, 0.6, 0.9), Noise.from_seed(0, 3)
    alpha = step_size(g := purifier.score(x), purifier.score(x + 1e-3 * g), 1e-3, 0.3, (1e-5, 0.1))
    assert bool(((alpha > 2e-3) & (alpha < 0.099)).all())
    exact, full = (gradient(defense.chain(), x, noise, mode) for mode in ("exact", "full"))
    assert torch.allclose(exact, full, atol=1e-12)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ahead, behind = (defense.draw(x + h * direction, noise)[:, 0].sum() for h in (1e-5, -1e-5))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((exact * direction).sum()), rel=1e-5)
    assert float(exact.abs().max()) > 1e-3


def test_the_gradient_goes_through_alpha() -> None:
    purifier = AdaptivePurifier(EnergyDenoiser(_Bowl(), (0.05, 2.0)).requires_grad_(False), LEVEL, 1, False, rate=0.3)
    x = images(2, 0.6, 0.9)
    point = x.clone().requires_grad_()
    g = purifier.score(point)
    alpha = step_size(g, purifier.score(point + 1e-3 * g), 1e-3, 0.3, (1e-5, 0.1)).detach()
    (severed,) = torch.autograd.grad((point + alpha[:, None, None, None] * g).square().sum(), point)
    point = x.clone().requires_grad_()
    (whole,) = torch.autograd.grad(purifier.chain()(point, Noise.from_seed(0, 2)).square().sum(), point)
    assert float((whole - severed).norm() / whole.norm()) > 1e-2


def test_dropping_second_order_terms_changes_an_energy_s_gradient_and_not_a_score_s() -> None:
    noise = Noise.from_seed(0, 2)
    for denoiser, same in ((two_images(), True), (EnergyDenoiser(_Bowl(), (0.05, 2.0)).requires_grad_(False), False)):
        chain = AdaptivePurification(AdaptivePurifier(denoiser, LEVEL, 2), linear(), 3).chain()
        x = images(2, 0.6, 0.9)
        exact, dropped = gradient(chain, x, noise, "exact"), gradient(chain.first_order(), x, noise, "exact")
        assert torch.allclose(exact, dropped, atol=1e-12) == same


@pytest.mark.parametrize(("steps", "level", "message"), [(0, 0.5, "at least 1 step"), (3, 9.0, "usable from")])
def test_the_purifier_refuses_no_steps_and_foreign_levels(steps: int, level: float, message: str) -> None:
    purifier = AdaptivePurifier(EnergyDenoiser(_Bowl(), (0.05, 2.0)), level, steps)
    with pytest.raises(InputError, match=message):
        purifier.chain()


@pytest.fixture(scope="module", params=[SPEC, ADP_ENERGY], ids=lambda spec: spec.card.name)
def digits(request: pytest.FixtureRequest) -> Defense:
    defense: Defense = request.param.build("digits")
    return defense


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    # Training images: the board's images decide nothing here either.
    return data.load("digits", data.train_split("digits")[-60:])


def test_replays_are_bitwise(digits: Defense, batch: tuple[Tensor, Tensor]) -> None:
    x, noise = batch[0][:4], Noise.from_seed(0, 4)
    assert torch.equal(digits.draw(x, noise), digits.draw(x, noise))
    chain = digits.chain()
    assert torch.equal(gradient(chain, x, noise, "exact"), gradient(chain, x, noise, "exact"))


def test_the_digits_gradient_is_the_full_graph_s_in_float64(batch: tuple[Tensor, Tensor]) -> None:
    for spec in (SPEC, ADP_ENERGY):
        chain = spec.build("digits").double().chain()
        x, noise = batch[0][:3].double(), Noise.from_seed(0, 3)
        exact, full = (gradient(chain, x, noise, mode) for mode in ("exact", "full"))
        assert torch.allclose(exact, full, atol=1e-9, rtol=1e-9)
        assert float(exact.abs().max()) > 1e-6


def test_purifying_removes_noise_and_keeps_the_digit(digits: Defense, batch: tuple[Tensor, Tensor]) -> None:
    assert isinstance(digits, AdaptivePurification)
    x, y = batch
    noise = Noise.from_seed(0, len(x))
    with torch.no_grad():
        noised = digits.purifier.start(x, noise.child("start"))
        purified = digits.stages().purify(x, noise)
        accuracy = float((digits(x, noise).argmax(1) == y).double().mean())
    before, after = ((z - x).square().mean().sqrt() for z in (noised, purified))
    assert float(after) < 0.85 * float(before)
    assert accuracy > 0.9


def test_fewer_steps_are_declared_with_fewer_calls(digits: Defense) -> None:
    assert isinstance(digits, AdaptivePurification)
    shorter = AdaptivePurification(replace(digits.purifier, steps=2), digits.classifier, 10, digits.card)
    assert (len(shorter.chain()), shorter.chain().network_calls) == (2, 5)
    assert digits.chain().network_calls == digits.card.network_calls


def test_options_choose_the_form_and_the_average() -> None:
    deterministic = SPEC.build("digits", options={"randomized": "false", "steps": "2"})
    assert not deterministic.card.traits.stochastic
    assert (deterministic.card.votes.draws, "votes" in deterministic.card.handles) == (1, False)
    assert deterministic.card.network_calls == 5
    voting = SPEC.build("digits", options={"average": "majority", "votes": "3"})
    assert voting.card.votes == Votes(draws=3, how="majority")
    assert voting.card.traits.non_differentiable
    single = SPEC.build("digits", options={"average": "majority", "votes": "1"})
    assert not single.card.traits.non_differentiable
    with pytest.raises(InputError, match="can't average 'logit'"):
        SPEC.build("digits", options={"average": "logit"})
