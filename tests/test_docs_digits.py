"""docs/digits.md says of the digits boards what their records say: every number of its tables is one of theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from assay.boards import load_board
from assay.protocol import load_protocol
from assay.record import Record, read_record
from assay.registry import DEFENSES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "digits.md").read_text()
BOARDS = {"linf 1/5": "digits-linf", "l2 3/4": "digits-l2"}
Cells = dict[tuple[str, str], str]


def section(title: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, without its ruling line."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if "---" not in line]
        for block in blocks
    ]


def by_name(text: str) -> Cells:
    """(row, defense) -> cell, of all tables whose columns are defenses."""
    return {
        (row[0], name.strip("`")): cell
        for head, *rows in tables(text)
        for row in rows
        for name, cell in zip(head[1:], row[1:], strict=True)
    }


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def rows(board: str) -> dict[str, Record]:
    """The registered defenses' rows under the protocol's present digest. That none is absent is another test's."""
    folder = ROOT / "leaderboards" / "records" / board
    digest = load_protocol(load_board(board).protocol).digest("standard")
    records = {
        name: read_record(folder / name / "standard") for name in DEFENSES if (folder / name / "standard").is_dir()
    }
    return {name: record for name, record in records.items() if record.protocol.digest == digest}


@pytest.mark.parametrize("title", BOARDS)
def test_every_row_of_the_board_is_there_with_its_numbers(title: str) -> None:
    cells = by_name(section(title))
    records = rows(BOARDS[title])
    assert {name for _, name in cells} == set(records)
    for name, record in records.items():
        results = record.results
        assert results is not None
        assert cells.pop(("clean", name)) == percent(results.clean.value)
        low, high = (percent(bound, 0) for bound in (results.robust.low, results.robust.high))
        assert cells.pop(("robust", name)) == f"{percent(results.robust.value)} [{low}, {high}]"
        shown = {row for row, column in cells if column == name}
        lowest = min(results.attacks, key=lambda attack: results.attacks[attack].value)
        for row in shown:
            expected = percent(results.attacks[row].value) if row in results.attacks else "–"
            assert cells.pop((row, name)) == (f"**{expected}**" if row == lowest else expected), (row, name)
        # A column that shows attacks shows all of them.
        assert not shown or set(results.attacks) <= shown
    assert not cells


def test_the_certified_table_is_what_the_records_say() -> None:
    ((_, *lines),) = tables(section("Certified beside attacked"))
    shown = {line[0].strip("`"): line[1:] for line in lines}
    radii = load_board("digits-l2").radii
    halves = {name: record.certification for name, record in rows("digits-l2").items()}
    assert set(shown) == {name for name, half in halves.items() if half is not None}
    for name, (certificate, *cells) in shown.items():
        half = halves[name]
        assert half is not None
        assert certificate == half.certificate
        found = [half.radii[radius] for radius in radii]
        expected = [
            f"{percent(each.value)} ≤ {percent(each.attacked.value)}" for each in found if each.attacked is not None
        ]
        assert cells == [*expected, f"{half.average_radius:.3f}"]
