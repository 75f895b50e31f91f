"""Records computed again: the honest pass, and whatever was changed in one is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save
from typer.testing import CliRunner

from assay import protocol
from assay.certification import estimate
from assay.defense import Defense, DefenseSpec
from assay.digest import sha256_of_file, sha256_of_json
from assay.errors import InputError
from assay.record import BUNDLE, COUNTS, RECORD, SAMPLES, Record, read_record, write_record
from assay.reduce import outcome_of, parquet_bytes
from assay.registry import DEFENSES
from assay.rescore import LEVEL, agreement, discoveries, fewer
from assay.verify import Report, verify_record

DRAWS = 20
WHOLE = protocol.PROTOCOLS["2026.1"]


class Here:
    """The registered defenses of these tests, which can be made others."""

    def __init__(self, zoo: ModuleType) -> None:
        self.zoo = zoo
        self.models: dict[str, Defense] = {
            "toy-sure": zoo.Linear("toy-sure"),
            "toy-doubting": zoo.Abstaining(0.25, "toy-doubting"),
            "toy-smooth": zoo.SmoothedLinear("toy-smooth"),
        }


@pytest.fixture(scope="module")
def few(toy_run: Path) -> Iterator[None]:
    """A protocol that asks little, so that a run takes a second; `toy_run`, which others share, is made before."""
    with pytest.MonkeyPatch.context() as patch:
        asked = replace(protocol.PROTOCOLS["2026.1"], checks=("interface",))
        patch.setitem(protocol.PROTOCOLS, "2026.1", asked)  # type: ignore[arg-type]
        yield


@pytest.fixture(scope="module")
def registered(zoo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    here = Here(zoo)
    weights = tmp_path_factory.mktemp("weights") / "toy.bin"
    weights.write_bytes(b"the weights")
    here.weights = weights  # type: ignore[attr-defined]
    for name, model in here.models.items():
        DEFENSES._entries[name] = DefenseSpec(
            model.card, lambda dataset, name=name: here.models[name], weight_files=lambda dataset: {"toy.bin": weights}
        )
    yield here
    for name in here.models:
        del DEFENSES._entries[name]


@pytest.fixture(scope="module")
def folder(zoo: ModuleType, few: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaderboards folder with two toy boards and no record."""
    folder = tmp_path_factory.mktemp("leaderboards")
    (folder / "boards").mkdir()
    zoo.write_board(folder / "boards", zoo.board(n=30, draws=DRAWS))
    ball = zoo.board(n=10, name="ball", norm="l2", eps="1/2", radii=("1/4", "1/2"))
    path = zoo.write_board(folder / "boards", ball)
    path.write_text(path.read_text() + 'radii = ["1/4", "1/2"]\n')
    return folder


def run_on(folder: Path, name: str, board: str, out: Path, *attacks: str) -> Path:
    from assay.evaluation import execute
    from assay.prepare import prepare

    path = str(folder / "boards" / f"{board}.toml")
    execute(prepare(name, path, only=attacks, certify_only=not attacks), out)
    return out


