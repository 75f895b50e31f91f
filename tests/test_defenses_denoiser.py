"""The denoiser interface: its conversions, and the mixture whose every prediction is a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.defenses.denoiser import Denoiser, MixtureDenoiser, UNetDenoiser, digits_unet, linear_alpha_bars
from assay.noise import Noise

LEVELS = (1, 150, 600, 1000)


def uniforms(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 1


@pytest.fixture
def mixture() -> MixtureDenoiser:
    """Three components over 1×2×3 images, of different weight and width."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return MixtureDenoiser(weights, uniforms(3, 1, 2, 3), torch.tensor([0.1, 0.3, 0.05], dtype=torch.float64))


def test_the_schedule_is_the_linear_one() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    assert torch.allclose(linear_alpha_bars(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", LEVELS)
def test_eps_is_the_scaled_score(mixture: MixtureDenoiser, t: int) -> None:
    x_t = uniforms(7, 1, 2, 3).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x_t, t).sum(), x_t)
    expected = -((1 - mixture.alpha_bar(t, x_t)).sqrt()) * score
    assert torch.allclose(mixture.eps(x_t, t), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("t", LEVELS)
def test_denoise_is_the_posterior_mean(mixture: MixtureDenoiser, t: int) -> None:
    x_t = uniforms(7, 1, 2, 3)
    alpha_bar = float(mixture.alpha_bars[t])
    # Each component's posterior mean of x_0, a precision-weighted average, mixed by responsibility.
    variances = mixture.stds**2
    gain = variances * alpha_bar**0.5 / (alpha_bar * variances + 1 - alpha_bar)
    each = mixture.means + gain[:, None, None, None] * (x_t[:, None] - alpha_bar**0.5 * mixture.means)
    expected = (mixture.posterior(x_t, t)[..., None, None, None] * each).sum(1)
    assert torch.allclose(mixture.denoise(x_t, t), expected, atol=1e-10, rtol=1e-10)


def test_the_density_integrates_to_one() -> None:
    weights, stds = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.2, 0.4], dtype=torch.float64)
    mixture = MixtureDenoiser(weights, torch.tensor([-0.5, 0.8], dtype=torch.float64).reshape(2, 1, 1, 1), stds)
    points = torch.linspace(-8, 8, 16001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for t in (0, *LEVELS):
        assert float(mixture.log_density(points, t).exp().sum() * 1e-3) == pytest.approx(1, abs=1e-9)


def denoisers() -> list[Denoiser]:
    mixture = MixtureDenoiser(
        torch.full((2,), 0.5, dtype=torch.float64), uniforms(2, 1, 8, 8), torch.full((2,), 0.2, dtype=torch.float64)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNetDenoiser(digits_unet()).double()
    return [mixture, network]


@pytest.mark.parametrize("denoiser", denoisers(), ids=lambda denoiser: type(denoiser).__name__)
def test_a_level_a_row_is_a_level_at_a_time(denoiser: Denoiser) -> None:
    x_t = uniforms(3, 1, 8, 8)
    together = denoiser.denoise(x_t, torch.tensor([5, 300, 1000]))
    for row, t in enumerate((5, 300, 1000)):
        assert torch.allclose(together[row], denoiser.denoise(x_t[row : row + 1], t)[0], atol=1e-10)


@pytest.mark.parametrize("denoiser", denoisers(), ids=lambda denoiser: type(denoiser).__name__)
def test_denoise_inverts_diffuse_given_the_true_noise(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    x_0 = uniforms(3, 1, 8, 8)
    z = Noise.from_seed(0, 3).normal("z", shape=(1, 8, 8), like=x_0)
    monkeypatch.setattr(type(denoiser), "eps", lambda self, x_t, t: z)
    for t in LEVELS[:3]:
        assert torch.allclose(denoiser.denoise(denoiser.diffuse(x_0, t, z), t), x_0, atol=1e-10)


def test_ranges_convert_both_ways(mixture: MixtureDenoiser) -> None:
    x = torch.tensor([[0.0, 0.25, 1.0]])
    assert mixture.encode(x).tolist() == [[-1.0, -0.5, 1.0]]
    assert torch.equal(mixture.decode(mixture.encode(x)), x)


def test_the_network_is_told_diffusers_times() -> None:
    times: list[object] = []

    class Network(torch.nn.Module):
        def forward(self, x: Tensor, t: object, return_dict: bool) -> tuple[Tensor]:
            times.append(t)
            return (x,)

    denoiser = UNetDenoiser(Network())
    denoiser.eps(torch.zeros(2, 1, 8, 8), 1)
    denoiser.eps(torch.zeros(2, 1, 8, 8), torch.tensor([1, 1000]))
    assert times[0] == 0
    assert isinstance(times[1], Tensor)
    assert times[1].tolist() == [0, 999]
