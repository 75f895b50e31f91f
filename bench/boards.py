"""Boards: a fixed, hashed list of samples, a threat model and a protocol version; rows compare only inside one."""

from __future__ import annotations

import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from assay.card import SLUG, Strict, explain
from assay.digest import ids_digest
from assay.errors import InputError, nearest
from assay.threat import Norm, ThreatModel, parse_eps


class Board(Strict):
    """One board, as its TOML file says.

    Attributes:
        name: the file's stem.
        dataset, revision: which data, pinned.
        norm, eps: the threat model; eps an exact fraction as text.
        protocol: the protocol version its rows are run under.
        ids: sample ids (positions in the data set's own published order). Every prefix of the list
            is itself spread over the classes or the test set, so a smaller run takes a prefix.
        ids_sha256: the digest of `ids`, checked when the board is read.
        draws: fresh draws that score a candidate of a stochastic defense, at least 10.
        shard: samples a shard.
        source: the registered defense whose adversarial examples are transferred.
        radii: the l2 radii of the certified columns, exact fractions as text, increasing. Without any
            nothing is certified on this board.
    """

    name: str = Field(pattern=SLUG)
    description: str = ""
    dataset: str
    revision: str
    norm: Norm
    eps: str
    protocol: str
    draws: int = 20
    shard: int = 50
    source: str = "undefended"
    radii: tuple[str, ...] = ()
    ids: tuple[int, ...]
    ids_sha256: str

    @field_validator("eps", mode="before")
    @classmethod
    def _exact(cls, value: Any) -> str:
        return str(parse_eps(value))

    @field_validator("radii", mode="before")
    @classmethod
    def _exact_radii(cls, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list of fractions, got {value!r}")
        return tuple(str(parse_eps(radius)) for radius in value)

    @model_validator(mode="after")
    def _consistent(self) -> Board:
        if len(set(self.ids)) != len(self.ids) or not self.ids:
            raise ValueError("ids must be a non-empty list without repeats")
        found = ids_digest(self.ids)
        if found != self.ids_sha256:
            raise ValueError(f"ids_sha256 says {self.ids_sha256}, the list hashes to {found}")
        if self.draws < 10:
            raise ValueError(f"draws must be at least 10, got {self.draws}")
        values = [float(parse_eps(radius)) for radius in self.radii]
        if values and self.norm != "l2":
            raise ValueError(f"radii are l2 radii: they belong on an l2 board, not on one of {self.norm}")
        if values != sorted(set(values)):
            raise ValueError(f"radii must increase, got {', '.join(self.radii)}")
        if self.shard < 1:
            raise ValueError(f"shard must be at least 1, got {self.shard}")
        return self

    @property
    def threat(self) -> ThreatModel:
        """The board's threat model."""
        return ThreatModel(self.norm, parse_eps(self.eps))


def board_names(folder: Path | None = None) -> list[str]:
    """The names of the boards in `folder`, by default the packaged ones, sorted."""
    return sorted(entry.name[:-5] for entry in _boards(folder).iterdir() if entry.name.endswith(".toml"))


def load_board(name: str, folder: Path | None = None) -> Board:
    """Reads a board by name, or from a path ending in `.toml`.

    Raises:
        InputError: for an unknown name (with the nearest), or a file that is not a valid board.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"no file {name!r}.")
        text = path.read_text()
        name = path.stem
    elif name in board_names(folder):
        text = _boards(folder).joinpath(f"{name}.toml").read_text()
    else:
        raise InputError(f"no board is called {name!r}.{nearest(name, board_names(folder))}")
    try:
        board = Board.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError, InputError) as error:
        raise InputError(f"{name}.toml is not a valid board: {explain(error)}") from error
    if board.name != name:
        raise InputError(f"{name}.toml names its board {board.name!r}; the two must agree.")
    return board


def _boards(folder: Path | None) -> Traversable:
    return (folder or resources.files("assay.leaderboards")) / "boards"
