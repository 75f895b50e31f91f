"""A board's rows as CSV: accuracies in [0, 1], radii in pixel units."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from assay.boards import Board
from assay.leaderboards.claims import claimed_text
from assay.leaderboards.rows import Page
from assay.leaderboards.text import csv_text, flags
from assay.protocol import FAMILIES
from assay.record import Certification, Record


def board_csv(page: Page) -> str:
    """One row a record; those that no table shows come last, with the reason.

    `known` is the best known robust accuracy after so many `audits`; `claimed_elsewhere` is text, not a measurement.
    """
    buffer = io.StringIO()
    columns = [*_COLUMNS, *_certified_columns(page.board), *FAMILIES, *_LAST]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(_rows(page))
    return buffer.getvalue()


_ACCURACIES = ("clean", "robust", "robust_low", "robust_high", "worst_of_n", "majority")
_COLUMNS = ("profile", "group", "rank", "defense", "title", "verdict", "flags", "n", *_ACCURACIES)
_AT_RADIUS = ("certified", "certified_low", "certified_high", "confident", "attacked")
_LAST = ("known", "audits", "claimed_elsewhere", "forward", "backward", "seconds", "protocol_digest", "record", "why")


def _certified_columns(board: Board) -> list[str]:
    if not board.radii:
        return []
    return [*(f"{name}@{radius}" for radius in board.radii for name in _AT_RADIUS), "average_radius"]


def _rows(page: Page) -> Iterator[dict[str, Any]]:
    for table in page.tables:
        for row in table.rows:
            yield {
                **_cells(row.record, row.path, row.why, page.board.radii),
                "group": row.group,
                "rank": "" if row.rank is None else row.rank,
                "known": "" if row.known is None else f"{row.known:.6f}",
                "audits": len(row.audits),
                "claimed_elsewhere": csv_text(claimed_text(row.claims, page.board)),
                **{family: f"{left.value:.6f}" for family, left in row.left.items()},
            }
    for other in page.incomparable:
        yield {**_cells(other.record, other.path, other.reasons, page.board.radii), "group": "not comparable"}


def _cells(record: Record, path: str, why: tuple[str, ...], radii: tuple[str, ...]) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "profile": record.protocol.profile,
        "defense": csv_text(record.defense.name),
        "title": csv_text(record.defense.title),
        "verdict": record.verdict,
        "flags": csv_text(" ".join(flags(record))),
        "n": record.board.n,
        "forward": record.cost.forward,
        "backward": record.cost.backward,
        "seconds": f"{record.cost.seconds:.3f}",
        "protocol_digest": csv_text(record.protocol.digest),
        "record": csv_text(path),
        "why": csv_text("; ".join(why)),
    }
    if record.results is not None:
        rules, robust = record.results.rules, record.results.robust
        values = (record.results.clean.value, robust.value, robust.low, robust.high,
                  rules.worst_of_n.value, rules.majority.value)  # fmt: skip
        cells |= {name: f"{value:.6f}" for name, value in zip(_ACCURACIES, values, strict=True)}
    if record.certification is not None:
        cells |= _certified_cells(record.certification, radii)
    return cells


def _certified_cells(certification: Certification, radii: tuple[str, ...]) -> dict[str, Any]:
    """Of those of the board's radii that were certified; none on a board without radii."""
    cells: dict[str, Any] = {"average_radius": f"{certification.average_radius:.6f}"} if radii else {}
    for radius in radii:
        if found := certification.radii.get(radius):
            attacked = "" if found.attacked is None else f"{found.attacked.value:.6f}"
            values = (f"{found.value:.6f}", f"{found.low:.6f}", f"{found.high:.6f}", found.confident, attacked)
            cells |= {f"{name}@{radius}": value for name, value in zip(_AT_RADIUS, values, strict=True)}
    return cells
