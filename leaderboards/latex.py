r"""A board's tables for papers: LaTeX with booktabs, to be read with `\input`.

Titles and names are other people's text. `latex` turns every character that means something to TeX into one that
doesn't, and every character that a plain LaTeX may not know into its math symbol or its code point.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

from assay.leaderboards.rows import Page, Row, Table
from assay.leaderboards.text import compact, one_line, percent

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"{\char34}", "`": r"\textasciigrave{}",
    # At the start of a row these would be arguments of the line break above it.
    "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip
_MATH = {
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon", "λ": r"\lambda", "μ": r"\mu",
    "σ": r"\sigma", "τ": r"\tau", "φ": r"\varphi", "ℓ": r"\ell", "∞": r"\infty", "×": r"\times", "≤": r"\le",
    "≥": r"\ge", "±": r"\pm", "≡": r"\equiv", "−": "-", "·": r"\cdot",
}  # fmt: skip
_TEXT = {
    "–": r"\textendash{}", "—": r"\textemdash{}", "…": r"\ldots{}", "’": r"\textquoteright{}",
    "‘": r"\textquoteleft{}", "“": r"\textquotedblleft{}", "”": r"\textquotedblright{}",
}  # fmt: skip
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
_NOTHING = "--"
_WIDE = 42
"""Characters of a defense's title on one line: with these, a table in footnotesize fits the width of an A4 page."""


def latex(text: object) -> str:
    """Text that LaTeX prints as it is, in text mode, whatever stands in it."""
    # Two of these in a row would be one other sign.
    return re.sub(r"([-,'])(?=\1)", r"\1{}", "".join(map(_sign, one_line(text))))


def _sign(char: str) -> str:
    if char in _SPECIAL:
        return _SPECIAL[char]
    if " " <= char <= "~":
        return char
    if char in _TEXT:
        return _TEXT[char]
    if char in _MATH:
        return rf"\ensuremath{{{_MATH[char]}}}"
    if char in _SUPERSCRIPTS:
        return rf"\textsuperscript{{{_SUPERSCRIPTS.index(char)}}}"
    apart = unicodedata.normalize("NFD", char)
    if len(apart) == 2 and apart[1] in _ACCENTS and apart[0].isascii() and apart[0].isalpha():
        return rf"\{_ACCENTS[apart[1]]}{{{apart[0]}}}"
    return rf"\texttt{{U+{ord(char):04X}}}"


def board_latex(page: Page) -> str:
    """The rows of the standard profile, ranked and known broken; a comment where there are none."""
    board = page.board
    head = [
        rf"% {latex(board.name)}: {latex(board.dataset)}, {latex(board.norm)} {latex(board.eps)}, {len(board.ids)} "
        rf"samples, protocol {latex(board.protocol)}, digest {page.digest[:12]}.",
        r"% Needs \usepackage{booktabs}. Accuracies in percent; 95 % intervals in brackets; = marks tied ranks.",
    ]
    table = _standard(page)
    groups = [[_line(row) for row in table.group(name)] for name in ("ranked", "known broken")] if table else []
    m = board.draws
    columns = ("", "defense", "clean", "robust", f"worst of {m}", f"majority of {m}", "model calls")
    if any(row.audits for row in (table.rows if table else ())):
        head.append("% A dagger marks a robust accuracy that an audit lowered; without interval.")
    return _tabular(head, "rlrlrrr", columns, groups)


def certified_latex(page: Page) -> str:
    """Certified accuracy of the ranked rows that certify, at the board's radii; a comment where there are none."""
    table = _standard(page)
    head = [
        rf"% {latex(page.board.name)}, certified within \ell_2 radii; protocol {latex(page.board.protocol)}, "
        rf"digest {page.digest[:12]}.",
        r"% Needs \usepackage{booktabs}. Percent of all samples; after the slash, what attacks inside it left.",
    ]
    radii = page.board.radii
    rows = [row for row in table.group("ranked") if row.record.certification is not None] if table else []
    columns = ("defense", *(rf"$r = {radius}$" for radius in radii), "average radius")
    return _tabular(head, "l" + "r" * (len(radii) + 1), columns, [[_certified(row, radii) for row in rows]])


def _standard(page: Page) -> Table | None:
    return next((table for table in page.tables if table.profile == "standard"), None)


def _line(row: Row) -> list[str]:
    record, results = row.record, row.record.results
    rank = "" if row.rank is None else f"{'=' if row.tied else ''}{row.rank}"
    cells = [rank, _title(record.defense.title)]
    if results is None or row.known is None:
        cells += [_NOTHING] * 4
    else:
        interval = rf" [{percent(results.robust.low)}, {percent(results.robust.high)}]"
        robust = percent(row.known) + (r"\textsuperscript{\dag}" if row.audits else interval)
        rules = results.rules
        cells += [percent(results.clean.value), robust, percent(rules.worst_of_n.value), percent(rules.majority.value)]
    return [*cells, compact(record.cost.forward + record.cost.backward).replace(" ", "~")]


def _title(title: str) -> str:
    """A title, on several lines where one would be too wide; a word that is longer stays whole."""
    text = one_line(title)
    lines = textwrap.wrap(text, _WIDE, break_long_words=False, break_on_hyphens=False) or [""]
    shown = r" \\ ".join(map(latex, lines))
    return shown if len(lines) == 1 else rf"\begin{{tabular}}[t]{{@{{}}l@{{}}}}{shown}\end{{tabular}}"


def _certified(row: Row, radii: Sequence[str]) -> list[str]:
    found = row.record.certification
    assert found is not None
    cells = [_title(row.record.defense.title)]
    for radius in radii:
        share = found.radii[radius]
        left = f" / {percent(share.attacked.value)}" if share.attacked is not None else ""
        cells.append(percent(share.value) + left)
    return [*cells, f"{found.average_radius:.3f}"]


def _tabular(head: Sequence[str], align: str, columns: Sequence[str], groups: Iterable[Sequence[Sequence[str]]]) -> str:
    filled = [group for group in groups if group]
    if not filled:
        return "\n".join([*head, "% No rows yet."]) + "\n"
    lines = [*head, rf"\begin{{tabular}}{{{align}}}", r"\toprule", " & ".join(columns) + r" \\"]
    for group in filled:
        lines += [r"\midrule", *(" & ".join(cells) + r" \\" for cells in group)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"
