from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file

from assay import data
from assay.digest import sha256_of_file, sha256_of_json
from assay.errors import InputError, IntegrityError
from assay.publish import publish_record
from assay.record import BUNDLE, RECORD, SAMPLES, Estimate, read_record, write_record


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(toy_run, folder)
    return folder


def edit(run: Path, change: Callable[[dict[str, Any]], object], *, reseal: bool = False) -> None:
    """Edits record.json; `reseal` recomputes its own digest, as a forger would."""
    file = run / RECORD
    plain = json.loads(file.read_text())
    change(plain)
    if reseal:
        plain["digest"] = sha256_of_json({key: value for key, value in plain.items() if key != "digest"})
    file.write_text(json.dumps(plain))


def test_a_record_has_the_names_that_others_read(run: Path) -> None:
    plain = json.loads((run / RECORD).read_text())
    assert {
        "schema", "protocol", "board", "defense", "verdict", "results", "findings", "cost", "provenance", "digest",
    } <= set(plain)  # fmt: skip
    assert plain["schema"] == "assay-record/1"
    assert {"id", "digest", "profile"} <= set(plain["protocol"])
    assert {"name", "dataset", "revision", "n", "ids_sha256", "threat"} <= set(plain["board"])
    assert plain["board"]["threat"] == {"norm": "linf", "eps": "1/10"}
    assert {"name", "card", "weights", "source_sha256", "state_sha256"} <= set(plain["defense"])
    assert {"clean", "robust", "attacks", "certified", "rules"} <= set(plain["results"])
    assert set(plain["results"]["rules"]) == {"expected", "worst_of_n", "majority"}
    assert {"forward", "backward", "seconds"} <= set(plain["cost"])
    for finding in plain["findings"]:
        assert {"check", "value", "threshold", "status", "samples", "message"} <= set(finding)
    for accuracy in (plain["results"]["clean"], plain["results"]["robust"], *plain["results"]["attacks"].values()):
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
        assert accuracy["n"] == 40


def test_a_record_reads_back_as_it_was_written(run: Path) -> None:
    record = read_record(run, files=True)
    assert record.verdict == "verified"
    assert record == read_record(run / RECORD)
    before = (run / RECORD).read_bytes()
    write_record(record, run / RECORD)
    assert (run / RECORD).read_bytes() == before


def test_the_files_hold_what_the_record_says(run: Path) -> None:
    record = read_record(run, files=True)
    assert set(record.files) == {SAMPLES, BUNDLE}
    assert record.files[BUNDLE] == sha256_of_file(run / BUNDLE)
    table = pd.read_parquet(run / SAMPLES)
    assert {
        "id", "label", "attack", "clean", "expected", "worst_of_n", "majority", "norm", "forward", "backward",
        "seconds", "certified_radius", "correct_draws", "draws",
    } <= set(table.columns)  # fmt: skip
    assert record.results is not None
    final = table[table["attack"] == "final"]
    assert record.results.robust.value == pytest.approx(final["expected"].mean())
    for name, attack in record.results.attacks.items():
        rows = table[table["attack"] == name]
        assert attack.value == pytest.approx(rows["expected"].mean())
        assert attack.attempted == rows["attempted"].sum()
        assert attack.forward == rows["forward"].sum()
    bundle = load_file(run / BUNDLE)
    x, _ = data.load("digits", bundle["id"].tolist())
    np.testing.assert_allclose(np.abs(bundle["x_adv"] - x.numpy()).max((1, 2, 3)), final["norm"], atol=1e-7)
    assert (final["norm"] <= 0.1 + 1e-7).all()


EDITS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("value", lambda r: r["results"]["robust"].update(value=r["results"]["robust"]["value"] / 2)),
    ("verdict", lambda r: r.update(verdict="flagged")),
    ("seed", lambda r: r["provenance"].update(seed=1)),
    ("card", lambda r: r["defense"]["card"].update(title="Better")),
    ("finding", lambda r: r["findings"].pop()),
    ("seconds", lambda r: r["cost"].update(seconds=0.0)),
    ("outcome", lambda r: r.update(outcome_sha256="0" * 64)),
]


@pytest.mark.parametrize(("what", "change"), EDITS, ids=[what for what, _ in EDITS])
def test_an_edited_record_is_noticed_and_named(
    run: Path, what: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(run, change)
    with pytest.raises(IntegrityError, match=r"record\.json was changed"):
        read_record(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(rank=1),
        lambda r: r["results"]["clean"].update(median=0.5),
        lambda r: r["results"]["clean"].update(value=1.5),
        lambda r: r["results"]["clean"].update(value="0.9"),
        lambda r: r.update(schema="assay-record/2"),
        lambda r: r.update(verdict="excellent"),
        lambda r: r.pop("cost"),
    ],
)
def test_what_is_no_record_is_refused_even_with_a_right_digest(
    run: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(run, change, reseal=True)
    with pytest.raises((InputError, IntegrityError), match="record"):
        read_record(run)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ['"seconds": ', '"steps": '])
