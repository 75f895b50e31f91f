"""A record against a baseline: what fell, with which p-value, and what so many samples could have shown."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from assay import cli_regress
from assay.card import Traits
from assay.digest import ids_digest, sha256_of_bytes
from assay.errors import InputError, IntegrityError
from assay.finding import Finding
from assay.power import POWER, detectable_flips, detectable_shift, require_samples
from assay.record import RECORD, SAMPLES, Record, read_record, write_record
from assay.regress import ALPHA, compare
from assay.regression import Comparison, Regression

record_zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("record_zoo.py"))))
N = 40


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Record]:
    """`make(final, clean, radius, **changes of the record)`: a record of such per-sample scores, read from disk."""

    def write(
        final: Sequence[float],
        clean: Sequence[float] | None = None,
        *,
        radius: Sequence[float] | None = None,
        stochastic: bool = False,
        **changes: Any,
    ) -> Record:
        folder = tmp_path / f"r{len(list(tmp_path.iterdir()))}"
        n, ids = len(final), tuple(range(100, 100 + len(final)))
        first = [1.0] * n if clean is None else list(clean)
        stages = {"clean": first, "apgd-ce": [max(s, float(i % 2)) for i, s in enumerate(final)], "apgd-t": final}
        columns = {"certified_radius": np.nan if radius is None else list(radius)}
        table = pd.concat(
            pd.DataFrame({"id": ids, "attack": stage, "expected": scores, **columns})
            for stage, scores in {**stages, "final": final}.items()
        )
        folder = record_zoo.write(folder, "plain", 1.0)
        template = read_record(folder)
        table.to_parquet(folder / SAMPLES, index=False)
        assert template.results is not None
        numbers = {
            "clean": template.results.clean.model_copy(update={"value": float(np.mean(first))}),
            "robust": template.results.robust.model_copy(update={"value": float(np.mean(final))}),
        }
        card = template.defense.card.model_copy(update={"traits": Traits(stochastic=stochastic)})
        update = {
            "board": template.board.model_copy(update={"n": n, "size": n, "ids_sha256": ids_digest(ids)}),
            "defense": template.defense.model_copy(update={"card": card}),
            "results": template.results.model_copy(update=numbers),
            "certification": None if radius is None else record_zoo.certify(radius),
            "files": {SAMPLES: sha256_of_bytes((folder / SAMPLES).read_bytes())},
        }
        record = template.model_copy(update={**update, **changes})
        write_record(record.sealed(None), folder / RECORD)
        return read_record(folder, files=True)

    return write


def number(found: Regression, what: str) -> Comparison:
    (one,) = (each for each in found.comparisons if each.what == what)
    return one


def standing(n: int, fallen: Sequence[int] = ()) -> list[float]:
    return [float(i not in fallen) for i in range(n)]


# What a comparison finds.


def test_a_record_against_itself_is_unchanged(make: Callable[..., Record]) -> None:
    record = make(standing(N, range(10)))
    found = compare(record, record)
    assert found.ok
    assert found.ids == tuple(range(100, 140))
    for each in found.comparisons:
        assert (each.p, each.drop, each.fell, each.rose, each.significant) == (1.0, 0.0, (), (), False)
    assert found.changed == ()
    assert "ok: no drop" in found.text()


@pytest.mark.parametrize(("fell", "rose", "ok"), [(7, 0, True), (8, 0, False), (13, 2, False), (12, 2, True)])
def test_falls_are_judged_by_mcnemars_exact_test(make: Callable[..., Record], fell: int, rose: int, ok: bool) -> None:
    before = make(standing(N, range(N - rose, N)))
    after = make(standing(N, range(fell)))
    found = compare(before, after)
    robust = number(found, "robust")
    assert robust.test == "mcnemar"
    assert robust.p == pytest.approx(float(stats.binom.sf(fell - 1, fell + rose, 0.5)))
    assert robust.level == ALPHA / 2
    assert found.ok is ok is (robust.p > robust.level)
    assert [change.id for change in robust.fell] == [100 + i for i in range(fell)]
    assert {change.attack for change in robust.fell[::2]} == {"apgd-ce"}
    assert {change.attack for change in robust.fell[1::2]} == {"apgd-t"}
    assert [change.id for change in robust.rose] == [140 - rose + i for i in range(rose)]


def test_a_rise_is_no_regression(make: Callable[..., Record]) -> None:
    found = compare(make(standing(N, range(30))), make(standing(N)))
    assert found.ok
    assert number(found, "robust").p > 0.99
    assert len(number(found, "robust").rose) == 30


def test_clean_accuracy_is_guarded_too(make: Callable[..., Record]) -> None:
    found = compare(make(standing(N, range(20))), make(standing(N, range(20)), clean=standing(N, range(9))))
    assert number(found, "clean").significant
    assert not number(found, "robust").significant
    assert not found.ok


def test_expectations_are_compared_by_permutation_the_greatest_fall_first(make: Callable[..., Record]) -> None:
    before = np.full(N, 0.8)
    after = before - np.where(np.arange(N) < 20, 0.1, 0.0) - np.where(np.arange(N) == 7, 0.3, 0.0)
    found = compare(make(before.tolist(), stochastic=True), make(after.tolist(), stochastic=True))
    robust = number(found, "robust")
    assert robust.test == "permutation"
    assert robust.significant
    assert robust.p == pytest.approx(2**-20, abs=2e-4)
    assert robust.fell[0].id == 107
    assert [change.id for change in robust.fell[1:4]] == [100, 101, 102]
    assert "107 (0.80 -> 0.40, apgd-ce)" in found.text() or "107 (0.80 -> 0.40, apgd-t)" in found.text()


def test_radii_are_compared_where_both_certify(make: Callable[..., Record]) -> None:
    radii = [0.5] * N
    before = make(standing(N), radius=radii)
    after = make(standing(N), radius=[0.1] * 20 + [0.5] * 20)
    found = compare(before, after)
    radius = number(found, "radius")
    assert radius.significant
    assert radius.drop == pytest.approx(0.2)
    assert {each.level for each in found.comparisons} == {ALPHA / 3}
    assert "average certified radius fell by 0.2000" in found.text()
    assert [each.what for each in compare(before, make(standing(N))).comparisons] == ["clean", "robust"]


def test_a_subset_and_a_smaller_candidate_are_compared_on_their_common_samples(make: Callable[..., Record]) -> None:
    before, after = make(standing(N)), make(standing(N, range(20, 40)))
    assert compare(before, after, n=20).ok
    assert compare(before, after, n=20).ids == tuple(range(100, 120))
    small = make(standing(12, range(10)))
    found = compare(before, small)
    assert len(found.ids) == 12
    assert found.size == N
    assert "12 of the baseline's 40 samples" in found.text()
    assert number(found, "robust").before == 1.0
    assert not found.ok


def test_a_check_that_newly_fails_is_a_regression(make: Callable[..., Record]) -> None:
    finding = Finding(check="modes", status="fail", message="A submodule is in training mode.")
    failed = {"verdict": "failed", "findings": (finding,)}
    found = compare(make(standing(N)), make(standing(N), results=None, files={}, **failed))
    assert not found.ok
    assert found.comparisons == ()
    assert "FAILED: modes: A submodule is in training mode." in found.text()
    measured = compare(make(standing(N)), make(standing(N), **failed))
    assert not measured.ok
    assert len(measured.comparisons) == 2
    assert compare(make(standing(N), **failed), make(standing(N), **failed)).ok


# What can't be compared.


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("board", {"name": "other"}, "board board in the baseline, other in the candidate"),
        ("board", {"revision": "r2"}, "data digits r1"),
        ("board", {"draws": 20}, "draws a candidate 10"),
        ("protocol", {"digest": "0123456789abcdef"}, "0123456789ab"),
        ("protocol", {"profile": "thorough"}, "profile standard"),
        ("protocol", {"missing": {"square": "not asked for"}}, "lacks square: not asked for"),
    ],
)
def test_records_that_say_nothing_of_each_other_are_refused(
    make: Callable[..., Record], part: str, change: dict[str, Any], says: str
) -> None:
    before, after = make(standing(N)), make(standing(N))
    changed = after.model_copy(update={part: getattr(after, part).model_copy(update=change)})
    with pytest.raises(InputError, match=r"can't be compared") as error:
        compare(before, changed)
    assert says in str(error.value)
    if "missing" in change:
        with pytest.raises(InputError, match="the baseline lacks square"):
            compare(changed, before)


def test_another_threat_model_is_refused(make: Callable[..., Record]) -> None:
    record = make(standing(N))
    threat = record.board.threat.model_copy(update={"eps": "1/4"})
    other = record.model_copy(update={"board": record.board.model_copy(update={"threat": threat})})
    with pytest.raises(InputError, match="linf 1/5 in the baseline, linf 1/4 in the candidate"):
        compare(record, other)


def test_nothing_measured_is_refused(make: Callable[..., Record]) -> None:
    record, empty = make(standing(N)), make(standing(N), results=None, files={}, verdict="incomplete")
    with pytest.raises(InputError, match="the baseline is incomplete"):
        compare(empty, record)
    with pytest.raises(InputError, match="the candidate is incomplete"):
        compare(record, empty)


def test_a_table_that_is_not_the_records_is_refused(make: Callable[..., Record]) -> None:
    record = make(standing(N))
    assert record.results is not None
    lying = record.results.robust.model_copy(update={"value": 0.5})
    with pytest.raises(IntegrityError, match=r"says robust 0\.5"):
        compare(record, record.model_copy(update={"results": record.results.model_copy(update={"robust": lying})}))
    other = record.model_copy(update={"board": record.board.model_copy(update={"ids_sha256": "0"})})
    with pytest.raises(IntegrityError, match="one 'final' row for each sample"):
        compare(record, other)


@pytest.mark.parametrize(("n", "alpha", "says"), [(7, 0.01, "at least 8"), (40, 0.0, "alpha"), (40, 0.5, "alpha")])
def test_a_guard_that_could_not_fail_is_refused(make: Callable[..., Record], n: int, alpha: float, says: str) -> None:
    record = make(standing(N))
    with pytest.raises(InputError, match=says):
        compare(record, record, n=n, alpha=alpha)


def test_the_least_number_of_samples_is_where_losing_all_is_significant() -> None:
    for alpha in (0.05, 0.01, 0.001):
        least = next(n for n in range(1, 40) if stats.binomtest(n, n, alternative="greater").pvalue <= alpha / 2)
        require_samples(least, alpha)
        with pytest.raises(InputError):
            require_samples(least - 1, alpha)


# An unchanged stochastic defense, and what could have been seen.


def drawn(seed: int, n: int = 200, draws: int = 20, fall: float = 0.0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Scores of a defense whose samples have their own probabilities of a right answer, under one seed."""
    chances = np.random.default_rng(99).beta(0.6, 0.5, n)
    rng = np.random.default_rng(seed)
    return rng.binomial(draws, np.where(rng.random(n) < fall, 0.0, chances)) / draws


