"""AutoAttack's `rand` version beside the decision rules here: what one lucky draw does to a number.

    python -m benchmarks.rand random_resize diffpure --board digits-linf --n 32

`rand` (Croce & Hein 2020) averages gradients over 20 draws, but every decision about a sample is one draw:
whether it is right at the start, whether an attack (APGD-CE, then APGD-DLR) takes it up, which of an attack's
points was last wrong and is handed over, and whether that point counts. Two closed forms show what follows,
both of them a classifier that abstains (a wrong answer) with probability p, whatever the image:

- With an ε that can't change its classes. No attack does anything and the defense is right with probability
  1 − p, but a sample must be right in three draws to be counted: `rand` reports (1 − p)³.
- With an ε that changes every class, so that each image has a point where the defense is always wrong. Now
  `rand` can miss it: a sample that is wrong in an attack's first draw isn't attacked, and may be right in the next.
  It reports p²(1 − p)³ where nothing is left, and those that it calls broken are partly clean images.

Then registered defenses. Every sample is scored as the harness does: with fresh draws of the defense's full
answer. "rand reports" is the package's own number, "its examples" are what it returns, scored anew; the last
three columns are a run of this project's quick profile (for the closed forms: its APGD with 20 draws). A defense
that votes is shown to the package one draw at a time, since a vote has no gradient: its number is then about
another model than the voting one.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from pyautoattack import AutoAttack
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn

from assay import data
from assay.attack import Target
from assay.boards import Board, load_board
from assay.card import Card, Traits
from assay.certification import estimate
from assay.defense import Defense
from assay.evaluation import execute
from assay.guard import vote
from assay.noise import Noise
from assay.prepare import prepare
from assay.record import Estimate
from assay.registry import ATTACKS, DEFENSES
from assay.threat import ThreatModel, parse_eps

CLASSES = 4
HELD, LOST = "1/100", "1/5"
"""Radii at which no class of `Coin` can be changed, and at which every one can."""
ITERATIONS = 100


class Coin(Defense):
    """Answers an image of four pixels with its brightest one, but with probability `p` abstains: class 4, always wrong.

    Its draws depend on the noise alone, so its expected accuracy is 1 − p where its classes hold and 0 where they fall.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.card = Card(name="coin", title="Coin", summary="Abstains by chance.", traits=Traits(stochastic=True))
        self.n_classes = CLASSES + 1
        self.p = p

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """Ten times the pixels, and a fifth logit that is above or below them all."""
        heads = noise.uniform("coin", shape=(1,), like=x) < self.p
        return torch.cat([10 * x.flatten(1), 40.0 * heads - 20], dim=1)


def tiles(n: int) -> tuple[Tensor, Tensor]:
    """`n` images for `Coin`, `(n, 1, 2, 2)`: the pixel of the label is .6, the others .4."""
    y = torch.arange(n) % CLASSES
    return (0.4 + 0.2 * nn.functional.one_hot(y, CLASSES)).reshape(n, 1, 2, 2), y


@dataclass(frozen=True)
class Numbers:
    """Accuracies under each rule here."""

    expected: float
    worst_of_n: float
    majority: float


@dataclass(frozen=True)
class Closed:
    """What `Coin` must give, exactly: `reported` by rand, `examples` the expected accuracy of what it returns."""

    reported: float
    examples: float
    rules: Numbers


