"""What came of holding a record against a baseline: as data, as text, and as a JUnit report. No torch."""

from __future__ import annotations

import re
from typing import Any, Literal
from xml.etree import ElementTree

from pydantic import Field

from assay.card import Strict
from assay.power import POWER

NAMES: dict[What, str] = {"clean": "clean accuracy", "robust": "robust accuracy", "radius": "average certified radius"}
"""What each comparison is called."""
_TESTS = {"mcnemar": "McNemar, exact", "permutation": "paired permutation"}
_SHOWN = 20
"""Samples named in a text; all of them are in the JSON."""
_UNPRINTABLE = re.compile("[^\\t\\n\\x20-\\x7e\\xa0-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
"""Neither XML nor a terminal should be given these."""

What = Literal["clean", "robust", "radius"]


class Change(Strict):
    """A sample whose score differs: accuracies in [0, 1], radii in pixel units.

    Attributes:
        attack: the first of those that left the candidate's sample least; empty for clean scores and radii.
    """

    id: int
    before: float
    after: float
    attack: str = ""


class Comparison(Strict):
    """One number of the two records.

    Attributes:
        what: clean or robust accuracy under the ranking rule, or the average certified radius.
        before, after: means over the compared samples.
        p: one-sided, that so great a drop is chance.
        level: what p is held against: alpha shared out evenly among the comparisons of one call.
        detectable: the smallest drop that is found with probability `POWER`; None where there is none.
        assumes: what that is computed under.
        fell, rose: the samples behind the drop, the greatest change first.
    """

    what: What
    test: Literal["mcnemar", "permutation"]
    before: float
    after: float
    p: float
    level: float
    detectable: float | None
    assumes: str
    fell: tuple[Change, ...]
    rose: tuple[Change, ...]

    @property
    def drop(self) -> float:
        """How much was lost; negative where something was gained."""
        return self.before - self.after

    @property
    def significant(self) -> bool:
        """Whether it fell, and further than chance explains."""
        return self.drop > 0 and self.p <= self.level


class Side(Strict):
    """One of the two records."""

    name: str
    digest: str
    verdict: str
    seed: int


class Regression(Strict):
    """What came of a comparison.

    Attributes:
        ids: the samples compared, of the `size` that the baseline was measured on.
        changed: what else differs between the two records, and may be behind a drop.
        failed: what failed in the candidate and didn't in the baseline.
    """

    schema_: Literal["assay-regression/1"] = Field(default="assay-regression/1", alias="schema")
    baseline: Side
    candidate: Side
    board: str
    profile: str
    protocol: str
    ids: tuple[int, ...]
    size: int
    alpha: float
    changed: tuple[str, ...]
    failed: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        """No significant drop, and nothing failed that hadn't."""
        return not self.failed and not any(found.significant for found in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, with what follows from it."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        for data, found in zip(plain["comparisons"], self.comparisons, strict=True):
            data |= {"drop": found.drop, "significant": found.significant}
        return {**plain, "n": len(self.ids), "ok": self.ok}

    def text(self) -> str:
        """The report as people read it, without control characters from anybody's names."""
        lines = [
            f"{self.candidate.name} against {self.baseline.name} ({self.baseline.digest[:12]}) on {self.board}, "
            f"{self.profile}: {len(self.ids)} of the baseline's {self.size} samples"
        ]
        for found in self.comparisons:
            lines += [f"  {line}" for line in _lines(found)]
        if self.changed:
            lines.append("  changed meanwhile: " + "; ".join(self.changed))
        lines += [f"FAILED: {reason}" for reason in self.failed]
        fallen = [found for found in self.comparisons if found.significant]
        lines += [
            f"REGRESSED: {NAMES[found.what]} fell by {_size(found, found.drop)}, "
            f"p = {found.p:.2g} <= {found.level:.2g}" for found in fallen
        ]  # fmt: skip
        if self.ok:
            lines.append(f"ok: no drop beyond chance at alpha = {self.alpha:g}")
        return printable("\n".join(lines))

    def junit(self) -> bytes:
        """A JUnit report, a test case for each comparison, as continuous integration reads it."""
        cases = [(NAMES[found.what], found.significant, "\n".join(_lines(found))) for found in self.comparisons]
        cases += [("verdict", bool(self.failed), "; ".join(self.failed))]
        bad = sum(wrong for _, wrong, _ in cases)
        suite = ElementTree.Element("testsuite", name=printable(f"assay regress {self.board}"), errors="0",
                                    tests=str(len(cases)), failures=str(bad), skipped="0")  # fmt: skip
        for name, wrong, text in cases:
            where = printable(f"{self.board}.{self.profile}.{self.candidate.name}")
            case = ElementTree.SubElement(suite, "testcase", classname=where, name=name)
            if wrong:
                first = printable(text.partition("\n")[0])
                ElementTree.SubElement(case, "failure", type="regression", message=first).text = printable(text)
        ElementTree.SubElement(suite, "system-out").text = self.text()
        root = ElementTree.Element("testsuites")
        root.append(suite)
        content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
        return content


def printable(text: str) -> str:
    """The text with a replacement character for each control character: names in records are anybody's."""
    return _UNPRINTABLE.sub("\ufffd", text)


def _size(found: Comparison, value: float) -> str:
    """A radius as it is, an accuracy in percentage points."""
    return f"{value:.4f}" if found.what == "radius" else f"{100 * value:.1f} points"


def _lines(found: Comparison) -> list[str]:
    before, after = (
        f"{value:.4f}" if found.what == "radius" else f"{100 * value:.1f} %" for value in (found.before, found.after)
    )
    seen = "no drop could be told from chance" if found.detectable is None else (
        f"a drop of {_size(found, found.detectable)} is found with probability {100 * POWER:.0f} %"
    )  # fmt: skip
    lines = [
        f"{NAMES[found.what]} {before} -> {after}: {_samples(found.fell)} fell, {len(found.rose)} rose; "
        f"p = {found.p:.2g} ({_TESTS[found.test]}), level {found.level:.2g}",
        f"  {seen}, {found.assumes}",
    ]
    for word, changes in (("fell", found.fell), ("rose", found.rose)):
        if changes:
            more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
            lines.append(f"  {word}: " + ", ".join(_sample(found, change) for change in changes[:_SHOWN]) + more)
    return lines


def _samples(changes: tuple[Change, ...]) -> str:
    return f"{len(changes)} sample{'' if len(changes) == 1 else 's'}"


def _sample(found: Comparison, change: Change) -> str:
    """`12 (apgd-t)`, or `12 (0.95 -> 0.10, apgd-t)` where a score is not right or wrong."""
    told = [change.attack] if change.attack else []
    if found.test == "permutation":
        told.insert(0, f"{change.before:.2f} -> {change.after:.2f}")
    return f"{change.id} ({', '.join(told)})" if told else str(change.id)
