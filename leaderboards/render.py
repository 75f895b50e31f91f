"""Tables from records: HTML, Markdown and CSV, byte for byte the same from the same files.

Cards, findings and names are other people's text. HTML is escaped by jinja2's autoescape,
Markdown by `markdown`, which every expression of those templates passes through; CSV cells can't
start a formula.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from assay.board import board_names, load_board
from assay.errors import InputError
from assay.leaderboards.rows import LEVEL, Page, Row, collect, refuse_strays
from assay.protocol import FAMILIES, Family, Verdict
from assay.record import Record, write_atomically
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
BAR = 120
"""The width, in pixels, of the bar from 0 to 100 %."""


class Plain(str):
    """Text that is Markdown already and isn't escaped again."""


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


# Text


def one_line(text: object) -> str:
    """Text on one line, without control characters or those that turn the reading direction."""
    collapsed = re.sub(r"\s+", " ", str(text))
    return "".join(c for c in collapsed if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def markdown(text: object) -> Plain:
    """Text that GitHub Markdown shows as it is: no markup, link, mention, formula or table cell comes of it."""
    if isinstance(text, Plain):
        return text
    escaped = re.sub(r"([\\`*_\[\]<>|~&@#$])", r"\\\1", one_line(text))
    # These two are how a bare address becomes a link.
    return Plain(re.sub(r"www\.", r"www\\.", escaped.replace("://", r"\://"), flags=re.IGNORECASE))


def breakable(name: str) -> Markup:
    """A name in HTML that a line may break after each underscore."""
    return escape(one_line(name)).replace("_", Markup("_<wbr>"))


def web_address(url: str) -> str:
    """`url` where it is an http or https address with a host, otherwise empty."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return url if parts.scheme in ("http", "https") and parts.netloc else ""


def markdown_title(record: Record) -> Plain:
    """The defense's title, linked to its source where it has an address."""
    card = record.defense.card
    title = markdown(record.defense.title)
    url = web_address(card.url)
    # Percent-encoded, an address holds nothing that ends the link or the cell; `&` would begin an entity.
    target = quote(url, safe=":/?#@!&*+,;=%").replace("&", "&amp;")
    return Plain(f"[{title}]({target})") if url else title


def csv_text(text: object) -> str:
    """Text that a spreadsheet doesn't take for a formula."""
    line = one_line(text).strip()
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


# Numbers


def percent(value: float) -> str:
    """An accuracy in [0, 1] as percent with one decimal."""
    return f"{100 * value:.1f}"


def compact(count: int) -> str:
    """A count with three figures: 950, 12.3 k, 4.56 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,950 would round to 1000.0 k.
        if count >= size * 0.9995:
            scaled = count / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return str(count)


def pixels(value: float) -> str:
    """An accuracy in [0, 1] as a position on the bar."""
    return f"{BAR * value:.1f}"


def flags(record: Record) -> list[str]:
    """The names of the checks that objected without failing the record, each once, in order."""
    return list(dict.fromkeys(finding.check for finding in record.findings if finding.status == "flag"))


def minutes(record: Record) -> str:
    """The run's wall time in minutes."""
    return f"{record.cost.seconds / 60:.1f}"


# Formats


def board_csv(page: Page) -> str:
    """One row a record, accuracies in [0, 1]; those that no table shows come last, with the reason."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*_COLUMNS, *FAMILIES, *_LAST], lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(_csv_rows(page))
    return buffer.getvalue()


_ACCURACIES = ("clean", "robust", "robust_low", "robust_high", "worst_of_n", "majority")
_COLUMNS = ("profile", "group", "rank", "defense", "title", "verdict", "flags", "n", *_ACCURACIES)
_LAST = ("forward", "backward", "seconds", "protocol_digest", "record", "why")


def _csv_rows(page: Page) -> Iterator[dict[str, Any]]:
    for table in page.tables:
        for row in table.rows:
            yield {
                **_csv_cells(row.record, row.path, row.why),
                "group": row.group,
                "rank": "" if row.rank is None else row.rank,
                **{family: f"{left.value:.6f}" for family, left in row.left.items()},
            }
    for other in page.incomparable:
        yield {**_csv_cells(other.record, other.path, other.reasons), "group": "not comparable"}


def _csv_cells(record: Record, path: str, why: tuple[str, ...]) -> dict[str, Any]:
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
    return cells


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, **options,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "compact": compact, "minutes": minutes, "flags": flags, "figure": "{:.4g}".format,
        "web_address": web_address, "relative": _relative, "short": lambda digest: digest[:12],
        "sentence": lambda text: text[:1].upper() + text[1:],
    }  # fmt: skip
    environment.globals |= {
        "FAMILY_MEANING": FAMILY_MEANING, "VERDICT_MEANING": VERDICT_MEANING, "MARK": MARK, "MISSING": MISSING,
        "NORM_SIGN": NORM_SIGN, "BAR": BAR, "level": f"{100 * LEVEL:.0f} %", "stochastic": _stochastic,
        "findings": _findings, "ranked": _standard,
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
