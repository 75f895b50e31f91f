"""What the harness costs: the time of a run outside model calls, as a share of the whole.

Run from the project's root: `python -m benchmarks.overhead diffpure --board digits-linf`. A model
call is a forward pass of the defense (or of the model whose examples are transferred) or the
backward pass through it. What is left is split in two: the attacks' own arithmetic (projections,
losses, bookkeeping), and the harness (checks, scoring, files, the record). The preflight checks'
calls of the defense count as the harness's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from assay.attack import AttackSpec, Target
from assay.cli_options import profile_of
from assay.evaluation import execute
from assay.prepare import Prepared, prepare


class Clock:
    """Seconds spent inside what it wraps; calls inside calls are counted once.

    Attributes:
        seconds: the sum.
        within: the part of it spent while the clock `outer` was running.
    """

    def __init__(self, outer: Clock | None = None) -> None:
        self.seconds = 0.0
        self.within = 0.0
        self._outer = outer
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the clock during a `with` block."""
        self._depth += 1
        started = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                spent = time.perf_counter() - started
                self.seconds += spent
                if self._outer is not None and self._outer._depth:
                    self.within += spent

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return timed


def measure(prepared: Prepared) -> dict[str, float]:
    """Seconds of a whole run by where they were spent; the parts add up to the first."""
    attacks = Clock()
    model = Clock(outer=attacks)

    def timed(spec: AttackSpec) -> AttackSpec:
        return replace(spec, attack=attacks.wrap(spec.attack))

    job = replace(prepared.job, attacks={name: timed(spec) for name, spec in prepared.job.attacks.items()})
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Target, "_call", model.wrap(Target._call)),
        mock.patch.object(torch.autograd, "grad", model.wrap(torch.autograd.grad)),
        mock.patch.object(torch.Tensor, "backward", model.wrap(torch.Tensor.backward)),
    ):
        started = time.perf_counter()
        execute(replace(prepared, job=job), Path(folder) / "run")
        total = time.perf_counter() - started
    arithmetic = attacks.seconds - model.within
    return {
        "whole run": total,
        "model calls": model.seconds,
        "the attacks' own arithmetic": arithmetic,
        "harness": total - model.seconds - arithmetic,
    }


def main(
    defense: Annotated[str, typer.Argument(help="A registered defense.")] = "diffpure",
    board: Annotated[str, typer.Option(help="A board.")] = "digits-linf",
    profile: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "quick",
    n: Annotated[int | None, typer.Option(help="Use the board's first N samples.")] = None,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Prints the table."""
    torch.set_num_threads(threads)
    prepared = prepare(defense, board, profile_of(profile), n=n)
    seconds = measure(prepared)
    table = Table(title=f"{defense} on {board}, {profile}, {len(prepared.job.ids)} samples, {threads} thread(s)")
    table.add_column("where")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}", f"{value / seconds['whole run']:.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
