"""Tables from records: HTML, Markdown and CSV, byte for byte the same from the same files.

Cards, findings and names are other people's text. HTML is escaped by jinja2's autoescape,
Markdown by `markdown`, which every expression of those templates passes through; CSV cells can't
start a formula.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from assay.boards import board_names, load_board
from assay.errors import InputError
from assay.leaderboards import curves
from assay.leaderboards.rows import LEVEL, Page, Row, collect, refuse_strays
from assay.leaderboards.spreadsheet import board_csv
from assay.leaderboards.text import (
    BAR,
    Plain,
    breakable,
    compact,
    flags,
    markdown,
    markdown_title,
    minutes,
    one_line,
    percent,
    pixels,
    refuted,
    thousands,
    web_address,
)
from assay.protocol import Family, Verdict
from assay.record import Record, write_atomically
from assay.results import knobs_text
from assay.threat import Norm

TABLES = "tables"
SUFFIXES = (".csv", ".html", ".md")

FAMILY_MEANING: dict[Family, str] = {
    "noise": "uniformly random points of the ball: what any attack must beat",
    "transfer": "adversarial examples made on the board's undefended network, or on a part of the defense alone",
    "pgd": "projected gradient ascent from a random start",
    "apgd": "APGD, projected ascent that sets its own step size, on the cross-entropy and on targeted margins",
    "autoattack": "the authors' own AutoAttack, standard version",
    "bpda": "gradients with the identity as the backward pass of what has none",
    "chain": "exact gradients through every step of an iterative defense",
    "surrogate": "gradients through the same process with fewer steps",
    "step-losses": "a loss at every step that pulls the process away, beside the classification loss (DiffAttack)",
    "diffhammer": "gradients of the draws that can be made to fail, and not of those that can't (DiffHammer)",
    "black-box": "Square, which sees answers only",
}
VERDICT_MEANING: dict[Verdict, str] = {
    "verified": "every mandatory attack ran and no check objected",
    "flagged": "ranked, but a check objected; the findings stand below the table",
    "failed": "the defense broke a rule of the protocol; not ranked",
    "incomplete": "a mandatory part is missing; not ranked",
}
MARK: dict[Verdict, str] = {"verified": "✓", "flagged": "⚑", "failed": "✕", "incomplete": "…"}
NORM_SIGN: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2"}
MISSING = "–"


def write_tables(folder: Path) -> list[Path]:
    """Renders every board's tables into `folder/tables`; removes tables of boards that are gone.

    Args:
        folder: a leaderboards folder, with `boards/` and `records/`.

    Returns:
        What was written, sorted.

    Raises:
        InputError: for an invalid board or record, or a record without a board.
        IntegrityError: for a record, or a file of it, that was changed; it is named.
    """
    rendered = render(folder)
    (folder / TABLES).mkdir(exist_ok=True)
    for path, content in rendered.items():
        write_atomically(path, content)
    for path in _superfluous(folder, rendered):
        path.unlink()
    return sorted(rendered)


def check_tables(folder: Path) -> list[Path]:
    """The tables that differ from what `write_tables` would write, are missing, or shouldn't be there; sorted.

    Raises:
        InputError, IntegrityError: as `write_tables`.
    """
    rendered = render(folder)
    stale = [path for path, content in rendered.items() if not path.is_file() or path.read_bytes() != content]
    return sorted(stale + _superfluous(folder, rendered))


def render(folder: Path) -> dict[Path, bytes]:
    """Path -> content of every table: a pure function of the boards and records in `folder`."""
    names = board_names(folder)
    if "index" in names:
        raise InputError("a board can't be called 'index': its tables would take the index's file names.")
    refuse_strays(folder)
    pages = [collect(folder, load_board(name, folder)) for name in names]
    html, markdown_ = _html_environment(), _markdown_environment()
    texts: dict[str, str] = {}
    for page in pages:
        context = {"page": page, "board": page.board, "m": page.board.draws}
        texts[f"{page.board.name}.html"] = html.get_template("board.html.j2").render(context)
        texts[f"{page.board.name}.md"] = markdown_.get_template("board.md.j2").render(context)
        texts[f"{page.board.name}.csv"] = board_csv(page)
    texts["index.html"] = html.get_template("index.html.j2").render(pages=pages)
    texts["index.md"] = markdown_.get_template("index.md.j2").render(pages=pages)
    return {folder / TABLES / name: texts[name].encode() for name in sorted(texts)}


def _superfluous(folder: Path, rendered: dict[Path, bytes]) -> list[Path]:
    found = (folder / TABLES).iterdir() if (folder / TABLES).is_dir() else ()
    return sorted(path for path in found if path.suffix in SUFFIXES and path not in rendered)


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, **options,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "compact": compact, "minutes": minutes, "flags": flags, "figure": "{:.4g}".format,
        "web_address": web_address, "relative": _relative, "short": lambda digest: digest[:12],
        "sentence": lambda text: text[:1].upper() + text[1:], "knobs": knobs_text, "thousands": thousands,
        "refuted": refuted,
    }  # fmt: skip
    environment.globals |= {
        "FAMILY_MEANING": FAMILY_MEANING, "VERDICT_MEANING": VERDICT_MEANING, "MARK": MARK, "MISSING": MISSING,
        "NORM_SIGN": NORM_SIGN, "BAR": BAR, "level": f"{100 * LEVEL:.0f} %", "stochastic": _stochastic,
        "findings": _findings, "ranked": _standard, "curves": curves,
    }  # fmt: skip
    return environment


def _html_environment() -> Environment:
    environment = _environment(autoescape=True, finalize=_shown_text)
    style = environment.get_template("style.css.j2").render()
    # The page's policy allows this one style sheet and nothing else.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment.globals |= {"style": Markup(style), "style_digest": digest}
    environment.filters |= {"pixels": pixels, "breakable": breakable}
    return environment


def _markdown_environment() -> Environment:
    environment = _environment(autoescape=False, finalize=markdown)
    environment.filters |= {"title": markdown_title, "plain": Plain}
    return environment


def _shown_text(value: Any) -> Any:
    """Other people's text on one line; markup, and what isn't text, as it is."""
    return one_line(value) if type(value) is str else value


def _relative(path: str) -> Plain:
    """The address, seen from a page in `tables/`, of a file in the leaderboards folder."""
    return Plain("../" + quote(path))


def _stochastic(record: Record) -> bool:
    return record.defense.card.traits.stochastic


def _findings(page: Page) -> list[tuple[Row, list[Any]]]:
    """Each row of a page with those of its findings that did not pass."""
    found = [(row, [f for f in row.record.findings if f.status != "pass"]) for t in page.tables for row in t.rows]
    return [(row, findings) for row, findings in found if findings]


def _standard(page: Page) -> list[Row]:
    """The ranked rows of the main table, best first."""
    return [row for table in page.tables if table.profile == "standard" for row in table.group("ranked")]
