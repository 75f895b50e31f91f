"""GDMP: its step in closed form, rounds, the gradient, and that guidance keeps near the input."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from assay.chain import State
from assay.defenses.diffpure import DiffPure
from assay.defenses.gdmp import SPEC, TowardsInput
from assay.defenses.purifier import Purifier
from assay.errors import InputError
from assay.noise import Noise

checks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("guided_checks.py"))))


@pytest.fixture(scope="module")
def defense() -> DiffPure:
    built = SPEC.build("digits").double()
    assert isinstance(built, DiffPure)
    return built


def test_without_scale_it_is_diffpure() -> None:
    x, noise = checks.images(), Noise.from_seed(0, 3)
    plain = Purifier(checks.mixture(), 200, 4).chain()(x, noise)
    assert torch.equal(TowardsInput(checks.mixture(), 200, 4, scale=0.0).chain()(x, noise), plain)
    assert not torch.equal(TowardsInput(checks.mixture(), 200, 4, scale=1.0).chain()(x, noise), plain)


def test_a_step_s_mean_in_closed_form() -> None:
    std, sigma, lower, scale = 0.3, 0.6, 0.4, 2.0
    purifier = TowardsInput(checks.gaussian(std), 200, 4, scale=scale)
    x, z, noise = checks.images(), 2 * checks.images() - 1, Noise.from_seed(0, 3)
    mean, variance = purifier.mean(z, (), x, sigma, lower, noise)
    x_0 = 0.25 + std**2 / (std**2 + sigma**2) * (z - 0.25)
    expected = lower**2 * (1 - lower**2 / sigma**2)
    noised = 2 * x - 1 + sigma * noise.normal("input", shape=(1, 4, 4), like=x)
    unguided = (lower / sigma) ** 2 * z + (1 - (lower / sigma) ** 2) * x_0
    point = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad((point - noised).square().sum(), point)
    assert variance == pytest.approx(expected)
    assert torch.allclose(mean, unguided - scale * sigma * expected * slope, atol=1e-12)


def test_the_moved_mean_is_that_of_a_variance_preserving_step() -> None:
    """μ̃_t = μ_t + Σ_t·g with g = ∇_{x_t} log p, every quantity at DDPM's scale, and the same step in σ's."""
    denoiser, t, s, scale = checks.mixture(), 300, 200, 2.0
    schedule = denoiser.schedule
    at, to = float(schedule.alpha_bars[t]), float(schedule.alpha_bars[s])
    sigma, lower = schedule.sigma(t), schedule.sigma(s)
    x, z, noise = checks.images(), 2 * checks.images(3) - 1, Noise.from_seed(0, 3)
    mean, variance = TowardsInput(denoiser, t, 3, scale=scale).mean(z, (), x, sigma, lower, noise)
    x_t, kept = at**0.5 * z, at / to
    eps = denoiser.eps(x_t, t)
    x_0 = (x_t - (1 - at) ** 0.5 * eps) / at**0.5
    mu = (to**0.5 * (1 - kept) * x_0 + kept**0.5 * (1 - to) * x_t) / (1 - at)
    big = (1 - to) / (1 - at) * (1 - kept)
    noised = at**0.5 * (2 * x - 1 + sigma * noise.normal("input", shape=(1, 4, 4), like=x))
    # ∇_{x_t} = ∇_z/√ᾱ_t, the distance is taken of x_t/√ᾱ_t, and a mean at level s is √ᾱ_s of ours: √(ᾱ_t/ᾱ_s) remains.
    shift = -scale * sigma * big * 2 * (x_t - noised) / at * (at / to) ** 0.5
    assert big / to == pytest.approx(variance)
    assert torch.allclose(mean, (mu + shift) / to**0.5, atol=1e-10)


def test_guidance_reduces_the_distance_to_the_input() -> None:
    x, noise = checks.images(200), Noise.from_seed(0, 200)
    distances = [
        float((TowardsInput(checks.gaussian(0.5), 300, 6, scale=scale).chain()(x, noise) - x).square().mean())
        for scale in (0.0, 0.5, 1.0)
    ]
    assert distances[0] > 1.05 * distances[1] > 1.05**2 * distances[2]


def test_guidance_reduces_the_distance_of_digits(defense: DiffPure) -> None:
    x, noise = checks.digits(40), Noise.from_seed(0, 40)
    guided = defense.purifier
    assert isinstance(guided, TowardsInput)
    plain = TowardsInput(guided.denoiser, guided.level, guided.steps, guided.rounds, scale=0.0)
    near, far = ((purifier.chain()(x, noise) - x).square().mean() for purifier in (guided, plain))
    assert float(near) < 0.8 * float(far)


def test_a_second_round_diffuses_what_the_first_one_left() -> None:
    x, noise = checks.images(), Noise.from_seed(0, 3)
    first: list[State] = []
    both: list[State] = []
    one, two = (TowardsInput(checks.gaussian(0.3), 200, 3, rounds, scale=1.0) for rounds in (1, 2))
    one.chain()(x, noise, observe=lambda i, state: first.append(state))
    two.chain()(x, noise, observe=lambda i, state: both.append(state))
    assert len(two.chain()) == 6
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, both, strict=False))
    # With the last state's noise known, the fourth step is a step from it at the top of the grid.
    fourth = noise.child("step", 3)
    sigma, lower = two.sigmas[:2]
    again = both[3][0] + sigma * fourth.normal("again", shape=(1, 4, 4), like=x)
    mean, variance = two.mean(again, (), x, sigma, lower, fourth)
    expected = mean + variance**0.5 * fourth.normal("z", shape=(1, 4, 4), like=x)
    assert torch.allclose(both[4][0], expected, atol=1e-12)


def test_rounds_are_counted() -> None:
    with pytest.raises(InputError, match="at least 1 round, got 0"):
        TowardsInput(checks.mixture(), 200, 4, 0, scale=1.0)


@pytest.mark.parametrize(("steps", "rounds", "each"), [(8, 2, 4), (5, 2, 2), (2, 2, 1), (1, 1, 1), (100, 2, 4)])
def test_a_surrogate_takes_at_most_so_many_steps(steps: int, rounds: int, each: int, defense: DiffPure) -> None:
    shorter = defense.purifier.shortened(steps)
    assert isinstance(shorter, TowardsInput)
    assert (shorter.rounds, shorter.steps) == (rounds, each)
    chain = defense.surrogate(steps)
    assert len(chain) == rounds * each
    assert chain.network_calls == rounds * each + 1


def test_the_gradient_on_a_mixture() -> None:
    checks.check_gradient(TowardsInput(checks.mixture(), 300, 3, 2, scale=2.0).chain(), checks.images())


def test_the_gradient_on_digits(defense: DiffPure) -> None:
    checks.check_gradient(defense.chain(), checks.digits())


def test_replay(defense: DiffPure) -> None:
    checks.check_replay(defense, checks.digits())


def test_calls_are_as_declared(defense: DiffPure) -> None:
    card = defense.card
    networks = [defense.denoiser.network, defense.classifier]
    assert checks.calls(defense, networks, checks.digits(3)) == (card.network_calls, card.gradient_calls)
