"""Tables from synthetic records: golden files, ranks, escaping, what is refused and what is said of it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import runpy
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from assay.boards import Board, load_board
from assay.digest import ids_digest
from assay.errors import InputError, IntegrityError
from assay.finding import Finding
from assay.leaderboards.render import check_tables, render, write_tables
from assay.leaderboards.rows import collect
from assay.leaderboards.text import compact, csv_text, markdown, web_address
from assay.protocol import PROTOCOLS
from assay.record import (
    RECORD,
    SAMPLES,
)  # fmt: skip

GOLDEN = Path(__file__).parent / "golden"
zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("record_zoo.py"))))
DRAWS, IDS, STOCHASTIC, write, write_all = zoo.DRAWS, zoo.IDS, zoo.STOCHASTIC, zoo.write, zoo.write_all


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A leaderboards folder with one board and no records."""
    monkeypatch.setitem(PROTOCOLS, "test.1", zoo.PROTOCOL)  # type: ignore[misc]
    zoo.write_board(tmp_path)
    return tmp_path


def page_of(folder: Path) -> Any:
    return collect(folder, load_board("board", folder))


def test_the_tables_are_the_golden_ones(folder: Path) -> None:
    write_all(folder)
    zoo.write_certified(folder)
    written = {path.name: path.read_bytes() for path in write_tables(folder)}
    if os.environ.get("ASSAY_REGENERATE_GOLDEN") == "1":
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
        for name, content in written.items():
            (GOLDEN / name).write_bytes(content)
    assert written == {path.name: path.read_bytes() for path in GOLDEN.iterdir()}
    assert all(content.endswith(b"\n") and b"\r" not in content for content in written.values())


def test_each_record_stands_in_exactly_one_place(folder: Path) -> None:
    write_all(folder)
    page = page_of(folder)
    found = {(t.profile, row.group): [] for t in page.tables for row in t.rows}
    for table in page.tables:
        for row in table.rows:
            found[table.profile, row.group].append(row.record.defense.name)
    assert found == {
        ("standard", "ranked"): ["trained", "trained-too", "diffusion", "none"],
        ("standard", "known broken"): ["quantised"],
        ("standard", "not ranked"): ["partial", "careless"],
        ("thorough", "ranked"): ["patient"],
        ("quick", "not ranked"): ["hasty"],
    }
    assert [(other.record.defense.name, len(other.reasons)) for other in page.incomparable] == [("older", 1)]
    why = {row.record.defense.name: row.why for table in page.tables for row in table.rows if row.why}
    assert why == {
        "partial": ("20 of the board's 40 samples",),
        "careless": ("failed: modes",),
        "hasty": ("the quick profile is never ranked",),
    }


def test_rows_that_no_test_separates_share_a_rank(folder: Path) -> None:
    write_all(folder)
    ranked = page_of(folder).tables[0].group("ranked")
    assert [(row.record.defense.name, row.rank, row.tied) for row in ranked] == [
        ("trained", 1, True), ("trained-too", 1, True), ("diffusion", 3, False), ("none", 4, False),
    ]  # fmt: skip


def test_equal_scores_tie_and_six_discordant_samples_do_not(folder: Path) -> None:
    write(folder, "a", 0.5)
    write(folder, "b", 0.5)
    write(folder, "c", 0.5 - 5 / 40)  # p = 2 / 2^5: not separated
    # p = 2 / 2^6 < 0.05; samples are paired by id, whatever the order of the file.
    write(folder, "d", 0.5 - 6 / 40, backwards=True)
    ranked = page_of(folder).tables[0].rows
    assert [(row.record.defense.name, row.rank) for row in ranked] == [("a", 1), ("b", 1), ("c", 1), ("d", 3)]


def test_the_damage_is_credited_to_the_family_that_did_it(folder: Path) -> None:
    write(folder, "trained", 0.5)
    left = page_of(folder).tables[0].rows[0].left
    assert left["black-box"].value == left["apgd"].value == 0.5
    assert [family for family, cell in left.items() if cell.most_damage] == ["apgd"]
    assert left["apgd"].attack == "apgd-t"
    assert (left["apgd"].broken, left["apgd"].attempted) == (20, 40)
    assert (left["black-box"].broken, left["black-box"].attempted) == (0, 20)


