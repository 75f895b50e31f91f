"""Code from outside the project, `module:object` or `path/to/file.py:object`: executed only where it is trusted."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from assay.defense import Defense, DefenseSpec
from assay.digest import sha256_of_json
from assay.errors import InputError, nearest

Module = TypeVar("Module", bound=nn.Module)
PACKAGES = ("robustbench", "timm", "torchvision")
"""`PACKAGE:NAME` is a model of an installed package, never somebody's code."""


def is_code(name: str) -> bool:
    """Whether a name points at somebody's code, and not at a model of one of `PACKAGES` or into the web."""
    return ":" in name and "://" not in name and name.partition(":")[0] not in PACKAGES


def refuse_untrusted(name: str, trust: bool) -> None:
    """Raises InputError unless code may be executed."""
    if not trust:
        raise InputError(f"{name!r} is code from outside the registry, to be executed. If you trust it, add --trust.")


def find_object(name: str, *, loaded: bool = False) -> tuple[Any, str, str | None]:
    """An object from outside the project, its own name, and the file that it was found in. Executes that file.

    Args:
        name: `module:object` or `path/to/file.py:object`.
        loaded: take what a file made when it was executed last, if it was.

    Raises:
        InputError: for a place that doesn't exist or has no such object.
    """
    location, _, attribute = name.rpartition(":")
    module = _import(location, loaded)
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise InputError(f"{location} has no object {attribute!r}.{nearest(attribute, public)}")
    return getattr(module, attribute), attribute, getattr(module, "__file__", None)


def make_module(name: str, kind: type[Module], expected: str) -> Module:
    """A module from somebody's code: an instance, or what a class or function makes without arguments. Executes it.

    Args:
        name: as `find_object` takes it.
        kind: what it has to be; never a defense.
        expected: what a user could give, for errors.

    Raises:
        InputError: for an object that is no such module and makes none.
    """
    thing, attribute, _ = find_object(name)
    if isinstance(thing, Defense):
        raise InputError(f"{name!r} is a defense already: run it by that name.")
    if isinstance(thing, kind):
        # A module stays imported: two builds share no parameter.
        return copy.deepcopy(thing)
    if isinstance(thing, nn.Module) or not callable(thing):
        raise InputError(f"{name!r} is a {type(thing).__name__}; expected {expected}.")
    made = call(thing, attribute)
    if not isinstance(made, kind) or isinstance(made, Defense):
        raise InputError(f"{name!r} makes a {type(made).__name__}; expected {expected}.")
    return made


def call(thing: Any, name: str) -> Any:
    """What a class or function of somebody's makes without arguments.

    Raises:
        InputError: where it needs some.
    """
    try:
        inspect.signature(thing).bind()
    except TypeError as error:
        raise InputError(
            f"{name!r} can't be called without arguments: {error}. Name an instance, or a function that can."
        ) from error
    return thing()


def code_file(name: str) -> Path | None:
    """The file behind a name; of a module that was not imported yet None, for finding it would execute its parents."""
    location = name.rpartition(":")[0]
    if location.endswith(".py"):
        return Path(location)
    file = getattr(sys.modules.get(location), "__file__", None)
    return Path(file) if file else None


def _import(location: str, loaded: bool) -> Any:
    """A module. A file is executed anew, for it may load weights, unless `loaded` asks for what it made last."""
    if not location.endswith(".py"):
        # A console script's path does not hold the working directory; `module:object` should find it there.
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(location)
        except ModuleNotFoundError as error:
            if error.name and location.startswith(error.name):
                raise InputError(f"no module {location!r}; expected an installed one or a path to a .py.") from error
            raise
    path = Path(location)
    if not path.is_file():
        raise InputError(f"no file {location!r}.")
    unique = f"assay_foreign_{path.stem}_{sha256_of_json([str(path.resolve()), path.read_text()])[:16]}"
    if loaded and unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module


@dataclass(frozen=True)
class OpenSpec(DefenseSpec):
    """A defense that takes somebody's code through its options.

    Attributes:
        code: the options that may name code; see `is_code`.
        trusted: whether it may be executed; the registry passes on what the caller decided.
    """

    code: tuple[str, ...] = ()
    trusted: bool = False

    def build(self, dataset: str, device: str = "cpu", options: Mapping[str, str] | None = None) -> Defense:
        """See `DefenseSpec.build`.

        Raises:
            InputError: for code in an option, unless it is trusted.
        """
        for name in self.code:
            if is_code((options or {}).get(name, "")):
                refuse_untrusted(str((options or {})[name]), self.trusted)
        return super().build(dataset, device, options)

    def recorded(self, dataset: str, options: Mapping[str, str] | None = None) -> dict[str, str]:
        """See `DefenseSpec.recorded`; of a path to code too the last part alone: its digest says more."""
        found = super().recorded(dataset, options)
        for name in self.code:
            location, colon, attribute = found.get(name, "").rpartition(":")
            if location.endswith(".py"):
                found[name] = f"{Path(location).name}{colon}{attribute}"
        return found
