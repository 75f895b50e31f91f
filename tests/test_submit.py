"""`assay submit`: what may become a row, and that a row appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from assay import provenance, submit
from assay.cli_submit import add_to
from assay.digest import sha256_of_file, sha256_of_json
from assay.errors import InputError, IntegrityError
from assay.leaderboards.rows import collect
from assay.publish import lay_down, row_folder
from assay.record import BUNDLE, RECORD, SAMPLES, read_record
from assay.registry import DEFENSES, resolve_defense
from assay.submit import CARD, SOURCE, Submission, read_submission
from assay.verify import Item, Report

MINE = '''
"""A defense as its author would bring it: weights in a file beside it, named and hashed."""
from pathlib import Path

import torch
from safetensors.torch import load_file

from assay.card import Card, Traits
from assay.defense import Defense, DefenseSpec

FILE = Path(__file__).with_name("mine.safetensors")
CARD = Card(name="mine", title="Mine", summary="A toy.", traits=Traits(stochastic=True))


class Mine(Defense):
    card, n_classes = CARD, 11

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 11)
        self.linear.load_state_dict(load_file(FILE))

    def draw(self, x, noise):
        return self.linear(x.flatten(1))


SPEC = DefenseSpec(CARD, lambda dataset: Mine(), Path(__file__), lambda dataset: {"mine.safetensors": FILE})
'''
ADDRESS = "https://example.org/mine.git"
Change = Callable[[dict[str, Any]], object]


def edit(run: Path, change: Change) -> None:
    """Edits record.json and seals it again, as a forger would."""
    plain = json.loads((run / RECORD).read_text())
    change(plain)
    plain["digest"] = sha256_of_json({key: value for key, value in plain.items() if key != "digest"})
    (run / RECORD).write_text(json.dumps(plain))


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    """The finished toy run, as if it had been of `mine.py:SPEC`."""
    folder = tmp_path / "run"
    shutil.copytree(toy_run, folder)
    (tmp_path / "mine.py").write_text(MINE)
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(11, 64, generator=generator), "bias": torch.zeros(11)}
    save_file(weights, tmp_path / "mine.safetensors")
    name = f"{tmp_path / 'mine.py'}:SPEC"
    spec = resolve_defense(name, trust=True)
    defense = {
        "name": name,
        "card": spec.card.model_dump(mode="json"),
        "weights": {"mine.safetensors": sha256_of_file(tmp_path / "mine.safetensors")},
        "source_sha256": sha256_of_file(tmp_path / "mine.py"),
        "state_sha256": provenance.state_sha256(spec.build("digits")),
    }
    edit(folder, lambda plain: plain.update(defense=defense))
    return folder


@pytest.fixture
def board(zoo: ModuleType, toy_source: str, tmp_path: Path) -> Path:
    """A leaderboards folder with the toy's board, and nothing else."""
    folder = tmp_path / "lb"
    (folder / "boards").mkdir(parents=True)
    zoo.write_board(folder / "boards", zoo.board(source=toy_source))
    return folder


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The adversarial examples' scores are somebody else's tests: here they hold. Returns what was asked for."""
    asked: list[dict[str, Any]] = []

    def verify(path: Path, **options: Any) -> Report:
        asked.append({"path": path, **options})
        return Report(path, (Item("norms", "ok", "inside"),))

    monkeypatch.setattr(submit, "verify_record", verify)
    return asked


def read(run: Path, board: Path, **options: Any) -> Submission:
    return read_submission(run, board, **{"source": ADDRESS, "trust": True, **options})


def objections(found: Submission) -> Mapping[str, str]:
    assert found.ok is not any(item.status == "failed" for item in found.items)
    return {item.name: item.message for item in found.items if item.status == "failed"}


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too, by path; folders as empty."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_a_finished_run_becomes_a_row(run: Path, board: Path, verified: list[dict[str, Any]]) -> None:
    found = read(run, board)
    assert objections(found) == {}
    assert [item.name for item in found.items] == [
        "eligible", "current", "samples", "mandatory", "name", "source", "defense", "weights", "norms",
    ]  # fmt: skip
    assert verified == [{"path": run, "defense": True, "leaderboards": board, "trust": True}]
    folder = submit.submit(found)
    assert folder == board / "records" / "toy" / "mine" / "quick"
    assert {path.name for path in folder.iterdir()} == {RECORD, SAMPLES, BUNDLE, CARD, SOURCE}
    record = read_record(folder, files=True)
    assert record == read_record(run)
    assert json.loads((folder / CARD).read_text()) == record.defense.card.model_dump(mode="json")
    reference = {"reference": ADDRESS, "source_sha256": record.defense.source_sha256, "record": record.digest}
    assert json.loads((folder / SOURCE).read_text()) == reference
    assert {path.name for path in board.iterdir()} == {"boards", "records"}


def test_the_row_is_one_that_tables_show(run: Path, board: Path, verified: object) -> None:
    from assay.boards import load_board

    submit.submit(read(run, board))
    page = collect(board, load_board("toy", board))
    assert page.incomparable == ()
    assert [row.path for table in page.tables for row in table.rows] == ["records/toy/mine/quick/record.json"]


def test_looking_writes_nothing(run: Path, board: Path, verified: object) -> None:
    before = everything(board)
    found = read(run, board)
    assert set(found.files) == {RECORD, SAMPLES, BUNDLE, CARD, SOURCE}
    assert everything(board) == before


OBJECTIONS: dict[str, tuple[Change, str, str]] = {
    "failed": (lambda r: r.update(verdict="failed"), "eligible", "this run is failed"),
    "incomplete": (
        lambda r: (r.update(verdict="incomplete"), r["protocol"].update(missing={"pgd": "not asked for"})),
        "mandatory",
        "pgd: not asked for",
    ),
    "attack left out": (lambda r: r["results"]["attacks"].pop("pgd"), "mandatory", "pgd: not in the record"),
    "nothing measured": (lambda r: r.update(results=None), "mandatory", "pgd: not in the record"),
    "attack not even named": (
        lambda r: (r["results"]["attacks"].pop("pgd"), r["protocol"]["mandatory"].remove("pgd")),
        "defense",
        "mandatory attacks are changed",
    ),
    "old protocol": (lambda r: r["protocol"].update(digest="0" * 64), "current", "run it again"),
    "other protocol": (lambda r: r["protocol"].update(id="2025.1"), "current", "run it again"),
    "no such board": (lambda r: r["board"].update(name="tyo"), "board", "Did you mean 'toy'"),
    "other samples": (lambda r: r["board"].update(ids_sha256="0" * 64), "defense", "samples or threat model"),
    "other eps": (lambda r: r["board"]["threat"].update(eps="1/5"), "defense", "samples or threat model"),
    "fewer samples": (lambda r: r["board"].update(n=39), "samples", "takes 40 samples"),
    "a registered name": (lambda r: r["defense"]["card"].update(name="diffpure"), "name", "a registered defense"),
    "no source": (lambda r: r["defense"].update(source_sha256=None), "source", "source=Path(__file__)"),
    "other source": (lambda r: r["defense"].update(source_sha256="0" * 64), "defense", "its source was changed"),
    "other card": (lambda r: r["defense"]["card"].update(title="Best"), "defense", "its card or options are changed"),
    "other weights": (
        lambda r: r["defense"]["weights"].update({"mine.safetensors": "0" * 64}),
        "weights",
        "no longer what was measured",
    ),
    "unknown weights": (lambda r: r["defense"]["weights"].update(more="0" * 64), "weights", "more isn't here"),
    "weights not named": (lambda r: r["defense"].update(weights={}), "weights", "names no weight file"),
    "unknown option": (lambda r: r["defense"].update(options={"steps": "3"}), "defense", "has no option 'steps'"),
}


@pytest.mark.parametrize("what", OBJECTIONS)
def test_what_can_not_be_a_row(what: str, run: Path, board: Path, verified: object) -> None:
    change, item, message = OBJECTIONS[what]
    edit(run, change)
    before = everything(board)
    found = read(run, board)
    assert message in objections(found)[item]
    with pytest.raises(InputError, match=f"can't be submitted: .*{item}.*nothing was laid"):
        submit.submit(found, replace=True)
    assert everything(board) == before


def test_weights_apart_from_the_code_need_an_address(
    run: Path,
    board: Path,
    verified: object,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    apart = tmp_path_factory.mktemp("elsewhere") / "large.safetensors"
    shutil.copy(run.parent / "mine.safetensors", apart)
    digest = sha256_of_file(apart)
    spec = resolve_defense(f"{run.parent / 'mine.py'}:SPEC", trust=True)

    def submitted(file: Path, url: str = "", source: str = "") -> str:
        card = spec.card.model_copy(update={"weights": {"large.safetensors": digest}, "url": url})

        def load(dataset: str) -> Any:
            made = spec.load(dataset)
            made.card = card
            return made

        changed = replace(spec, card=card, load=load, weight_files=lambda dataset: {"large.safetensors": file})
        monkeypatch.setitem(DEFENSES._entries, "mine", changed)
        weights = {"large.safetensors": digest}
        edit(
            run, lambda plain: plain["defense"].update(name="mine", weights=weights, card=card.model_dump(mode="json"))
        )
        return objections(read(run, board, source=source)).get("weights", "")

    assert "lies apart from the code" in submitted(apart)
    assert submitted(apart, url="https://example.org/large") == ""
    assert submitted(apart, source=ADDRESS) == ""
    assert submitted(run.parent / "mine.safetensors") == ""


def test_weights_and_source_changed_since_the_run_are_noticed(run: Path, board: Path, verified: object) -> None:
    file = run.parent / "mine.safetensors"
    save_file({"weight": torch.ones(11, 64), "bias": torch.zeros(11)}, file)
    found = objections(read(run, board))
    assert "its parameters are changed since the run" in found["defense"]
    assert "no longer what was measured" in found["weights"]
    file.unlink()
    message = objections(read(run, board))["defense"]
    assert "can't be loaded again: FileNotFoundError: " in message
    assert "mine.safetensors" in message


def test_code_that_nobody_else_has_needs_an_address(run: Path, board: Path, verified: object) -> None:
    assert "add --source" in objections(read(run, board, source=""))["source"]
    for source in (
        "mylab 0.3",
        "https://example.org/x?a=1#b",
        "git+https://example.org/x@v1",
        "doi:10.1/x",
        "Fig. 2: c",
    ):
        assert objections(read(run, board, source=source)) == {}
    for source in ("javascript:alert(1)", "file:///etc/passwd", "a\nb", "\x1b[2J", " ", "x" * 601):
        with pytest.raises(InputError, match="--source takes"):
            read(run, board, source=source)


def test_code_is_executed_where_it_is_trusted(run: Path, board: Path, verified: object) -> None:
    with pytest.raises(InputError, match="add --trust"):
        read(run, board, trust=False)


def test_what_is_no_finished_run_is_said_so(run: Path, board: Path, tmp_path: Path, verified: object) -> None:
    with pytest.raises(InputError, match="holds no boards/"):
        read(run, tmp_path)
    with pytest.raises(InputError, match="no record at"):
        read(tmp_path, board)
    content = bytearray((run / BUNDLE).read_bytes())
    content[-1] ^= 1
    (run / BUNDLE).write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=BUNDLE):
        read(run, board)
    (run / RECORD).unlink()
    with pytest.raises(InputError, match="isn't finished"):
        read(run, board)


def test_examples_that_do_not_hold_are_an_objection(run: Path, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = (Item("norms", "failed", "sample 7 lies outside"), Item("scores", "skipped", "no such package"))
    monkeypatch.setattr(submit, "verify_record", lambda path, **options: Report(path, items))
    found = read(run, board)
    assert objections(found) == {
        "norms": "sample 7 lies outside", "scores": "not scored again: no such package",
    }  # fmt: skip
    with pytest.raises(InputError, match="norms, scores"):
        submit.submit(found)


def test_the_stored_examples_are_scored_again(toy_run: Path, board: Path) -> None:
    """With nothing replaced: the toy's own run, whose examples the toy answers as the record says."""
    found = read(toy_run, board)
    assert objections(found) == {}
    assert {"examples", "scores"} <= {item.name for item in found.items if item.status == "ok"}


