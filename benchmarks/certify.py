"""What certified accuracy at one radius costs: a fixed number of draws, the sequential test, and a plain loop.

Run from the project's root: `python -m benchmarks.certify`. All three certify the same images of the
same model at one radius, one after the other in one process. The plain loop is a straightforward
rendering of Cohen et al.'s (2019) procedure: one image at a time, batches of so many noisy copies from torch's own
generator, a Clopper–Pearson bound in the end. The three draw different noise, so their
accuracies agree within intervals, not exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from assay import data
from assay.boards import load_board
from assay.bounds import lower_bound, radius
from assay.budget import Budget
from assay.certificate import Smoothed
from assay.certificates.smoothing import SMOOTHING
from assay.defense import Defense
from assay.noise import Noise
from assay.registry import DEFENSES
from assay.statistics import clopper_pearson
from assay.target import Target
from assay.threat import parse_eps


@dataclass(frozen=True)
class Result:
    """Which samples were certified `(n,)`, draws a sample, and seconds."""

    certified: NDArray[np.bool_]
    draws: float
    seconds: float


def ours(defense: Defense, x: Tensor, y: Tensor, r: float, budget: Budget, *, sequential: bool) -> Result:
    """The registered procedure, with the sequential test or with the fixed number alone."""
    target = Target(defense, len(x))
    started = time.perf_counter()
    counts = SMOOTHING.measure(target, x, y, Noise.from_seed(0, len(x)), [r] if sequential else [], budget)
    subject = defense.certified()
    found = SMOOTHING.derive(counts, SMOOTHING.knobs(subject), [r] if sequential else [], budget)
    seconds = time.perf_counter() - started
    right = found.prediction == y.numpy()
    certified = found.claims[:, 0] if sequential else found.radius > r
    return Result(right & certified, float(counts["drawn"].mean()), seconds)


@torch.no_grad()
def plain(subject: Smoothed, x: Tensor, y: Tensor, r: float, budget: Budget, batch: int) -> Result:
    """One image at a time; every image gets all draws, whatever its class turns out to be."""
    torch.manual_seed(0)

    def count(image: Tensor, draws: int) -> NDArray[np.int64]:
        votes: NDArray[np.int64] | None = None
        while draws > 0:
            size = min(batch, draws)
            copies = image.repeat(size, 1, 1, 1)
            answers = subject.classify(copies + torch.randn_like(copies) * subject.sigma, Noise.from_seed(0, size))
            found = np.bincount(answers.argmax(1).numpy(), minlength=answers.shape[1])
            votes = found if votes is None else votes + found
            draws -= size
        assert votes is not None
        return votes

    started = time.perf_counter()
    certified = []
    for image, label in zip(x, y.tolist(), strict=True):
        chosen = int(count(image, budget.selection).argmax())
        hits = int(count(image, budget.draws)[chosen])
        certified.append(chosen == label and radius(lower_bound(hits, budget.draws, budget.alpha), subject.sigma) > r)
    return Result(np.asarray(certified), budget.selection + budget.draws, time.perf_counter() - started)


def main(
    name: Annotated[str, typer.Argument(help="A registered defense that is certified by smoothing.")] = "smoothing",
    board: Annotated[str, typer.Option(help="Whose images are certified.")] = "digits-l2",
    at: Annotated[str, typer.Option(help="The radius, a fraction.")] = "1/4",
    samples: Annotated[int, typer.Option(min=1)] = 50,
    draws: Annotated[int, typer.Option(min=1, help="The fixed number, and the sequential test's cap.")] = 100_000,
    batch: Annotated[int, typer.Option(min=1, help="Noisy copies in a batch of the plain loop.")] = 1000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Prints a row a procedure, and the ratios to the sequential test."""
    torch.set_num_threads(threads)
    found, r = load_board(board), float(parse_eps(at))
    x, y = data.load(found.dataset, found.ids[:samples])
    defense = DEFENSES[name].build(found.dataset)
    subject = defense.certified()
    assert isinstance(subject, Smoothed)
    fixed, test = Budget(draws=draws, cap=draws), Budget(draws=100, cap=draws)
    runs: dict[str, Callable[[], Result]] = {
        "sequential test": lambda: ours(defense, x, y, r, test, sequential=True),
        "fixed number": lambda: ours(defense, x, y, r, fixed, sequential=False),
        "plain loop, fixed number": lambda: plain(subject, x, y, r, fixed, batch),
    }
    ours(defense, x[:2], y[:2], r, Budget(draws=500, cap=500), sequential=False)  # pays for lazy initialisation
    results = {kind: run() for kind, run in runs.items()}
    first = results["sequential test"]
    table = Table("procedure", f"certified at {at}, %", "95 %", "draws a sample", "times", "seconds", "times")
    for kind, result in results.items():
        low, high = clopper_pearson(int(result.certified.sum()), samples)
        table.add_row(
            kind, f"{100 * result.certified.mean():.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]",
            f"{result.draws:,.0f}", f"{result.draws / first.draws:.1f}",
            f"{result.seconds:.2f}", f"{result.seconds / first.seconds:.1f}",
        )  # fmt: skip
    Console().print(f"{name} on {board}, sigma = {subject.sigma:g}, {samples} images, at most {draws:,} draws each")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
