"""How a noised diffusion classifier's logits approach the exact log-posterior, on an analytic mixture.

Run from the project's root: `python -m benchmarks.ndc_convergence`. The mixture has 3 classes of 2
Gaussians each over 1×2×2 images; τ = .5. The error is the root mean square, over images and classes,
of logits less the exact `log p_τ(x_τ | y)`, each with the mean over classes taken off.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from assay.defenses.class_errors import Comparison, Grid, Level
from assay.defenses.epndc import exact_levels
from assay.defenses.mixture import MixtureDenoiser
from assay.noise import Noise

TAU = 0.5
SAMPLES = (1, 4, 16, 64, 256)
GRIDS = {
    "126 to 3": Grid(TAU, 3.0, 127),
    "126 to 100": Grid(TAU, 100.0, 127, "log"),
    "500 to 100": Grid(TAU, 100.0, 501, "log"),
    "2000 to 100": Grid(TAU, 100.0, 2001, "log"),
}
"""The paper's grid, and finer ones that also reach where no class is left to tell from another."""


def mixture() -> MixtureDenoiser:
    """Three classes of two components, overlapping under noise τ."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(6, 1, 2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.8
    stds = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.15, 0.25], dtype=torch.float64)
    return MixtureDenoiser(torch.full((6,), 1 / 6, dtype=torch.float64), means, stds, torch.arange(6) % 3)


def centred(logits: Tensor) -> Tensor:
    """Less the mean over classes, which no softmax sees."""
    return logits - logits.mean(1, keepdim=True)


def logits(denoiser: MixtureDenoiser, x_tau: Tensor, levels: tuple[Level, ...], samples: int, noise: Noise) -> Tensor:
    """EPNDC's logits of noised images, one level at a time: the noise of thousands of samples is large."""
    comparison = Comparison(denoiser, levels, samples)
    return comparison.chain(lambda x, noise: comparison.begin(x, x))(x_tau, noise)


@torch.no_grad()
def error(grid: Grid, samples: int, images: int = 16) -> float:
    """The root mean square error of the logits."""
    denoiser, noise = mixture(), Noise.from_seed(0, images)
    clean = denoiser.means[torch.arange(images) % 6]
    x_tau = clean + TAU * noise.normal("smoothing", shape=(1, 2, 2), like=clean)
    found = logits(denoiser, x_tau, exact_levels(grid.sigmas), samples, noise.child("draw"))
    return float((centred(found) - centred(denoiser.class_log_density(x_tau, TAU))).square().mean().sqrt())


def main() -> None:
    """Prints the table."""
    table = Table("samples a level", *GRIDS, title="RMS error of EPNDC's logits, by levels and highest σ")
    for samples in SAMPLES:
        table.add_row(str(samples), *(f"{error(grid, samples):.4f}" for grid in GRIDS.values()))
    Console().print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
