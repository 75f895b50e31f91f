"""Certified beside attacked accuracy in the tables: cells, curves, and what contradicts itself."""

from __future__ import annotations

import csv
import io
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from assay.boards import load_board
from assay.errors import IntegrityError
from assay.leaderboards import curves
from assay.leaderboards.render import render
from assay.leaderboards.rows import Page, collect
from assay.leaderboards.text import refuted
from assay.protocol import PROTOCOLS
from assay.results import knobs_text

zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("record_zoo.py"))))
RADII, write, certify, smoothed = zoo.RADII, zoo.write, zoo.certify, zoo.smoothed
FOUND = smoothed(0.5, 0.8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A leaderboards folder with the board `balls`, which has radii, and no records."""
    monkeypatch.setitem(PROTOCOLS, "test.1", zoo.PROTOCOL)  # type: ignore[misc]
    zoo.write_board(tmp_path, "balls", radii=RADII)
    return tmp_path


def page_of(folder: Path) -> Page:
    return collect(folder, load_board("balls", folder))


def texts_of(folder: Path) -> dict[str, str]:
    return {path.name: content.decode() for path, content in render(folder).items()}


def test_every_format_says_the_same_of_a_radius(folder: Path) -> None:
    write(folder, "fair", 0.7, on="balls", found=FOUND)
    write(folder, "trained", 0.8, on="balls")
    texts, share = texts_of(folder), certify(FOUND).radii["1/2"]
    assert (share.value, share.attacked.value) == (0.425, 0.55)
    assert " & 42.5 / 55.0 & " in texts["balls-certified.tex"]
    assert " | 42.5 ≤ 55.0 | " in texts["balls.md"]
    assert re.search(r"\| Trained \|.*\) \| – \| – \| – \| – \| 100\.0 \|", texts["balls.md"])
    fair, trained = sorted(csv.DictReader(io.StringIO(texts["balls.csv"])), key=lambda row: row["defense"])
    assert (fair["certified@1/2"], fair["attacked@1/2"]) == ("0.425000", "0.550000")
    assert (float(fair["certified_low@1/2"]), float(fair["certified_high@1/2"])) == pytest.approx(
        (share.low, share.high), abs=1e-6
    )
    assert fair["confident@1/2"] == "15"
    assert float(fair["average_radius"]) == pytest.approx(sum(max(0, r) for r in FOUND) / 40, abs=1e-6)
    assert [name for name in trained if "@" in name and trained[name]] == []


def test_boards_without_radii_have_no_certified_columns(folder: Path) -> None:
    zoo.write_board(folder)
    write(folder, "trained", 0.8)
    texts = texts_of(folder)
    assert "board-certified.tex" not in texts
    for name in ("board.md", "board.csv", "board.tex"):
        assert not re.search("certified (at|accuracy|model)|certified@|average.radius", texts[name], re.IGNORECASE)


def test_where_no_row_certifies_only_the_csv_has_the_columns(folder: Path) -> None:
    write(folder, "trained", 0.8, on="balls")
    texts = texts_of(folder)
    assert page_of(folder).tables[0].radii == ()
    assert "Certified" not in texts["balls.md"]
    assert "% No rows yet." in texts["balls-certified.tex"]
    assert "certified@1/4" in texts["balls.csv"]


def test_what_was_not_attacked_has_a_certified_share_alone(folder: Path) -> None:
    plain = certify(FOUND)
    alone = {radius: share.model_copy(update={"attacked": None}) for radius, share in plain.radii.items()}
    write(folder, "alone", 0, on="balls", measured=False, verdict="incomplete",
          certification=plain.model_copy(update={"radii": alone, "attack": ""}))  # fmt: skip
    row = page_of(folder).tables[0].rows[0]
    assert row.why == ("the certified half alone, without any attack",)
    texts = texts_of(folder)
    assert " | 42.5 | " in texts["balls.md"]


def test_a_missing_certification_is_missing_certify(folder: Path) -> None:
    card = {"traits": zoo.CERTIFIES, "certificate": "smoothing"}
    write(folder, "unproven", 0.8, on="balls", **card)
    write(folder, "unasked", 0.7, on="balls", missing={"certify": "not asked for (--attack)"}, **card)
    zoo.write_board(folder)
    write(folder, "elsewhere", 0.8, **card)
    why = {row.record.defense.name: row.why for row in page_of(folder).tables[0].rows}
    assert why == {
        "unproven": ("missing certify: not in the record",),
        "unasked": ("missing certify: not asked for (--attack)",),
    }
    assert [row.group for row in page_of(folder).tables[0].rows] == ["not ranked", "not ranked"]
    assert [row.group for row in collect(folder, load_board("board", folder)).tables[0].rows] == ["ranked"]


@pytest.mark.parametrize(
    ("radii", "said"), [(("1/4", "2"), "1/4, 2"), ((), "none"), ((*RADII, "2"), "1/4, 1/2, 3/4, 1, 2")]
)
def test_other_radii_are_not_comparable(folder: Path, radii: tuple[str, ...], said: str) -> None:
    write(folder, "other", 0.7, on="balls", found=FOUND, certification=certify(FOUND, at=radii))
    page = page_of(folder)
    assert page.tables == ()
    assert page.incomparable[0].reasons == (f"certified radii {said}, here 1/4, 1/2, 3/4, 1",)
    row = next(csv.DictReader(io.StringIO(texts_of(folder)["balls.csv"])))
    assert bool(row["certified@1/4"]) == ("1/4" in radii)


def _changed(radius: str, **changes: Any) -> dict[str, Any]:
    """All shares, one of them changed."""
    radii = dict(certify(FOUND).radii)
    return {"radii": {**radii, radius: radii[radius].model_copy(update=changes)}}


SMALL = zoo.Estimate(**zoo.estimate([1.0] * 10 + [0.0] * 30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (_changed("1/4", attacked=SMALL), r"0\.625 certified at radius 1/4, but an attack inside it left 0\.25"),
        (_changed("1", n=39), r"at radius 1 are not of its 40 samples"),
        (_changed("1", attacked=SMALL.model_copy(update={"n": 39})), r"at radius 1 are not of its 40 samples"),
        ({"average_radius": certify(FOUND).average_radius + 1e-8}, r"the radii in its samples\.parquet average"),
        ({"average_radius": 0.5}, r"average radius 0\.5, but its curve averages 0\.43"),
        (
            {"curve": certify(FOUND).curve[:-1]},
            r"32 of 40 samples right, 2 of them without a radius, .* curve holds 29",
        ),
        ({"right": 41, "abstained": 11}, r"41 of 40 samples right"),
        ({"curve": certify(FOUND).curve[::-1]}, r"don't fall"),
    ],
)
@pytest.mark.parametrize("profile", ["standard", "quick"])
def test_a_certification_that_contradicts_itself_is_refused(
    folder: Path, profile: str, changes: dict[str, Any], message: str
) -> None:
    target = write(
        folder, "fair", 0.7, on="balls", found=FOUND, certification=certify(FOUND, **changes), profile=profile
    )
    with pytest.raises(IntegrityError, match=rf"{re.escape(str(target))}.*{message}"):
        render(folder)


def test_equal_shares_do_not_contradict(folder: Path) -> None:
    share = certify(FOUND).radii["1/4"]
    equal = zoo.Estimate(**share.model_dump(include={"value", "n", "low", "high"}))
    below = equal.model_copy(update={"value": equal.value - 1e-14})
    write(folder, "fair", 0.7, on="balls", found=FOUND, certification=certify(FOUND, **_changed("1/4", attacked=below)))
    render(folder)


def test_results_and_certification_must_agree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = zoo.results

    def results(*args: Any) -> Any:
        outcome = sound(*args)
        return outcome.model_copy(update={"certified": {"1/4": SMALL}})

    monkeypatch.setitem(zoo.write.__globals__, "results", results)
    write(folder, "trained", 0.7, on="balls")  # says that something is certified, and has no certification
    with pytest.raises(IntegrityError, match="disagree on what is certified"):
        render(folder)


@pytest.mark.parametrize("found", [[*FOUND[:-1], 0.4], [max(FOUND), *FOUND[1:]]])
def test_the_sample_table_must_hold_the_radii_behind_the_average(folder: Path, found: list[float]) -> None:
    write(folder, "fair", 0.7, on="balls", found=found, certification=certify(FOUND))
    with pytest.raises(IntegrityError, match=r"average radius .* but the radii in its samples\.parquet average"):
        render(folder)


def test_radii_moved_from_one_sample_to_another_leave_the_average_but_not_the_curve(folder: Path) -> None:
    moved = list(FOUND)
    low, high = sorted(range(40), key=lambda i: FOUND[i])[15], sorted(range(40), key=lambda i: FOUND[i])[30]
    moved[low], moved[high] = moved[low] + 0.1, moved[high] - 0.1
    write(folder, "fair", 0.7, on="balls", found=moved, certification=certify(FOUND))
    with pytest.raises(IntegrityError, match="its curve is not made of the radii"):
        render(folder)


# Curves


def test_steps_are_the_share_with_a_larger_radius() -> None:
    curve, n = (0.9, 0.5, 0.5, 0.2), 8
    assert curves.steps(curve, n) == [(0.2, 3 / 8), (0.5, 1 / 8), (0.9, 0.0)]
    for r in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0):
        falls = [accuracy for radius, accuracy in curves.steps(curve, n) if radius <= r]
        assert (falls[-1] if falls else len(curve) / n) == sum(radius > r for radius in curve) / n
    assert curves.steps((), 5) == []


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (1.04, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.0, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        (0.03, [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03]),
        (7.9, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_ticks_are_round_and_few(end: float, expected: list[float]) -> None:
    assert curves.ticks(end) == pytest.approx(expected)


def _level(path: str, x: float) -> float:
    """How high a line of H and V commands runs at a position, in pixels."""
    start = re.match(r"M([\d.]+) ([\d.]+)", path)
    assert start
    level = float(start[2])
    for at, y in re.findall(r"H([\d.]+)V([\d.]+)", path):
        if float(at) > x:
            break
        level = float(y)
    return level


def test_a_line_runs_at_the_certified_accuracy(folder: Path) -> None:
    write(folder, "fair", 0.7, on="balls", found=FOUND)
    table = page_of(folder).tables[0]
    (plot,) = curves.plots(table)
    (line,) = plot.lines
    end = 1.04 * certify(FOUND).curve[0]
    for step in range(1, 50):
        r = step * 0.027
        accuracy = sum(radius > r for radius in FOUND) / 40
        assert _level(line.path, curves.across(r, end)) == pytest.approx(curves.down(accuracy), abs=0.051)
    for mark, (radius, share) in zip(line.marks, certify(FOUND).radii.items(), strict=True):
        assert mark.radius == radius
        assert float(mark.certified) == pytest.approx(curves.down(share.value), abs=0.051)
        assert float(mark.attacked) == pytest.approx(curves.down(share.attacked.value), abs=0.051)
        assert float(mark.certified) >= float(mark.attacked)  # downwards
    assert plot.summary == (
        "Certified accuracy of one row, falling as the radius grows: 62.5 % at radius 1/4, 12.5 % at radius 1."
    )


def test_many_rows_share_axes_in_plots_of_few_and_letters_keep_apart(folder: Path) -> None:
    for i in range(11):
        write(folder, f"row-{i:02}", 0.9 - i / 20, on="balls", found=smoothed(0.5, 0.4 + i / 10))
    table = page_of(folder).tables[0]
    plots = curves.plots(table)
    assert [len(plot.lines) for plot in plots] == [6, 5]
    assert plots[0].xs == plots[1].xs
    assert "".join(line.key for plot in plots for line in plot.lines) == "ABCDEFGHIJK"
    assert [curves.key(table, row) for row in table.certifying] == list("ABCDEFGHIJK")
    for plot in plots:
        at = [(float(line.x), float(line.y)) for line in plot.lines]
        assert len({line.series for line in plot.lines}) == len(plot.lines) <= curves.LINES
        for i, (x, y) in enumerate(at):
            assert all(abs(x - other) > 12 or abs(y - below) > 12 for other, below in at[:i])


def test_rows_that_failed_have_no_curve(folder: Path) -> None:
    fail = zoo.FAIL.model_copy(update={"check": "contradiction"})
    write(folder, "unsound", 0.9, on="balls", found=FOUND, verdict="failed", findings=(fail,))
    assert curves.plots(page_of(folder).tables[0]) == ()
    write(folder, "fair", 0.7, on="balls", found=FOUND)
    (plot,) = curves.plots(page_of(folder).tables[0])
    assert [line.row.record.defense.name for line in plot.lines] == ["fair"]


def test_a_row_that_certifies_nothing_is_a_flat_line(folder: Path) -> None:
    write(folder, "nothing", 0.5, on="balls", found=[0.0] * 20 + [-1.0] * 20)
    (plot,) = curves.plots(page_of(folder).tables[0])
    assert plot.lines[0].path == f"M{curves.LEFT}.0 {curves.BOTTOM}.0"
    assert [tick.text for tick in plot.radii] == list(RADII)
    render(folder)


def test_knobs_and_refuted_are_short() -> None:
    assert knobs_text({"sigma": 0.25, "temperature": 1.0, "n": 3}) == "sigma = 0.25, temperature = 1, n = 3"
    assert knobs_text({"levels": [0.12, 0.25, 0.5, 1.0], "few": [1, 2]}) == "levels = 0.12 … 1 (4 values), few = 1, 2"
    assert knobs_text({"deep": {"a": list(range(99))}}) == 'deep = {"a":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14…'
    assert knobs_text({"pairs": [[0.0, 1.0]] * 10}) == "pairs = 10 × 2 values"
    assert knobs_text({}) == ""
    assert refuted(certify(FOUND)) == "0"
    assert refuted(certify(FOUND, **_changed("3/4", refuted=2))) == "0, 0, 2, 0"
