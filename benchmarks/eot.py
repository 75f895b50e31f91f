"""How many draws a gradient needs: the cosine between gradient estimates of disjoint draws.

    python -m benchmarks.eot diffpure --board digits-l2 --samples 16

For each number of draws, the mean over samples of the cosine between two estimates that share no
draw, at a point half-way to the edge of the ball in the direction of the first estimate, and how far
the direction still moves when the draws are doubled (1 − cosine). Gradients are of the margin.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from assay import data
from assay.attack import Target
from assay.attacks.losses import margin
from assay.board import load_board
from assay.noise import Noise
from assay.norms import Ball
from assay.registry import DEFENSES

DOUBLED = 16
"""The number of draws whose doubling is looked at."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between two batches of gradients, `(n,)`; 0 where one of them vanishes."""
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def main(
    defenses: Annotated[list[str], typer.Argument(help="Registered defenses.")],
    board: Annotated[str, typer.Option(help="Whose images and ball are used.")] = "digits-linf",
    samples: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Prints one row a defense."""
    torch.set_num_threads(threads)
    found = load_board(board)
    x, y = data.load(found.dataset, found.ids[:samples])
    counts = (1, 4, 16, 64)
    table = Table("defense", *(f"cosine at {k}" for k in counts), f"moves from {DOUBLED} to {2 * DOUBLED}")
    for name in defenses:
        target = Target(DEFENSES[name].build(found.dataset), samples)
        noise = Noise.from_seed(0, found.ids[:samples])

        def gradient(z: Tensor, stream: Noise, k: int, target: Target = target) -> Tensor:
            return target.gradient(z, (y,), margin, stream, draws=k).gradient

        ball = Ball(found.threat, x)
        z = ball.step(x, gradient(x, noise.child("start"), 16), ball.eps / 2)
        row, moved = [], torch.zeros(())
        for k in counts:
            first, second = (gradient(z, noise.child(k, side), k) for side in ("a", "b"))
            row.append(f"{float(cosine(first, second).mean()):.2f}")
            if k == DOUBLED:
                moved = 1 - cosine(first, (first + second) / 2)
        table.add_row(name, *row, f"{float(moved.mean()):.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
