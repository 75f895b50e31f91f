"""What users call from Python: the same as the command line, imported lazily, with examples that run."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import assay
from assay import api
from assay.errors import InputError
from assay.leaderboards.rows import collect
from assay.noise import Noise
from assay.prepare import prepare

ZOO = Path(__file__).with_name("defense_zoo.py")
PAGE = Path(__file__).parents[1] / "docs" / "python.md"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def test_the_names_are_there_and_import_nothing_until_they_are_used() -> None:
    code = """
import sys, assay
assert {"run", "board", "examples", "load_defense", "read_record", "__version__"} <= set(dir(assay))
assert not {"torch", "pandas", "pydantic"} & set(sys.modules)
assay.board("digits-linf").table()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'certificate_of_origin'"):
        assay.certificate_of_origin  # noqa: B018
    assert assay.run is api.run
    assert assay.board is api.board


def test_a_boards_table_is_its_rows() -> None:
    board = assay.board("digits-linf")
    frame = board.table()
    page = collect(board._leaderboards, board)
    rows = [row for table in page.tables for row in table.rows]
    assert frame["defense"].tolist()[: len(rows)] == [row.record.defense.name for row in rows]
    ranked = [row.record.results.robust.value for row in rows if row.rank == 1 and row.record.results]
    assert np.allclose(frame[frame["rank"] == 1]["robust"], ranked)
    with pytest.raises(InputError, match="Did you mean 'digits-linf'"):
        assay.board("digits-lin")


def test_a_defense_is_a_module_with_its_options() -> None:
    defense = assay.load_defense("undefended")
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert defense(x, Noise.from_seed(0, range(3))).shape == (3, 10)
    assert not any(parameter.requires_grad for parameter in defense.parameters())
    with pytest.raises(InputError, match="no option 'depth'"):
        assay.load_defense("undefended", depth=3)
    with pytest.raises(InputError, match="Did you mean 'undefended'"):
        assay.load_defense("undefend")


def test_options_are_written_as_on_the_command_line() -> None:
    assert api._texts({"a": True, "b": 0.5, "c": "x", "d": 3}) == {"a": "true", "b": "0.5", "c": "x", "d": "3"}


def test_a_run_is_what_the_command_line_runs(
    zoo: ModuleType, toy_source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan, in the same folder, so that either resumes the other."""
    seen = []

    def stop(prepared: object, folder: Path, *, reporter: object) -> None:
        seen.append((prepared, folder))

    monkeypatch.setattr("assay.evaluation.execute", stop)
    monkeypatch.chdir(tmp_path)
    board = zoo.board(source=toy_source)
    arguments = {"n": 20, "seed": 3, "trust": True}
    assay.run(f"{ZOO}:LINEAR", board, **arguments)
    ((prepared, folder),) = seen
    assert prepared.plan == prepare(f"{ZOO}:LINEAR", board, "quick", **arguments).plan  # type: ignore[attr-defined]
    assert folder.parts[:2] == ("runs", "toy")
    assert folder.name.endswith("LINEAR-quick-n20-s3")
    with pytest.raises(InputError, match="no profile is called 'fast'"):
        assay.run("undefended", profile="fast")  # type: ignore[arg-type]


def test_a_run_returns_its_record_and_its_samples(toy_run: Path) -> None:
    record = assay.read_record(toy_run, files=True)
    frame = record.to_frame()
    assert record.results is not None
    assert frame[frame["attack"] == "final"]["expected"].mean() == pytest.approx(record.results.robust.value)
    assert set(frame["attack"]) == {"clean", "final", *record.results.attacks}


def _examples(tests: doctest.DocTest) -> None:
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    assert tests.examples
    assert runner.run(tests).failed == 0


def test_the_modules_own_examples_hold() -> None:
    found = [test for test in doctest.DocTestFinder().find(api) if test.examples]
    assert found
    for test in found:
        _examples(test)


@pytest.mark.slow
def test_the_pages_examples_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _examples(doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, "python.md", str(PAGE), 0))
