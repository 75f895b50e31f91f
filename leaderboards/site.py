"""The static site: every board, defense and record as pages that need neither a network nor a server.

Pages are a pure function of a leaderboards folder, and of the data sets that are at hand for their pictures. Cards,
findings and names are other people's text: jinja2 escapes all of it, and each page's policy allows its own style
sheet and script by their digests, images that lie in the page, and nothing else.

The script that sorts and filters is our own, a page of it: the libraries for that (DataTables, as `itables` carries
it, 600 kB) set their own styles and know only one body of rows, so neither the policy nor the groups of a board's
table could stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from assay.boards import board_names, load_board
from assay.errors import InputError
from assay.leaderboards import curves, site_plots
from assay.leaderboards.claims import load_claims
from assay.leaderboards.rows import Page, Row, Table, collect, refuse_strays
from assay.leaderboards.site_pictures import album
from assay.leaderboards.site_text import audits_of, board_address, claims_of, environment
from assay.leaderboards.site_views import (
    DefenseView,
    Entry,
    Site,
    finding,
    measured_traits,
    objecting,
    objections,
    shelves,
    site_of,
)
from assay.record import Record, write_atomically

MARKER = ".assay-site.json"
"""Lies in a folder that holds a site, and names its files: what isn't named there isn't the site's to delete."""
ROWS = 500
"""Rows of one profile on one page of a board: what a browser on a phone can still sort."""
_PLOTS = 2
"""Plots of certified accuracy on a page, of `curves.LINES` rows each."""


def render_site(folder: Path) -> dict[str, bytes]:
    """Every file of the site, by its path in it.

    Args:
        folder: a leaderboards folder, with `boards/` and `records/`.

    Raises:
        InputError: for an invalid board or record, or a record without a board.
        IntegrityError: for a record, or a file of it, that was changed; it is named.
    """
    return dict(render_pages(_collected(folder), folder))


def write_site(folder: Path, out: Path) -> list[str]:
    """Renders the site into `out`, file by file; removes what an earlier call wrote and this one doesn't.

    Returns:
        The paths in `out` of all of the site's files, sorted.

    Raises:
        InputError: as `render_site`, and where `out` holds files but no site.
        IntegrityError: as `render_site`.
    """
    before = _own_files(out)
    pages = _collected(folder)
    out.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    # Named before they are there: a site that was interrupted is still one.
    for name, content in render_pages(pages, folder):
        if not written:
            _mark(out, before)
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
        written.append(name)
    _mark(out, written)
    for name in set(before) - set(written):
        (out / name).unlink(missing_ok=True)
    return sorted(written)


def _collected(folder: Path) -> list[Page]:
    refuse_strays(folder)
    claims = load_claims(folder)
    return [collect(folder, load_board(name, folder), claims) for name in board_names(folder)]


def check_out(out: Path) -> None:
    """Raises InputError where `write_site` would refuse the folder `out`."""
    _own_files(out)