def test_a_row_that_nothing_hurt_credits_nobody(folder: Path) -> None:
    write(folder, "perfect", 1.0)
    assert not any(cell.most_damage for cell in page_of(folder).tables[0].rows[0].left.values())


@pytest.mark.parametrize("file", [RECORD, SAMPLES])
def test_a_changed_file_is_named(folder: Path, file: str) -> None:
    target = write(folder, "trained", 0.5) / file
    content = bytearray(target.read_bytes())
    position = content.index(b'"trained"') + 1 if file == RECORD else len(content) // 2
    content[position] ^= 1
    target.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=re.escape(str(target))):
        write_tables(folder)
    assert not (folder / "tables").exists()


def test_a_number_that_its_samples_contradict_is_refused(folder: Path) -> None:
    write(folder, "trained", 0.5, reported=0.6)
    with pytest.raises(IntegrityError, match=r"robust 0\.6.*average 0\.5"):
        render(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"revision": "r2"}, "data digits r2, here digits r1"),
        ({"threat": {"norm": "l2", "eps": "1/5"}}, "threat l2 1/5, here linf 1/5"),
        ({"threat": {"norm": "linf", "eps": "1/4"}}, "threat linf 1/4, here linf 1/5"),
        ({"draws": 20}, "20 draws a candidate, here 10"),
        ({"ids_sha256": ids_digest(range(40))}, f"other samples (40 of 40, ids {ids_digest(range(40))[:12]})"),
        ({"name": "elsewhere"}, "run on board elsewhere"),
    ],
)
def test_what_was_measured_otherwise_is_listed_with_the_reason(
    folder: Path, change: dict[str, Any], reason: str
) -> None:
    write(folder, "trained", 0.5, board=change)
    page = page_of(folder)
    assert page.tables == ()
    assert [other.reasons for other in page.incomparable] == [(reason,)]
    for path, content in render(folder).items():
        if path.name == "board.html":
            assert reason in content.decode()


def test_records_of_no_board_are_refused(folder: Path) -> None:
    write(folder, "trained", 0.5).parent.rename(folder / "records" / "bord")
    with pytest.raises(InputError, match=r"boards/bord\.toml doesn't exist"):
        render(folder)


def test_the_order_in_which_files_were_made_changes_nothing(folder: Path, tmp_path_factory: Any) -> None:
    names = ["c", "a", "b"]
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(folder / "boards", other / "boards")
    for name in names:
        write(folder, name, 0.5)
    for name in reversed(names):
        write(other, name, 0.5)
    first, second = ({path.name: content for path, content in render(where).items()} for where in (folder, other))
    assert first == second


def test_check_finds_the_stale_the_missing_and_the_superfluous(folder: Path) -> None:
    write(folder, "trained", 0.5)
    written = write_tables(folder)
    assert [path.name for path in written] == ["board.csv", "board.html", "board.md", "index.html", "index.md"]
    assert check_tables(folder) == []
    stale, missing, gone = written[0], written[3], folder / "tables" / "old.md"
    stale.write_bytes(stale.read_bytes() + b"\n")
    missing.unlink()
    gone.write_text("a board that is no more\n")
    assert check_tables(folder) == sorted([stale, missing, gone])
    write_tables(folder)
    assert check_tables(folder) == []
    assert not gone.exists()


def test_a_board_without_records_says_so(folder: Path) -> None:
    texts = {path.name: content.decode() for path, content in render(folder).items()}
    assert "No rows yet" in texts["board.html"]
    assert "No rows yet" in texts["board.md"]
    assert "no ranked row yet" in texts["index.html"]