def closed_form(p: float, eps: str, draws: int) -> Closed:
    """`Coin(p)` at radius `HELD` or `LOST`."""
    q = 1 - p
    if eps == HELD:
        # Right in more than half of the draws: an equal number of abstentions is no plurality.
        return Closed(q**3, q, Numbers(q, q**draws, float(stats.binom.sf(draws // 2, draws, q))))
    # An attack skips a sample whose first draw is wrong and judges the clean image instead. So a sample returns as it
    # was: wrong at the start; or skipped and wrong when judged, by either attack; or standing at the end.
    reported = q * (p * q) ** 2
    unchanged = p + q * p * p + q * (p * q) * p * p + reported
    return Closed(reported, q * unchanged, Numbers(0.0, 0.0, 0.0))


class Singles(nn.Module):
    """A defense as the package sees it: logits, each call one fresh draw a row."""

    def __init__(self, target: Target, noise: Noise) -> None:
        super().__init__()
        self._target = target
        self._noise = noise
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Samples leave the batch without a word, so a row's stream is a position's, new with each call."""
        noise = self._noise.child("call", self._calls)[torch.arange(len(x)) % len(self._noise)]
        self._calls += 1
        return self._target.forward_graph(x, noise)


def rand(
    target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, *, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor]:
    """The package's `rand`, called directly: which samples it counts as robust `(n,)` bool, and what it returns."""
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    trace = sys.gettrace()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        suite = AutoAttack(
            Singles(target, noise), norm=norm, eps=float(threat.eps), seed=noise.seed(), version="rand", device="cpu"
        )
        suite.verbose = False
        suite.logger = suite.apgd.logger = logging.Logger("autoattack", level=logging.CRITICAL + 1)
        suite.apgd.n_iter = iterations
        try:
            # The label that comes back is right exactly where the sample was never judged wrong.
            x_adv, answers = suite.run_standard_evaluation(x, y, batch_size=len(x))
        finally:
            sys.settrace(trace)
    return answers == y, x_adv.detach()


def score(target: Target, x: Tensor, y: Tensor, noise: Noise, draws: int) -> dict[str, Estimate]:
    """Accuracies under each rule, from fresh draws of the full answer."""
    right, majority = vote(target.answer(x, noise, repeats=draws), y)
    scores = {"expected": right / draws, "worst_of_n": right == draws, "majority": majority}
    return {rule: estimate(values.numpy().astype(np.float64)) for rule, values in scores.items()}


def coin_row(p: float, eps: str, n: int, *, draws: int = 20, iterations: int = ITERATIONS) -> dict[str, Estimate]:
    """What was measured on `Coin`: `clean`, `reported` and `examples` of rand; under each rule, this project's APGD."""
    x, y = tiles(n)
    threat = ThreatModel("linf", eps)  # type: ignore[arg-type]
    target, noise = Target(Coin(p).eval(), n), Noise.from_seed(0, n)
    robust, x_adv = rand(target, x, y, threat, noise.child("rand"), iterations=iterations)
    ours = ATTACKS["apgd"].attack(target, x, y, threat, noise.child("apgd"), steps=iterations, eot=20)
    return {
        "clean": score(target, x, y, noise.child("clean"), draws)["expected"],
        "reported": estimate(robust.numpy().astype(np.float64)),
        "examples": score(target, x_adv, y, noise.child("fresh"), draws)["expected"],
        **score(target, ours, y, noise.child("judge"), draws),
    }


def defense_row(name: str, board: Board, n: int, *, iterations: int = ITERATIONS) -> dict[str, Estimate]:
    """The same of a registered defense on a board's first `n` samples; the rules' numbers are a quick run's."""
    prepared = prepare(name, board, "quick", n=n)
    job = prepared.job
    x, y = data.load(board.dataset, job.ids)
    target, noise = Target(job.defense, n), Noise.from_seed(job.seed, job.ids).child("benchmarks.rand")
    robust, x_adv = rand(target, x, y, board.threat, noise.child("rand"), iterations=iterations)
    examples = score(target, x_adv, y, noise.child("fresh"), board.draws)["expected"]
    with tempfile.TemporaryDirectory() as folder:
        results = execute(prepared, Path(folder) / "run").results
    if results is None:
        raise typer.BadParameter(f"{name} failed a check, so there is nothing to compare.")
    rules = {rule: getattr(results.rules, rule) for rule in ("expected", "worst_of_n", "majority")}
    reported = estimate(robust.numpy().astype(np.float64))
    return {"clean": results.rules.expected.clean, "reported": reported, "examples": examples, **rules}


COLUMNS = ("clean", "reported", "examples", "expected", "worst_of_n", "majority")


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} ({100 * found.low:.0f}–{100 * found.high:.0f})"


def main(
    defenses: Annotated[list[str] | None, typer.Argument(help="Registered stochastic defenses; none: `Coin`.")] = None,
    board: Annotated[str, typer.Option(help="Whose images, ball and draws are used.")] = "digits-linf",
    eps: Annotated[str | None, typer.Option(help="Another radius than the board's.")] = None,
    n: Annotated[int, typer.Option(min=2, help="The board's first N samples.")] = 32,
    coins: Annotated[int, typer.Option(min=2, help="Images for the closed forms.")] = 1000,
    p: Annotated[list[float] | None, typer.Option(help="Probabilities of abstaining.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of rand; its own number is 100.")] = ITERATIONS,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Prints accuracies in percent, with 95 % intervals over the samples."""
    torch.set_num_threads(threads)
    found = load_board(board)
    if eps is not None:
        found = found.model_copy(update={"eps": str(parse_eps(eps))})
    rest = [defense for defense in defenses or () if not DEFENSES[defense].card.traits.stochastic]
    if rest:
        raise typer.BadParameter(f"{rest[0]} is deterministic: rand is for defenses that answer at random.")
    draws = found.draws
    headings = ("clean", "rand reports", "its examples", "expected", f"worst of {draws}", f"majority of {draws}")
    table = Table("defense", *headings)
    for chance in p or (0.1, 0.4):
        for eps, word in ((HELD, "no class changes"), (LOST, "every class changes")):
            exact = closed_form(chance, eps, draws)
            rules = exact.rules
            values = (1 - chance, exact.reported, exact.examples, rules.expected, rules.worst_of_n, rules.majority)
            table.add_row(f"coin, p = {chance:g}, {word}: exact", *(f"{100 * value:.1f}" for value in values))
            table.add_row(f"  {coins} images", *_row(coin_row(chance, eps, coins, draws=draws, iterations=iterations)))
    table.add_section()
    for name in defenses or ():
        started = time.perf_counter()
        table.add_row(f"{name}, {n} images", *_row(defense_row(name, found, n, iterations=iterations)))
        Console(stderr=True).print(f"{name}: {time.perf_counter() - started:.0f} s")
    Console(width=160).print(table)


def _row(found: dict[str, Estimate]) -> Sequence[str]:
    return [_percent(found[column]) for column in COLUMNS]


if __name__ == "__main__":
    typer.run(main)