def render_pages(pages: Iterable[Page], folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each file of the site and its path, from the boards' pages; pictures are read from `folder` as they are needed.

    Raises:
        IntegrityError: for pictures that are not their record's.
    """
    site = site_of(list(pages))
    found, templates = environment(), {}

    def render(address: str, name: str, **context: Any) -> tuple[str, bytes]:
        if name not in templates:
            templates[name] = found.get_template(name)
            # A plain dictionary: what is looked up on thousands of pages needn't be looked up in two.
            templates[name].globals = dict(templates[name].globals)
        root = "../" * address.count("/")
        return address, templates[name].render(root=root, site=site, **context).encode()

    boards = [(page, [row for t in page.tables if t.profile == "standard" for row in t.group("ranked")])
              for page in site.pages]  # fmt: skip
    boards.sort(key=lambda board: not board[1])  # stable: those with rows first
    yield render("index.html", "site_index.html.j2", here="boards", boards=boards, scripted=False)
    yield render("defenses/index.html", "site_defenses.html.j2", here="defenses", best=_best(site), scripted=False)
    for page in site.pages:
        parts = max((-(-len(table.rows) // ROWS) for table in page.tables), default=1)
        for part in range(1, parts + 1):
            yield render(board_address(page.board.name, part), "site_board.html.j2", **_board(page, part, parts))
    for view in site.defenses:
        yield render(view.address, "site_defense.html.j2", **_defense(view))
    for entry in site.entries.values():
        yield render(entry.address, "site_record.html.j2", **_record(entry, folder))


def _board(page: Page, part: int, parts: int) -> dict[str, Any]:
    shown, rows = [], []
    for table in page.tables:
        held = shelves(table, (part - 1) * ROWS, part * ROWS)
        if held:
            here = [row for shelf in held for row in shelf.rows]
            shown.append((table, held, _below(table, here, part)))
            rows += here
    return {
        "page": page, "board": page.board, "m": page.board.draws, "part": part, "parts_of": parts, "shown": shown,
        "noted": objections(rows), "families": {family for table in page.tables for family in table.families},
        "with_claims": any(claims_of(row) for row in rows), "scripted": bool(shown), "here": "",
        "falls": page.falls if part == 1 else (),
    }  # fmt: skip


def _below(table: Table, rows: list[Row], part: int) -> SimpleNamespace:
    """What stands below a table: its certified details and its plots, those of whole tables on the first page."""
    certifying = [row for row in rows if row.record.certification is not None]
    return SimpleNamespace(
        certifying=certifying, keys=curves.keys(table) if certifying else {},
        plots=curves.plots(table, most=_PLOTS) if certifying and part == 1 else (),
        eps=site_plots.accuracy_against_eps(table, rows) if part == 1 else None,
    )  # fmt: skip


def _best(site: Site) -> dict[str, dict[str, Entry]]:
    """For each defense and board the record of the profile that says most."""
    order = {"quick": 0, "thorough": 1, "standard": 2}
    found: dict[str, dict[str, Entry]] = {}
    for view in site.defenses:
        measured = [entry for entry in view.entries if entry.record.results is not None and entry.row is not None]
        measured.sort(key=lambda entry: order[entry.record.protocol.profile])
        found[view.address] = {entry.board.name: entry for entry in measured}
    return found


def _defense(view: DefenseView) -> dict[str, Any]:
    measuring = next((e for e in _newest_first(view) if finding(e.record, "declared_traits") is not None), None)
    plots = ((entry, site_plots.eot_convergence(entry.record)) for entry in _newest_first(view))
    noted = [(entry, objecting(entry.record)) for entry in view.entries]
    claims = {claim: None for entry in view.entries if entry.row for claim in claims_of(entry.row)}
    audits = [(entry, audits_of(entry.row)) for entry in view.entries if entry.row]
    return {
        "view": view, "others": {entry.path for entry in view.others}, "measuring": measuring, "here": "",
        "scripted": False, "claims": list(claims), "traits": measured_traits((measuring or view.newest).record),
        "eot": next(((entry, plot) for entry, plot in plots if plot is not None), None),
        "noted": [(entry, found) for entry, found in noted if found],
        "audits": [(entry, found) for entry, found in audits if found],
    }  # fmt: skip


def _newest_first(view: DefenseView) -> list[Entry]:
    return sorted(view.entries, key=lambda entry: entry.record.provenance.finished, reverse=True)


def _record(entry: Entry, folder: Path) -> dict[str, Any]:
    record: Record = entry.record
    return {
        "entry": entry, "here": "", "scripted": False, "objecting": objecting(record),
        "passed": [finding for finding in record.findings if finding.status == "pass"],
        "album": album((folder / entry.path).parent, record), "eps": site_plots.eps_curve(record),
        "eot": site_plots.eot_convergence(record), "audits": audits_of(entry.row) if entry.row else (),
    }  # fmt: skip


def _own_files(out: Path) -> list[str]:
    """The files that an earlier call wrote into `out`.

    Raises:
        InputError: where `out` is a file, or holds files and no valid marker.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out needs a folder.")
    marker = out / MARKER
    if not marker.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} holds files, but no site of this program; give an empty or a new folder.")
        return []
    try:
        plain = json.loads(marker.read_bytes())
        names = plain["files"]
        if not isinstance(names, list) or not all(_inside(name) for name in names):
            raise ValueError("a file that is not inside the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{marker} does not name a site's files ({error}); empty the folder, or give another."
        ) from error
    return names


def _inside(name: object) -> bool:
    """Whether a marker may name it: a page's relative path, which climbs nowhere."""
    if not isinstance(name, str) or not name.endswith(".html") or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _mark(out: Path, names: Iterable[str]) -> None:
    write_atomically(out / MARKER, json.dumps({"files": sorted(set(names))}, indent=0).encode() + b"\n")
