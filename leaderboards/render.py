"""Tables from records: Markdown, CSV and LaTeX, byte for byte the same from the same files.

Cards, findings, claims and names are other people's text. Markdown is escaped by `markdown`, which every expression of
those templates passes through; CSV cells can't start a formula; LaTeX is escaped sign by sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from assay.boards import board_names, load_board
from assay.errors import InputError
from assay.leaderboards.claims import NORM_SIGN, Claim, Number, claimed_text, load_claims
from assay.leaderboards.latex import board_latex, certified_latex
from assay.leaderboards.rows import LEVEL, Page, Row, collect, refuse_strays
from assay.leaderboards.spreadsheet import board_csv
from assay.leaderboards.text import (
    Plain,
    compact,
    flags,
    markdown,
    markdown_link,
    markdown_title,
    minutes,
    percent,
    refuted,
    thousands,
)
from assay.protocol import Family, Verdict
from assay.record import Record, write_atomically
from assay.results import knobs_text

TABLES = "tables"
SUFFIXES = (".csv", ".html", ".md", ".tex")
"""Files in that folder that are tables: those that aren't rendered any more are removed."""

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
    "flagged": "every mandatory attack ran, but a check objected; the findings stand below the table",
    "failed": "the defense broke a rule of the protocol; not ranked",
    "incomplete": "a mandatory part is missing; not ranked",
}
MARK: dict[Verdict, str] = {"verified": "✓", "flagged": "⚑", "failed": "✕", "incomplete": "…"}
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
    """Path -> content of every table: a pure function of the boards, records, audits and claims in `folder`."""
    names = board_names(folder)
    refuse_strays(folder)
    claims = load_claims(folder)
    pages = [collect(folder, load_board(name, folder), claims) for name in names]
    environment = _environment()
    texts = {"index.md": environment.get_template("index.md.j2").render(pages=pages, strays=_strays(pages, claims))}
    board = environment.get_template("board.md.j2")
    for page in pages:
        name = page.board.name
        rendered = {
            f"{name}.md": board.render(page=page, board=page.board, m=page.board.draws),
            f"{name}.csv": board_csv(page),
            f"{name}.tex": board_latex(page),
        }
        if page.board.radii:
            rendered[f"{name}-certified.tex"] = certified_latex(page)
        if taken := sorted(set(rendered) & set(texts)):
            raise InputError(f"a board can't be called {name!r}: {TABLES}/{taken[0]} is another table. Rename it.")
        texts |= rendered
    return {folder / TABLES / name: texts[name].encode() for name in sorted(texts)}


def _superfluous(folder: Path, rendered: dict[Path, bytes]) -> list[Path]:
    found = (folder / TABLES).iterdir() if (folder / TABLES).is_dir() else ()
    return sorted(path for path in found if path.suffix in SUFFIXES and path not in rendered)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False, finalize=markdown,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "compact": compact, "minutes": minutes, "flags": flags, "figure": "{:.4g}".format,
        "relative": _relative, "short": lambda digest: digest[:12], "knobs": knobs_text, "thousands": thousands,
        "sentence": lambda text: text[:1].upper() + text[1:], "refuted": refuted, "title": markdown_title,
        "link": markdown_link, "plain": Plain, "numbers": _numbers,
    }  # fmt: skip
    environment.globals |= {
        "FAMILY_MEANING": FAMILY_MEANING, "VERDICT_MEANING": VERDICT_MEANING, "MARK": MARK, "MISSING": MISSING,
        "NORM_SIGN": NORM_SIGN, "level": f"{100 * LEVEL:.0f} %", "stochastic": _stochastic,
        "findings": _findings, "ranked": _standard, "claimed": claimed_text, "audited": _audited,
        "measured": _measured, "readings": _readings,
    }  # fmt: skip
    return environment


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


def _audited(page: Page) -> list[Row]:
    """The rows that somebody audited."""
    return [row for table in page.tables for row in table.rows if row.audits]


def _strays(pages: Sequence[Page], claims: Sequence[Claim]) -> list[Claim]:
    """Claims in a setting that no board has."""
    return [claim for claim in claims if not any(claim.belongs_to(page.board) for page in pages)]


def _numbers(numbers: Sequence[Number]) -> Plain:
    """Reported numbers in a Markdown cell, each with how it was found and by whom."""
    told = [
        f"{markdown(number.percent)}{f' ({markdown(number.how)})' if number.how else ''}, "
        f"{markdown_link(number.source.title, number.source.url)}"
        for number in numbers
    ]
    return Plain("; ".join(told) or MISSING)


def _measured(row: Row, claim: Claim) -> str:
    """What a row says of what was claimed, in percent."""
    record = row.record
    if claim.what == "certified":
        share = record.certification.radii.get(claim.eps) if record.certification is not None else None
        return MISSING if share is None else percent(share.value)
    if record.results is None or row.known is None:
        return MISSING
    return percent(row.known if claim.what == "robust" else record.results.clean.value)


def _readings(page: Page) -> dict[str, list[str]]:
    """How later numbers were read, and which, with what must be known of them."""
    found: dict[str, list[str]] = {}
    for claim, _ in page.falls:
        for number in claim.fell_to:
            note = f" [{number.note}]" if number.note else ""
            found.setdefault(number.read, []).append(f"{claim.title} {number.percent}{note}")
    return found
