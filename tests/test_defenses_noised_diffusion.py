"""EPNDC and APNDC: the paper's formulas, the limit on an exact denoiser, gradients, stages, votes, accuracy."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from assay import data
from assay.defense import DefenseSpec
from assay.defenses import apndc, epndc
from assay.defenses.apndc import APNDC
from assay.defenses.class_errors import Comparison, Grid, Sift, Weighting, plain_levels, training_weight
from assay.defenses.denoiser import encode
from assay.defenses.epndc import EPNDC, exact_levels
from assay.defenses.mixture import MixtureDenoiser
from assay.defenses.noised_diffusion import NoisedDiffusionClassifier
from assay.errors import InputError
from assay.noise import Noise

TAU = 0.5
GRID = Grid(TAU, 3.0, 4, "log")


def mixture() -> MixtureDenoiser:
    """Three classes of two Gaussians over 1×2×2 images."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(6, 1, 2, 2, generator=generator).double() * 1.6 - 0.8
    stds = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.15, 0.25]).double()
    return MixtureDenoiser(torch.full((6,), 1 / 6).double(), means, stds, torch.arange(6) % 3)


def noised_images(n: int) -> Tensor:
    """x_τ of the mixture's means."""
    clean: Tensor = mixture().means[torch.arange(n) % 6]
    return clean + TAU * Noise.from_seed(7, n).normal("x", shape=(1, 2, 2), like=clean)


def pixels(n: int) -> Tensor:
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


KINDS: dict[str, NoisedDiffusionClassifier] = {
    "epndc": EPNDC(mixture(), grid=GRID),
    "epndc-training": EPNDC(mixture(), grid=GRID, weighting="training"),
    "epndc-sifted": EPNDC(mixture(), grid=GRID, sift=Sift(2, 2)),
    "apndc": APNDC(mixture(), grid=GRID, samples=2),
    "apndc-elbo": APNDC(mixture(), grid=GRID, weighting="elbo"),
    "apndc-noised": APNDC(mixture(), grid=GRID, renoise="noised"),
}
each = pytest.mark.parametrize("defense", KINDS.values(), ids=KINDS)


# --- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["kl", "training"])
def test_epndc_is_the_paper_s_formula(weighting: Weighting) -> None:
    denoiser, x, n = mixture(), noised_images(4), 4
    sigmas = (TAU, 0.7, 1.3, 3.0)
    table, noise = exact_levels(sigmas, weighting), Noise.from_seed(0, 4)
    expected = torch.zeros(n, 3).double()
    for i, (low, high) in enumerate(pairwise(sigmas)):
        added, gap = high**2 - TAU**2, high**2 - low**2
        eps = noise.child("step", i).normal("eps", shape=(1, 1, 2, 2), like=x)[:, 0]
        above = x + eps * math.sqrt(added)
        q = (gap * x + (low**2 - TAU**2) * above) / added
        p = (gap * denoiser.denoise_each(above, high) + low**2 * above[:, None]) / high**2
        below = gap if i == 0 else low**2 - TAU**2
        weight = added / (2 * below * gap)
        if weighting == "training":
            weight = training_weight(low, high - low) * high**2 * added / (4 * (high - low) ** 2 * below)
        expected -= weight * (q[:, None] - p).square().flatten(2).sum(2)
    assert torch.allclose(Comparison(denoiser, table).everything(x, x, noise), expected, rtol=1e-10)


def test_epndc_s_kl_weights_by_hand() -> None:
    # τ = 1 to σ = 2 to 3: s² = 3, Δ = 3, so ½/3·(3/4)²; then s² = 8, Δ = 5, σ_i²−τ² = 3, so 8/30·(5/9)².
    first, second = exact_levels((1.0, 2.0, 3.0))
    assert (first.sigma, first.spread, first.shift) == pytest.approx((2, math.sqrt(3), 1 / math.sqrt(3)))
    assert first.weight == pytest.approx(1 / 6 * 9 / 16)
    assert (second.sigma, second.spread, second.shift) == pytest.approx((3, math.sqrt(8), 1 / math.sqrt(8)))
    assert second.weight == pytest.approx(8 / 30 * 25 / 81)


def test_without_noise_of_its_own_epndc_is_the_diffusion_classifier() -> None:
    sigmas = (0.3, 0.8, 1.5, 3.0)
    exact, plain = exact_levels((1e-9, *sigmas)), plain_levels(sigmas, "elbo")
    for a, b in zip(exact, plain, strict=True):
        assert (a.sigma, a.spread, a.weight) == pytest.approx((b.sigma, b.spread, b.weight))
        assert a.shift == pytest.approx(0, abs=1e-12)