class Tags(HTMLParser):
    """The tags and addresses of a page, and whether they close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"]
        if tag not in ("meta", "wbr", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> | [x](javascript:alert(1)) `x` **b**\n# h"


def test_other_peoples_text_stays_text(folder: Path) -> None:
    evil = {"title": EVIL, "summary": EVIL, "source": EVIL, "url": 'https://example.org/"><script>alert(1)</script>|)'}
    finding = Finding(check=EVIL, status="flag", message=EVIL)
    failed = Finding(check=EVIL, status="fail", message=EVIL)
    write(folder, "ranked", 0.5, choices=(EVIL,), verdict="flagged", findings=(finding,), **evil)
    write(folder, "failed", 0.5, verdict="failed", findings=(failed,), measured=False, **evil)
    write(folder, "elsewhere", 0.5, board={"revision": EVIL}, **evil)
    zoo.write_board(folder, "balls", radii=zoo.RADII)
    found = zoo.smoothed(0.5, 1.0)
    knobs = {EVIL: EVIL, "levels": [EVIL, EVIL, EVIL, EVIL], "nested": {EVIL: [EVIL]}}
    certification = zoo.certify(found, knobs=knobs, certificate=EVIL[:100], attack=EVIL)
    write(folder, "certified", 0.5, on="balls", found=found, certification=certification, **evil)
    texts = {path.name: content.decode() for path, content in render(folder).items()}
    for name in ("board.html", "balls.html", "index.html"):
        page = Tags(texts[name])
        assert not {"script", "img", "iframe", "b"} & set(page.tags)
        assert not [address for address in page.addresses if address.startswith("javascript")]
    for name in ("board.md", "balls.md", "index.md"):
        # Escaped characters are text; of the rest nothing may open a tag, a link or a heading.
        plain = re.sub(r"\\.", "", texts[name])
        assert "<" not in plain
        assert "](javascript" not in plain
        assert "\n# h" not in plain
    rows = [line for line in texts["board.md"].splitlines() if line.startswith("| =") or line.startswith("| 1")]
    assert len(rows) == 1
    cells = re.split(r"(?<!\\)\|", rows[0])
    header = next(line for line in texts["board.md"].splitlines() if line.startswith("| rank"))
    assert len(cells) == len(header.split("|"))


def test_the_page_is_well_formed_and_allows_only_its_own_style(folder: Path) -> None:
    write_all(folder)
    zoo.write_certified(folder)
    for path, content in render(folder).items():
        if path.suffix == ".html":
            text = content.decode()
            page = Tags(text)
            assert {"table", "style"} <= set(page.tags)
            style = text[text.index("<style>") + 7 : text.index("</style>")]
            digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
            assert f"default-src 'none'; style-src 'sha256-{digest}'" in text


def test_csv_holds_every_record_and_starts_no_formula(folder: Path) -> None:
    write_all(folder)
    write(folder, "sum", 0.5, title="=SUM(A1:A9)")
    text = next(content for path, content in render(folder).items() if path.name == "board.csv").decode()
    rows = {row["defense"]: row for row in csv.DictReader(io.StringIO(text))}
    assert len(rows) == 11
    assert rows["sum"]["title"] == "'=SUM(A1:A9)"
    assert rows["trained"]["robust"] == "0.800000"
    assert rows["older"]["group"] == "not comparable"
    assert rows["careless"]["robust"] == ""


def test_text_helpers() -> None:
    assert markdown("a|b *c* [d](e)\n<f> www.g.h http://i") == r"a\|b \*c\* \[d\](e) \<f\> www\.g.h http\://i"
    assert markdown("a\u202eb\x07") == "ab"
    assert markdown(markdown("*")) == r"\*"
    assert [compact(n) for n in (0, 950, 999, 1000, 12_345, 999_960, 4_560_000)] == [
        "0", "950", "999", "1.00 k", "12.3 k", "1.00 M", "4.56 M",
    ]  # fmt: skip
    assert csv_text("@x") == "'@x"
    assert web_address("https://a.b/c") == "https://a.b/c"
    assert [web_address(url) for url in ("javascript:alert(1)", "https:///x", "", "http://[x")] == [""] * 4


def test_the_committed_boards_render(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "leaderboards" / "boards", tmp_path / "boards")
    boards = [path.stem for path in (tmp_path / "boards").glob("*.toml")]
    assert boards
    assert len(render(tmp_path)) == 3 * len(boards) + 2
    assert all(isinstance(load_board(name, tmp_path), Board) for name in boards)
