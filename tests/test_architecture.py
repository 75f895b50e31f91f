from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import assay

ROOT = Path(__file__).parents[1]
HOUSES = {
    "bench": "assay",
    "attacks": "assay.attacks",
    "defenses": "assay.defenses",
    "leaderboards": "assay.leaderboards",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Who may import whom inside `assay`. A module that is not here fails the test: decide where it stands.
PLAIN = ("errors", "digest", "threat", "card")
GROUND = (*PLAIN, "noise", "norms", "chain", "defense", "target", "attack", "certificate")
STATISTICS = ("statistics", "bounds", "sequential", "elastic", "budget")
MACHINERY = (
    *STATISTICS,
    "finding",
    "boards",
    "rules",
    "protocol",
    "results",
    "record",
    "rundir",
    "data",
    "perturbation",
    "provenance",
    "checks",
)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # the ground floor
    "errors": (),
    "digest": (),
    "threat": ("errors",),
    "card": (),
    "noise": (),
    "norms": ("threat", "noise"),
    "chain": ("noise",),
    "defense": (*PLAIN, "noise", "chain"),
    "target": (*PLAIN, "noise", "chain", "defense"),
    "attack": (*PLAIN, "noise", "norms", "chain", "defense", "target"),
    # statistics and data about evaluations: read by tables, so without torch
    "statistics": ("errors",),
    "bounds": ("errors",),
    "sequential": ("errors", "bounds"),
    "elastic": ("errors", "bounds"),
    "budget": ("errors", "bounds"),
    "certificate": (*PLAIN, *STATISTICS, "noise", "norms", "chain", "defense", "target"),
    "finding": ("card",),
    "boards": PLAIN,
    "rules": ("card", "budget"),
    "protocol": (*PLAIN, "finding", "boards", "rules"),
    "results": ("card", "digest", "protocol"),
    "record": (*PLAIN, "finding", "boards", "protocol", "results"),
    "rundir": (*PLAIN, "finding", "boards", "protocol", "record"),
    "imagenet": ("errors",),
    "data": ("errors", "digest", "imagenet"),
    "provenance": ("errors", "digest"),
    "audits": (*PLAIN, "boards", "record", "results"),
    "perturbation": ("errors",),
    "pictures": (*PLAIN, "boards", "record", "perturbation"),
    # the house that draws the tables
    "leaderboards": (*PLAIN, "finding", "boards", "protocol", "results", "record", "statistics", "audits", "pictures"),
    # the machinery
    "certificates": (*GROUND, *STATISTICS),
    "foreign": (*PLAIN, "noise", "chain", "defense"),
    "plugins": ("errors",),
    "registry": (*GROUND, "foreign", "plugins"),
    "checks": (*GROUND, *STATISTICS, "finding"),
    "guard": ("errors",),
    "shortlist": (),
    "reporter": (),
    "certifying": (*GROUND, *MACHINERY),
    "calibrating": (*GROUND, *MACHINERY),
    "job": (*GROUND, *MACHINERY, "shortlist", "reporter", "certifying", "calibrating"),
    "transferred": (*GROUND, *MACHINERY, "calibrating", "job"),
    "shard": (*GROUND, *MACHINERY, "shortlist", "guard", "certifying", "job", "transferred"),
    "harness": (*GROUND, *MACHINERY, "job", "shard"),
    "certification": (*GROUND, *MACHINERY, "registry", "certifying", "job"),
    "reduce": (*GROUND, *MACHINERY, "job", "certification"),
    "estimate": (*GROUND, *MACHINERY, "calibrating", "certifying", "job"),
    "execute": (*GROUND, *MACHINERY, "harness", "reduce"),
    "health": (*GROUND, *MACHINERY, "calibrating", "job", "reduce"),
    "examination": (*GROUND, *MACHINERY, "calibrating", "job", "health"),
    "prepare": (*GROUND, *MACHINERY, "registry", "calibrating", "certifying", "job"),
    "evaluation": (*GROUND, *MACHINERY, "reporter", "certifying", "certification", "job", "harness", "reduce",
            "execute", "prepare", "examination"),
    "bundles": (*PLAIN, "noise", "norms", *MACHINERY),
    "recount": (*GROUND, *MACHINERY, "job", "reduce"),
    "rescore": (*GROUND, *MACHINERY, "registry", "guard"),
    "verify": (*GROUND, *MACHINERY, "certifying", "certification", "job", "leaderboards", "bundles", "audits",
            "recount", "rescore"),
    "auditing": (*GROUND, *MACHINERY, "job", "bundles", "audits", "recount", "rescore"),
    "publish": (*PLAIN, *MACHINERY),
    "picturing": (*GROUND, *MACHINERY, "registry", "prepare", "job", "bundles", "pictures"),
    "scaffold": (*PLAIN, "registry"),
    "submit": (*GROUND, *MACHINERY, "registry", "harness", "reduce", "prepare", "evaluation", "publish", "verify"),
    "power": ("errors", "statistics"),
    "regression": ("card", "power"),
    "regress": (*PLAIN, *MACHINERY, "power", "regression"),
    "rerun": (*PLAIN, *MACHINERY, "calibrating", "prepare", "evaluation", "reporter", "power", "regress"),
    "display": (*GROUND, *MACHINERY, "certifying", "registry", "estimate", "prepare", "evaluation"),
    "progress": (*GROUND, *MACHINERY, "certifying", "estimate", "prepare", "display"),
    "api": (*GROUND, *MACHINERY, "registry", "prepare", "reporter", "evaluation", "display", "progress",
            "leaderboards"),
    "": ("api", "record"),
    "examine": (*GROUND, *MACHINERY, "registry"),
    "cli_options": (*PLAIN, *MACHINERY),
    "cli_examine": (*PLAIN, *MACHINERY, "defense", "prepare", "evaluation", "examine", "display", "progress",
            "cli_options"),
    "cli_submit": (*PLAIN, *MACHINERY, "scaffold", "submit", "verify", "cli_options"),
    "cli_verify": (*PLAIN, *MACHINERY, "verify", "auditing", "audits", "cli_options"),
    "cli_regress": (*PLAIN, *MACHINERY, "defense", "regression", "regress", "rerun", "progress", "cli_options"),
    "cli_site": (*PLAIN, *MACHINERY, "leaderboards", "picturing", "cli_options"),
    "cli": (*GROUND, *MACHINERY, "registry", "harness", "estimate", "execute", "prepare", "evaluation", "publish",
            "certification", "display", "progress", "cli_options", "cli_examine", "cli_submit", "cli_verify",
            "cli_regress", "cli_site", "leaderboards"),
    "pytest_plugin": (*PLAIN, *MACHINERY, "regression", "regress", "rerun"),
    # the houses that hold attacks and defenses; the registry finds them by name
    "attacks": GROUND,
    "defenses": (*PLAIN, "foreign", "noise", "chain", "defense", "certificate", "certificates", "data"),
    "defenses.classifier_sources": (*PLAIN, "statistics", "noise", "chain", "defense", "data"),
    "defenses.fitting": (*PLAIN, "noise", "norms", "chain", "defense", "certificate", "certificates", "data"),
}  # fmt: skip