# An earlier record of the row.


def test_submitting_twice_changes_nothing(run: Path, board: Path, verified: object) -> None:
    folder = submit.submit(read(run, board))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = read(run, board)
    assert again.same
    assert submit.submit(again) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_record_is_replaced_only_on_request(run: Path, board: Path, verified: object) -> None:
    folder = submit.submit(read(run, board))
    (folder / "left.txt").write_text("of the earlier one")
    before = everything(board)
    edit(run, lambda plain: plain["provenance"].update(finished="2026-11-20T00:00:00+00:00"))
    later = read(run, board)
    assert later.ok
    assert not later.same
    with pytest.raises(InputError, match="Add --replace"):
        submit.submit(later)
    assert everything(board) == before
    submit.submit(later, replace=True)
    assert {path.name for path in folder.iterdir()} == {RECORD, SAMPLES, BUNDLE, CARD, SOURCE}
    assert read_record(folder, files=True) == read_record(run)


def test_another_defense_s_row_is_never_replaced(run: Path, board: Path, verified: object) -> None:
    folder = submit.submit(read(run, board))
    edit(folder, lambda plain: plain["defense"].update(name="somebody/mine"))
    assert "is of somebody/mine" in objections(read(run, board))["name"]


# What the folder holds while a row is laid, and after something went wrong.