@pytest.fixture(scope="module")
def sure(folder: Path, registered: Here, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sure") / "run"
    return run_on(folder, "toy-sure", "toy", out, "uniform", "apgd-ce")


@pytest.fixture(scope="module")
def doubting(folder: Path, registered: Here, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on(folder, "toy-doubting", "toy", tmp_path_factory.mktemp("doubting") / "run", "uniform")


@pytest.fixture(scope="module")
def smooth(folder: Path, registered: Here, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on(folder, "toy-smooth", "ball", tmp_path_factory.mktemp("smooth") / "run")


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    def made(run: Path) -> Path:
        target = tmp_path / "copy"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run, target)
        return target

    return made


def statuses(report: Report) -> dict[str, str]:
    return {item.name: item.status for item in report.items}


def failed(report: Report) -> dict[str, str]:
    return {item.name: item.message for item in report.items if item.status == "failed"}


def forge(run: Path, change: Callable[[pd.DataFrame], object] | None = None, **update: Any) -> None:
    """Changes a record as somebody would who knows how it is made: every digest is computed again."""
    record, table = read_record(run), pd.read_parquet(run / SAMPLES)
    if change is not None:
        change(table)
        (run / SAMPLES).write_bytes(parquet_bytes(table))
        record = recounted(record, table)
    files = {name: sha256_of_file(run / name) for name in record.files}
    write_record(record.model_copy(update={"files": files, **update}).sealed(outcome_of(table)), run / RECORD)


def recounted(record: Record, table: pd.DataFrame) -> Record:
    """The record with the results that follow from a table of a deterministic defense."""
    assert record.results is not None
    stages: dict[Any, pd.DataFrame] = dict(iter(table.groupby("attack", sort=False)))

    def share(stage: str) -> dict[str, Any]:
        return estimate(stages[stage]["expected"].to_numpy(np.float64)).model_dump()

    attacks = {}
    for name, result in record.results.attacks.items():
        rows = stages[name]
        fell = int((rows["attempted"] & (rows["correct_draws"] == 0)).sum())
        attacks[name] = result.model_copy(
            update={**share(name), "attempted": int(rows["attempted"].sum()), "broken": fell}
        )
    final, clean = estimate(stages["final"]["expected"].to_numpy()), estimate(stages["clean"]["expected"].to_numpy())
    noise = estimate(stages["uniform"]["expected"].to_numpy())
    one = record.results.rules.expected.model_copy(update={**final.model_dump(), "clean": clean, "noise": noise})
    rules = record.results.rules.model_copy(update={"expected": one, "worst_of_n": one, "majority": one})
    update = {"attacks": attacks, "robust": final, "clean": clean, "rules": rules}
    return record.model_copy(update={"results": record.results.model_copy(update=update)})


# What passes


@pytest.mark.parametrize("name", ["sure", "doubting", "smooth"])
def test_an_honest_record_passes(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    report = verify_record(request.getfixturevalue(name), leaderboards=folder)
    assert failed(report) == {}
    assert report.ok
    assert "skipped" not in statuses(report).values()
    wanted = {"results", "examples", "scores"} if name != "smooth" else {"certified"}
    assert wanted <= set(statuses(report))


def test_a_complete_record_of_somebodys_code_passes(
    zoo: ModuleType, toy_source: str, toy_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "boards").mkdir()
    zoo.write_board(tmp_path / "boards", zoo.board(source=toy_source))
    with pytest.MonkeyPatch.context() as patch:
        # The other fixtures of this file may have asked for less.
        patch.setitem(protocol.PROTOCOLS, "2026.1", WHOLE)  # type: ignore[arg-type]
        report = verify_record(toy_run, leaderboards=tmp_path, trust=True)
        assert failed(report) == {}
        assert statuses(report)["scores"] == "ok"
        # Without trust its code is not executed, and that is said.
        untrusted = next(item for item in verify_record(toy_run, leaderboards=tmp_path).items if item.name == "scores")
    assert untrusted.status == "skipped"
    assert "--trust" in untrusted.message


def test_an_honest_stochastic_record_passes_whatever_the_draws(doubting: Path, folder: Path) -> None:
    for seed in range(20):
        report = verify_record(doubting, leaderboards=folder, seed=seed)
        assert report.ok, failed(report)


def test_no_call_is_made_beyond_one_answer_a_draw(
    doubting: Path, sure: Path, folder: Path, registered: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for name, run, expected in (("toy-doubting", doubting, 30 * DRAWS), ("toy-sure", sure, 30)):
        model = registered.models[name]
        draw = type(model).draw
        monkeypatch.setattr(model, "draw", lambda x, noise, m=model, d=draw: (seen.append(len(x)), d(m, x, noise))[1])
        seen.clear()
        verify_record(run, leaderboards=folder)
        assert sum(seen) == expected
        seen.clear()
        report = verify_record(run, leaderboards=folder, defense=False)
        assert sum(seen) == 0
        assert report.ok
        assert statuses(report)["scores"] == "skipped"


# What was changed


@pytest.mark.parametrize("where", [0.0, 0.13, 0.37, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("file", [RECORD, SAMPLES, BUNDLE, COUNTS])
def test_one_flipped_bit_is_seen(
    file: str, where: float, sure: Path, smooth: Path, folder: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(smooth if file == COUNTS else sure)
    content = bytearray((run / file).read_bytes())
    content[round(where * (len(content) - 1))] ^= 1 << 4
    (run / file).write_bytes(content)
    report = verify_record(run, leaderboards=folder)
    assert not report.ok
    assert set(failed(report)) == {"record" if file == RECORD else "files"}
    assert "scores" not in failed(report)


@pytest.mark.parametrize("file", [SAMPLES, BUNDLE])
def test_a_missing_file_and_a_link_are_seen(
    file: str, sure: Path, folder: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    run = copy(sure)
    (run / file).rename(tmp_path / "elsewhere")
    assert "is missing" in failed(verify_record(run, leaderboards=folder))["files"]
    (run / file).symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in failed(verify_record(run, leaderboards=folder))["files"]


def plain(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edits record.json and computes its own digest again."""
    found = json.loads((run / RECORD).read_text())
    change(found)
    found["digest"] = sha256_of_json({key: value for key, value in found.items() if key != "digest"})
    (run / RECORD).write_text(json.dumps(found))


TRICKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a file elsewhere": (lambda r: r["files"].update({"../../etc/passwd": "0" * 64}), "record"),
    "a board elsewhere": (lambda r: r["board"].update(name="../../boards/toy"), "record"),
    "an unknown field": (lambda r: r.update(extra=1), "record"),
    "no accuracy": (lambda r: r["results"]["robust"].update(value=1.5), "record"),
    "another board": (lambda r: r["board"].update(name="nowhere"), "board"),
    "other ids": (lambda r: r["board"].update(n=29), "board"),
    "another ball": (lambda r: r["board"]["threat"].update(eps="1/5"), "board"),
    "fewer draws": (lambda r: r["board"].update(draws=10), "board"),
    "another protocol": (lambda r: r["protocol"].update(digest="0" * 64), "protocol"),
    "an unknown protocol": (lambda r: r["protocol"].update(id="1999.1"), "protocol"),
    "nothing mandatory": (lambda r: r["protocol"].update(mandatory=["uniform"]), "verdict"),
    "nothing missing": (lambda r: r["protocol"].update(missing={}), "verdict"),
    "another verdict": (lambda r: r.update(verdict="verified"), "verdict"),
    "a trait less": (lambda r: r["defense"]["card"]["traits"].update(purifies=True), "verdict"),
    "fewer steps": (lambda r: r["results"]["attacks"]["apgd-ce"]["options"].update(steps=1), "verdict"),
    "no bundle": (lambda r: r["files"].pop(BUNDLE), "files"),
    "raised": (lambda r: r["results"]["robust"].update(value=0.9), "results"),
    "a narrow interval": (lambda r: r["results"]["clean"].update(low=0.96), "results"),
    "an attack raised": (lambda r: r["results"]["attacks"]["uniform"].update(value=0.99), "results"),
    "fewer broken": (lambda r: r["results"]["attacks"]["apgd-ce"].update(broken=0), "results"),
    "another vote": (lambda r: r["results"]["rules"]["majority"].update(value=1.0), "results"),
    "another commit's seed": (lambda r: r["provenance"].update(seed=5), "results"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_record_that_was_resealed_after_a_change_is_seen(
    trick: str, sure: Path, folder: Path, copy: Callable[[Path], Path]
) -> None:
    change, item = TRICKS[trick]
    run = copy(sure)
    plain(run, change)
    report = verify_record(run, leaderboards=folder)
    assert item in failed(report), report
    assert len(failed(report)[item]) < 900


def test_text_that_no_parser_survives_is_one_failed_item(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe\x00", b"[" * 200_000, b"{}", b"null", b'{"schema": NaN}'):
        (tmp_path / RECORD).write_bytes(content)
        report = verify_record(tmp_path)
        assert set(failed(report)) == {"record"}
    with pytest.raises(InputError, match="no record at"):
        verify_record(tmp_path / "nowhere")


def raise_table(table: pd.DataFrame) -> None:
    """Lets all samples that fell hold."""
    table["attempted"] = True
    table["correct_draws"] = 1
    for rule in ("clean", "expected", "worst_of_n", "majority"):
        table[rule] = 1.0


def test_a_table_raised_with_its_results_is_caught_by_the_examples(
    sure: Path, folder: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(sure)
    forge(run, raise_table)
    report = verify_record(run, leaderboards=folder)
    assert set(failed(report)) == {"scores"}
    assert "held in the record and fall here" in failed(report)["scores"]
    # What can't be answered is not claimed to be right.
    assert statuses(verify_record(run, leaderboards=folder, defense=False))["scores"] == "skipped"


CONTRADICTIONS: dict[str, Callable[[pd.DataFrame], object]] = {
    "ids": lambda t: t.__setitem__("id", t["id"] + 1),
    "labels": lambda t: t.__setitem__("label", (t["label"] + 1) % 10),
    "draws": lambda t: t.__setitem__("draws", 2),
    "score without count": lambda t: t.__setitem__("expected", 1.0),
    "fallen come back": lambda t: t.__setitem__("attempted", True),
    "norm": lambda t: t.__setitem__("norm", t["norm"] + 0.05),
    "vote": lambda t: t.__setitem__("majority", 1.0),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_table_that_contradicts_itself_is_seen(
    what: str, sure: Path, folder: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(sure)
    forge(run, CONTRADICTIONS[what])
    assert set(failed(verify_record(run, leaderboards=folder))) <= {"results", "examples"}
    assert "results" in failed(verify_record(run, leaderboards=folder))


def change_examples(run: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = {name: value.copy() for name, value in load_file(run / BUNDLE).items()}
    change(tensors)
    (run / BUNDLE).write_bytes(save(tensors))
    forge(run)


def test_an_example_a_millionth_outside_is_seen(
    sure: Path, folder: Path, copy: Callable[[Path], Path], zoo: ModuleType
) -> None:
    from assay import data

    ids = load_file(sure / BUNDLE)["id"].tolist()
    x = data.load("digits", ids)[0].numpy()
    row, pixel = 4, np.unravel_index(np.abs(x[4] - 0.5).argmin(), x[4].shape)
    for by, ok in ((0.1 + 1e-6, False), (0.1, True)):
        run = copy(sure)
        change_examples(run, lambda t, by=by: t["x_adv"].__setitem__((row, *pixel), np.float32(x[row][pixel] + by)))
        report = verify_record(run, leaderboards=folder, defense=False)
        told = failed(report).get("examples", "")
        assert ("outside the ball" in told) is not ok
        assert ok or f"sample {ids[row]}:" in told


EXAMPLES: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "not finite": (lambda t: t["x_adv"].__setitem__((0, 0, 0, 0), np.nan), "not finite"),
    "out of the box": (lambda t: t["x_adv"].__setitem__((0, 0, 0, 0), -1e-6), "outside the box"),
    "another order": (lambda t: t.update(id=t["id"][::-1].copy()), "in the board's order"),
    "one left out": (lambda t: t.update(id=t["id"][1:], x_adv=t["x_adv"][1:]), "in the board's order"),
    "another defense's ids": (lambda t: t.update(id=t["id"] + 1), "not among the record's 30 samples"),
    "another tensor": (lambda t: t.update(more=np.zeros(1)), "expected exactly"),
    "another dtype": (lambda t: t.update(x_adv=t["x_adv"].astype(np.float64)), "expected F32"),
    "the images themselves": (lambda t: t.update(x_adv=np.zeros_like(t["x_adv"])), "outside the ball"),
}  # fmt: skip


@pytest.mark.parametrize("what", EXAMPLES)
def test_examples_that_are_none_are_seen(what: str, sure: Path, folder: Path, copy: Callable[[Path], Path]) -> None:
    change, says = EXAMPLES[what]
    run = copy(sure)
    change_examples(run, change)
    assert says in failed(verify_record(run, leaderboards=folder, defense=False))["examples"]


def test_certified_examples_outside_their_radius_and_other_labels_are_seen(
    smooth: Path, folder: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(smooth)
    kept = {name: value.copy() for name, value in load_file(run / COUNTS).items()}
    kept["label"] = (kept["label"] + 1) % 10
    (run / COUNTS).write_bytes(save(kept))
    record = read_record(run)
    write_record(record.model_copy(update={"files": {COUNTS: sha256_of_file(run / COUNTS)}}).sealed(None), run / RECORD)
    assert "not those of the board's samples" in failed(verify_record(run, leaderboards=folder))["certified"]


# The defense at hand


@pytest.mark.parametrize(("q", "caught"), [(0.25, False), (0.4, True), (0.1, True), (0.0, True)])
def test_a_defense_made_weaker_or_stronger_is_caught(
    q: float, caught: bool, doubting: Path, folder: Path, registered: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registered.models, "toy-doubting", registered.zoo.Abstaining(q, "toy-doubting"))
    report = verify_record(doubting, leaderboards=folder)
    assert ("scores" in failed(report)) is caught
    assert not caught or "more than chance allows" in failed(report)["scores"]


def test_one_changed_weight_that_changes_an_outcome_is_caught(
    sure: Path, folder: Path, registered: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = registered.zoo.Linear("toy-sure")
    changed.bias[3] += 3
    monkeypatch.setitem(registered.models, "toy-sure", changed)
    assert (
        "stored outcomes are not what the defense answers" in failed(verify_record(sure, leaderboards=folder))["scores"]
    )


def test_other_parameters_are_said_beside_the_scores(
    sure: Path, folder: Path, registered: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "its parameters have another digest than the record's"
    assert says not in verify_record(sure, leaderboards=folder).items[-1].message
    changed = registered.zoo.Linear("toy-sure")
    changed.weight *= 1 + 1e-6
    monkeypatch.setitem(registered.models, "toy-sure", changed)
    item = verify_record(sure, leaderboards=folder).items[-1]
    assert (item.name, item.status) == ("scores", "ok")
    assert says in item.message


def test_other_weights_are_skipped_with_the_reason(sure: Path, folder: Path, registered: Here) -> None:
    weights: Path = registered.weights  # type: ignore[attr-defined]
    try:
        for content, says in (
            (b"others", "other weights here than the record's: toy.bin"),
            (None, "can't be had here"),
        ):
            weights.write_bytes(content) if content else weights.unlink()
            item = verify_record(sure, leaderboards=folder).items[-1]
            assert (item.name, item.status) == ("scores", "skipped")
            assert says in item.message
    finally:
        weights.write_bytes(b"the weights")


def test_a_card_that_hides_a_trait_is_seen(
    sure: Path, folder: Path, registered: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = registered.zoo.Linear("toy-sure", traits=registered.zoo.Traits(non_differentiable=True))
    monkeypatch.setitem(registered.models, "toy-sure", other)
    assert "declares the traits non_differentiable here" in failed(verify_record(sure, leaderboards=folder))["scores"]


# The tests behind the scores


def test_the_agreement_of_honest_counts_is_rejected_no_more_often_than_it_says() -> None:
    generator = np.random.default_rng(0)
    found = np.array([
        agreement(*(generator.binomial(20, p) for _ in range(2)), 20)
        for p in generator.choice([0.0, 0.05, 0.5, 0.8, 0.97, 1.0], size=(2000, 40))
    ])  # fmt: skip
    for level in (0.5, 0.1, 0.02):
        for column in found.T:
            assert (column <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / 2000)
    # The sum's is not far from what it could be; a test that never rejects would pass above.
    assert (found[:, 0] <= 0.1).mean() > 0.05
    assert agreement(np.full(5, 20), np.full(5, 20), 20) == (1.0, 1.0)


def test_agreement_sees_a_shift_of_all_and_a_jump_of_one() -> None:
    generator = np.random.default_rng(1)
    p = generator.uniform(0.3, 0.9, 200)
    stored = generator.binomial(20, p)
    together, _ = agreement(stored, generator.binomial(20, p - 0.08), 20)
    assert together < LEVEL / 2
    jumped = stored.copy()
    jumped[:2] = 20, 0
    together, each = agreement(jumped, np.where(np.arange(200) < 2, 20 - jumped, stored), 20)
    assert together > 0.1
    assert each < LEVEL / 2


def test_chance_lowers_hardly_anything() -> None:
    generator = np.random.default_rng(2)
    lowered = [
        discoveries(fewer(generator.binomial(20, p), generator.binomial(20, p), 20), 0.01).any()
        for p in generator.uniform(0, 1, (1000, 200))
    ]
    assert np.mean(lowered) <= 0.02
    truly = np.where(np.arange(200) < 50, 0.0, 0.6)
    found = discoveries(fewer(generator.binomial(20, np.full(200, 0.6)), generator.binomial(20, truly), 20), 0.01)
    assert found[:50].sum() >= 45
    assert found[50:].sum() <= 3


# The command


@pytest.fixture(scope="module")
def command() -> Callable[..., Any]:
    import typer

    from assay.cli_verify import add_to

    app = typer.Typer()
    add_to(app)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_command_reports_and_exits(
    command: Callable[..., Any], sure: Path, doubting: Path, folder: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    good = command("verify", sure, "--leaderboards", folder, "--threads", 1)
    assert good.exit_code == 0, good.output
    assert "all 30 stored outcomes again" in good.stdout
    assert "1 record: 1 ok, 0 failed" in good.stdout
    bad = copy(doubting)
    (bad / SAMPLES).write_bytes(b"")
    mixed = command("verify", tmp_path, sure, "--leaderboards", folder, "--threads", 1, "--no-defense")
    assert mixed.exit_code == 1
    assert "samples.parquet was changed" in mixed.stdout.replace("\n", " ")
    assert "2 records: 1 ok, 1 failed" in mixed.stdout
    told = json.loads(command("verify", bad, "--leaderboards", folder, "--json", "--threads", 1).stdout)
    assert told[0]["ok"] is False
    assert {item["status"] for item in told[0]["items"]} == {"ok", "failed", "skipped"}
    for words in ((tmp_path / "nowhere",), (folder / "boards",), (sure, "--leaderboards", tmp_path)):
        assert isinstance(command("verify", *words).exception, InputError)


def test_a_records_own_words_steer_no_terminal(
    command: Callable[..., Any], sure: Path, folder: Path, copy: Callable[[Path], Path]
) -> None:
    run = copy(sure)
    named = read_record(run).defense.model_copy(update={"name": "\x1b[2J[red]<script>alert(1)</script>"})
    forge(run, defense=named)
    done = command("verify", run, "--leaderboards", folder, "--threads", 1)
    assert "\x1b[2J" not in done.stdout
    assert "[2J[red]<script>" in "".join(done.stdout.split())
