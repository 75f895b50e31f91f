"""Attacks: their signature, and what the registry knows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate

from torch import Tensor

from assay.card import Handle
from assay.noise import Noise
from assay.target import Evaluation, Forward, Loss, Target
from assay.threat import ThreatModel

__all__ = ["Attack", "AttackSpec", "Evaluation", "Forward", "Loss", "Target"]

Attack = Callable[Concatenate["Target", Tensor, Tensor, ThreatModel, Noise, ...], Tensor]
"""`attack(target, x, y, threat, noise, *, …) -> x_adv`: a pure function from images to candidates.

`x (n, c, h, w)` in [0, 1], `y (n,)` int64, `noise` of n rows; returns `x_adv`, shaped like x,
inside the threat model's ball. No global RNG, no mode changes, no hooks left behind. Whether
a candidate counts is for the harness to decide.
"""


@dataclass(frozen=True)
class AttackSpec:
    """What the registry knows of an attack.

    Attributes:
        name: the registry's name.
        summary: one sentence.
        attack: the function.
        handles: handles without which it can't run.
        black_box: it uses logits only.
        deterministic_only: it draws wrong conclusions from a target that answers at random.
        min_classes: the fewest classes it is defined for.
    """

    name: str
    summary: str
    attack: Attack
    handles: tuple[Handle, ...] = ()
    black_box: bool = False
    deterministic_only: bool = False
    min_classes: int = 2
