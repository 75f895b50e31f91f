"""What the site's pages show, worked out of the boards' tables: every record with its address, every defense."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.boards import Board
from assay.card import TRAITS
from assay.finding import Finding
from assay.leaderboards.rows import GROUPS, Group, Page, Row, Table
from assay.record import RECORD, Record

_LONGEST = 100
"""Characters of a page's file name, its suffix not counted."""


@dataclass(frozen=True)
class Entry:
    """One record.

    Attributes:
        path: of the record, in the leaderboards folder.
        address, defense: of its own page and its defense's, in the site.
        row: None where it can't be compared with its board's rows.
        reasons: why it isn't ranked or compared.
    """

    record: Record
    path: str
    board: Board
    address: str
    defense: str
    row: Row | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class DefenseView:
    """One defense under one set of options, with all its records. `newest` is the one whose card is shown."""

    address: str
    entries: tuple[Entry, ...]
    newest: Entry

    @property
    def others(self) -> tuple[Entry, ...]:
        """The records whose card says something else than the newest one's."""
        card = self.newest.record.defense.card
        return tuple(entry for entry in self.entries if entry is not self.newest and entry.record.defense.card != card)


@dataclass(frozen=True)
class Site:
    """All that is shown. `entries` are found by their record's path."""

    pages: tuple[Page, ...]
    entries: Mapping[str, Entry]
    defenses: tuple[DefenseView, ...]


@dataclass(frozen=True)
class Shelf:
    """Some rows of one group of a table, as one page of the board shows them.

    Attributes:
        shared: why none of the whole group is ranked, where all its rows share the reason.
        why: of each row, by its path, the reasons beyond the shared ones.
    """

    group: Group
    shared: tuple[str, ...]
    rows: tuple[Row, ...]
    why: Mapping[str, tuple[str, ...]]


def site_of(pages: Sequence[Page]) -> Site:
    """Gives each record and each defense its page."""
    names = _Names()
    found: list[Entry] = []
    homes: dict[tuple[str, str], str] = {}
    for page in pages:
        compared = [(row.record, row.path, row, row.why) for table in page.tables for row in table.rows]
        apart = [(other.record, other.path, None, other.reasons) for other in page.incomparable]
        for record, path, row, reasons in (*compared, *apart):
            ref = record.defense
            key = (ref.card.name, ref.variant)
            if key not in homes:
                homes[key] = names.take("defenses", ref.card.name + ref.variant)
            inside = path.removeprefix(f"records/{page.board.name}/").removesuffix(f"/{RECORD}")
            address = names.take(f"records/{page.board.name}", inside)
            found.append(Entry(record, path, page.board, address, homes[key], row, reasons))
    by_defense: dict[str, list[Entry]] = {address: [] for address in homes.values()}
    for entry in found:
        by_defense[entry.defense].append(entry)
    views = [
        DefenseView(address, tuple(entries), max(entries, key=lambda e: (e.record.provenance.finished, e.path)))
        for address, entries in by_defense.items()
    ]
    views.sort(key=lambda view: (view.newest.record.defense.title.casefold(), view.address))
    return Site(tuple(pages), {entry.path: entry for entry in found}, tuple(views))


class _Names:
    """File names made of other people's names: plain characters, and never one twice, whatever the case."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, folder: str, name: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9_.=+-]+", "--", name).strip(".")[:_LONGEST] or "unnamed"
        if f"{folder}/{plain}".casefold() in self._taken or plain == "index":
            plain += "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
        self._taken.add(f"{folder}/{plain}".casefold())
        return f"{folder}/{plain}.html"


def shelves(table: Table, start: int, stop: int) -> list[Shelf]:
    """The table's rows from `start` to `stop`, by group; the reasons that a group shares are said once."""
    made = []
    shown = {row.path for row in table.rows[start:stop]}
    for group in GROUPS:
        members = [row for row in table.rows if row.group == group]
        rows = tuple(row for row in members if row.path in shown)
        if rows:
            common = set.intersection(*(set(row.why) for row in members)) if len(members) > 1 else set()
            shared = tuple(reason for reason in members[0].why if reason in common)
            why = {row.path: tuple(reason for reason in row.why if reason not in common) for row in rows}
            made.append(Shelf(group, shared, rows, why))
    return made


def finding(record: Record, check: str) -> Finding | None:
    """What a check found; None where it was not asked."""
    return next((found for found in record.findings if found.check == check), None)


def measured_traits(record: Record) -> list[tuple[str, bool, str]]:
    """Each trait, whether it is declared, and what was measured of it: yes, no, or empty where nothing was."""
    found = finding(record, "declared_traits")
    measured = found.data if found is not None else {}
    declared = record.defense.card.traits.names()

    def said(trait: str) -> str:
        one = measured.get(trait)
        return str(one.get("measured", "")) if isinstance(one, dict) else ""

    return [(trait, trait in declared, said(trait)) for trait in TRAITS]


def series(found: Finding | None, xs: str, ys: str) -> list[tuple[float, float]]:
    """A curve that a finding recorded, as points; empty where it holds none of numbers.

    Findings are data from a file: nothing is taken for granted of them.
    """
    if found is None:
        return []
    first, second = found.data.get(xs), found.data.get(ys)
    if not isinstance(first, list) or not isinstance(second, list) or len(first) != len(second):
        return []
    points = [(_number(x), _number(y)) for x, y in zip(first, second, strict=True)]
    return points if all(math.isfinite(x) and math.isfinite(y) for x, y in points) else []


def _number(value: Any) -> float:
    """A number, or a fraction in text; NaN for all else."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(/[1-9]\d{0,8})?", value):
        above, _, below = value.partition("/")
        return int(above) / int(below or 1)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def objecting(record: Record) -> list[Finding]:
    """The findings that did not pass."""
    return [found for found in record.findings if found.status != "pass"]


def objections(rows: Iterable[Row]) -> list[tuple[Row, list[Finding]]]:
    """Each row with those of its findings that did not pass."""
    found = [(row, objecting(row.record)) for row in rows]
    return [(row, findings) for row, findings in found if findings]
