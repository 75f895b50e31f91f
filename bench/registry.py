"""Names to objects: literal tables of built-ins, and `PACKAGE/NAME` for plugins, loaded when asked for.

`module:object` and `path/to/file.py:object` are for code that is not installed as a plugin, and need trust.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import FunctionType
from typing import Any, Generic, TypeVar

from torch import nn

from assay.attack import AttackSpec
from assay.card import Card, Traits
from assay.certificate import Certificate, refuse_unsound
from assay.defense import Defense, DefenseSpec, ForeignModule
from assay.errors import InputError, nearest
from assay.foreign import PACKAGES, OpenSpec, call, find_object, is_code, refuse_untrusted
from assay.plugins import installed, load_plugin

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of names, each an object or the `module:object` where one is.

    Iterating it gives the built-ins alone: what else is installed changes neither a board's calibration nor
    `assay run --all`. Looking up a name finds plugins too.

    Args:
        kind: what error messages call an entry.
        expected: the class every entry must have.
        entries: the built-ins.
        group: the entry points of installed packages that belong here, under `PACKAGE/NAME`; none where empty.
    """

    def __init__(self, kind: str, expected: type[T], entries: Mapping[str, str], group: str = "") -> None:
        self.kind = kind
        self.group = group
        self._expected = expected
        self._entries: dict[str, str | T] = dict(entries)

    def register(self, name: str, entry: str | T) -> None:
        """Adds an entry.

        Raises:
            InputError: for a name that is taken: silently replacing a defense would change what a row means.
        """
        if name in self:
            raise InputError(f"a {self.kind} named {name!r} is registered already; choose another name.")
        self._entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._plugins(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __getitem__(self, name: str) -> T:
        """The entry called `name`, imported if it has not been yet.

        Raises:
            InputError: for an unknown name, with the nearest known one, or a plugin that can't be loaded.
        """
        if name not in self._entries:
            return self._plugin(name)[0]
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = getattr(importlib.import_module(module), attribute)
            if not isinstance(entry, self._expected):
                raise InputError(f"{self.kind} {name!r} is a {type(entry).__name__}, not a {self._expected.__name__}.")
            self._entries[name] = entry
        return entry

    def file(self, name: str) -> Path | None:
        """The file that holds a plugin; None for a built-in, whose code the project's own digest covers.

        Raises:
            InputError: as a look-up does.
        """
        return None if name in self._entries else self._plugin(name)[1]

    def plugins(self) -> tuple[dict[str, T], dict[str, str]]:
        """What installed packages add, by name, and why the rest of it can't be loaded. Imports them; never raises."""
        found: dict[str, T] = {}
        broken: dict[str, str] = {}
        for name in self._plugins():
            try:
                found[name] = self[name]
            except InputError as error:
                broken[name] = str(error)
        return found, broken

    def _plugins(self, name: str = "/") -> Mapping[str, tuple[EntryPoint, ...]]:
        # Only a name with a slash can be a plugin's: for others nobody's metadata is read.
        return installed(self.group) if self.group and "/" in name else {}

    def _plugin(self, name: str) -> tuple[T, Path | None]:
        plugins = self._plugins()
        if name not in plugins:
            raise InputError(f"no {self.kind} is called {name!r}.{nearest(name, [*self._entries, *plugins])}")
        thing, file = load_plugin(self.kind, name, plugins[name], self._expected)
        if isinstance(thing, DefenseSpec) and thing.source is None:
            thing = replace(thing, source=file)
        return thing, file


DEFENSES: Registry[DefenseSpec] = Registry(
    "defense",
    DefenseSpec,
    {
        "undefended": "assay.defenses.undefended:SPEC",
        "classifier": "assay.defenses.classifier:SPEC",
        "adversarial_training": "assay.defenses.adversarial_training:SPEC",
        "adversarial_training_l2": "assay.defenses.adversarial_training:L2",
        "lipschitz": "assay.defenses.lipschitz:SPEC",
        "trades": "assay.defenses.trades:SPEC",
        "smoothing": "assay.defenses.smoothing:SPEC",
        "diffusion_classifier": "assay.defenses.diffusion_classifier:SPEC",
        "epndc": "assay.defenses.epndc:SPEC",
        "apndc": "assay.defenses.apndc:SPEC",
        "denoised_smoothing": "assay.defenses.denoised_smoothing:SPEC",
        "variational_smoothing": "assay.defenses.variational_smoothing:SPEC",
        "adp": "assay.defenses.adp:SPEC",
        "adp_energy": "assay.defenses.adp:ADP_ENERGY",
        "diffpure": "assay.defenses.diffpure:SPEC",
        "gdmp": "assay.defenses.gdmp:SPEC",
        "likelihood_maximisation": "assay.defenses.likelihood_maximisation:SPEC",
        "victim_guided": "assay.defenses.victim_guided:SPEC",
        "robust_guidance": "assay.defenses.robust_guidance:SPEC",
        "bit_depth": "assay.defenses.broken:BIT_DEPTH",
        "saturated_logits": "assay.defenses.broken:SATURATED_LOGITS",
        "random_resize": "assay.defenses.broken:RANDOM_RESIZE",
    },
    group="assay.defenses",
)

ATTACKS: Registry[AttackSpec] = Registry(
    "attack",
    AttackSpec,
    {
        "uniform": "assay.attacks.uniform:SPEC",
        "transfer": "assay.attacks.transfer:SPEC",
        "pgd": "assay.attacks.pgd:SPEC",
        "apgd": "assay.attacks.apgd:SPEC",
        "square": "assay.attacks.square:SPEC",
        "bpda": "assay.attacks.bpda:SPEC",
        "through_chain": "assay.attacks.through_chain:SPEC",
        "surrogate": "assay.attacks.surrogate:SPEC",
        "step_losses": "assay.attacks.step_losses:SPEC",
        "diffhammer": "assay.attacks.diffhammer:SPEC",
        "autoattack": "assay.attacks.autoattack:SPEC",
    },
    group="assay.attacks",
)


_NAMED: Registry[FunctionType] = Registry(
    "kind of named model", FunctionType, {"classifier": "assay.defenses.classifier:named"}
)
"""What makes a defense of `PACKAGE:NAME`."""

CERTIFICATES: Registry[Certificate] = Registry(
    "certificate",
    Certificate,
    {
        "smoothing": "assay.certificates.smoothing:SMOOTHING",
        "two_class_smoothing": "assay.certificates.smoothing:TWO_CLASS",
        "selected_smoothing": "assay.certificates.selected_smoothing:SELECTED_SMOOTHING",
        "elastic_smoothing": "assay.certificates.elastic_smoothing:ELASTIC_SMOOTHING",
        "diffusion_lipschitz": "assay.certificates.diffusion_errors:DIFFUSION_LIPSCHITZ",
        "diffusion_isoperimetric": "assay.certificates.diffusion_errors:DIFFUSION_ISOPERIMETRIC",
        "lipschitz": "assay.certificates.lipschitz:LIPSCHITZ",
        "soft_smoothing": "assay.certificates.soft_smoothing:SOFT_SMOOTHING",
    },
    group="assay.certificates",
)


def resolve_certificate(
    name: str, *, trust: bool = False, beside: Path | None = None
) -> tuple[Certificate, Path | None]:
    """A certificate from a registered name, or `module:object` or `path/to/file.py:object` of somebody's own.

    Args:
        trust: execute code from outside the registry.
        beside: the file of the defense that names it, in whose folder a relative path is looked for too.

    Returns:
        The certificate, and of a foreign or installed one the file that holds it.

    Raises:
        InputError: for an unknown name (with the nearest), that of an unsound scheme (with the reason), for foreign
            code without `trust`, or for an object that is no certificate.
    """
    refuse_unsound(name)
    if ":" not in name or name in CERTIFICATES:
        return CERTIFICATES[name], CERTIFICATES.file(name)
    location, _, attribute = name.rpartition(":")
    if location.endswith(".py") and beside is not None and not Path(location).is_file():
        near = beside.parent / location
        if not near.is_file():
            raise InputError(f"no file {location!r}, neither here nor as {near}: where does certificate {name!r} lie?")
        location = str(near)
    refuse_untrusted(f"{location}:{attribute}", trust)
    # A defense and its certificate may share a file, and then its classes.
    found, _, file = find_object(f"{location}:{attribute}", loaded=True)
    found = found() if isinstance(found, type) and issubclass(found, Certificate) else found
    if not isinstance(found, Certificate):
        raise InputError(f"{name!r} is a {type(found).__name__}; expected a Certificate.")
    lacking = [word for word in ("name", "summary", "source") if not isinstance(getattr(found, word, None), str)]
    if lacking:
        raise InputError(f"certificate {name!r} says nothing of its {', '.join(lacking)}; set them on its class.")
    if found.name in CERTIFICATES:
        raise InputError(
            f"certificate {name!r} calls itself {found.name!r}, which is registered; give it another name."
        )
    return found, Path(file) if file else None


def is_foreign(name: str) -> bool:
    """Whether `name` points at somebody's code (`module:object`) rather than into the registry or a package's zoo."""
    return is_code(name) and name not in DEFENSES


def resolve_defense(name: str, *, trust: bool = False, norm: str = "") -> DefenseSpec:
    """A defense from a registered or installed name, `module:object`, `path/to/file.py:object`, or `PACKAGE:NAME`.

    The object may be a `DefenseSpec`, a `Defense` (instance or class without arguments), or an
    `nn.Module` from images in [0, 1] to logits, taken as deterministic. The packages are robustbench,
    timm and torchvision, whose models need no trust, nor do plugins: who installed them has given it.

    Args:
        trust: execute code from outside the registry, whether it is the defense or one of its options.
        norm: the board's, by which a zoo of robust models tells apart two of one name.

    Raises:
        InputError: for an unknown name (with the nearest), for foreign code without `trust`, or for
            an object that is none of these.
    """
    package, _, model = name.partition(":")
    if package in PACKAGES and model and name not in DEFENSES:
        spec: DefenseSpec = _NAMED["classifier"](package, model, norm)
        return spec
    if not is_foreign(name):
        spec = DEFENSES[name]
        return replace(spec, trusted=trust) if isinstance(spec, OpenSpec) else spec
    refuse_untrusted(name, trust)
    thing, attribute, file = find_object(name)
    return _as_spec(thing, attribute, file)


def _as_spec(thing: Any, name: str, file: str | None) -> DefenseSpec:
    source = Path(file) if file else None
    if isinstance(thing, DefenseSpec):
        return thing if thing.source else replace(thing, source=source)
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        thing = call(thing, name)
    if isinstance(thing, Defense):
        return DefenseSpec(thing.card, lambda dataset: thing, source)
    if isinstance(thing, nn.Module):
        card = Card(name=name.lower().lstrip("_"), title=name, summary="A user's module.", traits=Traits())
        classes = getattr(thing, "n_classes", 10)
        return DefenseSpec(card, lambda dataset: ForeignModule(thing, card, classes), source)
    raise InputError(
        f"{name!r} is a {type(thing).__name__}; expected a DefenseSpec, a Defense, or an nn.Module from images "
        f"in [0, 1] to logits."
    )
