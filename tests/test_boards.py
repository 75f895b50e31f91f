from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from assay import data
from assay.boards import board_names, load_board
from assay.digest import ids_digest
from assay.errors import InputError
from assay.protocol import PROTOCOLS


@pytest.fixture
def toml(tmp_path: Path, zoo: ModuleType) -> Path:
    path: Path = zoo.write_board(tmp_path, zoo.board(n=20))
    return path


def edit(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return str(path)


def test_the_packaged_boards_are_what_the_issue_asked_for() -> None:
    found = {name: str(load_board(name).threat) for name in board_names()}
    assert found == {
        "digits-linf": "linf 1/5",
        "digits-l2": "l2 3/4",
        "cifar10-linf": "linf 8/255",
        "cifar10-l2": "l2 1/2",
        "imagenet-linf": "linf 4/255",
        "imagenet-l2": "l2 3",
    }


@pytest.mark.parametrize("name", board_names())
def test_a_packaged_board_holds_the_pinned_ids_and_revision(name: str) -> None:
    board = load_board(name)
    assert board.ids == data.board_ids(board.dataset)
    assert board.ids_sha256 == ids_digest(board.ids)
    assert board.revision == data.describe(board.dataset).revision
    assert board.protocol in PROTOCOLS
    assert len(board.ids) == {"digits": 200, "cifar10": 512, "imagenet": 512}[board.dataset]


def test_a_board_is_read_from_a_path(toml: Path) -> None:
    board = load_board(str(toml))
    assert (board.name, board.threat.eps, len(board.ids)) == ("toy", Fraction(1, 10), 20)


@pytest.mark.parametrize(
    ("written", "suggested"),
    [('"0.031"', "'8/255'"), ("0.031", "'8/255'"), ('"0.2"', "'1/5'"), ("0.5", "'1/2'"), ('"eight"', "got 'eight'")],
)
def test_a_decimal_eps_is_refused_with_the_fraction_suggested(toml: Path, written: str, suggested: str) -> None:
    with pytest.raises(InputError, match="exact fraction") as error:
        load_board(edit(toml, 'eps = "1/10"', f"eps = {written}"))
    assert suggested in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ids = [", "ids = [1796, ", "hashes to"),
        ("draws = 20", "draws = 9", "at least 10"),
        ("shard = 15", "shard = 0", "shard"),
        ("draws = 20", "draws = 20\ndrafts = 3", "drafts"),
        ('norm = "linf"', 'norm = "l1"', "linf"),
        ('name = "toy"', 'name = "other"', "must agree"),
        ('name = "toy"', "name = toy", "toy.toml"),
    ],
)
def test_a_bad_board_is_refused_and_named(toml: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(InputError, match=r"toy\.toml") as error:
        load_board(edit(toml, old, new))
    assert says in str(error.value)


def test_repeated_ids_are_refused(zoo: ModuleType) -> None:
    with pytest.raises(ValidationError, match="without repeats"):
        zoo.board(ids=(1, 2, 1))
    with pytest.raises(ValidationError, match="non-empty"):
        zoo.board(ids=())


def test_an_unknown_board_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'digits-linf'"):
        load_board("digit-linf")
    with pytest.raises(InputError, match="no file"):
        load_board(str(tmp_path / "absent.toml"))