def test_an_unchanged_stochastic_defense_passes_under_twenty_other_seeds(make: Callable[..., Record]) -> None:
    before = make(drawn(0).tolist(), stochastic=True)
    for seed in range(1, 21):
        after = make(drawn(seed).tolist(), stochastic=True)
        found = compare(before, after)
        assert found.ok, found.text()
        assert number(found, "robust").fell  # under another seed something always differs
    fallen = compare(before, make(drawn(21, fall=0.3).tolist(), stochastic=True))
    assert number(fallen, "robust").significant


def test_the_false_alarms_of_an_unchanged_defense_are_as_rare_as_alpha_says() -> None:
    """At one comparison's share of alpha, over pairs of seeds: at most the share, within four standard errors."""
    from assay.statistics import paired_permutation

    level, pairs = 0.05, 200
    alarms = 0
    for seed in range(pairs):
        a, b = drawn(2 * seed, n=50), drawn(2 * seed + 1, n=50)
        alarms += bool(a.sum() > b.sum() and paired_permutation(a.tolist(), b.tolist()) / 2 <= level)
    assert alarms / pairs <= level + 4 * math.sqrt(level * (1 - level) / pairs)


@pytest.mark.parametrize("rising", [0.0, 0.05])
def test_the_detectable_drop_is_found_as_often_as_it_says(rising: float) -> None:
    """By simulation of the test that is made, whose exact power the smallest drop was computed from."""
    n, level, rng = 100, ALPHA / 2, np.random.default_rng(0)
    drop = detectable_flips(n, 0.7, rising, level)
    assert drop is not None
    falls, rises = rng.multinomial(n, [rising + drop, rising, 1 - drop - 2 * rising], size=20_000)[:, :2].T
    power = (stats.binom.sf(falls - 1, falls + rises, 0.5) <= level).mean()
    assert power == pytest.approx(POWER, abs=0.015)


