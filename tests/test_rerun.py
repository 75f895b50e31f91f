"""A baseline's evaluation made again, by the command and by the pytest plugin: what is caught, and what is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from assay.errors import InputError
from assay.evaluation import execute
from assay.prepare import prepare
from assay.protocol import PROTOCOLS
from assay.record import RECORD, SAMPLES, Record, read_record
from assay.regress import compare
from assay.rerun import Rerun, rerun

pytest_plugins = ["pytester"]
ZOO = Path(__file__).with_name("defense_zoo.py")
DEFENSE = f"{ZOO}:ABSTAINING"
PLUGIN = ("-p", "no:assay", "-p", "assay.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist")
"""By its module's name, whether it is installed as an entry point or not."""


@pytest.fixture(scope="module")
def toy(zoo: ModuleType, toy_source: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a baseline of the stochastic toy, its board, and `worse.py`; its protocol has one cheap attack."""
    folder = tmp_path_factory.mktemp("guarded")
    full = PROTOCOLS["2026.1"]
    cheap = replace(
        full,
        checks=("interface", "modes"),
        rules=tuple(rule for rule in full.rules if rule.attack == "uniform"),
        health={profile: replace(health, checks=()) for profile, health in full.health.items()},
    )
    (folder / "worse.py").write_text(
        "import runpy\nimport torch\n"
        f"WORSE = runpy.run_path({str(ZOO)!r})['Abstaining']()\n"
        "WORSE.weight += WORSE.weight.std() * torch.randn(10, 64, generator=torch.Generator().manual_seed(0))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "2026.1", cheap)
        patch.setenv("ASSAY_CACHE", str(folder / "cache"))
        zoo.write_board(folder, zoo.board(source=toy_source))
        prepared = prepare(DEFENSE, str(folder / "toy.toml"), trust=True)
        execute(prepared, folder / "baseline")
        yield folder


@pytest.fixture
def baseline(toy: Path) -> Record:
    return read_record(toy / "baseline", files=True)


def again(toy: Path, baseline: Record, defense: str = DEFENSE, **how: object) -> Rerun:
    return rerun(baseline, defense, board=str(toy / "toy.toml"), trust=True, **how)  # type: ignore[arg-type]


def test_an_unchanged_defense_is_the_same_to_the_last_bit_and_then_costs_nothing(
    toy: Path, baseline: Record, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = again(toy, baseline)
    assert not first.cached
    assert first.record.outcome_sha256 == baseline.outcome_sha256
    found = compare(baseline, first.record)
    assert all(each.p == 1.0 and not each.fell for each in found.comparisons)

    def called(*arguments: object) -> None:
        raise AssertionError("the defense was called")

    monkeypatch.setattr(zoo.Abstaining, "draw", called)
    second = again(toy, baseline)
    assert second.cached
    assert second.record == first.record
    assert second.folder == first.folder


def test_an_unchanged_stochastic_defense_passes_twenty_times_out_of_twenty(toy: Path, baseline: Record) -> None:
    moved = 0
    for seed in range(1, 21):
        found = compare(baseline, again(toy, baseline, seed=seed).record)
        assert found.ok, found.text()
        moved += bool(found.comparisons[1].fell)
    assert moved == 20  # each is another measurement


def test_a_defense_made_worse_is_caught(toy: Path, baseline: Record) -> None:
    found = compare(baseline, again(toy, baseline, f"{toy}/worse.py:WORSE").record)
    assert not found.ok
    robust = found.comparisons[1]
    assert robust.significant
    assert robust.drop > 0.2
    assert robust.fell


def test_the_first_samples_alone_are_a_cheap_subset(toy: Path, baseline: Record) -> None:
    few = again(toy, baseline, n=15)
    assert few.record.board.n == 15
    found = compare(baseline, few.record, n=15)
    assert found.ids == tuple(baseline.to_frame()["id"][:15])
    assert all(not each.fell for each in found.comparisons)


@pytest.mark.parametrize("package", [False, True])
def test_code_beside_the_defense_is_never_taken_for_what_it_was(
    toy: Path, baseline: Record, tmp_path: Path, package: bool
) -> None:
    """Its file may import it, and its own digest wouldn't tell."""
    inner = tmp_path / "mine" / "inner"
    inner.mkdir(parents=True)
    if package:
        for folder in (inner, inner.parent):
            (folder / "__init__.py").write_text("")
    beside = (inner.parent if package else inner) / "beside.py"
    beside.write_text("STEPS = 10\n")
    (inner / "worse.py").write_text((toy / "worse.py").read_text())
    (tmp_path / "unrelated.py").write_text("")

    def cached() -> bool:
        return again(toy, baseline, f"{inner}/worse.py:WORSE").cached

    assert [cached(), cached()] == [False, True]
    (tmp_path / "unrelated.py").write_text("X = 1\n")
    assert cached()
    beside.write_text("STEPS = 1\n")
    assert [cached(), cached()] == [False, True]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"n": 41}, "holds 40 samples"),
        ({"n": 5}, "at least 8"),
        ({"alpha": 0.9}, "alpha"),
        ({"device": "tpu9"}, "tpu9"),
    ],
)
def test_what_the_caller_can_correct_is_refused_before_anything_runs(
    toy: Path, baseline: Record, how: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        again(toy, baseline, **how)


def test_a_record_does_not_make_its_own_code_trusted(toy: Path, baseline: Record) -> None:
    with pytest.raises(InputError, match="trust"):
        rerun(baseline, board=str(toy / "toy.toml"))


def test_a_board_that_changed_is_refused(toy: Path, baseline: Record, zoo: ModuleType, toy_source: str) -> None:
    for change, says in (({"eps": "1/20"}, "threat model"), ({"draws": 10}, "draws"), ({"n": 39}, "--n must lie")):
        with pytest.raises(InputError, match=says):
            rerun(baseline, DEFENSE, board=zoo.board(source=toy_source, **change), trust=True)
    other = zoo.board(source=toy_source, ids=tuple(reversed(zoo.board().ids)))
    with pytest.raises(InputError, match="other samples"):
        rerun(baseline, DEFENSE, board=other, trust=True)
    protocol = baseline.protocol.model_copy(update={"digest": "0" * 64})
    with pytest.raises(InputError, match="other protocol"):
        again(toy, baseline.model_copy(update={"protocol": protocol}))


# The plugin.


def pytest_says(pytester: pytest.Pytester, toy: Path, body: str) -> pytest.RunResult:
    for name in ("toy.toml", "worse.py"):
        (pytester.path / name).write_text((toy / name).read_text())
    pytester.makepyfile(f"import pytest\nBASELINE, DEFENSE = {str(toy / 'baseline')!r}, {DEFENSE!r}\n{body}")
    return pytester.runpytest_inprocess("--strict-markers", *PLUGIN)


def test_a_marked_test_passes_while_nothing_fell(pytester: pytest.Pytester, toy: Path) -> None:
    says = pytest_says(
        pytester,
        toy,
        """
@pytest.mark.robustness(baseline=BASELINE, defense=DEFENSE, board="toy.toml", n=15)
def test_held(): ...

def test_fixture(robustness):
    found = robustness.holds(DEFENSE, baseline=BASELINE, board="toy.toml", seed=3)
    assert found.ok and len(found.ids) == 40
""",
    )
    says.assert_outcomes(passed=2)


def test_a_worse_defense_fails_its_test_with_p_value_samples_and_power(pytester: pytest.Pytester, toy: Path) -> None:
    says = pytest_says(
        pytester,
        toy,
        """
@pytest.mark.robustness(baseline=BASELINE, defense="worse.py:WORSE", board="toy.toml")
def test_marked():
    raise AssertionError("the body runs only where the guard holds")

def test_fixture(robustness):
    robustness.holds("worse.py:WORSE", baseline=BASELINE, board="toy.toml")
""",
    )
    says.assert_outcomes(failed=2)
    text = says.stdout.str()
    assert "the body runs" not in text
    for line in (
        "REGRESSED: robust accuracy fell by * points, p = *",
        "*is found with probability 80 %*",
        "*fell: *->*",
    ):
        says.stdout.fnmatch_lines([line])
    assert "pytest_plugin.py:" not in text  # the report, without the plugin's own frames


def test_a_marker_that_says_something_else_fails_its_test(pytester: pytest.Pytester, toy: Path) -> None:
    says = pytest_says(
        pytester,
        toy,
        """
@pytest.mark.robustness("undefended")
def test_a(): ...

@pytest.mark.robustness(baseline=BASELINE, defence="undefended")
def test_b(): ...

@pytest.mark.robustness(baseline="nowhere", defense="undefended")
def test_c(): ...
""",
    )
    says.assert_outcomes(failed=3)
    says.stdout.fnmatch_lines(["*a marker says robustness(baseline, *", "*'defence'*", "*no record at *nowhere*"])


def test_projects_that_do_not_use_the_plugin_pay_nothing_for_it() -> None:
    code = """
import sys, pytest
before = set(sys.modules)
import assay.pytest_plugin
new = sorted(name for name in set(sys.modules) - before if not name.startswith("__"))
assert new == ["assay", "assay.pytest_plugin"], new
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_run_behind_a_rerun_is_a_whole_one(toy: Path, baseline: Record) -> None:
    done = again(toy, baseline)
    assert {path.name for path in done.folder.iterdir()} >= {RECORD, SAMPLES, "plan.json"}
    assert done.folder.parent.parent == toy / "cache"
    assert done.record.protocol == baseline.protocol
