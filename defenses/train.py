"""Trains the packaged weights: `python -m assay.defenses.train digits`, and `… cifar10`.

Every network of digits is trained on the pinned train split alone, on the CPU, from its own seed inside a
forked generator, so that training one network gives the same weights as training all of them. The
test split enters only the accuracies that the manifest reports. How each network is trained
stands in `recipes`. For those of cifar10, which want a GPU and can be interrupted, see `train_cifar10`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save

from assay.defenses.checkpoints import MANIFEST, WEIGHTS
from assay.defenses.recipes import DIGITS
from assay.defenses.recipes_cifar10 import CIFAR10
from assay.defenses.train_cifar10 import train_cifar10
from assay.defenses.weight_files import record, write
from assay.errors import AssayError, InputError, nearest


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
    dataset: Annotated[str, typer.Argument(help="The data set to train on: digits or cifar10.")],
    only: Annotated[list[str] | None, typer.Option(help="Train only this network; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Where the weights and their manifest go.")] = WEIGHTS,
    seed: Annotated[int, typer.Option(help="Each network's seed.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="digits: other epochs than the recipe's.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch's threads; sums depend on it in the last bits.")] = 1,
    device: Annotated[str, typer.Option(help="cifar10: auto, cpu or cuda.")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="cifar10: train by the clock, so long in all.")] = None,
    toy: Annotated[bool, typer.Option("--toy", help="cifar10: tiny networks on 64 images, to try it out.")] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="cifar10: torch.compile on a GPU.")] = True,
    save_every: Annotated[float, typer.Option(min=0, help="cifar10: seconds between checkpoints.")] = 60.0,
) -> None:
    """Train the packaged weights and write them with a manifest of their digests."""
    console = Console()
    torch.set_num_threads(threads)
    try:
        if minutes is not None and not minutes > 0:
            raise InputError(f"--minutes must be positive, got {minutes:g}.")
        if dataset == "digits":
            if toy or minutes or device == "cuda":
                raise InputError("--toy, --minutes and --device cuda are for cifar10; digits take --epochs.")
            names = list(only or DIGITS)
            for name in names:
                if name not in DIGITS:
                    raise InputError(f"no recipe is called {name!r}.{nearest(name, DIGITS)}")
            entries = train(names, out, seed, epochs, console)
        elif dataset == "cifar10":
            if epochs:
                raise InputError("--epochs is for digits; cifar10 takes --minutes.")
            entries = train_cifar10(
                list(only or CIFAR10), out, seed=seed, device=device, minutes=minutes, toy=toy, compiled=compiled,
                save_every=save_every, console=console,
            )  # fmt: skip
        else:
            raise InputError(f"there are recipes for digits and cifar10, got {dataset!r}.")
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
