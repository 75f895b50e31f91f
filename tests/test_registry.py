from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from assay.card import Card
from assay.defense import Defense, DefenseSpec
from assay.errors import InputError
from assay.foreign import PACKAGES, OpenSpec
from assay.noise import Noise
from assay.registry import ATTACKS, DEFENSES, Registry, is_foreign, resolve_defense

SOURCE = """
    import torch
    from torch import nn
    from assay.card import Card
    from assay.defense import Defense, DefenseSpec

    CARD = Card(name="mine", title="Mine", summary="Three classes.")

    class Mine(Defense):
        card = CARD
        n_classes = 3

        def draw(self, x, noise):
            return x.flatten(1)[:, :3]

    class Demanding(Defense):
        card = CARD
        n_classes = 3

        def __init__(self, checkpoint):
            super().__init__()

    class Plain(nn.Module):
        n_classes = 3

        def forward(self, x):
            return x.flatten(1)[:, :3]

    instance = Mine()
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    spec = DefenseSpec(CARD, lambda dataset: Mine())
    junk = 3
    function = lambda x: x
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_defense.py"
    path.write_text(dedent(SOURCE))
    return path


@pytest.fixture
def registry() -> Registry[Card]:
    return Registry("card", Card, {"pgd": "no.such.module:X", "apgd": "assay.card:Traits", "dict": "assay.card:TRAITS"})


@pytest.mark.parametrize(
    ("registry", "typo", "meant"),
    [
        (DEFENSES, "difpure", "diffpure"),
        (DEFENSES, "undefnded", "undefended"),
        (ATTACKS, "agpd", "apgd"),
        (ATTACKS, "through-chain", "through_chain"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(registry: Registry[object], typo: str, meant: str) -> None:
    assert meant in registry
    with pytest.raises(InputError, match=rf"no (defense|attack) is called '{typo}'. Did you mean '{meant}'\? Known: "):
        registry[typo]


def test_a_name_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(InputError, match="Known: ") as error:
        resolve_defense("zzzzzzzz")
    assert "Did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in DEFENSES)


def test_a_name_that_is_taken_is_refused(registry: Registry[Card]) -> None:
    card = Card(name="x", title="X", summary="")
    registry.register("new", card)
    assert registry["new"] is card
    with pytest.raises(InputError, match="'new' is registered already"):
        registry.register("new", card)
    with pytest.raises(InputError, match="'pgd' is registered already"):
        registry.register("pgd", "another.module:X")


def test_names_are_listed_without_importing_what_they_name(registry: Registry[Card]) -> None:
    assert list(registry) == ["apgd", "dict", "pgd"]


def test_an_entry_of_the_wrong_kind_is_refused(registry: Registry[Card]) -> None:
    with pytest.raises(InputError, match="card 'dict' is a tuple, not a Card"):
        registry["dict"]


def test_an_entry_is_looked_up_once() -> None:
    registry = Registry("tuple", tuple, {"traits": "assay.card:TRAITS"})
    assert registry["traits"] is registry["traits"]


@pytest.mark.parametrize("name", ["module:object", "path/to/file.py:object", "C:/x.py:object"])
def test_foreign_names_are_told_apart(name: str) -> None:
    assert is_foreign(name)


def test_registered_names_are_not_foreign() -> None:
    assert not any(is_foreign(name) for name in DEFENSES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_s_models_are_not_foreign(package: str) -> None:
    assert not is_foreign(f"{package}:resnet18")
    assert is_foreign(f"my_{package}:resnet18")
    assert resolve_defense(f"{package}:resnet18").card.name == f"{package}:resnet18"


def test_trust_is_passed_on_to_a_defense_that_takes_code_by_its_options() -> None:
    for trust in (False, True):
        spec = resolve_defense("classifier", trust=trust)
        assert isinstance(spec, OpenSpec)
        assert spec.trusted is trust


def test_foreign_code_is_not_run_without_trust(tmp_path: Path) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(InputError, match="--trust"):
        resolve_defense(f"{trap}:x")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="no object 'x'"):
        resolve_defense(f"{trap}:x", trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "card"), [("Mine", "mine"), ("instance", "mine"), ("spec", "mine"), ("Plain", "plain")]
)
def test_what_a_file_may_offer(file: Path, name: str, card: str) -> None:
    spec = resolve_defense(f"{file}:{name}", trust=True)
    assert isinstance(spec, DefenseSpec)
    assert spec.card.name == card
    assert spec.source == file
    defense = spec.build("digits")
    assert isinstance(defense, Defense)
    assert not defense.training
    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(defense(x, Noise.from_seed(0, 2)), x.flatten(1)[:, :3])


def test_a_module_is_taken_as_a_deterministic_defense_with_frozen_parameters(file: Path) -> None:
    defense = resolve_defense(f"{file}:module", trust=True).build("digits")
    assert defense.n_classes == 10
    assert not defense.card.traits.names()
    assert not any(parameter.requires_grad for parameter in defense.parameters())


@pytest.mark.parametrize("name", ["junk", "function", "CARD"])
def test_junk_is_refused_with_what_was_expected(file: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' is a .*; expected a DefenseSpec, a Defense, or an nn.Module"):
        resolve_defense(f"{file}:{name}", trust=True)


def test_a_class_that_wants_arguments_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match=r"'Demanding'.*checkpoint"):
        resolve_defense(f"{file}:Demanding", trust=True)


def test_a_missing_object_suggests_the_nearest(file: Path) -> None:
    with pytest.raises(InputError, match=r"no object 'instanse'. Did you mean 'instance'"):
        resolve_defense(f"{file}:instanse", trust=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_file.py:x", "no file 'no_such_file.py'"),
        ("no_such_module:x", "no module 'no_such_module'"),
        ("no_such_package.module:x", "no module 'no_such_package.module'"),
        ("no_such_file.py", "no defense is called 'no_such_file.py'"),
    ],
)
def test_a_missing_place_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_defense(name, trust=True)


@pytest.fixture
def _path_kept() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.usefixtures("_path_kept")
def test_a_module_is_found_in_the_working_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert resolve_defense("my_defense:instance", trust=True).card.name == "mine"


@pytest.mark.usefixtures("_path_kept")
def test_a_module_that_misses_another_one_says_which(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.with_name("needy_defense.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(file.parent)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve_defense("needy_defense:x", trust=True)


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder, title in (("a", "First"), ("b", "Second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "defense.py").write_text(dedent(SOURCE).replace('title="Mine"', f'title="{title}"'))
    titles = [resolve_defense(f"{tmp_path / folder / 'defense.py'}:instance", trust=True).card.title for folder in "ab"]
    assert titles == ["First", "Second"]


def test_weights_for_another_data_set_are_refused() -> None:
    card = Card(name="mine", title="Mine", summary="", datasets=("digits",))
    spec = DefenseSpec(card, lambda dataset: pytest.fail("loaded"))
    with pytest.raises(InputError, match="mine has weights for digits, not for 'cifar10'"):
        spec.build("cifar10")
