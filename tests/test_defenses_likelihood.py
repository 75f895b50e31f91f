"""Likelihood maximisation: its gradient step in closed form, its ball, and what it does to likelihoods."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from assay.defenses.diffpure import DiffPure
from assay.defenses.likelihood_maximisation import SPEC, LikelihoodMaximiser
from assay.errors import InputError
from assay.noise import Noise
from assay.registry import resolve_defense

checks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("guided_checks.py"))))

SIGMAS = (0.4, 0.6)


@pytest.fixture(scope="module")
def defense() -> DiffPure:
    built = SPEC.build("digits").double()
    assert isinstance(built, DiffPure)
    return built


def drawn(noise: Noise, x: Tensor) -> tuple[Tensor, Tensor]:
    """The level and the noise of a step, by the tags that the step uses."""
    sigma = SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * noise.uniform("sigma", shape=(), like=x)
    return sigma, noise.normal("eps", shape=x.shape[1:], like=x)


def test_the_loss_is_the_error_of_eps() -> None:
    denoiser = checks.mixture()
    z = 2 * checks.images() - 1
    sigma, eps = drawn(Noise.from_seed(0, 3), z)
    scale = sigma.reshape(-1, 1, 1, 1)
    x_t = (z + scale * eps) / (1 + scale**2).sqrt()
    predicted = denoiser.eps(x_t, denoiser.schedule.level(sigma))
    loss = LikelihoodMaximiser(denoiser, 1, 0.1, 1.0, SIGMAS).loss(z, sigma, eps)
    assert torch.allclose(loss, (predicted - eps).square().flatten(1).mean(1), atol=1e-6)


def test_a_step_in_closed_form() -> None:
    std, size = 0.3, 0.07
    x, noise = checks.images(), Noise.from_seed(0, 3)
    z = 2 * x - 1
    sigma, eps = drawn(noise, x)
    scale = sigma.reshape(-1, 1, 1, 1)
    shrink = std**2 / (std**2 + scale**2)
    # D(z + σε) − z = (1−c)(μ − z) + cσε with c = s²/(s² + σ²): its square falls along itself.
    downhill = (1 - shrink) * (0.25 - z) + shrink * scale * eps
    rms = downhill.square().flatten(1).mean(1).sqrt().reshape(-1, 1, 1, 1)
    made = LikelihoodMaximiser(checks.gaussian(std), 1, size, 1.0, SIGMAS).step(z, x, noise)
    assert isinstance(made, Tensor)
    assert torch.allclose(made, z + 2 * size * downhill / rms, atol=1e-9)
    assert torch.allclose((made - z).square().flatten(1).mean(1).sqrt() / 2, torch.full((3,), size).double())


def test_images_become_likelier() -> None:
    denoiser = checks.mixture()
    x, noise = checks.images(100), Noise.from_seed(0, 100)
    made = LikelihoodMaximiser(denoiser, 6, 0.03, 0.3, SIGMAS).chain()(x, noise)
    before, after = (denoiser.log_density(2 * pixels - 1, 0.3) for pixels in (x, made))
    assert float((after > before).double().mean()) > 0.95


@pytest.mark.parametrize("size", [0.02, 0.5])
def test_it_stays_within_the_ball(size: float) -> None:
    x, noise = checks.images(50), Noise.from_seed(0, 50)
    moved = (LikelihoodMaximiser(checks.mixture(), 4, size, 0.1, SIGMAS).chain()(x, noise) - x).abs().amax((1, 2, 3))
    assert float(moved.max()) <= 0.1 + 1e-12
    assert bool((moved > 0.01).all())


def test_where_the_ball_binds_the_gradient_goes_to_the_input() -> None:
    x, noise = checks.images(), Noise.from_seed(0, 3)
    chain = LikelihoodMaximiser(checks.mixture(), 2, 50.0, 1e-3, SIGMAS).chain()
    offset = chain(x, noise) - x
    assert torch.allclose(offset.abs(), torch.full_like(offset, 1e-3))
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(chain(point, noise).sum(), point)
    assert torch.allclose(slope, torch.ones_like(slope))


def test_a_vanishing_gradient_leaves_the_image() -> None:
    """A denoiser of a point mass, asked exactly there: the loss is 0, and so is its slope."""
    x, noise = torch.full((2, 1, 4, 4), 0.625).double(), Noise.from_seed(0, 2)
    made = LikelihoodMaximiser(checks.gaussian(0.0), 1, 0.1, 0.2, SIGMAS).chain()(x, noise)
    assert torch.allclose(made, x, atol=1e-9)


def test_fewer_steps_reach_as_far(defense: DiffPure) -> None:
    whole = defense.purifier
    assert isinstance(whole, LikelihoodMaximiser)
    shorter = whole.shortened(2)
    assert (shorter.steps, shorter.steps * shorter.step_size) == (2, pytest.approx(whole.steps * whole.step_size))
    assert whole.shortened(100) == whole
    assert defense.surrogate(2).network_calls == 3


def test_no_steps_and_levels_out_of_range_are_refused(defense: DiffPure) -> None:
    with pytest.raises(InputError, match="at least 1 step, got 0"):
        LikelihoodMaximiser(checks.mixture(), 0, 0.1, 0.2, SIGMAS).chain()
    with pytest.raises(InputError, match="likelihood maximisation needs σ = 1e\\+09"):
        LikelihoodMaximiser(defense.denoiser, 1, 0.1, 0.2, (0.4, 1e9)).chain()


def test_the_gradient_on_a_mixture() -> None:
    chain = LikelihoodMaximiser(checks.mixture(), 3, 0.05, 0.12, SIGMAS).chain()
    offset = (chain(checks.images(), Noise.from_seed(0, 3)) - checks.images()).abs()
    bound = float((offset > 0.12 - 1e-9).double().mean())
    assert 0.01 < bound < 0.9, "the check should meet both the free and the projected pixels"
    checks.check_gradient(chain, checks.images())
    checks.check_second_order(chain, checks.images())


def test_the_gradient_on_digits(defense: DiffPure) -> None:
    checks.check_gradient(defense.chain(), checks.digits(), step=1e-7)
    checks.check_second_order(defense.chain(), checks.digits())


@pytest.mark.parametrize(("activation", "jumps"), [("ReLU", True), ("SiLU", False)])
def test_a_denoiser_of_relus_makes_the_process_jump(activation: str, jumps: bool, tmp_path: Path) -> None:
    options = {"denoiser": checks.write_denoiser(tmp_path, activation)}
    defense = resolve_defense("likelihood_maximisation", trust=True).build("digits", options=options)
    assert defense.card.traits.non_differentiable is jumps


def test_the_packaged_denoiser_is_smooth() -> None:
    defense = resolve_defense("likelihood_maximisation").build("digits", options={"steps": "2"})
    assert not defense.card.traits.non_differentiable


def test_replay(defense: DiffPure) -> None:
    checks.check_replay(defense, checks.digits())


def test_calls_are_as_declared(defense: DiffPure) -> None:
    card = defense.card
    networks = [defense.denoiser.network, defense.classifier]
    assert checks.calls(defense, networks, checks.digits(3)) == (card.network_calls, card.gradient_calls)


def test_most_pixels_are_not_at_the_ball_s_edge(defense: DiffPure) -> None:
    """There the process is x ± η and its gradient the identity; elsewhere it is the denoiser's."""
    x, noise = checks.digits(20), Noise.from_seed(0, 20)
    offset = (defense.purifier.chain()(x, noise) - x).abs()
    assert float((offset > 0.2 - 1e-6).double().mean()) < 0.25
    assert checks.gradient(defense.chain(), x, noise).isfinite().all()
