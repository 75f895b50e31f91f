"""What the tests of the guided purifiers share: exact toys in float64, and checks of a chain's gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from assay import data
from assay.chain import Chain
from assay.defense import Defense
from assay.defenses.mixture import MixtureDenoiser
from assay.noise import Noise


def mixture(std: float = 0.2) -> MixtureDenoiser:
    """A dark and a bright 1×4×4 image, equally likely, float64."""
    means = torch.stack([torch.full((1, 4, 4), -0.5), torch.full((1, 4, 4), 0.5)]).double()
    return MixtureDenoiser(torch.full((2,), 0.5).double(), means, torch.full((2,), std).double())


def gaussian(std: float) -> MixtureDenoiser:
    """One Gaussian around the image that is .25 everywhere, in [−1, 1]."""
    mean = torch.full((1, 1, 4, 4), 0.25).double()
    return MixtureDenoiser(torch.ones(1).double(), mean, torch.tensor([std]).double())


class Brightness(nn.Module):
    """Two classes, dark and bright: logits −k·(x − ½) and k·(x − ½), summed over the pixels."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        brightness = self.slope * (x - 0.5).flatten(1).sum(1)
        return torch.stack([-brightness, brightness], 1)


def curved(classes: int = 3) -> nn.Module:
    """A small smooth network on 1×4×4 images, float64, whose second derivatives are not zero."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
    return network.requires_grad_(False)


def images(n: int = 3) -> Tensor:
    """`(n, 1, 4, 4)` float64 in [.1, .9]."""
    return 0.1 + 0.8 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def digits(n: int = 2) -> Tensor:
    """Images of the digits board in float64, inside [.1, .9]."""
    return 0.1 + 0.8 * data.load("digits", data.board_ids("digits")[:n])[0].double()


def gradient(chain: Chain, x: Tensor, noise: Noise, **options: object) -> Tensor:
    """Of a fixed combination of the outputs."""
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(_value(chain(point, noise, **options)), point)  # type: ignore[arg-type]
    return slope


def check_gradient(chain: Chain, x: Tensor, *, rel: float = 1e-4, step: float = 1e-6) -> None:
    """The exact gradient is the full graph's, and its directional derivative is the central difference's."""
    noise = Noise.from_seed(0, len(x))
    exact = gradient(chain, x, noise)
    full = gradient(chain, x, noise, mode="full")
    assert torch.allclose(exact, full, atol=1e-10, rtol=1e-10)
    assert float(exact.abs().max()) > 1e-6
    direction = Noise.from_seed(1, len(x)).normal("direction", shape=x.shape[1:], like=x)
    with torch.no_grad():
        above, below = (_value(chain(x + sign * step * direction, noise)) for sign in (1, -1))
    assert float((above - below) / (2 * step)) == pytest.approx(float((exact * direction).sum()), rel=rel)


def check_second_order(chain: Chain, x: Tensor, *, least: float = 1e-3) -> None:
    """Dropping second-order terms leaves the answer and changes the gradient, by `least` of its length or more."""
    noise = Noise.from_seed(0, len(x))
    assert torch.equal(chain(x, noise), chain.first_order()(x, noise))
    exact, first = gradient(chain, x, noise), gradient(chain.first_order(), x, noise)
    assert float((exact - first).norm()) > least * float(exact.norm())


def check_replay(defense: Defense, x: Tensor) -> None:
    """The same noise, the same answer to the last bit, with and without a graph, and no global randomness."""
    noise, before = Noise.from_seed(0, len(x)), torch.get_rng_state()
    with torch.no_grad():
        first = defense.draw(x, noise)
    assert torch.equal(first, defense.draw(x, noise))
    assert torch.equal(first, defense.draw(x.clone().requires_grad_(), noise))
    assert torch.equal(torch.get_rng_state(), before)


def calls(defense: Defense, networks: list[nn.Module], x: Tensor) -> tuple[float, float]:
    """Forward passes of the networks a sample, in one draw and in one draw with its gradient."""
    seen: list[int] = []
    hooks = [
        network.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0]))) for network in networks
    ]
    noise = Noise.from_seed(0, len(x))
    with torch.no_grad():
        defense.draw(x, noise)
    forward = sum(seen) / len(x)
    seen.clear()
    gradient(defense.chain(), x, noise)
    for hook in hooks:
        hook.remove()
    return forward, sum(seen) / len(x)


def _value(output: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).reshape(output.shape[1:])
    return (output * weights).sum() + 0.5 * output.square().mean()


def write_denoiser(folder: Path, activation: str) -> str:
    """A value for the option `denoiser`: a file that makes the packaged one with an activation behind it."""
    file = folder / "my_denoiser.py"
    file.write_text(f"""
import torch
from torch import nn
from assay.defenses.denoiser import Denoiser
from assay.registry import DEFENSES

class Mine(Denoiser):
    def __init__(self, inner):
        super().__init__(inner.schedule, inner.sigma_range)
        self.inner, self.last = inner, nn.{activation}()

    def denoise(self, x, sigma):
        # Within the box of images this changes little, whatever the activation.
        return self.last(self.inner.denoise(x, sigma) + 8) - 8

def make():
    return Mine(DEFENSES["diffpure"].build("digits").denoiser)
""")
    return f"{file}:make"
