"""Purification: its grid, its step in closed form, its gradient, and what it does on an exact denoiser."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from assay import data
from assay.defenses.denoiser import GaussianDenoiser, decode, encode
from assay.defenses.mixture import MixtureDenoiser
from assay.defenses.purifier import Purifier, grid, posterior, sample
from assay.errors import InputError
from assay.noise import Noise
from assay.registry import DEFENSES


@pytest.fixture
def mixture() -> MixtureDenoiser:
    """A dark and a bright image, ten times as wide apart as they are blurred."""
    means = torch.stack([torch.full((1, 4, 4), -0.5), torch.full((1, 4, 4), 0.5)]).double()
    return MixtureDenoiser(torch.full((2,), 0.5).double(), means, torch.full((2,), 0.05).double())


@pytest.mark.parametrize(("level", "steps"), [(150, 10), (150, 150), (7, 3), (1, 1)])
def test_the_grid_falls_from_the_level_to_zero(level: int, steps: int) -> None:
    levels = grid(level, steps)
    assert (levels[0], levels[-1], len(levels)) == (level, 0, steps + 1)
    gaps = [t - s for t, s in pairwise(levels)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("steps", [0, 11])
def test_the_grid_refuses_more_steps_than_levels(steps: int) -> None:
    with pytest.raises(InputError, match=f"takes 1 to 10 steps, got {steps}"):
        grid(10, steps)


def test_a_posterior_step_has_bayes_mean_and_variance() -> None:
    sigma, lower, n = 0.8, 0.3, 200_000
    x, x_0 = torch.full((n, 1, 1, 1), 0.3).double(), torch.full((n, 1, 1, 1), -0.4).double()
    drawn = sample(*posterior(x, x_0, sigma, lower), Noise.from_seed(0, n)).flatten()
    # The lower image is N(x_0, lower²) before x is known, and x is N(lower image, σ² − lower²).
    precision = 1 / lower**2 + 1 / (sigma**2 - lower**2)
    mean = (-0.4 / lower**2 + 0.3 / (sigma**2 - lower**2)) / precision
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * (1 / precision / n) ** 0.5)
    assert float(drawn.var()) == pytest.approx(1 / precision, rel=0.02)


def test_a_step_is_ddpm_s_in_the_variance_preserving_form(mixture: MixtureDenoiser) -> None:
    t, s = 300, 120
    at, to = (float(mixture.schedule.alpha_bars[level]) for level in (t, s))
    x_t, x_0 = torch.rand(2, 3, 1, 4, 4).double()
    # Ho et al. 2020, eq. 7, respaced: ᾱ_t/ᾱ_s in place of α_t.
    kept = at / to
    mean = (to**0.5 * (1 - kept) * x_0 + kept**0.5 * (1 - to) * x_t) / (1 - at)
    variance = (1 - to) / (1 - at) * (1 - kept)
    found, spread = posterior(x_t / at**0.5, x_0, mixture.schedule.sigma(t), mixture.schedule.sigma(s))
    assert torch.allclose(found * to**0.5, mean, atol=1e-12)
    assert spread * to == pytest.approx(variance, rel=1e-9)


def test_the_last_step_is_the_denoised_image() -> None:
    x, x_0 = torch.rand(2, 3, 1, 4, 4).double()
    assert torch.equal(sample(*posterior(x, x_0, 0.5, 0.0), Noise.from_seed(0, 3)), x_0)


def test_one_step_is_the_posterior_mean_in_closed_form(mixture: MixtureDenoiser) -> None:
    purifier = Purifier(mixture, 400, 1)
    x = torch.linspace(0, 1, 5).double().reshape(5, 1, 1, 1).expand(5, 1, 4, 4)
    noise = Noise.from_seed(0, 5)
    noised = purifier.start(x, noise.child("start"))
    expected = decode(mixture.denoise(noised, mixture.schedule.sigma(400)))
    assert torch.allclose(purifier.chain()(x, noise), expected, atol=1e-12)


def test_the_start_has_the_level_s_mean_and_variance(mixture: MixtureDenoiser) -> None:
    n = 20_000
    noised = Purifier(mixture, 400, 1).start(torch.full((n, 1, 4, 4), 0.9).double(), Noise.from_seed(0, n))
    sigma = mixture.schedule.sigma(400)
    assert float(noised.mean()) == pytest.approx(0.8, abs=5 * sigma / (16 * n) ** 0.5)
    assert float(noised.std()) == pytest.approx(sigma, rel=1e-2)


def test_a_level_beyond_the_denoiser_is_refused() -> None:
    gaussian = GaussianDenoiser(lambda x, sigma: x)
    Purifier(gaussian, 150, 2).chain()
    with pytest.raises(InputError, match=r"level 200 needs σ = .* Choose a lower level"):
        Purifier(gaussian, 200, 2).chain()


def test_purification_moves_attacked_images_back_to_the_mixture(mixture: MixtureDenoiser) -> None:
    n = 64
    clean = decode(mixture.means).repeat_interleave(n // 2, 0)
    signs = torch.sign(torch.randn(clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    attacked = clean + 0.15 * signs
    purified = Purifier(mixture, 150, 10).chain()(attacked, Noise.from_seed(0, n))
    before, after = ((points - clean).square().mean().sqrt() for points in (attacked, purified))
    # The mixture's own width is .05 in [-1, 1], .025 in pixels: at most that is left of .15.
    assert float(before) == pytest.approx(0.15)
    assert float(after) < 0.025


def test_purified_samples_have_the_mixture_s_spread() -> None:
    std, n = 0.4, 20_000
    one = MixtureDenoiser(torch.ones(1).double(), torch.zeros(1, 1, 1, 1).double(), torch.tensor([std]).double())
    x = decode(std * Noise.from_seed(1, n).normal("x", shape=(1, 1, 1), like=torch.zeros(1).double()))
    purified = encode(Purifier(one, 500, 500).chain()(x, Noise.from_seed(0, n)))
    # With an exact denoiser and all steps, samples of the mixture stay samples of it.
    assert float(purified.mean()) == pytest.approx(0, abs=0.02)
    assert float(purified.std()) == pytest.approx(std, rel=0.02)


def test_purification_keeps_rows_apart(mixture: MixtureDenoiser) -> None:
    chain = Purifier(mixture, 150, 5).chain()
    x, noise, rows = torch.rand(6, 1, 4, 4).double(), Noise.from_seed(0, 6), torch.tensor([4, 1])
    assert torch.allclose(chain(x[rows], noise[rows]), chain(x, noise)[rows], atol=1e-12)


def gradient(run: object, x: Tensor, y: Tensor) -> Tensor:
    assert callable(run)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(run(point), y), point)
    return slope


def test_diffpure_s_exact_gradient_is_the_full_graph_s() -> None:
    defense = DEFENSES["diffpure"].build("digits").double()
    x, y = data.load("digits", data.board_ids("digits")[:3])
    x, noise, chain = x.double(), Noise.from_seed(0, 3), defense.chain()
    exact = gradient(lambda z: defense.draw(z, noise), x, y)
    full = gradient(lambda z: chain(z, noise, mode="full"), x, y)
    assert torch.allclose(exact, full, atol=1e-10, rtol=1e-10)
    assert float(exact.abs().max()) > 1e-6


def test_diffpure_s_gradient_is_its_finite_difference() -> None:
    defense = DEFENSES["diffpure"].build("digits").double()
    x, y = data.load("digits", data.board_ids("digits")[:2])
    x, noise = 0.1 + 0.8 * x.double(), Noise.from_seed(0, 2)
    direction = Noise.from_seed(1, 2).normal("direction", shape=(1, 8, 8), like=x)

    def loss(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(defense.draw(z, noise), y)

    analytic = (gradient(lambda z: defense.draw(z, noise), x, y) * direction).sum()
    step = 1e-5
    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert float(numeric) == pytest.approx(float(analytic), rel=1e-5)


def test_diffpure_s_surrogate_takes_fewer_steps_from_the_same_level() -> None:
    defense = DEFENSES["diffpure"].build("digits")
    x, noise = torch.rand(2, 1, 8, 8), Noise.from_seed(0, 2)
    seen: list[Tensor] = []
    for chain in (defense.chain(), defense.surrogate(4), defense.surrogate(1000)):
        chain(x, noise, observe=lambda i, state: seen.append(state) if i == 0 else None)
    assert len(defense.surrogate(4)) == 4
    assert defense.surrogate(4).network_calls == 5
    assert len(defense.surrogate(1000)) == len(defense.chain()) >= 10
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    with pytest.raises(InputError, match="at least 1 step"):
        defense.surrogate(0)


def test_diffpure_s_component_is_the_undefended_classifier() -> None:
    diffpure, undefended = (DEFENSES[name].build("digits") for name in ("diffpure", "undefended"))
    x, noise = torch.rand(4, 1, 8, 8), Noise.from_seed(0, 4)
    assert torch.equal(diffpure.components()["classifier"](x, noise), undefended(x, noise))
