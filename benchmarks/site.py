"""What a site of many records costs: seconds to render it, and to collect its rows, by synthetic records.

Run from the project's root: `python -m benchmarks.site --records 10000`. The records are those of the tests'
`record_zoo.py`, each of them many times over: thousands of defenses with one record on each of two boards.
Rendering is from rows to the bytes of every page. Collecting, which reads and validates every record and tests pairs
of rows against each other, is measured on few records, since pairs grow with the square.
"""

from __future__ import annotations

import cProfile
import pstats
import runpy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated
from unittest import mock

import typer

from assay.boards import load_board
from assay.leaderboards.rows import Page, Row, Table, collect
from assay.leaderboards.site import render_pages
from assay.protocol import PROTOCOLS

ZOO = Path(__file__).parents[1] / "tests" / "record_zoo.py"
BOARDS = ("board", "balls")


def main(
    records: Annotated[int, typer.Option(help="Synthetic records, over both boards.")] = 10_000,
    collected: Annotated[int, typer.Option(help="Records on disk that are collected.")] = 100,
    profile: Annotated[bool, typer.Option(help="Print where rendering spends its time.")] = False,
) -> None:
    """Prints the seconds of rendering and of collecting, and the size of what was rendered."""
    zoo = SimpleNamespace(**runpy.run_path(str(ZOO)))
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(PROTOCOLS, {"test.1": zoo.PROTOCOL}):
        folder = Path(name)
        (folder / "records").mkdir()
        zoo.write_board(folder)
        zoo.write_all(folder)
        zoo.write_certified(folder)
        pages = [collect(folder, load_board(board, folder)) for board in BOARDS]
        many = [_multiplied(page, records // len(BOARDS)) for page in pages]
        profiler = cProfile.Profile(builtins=False)
        wall, busy = time.perf_counter(), time.process_time()
        if profile:
            profiler.enable()
        sizes = [len(content) for _, content in render_pages(many, folder)]
        profiler.disable()
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        count = sum(len(table.rows) for page in many for table in page.tables)
        typer.echo(
            f"rendered {count} records as {len(sizes)} pages, {sum(sizes) / 1e6:.0f} MB: {wall:.2f} s, of them "
            f"{busy:.2f} s of this process; {1e6 * busy / count:.0f} µs a record"
        )
        if profile:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        for i in range(collected):
            zoo.write(folder, f"extra-{i}", (i % 40) / 40, shift=i)
        start = time.process_time()
        page = collect(folder, load_board("board", folder))
        spent = time.process_time() - start
        found = sum(len(table.rows) for table in page.tables)
        typer.echo(f"collected {found} records of one board: {spent:.2f} s; {1e3 * spent / found:.1f} ms a record")


def _multiplied(page: Page, count: int) -> Page:
    """The page with `count` rows in its first table, made of that table's own."""
    table = page.tables[0]
    rows = tuple(sorted(_copies(table, count), key=lambda row: table.rows.index(row.original)))
    return replace(page, tables=(replace(table, rows=tuple(each.row for each in rows)),), incomparable=())


def _copies(table: Table, count: int) -> Iterator[SimpleNamespace]:
    for i in range(count):
        original: Row = table.rows[i % len(table.rows)]
        record = original.record
        card = record.defense.card.model_copy(update={"name": f"defense-{i}"})
        record = record.model_copy(update={"defense": record.defense.model_copy(update={"card": card})})
        path = original.path.replace("/record.json", f"-{i}/record.json")
        yield SimpleNamespace(original=original, row=replace(original, record=record, path=path))


if __name__ == "__main__":
    typer.run(main)