def test_without_rises_the_detectable_drop_has_a_closed_form() -> None:
    drop = detectable_flips(200, 1.0, 0.0, ALPHA / 2)  # eight falls and no rise: 2 ** -8 <= 0.005
    assert drop is not None
    assert stats.binom.sf(7, 200, drop) == pytest.approx(POWER, abs=1e-6)


def test_no_drop_can_be_seen_where_too_little_stands() -> None:
    assert detectable_flips(200, 0.03, 0.0, ALPHA / 2) is None
    assert detectable_flips(8, 1.0, 0.0, ALPHA / 2) is not None
    assert detectable_shift(np.zeros(200), np.zeros(200), ALPHA / 2) is None
    assert detectable_shift(np.full(8, 0.5), np.full(8, 0.5), ALPHA / 2) is None


def test_the_detectable_shift_is_about_right() -> None:
    before, level, rng = drawn(0), ALPHA / 2, np.random.default_rng(1)
    drop = detectable_shift(before, drawn(1), level)
    assert drop is not None
    from assay.statistics import paired_permutation

    found = 0
    for seed in range(60):
        after = drawn(seed + 100)
        after[rng.random(len(after)) < drop / before.mean()] = 0.0
        found += bool(before.sum() > after.sum() and paired_permutation(before.tolist(), after.tolist()) / 2 <= level)
    assert 0.6 <= found / 60 <= 0.95


