"""A whole run, from names to a record: resume, refusal, and nothing lost to a crash."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from assay import data
from assay.card import Traits
from assay.defense import DefenseSpec
from assay.errors import DefenseError, InputError, IntegrityError
from assay.evaluation import execute
from assay.prepare import Prepared, prepare
from assay.record import BUNDLE, RECORD, SAMPLES, Record, read_record
from assay.registry import DEFENSES
from assay.reporter import Silent
from assay.rundir import RunDir

ZOO = Path(__file__).with_name("defense_zoo.py")
FEW_CHECKS = ("interface", "modes")
FAST = ("uniform", "apgd-ce", "pgd", "apgd-t", "square")


@pytest.fixture
def ready(zoo: ModuleType) -> Callable[..., Prepared]:
    """`prepare` on the toy board: `ready("LINEAR", eps="1/10", seed=3)`."""

    def make(name: str, *, only: tuple[str, ...] = FAST, seed: int = 0, n: int | None = None, **board: Any) -> Prepared:
        prepared = prepare(f"{ZOO}:{name}", zoo.board(**board), trust=True, only=only, seed=seed, n=n)
        # All checks are run in test_examination: here a few stand for them, so that much can be interrupted.
        return replace(prepared, job=replace(prepared.job, checks=FEW_CHECKS))

    return make


def timeless(record: Record) -> dict[str, Any]:
    """All of a record's fields but those that a clock or a commit meanwhile writes."""
    incidental = ("seconds", "started", "finished", "digest", "commit", "dirty")

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in incidental}
        return [strip(item) for item in value] if isinstance(value, list) else value

    plain: dict[str, Any] = strip(record.as_json())
    del plain["files"][SAMPLES]  # it holds the seconds of each sample
    plain["protocol"]["digest"] = record.protocol.digest
    return plain


def assert_same_outcome(found: Path, expected: Path) -> None:
    a, b = read_record(found, files=True), read_record(expected, files=True)
    assert a.outcome_sha256 == b.outcome_sha256
    assert timeless(a) == timeless(b)
    assert (found / BUNDLE).read_bytes() == (expected / BUNDLE).read_bytes()


# What a run measures.


def test_a_linear_model_given_as_a_file_measures_its_closed_form(
    ready: Callable[..., Prepared], zoo: ModuleType, tmp_path: Path
) -> None:
    record = execute(ready("LINEAR", n=40), tmp_path / "run")
    x, y = data.load("digits", zoo.board().ids)
    assert record.results is not None
    assert record.results.robust.value == zoo.linf_robust(x, y, 0.1).mean()
    assert record.results.clean.value == zoo.linf_robust(x, y, 0.0).mean()
    assert record.verdict == "incomplete"
    assert set(record.protocol.missing) == {"transfer", "autoattack"}
    assert set(record.results.attacks) == set(FAST)
    assert record.defense.name == f"{ZOO}:LINEAR"
    assert record.defense.source_sha256 is not None
    assert [f.status for f in record.findings] == ["pass"] * 2
    assert read_record(tmp_path / "run", files=True) == record
    assert not list((tmp_path / "run" / "shards").glob("*.part"))


@pytest.mark.slow
def test_the_whole_protocol_on_a_linear_model(zoo: ModuleType, toy_source: str, tmp_path: Path) -> None:
    prepared = prepare(f"{ZOO}:LINEAR", zoo.board(source=toy_source, n=50), trust=True)
    record = execute(prepared, tmp_path / "run")
    assert record.verdict == "verified"
    assert record.results is not None
    assert record.results.robust.value == zoo.linf_robust(*data.load("digits", zoo.board(n=50).ids), 0.1).mean()
    assert set(record.results.attacks) == set(record.protocol.mandatory)
    assert "autoattack" in record.results.attacks


def test_a_stochastic_toy_passes_the_whole_quick_protocol(toy_run: Path, zoo: ModuleType) -> None:
    record = read_record(toy_run, files=True)
    assert record.verdict == "verified"
    assert record.results is not None
    assert set(record.results.attacks) == {"uniform", "transfer", "apgd-ce", "pgd", "apgd-t", "square"}
    robust = zoo.linf_robust(*data.load("digits", zoo.board().ids), 0.1).mean()
    error = (0.25 * 0.75 * robust / 20 / 40) ** 0.5
    assert abs(record.results.robust.value - 0.75 * robust) < 4 * error


