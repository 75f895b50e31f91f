from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from assay.boards import board_names
from assay.cli import app
from assay.foreign import PACKAGES
from assay.registry import ATTACKS, DEFENSES, is_foreign

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]


def _lines(path: Path) -> list[str]:
    """The commands of a document's bash blocks, one a line, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _commands(path: Path) -> list[list[str]]:
    """Every command as its words, comments dropped, what is joined by && or | taken apart."""
    found = []
    for line in _lines(path):
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in {"&&", "|", ";"}:
                found.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in found if words]


COMMANDS = [(path.name, words) for path in DOCUMENTS for words in _commands(path)]
commands = pytest.mark.parametrize(("document", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])


def test_ci_runs_a_readme_command_and_nothing_else() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[0] == "#!/usr/bin/env bash"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    body = [line for line in script if line and not line.startswith("#")]
    assert body[:2] == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."']
    assert len(body) == 3
    assert body[2] in _lines(ROOT / "README.md")


@commands
def test_a_documented_command_exists(document: str, words: list[str]) -> None:
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if program == "assay":
        _parse(arguments)
    elif program in {"python", "python3"} and arguments[:1] == ["-m"]:
        module = arguments[1]
        local = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert local.exists() or importlib.util.find_spec(module) is not None
    elif program == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in arguments if word.endswith(".py"))
    else:
        assert program in {"pip", "tox", "pre-commit", "git", "cd", ".", "export", "ruff", "mypy"}


def _parse(arguments: list[str]) -> None:
    """Parses an `assay` command line as the program would, without running it, and looks up its names."""
    group = typer.main.get_command(app)
    if arguments and not arguments[0].startswith("-"):
        with group.make_context("assay", arguments[:1]) as context:
            command = group.get_command(context, arguments[0])  # type: ignore[attr-defined]
            assert command is not None, f"assay has no command {arguments[0]!r}"
            with command.make_context(arguments[0], arguments[1:], parent=context) as parsed:
                values = parsed.params
    else:
        group.make_context("assay", [*arguments, "--help"], resilient_parsing=True)
        values = {}
    defense, board = values.get("defense"), values.get("board")
    if isinstance(defense, str) and not is_foreign(defense):
        assert defense in DEFENSES or defense.partition(":")[0] in PACKAGES
    if isinstance(board, str) and not board.endswith(".toml"):
        assert board in board_names()
    for attack in values.get("attack") or ():
        assert attack.partition(":")[0] in ATTACKS


def test_the_first_command_is_the_main_job() -> None:
    assert re.search(r"pip install \. && \S*assay run \w+ --board", _lines(ROOT / "README.md")[0])