def test_the_bound_s_weight_for_w_dc_is_the_kl_weight_again() -> None:
    """Why `elbo` is no third weighting of EPNDC: the paper's alternative with it tends to the KL weight."""
    sigmas = Grid(TAU, 3.0, 2001).sigmas
    for i in (50, 500, 1500):
        low, high = sigmas[i], sigmas[i + 1]
        added, below, gap = high**2 - TAU**2, low**2 - TAU**2, high**2 - low**2
        bound = (1 / low**2 - 1 / high**2) / 2
        alternative = bound * high**2 * added / (4 * (high - low) ** 2 * below)
        assert alternative == pytest.approx(added / (2 * below * gap), rel=0.01)


def test_apndc_is_the_diffusion_classifier_of_the_denoised_image() -> None:
    defense, x, noise = KINDS["apndc-elbo"], pixels(5), Noise.from_seed(0, 5)
    x_tau = defense.noised(x, noise.child("start"))
    assert float((x_tau - encode(x)).std()) == pytest.approx(TAU, rel=0.5)
    restored = defense.denoiser.denoise(x_tau, TAU)
    table = plain_levels(GRID.sigmas, "elbo")
    expected = torch.zeros(5, 3).double()
    for i, level in enumerate(table):
        eps = noise.child("step", i).normal("eps", shape=(1, 1, 2, 2), like=x)[:, 0]
        clean = defense.denoiser.denoise_each(restored + level.sigma * eps, level.sigma)
        expected -= level.weight * (clean - restored[:, None]).square().flatten(2).sum(2)
    assert torch.allclose(defense.draw(x, noise), expected, atol=1e-9)


def test_apndc_s_variant_tops_up_the_noise_of_the_noised_image() -> None:
    defense, x, noise = KINDS["apndc-noised"], pixels(5), Noise.from_seed(0, 5)
    image, target = defense.start(x, noise)
    assert torch.equal(image, defense.noised(x, noise))
    assert torch.allclose(target, defense.denoiser.denoise(image, TAU), atol=1e-12)
    for level, sigma in zip(defense.levels(GRID), GRID.sigmas, strict=True):
        assert level.spread**2 + TAU**2 == pytest.approx(sigma**2)
        assert level.sigma == sigma
    with pytest.raises(InputError, match="has no stages"):
        defense.stages()


# --- the limit --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def error(levels: int, samples: int, highest: float = 100.0, images: int = 12) -> float:
    """Of EPNDC's logits against log p_τ(x_τ | y), root mean square, each less its mean over classes."""
    denoiser, x = mixture(), noised_images(images)
    table = exact_levels(Grid(TAU, highest, levels + 1, "log").sigmas)
    logits = Comparison(denoiser, table, samples, rows=1 << 18).everything(x, x, Noise.from_seed(0, images))
    return float((centred(logits) - centred(denoiser.class_log_density(x, TAU))).square().mean().sqrt())


def test_epndc_converges_to_the_log_posterior_as_one_over_root_n() -> None:
    squares = [error(2000, samples, images=48) ** 2 for samples in (1, 4, 16)]
    # A square is a²/samples, and what the grid's width leaves; differences are without the latter.
    fall, further_fall = (more - fewer for more, fewer in pairwise(squares))
    assert fall / further_fall == pytest.approx(4, rel=0.25)
    assert math.sqrt(squares[-1]) < 0.06
    # The exact centred logits are far larger than what is left.
    assert float(centred(mixture().class_log_density(noised_images(12), TAU)).std()) > 0.5


def test_what_is_left_falls_with_the_width_of_the_grid() -> None:
    coarse, fine = error(100, 64), error(1000, 64)
    assert coarse > 2.5 * fine
    assert fine < 0.07


def test_what_the_top_leaves_out_falls_as_the_top_rises() -> None:
    """E log p_σ(x_σ | y) at the top is not in the sum; it is the same for all classes once σ is large."""
    low, high = error(1000, 64, highest=0.8), error(1000, 64, highest=30.0)
    assert low > 4 * high


# --- draw, chain, gradient --------------------------------------------------------------------------------------------


@each
def test_the_chain_is_the_draw_with_the_same_gradient(defense: NoisedDiffusionClassifier) -> None:
    x, noise, labels = pixels(6), Noise.from_seed(0, 6), torch.arange(6) % 3
    chain = defense.chain()
    assert len(chain) == 4
    assert torch.allclose(chain(x, noise), defense.draw(x, noise), atol=1e-10)
    slopes = []
    for run in (defense.draw, chain, lambda z, noise: chain(z, noise, mode="full")):
        point = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(F.cross_entropy(run(point, noise), labels), point)[0])
    assert float(slopes[0].abs().max()) > 1e-3
    assert torch.allclose(slopes[1], slopes[0], atol=1e-10)
    assert torch.allclose(slopes[2], slopes[0], atol=1e-10)


