"""Line plots of what findings recorded, as geometry: positions in pixels that a template draws.

The frame, ticks and series are those of `curves`, so that all plots of the site look alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from assay.leaderboards import curves
from assay.leaderboards.curves import LEFT, LINES, RIGHT, Tick, down, ticks
from assay.leaderboards.rows import Row, Table
from assay.leaderboards.site_views import finding, series
from assay.record import Record
from assay.threat import parse_eps

Named = tuple[str, list[tuple[float, float]]]
"""A series: its name and its points."""
_NORMS = {"linf": "ℓ∞", "l2": "ℓ2"}


@dataclass(frozen=True)
class Point:
    """A marked position, in pixels, and what it says."""

    x: str
    y: str
    text: str


@dataclass(frozen=True)
class Polyline:
    """One series, from 1 to `LINES`; `key` stands at its end, `name` in the legend."""

    series: int
    key: str
    name: str
    path: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class LinePlot:
    """Lines on one pair of axes.

    Attributes:
        summary: in one sentence what it shows.
        across, up: what the axes are.
        mark: a vertical line and what it is, such as the board's own ε.
    """

    summary: str
    across: str
    up: str
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    lines: tuple[Polyline, ...]
    mark: Tick | None = None


def accuracy_against_eps(table: Table, rows: Sequence[Row]) -> LinePlot | None:
    """What one attack left of the first `LINES` of the rows whose radius was varied; None where none was."""
    drawn = [(row, series(finding(row.record, "eps_curve"), "eps", "accuracy")) for row in rows]
    drawn = [(row, points) for row, points in drawn if len(points) > 1 and row.record.verdict != "failed"][:LINES]
    if not drawn:
        return None
    named = [(row.record.defense.title, points) for row, points in drawn]
    return _eps_plot(drawn[0][0].record, named, f"{table.profile} rows")


def eps_curve(record: Record) -> LinePlot | None:
    """The same of one record; None where nothing was varied."""
    points = series(finding(record, "eps_curve"), "eps", "accuracy")
    return _eps_plot(record, [(record.defense.title, points)], "this record") if len(points) > 1 else None


def eot_convergence(record: Record) -> LinePlot | None:
    """How well gradients over so many draws agree with each other; None where that was not measured."""
    found = finding(record, "eot")
    named = [
        ("plain average", series(found, "draws", "cosine")),
        ("longest clipped", series(found, "draws", "clipped")),
    ]
    named = [(name, points) for name, points in named if len(points) > 1 and all(x > 0 for x, _ in points)]
    if not named:
        return None
    draws = sorted({x for _, points in named for x, _ in points})
    low, high = math.log2(draws[0]), max(math.log2(draws[-1]), math.log2(draws[0]) + 1)

    def place(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log2(x) - low) / (high - low)

    last = ", ".join(f"{name} {points[-1][1]:.2f}" for name, points in named)
    return LinePlot(
        summary=f"Agreement of gradients by the number of draws; over {draws[-1]:g} draws: {last}.",
        across="draws in one gradient", up="cosine of two such gradients",
        xs=tuple(Tick(_px(place(x)), f"{x:g}") for x in draws),
        ys=tuple(Tick(_px(down(i / 5)), f"{i / 5:.1f}") for i in range(6)),
        lines=_lines(named, place, "{x:g} draws: {y:.3f}"),
    )  # fmt: skip


def _eps_plot(record: Record, named: Sequence[Named], whose: str) -> LinePlot:
    threat = record.board.threat
    eps = float(parse_eps(threat.eps))
    end = max(1e-9, 1.04 * max(eps, *(x for _, points in named for x, _ in points)))

    def place(x: float) -> float:
        return curves.across(x, end)

    return LinePlot(
        summary=f"Accuracy that one attack left of {whose}, falling as the radius grows.",
        across=f"{_NORMS[threat.norm]} radius of the attack, pixels in [0, 1]", up="accuracy left in percent",
        xs=tuple(Tick(_px(place(x)), f"{x:g}") for x in ticks(end)),
        ys=tuple(Tick(_px(down(percent / 100)), str(percent)) for percent in range(0, 101, 20)),
        lines=_lines(named, place, "at {x:.4g}: {y:.1%}"),
        mark=Tick(_px(place(eps)), f"ε = {threat.eps}"),
    )  # fmt: skip


def _lines(named: Sequence[Named], place: Callable[[float], float], said: str) -> tuple[Polyline, ...]:
    """Each series as a path with its points marked."""
    made = []
    for number, (name, points) in enumerate(named, 1):
        at = [(_px(place(x)), _px(down(min(1.0, max(0.0, y))))) for x, y in points]
        path = "M" + "L".join(f"{x} {y}" for x, y in at)
        marks = tuple(
            Point(x, y, f"{name}, {said.format(x=p, y=q)}") for (x, y), (p, q) in zip(at, points, strict=True)
        )
        made.append(Polyline(number, chr(ord("a") + number - 1), name, path, marks))
    return tuple(made)


def _px(value: float) -> str:
    return f"{value:.1f}"
