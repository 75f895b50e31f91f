"""A chain's exact gradient against a full graph: time and peak memory at 5, 20 and 100 steps.

Run from the project's root: `python -m benchmarks.chain`. Both sides are timed in turn in one
process on one thread, so that their ratio means something on a busy machine.
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from assay.chain import Chain, Mode, State, inner_gradient
from assay.noise import Noise
from benchmarks.memory import PeakMemory

STEPS = (5, 20, 100)
ROWS, SIDE, WIDTH = 32, 8, 16
REPEATS = 7


def purifier(steps: int, *, guided: bool = False) -> Chain:
    """A toy diffusion: each step a small network and fresh noise, with a gradient of its own where guided."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # no weights are drawn from the global generator
        network = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, 1, 3, padding=1),
        )  # fmt: skip
    network = network.to_empty(device="cpu").requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def step(state: State, x: Tensor, noise: Noise) -> State:
        assert isinstance(state, Tensor)
        moved: Tensor = state + 0.1 * network(state) + 0.01 * noise.normal(shape=x.shape[1:], like=x)
        if guided:
            moved = moved - 0.1 * inner_gradient(
                lambda z: ((z - x) ** 2).flatten(1).sum(1) * z.flatten(1).mean(1), state
            )
        return moved

    return Chain(start=lambda x, noise: x, steps=[step] * steps)


def gradient(chain: Chain, x: Tensor, noise: Noise, mode: Mode) -> Tensor:
    """The gradient of the output's squared length."""
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((chain(point, noise, mode=mode) ** 2).sum(), point)
    return slope


def seconds(chain: Chain, x: Tensor, noise: Noise, mode: Mode) -> float:
    """Wall time of one gradient."""
    start = time.perf_counter()
    gradient(chain, x, noise, mode)
    return time.perf_counter() - start


def peak(chain: Chain, x: Tensor, noise: Noise, mode: Mode) -> int:
    """Peak bytes of one gradient."""
    memory = PeakMemory(known=[x])
    with memory:
        gradient(chain, x, noise, mode)
    return memory.peak


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    x = torch.rand(ROWS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    noise = Noise.from_seed(0, ROWS)
    table = Table(title=f"chain gradient, exact against full graph ({ROWS} images of {SIDE}×{SIDE}, 1 thread)")
    for column in (
        "steps",
        "guided",
        "time exact",
        "time full",
        "ratio",
        "peak exact",
        "peak full",
        "ratio",
        "states",
        "difference",
    ):
        table.add_column(column, justify="right")
    for guided in (False, True):
        for steps in STEPS:
            chain = purifier(steps, guided=guided)
            reference = gradient(chain, x, noise, "full")
            difference = (gradient(chain, x, noise, "exact") - reference).abs().max() / reference.abs().max()
            pairs = [(seconds(chain, x, noise, "exact"), seconds(chain, x, noise, "full")) for _ in range(REPEATS)]
            exact, full = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            small, large = peak(chain, x, noise, "exact"), peak(chain, x, noise, "full")
            table.add_row(
                str(steps),
                "yes" if guided else "no",
                f"{exact * 1e3:.1f} ms",
                f"{full * 1e3:.1f} ms",
                f"{ratio:.2f}",
                f"{small / 2**20:.2f} MiB",
                f"{large / 2**20:.2f} MiB",
                f"{small / large:.3f}",
                f"{(steps + 1) * x.nbytes / 2**20:.2f} MiB",
                f"{float(difference):.0e}" if difference > 0 else "none",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
