"""Threat models: what an attacker may change, by how much, and what it knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from assay.errors import InputError

Norm = Literal["linf", "l2"]
Knowledge = Literal["white-box", "black-box"]

NORMS: tuple[Norm, ...] = get_args(Norm)
BOX = (0.0, 1.0)
"""Every image lives in [0, 1]; a candidate outside is not an image."""

_FRACTION = re.compile(r"\d+(/[1-9]\d*)?")


def parse_eps(text: str | int | Fraction) -> Fraction:
    """An exact radius from `"8/255"`, `"1"`, an int or a Fraction.

    >>> parse_eps("8/255")
    Fraction(8, 255)
    >>> parse_eps("0.031")
    Traceback (most recent call last):
    assay.errors.InputError: eps must be an exact fraction such as '8/255', got '0.031'. Write it as '8/255'?

    Raises:
        InputError: for a decimal (the nearest fraction is suggested), a float, a negative number
            or anything else. `0.031` is not 8/255, and rows measured at the two are not comparable.
    """
    if isinstance(text, Fraction | int) and not isinstance(text, bool):
        eps = Fraction(text)
    elif isinstance(text, str) and _FRACTION.fullmatch(text.strip()):
        eps = Fraction(text.strip())
    else:
        raise InputError(f"eps must be an exact fraction such as '8/255', got {text!r}.{_suggest(text)}")
    if eps < 0:
        raise InputError(f"eps must not be negative, got {eps}.")
    return eps


def _suggest(text: object) -> str:
    try:
        value = float(str(text))
    except ValueError:
        return ""
    if not 0 < value < 1e6:
        return ""
    exact = Fraction(str(text).strip())
    pixels = round(value * 255)
    # A decimal with two or three digits usually stands for so many grey levels, unless it is a plain 1/2 or 1/5.
    if exact.denominator > 20 and abs(pixels / 255 - value) <= min(0.02 * value, 0.0005):
        return f" Write it as '{pixels}/255'?"
    return f" Write it as '{exact}'?"


@dataclass(frozen=True)
class ThreatModel:
    """A perturbation set: `{z in [0, 1]^d : ||z - x||_norm <= eps}`, and what the attacker knows.

    Attributes:
        norm: `"linf"` or `"l2"`.
        eps: the radius in [0, 1] pixel units, exact.
        knowledge: `"white-box"` allows gradients and the defense's handles, `"black-box"` only logits.

    Raises:
        InputError: for an unknown norm, or an eps that is not an exact fraction.
    """

    norm: Norm
    eps: Fraction
    knowledge: Knowledge = "white-box"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}.")
        if self.knowledge not in get_args(Knowledge):
            raise InputError(f"knowledge must be 'white-box' or 'black-box', got {self.knowledge!r}.")
        object.__setattr__(self, "eps", parse_eps(self.eps))

    def __str__(self) -> str:
        return f"{self.norm} {self.eps}"
