"""Denoised smoothing: a mixture in closed form, its votes, its gradient, and what it does on the digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from assay import data
from assay.card import Votes
from assay.defense import aggregate
from assay.defenses.checkpoints import load_packaged
from assay.defenses.denoised_smoothing import CARD, DENOISER, SIGMA, SPEC, DenoisedSmoothing
from assay.defenses.denoiser import ScoreDenoiser, UNetDenoiser, small_unet
from assay.defenses.mixture import MixtureDenoiser
from assay.errors import InputError
from assay.noise import Noise

SHAPE = (1, 4, 4)


class _Nearest(nn.Module):
    """Logits: minus the squared distances to a dark and a bright image, in pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return -torch.stack([(x - level).square().flatten(1).sum(1) for level in (0.25, 0.75)], 1)


def mixture(std: float) -> MixtureDenoiser:
    means = torch.stack([torch.full(SHAPE, -0.5), torch.full(SHAPE, 0.5)]).double()
    return MixtureDenoiser(torch.full((2,), 0.5).double(), means, torch.full((2,), std).double())


def test_the_denoiser_gets_twice_the_pixels_sigma() -> None:
    # One Gaussian N(.5, .3²) in pixels under noise of .2: E[x_0 | x] = .5 + .09/(.09 + .04)·(x − .5).
    one = torch.ones(1, dtype=torch.float64)
    denoiser = MixtureDenoiser(one, torch.zeros(1, *SHAPE, dtype=torch.float64), 0.6 * one)
    defense = DenoisedSmoothing(denoiser, _Nearest(), 0.2, 2)
    x, noise = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)).double(), Noise.from_seed(0, 3)
    noised = x + 0.2 * noise.normal("z", shape=SHAPE, like=x)
    expected = 0.5 + 0.09 / 0.13 * (noised - 0.5)
    assert torch.allclose(defense.stages().purify(x, noise), expected, atol=1e-12)


@pytest.mark.parametrize("mean", [0.3, 0.45, 0.5, 0.6])
def test_on_a_mixture_a_vote_has_the_probability_of_its_half_space(mean: float) -> None:
    # Both components are alike but for their mean: the denoised image is nearer to the bright one exactly
    # where the noised one is, so that P(vote = bright) = Φ((mean of x − .5)·√d/σ).
    sigma, n = 0.5, 20_000
    defense = DenoisedSmoothing(mixture(0.4), _Nearest(), sigma, 2)
    x = torch.full((n, *SHAPE), mean, dtype=torch.float64)
    share = float(defense.draw(x, Noise.from_seed(0, n)).argmax(1).double().mean())
    expected = 0.5 * math.erfc(-(mean - 0.5) * 4 / sigma / 2**0.5)
    assert share == pytest.approx(expected, abs=5 * 0.5 / n**0.5)


def test_the_answer_is_the_majority_of_independent_draws() -> None:
    card = CARD.model_copy(update={"votes": Votes(draws=9, how="majority")})
    defense = DenoisedSmoothing(mixture(0.4), _Nearest(), 0.5, 2, card)
    x, noise = torch.full((20, *SHAPE), 0.52).double(), Noise.from_seed(0, 20)
    draws = torch.stack([defense.draw(x, noise.draws(9)[torch.arange(20) * 9 + j]) for j in range(9)], 1)
    assert torch.equal(defense(x, noise), aggregate(draws, card.votes))
    assert int(draws.argmax(-1).double().mean(1).lt(1).sum()) > 0


def test_the_gradient_of_a_draw_is_its_finite_difference() -> None:
    defense = DenoisedSmoothing(mixture(0.4), _Nearest(), 0.25, 2)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(3, *SHAPE, generator=generator).double(), Noise.from_seed(0, 3)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(defense.draw(point, noise)[:, 0].sum(), point)
    ahead, behind = (defense.draw(x + h * direction, noise)[:, 0].sum() for h in (1e-5, -1e-5))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((slope * direction).sum()), rel=1e-7)
    assert float(slope.abs().max()) > 1e-2


def test_a_level_that_the_denoiser_was_not_made_for_is_refused() -> None:
    denoiser = ScoreDenoiser(nn.Identity(), (0.05, 2.0))
    with pytest.raises(InputError, match=r"a noise of 1\.5 in pixels needs σ = 3"):
        DenoisedSmoothing(denoiser, _Nearest(), 1.5, 2)


def test_the_digits_denoiser_is_asked_for_exactly_its_noise() -> None:
    denoiser = UNetDenoiser(small_unet())
    load_packaged(denoiser, DENOISER)
    times: list[float] = []
    hook = denoiser.network.register_forward_hook(lambda module, inputs, output: times.append(float(inputs[1])))
    defense = DenoisedSmoothing(denoiser, _Nearest(), SIGMA, 2)
    with torch.no_grad():
        defense.draw(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), Noise.from_seed(0, 2))
    hook.remove()
    (time,) = times
    below, above = (denoiser.schedule.sigma(math.floor(time) + step) for step in (1, 2))  # level t is time t − 1
    assert below <= 2 * SIGMA <= above


def test_denoising_brings_the_digits_back() -> None:
    # Training images: the board's images decide nothing here either.
    x, y = data.load("digits", data.train_split("digits")[-60:])
    defense, noise = SPEC.build("digits"), Noise.from_seed(0, 60)
    with torch.no_grad():
        purified = defense.stages().purify(x, noise)
        accuracy = float((defense(x, noise).argmax(1) == y).double().mean())
    assert float((purified - x).square().mean().sqrt()) < 0.6 * SIGMA
    assert accuracy > 0.9
