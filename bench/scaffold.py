"""A small package with a defense that runs as it is: what `assay new` writes."""

from __future__ import annotations

import keyword
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from assay.errors import InputError

_PART = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_TAKEN = ("assay", "assay-robustness", "bench", "attacks", "defenses", "leaderboards", "tests", "test")


def render(name: str) -> dict[str, str]:
    """The package's files, by their path inside it.

    Args:
        name: `PACKAGE/DEFENSE`, or `PACKAGE` for both.

    Raises:
        InputError: for a name that a package, a module or a defense can't have.
    """
    words = _names(name)
    module, defense_module = words["module"], words["defense_module"]
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{module}/__init__.py": "__init__.py",
        f"src/{module}/{defense_module}.py": "defense.py",
        f"tests/test_{defense_module}.py": "test_defense.py",
    }
    # Text, not HTML: nothing is escaped, and every word has passed `_names`.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    folder = resources.files("assay") / "scaffold_files"
    return {
        path: environment.from_string((folder / f"{template}.j2").read_text("utf-8")).render(words)
        for path, template in files.items()
    }


def write_package(name: str, parent: Path) -> Path:
    """Writes the package into a new folder `PACKAGE` of `parent`; all of it or nothing.

    Raises:
        InputError: as `render` does, for a folder that exists, or a parent that can't be written to.
    """
    files = render(name)
    target = parent / name.partition("/")[0]
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already; nothing was written. Choose another name, or another --to.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
    except OSError as error:
        raise InputError(f"{parent} can't be written to: {error.strerror}. Give another --to.") from error
    try:
        staging.chmod(0o777 & ~_umask())
        for path, text in files.items():
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            (staging / path).write_text(text, "utf-8")
        try:
            # Fails where somebody was faster: a folder that isn't empty is never renamed over.
            os.rename(staging, target)
        except OSError as error:
            raise InputError(f"{target} can't be made: {error.strerror}; nothing was written.") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def next_commands(name: str, folder: Path) -> list[str]:
    """What to type after `write_package`."""
    listed = _names(name)["name"]
    return [
        f"pip install -e {folder}",
        f"assay check {listed} --board digits-linf",
        f"assay run {listed} --board digits-linf --profile quick",
    ]


def _names(name: str) -> Mapping[str, str]:
    """What the templates are filled in with."""
    package, slash, defense = name.partition("/")
    defense = defense if slash else package
    for part, what in ((package, "package"), (defense, "defense")):
        if len(part) > 50 or not _PART.fullmatch(part):
            raise InputError(
                f"{part!r} can't be the name of a {what}: expected at most 50 lower-case letters and digits, in words "
                f"joined by '-' or '_', a letter first, such as my-defense. NAME is PACKAGE or PACKAGE/DEFENSE."
            )
    module, defense_module = package.replace("-", "_"), defense.replace("-", "_")
    reserved = package in _TAKEN or module in sys.stdlib_module_names or keyword.iskeyword(module)
    if reserved or keyword.iskeyword(defense_module):
        taken = package if reserved else defense
        raise InputError(f"{taken!r} means something else to Python or to assay already; choose another name.")
    # As a registry writes a package's name.
    listed = f"{package.replace('_', '-')}/{defense}"
    return {
        "name": listed,
        "package": package,
        "module": module,
        "defense": defense,
        "defense_module": defense_module,
        "title": re.sub(r"[-_]+", " ", defense).capitalize(),
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
