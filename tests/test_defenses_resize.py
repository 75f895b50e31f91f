"""Resizing inside a defense is interpolation, and its gradient is interpolation's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.card import Card
from assay.defense import ForeignModule
from assay.defenses.resize import Resize
from assay.noise import Noise

SIZES = [(8, 11), (8, 16), (11, 8), (16, 4), (7, 1)]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("source", "side"), SIZES)
def test_it_is_bilinear_interpolation(source: int, side: int) -> None:
    x = torch.rand(2, 3, source, source, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
    assert torch.allclose(Resize(source, side)(x), expected, atol=1e-6)


@pytest.mark.parametrize(("source", "side"), SIZES)
def test_values_stay_in_the_box_and_a_flat_image_stays_flat(source: int, side: int) -> None:
    resize = Resize(source, side)
    corners = torch.randint(0, 2, (4, 1, source, source), generator=torch.Generator().manual_seed(0)).double()
    assert resize(corners).min() >= 0
    assert resize(corners).max() <= 1 + 1e-12
    assert torch.allclose(resize(torch.full((1, 1, source, source), 0.3).double()), torch.tensor(0.3).double())


def test_equal_sizes_leave_the_images_alone(x: torch.Tensor) -> None:
    assert Resize(8, 8)(x) is x


@pytest.mark.parametrize("side", [5, 12])
def test_the_gradient_is_that_of_finite_differences(x: torch.Tensor, side: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten()).double()
    assert torch.autograd.gradcheck(nn.Sequential(Resize(8, side), network), (x.requires_grad_(),))


def test_the_gradient_reaches_every_pixel_of_the_boards_size(x: torch.Tensor) -> None:
    z = x.float().requires_grad_()
    (gradient,) = torch.autograd.grad(Resize(8, 5)(z).sum(), z)
    assert gradient.shape == z.shape
    assert (gradient > 0).all()


def test_a_defense_at_another_size_answers_the_boards_images(x: torch.Tensor) -> None:
    network = nn.Sequential(Resize(8, 12), nn.Flatten(), nn.Linear(3 * 12 * 12, 10))
    defense = ForeignModule(network, Card(name="big", title="Big", summary=""), 10)
    assert defense(x.float(), Noise.from_seed(0, 2)).shape == (2, 10)


def test_the_matrix_is_no_weight() -> None:
    assert Resize(8, 12).state_dict() == {}
