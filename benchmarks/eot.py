"""How many draws a gradient needs: the cosine between gradient estimates of disjoint draws.

    python -m benchmarks.eot diffpure --board digits-l2 --samples 16

For each number of draws, the mean over samples of the cosine between two estimates that share no
draw, at a point half-way to the edge of the ball in the direction of the first estimate, and how far
the direction still moves when the draws are doubled (1 − cosine). Gradients are of the margin,
averaged plainly and with each draw's cut to the median length of its sample's, as attacks average them.
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
from assay.boards import load_board
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
    """Prints two rows a defense."""
    torch.set_num_threads(threads)
    found = load_board(board)
    x, y = data.load(found.dataset, found.ids[:samples])
    counts = (1, 4, 16, 64)
    moves = f"moves from {DOUBLED} to {2 * DOUBLED}"
    table = Table("defense", "averages", *(f"cosine at {k}" for k in counts), moves)
    for name in defenses:
        target = Target(DEFENSES[name].build(found.dataset), samples)
        noise = Noise.from_seed(0, found.ids[:samples])

        def gradients(z: Tensor, stream: Noise, k: int, target: Target = target) -> tuple[Tensor, Tensor]:
            """Over k draws, plain and clipped."""
            made = target.gradient(z, (y,), margin, stream, draws=k, clip=True)
            return made.gradient if made.unclipped is None else made.unclipped, made.gradient

        ball = Ball(found.threat, x)
        z = ball.step(x, gradients(x, noise.child("start"), 16)[1], ball.eps / 2)
        pairs = [[gradients(z, noise.child(k, side), k) for side in ("a", "b")] for k in counts]
        for i, kind in enumerate(("plain", "clipped")):
            row = [f"{float(cosine(first[i], second[i]).mean()):.2f}" for first, second in pairs]
            first, second = (side[i] for side in pairs[counts.index(DOUBLED)])
            moved = 1 - cosine(first, (first + second) / 2)
            table.add_row(name if i == 0 else "", kind, *row, f"{float(moved.mean()):.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