TORCH_FREE = (
    "",
    "errors",
    "digest",
    "threat",
    "card",
    "statistics",
    "bounds",
    "sequential",
    "elastic",
    "budget",
    "finding",
    "boards",
    "rules",
    "protocol",
    "results",
    "record",
    "cli",
    "cli_options",
    "cli_examine",
    "cli_verify",
    "cli_site",
    "cli_submit",
    "cli_regress",
    "audits",
    "pictures",
    "perturbation",
    "api",
    "power",
    "regression",
    "regress",
    "pytest_plugin",
)


def _files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )


def _modules() -> dict[str, Path]:
    """Dotted names after `assay.`, of every module in the four folders."""
    found = {}
    for folder, package in HOUSES.items():
        for path in _files(folder):
            if path.suffix == ".py":
                parts = (*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts)
                found[".".join(part for part in parts[1:] if part != "__init__")] = path
    return found


MODULES = _modules()
modules = pytest.mark.parametrize("module", MODULES)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, function-level imports and literal `import_module` included."""
    for node in ast.walk(_tree(path)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(name), level=0):
                # `from assay import noise` imports a module, `from assay import __version__` does not.
                yield from (f"{name}.{a.name}" if f"{name}.{a.name}"[6:] in MODULES else name for a in node.names)
            case ast.ImportFrom():
                yield f"a relative import in line {node.lineno}"
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(str(name))]
            ):
                yield name


def _row(module: str) -> str | None:
    """The row of `MAY_IMPORT` that holds for a module: its own, or its package's."""
    while module and module not in MAY_IMPORT:
        module = module.rpartition(".")[0]
    return module or None