@each
def test_the_gradient_is_its_finite_difference(defense: NoisedDiffusionClassifier) -> None:
    x, noise, labels, step = pixels(6), Noise.from_seed(0, 6), torch.arange(6) % 3, 1e-6
    direction = Noise.from_seed(1, 6).normal("direction", shape=(1, 2, 2), like=x)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(defense.draw(z, noise), labels)

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert float(numeric) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@each
def test_a_draw_is_replayed_bitwise_and_keeps_rows_apart(defense: NoisedDiffusionClassifier) -> None:
    x, noise, rows = pixels(7), Noise.from_seed(0, 7), torch.tensor([5, 1, 2])
    whole = defense.draw(x, noise)
    assert torch.equal(whole, defense.draw(x, noise))
    assert not torch.equal(whole, defense.draw(x, noise.child("other")))
    assert torch.allclose(defense.draw(x[rows], noise[rows]), whole[rows], atol=1e-12)
    assert defense(x[:0], noise[:0]).shape == (0, 3)


@each
def test_a_surrogate_starts_at_the_same_noise(defense: NoisedDiffusionClassifier) -> None:
    x, noise = pixels(3), Noise.from_seed(0, 3)
    seen: list[Tensor] = []
    for steps, expected in ((1, 1), (3, 3), (99, 4)):
        chain = defense.surrogate(steps)
        assert len(chain) == expected
        assert chain.network_calls == expected * defense.samples + defense.start_calls
        chain(x, noise, observe=lambda i, state: seen.append(state[0]) if i == 0 else None)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    levels = [level.sigma for level in defense.levels(defense.grid.shorter(2))]
    assert levels[-1] == pytest.approx(3)


def test_stages_compose_to_the_draw_bitwise() -> None:
    defense, x, noise = KINDS["apndc"], pixels(5), Noise.from_seed(0, 5)
    stages = defense.stages()
    purified = stages.purify(x, noise)
    assert purified.shape == x.shape
    assert torch.equal(stages.classify(purified, noise), defense.draw(x, noise))


@each
def test_the_answer_is_the_majority_of_draws(defense: NoisedDiffusionClassifier) -> None:
    x, noise = pixels(4), Noise.from_seed(0, 4)
    draws = defense.draw(x.repeat_interleave(16, 0), noise.draws(16)).argmax(1).reshape(4, 16)
    shares = F.one_hot(draws, 3).double().mean(1)
    assert torch.allclose(defense(x, noise).exp(), shares.clamp_min(0.5 / 16), atol=1e-6)


@each
def test_the_base_has_no_smoothing_noise(defense: NoisedDiffusionClassifier) -> None:
    x, noise = pixels(4), Noise.from_seed(0, 4)
    silent = type(defense)(defense.denoiser, grid=GRID, weighting=defense.weighting, samples=defense.samples)
    silent.noised = lambda x, noise: encode(x)  # type: ignore[method-assign]
    silent.sift = defense.sift
    if isinstance(silent, APNDC) and isinstance(defense, APNDC):
        silent.renoise = defense.renoise
    assert torch.equal(defense.components()["base"](x, noise), silent.draw(x, noise))


# --- refusals and options ---------------------------------------------------------------------------------------------


def test_the_default_grid_is_the_paper_s() -> None:
    for kind in (EPNDC, APNDC):
        defense = kind(mixture(), sigma=0.5)
        assert defense.grid == Grid(1.0, 3.0, 126)
        assert len(defense.chain()) == 126


def test_what_does_not_fit_is_refused() -> None:
    denoiser = mixture()
    with pytest.raises(InputError, match=r"must start at the image's noise, τ = 2σ = 0\.5; it starts at 0\.3"):
        EPNDC(denoiser, grid=Grid(0.3, 3.0, 5))
    with pytest.raises(InputError, match="must be kl or training, got 'elbo'"):
        EPNDC(denoiser, weighting="elbo")
    with pytest.raises(InputError, match="must be training or elbo, got 'kl'"):
        APNDC(denoiser, weighting="kl")
    with pytest.raises(InputError, match="renoise must be denoised or noised"):
        APNDC(denoiser, renoise="x")  # type: ignore[arg-type]


# --- digits -----------------------------------------------------------------------------------------------------------


specs = pytest.mark.parametrize("spec", [epndc.SPEC, apndc.SPEC], ids=["epndc", "apndc"])


@specs
def test_digits_accuracy_and_calls(spec: DefenseSpec) -> None:
    defense = spec.build("digits")
    assert isinstance(defense, NoisedDiffusionClassifier)
    x, y = data.load("digits", data.test_ids("digits")[:100])
    with torch.no_grad():
        answer = defense(x, Noise.from_seed(0, len(x)))
    assert float((answer.argmax(1) == y).double().mean()) >= 0.88
    assert defense.chain().network_calls == defense.card.network_calls == 5
    assert defense.tau == GRID.lowest


@specs
def test_digits_gradient_is_its_finite_difference(spec: DefenseSpec) -> None:
    defense = spec.build("digits").double()
    x, y = data.load("digits", data.train_split("digits")[-3:])
    x, noise, step = 0.1 + 0.8 * x.double(), Noise.from_seed(0, 3), 1e-5
    direction = Noise.from_seed(1, 3).normal("direction", shape=(1, 8, 8), like=x)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(defense.draw(z, noise), y)

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert float(numeric) == pytest.approx(float((gradient * direction).sum()), rel=1e-4)