def test_the_same_run_twice_is_the_same_to_the_last_bit(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    for name in ("a", "b"):
        execute(ready("ABSTAINING", only=("uniform", "pgd")), tmp_path / name)
    assert_same_outcome(tmp_path / "a", tmp_path / "b")
    execute(ready("ABSTAINING", only=("uniform", "pgd"), seed=1), tmp_path / "c")
    assert read_record(tmp_path / "c").outcome_sha256 != read_record(tmp_path / "a").outcome_sha256


def test_running_again_returns_the_record_that_is_there(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    first = execute(ready("LINEAR", only=("uniform",)), tmp_path)
    assert execute(ready("LINEAR", only=("uniform",)), tmp_path) == first
    (tmp_path / SAMPLES).write_bytes(b"")
    with pytest.raises(IntegrityError, match=SAMPLES):
        execute(ready("LINEAR", only=("uniform",)), tmp_path)


# Defenses that break the rules, or break down.


@pytest.mark.parametrize(("name", "says"), [("CRASH", "out of paper"), ("SHAPE", "(16, 9)"), ("NAN", "NaN")])
def test_a_defense_that_breaks_its_interface_gets_a_failed_record(
    ready: Callable[..., Prepared], tmp_path: Path, name: str, says: str
) -> None:
    prepared = ready(name)
    record = execute(prepared, tmp_path)
    assert record.verdict == "failed"
    assert record.results is None
    (finding,) = record.findings
    assert finding.check == "interface"
    assert says in finding.message
    assert finding.samples == prepared.job.ids[:16]
    assert record == read_record(tmp_path, files=True)
    assert not record.ranked


@pytest.mark.parametrize(("name", "says"), [("LATE_CRASH", "out of paper"), ("LATE_NAN", "not finite")])
def test_a_defense_that_breaks_down_midway_keeps_what_was_done(
    ready: Callable[..., Prepared], tmp_path: Path, name: str, says: str
) -> None:
    with pytest.raises(DefenseError, match=says) as error:
        execute(ready(name), tmp_path)
    assert set(error.value.sample_ids) <= set(ready(name).job.ids[:15])
    assert f"samples {error.value.sample_ids[0]}" in str(error.value)
    assert [path.name for path in (tmp_path / "shards").glob("*.part")] == ["0000.clean.part"]
    assert not (tmp_path / RECORD).exists()
    again = ready(name)
    again.job.defense.fault = None  # type: ignore[assignment]
    assert execute(again, tmp_path).results is not None


# Refusals before anything runs.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": 0}, "1 to 40"),
        ({"n": 41}, "1 to 40"),
        ({"only": ("apgd",)}, "Did you mean"),
        ({"revision": "sklearn-digits:0"}, "revision"),
        ({"dataset": "digit"}, "Did you mean 'digits'"),
        ({"protocol": "2025.1"}, "2026.1"),
        ({"name_": "FEW_CLASSES"}, "5 classes"),
        ({"name_": "LINER"}, "LINEAR"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_what_the_caller_can_correct_is_refused(zoo: ModuleType, change: dict[str, Any], says: str) -> None:
    options = {key: change.pop(key) for key in ("n", "only", "device") if key in change}
    name = change.pop("name_", "LINEAR")
    sizes = {"ids": data.board_ids("digits")[:40]}
    with pytest.raises(InputError) as error:
        prepare(f"{ZOO}:{name}", zoo.board(**{**sizes, **change}), trust=True, **options)
    assert says in str(error.value)


def test_only_the_registered_source_is_exempt_from_its_own_transfer(zoo: ModuleType, toy_source: str) -> None:
    board = zoo.board(source=toy_source)
    assert "transfer" not in {attack.name for attack in prepare(toy_source, board).mandatory}
    namesake = prepare(f"{ZOO}:NAMESAKE", board, trust=True)
    assert namesake.spec.card.name == DEFENSES[toy_source].card.name == toy_source
    assert "transfer" in {attack.name for attack in namesake.mandatory}


def test_foreign_code_needs_a_word(zoo: ModuleType) -> None:
    with pytest.raises(InputError, match="--trust"):
        prepare(f"{ZOO}:LINEAR", zoo.board())


# A changed plan, a damaged folder.


class Stop(BaseException):
    """What a test throws where a machine would lose its power: no handler of ordinary errors sees it."""


def interrupt(prepared: Prepared, folder: Path, *, after: int = 10**9, at: tuple[int, str] | None = None) -> bool:
    """Runs until the `after`th event, or until a stage begins; whether it got that far.

    An event is a report, or a moment before or after a file is written or removed.
    """
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events > after:
            raise Stop

    class Reporter(Silent):
        def begin(self, shard: int, stage: str, samples: int) -> None:
            event()
            if (shard, stage) == at:
                raise Stop

        def calls(self, count: int) -> None:
            event()

        def end(self, shard: int, stage: str) -> None:
            event()

    replaced, unlinked = Path.replace, Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        # The half-written file, and the moments before and after it gets its name.
        patch.setattr(Path, "replace", lambda self, to: (event(), replaced(self, to), event())[1])
        patch.setattr(Path, "unlink", lambda self, **given: (event(), unlinked(self, **given))[1])
        try:
            execute(prepared, folder, reporter=Reporter())
        except Stop:
            return True
    return False


@pytest.fixture
def half(ready: Callable[..., Prepared], tmp_path: Path) -> Path:
    """A run interrupted in its second shard."""
    folder = tmp_path / "half"
    assert interrupt(ready("ABSTAINING", only=("uniform", "pgd")), folder, at=(1, "pgd"))
    names = {path.name for path in (folder / "shards").iterdir() if not path.name.startswith(".")}
    assert "0000.safetensors" in names
    assert any(name.endswith(".part") for name in names)
    return folder


def test_a_resume_with_another_plan_is_refused_with_the_difference(
    ready: Callable[..., Prepared], half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(says: str, prepared: Prepared | None = None, **changes: Any) -> None:
        with pytest.raises(InputError) as error:
            execute(prepared or ready("ABSTAINING", only=("uniform", "pgd"), **changes), half)
        assert says in str(error.value)

    refused("seed: 0 -> 1", seed=1)
    refused("board.threat.eps", eps="1/5")
    refused("board.draws: 20 -> 30", draws=30)
    refused("shard: 15 -> 20", shard=20)
    refused("board.n: 40 -> 30", n=30)
    refused("attacks.square: null", prepared=ready("ABSTAINING", only=("uniform", "pgd", "square")))
    refused("protocol.profile", prepared=replace(ready("ABSTAINING", only=("uniform", "pgd")), profile="standard"))
    refused("defense.card.name", prepared=ready("SLOW", only=("uniform", "pgd")))
    monkeypatch.setattr("assay.provenance.code_sha256", lambda: "0" * 64)
    refused("code_sha256")


def test_a_resume_with_other_weights_or_source_is_refused(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, weights = tmp_path / "mine.py", tmp_path / "mine.pt"
    shutil.copy(ZOO, source)
    torch.save(zoo.LINEAR.weight, weights)
    monkeypatch.setenv(zoo.WEIGHTS, str(weights))

    def go() -> Record:
        prepared = prepare(f"{source}:LINEAR", zoo.board(), trust=True, only=("uniform",))
        return execute(prepared, tmp_path / "run")

    go()
    go()
    torch.save(zoo.LINEAR.weight * 1.01, weights)
    with pytest.raises(InputError, match="state_sha256"):
        go()
    torch.save(zoo.LINEAR.weight, weights)
    go()
    source.write_text(source.read_text() + "\n# Another line.\n")
    with pytest.raises(InputError, match="source_sha256"):
        go()


def test_a_resume_with_another_transfer_source_is_refused(
    zoo: ModuleType, toy_source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go() -> Record:
        prepared = prepare(f"{ZOO}:LINEAR", zoo.board(source=toy_source), trust=True, only=("transfer",))
        return execute(prepared, tmp_path / "run")

    go()
    retrained = zoo.Linear("toy-source")
    retrained.weight *= 1.01
    monkeypatch.setitem(DEFENSES._entries, toy_source, DefenseSpec(retrained.card, lambda dataset: retrained))
    with pytest.raises(InputError, match="transfer_source"):
        go()


@pytest.mark.parametrize("which", ["0000.safetensors", "0001.clean.part"])
@pytest.mark.parametrize("damage", ["truncated", "edited", "foreign"])
def test_a_damaged_file_of_a_run_is_named(
    ready: Callable[..., Prepared], half: Path, tmp_path: Path, which: str, damage: str
) -> None:
    file = half / "shards" / which
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "edited":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        other = tmp_path / "other"
        assert interrupt(ready("ABSTAINING", only=("uniform", "pgd"), seed=9), other, at=(1, "pgd"))
        shutil.copy(other / "shards" / which, file)
    with pytest.raises(IntegrityError, match=which):
        execute(ready("ABSTAINING", only=("uniform", "pgd")), half)
    file.unlink()  # as the message advises
    assert execute(ready("ABSTAINING", only=("uniform", "pgd")), half).results is not None


def test_a_folder_in_use_is_refused(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = ready("LINEAR", only=("uniform",))
    with RunDir(tmp_path, prepared.plan).locked(), pytest.raises(InputError, match="another process"):
        execute(prepared, tmp_path)
    assert execute(prepared, tmp_path).results is not None


# Interrupted runs end as uninterrupted ones.


def test_an_interruption_at_any_moment_changes_nothing(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    def prepared() -> Prepared:
        return ready("ABSTAINING", only=("uniform", "pgd"))

    execute(prepared(), tmp_path / "whole")
    rng = random.Random(4)
    stops = 0
    # Short stretches, so that many stages and many moments of writing are hit.
    while stops < 60 and interrupt(prepared(), tmp_path / "torn", after=rng.randint(1, 60)):
        stops += 1
    assert stops >= 10
    execute(prepared(), tmp_path / "torn")
    assert_same_outcome(tmp_path / "torn", tmp_path / "whole")
    assert not list((tmp_path / "torn").rglob("*.tmp"))


@pytest.fixture
def command(zoo: ModuleType, tmp_path: Path) -> list[str]:
    board = zoo.write_board(tmp_path, zoo.board(n=21, shard=3, draws=10))
    return [
        sys.executable, "-m", "assay.cli", "run", f"{ZOO}:SLOW", "--trust", "--threads", "1", "--board", str(board),
        *(word for name in ("uniform", "apgd-ce", "pgd") for word in ("--attack", name)),
    ]  # fmt: skip


def started(command: list[str], out: Path) -> Iterator[subprocess.Popen[str]]:
    """The process, once it has printed its plan."""
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Estimated time" in line:
                break
        else:
            pytest.fail("it ended before it began:\n" + "".join(lines))
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_kill_9_ten_times_changes_nothing(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_TEST_PAUSE", "0.04")
    subprocess.run([*command, "--out", str(tmp_path / "whole")], stdout=subprocess.DEVNULL, check=False)
    rng = random.Random(0)
    torn = tmp_path / "torn"
    found = set()

    def files() -> tuple[str, ...]:
        return tuple(sorted(path.name for path in torn.rglob("*") if not path.name.startswith(".")))

    for turn in range(10):
        for process in started(command, torn):
            before = files()
            # Every other time once a stage was finished, however slow the machine is; else at any moment.
            while turn % 2 and files() == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        found.add(files())
    assert len(found) >= 4  # it was killed at work, and went on from where it was
    assert not (torn / RECORD).exists()
    done = subprocess.run([*command, "--out", str(torn)], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 4
    assert_same_outcome(torn, tmp_path / "whole")


@pytest.mark.slow
def test_a_second_process_on_the_same_folder_is_refused_and_ctrl_c_says_how_to_resume(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("ASSAY_TEST_PAUSE", "0.3")
    # Whoever runs the tests in the background may have SIGINT ignored, which a child would inherit.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    for process in started(command, tmp_path / "run"):
        while not (tmp_path / "run" / "shards").is_dir():
            time.sleep(0.05)
        time.sleep(1)
        second = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "another process" in second.stderr
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "the same command resumes the run" in rest


def test_the_plan_is_plain_json_and_holds_what_decides_the_result(ready: Callable[..., Prepared]) -> None:
    plan = json.loads(json.dumps(ready("ABSTAINING").plan, allow_nan=False))
    assert plan["ids"] == list(ready("ABSTAINING").job.ids)
    for key in ("code_sha256", "packages", "defense", "board", "protocol", "attacks", "seed", "device", "threads"):
        assert key in plan
    assert plan == json.loads(json.dumps(ready("ABSTAINING").plan))


def test_an_undeclared_trait_is_caught_before_hours_are_spent(zoo: ModuleType, tmp_path: Path) -> None:
    spec = DefenseSpec(zoo.ABSTAINING.card, lambda dataset: zoo.Abstaining())
    prepared = prepare(f"{ZOO}:ABSTAINING", zoo.board(), trust=True, only=("uniform",))
    hidden = zoo.Abstaining(0.5)
    hidden.card = hidden.card.model_copy(update={"traits": Traits()})
    record = execute(replace(prepared, spec=spec, job=replace(prepared.job, defense=hidden)), tmp_path)
    assert record.verdict == "failed"
    finding = next(f for f in record.findings if f.status == "fail")
    assert finding.check == "honest_randomness"
    assert finding.samples
    assert np.isin(finding.samples, prepared.job.ids).all()
