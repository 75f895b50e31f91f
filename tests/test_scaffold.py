"""`assay new`: what it writes is a package that works, and it writes all of it or nothing."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from assay.cli_submit import add_to
from assay.errors import InputError
from assay.registry import DEFENSES
from assay.scaffold import next_commands, render, write_package


@pytest.mark.parametrize(
    ("name", "package", "module", "listed", "entry"),
    [
        ("acme", "acme", "acme", "acme/acme", "acme.acme:SPEC"),
        ("acme/looks", "acme", "acme", "acme/looks", "acme.looks:SPEC"),
        ("my-lab/two_looks", "my-lab", "my_lab", "my-lab/two_looks", "my_lab.two_looks:SPEC"),
        ("my_lab/two-looks", "my_lab", "my_lab", "my-lab/two-looks", "my_lab.two_looks:SPEC"),
    ],
)
def test_names_become_packages_modules_and_entry_points(
    name: str, package: str, module: str, listed: str, entry: str
) -> None:
    files = render(name)
    project = tomllib.loads(files["pyproject.toml"])
    defense = listed.partition("/")[2]
    assert project["project"]["name"] == package
    assert project["project"]["entry-points"]["assay.defenses"] == {defense: entry}
    assert project["tool"]["setuptools"]["packages"] == [module]
    assert f"src/{entry.partition(':')[0].replace('.', '/')}.py" in files
    for path, text in files.items():
        assert "{{" not in text
        assert text.endswith("\n")
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert f"assay check {listed} " in files["README.md"]
    assert any(listed in line for line in next_commands(name, Path("here")))


BAD = (
    "", "/", "a/", "/a", "a/b/c", "..", "../a", "a/..", "Acme", "1a", "a b", "a--b", "a-", "-a", "a.b", "é", "a\n",
    "x" * 51, "class", "acme/class", "json", "assay", "assay-robustness", "attacks", "{{ name }}", 'a"b',
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_can_not_be_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_package(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_exists_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("acme", "link"):
        with pytest.raises(InputError, match="exists already; nothing was written"):
            write_package(name, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["acme", "link", "mine.txt"]


def test_the_documented_walk_is_the_one_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "submitting.md").read_text()
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    add_to(app)
    assert "assay new my-lab/noisy-looks\n" in text
    printed = CliRunner().invoke(app, ["new", "my-lab/noisy-looks"]).output
    assert printed in text, "docs/submitting.md shows another output of assay new"
    project = (tmp_path / "my-lab" / "pyproject.toml").read_text()
    table = next(block for block in text.split("```") if block.startswith("toml")).removeprefix("toml\n")
    assert table in project


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write, written = Path.write_text, []

    def fail(self: Path, *args: str) -> int:
        written.append(self)
        if len(written) == 3:
            raise error
        return write(self, *args)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(error):
        write_package("acme", tmp_path)
    assert written[0].parent.name.startswith(".acme-")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_can_not_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file can't be written to"):
        write_package("acme", tmp_path / "file")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A written package, installed as `pip install -e` leaves it: its metadata and its `src` where Python looks."""
    folder = write_package("scaffolded/looks", tmp_path)
    info = tmp_path / "site" / "scaffolded-0.1.0.dist-info"
    info.mkdir(parents=True)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = "\n".join(f"{name} = {value}" for name, value in project["entry-points"]["assay.defenses"].items())
    (info / "entry_points.txt").write_text(f"[assay.defenses]\n{points}\n")
    monkeypatch.syspath_prepend(folder / "src")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "scaffolded"]:
        del sys.modules[name]


def test_what_is_written_is_known_to_assay_and_passes_its_own_tests(installed: Path) -> None:
    assert DEFENSES["scaffolded/looks"].source == installed / "src" / "scaffolded" / "looks.py"
    tests = _import(installed / "tests" / "test_looks.py")
    functions = [function for name, function in vars(tests).items() if name.startswith("test_")]
    assert len(functions) == 2
    for function in functions:
        function()


def _import(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_weights_are_declared_found_and_hashed(installed: Path) -> None:
    from assay.digest import sha256_of_file

    spec = DEFENSES["scaffolded/looks"]
    files = spec.files("digits")
    assert files
    assert {name: sha256_of_file(path) for name, path in files.items()} == spec.card.weights


def test_the_command_says_what_it_wrote_and_what_is_next(tmp_path: Path) -> None:
    app = typer.Typer()
    add_to(app)
    done = CliRunner().invoke(app, ["new", "acme/looks", "--to", str(tmp_path)])
    assert done.exit_code == 0
    assert (tmp_path / "acme" / "src" / "acme" / "looks.py").is_file()
    assert "src/acme/looks.py" in done.output
    assert "assay check acme/looks --board digits-linf" in done.output
    assert isinstance(CliRunner().invoke(app, ["new", "acme", "--to", str(tmp_path)]).exception, InputError)
