"""Who asks: whether a defense answers otherwise to a thread of its own, or to a call from an attack's frames.

The stack of a call names the modules that it comes from, and holds the labels among their variables. A defense that
looks there knows a check from an attack, and the truth as well.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FunctionType

import torch
from torch import Tensor

from assay.checks.agreement import Ledger, Way, counted, quietly
from assay.noise import Noise

DISGUISES = ("assay.target", "assay.attacks.losses", "assay.attacks.pgd", "assay.attacks.autoattack", "assay.shard")
"""Modules whose frames are on the stack while a defense is attacked, innermost first."""


def by_the_stack(ledger: Ledger) -> None:
    """Who asks can be read from the stack, and the labels with them."""
    subject = ledger.subject
    ways: list[tuple[str, Way, int]] = [("", subject.defense, subject.votes)]
    if subject.votes > 1:
        ways.append((" of a draw", subject.defense.draw, 1))
    wrong = (subject.y + 1) % subject.defense.n_classes
    for of, way, cost in ways:
        ask = counted(subject, way, cost)
        first = quietly(ask, subject.x, subject.noise)
        subject.charge(cost)
        ledger.compare(f"another thread{of}", first, partial(alone, way, subject.x, subject.noise), may_refuse=True)
        asking = partial(among_attacks, ask, wrong, subject.x, subject.noise)
        ledger.compare(f"an attack on the stack{of}", first, asking)


def alone(way: Way, x: Tensor, noise: Noise) -> Tensor:
    """The answer in a thread of its own, whose stack knows of no check and of no label.

    `way` is the defense's own function: a wrapper of this package would be on the stack.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(way), x, noise).result()


def among_attacks(way: Way, y: Tensor, x: Tensor, noise: Noise) -> Tensor:
    """The answer to a call that comes, by its stack, from the harness and an attack, beside the labels `y`."""

    def ask(ask: Way, x: Tensor, noise: Noise, y: Tensor, labels: Tensor) -> Tensor:
        return ask(x, noise)

    asking = way
    for module in DISGUISES:
        code = ask.__code__.replace(co_filename=f"{module.replace('.', '/')}.py", co_name=module.split(".")[-1])
        asking = partial(FunctionType(code, {"__name__": module}), asking, y=y, labels=y)
    return quietly(asking, x, noise)