@modules
def test_imports_go_one_way(module: str) -> None:
    row = _row(module) if module else ""  # assay/__init__.py, which every other module imports: see TORCH_FREE too
    assert row is not None, f"{module} has no row in MAY_IMPORT: decide what it may import"
    house = module.partition(".")[0]
    for name in _imports(MODULES[module]):
        assert not name.startswith("a relative"), f"{module}: {name}; write the whole name"
        head, _, rest = name.partition(".")
        assert head not in HOUSES, f"{module} imports {name}: the package is called {HOUSES[head]}"
        if head == "assay" and rest:
            target = rest.partition(".")[0]
            assert target == house or target in MAY_IMPORT[row], f"{module} may not import {name}"


def test_the_table_is_layered() -> None:
    """A row mentions only rows above it, so that there can be no circle."""
    above: set[str] = set()
    for module, allowed in MAY_IMPORT.items():
        later = set(allowed) - above
        assert not later & set(MAY_IMPORT), f"{module} may import {sorted(later)}, which stand below it"
        above.add(module)


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_nobody_imports_the_folders_by_their_own_names(folder: str) -> None:
    for path in _files(folder):
        if path.suffix == ".py":
            for name in _imports(path):
                assert name.partition(".")[0] not in HOUSES, f"{path.name} imports {name}"


def test_every_package_folder_is_listed() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in _files(*HOUSES) if path.name == "__init__.py"}
    assert set(setuptools["package-dir"].values()) == folders
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])
    for package, folder in setuptools["package-dir"].items():
        top, _, rest = folder.partition("/")
        assert package == HOUSES[top] + ("." + rest.replace("/", ".") if rest else "")
    stray = {path.parent for path in _files(*HOUSES) if path.suffix == ".py"} - {ROOT / folder for folder in folders}
    assert not stray, f"modules in folders without __init__.py: {sorted(map(str, stray))}"


@modules
def test_modules_stay_readable(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 320


def _run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_tables_and_help_need_imports_no_torch() -> None:
    names = [name for name in MODULES if name in TORCH_FREE or name.partition(".")[0] == "leaderboards"]
    code = f"""
import importlib, sys
for name in {sorted(names)!r}:
    importlib.import_module(f"assay.{{name}}".rstrip("."))
    if "torch" in sys.modules:
        sys.exit(f"importing assay.{{name}} imports torch")
"""
    _run(code)


@pytest.mark.skipif("cli" not in MODULES, reason="no command line yet")
def test_help_imports_no_torch() -> None:
    code = """
import sys
from assay.cli import main
sys.argv = ["assay", "--help"]
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
assert "torch" not in sys.modules, "assay --help imports torch"
"""
    assert "run" in _run(code, COLUMNS="100")


@pytest.mark.skipif(not os.environ.get("ASSAY_WHEEL"), reason="only tox tests the wheel")
def test_the_package_under_test_is_the_wheel() -> None:
    path = Path(assay.__file__)
    assert "site-packages" in path.parts
    assert path.is_relative_to(sys.prefix)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel that tox installed, or one built from a copy of the tree, where no earlier build can leak in."""
    built = [Path(path) for path in os.environ.get("TOX_PACKAGE", "").split(os.pathsep) if path.endswith(".whl")]
    if not built:
        out, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree")
        for folder in HOUSES:
            shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree / name)
        command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(tree)]
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
        built = list(out.glob("*.whl"))
    with zipfile.ZipFile(built[0]) as archive:
        yield archive


def _packaged(path: Path) -> str:
    """Where a source file lies in the wheel."""
    folder, *rest = path.relative_to(ROOT).parts
    return "/".join([*HOUSES[folder].split("."), *rest])


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {_packaged(path) for path in _files(*HOUSES) if not path.name.startswith(".")}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert expected - found == set(), "missing from the wheel: see package-data in pyproject.toml"
    assert found - expected == set(), "in the wheel, but not in the tree"


@pytest.mark.slow
def test_the_wheels_files_are_the_trees(wheel: zipfile.ZipFile) -> None:
    for path in _files(*HOUSES):
        if not path.name.startswith("."):
            assert wheel.read(_packaged(path)) == path.read_bytes(), f"{path.name} differs: an old build?"


def test_no_module_is_there_twice() -> None:
    seen: dict[str, str] = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is not None:
            tree.body = tree.body[1:]
        if tree.body:
            content = ast.dump(tree)
            assert content not in seen, f"{module} is a copy of {seen[content]}"
            seen[content] = module
