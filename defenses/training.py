"""One training loop for long recipes: it can be killed at any time, and goes on where its last checkpoint stood.

A checkpoint holds the network, its running average, the optimizer, the generator's state, the step and the seconds
spent. The order of an epoch's images follows from the seed and the epoch alone. On the CPU a training that was
interrupted gives the bits of one that was not; on a GPU several kernels add in an order of their own.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from assay.defenses.augment import Augment
from assay.defenses.weight_files import write
from assay.errors import AssayError, InputError

Loss = Callable[[Any, Tensor, Tensor, Generator], Tensor]
"""`(network, x, y, generator)` to the mean loss of a batch, images in [0, 1]."""
Show = Callable[[float, dict[str, float]], None]
"""Told now and then how far training is, in [0, 1], and the log's newest line."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Attributes:
        steps: of the optimizer; not heeded where minutes are given.
        batch: images a step; an epoch's last, smaller batch is left out.
        rate: the highest learning rate: it is reached linearly over the share `warmup` of training and then falls
            to 0 along a cosine.
        decay: weight decay.
        half_life: of the running average, in images. It grows with training, as a twentieth of all images so far,
            up to this.
        log_every: steps between lines of the log; the only places where training can be taken up again.
    """

    steps: int
    batch: int
    rate: float
    optimizer: Literal["adam", "sgd"]
    decay: float = 0.0
    warmup: float = 0.05
    half_life: int = 100_000
    log_every: int = 50

    def rate_at(self, progress: float) -> float:
        """The learning rate at a share of training in [0, 1)."""
        if progress < self.warmup:
            return self.rate * (progress + 1e-3) / (self.warmup + 1e-3)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def kept(self, step: int) -> float:
        """How much of the running average a step keeps."""
        return float(0.5 ** (self.batch / min(self.half_life, 0.05 * step * self.batch)))


class Training:
    """A network on its way.

    Args:
        network: on `device`; `fit` changes it in place.
        plan: how long and how fast.
        loss: of a batch.
        augment: of a batch, before the loss.
        identity: what a checkpoint must agree with to be taken up: everything the result depends on, as JSON.
        checkpoint: the file that training is taken up from; `log` the JSON lines beside it.
        seed: of the images' order and all noise.
        minutes: the learning rate follows the clock, and training ends after so many.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        loss: Loss,
        augment: Augment,
        *,
        identity: dict[str, Any],
        checkpoint: Path,
        log: Path,
        seed: int,
        device: torch.device,
        minutes: float | None = None,
    ) -> None:
        self.network, self.plan, self.loss, self.augment = network, plan, loss, augment
        self.identity = json.loads(json.dumps(identity))
        self.checkpoint, self.log = checkpoint, log
        self.seed, self.device, self.minutes = seed, device, minutes
        self.generator = Generator(device).manual_seed(seed)
        fused = device.type == "cuda"
        parameters = list(network.parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, plan.rate, betas=(0.9, 0.99), weight_decay=plan.decay, fused=fused)
            if plan.optimizer == "adam"
            else torch.optim.SGD(parameters, plan.rate, 0.9, weight_decay=plan.decay, nesterov=True, fused=fused)
        )
        state = network.state_dict()
        # The state's tensors are the network's own, so that these lists stay current.
        self._names = [name for name, value in state.items() if value.is_floating_point()]
        self._current = [state[name] for name in self._names]
        self._average = [value.clone() for value in self._current]
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._restore()
        else:
            log.unlink(missing_ok=True)

    @property
    def progress(self) -> float:
        """How much of training is behind."""
        return self.seconds / (60 * self.minutes) if self.minutes else self.step / self.plan.steps

    def averaged(self) -> dict[str, Tensor]:
        """The running average of all weights and statistics, by name."""
        return dict(zip(self._names, self._average, strict=True))

    def fit(self, images: Tensor, labels: Tensor, *, save_every: float = 60.0, show: Show | None = None) -> None:
        """Trains to the end, from wherever it stands.

        Args:
            images: `(n, c, h, w)` uint8, on the device; `labels (n,)` int64.
            save_every: seconds between checkpoints.
            show: see `Show`.

        Raises:
            AssayError: when the loss is no longer finite; the last checkpoint stays.
            InputError: for fewer images than a batch has.
        """
        batches = len(images) // self.plan.batch
        if not batches:
            raise InputError(f"a batch has {self.plan.batch} images, and there are {len(images)} to train on.")
        self.network.train()
        before, began = self.seconds, time.monotonic()
        saved = logged = began
        losses: list[Tensor] = []
        known, order = -1, torch.empty(0, dtype=torch.int64)
        while self.progress < 1:
            epoch, place = divmod(self.step, batches)
            if epoch != known:
                shuffled = Generator().manual_seed(self.seed * 1_000_003 + epoch)
                known, order = epoch, torch.randperm(len(images), generator=shuffled).to(self.device)
            rows = order[place * self.plan.batch : (place + 1) * self.plan.batch]
            rate = self.plan.rate_at(self.progress)
            losses.append(self._advance(images[rows], labels[rows], rate))
            self.seconds = before + time.monotonic() - began
            if self.step % self.plan.log_every and self.progress < 1:
                continue
            mean = float(torch.stack(losses).mean())
            now = time.monotonic()
            line = {
                "step": self.step,
                "loss": mean,
                "rate": rate,
                "images_per_second": len(losses) * self.plan.batch / max(now - logged, 1e-9),
                "seconds": before + now - began,
            }
            if not math.isfinite(mean):
                raise AssayError(
                    f"training diverged: the mean loss of the steps up to {self.step} is {mean}. The last checkpoint, "
                    f"{self.checkpoint}, is from before; try another seed or a lower learning rate."
                )
            self._append(line)
            losses, logged = [], now
            if now - saved >= save_every or self.progress >= 1:
                self.save()
                saved = now
            if show:
                show(min(self.progress, 1.0), line)

    def _advance(self, x: Tensor, y: Tensor, rate: float) -> Tensor:
        """One step of the optimizer; returns the loss before it, still on the device."""
        cuda = self.device.type == "cuda"
        pixels = self.augment(x.float() / 255, self.generator)
        if cuda:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        # No cache: TRADES runs the network without gradients first, and casts cached there would have none.
        mixed = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if cuda else nullcontext()
        with mixed:
            value = self.loss(self.network, pixels, y, self.generator)
        value.backward()
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._current, 1 - self.plan.kept(self.step))
        return value.detach()

    def _append(self, line: dict[str, float]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(json.dumps({name: round(value, 6) for name, value in line.items()}) + "\n")

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        content = io.BytesIO()
        torch.save(
            {
                "identity": json.dumps(self.identity, sort_keys=True),
                "step": self.step,
                "seconds": self.seconds,
                "network": self.network.state_dict(),
                "average": self.averaged(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
            },
            content,
        )
        write(self.checkpoint, content.getvalue())

    def _restore(self) -> None:
        try:
            held = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            identity = json.loads(held["identity"])
        except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.checkpoint} is not a checkpoint of training ({error!r}): delete it.") from error
        if identity != self.identity:
            differing = ", ".join(_differences(identity, self.identity))
            raise InputError(
                f"{self.checkpoint} belongs to another training (its {differing} differ). Give the arguments it was "
                f"started with to go on, or delete it to start over."
            )
        self.network.load_state_dict(held["network"])
        self.optimizer.load_state_dict(held["optimizer"])
        for mine, theirs in zip(self._average, (held["average"][name] for name in self._names), strict=True):
            mine.copy_(theirs)
        self.generator.set_state(held["generator"])
        self.step, self.seconds = held["step"], held["seconds"]
        if self.log.exists():
            write(self.log, "".join(_until(self.log.read_text().splitlines(), self.step)).encode())


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _until(lines: Iterable[str], step: int) -> Iterable[str]:
    """The log's whole lines up to a step: a killed training may have gone further, or stopped within a line."""
    for line in lines:
        try:
            if json.loads(line)["step"] > step:
                return
        except (ValueError, KeyError):
            return
        yield line + "\n"
