"""Certified accuracy against radius as geometry: axes, steps and marks in pixels, all of it pure functions.

A record's curve holds the radii of the samples that it has right, from draws fixed beforehand. At radius r the
curve's accuracy is the share of all samples whose radius is larger than r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from string import ascii_uppercase
from typing import TYPE_CHECKING

from assay.record import Certification
from assay.threat import parse_eps

if TYPE_CHECKING:
    from assay.leaderboards.rows import Row, Table

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 612, 26, 312
"""The plot's frame inside the picture."""
LINES = 8
"""Lines in one plot: so many colours and dash patterns can be told apart."""
_MOST_TICKS = 8
_LABEL = 13
"""Labels of lines stand at least so far apart."""


@dataclass(frozen=True)
class Tick:
    """A position on an axis, in pixels, and what stands there."""

    at: str
    text: str


@dataclass(frozen=True)
class Mark:
    """What one row reached at one of the board's radii.

    Attributes:
        x, certified, attacked: pixels; `attacked` is empty where nothing was attacked.
        left: the share in [0, 1] that the attack left.
    """

    radius: str
    x: str
    certified: str
    attacked: str
    value: float
    left: float | None


@dataclass(frozen=True)
class Line:
    """One row's curve.

    Attributes:
        key: the letter that stands beside the line, in its legend and in the table.
        series: from 1 to `LINES`, its colour and dash pattern.
        path: the steps, as an SVG path.
        x, y: where the letter stands, in pixels.
    """

    row: Row
    key: str
    series: int
    path: str
    x: str
    y: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Plot:
    """Up to `LINES` rows on one pair of axes. `summary` says in one sentence what it shows."""

    lines: tuple[Line, ...]
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    radii: tuple[Tick, ...]
    summary: str


def plots(table: Table, *, most: int | None = None) -> tuple[Plot, ...]:
    """A table's curves, at most `LINES` in a plot and all on the same axes; rows that failed have none.

    With `most`, only those of the first rows that so many plots hold.
    """
    rows = [(row, row.record.certification) for row in table.certifying if row.record.verdict != "failed"]
    drawn = [(row, found) for row, found in rows if found is not None][: most and most * LINES]
    letters = keys(table)
    largest = max((found.curve[0] for _, found in drawn if found.curve), default=0.0)
    end = 1.04 * max(largest, *(float(parse_eps(radius)) for radius in table.radii), 1e-6) if table.radii else 1.0
    made = []
    size = math.ceil(len(drawn) / max(1, math.ceil(len(drawn) / LINES)))
    for start in range(0, len(drawn), max(1, size)):
        shown = drawn[start : start + size]
        lines = tuple(_line(row, found, letters[row.path], number, end) for number, (row, found) in enumerate(shown, 1))
        made.append(
            Plot(
                lines=_apart(lines),
                xs=tuple(Tick(_px(across(value, end)), f"{value:g}") for value in ticks(end)),
                ys=tuple(Tick(_px(down(percent / 100)), str(percent)) for percent in range(0, 101, 20)),
                radii=tuple(Tick(_px(across(float(parse_eps(r)), end)), r) for r in table.radii),
                summary=_summary([found for _, found in shown], table.radii),
            )
        )
    return tuple(made)


def keys(table: Table) -> dict[str, str]:
    """The letters of the certifying rows, by their paths: A, B, …, Z, A2, … in the table's order."""
    size = len(ascii_uppercase)
    return {
        row.path: ascii_uppercase[i % size] + (str(1 + i // size) if i >= size else "")
        for i, row in enumerate(table.certifying)
    }


def key(table: Table, row: Row) -> str:
    """The letter of one certifying row."""
    return keys(table)[row.path]


def steps(curve: Sequence[float], n: int) -> list[tuple[float, float]]:
    """Where certified accuracy over n samples falls, and to what: `(radius, accuracy)`, radii rising.

    Up to the first radius it is `len(curve) / n`; from a sample's own radius on, the sample no longer counts.
    """
    standing, found = len(curve), []
    for radius, equal in groupby(sorted(curve)):
        standing -= len(list(equal))
        found.append((radius, standing / n))
    return found


def ticks(end: float) -> list[float]:
    """Round values from 0 to `end`, at most nine."""
    rough = end / _MOST_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * size for size in (1, 2, 2.5, 5, 10) if unit * size >= rough * (1 - 1e-9))
    return [round(step * i, 12) for i in range(math.floor(end / step * (1 + 1e-9)) + 1)]


def across(radius: float, end: float) -> float:
    """A radius as a horizontal position, where the axis ends at `end`."""
    return LEFT + (RIGHT - LEFT) * radius / end


def down(accuracy: float) -> float:
    """An accuracy in [0, 1] as a vertical position."""
    return BOTTOM - (BOTTOM - TOP) * accuracy


def _line(row: Row, found: Certification, letter: str, series: int, end: float) -> Line:
    n = row.record.board.n
    falls = steps(found.curve, n)
    level = len(found.curve) / n
    path = f"M{_px(LEFT)} {_px(down(level))}"
    # Steps that one position stands for are drawn as one.
    for x, same in groupby(falls, key=lambda fall: _px(across(fall[0], end))):
        path += f"H{x}V{_px(down(list(same)[-1][1]))}"
    # Before the last fall: where votes agree, many samples share the largest radius, and the curve ends in a cliff.
    before = falls[-2][1] if len(falls) > 1 else level
    return Line(
        row=row, key=letter, series=series, path=path, x=_px(across(falls[-1][0] if falls else 0.0, end) + 9),
        y=_px(min(down(before), BOTTOM - _LABEL / 2)),
        marks=tuple(
            Mark(
                radius=radius, x=_px(across(float(parse_eps(radius)), end)), certified=_px(down(share.value)),
                attacked="" if share.attacked is None else _px(down(share.attacked.value)), value=share.value,
                left=None if share.attacked is None else share.attacked.value,
            )
            for radius, share in found.radii.items()
        ),
    )  # fmt: skip


def _apart(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lines with their letters moved up where they would stand on one another."""
    placed: dict[str, tuple[float, float]] = {}
    for line in sorted(lines, key=lambda line: -float(line.y)):
        x, y = float(line.x), float(line.y)
        for _ in lines:
            y = min([y, *(other - _LABEL for at, other in placed.values() if _near(at, other, x, y))])
        placed[line.key] = (x, y)
    return tuple(replace(line, y=_px(placed[line.key][1])) for line in lines)


def _near(x: float, y: float, other_x: float, other_y: float) -> bool:
    return abs(x - other_x) < _LABEL and abs(y - other_y) < _LABEL


def _summary(found: Sequence[Certification], radii: Sequence[str]) -> str:
    parts = []
    for radius in radii[:: max(1, len(radii) - 1)]:
        low, high = (100 * f(each.radii[radius].value for each in found) for f in (min, max))
        share = f"{low:.1f} %" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f} %"
        parts.append(f"{share} at radius {radius}")
    rows = f"{len(found)} rows" if len(found) != 1 else "one row"
    return f"Certified accuracy of {rows}, falling as the radius grows: {', '.join(parts)}."


def _px(value: float) -> str:
    return f"{value:.1f}"