def test_what_is_no_number_is_refused_wherever_it_stands(run: Path, number: str, place: str) -> None:
    text = (run / RECORD).read_text()
    head, _, tail = text.partition(place)
    rest = tail[len(tail) - len(tail.lstrip("0123456789.e+-")) :]
    (run / RECORD).write_text(f"{head}{place}{number}{rest}")
    with pytest.raises(InputError, match="not a valid record"):
        read_record(run)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema": "assay-record/1"}', "\ufeff{}"])
def test_other_files_are_no_records(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(InputError, match="not a valid record"):
        read_record(tmp_path)


def test_an_absent_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no record at"):
        read_record(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [SAMPLES, BUNDLE])
def test_an_edited_or_missing_file_of_a_record_is_named(run: Path, name: str) -> None:
    content = bytearray((run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / name).write_bytes(bytes(content))
    read_record(run)
    with pytest.raises(IntegrityError, match=name):
        read_record(run, files=True)
    (run / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        read_record(run, files=True)


def test_the_outcome_ignores_the_clock_and_the_checkout_and_nothing_else(run: Path) -> None:
    record = read_record(run)
    samples = {"id": [1, 2]}
    outcome = record.sealed(samples).outcome_sha256

    def with_provenance(**changes: Any) -> str:
        provenance = record.provenance.model_copy(update=changes)
        return record.model_copy(update={"provenance": provenance}).sealed(samples).outcome_sha256

    later = {"started": "2030-01-01T00:00:00+00:00", "finished": "2030-01-02T00:00:00+00:00"}
    assert with_provenance(**later) == outcome
    # A resume after a commit of, say, a README has the same code and the same plan.
    assert with_provenance(commit="f" * 40, dirty=not record.provenance.dirty) == outcome
    slower = record.cost.model_copy(update={"seconds": 1e6})
    assert record.model_copy(update={"cost": slower}).sealed(samples).outcome_sha256 == outcome

    assert with_provenance(seed=5) != outcome
    assert with_provenance(code_sha256="0") != outcome
    assert record.sealed({"id": [2, 1]}).outcome_sha256 != outcome
    cheaper = record.cost.model_copy(update={"forward": 1})
    assert record.model_copy(update={"cost": cheaper}).sealed(samples).outcome_sha256 != outcome
    other = {**record.files, BUNDLE: "0"}
    assert record.model_copy(update={"files": other}).sealed(samples).outcome_sha256 != outcome


@given(st.floats(0, 1), st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_estimates_survive_json(value: float, n: int, low: float, high: float) -> None:
    estimate = Estimate(value=value, n=n, low=low, high=high)
    assert Estimate.model_validate_json(estimate.model_dump_json()) == estimate


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_accuracy_lies_between_0_and_1(value: float) -> None:
    with pytest.raises(ValidationError):
        Estimate(value=value, n=1, low=0, high=1)


def test_a_quick_record_is_never_ranked_and_a_standard_one_only_when_it_is_whole(run: Path) -> None:
    record = read_record(run)
    assert not record.ranked
    protocol = record.protocol.model_copy(update={"profile": "standard"})
    standard = record.model_copy(update={"protocol": protocol})
    assert standard.ranked
    assert not standard.model_copy(update={"board": record.board.model_copy(update={"size": 41})}).ranked
    for verdict, ranked in {"flagged": True, "failed": False, "incomplete": False}.items():
        assert standard.model_copy(update={"verdict": verdict}).ranked is ranked


# Publishing.


@pytest.fixture
def boards(tmp_path: Path) -> Path:
    (tmp_path / "leaderboards" / "boards").mkdir(parents=True)
    return tmp_path / "leaderboards"


def test_publishing_copies_the_record_and_its_files(run: Path, boards: Path) -> None:
    folder = publish_record(run, boards)
    assert folder == boards / "records" / "toy" / "toy-abstaining" / "quick"
    assert {path.name for path in folder.iterdir()} == {RECORD, SAMPLES, BUNDLE}
    assert read_record(folder, files=True) == read_record(run)
    assert publish_record(run, boards) == folder


def test_an_incomplete_or_damaged_run_is_not_published(run: Path, boards: Path) -> None:
    def forget(record: dict[str, Any]) -> None:
        record["verdict"] = "incomplete"
        record["protocol"]["missing"] = {"pgd": "not asked for (--attack)"}

    (run / SAMPLES).write_bytes(b"")
    with pytest.raises(IntegrityError, match=SAMPLES):
        publish_record(run, boards)
    edit(run, forget, reseal=True)
    with pytest.raises(IntegrityError, match=SAMPLES):
        publish_record(run, boards)
    edit(run, lambda record: record.update(files={}), reseal=True)
    with pytest.raises(InputError, match=r"incomplete \(pgd\)"):
        publish_record(run, boards)
    assert not (boards / "records").exists()


def test_a_leaderboards_folder_holds_boards(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no boards"):
        publish_record(run, tmp_path)
