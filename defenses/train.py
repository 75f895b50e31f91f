"""Trains the packaged digits weights: `python -m assay.defenses.train digits`.

Every network is trained on the pinned train split alone, on the CPU, from its own seed inside a
forked generator, so that training one network gives the same weights as training all of them. The
test split enters only the accuracies that the manifest reports.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from assay.data import load, test_ids, train_split
from assay.defenses.checkpoints import MANIFEST, WEIGHTS
from assay.defenses.denoiser import Denoiser, UNetDenoiser, digits_unet
from assay.defenses.networks import DigitsCNN
from assay.errors import AssayError, InputError, nearest
from assay.norms import Ball
from assay.threat import ThreatModel, parse_eps

Perturb = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""What a training image becomes: `(network, x, y) -> x'`, drawing from the forked global generator."""
Advance = Callable[[], None]
"""Called after each epoch."""

BATCH = 64


def unchanged(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Plain training."""
    return x


def gaussian(sigma: float) -> Perturb:
    """Adds N(0, σ²) noise, not clipped (Cohen et al. 2019)."""
    return lambda network, x, y: x + sigma * torch.randn_like(x)


def pgd(eps: str, steps: int) -> Perturb:
    """Linf PGD from a random start with steps of 2.5·ε/steps (Madry et al. 2018)."""
    threat = ThreatModel("linf", parse_eps(eps))

    def perturb(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        ball = Ball(threat, x)
        z = ball.project(x + ball.eps * (2 * torch.rand_like(x) - 1))
        for _ in range(steps):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(z), y), z)
            z = ball.step(z.detach(), gradient, 2.5 * ball.eps / steps)
        return z

    return perturb


def fit_classifier(
    network: nn.Module, x: Tensor, y: Tensor, advance: Advance, *, epochs: int, perturb: Perturb
) -> None:
    """Cross-entropy on perturbed images; Adam, one cosine cycle."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            inputs = perturb(network, x[rows], y[rows])
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), y[rows]).backward()
            optimizer.step()
        schedule.step()
        advance()


def fit_denoiser(denoiser: Denoiser, x: Tensor, advance: Advance, *, epochs: int, ema: float) -> None:
    """The simple DDPM objective ‖ε − eps(x_t, t)‖² (Ho et al. 2020, eq. 14); keeps an average of the weights."""
    weights: list[Tensor] = list(denoiser.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images = denoiser.encode(x)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(2 * BATCH):
            t = torch.randint(1, denoiser.levels + 1, (len(rows),))
            z = torch.randn_like(images[rows])
            optimizer.zero_grad()
            F.mse_loss(denoiser.eps(denoiser.diffuse(images[rows], t, z), t), z).backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - ema)
        schedule.step()
        advance()
    with torch.no_grad():
        torch._foreach_copy_(weights, average)


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor, perturb: Perturb) -> float:
    """The share of (perturbed) images that the network gets right."""
    return float((network(perturb(network, x, y)).argmax(1) == y).double().mean())


@torch.no_grad()
def noise_error(denoiser: Denoiser, x: Tensor) -> float:
    """The mean squared error of eps over images and levels 50, 100, …, 400; 1 is what eps = 0 would have."""
    images = denoiser.encode(x)
    errors = []
    for t in range(50, 401, 50):
        z = torch.randn_like(images)
        errors.append(F.mse_loss(denoiser.eps(denoiser.diffuse(images, t, z), t), z))
    return float(torch.stack(errors).mean())


@dataclass(frozen=True)
class Recipe:
    """How one weight file is made.

    Attributes:
        options: what the manifest says of the training; `epochs` among them.
        perturb: what a classifier is trained on; None trains a denoiser.
    """

    options: dict[str, Any]
    perturb: Perturb | None = None

    def run(self, seed: int, advance: Advance, epochs: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Trained weights, and what was measured on the test split."""
        x, y = load("digits", train_split("digits"))
        x_test, y_test = load("digits", test_ids("digits"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.perturb is None:
                denoiser = UNetDenoiser(digits_unet())
                fit_denoiser(denoiser, x, advance, epochs=epochs, ema=self.options["ema"])
                return denoiser.state_dict(), {"noise_error": noise_error(denoiser.eval(), x_test)}
            network = DigitsCNN()
            fit_classifier(network, x, y, advance, epochs=epochs, perturb=self.perturb)
            measured = {"clean_accuracy": accuracy(network.eval(), x_test, y_test, unchanged)}
            if "sigma" in self.options:
                measured["noisy_accuracy"] = accuracy(network, x_test, y_test, self.perturb)
            return network.state_dict(), measured


DIGITS = {
    "undefended": Recipe({"epochs": 60}, unchanged),
    "adversarial_training": Recipe({"epochs": 80, "attack": "pgd", "eps": "1/5", "steps": 7}, pgd("1/5", 7)),
    "smoothing": Recipe({"epochs": 80, "sigma": 0.25}, gaussian(0.25)),
    "denoiser": Recipe({"epochs": 700, "ema": 0.999}),
}


def write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def record(manifest: Path, file: str, entry: dict[str, Any]) -> None:
    """Puts one file's entry into the manifest, beside the others."""
    entries = json.loads(manifest.read_text())["weights"] if manifest.exists() else {}
    entries[file] = entry
    write(manifest, (json.dumps({"weights": dict(sorted(entries.items()))}, indent=2) + "\n").encode())


def train(names: list[str], out: Path, seed: int, epochs: int | None, console: Console) -> dict[str, dict[str, Any]]:
    """Trains the named digits networks, writes their weights and the manifest; returns the manifest's new entries."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    entries: dict[str, dict[str, Any]] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks = {name: progress.add_task(name, total=epochs or DIGITS[name].options["epochs"]) for name in names}
        for name, task in tasks.items():
            options = {**DIGITS[name].options, **({"epochs": epochs} if epochs else {})}

            def advance(task: Any = task) -> None:
                progress.advance(task)

            state, measured = DIGITS[name].run(seed, advance, options["epochs"])
            content = save({key: value.contiguous() for key, value in state.items()})
            file = f"digits/{name}.safetensors"
            write(out / file, content)
            entries[file] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "recipe": options,
                "seed": seed,
                "torch": torch.__version__,
                "test": {key: round(value, 4) for key, value in measured.items()},
            }
            record(out / MANIFEST, file, entries[file])
    return entries


def main(
    dataset: Annotated[str, typer.Argument(help="The data set to train on: digits.")],
    only: Annotated[list[str] | None, typer.Option(help="Train only this network; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Where the weights and their manifest go.")] = WEIGHTS,
    seed: Annotated[int, typer.Option(help="Each network's seed.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Another number of epochs than the recipe's.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch's threads; sums depend on it in the last bits.")] = 1,
) -> None:
    """Train the packaged weights on the CPU and write them with a manifest of their digests."""
    console = Console()
    torch.set_num_threads(threads)
    try:
        if dataset != "digits":
            raise InputError(f"there are recipes for digits only, got {dataset!r}.")
        names = list(only or DIGITS)
        for name in names:
            if name not in DIGITS:
                raise InputError(f"no recipe is called {name!r}.{nearest(name, DIGITS)}")
        entries = train(names, out, seed, epochs, console)
    except AssayError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    table = Table("weights", "test split", "bytes", "SHA-256")
    for file, entry in entries.items():
        test = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in entry["test"].items())
        table.add_row(Path(file).stem, test, str(entry["bytes"]), entry["sha256"][:16])
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
