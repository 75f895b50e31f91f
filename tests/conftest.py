"""What every test shares: threads, and small defenses whose robustness is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from assay.card import Card, Traits
from assay.defense import Defense
from assay.noise import Noise

# Two busy processes on two cores slow each other down tenfold when each takes both.
torch.set_num_threads(1)


class LinearDefense(Defense):
    """`logits = W x + b`, whose exact robust accuracy under linf (with the box) and l2 is known."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.card = Card(name="linear", title="Linear", summary="A linear classifier.", traits=Traits())
        self.n_classes = len(bias)
        self.linear = nn.Linear(weight.shape[1], len(bias), dtype=weight.dtype)
        self.linear.weight.data, self.linear.bias.data = weight, bias
        self.requires_grad_(False).eval()

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


@pytest.fixture
def linear() -> LinearDefense:
    """Four classes over 1×4×4 images, fixed weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 16, generator=generator)
    return LinearDefense(weight, torch.randn(4, generator=generator) * 0.1)


@pytest.fixture
def images() -> Tensor:
    """64 images `(64, 1, 4, 4)` in [0, 1]."""
    return torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
