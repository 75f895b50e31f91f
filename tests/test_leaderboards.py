"""Tables from synthetic records: golden files, ranks, escaping, what is refused and what is said of it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from assay.audits import Audit, write_audit
from assay.boards import Board, load_board
from assay.digest import ids_digest, sha256_of_bytes, sha256_of_json
from assay.errors import InputError, IntegrityError
from assay.finding import Finding
from assay.leaderboards import ranking
from assay.leaderboards.render import check_tables, render, write_tables
from assay.leaderboards.rows import LEVEL, collect
from assay.leaderboards.text import compact, csv_text, markdown, web_address
from assay.protocol import PROTOCOLS
from assay.record import RECORD, SAMPLES, read_record
from assay.statistics import EXACT_PAIRS, mcnemar, paired_permutation

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
        if path.name == "board.csv":
            row = next(csv.DictReader(io.StringIO(content.decode())))
            assert (row["group"], row["why"]) == ("not comparable", reason)


@pytest.mark.parametrize("name", ["index", "balls-certified"])
def test_a_board_may_not_take_another_tables_file_name(folder: Path, name: str) -> None:
    zoo.write_board(folder, name)
    zoo.write_board(folder, "balls", radii=zoo.RADII)
    with pytest.raises(InputError, match="another table"):
        render(folder)


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
    assert [path.name for path in written] == ["board.csv", "board.md", "board.tex", "index.md"]
    assert check_tables(folder) == []
    stale, missing, gone = written[0], written[2], folder / "tables" / "old.html"
    stale.write_bytes(stale.read_bytes() + b"\n")
    missing.unlink()
    gone.write_text("a board that is no more\n")
    assert check_tables(folder) == sorted([stale, missing, gone])
    write_tables(folder)
    assert check_tables(folder) == []
    assert not gone.exists()


def test_a_board_without_records_says_so(folder: Path) -> None:
    texts = {path.name: content.decode() for path, content in render(folder).items()}
    assert "No rows yet" in texts["board.md"]
    assert "% No rows yet" in texts["board.tex"]
    assert "no ranked row yet" in texts["index.md"]


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
    assert markdown("a \u00a0 b\n\nc") == "a b c"
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
    with_radii = [name for name in boards if load_board(name, tmp_path).radii]
    assert len(render(tmp_path)) == 3 * len(boards) + len(with_radii) + 1
    assert all(isinstance(load_board(name, tmp_path), Board) for name in boards)


# Ranks of many rows, against the tests that they stand for


def _ranks_one_by_one(scores: Any, stochastic: Any) -> list[int]:
    found = []
    for i, mine in enumerate(scores):
        better = 0
        for j, other in enumerate(scores):
            test = paired_permutation if stochastic[i] or stochastic[j] else mcnemar
            better += other.mean() > mine.mean() and test(other.tolist(), mine.tolist()) < LEVEL
        found.append(1 + better)
    return found


@pytest.mark.parametrize(("n", "low", "high"), [(8, 0.0, 1.0), (14, 0.2, 0.8), (60, 0.35, 0.65), (200, 0.45, 0.55)])
def test_ranks_are_those_of_the_tests_one_by_one(n: int, low: float, high: float) -> None:
    generator = np.random.Generator(np.random.PCG64(n))
    rows = 10
    stochastic = np.arange(rows) % 2 == 1
    shares = generator.uniform(low, high, size=(rows, 1))
    counts = (generator.uniform(size=(rows, n)) < shares).astype(float)
    drawn = np.round(20 * generator.beta(3 * shares, 3 * (1 - shares), size=(rows, n))) / 20
    scores = np.where(stochastic[:, None], drawn, counts)
    assert ranking.ranks(scores, stochastic) == _ranks_one_by_one(scores, stochastic)


@pytest.mark.parametrize("n", [3, EXACT_PAIRS, EXACT_PAIRS + 1, 41, 130])
def test_permuting_pairs_together_gives_the_p_of_each_alone(n: int) -> None:
    a, b = np.random.Generator(np.random.PCG64(7)).uniform(size=(2, 3, n))
    together = ranking._p_values(np.vstack([a, b]), np.arange(3), np.arange(3, 6))
    assert together.tolist() == [paired_permutation(b[i].tolist(), a[i].tolist()) for i in range(3)]


def test_pairs_that_the_approximation_decides_are_decided_as_permuting_would(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    shares = np.linspace(0.3, 0.6, 14)[:, None]
    scores = np.round(20 * generator.beta(2 * shares, 2 * (1 - shares), size=(14, 100))) / 20
    quick = ranking.ranks(scores, np.ones(14, dtype=bool))
    asked: list[int] = []
    permute = ranking._p_values
    monkeypatch.setattr(ranking, "_FEW", -1.0)  # every pair that isn't sure is permuted
    monkeypatch.setattr(ranking, "_p_values", lambda s, i, j: (asked.append(len(i)), permute(s, i, j))[1])
    assert ranking.ranks(scores, np.ones(14, dtype=bool)) == quick
    assert asked[0] > 20


def test_no_rows_no_ranks() -> None:
    assert ranking.ranks(np.zeros((0, 5)), np.zeros(0, dtype=bool)) == []


@pytest.mark.parametrize("content", [b"PAR1 and no more", b""])
def test_what_is_no_sample_table_is_named(folder: Path, content: bytes) -> None:
    target = write(folder, "trained", 0.5)
    (target / SAMPLES).write_bytes(content)
    record = json.loads((target / RECORD).read_text())
    record["files"][SAMPLES] = sha256_of_bytes(content)
    record["digest"] = sha256_of_json({key: value for key, value in record.items() if key != "digest"})
    (target / RECORD).write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match=re.escape(f"{target / SAMPLES} is not a sample table")):
        render(folder)


# Audits


def _audit(folder: Path, name: str, lowered: dict[int, float], after: float, before: float, **changes: Any) -> Path:
    """Audits a record of the board by hand; `lowered` are scores by sample id."""
    record = read_record(folder / "records" / "board" / name)
    plain = {
        "record_digest": record.digest, "board": "board", "defense": name, "by": "Mallory | <b>", "date": "2026-11-20",
        "bundle": {"file": "001.safetensors", "sha256": "", "given_sha256": ""}, "n_valid": len(lowered) + 2,
        "samples": [{"id": i, "expected": score, "norm": 0.2} for i, score in lowered.items()],
        "n_invalid": 1, "reasons": {"out of the ball": 1}, "draws": DRAWS, "seed": 0,
        "value_before": before, "value_after": after, "url": "https://example.org/found", **changes,
    }  # fmt: skip
    return write_audit(folder, record, Audit.model_validate(plain), b"examples")


def test_an_audit_lowers_the_row_its_rank_and_says_by_whom(folder: Path) -> None:
    write(folder, "trained", 0.8)
    write(folder, "trained-too", 0.775, shift=1)
    write(folder, "none", 0.0)
    before = {row.record.defense.name: row.rank for row in page_of(folder).tables[0].rows}
    assert before == {"trained": 1, "trained-too": 1, "none": 3}
    fallen = dict.fromkeys(IDS[:20], 0.0)
    _audit(folder, "trained", fallen, after=0.3, before=0.8)
    rows = page_of(folder).tables[0].rows
    assert [(row.record.defense.name, row.rank, row.known) for row in rows] == [
        ("trained-too", 1, 0.775), ("trained", 2, pytest.approx(0.3)), ("none", 3, 0.0),
    ]  # fmt: skip
    assert rows[1].record.results is not None
    assert rows[1].record.results.robust.value == 0.8
    texts = {path.name: content.decode() for path, content in render(folder).items()}
    assert r"30.0, audited by Mallory \| \<b\>; measured 80.0 (" in texts["board.md"]
    by = r"[Mallory \| \<b\>](https://example.org/found)"
    assert f"| Trained | standard | 2026-11-20 | {by} | 80.0 | 30.0 | 20 | 22 | 1 | – |" in texts["board.md"]
    assert "77.5 (" in texts["index.md"]
    csv_rows = {row["defense"]: row for row in csv.DictReader(io.StringIO(texts["board.csv"]))}
    assert (csv_rows["trained"]["robust"], csv_rows["trained"]["known"]) == ("0.800000", "0.300000")
    assert (csv_rows["trained"]["audits"], csv_rows["none"]["audits"]) == ("1", "0")
    assert r"30.0\textsuperscript{\dag}" in texts["board.tex"]


def test_the_history_of_audits_is_kept(folder: Path) -> None:
    write(folder, "trained", 0.8)
    _audit(folder, "trained", {IDS[0]: 0.0}, after=0.775, before=0.8)
    _audit(folder, "trained", {IDS[1]: 0.0, IDS[0]: 0.0}, after=0.75, before=0.775, by="Trent")
    row = page_of(folder).tables[0].rows[0]
    assert [audit.by for audit in row.audits] == ["Mallory | <b>", "Trent"]
    assert row.known == pytest.approx(0.75)
    text = next(content for path, content in render(folder).items() if path.name == "board.md").decode()
    assert text.index("| 80.0 | 77.5 |") < text.index("| 77.5 | 75.0 |")


def test_an_unranked_row_is_audited_too(folder: Path) -> None:
    write(folder, "partial", 0.9, n=20)
    _audit(folder, "partial", {IDS[3]: 0.0}, after=0.85, before=0.9)
    row = page_of(folder).tables[0].rows[0]
    assert (row.group, row.known) == ("not ranked", pytest.approx(0.85))


@pytest.mark.parametrize(
    ("lowered", "after", "message"),
    [
        ({IDS[0]: 0.0}, 0.7, r"says that 0\.7 is left"),
        ({IDS[0]: 0.5}, 0.7875, "deterministic defense"),
        ({7: 0.0}, 0.775, "sample 7, which the record doesn't have"),
    ],
)
def test_audits_that_contradict_the_record_are_refused(
    folder: Path, lowered: dict[int, float], after: float, message: str
) -> None:
    write(folder, "trained", 0.8)
    _audit(folder, "trained", lowered, after=after, before=0.8)
    with pytest.raises(IntegrityError, match=message):
        render(folder)
