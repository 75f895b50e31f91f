"""The denoiser interface: its conversions both ways, each kind of denoiser, and the mixture of closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from assay.defenses.denoiser import (
    Denoiser,
    EDMDenoiser,
    EnergyDenoiser,
    GaussianDenoiser,
    ScoreDenoiser,
    UNetDenoiser,
    check_sigmas,
    decode,
    encode,
    small_unet,
)
from assay.defenses.mixture import MixtureDenoiser
from assay.defenses.networks import EnergyNet, ScoreNet
from assay.defenses.schedule import (
    alpha_bar_of,
    column,
    linear_schedule,
    sigma_of,
    to_exploding,
    to_preserving,
    with_start,
)
from assay.errors import InputError

SIGMAS = (0.05, 0.5, 2.0, 50.0)
LEVELS = (1, 150, 600, 1000)


def uniforms(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 1


@pytest.fixture
def mixture() -> MixtureDenoiser:
    """Three components in two classes over 1×2×3 images, of different weight and width."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    stds = torch.tensor([0.1, 0.3, 0.05], dtype=torch.float64)
    return MixtureDenoiser(weights, uniforms(3, 1, 2, 3), stds, labels=torch.tensor([0, 1, 0]))


# The schedule and the two forms


def test_the_schedule_is_the_linear_one() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    schedule = linear_schedule()
    assert schedule.levels == 1000
    assert torch.allclose(schedule.alpha_bars, expected, rtol=1e-4, atol=0)
    assert schedule.sigma(0) == 0
    assert schedule.sigma(150) == pytest.approx(math.sqrt((1 - expected[150]) / expected[150]), rel=1e-4)


def test_the_forms_convert_both_ways() -> None:
    alpha_bar = torch.tensor([0.999, 0.5, 1e-4], dtype=torch.float64)
    assert torch.allclose(alpha_bar_of(sigma_of(alpha_bar)), alpha_bar, rtol=1e-12)
    x_0, z = uniforms(2, 3, 1, 2, 2)
    shaped = alpha_bar.reshape(3, 1, 1, 1)
    x_t = shaped.sqrt() * x_0 + (1 - shaped).sqrt() * z
    x, sigma = to_exploding(x_t, alpha_bar)
    assert torch.allclose(x, x_0 + sigma.reshape(3, 1, 1, 1) * z, rtol=1e-10)
    back, again = to_preserving(x, sigma)
    assert torch.allclose(back, x_t, rtol=1e-12)
    assert torch.allclose(again, alpha_bar, rtol=1e-12)


def test_levels_and_sigmas_invert_each_other_also_between_levels() -> None:
    schedule = linear_schedule()
    assert torch.allclose(schedule.level(schedule.sigmas[1:]), torch.arange(1, 1001).double(), atol=1e-9)
    between = (schedule.sigmas[7] * schedule.sigmas[8]).sqrt()
    assert float(schedule.level(between)) == pytest.approx(7.5)
    assert schedule.level(torch.tensor([1e-9, 1e9])).tolist() == [1, 1000]
    assert with_start(torch.tensor([0.5])).tolist() == [1, 0.5]


def test_pixels_convert_both_ways() -> None:
    x = torch.tensor([[0.0, 0.25, 1.0]])
    assert encode(x).tolist() == [[-1.0, -0.5, 1.0]]
    assert torch.equal(decode(encode(x)), x)


def test_a_column_is_a_scalar_or_one_value_a_row() -> None:
    like = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    assert column(0.5, like).shape == ()
    assert column(torch.tensor([0.5, 1.0]), like).shape == (2, 1, 1, 1)
    assert column(torch.tensor([0.5, 1.0]), like).dtype == torch.float64