ROW = Path("records") / "toy" / "mine" / "quick"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), MemoryError])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_goes_wrong_leaves_the_folder_as_it_was(
    board: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, renames: int
) -> None:
    lay_down(board, ROW, {"a": b"1", "b": b"2"})
    before, rename, count = everything(board), Path.rename, 0

    def fail(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == renames + 1:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        if renames == 2:
            patched.setattr("assay.publish.write_atomically", _raise(error))
        with pytest.raises((KeyboardInterrupt, InputError, MemoryError)):
            lay_down(board, ROW, {"a": b"3"})
    assert everything(board) == before
    lay_down(board, ROW, {"a": b"3"})
    assert everything(board / ROW) == {"a": b"3"}


def _raise(error: BaseException) -> Callable[..., None]:
    def function(*args: object) -> None:
        raise error

    return function


KILLED = """
import os, signal, sys
from pathlib import Path
from assay.publish import lay_down
rename, count = Path.rename, 0

def kill(self, target):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.rename = kill
lay_down(Path(sys.argv[1]), Path("records/toy/mine/quick"), {"record.json": b"new"})
"""


@pytest.mark.parametrize(("at", "there"), [(1, False), (1, True), (2, True)])
def test_a_killed_process_leaves_no_half_of_a_row(board: Path, at: int, there: bool) -> None:
    if there:
        lay_down(board, ROW, {"record.json": b"old"})
    before = everything(board)
    done = subprocess.run([sys.executable, "-c", KILLED, str(board), str(at)], check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL
    if at == 1:
        visible = {path: content for path, content in everything(board).items() if not path.startswith(".")}
        assert visible == before
    # Whoever lays a row next clears away what was left, and puts back what was moved aside.
    other = Path("records") / "toy" / "other" / "quick"
    lay_down(board, other, {"record.json": b"other"})
    shutil.rmtree(board / other.parent)
    if not there:
        shutil.rmtree(board / "records")
    assert everything(board) == before


def test_what_another_process_is_laying_is_left_alone(board: Path) -> None:
    import fcntl

    busy = board / ".laying-busy"
    busy.mkdir()
    handle = os.open(busy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    lay_down(board, ROW, {"record.json": b"x"})
    assert busy.is_dir()
    os.close(handle)
    lay_down(board, ROW, {"record.json": b"y"})
    assert not busy.exists()


# Text of other people's, and the command.

SCRIPT = "<script>alert(1)</script>"


def test_a_card_with_markup_in_every_field_stays_text(run: Path, board: Path, verified: object) -> None:
    mine = run.parent / "mine.py"
    fields = f"title={SCRIPT!r}, summary={SCRIPT!r}, source={SCRIPT!r}, choices=({SCRIPT!r},), "
    mine.write_text(MINE.replace('title="Mine", summary="A toy.", ', fields))
    card = resolve_defense(f"{mine}:SPEC", trust=True).card.model_dump(mode="json")
    edit(run, lambda plain: plain["defense"].update(card=card, source_sha256=sha256_of_file(mine)))
    found = read(run, board)
    assert objections(found) == {}
    folder = submit.submit(found)
    assert json.loads((folder / CARD).read_text())["summary"] == SCRIPT
    assert folder.relative_to(board) == ROW


@pytest.mark.parametrize("name", ["a/../../../x", "a/b/c", "x:y/z.."])
def test_a_card_s_name_climbs_out_of_no_folder(run: Path, name: str) -> None:
    edit(run, lambda plain: plain["defense"]["card"].update(name=name))
    folder = row_folder(read_record(run))
    assert folder.parts == ("records", "toy", name.replace("/", "--"), "quick")
    assert ".." not in folder.parts


@pytest.mark.parametrize("name", ["../../x", "..", SCRIPT, "Mine", "/etc", ""])
def test_a_card_s_name_is_one_that_a_folder_can_have(run: Path, name: str) -> None:
    edit(run, lambda plain: plain["defense"]["card"].update(name=name))
    with pytest.raises(InputError, match=r"defense\.card\.name"):
        read_record(run)


@pytest.fixture
def command() -> Callable[..., tuple[int, str]]:
    app = typer.Typer()
    add_to(app)

    def invoke(*words: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["submit", *map(str, words), "--threads", "1"])
        if isinstance(done.exception, Exception) and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.output

    return invoke


def test_the_command_says_what_it_lays(
    run: Path, board: Path, verified: object, command: Callable[..., tuple[int, str]]
) -> None:
    before = everything(board)
    words = (run, "--to", board, "--source", ADDRESS, "--trust")
    code, out = command(*words, "--dry-run")
    assert code == 0
    assert f"would be laid: {board / ROW}" in out
    assert everything(board) == before
    code, out = command(*words)
    assert code == 0
    assert f"laid: {board / ROW}" in out
    assert "assay tables" in out
    code, out = command(*words)
    assert (code, "is there already" in out) == (0, True)
    edit(run, lambda plain: plain["provenance"].update(finished="2026-11-20T00:00:00+00:00"))
    with pytest.raises(InputError, match="--replace"):
        command(*words)
    code, out = command(*words, "--replace")
    assert (code, "in place of record" in out) == (0, True)


def test_the_command_lists_what_objects_and_exits_with_1(
    run: Path, board: Path, verified: object, command: Callable[..., tuple[int, str]]
) -> None:
    edit(run, lambda plain: (plain["protocol"].update(digest="0" * 64), plain.update(verdict="failed")))
    for more in ((), ("--dry-run",)):
        code, out = command(run, "--to", board, "--trust", *more)
        assert code == 1
        for name in ("eligible", "current", "source"):
            assert f"failed  {name}: " in out
        assert "nothing was laid" in out
    assert not (board / "records").exists()


def test_the_command_prints_no_terminal_s_orders(
    run: Path, board: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    items = (Item("norms", "failed", "\x1b[2Jgone"),)
    monkeypatch.setattr(submit, "verify_record", lambda path, **options: Report(path, items))
    code, out = command(run, "--to", board, "--source", ADDRESS, "--trust")
    assert code == 1
    assert "?[2Jgone" in out
    assert "\x1b[2J" not in out


def test_without_a_leaderboards_folder_it_asks_for_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give --to"):
        command(run)
