"""What installed packages add to the registries. A package is a folder of metadata here, as pip leaves one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from assay.errors import InputError
from assay.registry import (
    ATTACKS,
    CERTIFICATES,
    DEFENSES,
    Registry,
    is_foreign,
    resolve_certificate,
    resolve_defense,
)

SPEC = """
from assay.card import Card
from assay.defense import DefenseSpec

def load(dataset):
    raise AssertionError("listing loads no weights")

SPEC = DefenseSpec(Card(name="{name}", title="T", summary="A toy."), load)
"""
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(package, {group: {entry: value}}, module=source)` puts a package where Python looks."""
    before = set(sys.modules)

    def make(package: str, groups: dict[str, dict[str, str] | str], **modules: str) -> Path:
        site = tmp_path / f"site-{package}"
        info = site / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = []
        for group, entries in groups.items():
            text = entries if isinstance(entries, str) else "\n".join(f"{k} = {v}" for k, v in entries.items())
            lines.append(f"[assay.{group}]\n{text}\n")
        (info / "entry_points.txt").write_text("\n".join(lines))
        for module, source in modules.items():
            (site / f"{module}.py").write_text(dedent(source))
        monkeypatch.syspath_prepend(site)
        return site

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


def test_a_plugin_is_found_by_its_package_and_name(install: Install) -> None:
    site = install(
        "My_Lab.x", {"defenses": {"looks": "plug_looks:SPEC"}}, plug_looks=SPEC.format(name="my-lab-x/looks")
    )
    assert "my-lab-x/looks" in DEFENSES
    assert "plug_looks" not in sys.modules, "a name is enough to be listed"
    assert not is_foreign("my-lab-x/looks")
    spec = resolve_defense("my-lab-x/looks")
    assert spec.card.name == "my-lab-x/looks"
    assert spec.source == site / "plug_looks.py", "records hash it"
    found, broken = DEFENSES.plugins()
    assert (list(found), broken) == (["my-lab-x/looks"], {})


def test_plugins_change_neither_the_calibration_nor_run_all(install: Install) -> None:
    before = list(DEFENSES)
    install("lab", {"defenses": {"looks": "plug_all:SPEC"}}, plug_all=SPEC.format(name="lab/looks"))
    assert list(DEFENSES) == before


def test_an_unknown_name_may_mean_a_plugin(install: Install) -> None:
    install("lab", {"defenses": {"looks": "plug_near:SPEC"}}, plug_near=SPEC.format(name="lab/looks"))
    with pytest.raises(InputError, match=r"no defense is called 'lab/look'. Did you mean 'lab/looks'\?"):
        resolve_defense("lab/look")
    with pytest.raises(InputError, match=r"Did you mean 'lab/looks'\?"):
        resolve_defense("looks")


BREAKAGES = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def (", "SyntaxError"),
    "exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "absent": ("x = 1", "AttributeError"),
    "kind": ("SPEC = 'a string'", "is a str, not a DefenseSpec"),
    "name": (SPEC.format(name="diffpure"), "calls itself 'diffpure'; records need its whole name: name='lab/looks'"),
}


@pytest.mark.parametrize("how", BREAKAGES)
def test_a_broken_plugin_is_named_and_breaks_nothing_else(install: Install, how: str) -> None:
    source, says = BREAKAGES[how]
    install("lab", {"defenses": {"looks": f"plug_broken_{how}:SPEC"}}, **{f"plug_broken_{how}": source})
    install("other", {"defenses": {"fine": "plug_fine:SPEC"}}, plug_fine=SPEC.format(name="other/fine"))
    found, broken = DEFENSES.plugins()
    assert list(found) == ["other/fine"]
    assert list(broken) == ["lab/looks"]
    for message in (broken["lab/looks"], _raised("lab/looks")):
        assert message.startswith("defense 'lab/looks' of the installed package lab 1.2 ")
        assert says in message
        assert message.endswith("Repair lab, or uninstall it.")
    assert resolve_defense("undefended").card.name == "undefended"


def _raised(name: str) -> str:
    with pytest.raises(InputError) as error:
        resolve_defense(name)
    return str(error.value)


def test_two_entry_points_of_one_name_collide(install: Install) -> None:
    source = SPEC.format(name="lab/looks") + "OTHER = SPEC\n"
    install("lab", {"defenses": "looks = plug_twice:SPEC\nlooks = plug_twice:OTHER"}, plug_twice=source)
    assert "declared twice, as 'plug_twice:SPEC' and as 'plug_twice:OTHER'" in _raised("lab/looks")
    assert list(DEFENSES.plugins()[1]) == ["lab/looks"]


def test_a_name_that_no_card_could_have_is_refused(install: Install) -> None:
    install("lab", {"defenses": {"Two Looks": "plug_odd:SPEC"}}, plug_odd=SPEC.format(name="x"))
    (message,) = DEFENSES.plugins()[1].values()
    assert "needs a name of lower-case letters" in message


def test_a_plugin_s_name_can_not_be_registered_again(install: Install) -> None:
    install("lab", {"defenses": {"looks": "plug_taken:SPEC"}}, plug_taken=SPEC.format(name="lab/looks"))
    with pytest.raises(InputError, match="'lab/looks' is registered already"):
        DEFENSES.register("lab/looks", "another.module:X")


def test_attacks_and_certificates_have_groups_of_their_own(install: Install) -> None:
    source = """
    from assay.attack import AttackSpec
    from assay.certificates.smoothing import SmoothingCertificate

    class Mine(SmoothingCertificate):
        name, summary, source = "lab/proof", "A toy.", "Here."

    ATTACK = AttackSpec("lab/nudge", "A toy.", lambda target, x, y, threat, noise: x)
    PROOF = Mine()
    """
    groups = {"attacks": {"nudge": "plug_more:ATTACK"}, "certificates": {"proof": "plug_more:PROOF"}}
    site = install("lab", groups, plug_more=source)
    assert ATTACKS["lab/nudge"].name == "lab/nudge"
    assert ATTACKS.file("pgd") is None
    certificate, file = resolve_certificate("lab/proof")
    assert (certificate.name, file) == ("lab/proof", site / "plug_more.py")
    assert certificate in CERTIFICATES.plugins()[0].values()
    assert "lab/nudge" not in DEFENSES


def test_a_registry_without_a_group_looks_at_nobody(install: Install) -> None:
    install("lab", {"defenses": {"looks": "plug_none:SPEC"}})
    registry = Registry("card", str, {})
    assert "lab/looks" not in registry
    assert registry.plugins() == ({}, {})
