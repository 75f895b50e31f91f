"""`python -m assay.defenses.train cifar10`: trains, checks and only then writes; see `recipes_cifar10` for the recipes.

Beside each file of weights lies its log, and while training is under way its checkpoint `.NAME.resume`. The same
command takes an interrupted training up and leaves finished ones alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors.torch import load, save
from torch import Tensor, nn

from assay.defenses.checkpoints import MANIFEST, WEIGHTS, load_state
from assay.defenses.cifar10_split import read_split
from assay.defenses.recipes_cifar10 import CIFAR10, Recipe
from assay.defenses.training import Training
from assay.defenses.weight_files import entries_of, record, write
from assay.errors import InputError, nearest

LARGEST = 16_000_000
"""Bytes that a file of weights may have."""
TOY_IMAGES = 64


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in 16 bits; `load_state` gives them back their module's own dtype.

    Raises:
        InputError: for a value that 16 bits don't hold.
    """
    small = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in state.items()}
    lost = [name for name, value in small.items() if not value.isfinite().all()]
    if lost:
        raise InputError(f"weights that are not finite in 16 bits: {', '.join(lost)}.")
    return small


def chosen_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where there is one.

    Raises:
        InputError: for a GPU where there is none, or another kind of device.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise InputError(f"the device must be auto, cpu or cuda, got {name!r}.")
    if name != "cpu" and not available:
        raise InputError(f"{name} was asked for and torch finds no GPU here: give --device cpu, and --toy to try it.")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def train_cifar10(
    names: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    minutes: float | None = None,
    toy: bool = False,
    compiled: bool = True,
    save_every: float = 60.0,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains the named networks one after the other; returns their manifest entries.

    Args:
        names: of recipes.
        out: the folder of the manifest; weights go to `out/cifar10`.
        seed: of each network.
        device: see `chosen_device`.
        minutes: for all of them together, shared as the recipes' estimates are; by default each takes its steps.
        toy: tiny networks on the first 64 images, measured on these too.
        compiled: whether to use `torch.compile`; on GPUs only.
        save_every: seconds between checkpoints.

    Raises:
        InputError: for an unknown name, missing data, a checkpoint of another training, or weights that fail the
            smoke test or are too large: these are not written.
    """
    for name in names:
        if name not in CIFAR10:
            raise InputError(f"no recipe of cifar10 is called {name!r}.{nearest(name, CIFAR10)}")
    if toy and out.resolve() == WEIGHTS.resolve():
        raise InputError("toy weights are not for the package: name another folder with --out.")
    place = chosen_device(device)
    if place.type == "cuda":
        # What autocast leaves in 32 bits, the optimizers' sums apart, runs through TF32; benchmarks pick kernels.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    images, labels = read_split("train", TOY_IMAGES if toy else None)
    test, truth = (images, labels) if toy else read_split("test")
    pairs = ((images.to(place), labels.to(place)), (test.to(place), truth.to(place)))
    total = sum(CIFAR10[name].minutes for name in names)
    columns = (TextColumn("{task.description:17}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[at]}"))
    entries = {}
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for name in names:
            share = minutes and round(minutes * CIFAR10[name].minutes / total, 3)
            task = progress.add_task(name, total=1.0, at="")

            def show(done: float, line: dict[str, float], task: Any = task) -> None:
                at = f"step {line['step']:.0f}, loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s"
                progress.update(task, completed=done, at=at)

            run = _Run(name, CIFAR10[name], out, seed, place, share, toy)
            if (entry := run.finished()) is None:
                entry = run.train(*pairs, compiled and place.type == "cuda", save_every, show)
            else:
                progress.update(task, completed=1.0, at="was there already; delete its file to train it again")
            entries[run.file] = entry
    return entries


class _Run:
    """One recipe in one folder."""

    def __init__(
        self, name: str, recipe: Recipe, out: Path, seed: int, device: torch.device, minutes: float | None, toy: bool
    ) -> None:
        self.recipe, self.out, self.seed, self.device, self.minutes, self.toy = recipe, out, seed, device, minutes, toy
        self.name, self.file = name, f"cifar10/{name}.safetensors"
        self.checkpoint = out / "cifar10" / f".{name}.resume"
        self.identity = json.loads(json.dumps(recipe.identity(toy=toy, seed=seed, minutes=minutes)))

    def build(self) -> nn.Module:
        """The untrained network, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.recipe.toy() if self.toy else self.recipe.build()

    def finished(self) -> dict[str, Any] | None:
        """The manifest's entry, where this very training has ended and its file is there unchanged."""
        entry, path = entries_of(self.out / MANIFEST).get(self.file), self.out / self.file
        if entry is None or entry["recipe"] != self.identity or not path.exists():
            return None
        return entry if hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"] else None

    def train(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        compiled: bool,
        save_every: float,
        show: Any,
    ) -> dict[str, Any]:
        """Trains, measures what was written to 16 bits, and keeps it if it passes."""
        network = self.build().to(self.device)
        if self.device.type == "cuda":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave this form out
        training = Training(
            network,
            self.recipe.toy_plan if self.toy else self.recipe.plan,
            self.recipe.loss,
            self.recipe.augment,
            identity=self.identity,
            checkpoint=self.checkpoint,
            log=self.out / "cifar10" / f"{self.name}.log.jsonl",
            seed=self.seed,
            device=self.device,
            minutes=self.minutes,
        )
        if compiled:
            for part in self.recipe.parts(network):
                part.compile()
        training.fit(*train, save_every=save_every, show=show)
        content = save(half(training.averaged()))
        measured = self._judged(content, *test)
        cuda = self.device.type == "cuda"
        entry = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "recipe": self.identity,
            "seed": self.seed,
            "steps": training.step,
            "seconds": round(training.seconds, 1),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "precision": "bfloat16 autocast, TF32" + ", compiled" * compiled if cuda else "float32",
            "torch": torch.__version__,
            "test": {key: round(value, 4) for key, value in measured.items()},
        }
        write(self.out / self.file, content)
        record(self.out / MANIFEST, self.file, entry)
        self.checkpoint.unlink(missing_ok=True)
        return entry

    def _judged(self, content: bytes, images: Tensor, labels: Tensor) -> dict[str, float]:
        """What was measured of a file's weights, read back as a defense reads them.

        Raises:
            InputError: when they fail the smoke test or there are too many.
        """
        kept = f"Nothing was written; the training stands in {self.checkpoint}. Delete that to start over."
        if len(content) > LARGEST:
            raise InputError(f"{self.file} would have {len(content)} bytes, at most {LARGEST} are allowed. {kept}")
        network = self.build()
        load_state(network, load(content), self.file)
        network = network.to(self.device).eval().requires_grad_(False)
        pixels = images.float() / 255
        measured = self.recipe.measure(network, pixels, labels)
        try:
            self.recipe.check(network, pixels, measured, toy=self.toy)
        except InputError as error:
            raise InputError(f"{self.name} fails its smoke test: {error} {kept}") from error
        return measured
