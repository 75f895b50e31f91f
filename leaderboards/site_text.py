"""How the site's templates show text, numbers and addresses, and the environment that they are rendered in."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from markupsafe import Markup, escape

from assay.audits import Audit
from assay.card import TRAITS
from assay.leaderboards import curves
from assay.leaderboards.claims import NORM_SIGN, Claim
from assay.leaderboards.render import FAMILY_MEANING, MARK
from assay.leaderboards.rows import LEVEL, Row
from assay.leaderboards.text import compact, flags, minutes, one_line, percent, refuted, thousands, web_address
from assay.protocol import Verdict
from assay.results import knobs_text

BAR = 120
"""The width, in pixels, of the bar from 0 to 100 %."""
MISSING = Markup('<span class="muted" aria-label="missing">–</span>')
VERDICT_MEANING: dict[Verdict, str] = {
    "verified": "every mandatory attack ran and no check objected",
    "flagged": "every mandatory attack ran, but a check objected; what it found is told in words",
    "failed": "the defense broke a rule of the protocol; not ranked",
    "incomplete": "a mandatory part is missing; not ranked",
}
STATUS_CLASS = {"pass": "passed", "flag": "flagged", "fail": "failed"}
GROUP_HEADING = {"known broken": "Known broken (they calibrate the board)", "not ranked": "Not ranked"}
TRAIT_MEANING = {
    "stochastic": "the answer depends on noise",
    "purifies": "the image is changed before a classifier sees it",
    "iterative": "a process of several steps stands between image and answer",
    "inner_gradient": "a forward pass computes gradients of its own",
    "non_differentiable": "somewhere on the way there is no useful gradient",
    "certifies": "it can certify a radius",
}


class _Code(CodeGenerator):
    """Jinja2's code, with less to do for each of a site's millions of short texts.

    What `_shown` returns is not escaped again: nearly all of it has nothing to escape, which one match tells. And an
    attribute is Python's own, never an item of that name: a misspelt one raises AttributeError.
    """

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        assert finalize.src is not None
        self.write(finalize.src)

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write(")")

    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:  # noqa: N802 (the name that Jinja2 looks for)
        self.visit(node.node, frame)
        self.write(f".{node.attr}")


class _Environment(Environment):
    code_generator_class = _Code


def environment() -> Environment:
    """The site's templates, compiled once; the style sheet and the script with their digests."""
    made = _Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=True, finalize=_shown, auto_reload=False,
    )  # fmt: skip
    for name, file in (("style", "site.css.j2"), ("script", "site.js.j2")):
        content = _packed(made.get_template(file).render()) if name == "style" else made.get_template(file).render()
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        made.globals |= {name: Markup(content), f"{name}_digest": digest}
    made.filters |= {
        "percent": percent, "compact": compact, "minutes": minutes, "flags": flags, "figure": "{:.4g}".format,
        "web_address": web_address, "link": _link, "short": lambda digest: digest[:12], "pixels": _pixels,
        "sentence": lambda text: text[:1].upper() + text[1:], "knobs": knobs_text, "thousands": thousands,
        "refuted": refuted, "breakable": _breakable, "board_address": board_address, "known": best_known,
        "claims": claims_of, "claimed": _claimed, "claimed_how": _claimed_how,
    }  # fmt: skip
    made.globals |= {
        "FAMILY_MEANING": FAMILY_MEANING, "VERDICT_MEANING": VERDICT_MEANING, "MARK": MARK, "MISSING_CELL": MISSING,
        "NORM_SIGN": NORM_SIGN, "BAR": BAR, "level": f"{100 * LEVEL:.0f} %", "curves": curves, "TRAITS": TRAITS,
        "STATUS_CLASS": STATUS_CLASS, "GROUP_HEADING": GROUP_HEADING, "TRAIT_MEANING": TRAIT_MEANING,
    }  # fmt: skip
    return made


def _packed(style: str) -> str:
    """A style sheet without line ends and indents: every page carries it."""
    return re.sub(r"\s*\n\s*", " ", style).strip()


def board_address(name: str, part: int = 1) -> str:
    """The address in the site of a part of a board's page; `+` is in no board's name."""
    return f"boards/{name}.html" if part == 1 else f"boards/{name}+{part}.html"


def claims_of(row: Row) -> Sequence[Claim]:
    """What was claimed elsewhere of the row's system, by its authors."""
    return tuple(claim for claim in row.claims if claim.claimed)


def audits_of(row: Row) -> Sequence[Audit]:
    """The audits of the row's record, in the order in which they were made."""
    return row.audits


def best_known(row: Row) -> float:
    """The row's best known robust accuracy in [0, 1], after audits; NaN where nothing was measured."""
    return math.nan if row.known is None else row.known


def _claimed(claim: Claim) -> str:
    return ", ".join(number.percent for number in claim.claimed)


def _claimed_how(claim: Claim) -> str:
    return f"{claim.setting}{'; best of several' if claim.envelope else ''}"


_HARMLESS = re.compile(r"[ !#-%(-;=?-~]*").fullmatch
"""Matches printable ASCII that is the same in HTML."""


def _shown(value: Any) -> str:
    """Any value in HTML: other people's text on one line and escaped, markup as it is."""
    if type(value) is not str:
        if hasattr(value, "__html__"):
            return escape(value)
        value = str(value)
    return value if _HARMLESS(value) else escape(one_line(value))


def _link(address: str, root: str) -> str:
    """An address of the site, seen from a page whose way to the site's top is `root`."""
    return root + quote(address)


def _pixels(value: float) -> str:
    """An accuracy in [0, 1] as a position on the bar."""
    return f"{BAR * value:.1f}"


@lru_cache(maxsize=4096)
def _breakable(name: str) -> Markup:
    """A name that a line may break after each underscore."""
    return escape(one_line(name)).replace("_", Markup("_<wbr>"))
