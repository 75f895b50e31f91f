"""The page about the checks names every check once, with the constants of the code as it is."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from assay.protocol import PROTOCOLS
from assay.rules import HEALTH, PROFILES

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "checks.md").read_text()
PROTOCOL = PROTOCOLS["2026.1"]

CONSTANT = r"`(?:([a-z_]+)\.)?([A-Z][A-Z_]+)`"
"""A constant by name, of the row's own check or of the module before the dot."""
STATED = re.compile(rf"(?<![\w.])(\d*\.?\d+(?:e-?\d+)?)( %)? \({CONSTANT}")
"""A number with its constant behind it in brackets: `10 % (THRESHOLD)`."""


def _tables(text: str, first: str) -> list[list[str]]:
    """The rows, as cells, of all tables whose first column is headed so."""
    rows, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == first:
            inside = True
        elif inside and not set(line) <= set("|-: "):
            rows.append(cells)
    return rows


ROWS = _tables(PAGE, "check")


def _check(row: list[str]) -> str:
    return row[0].strip("`")


def _stated(text: str, own: str = "") -> list[tuple[str, str, float]]:
    """Module, constant and number of all that is stated."""
    found = []
    for number, percent, module, name in STATED.findall(text):
        found.append((module or own, name, float(number) / (100 if percent else 1)))
    return found


def _prose() -> str:
    return "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))


STATEMENTS = [each for row in ROWS for each in _stated(" ".join(row), _check(row))] + _stated(_prose())


def test_every_check_of_the_protocol_has_one_row_and_nothing_else_has() -> None:
    named = {*PROTOCOL.checks, "contradiction"}.union(*(rule.checks for rule in PROTOCOL.health.values()))
    assert Counter(_check(row) for row in ROWS) == Counter(named)


@pytest.mark.parametrize("row", ROWS, ids=_check)
def test_a_row_is_complete_and_says_how_it_objects(row: list[str]) -> None:
    assert len(row) == 5
    assert all(row)
    assert re.search(r"\b(fail|flag): ", row[2])


@pytest.mark.parametrize("row", ROWS, ids=_check)
def test_a_row_names_its_threshold_and_gives_every_constant_a_number(row: list[str]) -> None:
    module = importlib.import_module(f"assay.checks.{_check(row)}")
    text = " ".join(row)
    assert len(_stated(text)) == len(re.findall(CONSTANT, text))
    if getattr(module, "THRESHOLD", 0.0):
        assert "`THRESHOLD`" in row[2]


def test_no_constant_outside_the_tables_is_without_its_number() -> None:
    # Without a module before it, such as `ASSAY_CACHE`, it is no constant of a check.
    assert len(_stated(_prose())) == sum(bool(module) for module, _ in re.findall(CONSTANT, _prose()))


@pytest.mark.parametrize(("module", "name", "number"), STATEMENTS, ids=[f"{m}.{n}" for m, n, _ in STATEMENTS])
def test_a_stated_number_is_the_code_s(module: str, name: str, number: float) -> None:
    constant = getattr(importlib.import_module(f"assay.checks.{module}"), name)
    assert math.isclose(number, constant, rel_tol=1e-9)


def test_the_profiles_are_the_protocol_s() -> None:
    rows = {row[0]: [int(cell) for cell in row[1:]] for row in _tables(PAGE, "profile")}
    assert rows == {
        name: [rule.samples, rule.stochastic, rule.planted["steps"], rule.calibrating, rule.most_draws]
        for name, rule in ((name, HEALTH[name]) for name in PROFILES)
    }


@pytest.mark.parametrize(
    ("begins", "outcome"), [("- **Only an attack's health", "attack health"), ("- **Missed", "missed")]
)
def test_the_limits_name_what_gets_through_the_gallery(begins: str, outcome: str) -> None:
    listed = {row[0].strip("`") for row in _tables((DOCS / "gallery.md").read_text(), "defense") if row[-1] == outcome}
    paragraph = PAGE[PAGE.index(begins) :].split("\n- **")[0]
    assert {name for name in re.findall(r"`([a-z0-9-]+)`", paragraph) if "-" in name} == listed
