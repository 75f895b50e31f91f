"""Time and memory of the exact gradient through a diffusion purifier on CIFAR-10 shapes, at 20, 50 and 100 steps.

Run from the project's root: `python -m benchmarks.depth [--device cuda] [--rows 1] [--full 20]`. DiffPure with
the recipes' U-Net (96, 128, 128 channels) before a ResNet-18, without trained weights: neither time nor memory
depends on them. The chain keeps one step's graph at a time; the full graph, up to `--full` steps, is timed in turn
with it in one process. Memory is that of the tensors made, per image; of a CUDA device the allocator's own peak.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from assay.chain import Chain, Mode
from assay.defenses.conditional import LabelledDenoiser
from assay.defenses.diffpure import DiffPure
from assay.defenses.networks import ResNet18
from assay.defenses.networks_cifar10 import labelled_unet
from assay.defenses.purifier import Purifier
from assay.noise import Noise
from benchmarks.memory import PeakMemory

STEPS = (20, 50, 100)
LEVEL = 100
"""t* of 1000: DiffPure's on CIFAR-10 under linf."""


def gradient(chain: Chain, x: Tensor, noise: Noise, mode: Mode) -> Tensor:
    """The gradient of the first logit."""
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(chain(point, noise, mode=mode)[:, 0].sum(), point)
    return slope


def seconds(chain: Chain, x: Tensor, noise: Noise, mode: Mode) -> float:
    """Wall time of one gradient."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    gradient(chain, x, noise, mode)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(chain: Chain, x: Tensor, noise: Noise, mode: Mode) -> int:
    """Peak bytes of one gradient, beside the weights."""
    if x.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradient(chain, x, noise, mode)
        return torch.cuda.max_memory_allocated() - before
    memory = PeakMemory(known=[x])
    with memory:
        gradient(chain, x, noise, mode)
    return memory.peak


def main(
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    rows: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    full: Annotated[int, typer.Option(help="Up to so many steps the full graph is measured beside it.")] = 20,
) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    denoiser = LabelledDenoiser(labelled_unet())
    networks = DiffPure(Purifier(denoiser, LEVEL, 1), ResNet18(), 10).to(device).eval().requires_grad_(False)
    x = torch.rand(rows, 3, 32, 32, device=device)
    noise = Noise.from_seed(0, rows)
    table = Table(title=f"exact gradient through DiffPure, {rows} images of 3×32×32, {device}")
    for column in ("steps", "s an image", "MiB an image", "full: s", "full: MiB", "time ratio", "memory ratio"):
        table.add_column(column, justify="right")
    for steps in STEPS:
        chain = DiffPure(Purifier(denoiser, LEVEL, steps), networks.classifier, 10).chain()
        if device == "cuda":
            gradient(chain, x, noise, "exact")  # kernels are chosen on first use
        cells = [seconds(chain, x, noise, "exact") / rows, peak(chain, x, noise, "exact") / rows / 2**20]
        shown = [str(steps), f"{cells[0]:.2f}", f"{cells[1]:.1f}"]
        if steps <= full:
            whole = [seconds(chain, x, noise, "full") / rows, peak(chain, x, noise, "full") / rows / 2**20]
            shown += [f"{whole[0]:.2f}", f"{whole[1]:.1f}"]
            shown += [f"{cells[0] / whole[0]:.2f}", f"{cells[1] / whole[1]:.3f}"]
        table.add_row(*shown, *["not measured"] * (7 - len(shown)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
