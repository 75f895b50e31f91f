"""What installed packages add to the registries: entry points, found by their metadata and imported when asked for."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from assay.errors import InputError

_NAME = r"[a-z0-9][a-z0-9_.-]*"


def installed(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of a group, by `PACKAGE/NAME`; nothing is imported.

    PACKAGE is the distribution's name, lower case, with `-` for each run of `-`, `_` and `.`. A name with more than
    one entry point is a collision, which `load_plugin` refuses.
    """
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        name = f"{_package(point)}/{point.name}"
        # The same line read twice is one entry point.
        if all(point.value != other.value for other in found.get(name, ())):
            found[name] = (*found.get(name, ()), point)
    return dict(sorted(found.items()))


def load_plugin(kind: str, name: str, points: tuple[EntryPoint, ...], expected: type[Any]) -> tuple[Any, Path | None]:
    """The object that an installed package calls `name`, and the file of the module that holds it.

    Args:
        kind: what messages call it.
        points: its entry points, as `installed` found them.
        expected: the class that it must have.

    Raises:
        InputError: for a plugin that can't be imported, whatever it raises, that is declared twice, is something
            else, or calls itself something else; each says which package has to be repaired.
    """
    point = points[0]
    package = f"{point.dist.name} {point.dist.version}" if point.dist else _package(point)
    whose = f"{kind} {name!r} of the installed package {package}"
    remedy = f"Repair {_package(point)}, or uninstall it."
    if len(points) > 1:
        places = " and as ".join(repr(each.value) for each in points)
        raise InputError(f"{whose} is declared twice, as {places}. {remedy}")
    if not re.fullmatch(_NAME, point.name):
        raise InputError(f"{whose} needs a name of lower-case letters, digits, '_', '.' and '-'. {remedy}")
    try:
        thing = point.load()
    except (Exception, SystemExit) as error:  # somebody's module may raise anything while it is imported
        raise InputError(
            f"{whose} can't be loaded from {point.value!r}: {type(error).__name__}: {error}. {remedy}"
        ) from error
    if not isinstance(thing, expected):
        raise InputError(
            f"{whose} is a {type(thing).__name__}, not a {expected.__name__}: {point.value!r} names the wrong object. "
            f"{remedy}"
        )
    own = getattr(getattr(thing, "card", thing), "name", None)
    if own != name:
        raise InputError(f"{whose} calls itself {own!r}; records need its whole name: name={name!r}. {remedy}")
    file = getattr(sys.modules.get(point.module), "__file__", None)
    return thing, Path(file) if file else None


def _package(point: EntryPoint) -> str:
    """The package's name in the one way of writing it."""
    return re.sub(r"[-_.]+", "-", point.dist.name).lower() if point.dist else "unknown"
