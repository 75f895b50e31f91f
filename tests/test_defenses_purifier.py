"""Purification: its grid, its step in closed form, its gradient, and what it does on an exact denoiser."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from assay import data
from assay.defenses.denoiser import MixtureDenoiser
from assay.defenses.purifier import Purifier, grid, posterior_step
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


def test_a_posterior_step_has_bayes_mean_and_variance(mixture: MixtureDenoiser) -> None:
    t, s, n = 300, 120, 200_000
    at, to = (float(mixture.alpha_bars[level]) for level in (t, s))
    x_t, x_0 = torch.full((n, 1, 1, 1), 0.3).double(), torch.full((n, 1, 1, 1), -0.4).double()
    drawn = posterior_step(mixture, x_t, x_0, t, s, Noise.from_seed(0, n)).flatten()
    # x_s given x_0 is N(√ᾱ_s x_0, 1−ᾱ_s); x_t given x_s is N(√r x_s, 1−r) with r = ᾱ_t/ᾱ_s.
    ratio = at / to
    precision = 1 / (1 - to) + ratio / (1 - ratio)
    mean = (to**0.5 * -0.4 / (1 - to) + ratio**0.5 * 0.3 / (1 - ratio)) / precision
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * (1 / precision / n) ** 0.5)
    assert float(drawn.var()) == pytest.approx(1 / precision, rel=0.02)


def test_the_last_step_is_the_denoised_image(mixture: MixtureDenoiser) -> None:
    x_t, x_0 = torch.rand(2, 3, 1, 4, 4).double()
    assert torch.equal(posterior_step(mixture, x_t, x_0, 50, 0, Noise.from_seed(0, 3)), x_0)


def test_one_step_is_the_posterior_mean_in_closed_form(mixture: MixtureDenoiser) -> None:
    purifier = Purifier(mixture, 400, 1)
    x = torch.linspace(0, 1, 5).double().reshape(5, 1, 1, 1).expand(5, 1, 4, 4)
    noise = Noise.from_seed(0, 5)
    x_t = purifier.start(x, noise.child("start"))
    expected = mixture.decode(mixture.denoise(x_t, 400))
    assert torch.allclose(purifier.chain()(x, noise), expected, atol=1e-12)


def test_the_start_has_the_level_s_mean_and_variance(mixture: MixtureDenoiser) -> None:
    n = 20_000
    x_t = Purifier(mixture, 400, 1).start(torch.full((n, 1, 4, 4), 0.9).double(), Noise.from_seed(0, n))
    alpha_bar = float(mixture.alpha_bars[400])
    assert float(x_t.mean()) == pytest.approx(alpha_bar**0.5 * 0.8, abs=5e-3)
    assert float(x_t.var()) == pytest.approx(1 - alpha_bar, rel=2e-2)


def test_purification_moves_attacked_images_back_to_the_mixture(mixture: MixtureDenoiser) -> None:
    n = 64
    clean = mixture.decode(mixture.means).repeat_interleave(n // 2, 0)
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
    x = one.decode(std * Noise.from_seed(1, n).normal("x", shape=(1, 1, 1), like=torch.zeros(1).double()))
    purified = one.encode(Purifier(one, 500, 500).chain()(x, Noise.from_seed(0, n)))
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
