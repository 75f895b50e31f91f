"""The diffusion classifier: its weights by hand, its limit on an exact denoiser, its gradient, sifting, accuracy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from assay import data
from assay.card import Card
from assay.chain import Mode
from assay.defenses.class_errors import (
    Comparison,
    Grid,
    Level,
    Sift,
    class_errors,
    elbo_weights,
    plain_levels,
    training_weight,
    training_weights,
)
from assay.defenses.denoiser import encode
from assay.defenses.diffusion_classifier import CARD, DIGITS_GRID, PAPER_GRID, SPEC, DiffusionClassifier
from assay.defenses.mixture import MixtureDenoiser
from assay.defenses.recipes import digits_heads
from assay.defenses.schedule import Sigma
from assay.errors import InputError
from assay.noise import Noise


def mixture(k: int = 3, apart: float = 0.8) -> MixtureDenoiser:
    """k classes of two Gaussians over 1×2×2 images."""
    generator = torch.Generator().manual_seed(0)
    means = (torch.rand(2 * k, 1, 2, 2, generator=generator).double() * 2 - 1) * apart
    stds = 0.15 + 0.25 * torch.rand(2 * k, generator=generator).double()
    return MixtureDenoiser(torch.full((2 * k,), 1 / (2 * k)).double(), means, stds, torch.arange(2 * k) % k)


def pixels(n: int) -> Tensor:
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def small(sift: Sift | None = None, card: Card = CARD) -> DiffusionClassifier:
    return DiffusionClassifier(mixture(), Grid(0.2, 3.0, 5, "log"), "elbo", samples=3, sift=sift, card=card)


class PerClass(MixtureDenoiser):
    """A mixture whose classes are said to cost a call each, and counted."""

    calls = 0

    def denoise_each(self, x: Tensor, sigma: Sigma) -> Tensor:
        self.calls += len(x) * self.n_classes
        return super().denoise_each(x, sigma)

    def denoise_some(self, x: Tensor, sigma: Sigma, classes: Tensor) -> Tensor:
        self.calls += classes.numel()
        each = super().denoise_each(x, sigma)
        return each.gather(1, classes[..., None, None, None].expand(-1, -1, *each.shape[2:]))


def per_class(k: int) -> PerClass:
    plain = mixture(k)
    return PerClass(plain.weights, plain.means, plain.stds, plain.labels)


# --- grids and weights ------------------------------------------------------------------------------------------------


def test_grids_hold_both_ends_evenly_spaced() -> None:
    assert Grid(1.0, 3.0, 3).sigmas == pytest.approx((1, 2, 3))
    assert Grid(0.5, 8.0, 3, "log").sigmas == pytest.approx((0.5, 2, 8))
    assert Grid(1.0, 3.0, 1).sigmas == pytest.approx((2,))
    assert Grid(1.0, 3.0, 5).shorter(9) == Grid(1.0, 3.0, 5)
    assert Grid(1.0, 3.0, 5).shorter(2).sigmas == pytest.approx((1, 3))


@pytest.mark.parametrize("bad", [(0.0, 3.0, 5), (3.0, 3.0, 5), (1.0, 3.0, 0)])
def test_an_empty_grid_is_refused(bad: tuple[float, float, int]) -> None:
    with pytest.raises(InputError, match="0 < lowest < highest"):
        Grid(*bad)


def test_the_training_weight_is_edm_s_by_hand() -> None:
    # At ln σ = −1.2 the normal density is 1/(1.2·√(2π)) = .332452; σ = .301194, (σ²+.25)/(.5σ)² = 15.02318.
    sigma = math.exp(-1.2)
    assert training_weight(sigma, 1.0) == pytest.approx(15.02318 * 0.332452 / 0.301194, rel=1e-5)
    # σ = 1, ln σ = 0 is one standard deviation above: the density falls by e^−½; (1+.25)/.25 = 5.
    assert training_weight(1.0, 0.1) == pytest.approx(5 * 0.332452 * math.exp(-0.5) * 0.1, rel=1e-5)


def test_training_weights_integrate_the_log_normal() -> None:
    sigmas = Grid(1e-4, 20.0, 40_000).sigmas
    share = [w * (s * 0.5) ** 2 / (s**2 + 0.25) for s, w in zip(sigmas, training_weights(sigmas), strict=True)]
    assert sum(share) == pytest.approx(1, abs=1e-3)


def test_elbo_weights_by_hand() -> None:
    assert elbo_weights((0.5, 1.0, 2.0)) == pytest.approx((2.0, 1.5, 0.375))
    # Those above the first telescope: ½(1/σ_1² − 1/σ_T²).
    assert sum(elbo_weights(PAPER_GRID.sigmas)[1:]) == pytest.approx((1e8 - 1 / 9) / 2)


def test_the_paper_s_grid_has_126_levels_up_to_3() -> None:
    assert len(PAPER_GRID.sigmas) == 126
    assert PAPER_GRID.sigmas[-1] == pytest.approx(3)


# --- the sum ----------------------------------------------------------------------------------------------------------


def test_the_sum_is_the_formula() -> None:
    denoiser, n = mixture(), 4
    image, target = pixels(n), pixels(2 * n)[n:]
    levels = (Level(0.5, 0.3, 2.0, 0.7), Level(1.5, 1.2, 0.4))
    noises = [Noise.from_seed(i, n) for i in range(2)]
    expected = torch.zeros(n, 3).double()
    for level, noise in zip(levels, noises, strict=True):
        eps = noise.normal("eps", shape=(2, 1, 2, 2), like=image)
        for j in range(2):
            clean = denoiser.denoise_each(image + level.spread * eps[:, j], level.sigma)
            aim = target - level.shift * eps[:, j]
            expected += level.weight / 2 * (clean - aim[:, None]).square().flatten(2).sum(2)
    found = class_errors(denoiser, image, target, levels, noises, samples=2)
    assert torch.allclose(found, expected, atol=1e-12)
    classes = torch.tensor([[2, 0]] * n)
    some = class_errors(denoiser, image, target, levels, noises, samples=2, classes=classes)
    assert torch.allclose(some, expected[:, [2, 0]], atol=1e-12)


def test_classes_share_their_noise() -> None:
    """Two classes with the same density have the same logits, with any noise."""
    plain = mixture(2)
    means = plain.means[[0, 0, 2, 2]]
    twins = MixtureDenoiser(plain.weights, means, plain.stds[[0, 0, 2, 2]], torch.tensor([0, 1, 0, 1]))
    logits = DiffusionClassifier(twins, Grid(0.2, 3.0, 4)).draw(pixels(5), Noise.from_seed(0, 5))
    assert torch.allclose(logits[:, 0], logits[:, 1], rtol=1e-12)
    assert float(logits.std(0).min()) > 0


@torch.no_grad()
def bound_error(levels: int, samples: int) -> float:
    denoiser, n = mixture(), 8
    x = denoiser.means[torch.arange(n) % 6] * 0.9
    comparison = Comparison(
        denoiser, plain_levels(Grid(0.02, 100.0, levels, "log").sigmas, "elbo"), samples, rows=10**6
    )
    logits = comparison.everything(x, x, Noise.from_seed(0, n))
    return float((centred(logits) - centred(denoiser.class_log_density(x, 0.0))).square().mean().sqrt())


def test_logits_with_the_bound_s_weights_converge_to_the_clean_log_density() -> None:
    few, more, many = bound_error(1500, 1), bound_error(1500, 4), bound_error(1500, 64)
    assert 1.5 < few / more < 2.7
    assert many < 0.06
    assert bound_error(100, 64) > 2 * many


def test_gaussian_classes_far_apart_are_told_apart_by_distance() -> None:
    means = torch.stack([torch.full((1, 2, 2), v) for v in (-0.6, 0.0, 0.6)]).double()
    denoiser = MixtureDenoiser(
        torch.full((3,), 1 / 3).double(), means, torch.full((3,), 0.05).double(), torch.arange(3)
    )
    x = (means.repeat_interleave(10, 0) + 1) / 2
    logits = DiffusionClassifier(denoiser, Grid(0.2, 3.0, 6, "log")).draw(x, Noise.from_seed(0, 30))
    assert torch.equal(logits.argmax(1), torch.arange(3).repeat_interleave(10))


# --- draw, chain, gradient --------------------------------------------------------------------------------------------


def slope(defense: DiffusionClassifier, x: Tensor, noise: Noise, mode: Mode | None = None) -> Tensor:
    """The gradient of a cross-entropy at `x`, by the draw or by the chain."""
    point = x.clone().requires_grad_()
    logits = defense.draw(point, noise) if mode is None else defense.chain()(point, noise, mode=mode)
    (gradient,) = torch.autograd.grad(F.cross_entropy(0.1 * logits, torch.arange(len(x)) % 3), point)
    return gradient


sifts = pytest.mark.parametrize("sift", [None, Sift(2, 2)], ids=["whole", "sifted"])


@sifts
def test_the_chain_is_the_draw_with_the_same_gradient(sift: Sift | None) -> None:
    defense, x, noise = small(sift), pixels(6), Noise.from_seed(0, 6)
    assert len(defense.chain()) == 5
    assert torch.allclose(defense.chain()(x, noise), defense.draw(x, noise), atol=1e-10)
    expected = slope(defense, x, noise)
    assert float(expected.abs().max()) > 1e-3
    for mode in ("exact", "full"):
        assert torch.allclose(slope(defense, x, noise, mode), expected, atol=1e-10)


@sifts
def test_the_gradient_is_its_finite_difference(sift: Sift | None) -> None:
    defense, x, noise, step = small(sift), pixels(6), Noise.from_seed(0, 6), 1e-6
    direction = Noise.from_seed(1, 6).normal("direction", shape=(1, 2, 2), like=x)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(0.1 * defense.draw(z, noise), torch.arange(6) % 3)

    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    analytic = (slope(defense, x, noise) * direction).sum()
    assert float(numeric) == pytest.approx(float(analytic), rel=1e-6)


def test_a_draw_is_replayed_bitwise_and_keeps_rows_apart() -> None:
    defense, x, noise = small(), pixels(7), Noise.from_seed(0, 7)
    rows, state = torch.tensor([5, 1, 2]), torch.get_rng_state()
    whole = defense.draw(x, noise)
    assert torch.equal(whole, defense.draw(x, noise))
    assert not torch.equal(whole, defense.draw(x, noise.child("other")))
    assert torch.allclose(defense.draw(x[rows], noise[rows]), whole[rows], atol=1e-12)
    assert defense.draw(x[:0], noise[:0]).shape == (0, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_bound_a_network_call_and_change_nothing() -> None:
    x, noise = pixels(9), Noise.from_seed(0, 9)
    denoiser = per_class(3)
    sizes: list[int] = []
    plain = denoiser.denoise_each

    def measured(x: Tensor, sigma: Sigma) -> Tensor:
        sizes.append(len(x))
        return plain(x, sigma)

    denoiser.denoise_each = measured  # type: ignore[method-assign]
    grid = Grid(0.2, 3.0, 5)
    whole, cut = (DiffusionClassifier(denoiser, grid, rows=rows).draw(x, noise) for rows in (512, 12))
    assert sizes == [45, 10, 10, 10, 10, 5]
    assert torch.allclose(whole, cut, atol=1e-12)


def test_a_surrogate_keeps_the_range_in_fewer_levels() -> None:
    defense = small()
    x, noise = pixels(3), Noise.from_seed(0, 3)
    for steps, expected in ((1, 1), (2, 2), (99, 5)):
        chain = defense.surrogate(steps)
        assert len(chain) == expected
        assert chain.network_calls == 3 * expected
        assert chain(x, noise).shape == (3, 3)
    assert torch.equal(defense.surrogate(5)(x, noise), defense.chain()(x, noise))
    with pytest.raises(InputError, match="at least 1 step"):
        defense.surrogate(0)


# --- sift and refine --------------------------------------------------------------------------------------------------


def test_sifting_keeps_the_answer_and_saves_calls() -> None:
    k, n = 8, 40
    denoiser = per_class(k)
    denoiser.stds.mul_(0.3)
    labels = torch.arange(n) % k
    x, noise = denoiser.means[torch.arange(n) % (2 * k)], Noise.from_seed(0, n)
    table = plain_levels(Grid(0.3, 3.0, 12, "log").sigmas, "elbo")
    sifting = Comparison(denoiser, table, 2, Sift(3, 4))
    # The same order of levels, so that the two see the same noise.
    comparing = Comparison(denoiser, sifting.coarse + sifting.fine, 2)
    answers = []
    for comparison, calls in ((comparing, 12 * k), (sifting, 3 * k + 9 * 3)):
        denoiser.calls = 0
        answers.append(comparison.everything(x, x, noise))
        assert denoiser.calls == 2 * calls * n
        assert comparison.network_calls == 2 * calls
    whole, sifted = answers
    assert float((whole.argmax(1) == labels).double().mean()) > 0.9
    assert torch.equal(whole.argmax(1), sifted.argmax(1))
    # Three classes have their whole error; the others stand below them, and are no constants.
    kept = torch.isclose(whole, sifted, rtol=1e-9)
    assert torch.equal(kept.sum(1), torch.full((n,), 3))
    worst = sifted.masked_fill(~kept, math.inf).amin(1)
    assert bool((sifted.masked_fill(kept, -math.inf).amax(1) < worst).all())
    assert float(sifted.masked_fill(kept, 0).sum(1).std()) > 0


def test_a_sifted_class_still_has_a_gradient() -> None:
    defense, x, noise = small(Sift(1, 2)), pixels(4).requires_grad_(), Noise.from_seed(0, 4)
    logits = defense.draw(x, noise)
    out = logits.argsort(1)[:, 0]
    lowest = logits.gather(1, out[:, None]) - logits.amax(1, keepdim=True)
    (gradient,) = torch.autograd.grad(lowest.sum(), x)
    assert float(gradient.flatten(1).norm(dim=1).min()) > 1e-6


def test_sifting_no_class_out_changes_nothing() -> None:
    x, noise = pixels(5), Noise.from_seed(0, 5)
    grid = Grid(0.2, 3.0, 6)
    every = DiffusionClassifier(mixture(), grid, "elbo", sift=Sift(3, 1)).draw(x, noise)
    assert torch.allclose(every, DiffusionClassifier(mixture(), grid, "elbo").draw(x, noise), atol=1e-12)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    denoiser = mixture()
    classless = MixtureDenoiser(denoiser.weights, denoiser.means, denoiser.stds)
    with pytest.raises(InputError, match="knows none"):
        DiffusionClassifier(classless)
    with pytest.raises(InputError, match="weighting must be training or elbo, got 'kl'"):
        DiffusionClassifier(denoiser, weighting="kl")
    with pytest.raises(InputError, match="keeps 1 to 3 classes"):
        DiffusionClassifier(denoiser, sift=Sift(4, 2))
    with pytest.raises(InputError, match="samples and rows"):
        DiffusionClassifier(denoiser, samples=0)
    with pytest.raises(InputError, match=r"usable from 0\.02 to 6"):
        DiffusionClassifier(digits_heads())


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_accuracy_and_calls() -> None:
    defense = SPEC.build("digits")
    assert isinstance(defense, DiffusionClassifier)
    assert defense.grid == DIGITS_GRID
    x, y = data.load("digits", data.test_ids("digits")[:200])
    with torch.no_grad():
        logits = defense(x, Noise.from_seed(0, len(x)))
    assert float((logits.argmax(1) == y).double().mean()) >= 0.9
    assert defense.card.network_calls == defense.chain().network_calls == 6


def test_digits_gradient_is_its_finite_difference() -> None:
    defense = SPEC.build("digits").double()
    x, y = data.load("digits", data.train_split("digits")[-3:])
    x, noise, step = 0.1 + 0.8 * x.double(), Noise.from_seed(0, 3), 1e-5
    direction = Noise.from_seed(1, 3).normal("direction", shape=(1, 8, 8), like=x)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(defense.draw(z, noise), y)

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    numeric = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert float(numeric) == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


def test_the_image_is_encoded_before_it_is_noised() -> None:
    defense, x = small(), pixels(2)
    image, target = defense.start(x, Noise.from_seed(0, 2))
    assert torch.equal(image, encode(x))
    assert torch.equal(target, encode(x))
