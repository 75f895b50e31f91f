"""The command line: exit codes, messages, and what the commands print."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from assay import __version__
from assay.cli import main
from assay.record import read_record
from assay.registry import ATTACKS, DEFENSES

ZOO = Path(__file__).with_name("defense_zoo.py")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def assay(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`assay("run", …)` -> exit code, standard output and standard error, white space squeezed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_THREADS", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        code = leaving.value.code
        return (code if isinstance(code, int) else 0), shown.out, shown.err

    return call


@pytest.fixture
def board(zoo: ModuleType, toy_source: str, tmp_path: Path) -> Path:
    path: Path = zoo.write_board(tmp_path, zoo.board(n=20, source=toy_source))
    return path


def toy(name: str, board: Path, *more: object) -> tuple[object, ...]:
    return (f"{ZOO}:{name}", "--trust", "--board", board, *more)


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


# Nothing heavy before a command needs it.


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["tables", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom assay.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as leaving: assert not leaving.code\n"
        "heavy = {'torch', 'numpy', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_names_every_command(assay: Run) -> None:
    code, out, _ = assay("--help")
    assert code == 0
    for command in ("list", "plan", "check", "run", "certify", "show", "tables"):
        assert command in out
    assert assay("--version") == (0, f"assay {__version__}\n", "")


# list


def test_list_names_all_that_is_registered(assay: Run) -> None:
    code, out, _ = assay("list")
    assert code == 0
    for name in ("undefended", "diffpure", "apgd", "square", "digits-linf", "cifar10-l2"):
        assert name in out


def test_list_as_json_carries_traits_and_boards(assay: Run) -> None:
    code, out, _ = assay("list", "--json")
    assert code == 0
    found = json.loads(out)
    assert {card["name"] for card in found["defenses"]} == set(DEFENSES)
    assert {attack["name"] for attack in found["attacks"]} == set(ATTACKS)
    assert {board["name"]: board["eps"] for board in found["boards"]} == {
        "digits-linf": "1/5",
        "digits-l2": "3/4",
        "cifar10-linf": "8/255",
        "cifar10-l2": "1/2",
        "imagenet-linf": "4/255",
        "imagenet-l2": "3",
    }
    smoothing = next(card for card in found["defenses"] if card["name"] == "smoothing")
    assert smoothing["traits"]["stochastic"] is True


# plan


def test_plan_says_what_is_mandatory_and_why_and_runs_nothing(assay: Run, board: Path, tmp_path: Path) -> None:
    code, out, _ = assay("plan", *toy("ABSTAINING", board))
    assert code == 0
    for name in ("uniform", "transfer", "apgd-ce", "pgd", "apgd-t", "square"):
        assert name in out
    assert "autoattack" not in out
    shown = flat(out)
    assert "any, stochastic" in shown
    assert "gradients are averaged over draws" in shown
    assert "linf 1/10" in shown
    assert "20 of 20 samples" in shown
    assert "17 of the defense and its gradients, 9 of the attacks once they have run; about" in shown
    assert "Estimated time: at most" in shown
    assert not (tmp_path / "runs").exists()


def test_plan_names_what_will_not_run(assay: Run, board: Path) -> None:
    code, out, _ = assay("plan", *toy("LINEAR", board, "--attack", "pgd"))
    assert code == 0
    assert "will not run: not asked for" in flat(out)


# run


def test_run_prints_plan_verdict_row_and_files_and_exits_with_0(assay: Run, board: Path, tmp_path: Path) -> None:
    code, out, err = assay("run", *toy("ABSTAINING", board, "--out", tmp_path / "r"))
    assert code == 0, err
    shown = flat(out)
    assert "mandatory attack" in shown
    assert "verified" in shown
    record = read_record(tmp_path / "r", files=True)
    assert record.results is not None
    for estimate in (record.results.clean, record.results.robust, *record.results.attacks.values()):
        assert f"{100 * estimate.value:.1f}" in shown
        assert f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]" in shown
    for name in (*record.results.attacks, "robust", "majority of 20", "all 20 draws right"):
        assert name in shown
    assert "the quick profile never is" in shown
    assert f"{tmp_path / 'r'}/: record.json, samples.parquet, adversarial.safetensors" in shown
    # The same command shows the same record again.
    code, again, _ = assay("run", *toy("ABSTAINING", board, "--out", tmp_path / "r"))
    assert code == 0
    assert flat(again)[flat(again).index("verified") :] == shown[shown.index("verified") :]


@pytest.mark.parametrize("name", ["CRASH", "SHAPE", "NAN"])
def test_a_defense_that_breaks_its_interface_exits_with_3(assay: Run, board: Path, tmp_path: Path, name: str) -> None:
    code, out, err = assay("run", *toy(name, board))
    assert code == 3, err
    shown = flat(out)
    assert "failed" in shown
    assert "fail interface" in shown
    (record,) = (tmp_path / "runs" / "toy").iterdir()
    found = read_record(record, files=True)
    assert str(found.findings[0].samples[0]) in shown
    assert "Traceback" not in out + err


def test_fewer_attacks_make_the_record_incomplete_and_exit_with_4(assay: Run, board: Path) -> None:
    code, out, _ = assay("run", *toy("LINEAR", board, "--attack", "pgd", "--attack", "uniform", "--n", "10"))
    assert code == 4
    shown = flat(out)
    assert "incomplete" in shown
    assert "missing apgd-ce: not asked for (--attack)" in shown
    assert "10 of the board's 20 samples" in shown


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize("name", ["LATE_NAN", "LATE_CRASH"])
def test_a_defense_that_breaks_down_midway_is_one_message_and_exits_with_1(
    assay: Run, board: Path, tmp_path: Path, name: str
) -> None:
    code, out, err = assay("run", *toy(name, board, "--attack", "uniform", "--out", tmp_path / "r"))
    assert code == 1
    assert err.startswith("DefenseError: ")
    assert len(err.strip().splitlines()) == 1
    assert re.search(r"samples \d+", err)
    assert "Traceback" not in out + err
    assert [path.name for path in (tmp_path / "r" / "shards").glob("*.part")] == ["0000.clean.part"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "undefnded"], "Did you mean 'undefended'"),
        (["plan", "undefnded"], "Did you mean 'undefended'"),
        (["run", "undefended", "--board", "digits-lnf"], "Did you mean 'digits-linf'"),
        (["run", "undefended", "--profile", "quik"], "Did you mean 'quick'"),
        (["run", "undefended", "--attack", "pgdd"], "Did you mean 'pgd'"),
        (["run", f"{ZOO}:LINEAR"], "--trust"),
        (["run", f"{ZOO}:LINER", "--trust"], "Did you mean 'LINEAR'"),
        (["run", "nowhere.py:X", "--trust"], "no file 'nowhere.py'"),
        (["run", "nowhere:X", "--trust"], "no module 'nowhere'"),
        (["run"], "give one defense, or --all"),
        (["run", "undefended", "--all"], "give one defense, or --all"),
        (["run", "--all", "--out", "x"], "--out"),
        (["run", f"{ZOO}:LINEAR", "--trust", "--n", "0"], "1 to 200"),
        (["run", f"{ZOO}:LINEAR", "--trust", "--device", "tpu"], "device 'tpu'"),
        (["show", "nowhere"], "no record at nowhere"),
        (["tables", "--leaderboards", "nowhere"], "holds no boards"),
        (["rum"], "rum"),
        (["run", "undefended", "--bord", "digits-linf"], "--bord"),
        (["run", "undefended", "--n", "many"], "integer"),
    ],
)
def test_a_bad_argument_exits_with_2_and_says_what_to_do(
    assay: Run, zoo: ModuleType, arguments: list[str], says: str
) -> None:
    code, out, err = assay(*arguments)
    assert code == 2
    assert says in flat(err)
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("eps", "suggested"), [('"0.031"', "'8/255'"), ("0.031", "'8/255'"), ('"0.2"', "'1/5'"), ("0.75", "'3/4'")]
)
def test_a_decimal_eps_in_a_board_is_refused_with_the_fraction(
    assay: Run, board: Path, eps: str, suggested: str
) -> None:
    board.write_text(board.read_text().replace('eps = "1/10"', f"eps = {eps}"))
    code, _, err = assay("run", *toy("LINEAR", board))
    assert code == 2
    assert f"Write it as {suggested}" in flat(err)


def test_a_changed_plan_is_refused_with_the_difference(assay: Run, board: Path) -> None:
    same = toy("LINEAR", board, "--attack", "uniform", "--out", "r")
    assert assay("run", *same)[0] == 4
    code, _, err = assay("run", *same, "--seed", "3")
    assert code == 2
    assert "seed: 0 -> 3" in err
    assert "code_sha256" not in err


def test_a_damaged_shard_exits_with_1_and_is_named(assay: Run, board: Path, tmp_path: Path) -> None:
    same = toy("LINEAR", board, "--attack", "uniform", "--out", "r")
    assert assay("run", *same)[0] == 4
    (tmp_path / "r" / "record.json").unlink()
    shard = tmp_path / "r" / "shards" / "0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    code, _, err = assay("run", *same)
    assert code == 1
    assert err.startswith("IntegrityError: ")
    assert "0000.safetensors" in err


def test_runs_lie_apart_by_default(assay: Run, board: Path, tmp_path: Path) -> None:
    for more in ([], ["--seed", "1"], ["--n", "10"]):
        assert assay("run", *toy("LINEAR", board, "--attack", "uniform", *more))[0] == 4
    assert len(list((tmp_path / "runs" / "toy").iterdir())) == 3


def test_publish_refuses_an_incomplete_record_and_copies_a_complete_one(
    assay: Run, board: Path, tmp_path: Path
) -> None:
    (tmp_path / "lb" / "boards").mkdir(parents=True)
    code, _, err = assay("run", *toy("ABSTAINING", board, "--attack", "pgd", "--publish", "lb"))
    assert code == 2
    assert "incomplete" in err
    code, out, _ = assay("run", *toy("ABSTAINING", board, "--publish", "lb"))
    assert code == 0
    assert "published to" in out
    (published,) = (tmp_path / "lb" / "records").rglob("record.json")
    assert read_record(published, files=True).verdict == "verified"


# show


def test_show_prints_what_run_printed(assay: Run, toy_run: Path) -> None:
    code, out, _ = assay("show", toy_run)
    assert code == 0
    record = read_record(toy_run)
    assert record.results is not None
    assert record.verdict in out
    assert f"{100 * record.results.robust.value:.1f}" in out
    assert assay("show", toy_run / "record.json") == (0, out, "")


def test_show_as_json_is_the_record(assay: Run, toy_run: Path) -> None:
    code, out, _ = assay("show", toy_run, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((toy_run / "record.json").read_text())


def test_show_checks_the_digests_first(assay: Run, toy_run: Path, tmp_path: Path) -> None:
    def forge(change: Callable[[dict[str, Any]], object]) -> tuple[int, str, str]:
        plain = json.loads((toy_run / "record.json").read_text())
        change(plain)
        (tmp_path / "record.json").write_text(json.dumps(plain))
        return assay("show", tmp_path)

    code, out, err = forge(lambda record: record["results"]["robust"].update(value=1.0))
    assert (code, out) == (1, "")
    assert "IntegrityError" in err
    assert forge(lambda record: record.update(rank=1))[0] == 2
    code, _, err = forge(lambda record: None)  # the record itself, without its files
    assert code == 1
    assert "samples.parquet" in err


def test_certify_shows_radii_without_attacks_and_resumes(assay: Run, tmp_path: Path) -> None:
    arguments = ("certify", "smoothing", "--board", "digits-l2", "--n", 6)
    code, out, _ = assay(*arguments)
    assert code == 0
    assert "certified by smoothing (sigma = 0.25), n = 6" in flat(out)
    assert "No attack ran: not a row." in out
    assert "left by an attack" not in out
    folder = tmp_path / "runs" / "digits-l2" / "smoothing-quick-n6-certify"
    record = read_record(folder, files=True)
    assert record.results is None
    assert record.certification is not None
    code, _, _ = assay(*arguments)
    assert code == 0
    assert read_record(folder).digest == record.digest
    assert flat(assay("show", folder)[1]).count("average radius") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("certify", "smoothing", "--board", "digits-linf"), "board digits-linf has no radii. These have: cifar10-l2"),
        (("certify", "diffpure"), "names no certificate. Perhaps one of its options changes that: "),
        (("check", "undefended", "--only", "modse"), "Did you mean 'modes'"),
        (("check", "undefnded"), "Did you mean 'undefended'"),
    ],
)
def test_what_can_not_be_examined_exits_with_2(arguments: tuple[str, ...], says: str, assay: Run) -> None:
    code, _, err = assay(*arguments)
    assert code == 2
    assert says in flat(err)


def test_check_prints_findings_and_exits_by_the_worst(assay: Run, board: Path) -> None:
    code, out, _ = assay("check", *toy("LINEAR", board), "--json", "--only", "interface", "--only", "modes")
    assert code == 0
    assert [(found["check"], found["status"]) for found in json.loads(out)] == [
        ("interface", "pass"),
        ("modes", "pass"),
    ]
    code, out, _ = assay("check", *toy("SHAPE", board))
    assert code == 3
    assert "interface" in out
    assert "modes" not in out  # nothing more can be measured of it