# The mixture


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_score_is_the_gradient_of_the_log_density(mixture: MixtureDenoiser, sigma: float) -> None:
    x = uniforms(7, 1, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    assert torch.allclose(mixture.score(x, sigma), gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_each_class_is_denoised_by_its_own_components(mixture: MixtureDenoiser, sigma: float) -> None:
    x = uniforms(7, 1, 2, 3).requires_grad_()
    each = mixture.denoise_each(x, sigma)
    densities = mixture.class_log_density(x, sigma)
    assert each.shape == (7, 2, 1, 2, 3)
    for y in range(2):
        (gradient,) = torch.autograd.grad(densities[:, y].sum(), x, retain_graph=True)
        assert torch.allclose(each[:, y], x + sigma**2 * gradient, atol=1e-8)
    # The classes' densities make up the whole one: weights .7 and .3.
    whole = (densities + torch.tensor([0.7, 0.3]).double().log()).logsumexp(1)
    assert torch.allclose(whole, mixture.log_density(x, sigma))
    some = mixture.denoise_some(x, sigma, torch.tensor([[1], [0], [0], [1], [1], [0], [1]]))
    assert torch.equal(some[0, 0], each[0, 1])
    assert torch.equal(some[1, 0], each[1, 0])


def test_the_density_integrates_to_one() -> None:
    weights, stds = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.2, 0.4], dtype=torch.float64)
    mixture = MixtureDenoiser(weights, torch.tensor([-0.5, 0.8], dtype=torch.float64).reshape(2, 1, 1, 1), stds)
    points = torch.linspace(-20, 20, 40001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for sigma in (0.0, 0.05, 2.0):
        assert float(mixture.log_density(points, sigma).exp().sum() * 1e-3) == pytest.approx(1, abs=1e-9)


def test_a_class_without_a_component_is_refused() -> None:
    with pytest.raises(InputError, match="every class from 0 to 2 needs a component"):
        MixtureDenoiser(torch.ones(2) / 2, torch.zeros(2, 1, 1, 1), torch.ones(2), labels=torch.tensor([0, 2]))


# Every kind


class Silent(nn.Module):
    """F = 0, which preconditioning makes exact for N(0, σ_d²)."""

    def forward(self, x: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.zeros(len(x), 3, *x.shape[2:]).to(x),)


def seeded(build: type[nn.Module] | object) -> nn.Module:
    assert callable(build)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = build()
    return network.double()


def denoisers() -> list[Denoiser]:
    half, small = torch.full((2,), 0.5, dtype=torch.float64), torch.full((2,), 0.2, dtype=torch.float64)
    return [
        MixtureDenoiser(half, uniforms(2, 1, 8, 8), small, labels=torch.tensor([0, 1])),
        seeded(lambda: UNetDenoiser(small_unet())),
        seeded(lambda: UNetDenoiser(small_unet(), prediction="v_prediction")),
        seeded(lambda: UNetDenoiser(small_unet(), prediction="sample")),
        seeded(lambda: EDMDenoiser(small_unet(outputs=3), n_classes=2)),
        seeded(lambda: ScoreDenoiser(ScoreNet(), (0.05, 2.0))),
        seeded(lambda: EnergyDenoiser(EnergyNet(), (0.05, 2.0))),
        GaussianDenoiser(lambda x, sigma: x - sigma[:, None, None, None] * x),
    ]


each_kind = pytest.mark.parametrize("denoiser", denoisers(), ids=lambda denoiser: type(denoiser).__name__)


@each_kind
def test_a_sigma_a_row_is_a_sigma_at_a_time(denoiser: Denoiser) -> None:
    x, sigmas = uniforms(3, 1, 8, 8), torch.tensor([0.06, 0.3, 0.58], dtype=torch.float64)
    together = denoiser.denoise(x, sigmas)
    assert together.dtype == x.dtype
    for row, sigma in enumerate(sigmas.tolist()):
        # diffusers embeds times in float32, and tells a scalar from a tensor by its last bit.
        assert torch.allclose(together[row], denoiser.denoise(x[row : row + 1], sigma)[0], atol=1e-5)


@each_kind
@pytest.mark.parametrize("t", [5, 150])
def test_eps_and_denoise_are_one_prediction_in_two_forms(denoiser: Denoiser, t: int) -> None:
    x_t = uniforms(3, 1, 8, 8)
    alpha_bar = float(denoiser.schedule.alpha_bars[t])
    eps = denoiser.eps(x_t, t)
    x_0 = (x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    assert torch.allclose(denoiser.denoise(x_t / math.sqrt(alpha_bar), denoiser.schedule.sigma(t)), x_0, atol=1e-5)
    rows = denoiser.eps(x_t, torch.tensor([t, t, t]))
    assert torch.allclose(rows, eps, atol=1e-5)


@each_kind
def test_the_score_is_tweedie_s(denoiser: Denoiser) -> None:
    x = uniforms(3, 1, 8, 8)
    assert torch.allclose(denoiser.score(x, 0.5), (denoiser.denoise(x, 0.5) - x) / 0.25, atol=1e-9)


def test_a_denoiser_without_a_prediction_says_what_to_write() -> None:
    with pytest.raises(NotImplementedError, match=r"must implement denoise\(x, sigma\) or eps"):
        Denoiser().denoise(torch.zeros(1, 1, 2, 2), 0.5)


def test_only_class_conditional_denoisers_have_classes() -> None:
    for denoiser in denoisers():
        x = uniforms(2, 1, 8, 8)
        if denoiser.n_classes:
            assert denoiser.denoise_each(x, 0.5).shape == (2, denoiser.n_classes, 1, 8, 8)
        else:
            with pytest.raises(InputError, match="not class-conditional"):
                denoiser.denoise_each(x, 0.5)


def test_the_network_is_told_diffusers_times() -> None:
    times: list[object] = []

    class Network(nn.Module):
        def forward(self, x: Tensor, t: object, return_dict: bool) -> tuple[Tensor]:
            times.append(t)
            return (x,)

    denoiser = UNetDenoiser(Network())
    denoiser.eps(torch.zeros(2, 1, 8, 8), 1)
    denoiser.eps(torch.zeros(2, 1, 8, 8), torch.tensor([1, 1000]))
    denoiser.denoise(torch.zeros(2, 1, 8, 8), denoiser.schedule.sigma(150))
    assert times[0] == 0
    assert isinstance(times[1], Tensor)
    assert times[1].tolist() == [0, 999]
    assert float(times[2]) == pytest.approx(149, abs=1e-4)


def test_predictions_of_v_and_of_the_sample_mean_what_they_say() -> None:
    x_0, z = uniforms(2, 3, 1, 8, 8)
    for t in LEVELS[:3]:
        a = linear_schedule().alpha_bars[t]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * z
        outputs = {"epsilon": z, "v_prediction": a.sqrt() * z - (1 - a).sqrt() * x_0, "sample": x_0}
        for prediction, output in outputs.items():

            class Network(nn.Module):
                def forward(self, x: Tensor, t: object, return_dict: bool, output: Tensor = output) -> tuple[Tensor]:
                    # A learned variance rides in the channels behind the image's.
                    return (torch.cat([output, output], 1),)

            denoiser = UNetDenoiser(Network(), prediction=prediction)
            assert torch.allclose(denoiser.eps(x_t, t), z, atol=1e-9)
            assert torch.allclose(denoiser.denoise(x_t / a.sqrt(), denoiser.schedule.sigma(t)), x_0, atol=1e-6)
    with pytest.raises(InputError, match="prediction must be"):
        UNetDenoiser(small_unet(), prediction="noise")


def test_class_labels_reach_a_conditional_u_net() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (class_labels.to(x)[:, None, None, None] * torch.ones_like(x),)

    denoiser = UNetDenoiser(Network(), n_classes=3)
    x = uniforms(2, 1, 4, 4)
    each = denoiser.denoise_each(x, 0.5)
    for y in range(3):
        assert torch.allclose(each[:, y], x - 0.5 * y)
    some = denoiser.denoise_some(x, torch.tensor([0.5, 1.0]), torch.tensor([[2], [1]]))
    assert torch.allclose(some[:, 0], x - 1.0)


def test_preconditioning_is_exact_where_the_network_is_silent() -> None:
    x, exact = uniforms(3, 1, 4, 4), EDMDenoiser(Silent(), n_classes=2)
    for sigma in (0.05, 0.5, 4.0):
        # Of N(0, .25) data, E[x_0 | x] = .25/(.25 + σ²)·x.
        assert torch.allclose(exact.denoise(x, sigma), 0.25 / (0.25 + sigma**2) * x)
        assert torch.allclose(exact.denoise_each(x, sigma)[:, 1], 0.25 / (0.25 + sigma**2) * x)


def test_an_energy_s_score_is_its_negative_gradient() -> None:
    class Bowl(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.square().flatten(1).sum(1)

    denoiser, x = EnergyDenoiser(Bowl(), (0.1, 1.0)), uniforms(3, 1, 4, 4)
    assert torch.allclose(denoiser.score(x, 0.5), -x / 0.5)
    assert torch.allclose(denoiser.denoise(x, 0.5), x - 0.5 * x)
    with torch.no_grad():
        assert torch.allclose(denoiser.score(x, 0.5), -x / 0.5)


def test_a_gaussian_denoiser_is_asked_in_pixel_units() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        seen.extend([x, sigma])
        return x

    x = torch.rand(2, 3, 4, 4)
    denoiser = GaussianDenoiser(network)
    assert torch.allclose(denoiser.denoise(encode(x), 0.5), encode(x), atol=1e-6)
    assert torch.allclose(seen[0], x, atol=1e-6)
    assert seen[1].tolist() == [0.25, 0.25]
    check_sigmas(denoiser, [0.5, 150 / 255], "this")
    with pytest.raises(InputError, match=r"this needs σ = 0\.6 .* usable from 0 to 0\.5882"):
        check_sigmas(denoiser, [0.5, 0.6], "this")