# Reports.


def test_what_else_changed_is_told(make: Callable[..., Record]) -> None:
    record = make(standing(N))
    made = record.provenance.model_copy(update={"seed": 3, "code_sha256": "x", "packages": {"torch": "9"}})
    other = record.model_copy(update={"provenance": made})
    assert compare(record, other).changed == ("assay's own code", "seed 0 -> 3", "torch absent -> 9")
    loaded = [
        record.model_copy(update={"defense": record.defense.model_copy(update={"state_sha256": state})})
        for state in (None, "a" * 64, "b" * 64)
    ]
    assert [compare(loaded[1], each).changed for each in loaded] == [(), (), ("its parameters",)]
    assert record.results is not None
    attacks = {name: each for name, each in record.results.attacks.items() if name != "square"}
    fewer = record.model_copy(update={"results": record.results.model_copy(update={"attacks": attacks})})
    assert compare(record, fewer).changed == ("attacks no longer run: square",)


def test_the_json_report_holds_every_sample(make: Callable[..., Record]) -> None:
    found = compare(make(standing(N)), make(standing(N, range(30))))
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert plain["schema"] == "assay-regression/1"
    assert plain["ok"] is False
    assert plain["n"] == N
    robust = plain["comparisons"][1]
    assert robust["significant"] is True
    assert robust["drop"] == pytest.approx(0.75)
    assert [change["id"] for change in robust["fell"]] == list(range(100, 130))
    assert "and 10 more" in found.text()


def test_the_junit_report_survives_hostile_names(make: Callable[..., Record]) -> None:
    record, fallen = make(standing(N)), make(standing(N, range(30)))
    name = '</testcase><script>&"\x00\x1b[31m\ud800'
    evil = fallen.model_copy(update={"defense": fallen.defense.model_copy(update={"name": name})})
    found = compare(record, evil)
    root = ElementTree.fromstring(found.junit())
    cases = root.findall("./testsuite/testcase")
    assert [case.get("name") for case in cases] == ["clean accuracy", "robust accuracy", "verdict"]
    assert [case.find("failure") is not None for case in cases] == [False, True, False]
    assert root.find("testsuite").attrib["failures"] == "1"  # type: ignore[union-attr]
    assert "</testcase><script>" in str(cases[0].get("classname"))
    assert not [char for char in found.text() if char < " " and char != "\n"]


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    import typer

    from assay import cli

    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli_regress.add_to(app)
    patched = pytest.MonkeyPatch()
    patched.setattr(cli, "app", app)
    try:
        with pytest.raises(SystemExit) as leaving:
            cli.main(["regress", *map(str, arguments)])
    finally:
        patched.undo()
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err


def folder_of(record: Record) -> Path:
    folder = record._origin.folder
    assert folder is not None
    return folder


def test_the_command_tells_by_its_exit_code(
    make: Callable[..., Record], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before, after = folder_of(make(standing(N))), folder_of(make(standing(N, range(10))))
    code, out, _ = run(capsys, before, before)
    assert (code, "ok: no drop" in out) == (0, True)
    code, out, _ = run(capsys, before, after, "--json", tmp_path / "r.json", "--junit", tmp_path / "r.xml")
    assert code == 1
    assert "REGRESSED: robust accuracy fell by 25.0 points, p = 0.00098 <= 0.005" in out
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is False
    assert b"<failure" in (tmp_path / "r.xml").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--n", "5"), "at least 8"),
        (("--alpha", "0"), "alpha must lie"),
        (("--defense", "trades"), "--defense is for a rerun"),
        (("--seed", "3"), "--seed is for a rerun"),
        (("--json", "/nowhere/r.json"), "can't be written"),
    ],
)
def test_bad_arguments_are_told(
    make: Callable[..., Record], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    before = folder_of(make(standing(N)))
    code, _, err = run(capsys, before, before, *arguments)
    assert code == 2
    assert says in err


def test_neither_a_changed_file_nor_a_crash_reads_as_a_drop(
    make: Callable[..., Record], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = folder_of(make(standing(N))), folder_of(make(standing(N)))
    (after / SAMPLES).write_bytes(b"")
    code, _, err = run(capsys, before, after)
    assert (code, "IntegrityError" in err) == (2, True)

    def crash(*arguments: object, **names: object) -> None:
        raise RuntimeError("out of paper")

    monkeypatch.setattr("assay.regress.compare", crash)
    code, _, err = run(capsys, before, before)
    assert (code, "RuntimeError: out of paper" in err) == (2, True)


def test_the_commands_alpha_is_the_librarys() -> None:
    assert cli_regress._ALPHA == ALPHA


# A record's own table.


def test_a_record_read_from_disk_knows_its_samples(make: Callable[..., Record], tmp_path: Path) -> None:
    record = make(standing(N, range(10)))
    frame = record.to_frame()
    assert frame[frame["attack"] == "final"]["expected"].tolist() == standing(N, range(10))
    folder = folder_of(record)
    assert read_record(folder / RECORD).to_frame().equals(frame)
    assert "origin" not in json.dumps(record.as_json())
    unread = Record.model_validate_json((folder / RECORD).read_text())
    assert unread == record
    with pytest.raises(InputError, match="not read from disk"):
        unread.to_frame()
    (folder / SAMPLES).write_bytes(b"")
    with pytest.raises(IntegrityError, match=SAMPLES):
        record.to_frame()
    with pytest.raises(InputError, match="measured no samples"):
        make(standing(N), results=None, files={}).to_frame()
