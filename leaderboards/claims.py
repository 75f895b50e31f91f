"""Claims: numbers reported elsewhere, each with its source and how it was read; never ranked, never measured here."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from assay.boards import Board
from assay.card import SLUG, Strict, explain
from assay.errors import InputError
from assay.threat import Norm, parse_eps

CLAIMS = "claims"
What = Literal["robust", "clean", "certified"]
Precision = Literal["exact", "at least", "about"]
Rule = Literal["", "average", "worst draw", "majority"]
NORM_SIGN: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2"}


class Source(Strict):
    """Who reported a number; `url` an http or https address, or empty."""

    title: str = Field(min_length=1, max_length=300)
    url: str = Field(default="", pattern=r"^(https?://\S+)?$", max_length=300)


class Number(Strict):
    """One reported number.

    Attributes:
        value: in [0, 1].
        precision: `at least` and `about` where the source gives no more.
        rule: how answers of a stochastic defense were counted, where the source says so: the average over draws, the
            worst of them, or a majority's vote.
        attack: as the source names it; empty where it doesn't, and for certified numbers.
        n: samples, where known.
        read: where in the source the number stands, or from which later paper it was read.
        note: what else must be known to read it.
    """

    value: float = Field(ge=0, le=1)
    precision: Precision = "exact"
    rule: Rule = ""
    attack: str = Field(default="", max_length=200)
    n: int | None = Field(default=None, ge=1)
    source: Source
    read: str = Field(min_length=1, max_length=300)
    note: str = Field(default="", max_length=600)

    @property
    def percent(self) -> str:
        """`69.71`, `80+`, `about 5`: in percent, with the figures that the source gives."""
        figure = f"{100 * self.value:.2f}".rstrip("0").rstrip(".")
        return f"{figure}+" if self.precision == "at least" else f"{'about ' * (self.precision == 'about')}{figure}"

    @property
    def how(self) -> str:
        """The attack and the rule, such as `DiffBreak, 10 draws; worst draw`; empty where neither is known."""
        return "; ".join(part for part in (self.attack, self.rule) if part)


class Claim(Strict):
    """What was claimed of a defense in one setting, and what others found later.

    Attributes:
        defense: the registered name of its card, empty where none is registered.
        title: the system that the number is of, as a table prints it.
        what: robust, clean or certified accuracy.
        dataset, norm, eps: the setting. Of a certified number `eps` is the radius.
        envelope: at each radius the best of several classifiers, so that the numbers are of no single one.
        claimed: by the defense's authors; empty where only later numbers are known.
        fell_to: later numbers, by others, in the same setting.
    """

    defense: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9_./:-]*)?$", max_length=120)
    title: str = Field(min_length=1, max_length=120)
    what: What
    dataset: str = Field(pattern=SLUG, max_length=60)
    norm: Norm
    eps: str
    envelope: bool = False
    claimed: tuple[Number, ...] = ()
    fell_to: tuple[Number, ...] = ()

    @field_validator("eps", mode="before")
    @classmethod
    def _exact(cls, value: Any) -> str:
        return str(parse_eps(value))

    @model_validator(mode="after")
    def _says_something(self) -> Claim:
        if not self.claimed and not self.fell_to:
            raise ValueError("expected at least one number, in claimed or fell_to")
        for numbers in (self.claimed, self.fell_to):
            told = [(number.attack, number.rule, number.source.title) for number in numbers]
            for each in told:
                if told.count(each) > 1:
                    raise ValueError(f"two numbers by {each[2]!r} under the same attack and rule ({each[0]!r})")
        if self.what == "certified" and self.norm != "l2":
            raise ValueError(f"a certified number belongs to an l2 radius, not to {self.norm}")
        return self

    @property
    def setting(self) -> str:
        """`cifar10, ℓ∞ 8/255`, or `cifar10, certified at ℓ2 1/4`."""
        certified = "certified at " if self.what == "certified" else "clean, " if self.what == "clean" else ""
        return f"{self.dataset}, {certified}{NORM_SIGN[self.norm]} {self.eps}"

    def belongs_to(self, board: Board) -> bool:
        """Whether its data set and threat model, or certified radius, are the board's."""
        radii = board.radii if self.what == "certified" else (board.eps,)
        return (self.dataset, self.norm) == (board.dataset, board.norm) and self.eps in radii


class _File(Strict):
    claim: tuple[Claim, ...]


def load_claims(folder: Path | None = None) -> tuple[Claim, ...]:
    """All claims in `folder/claims`, by default the packaged ones, by file name and then as they stand there.

    Raises:
        InputError: for a file that is not a valid list of claims, or a system with two claims in one setting.
    """
    where = (folder or resources.files("assay.leaderboards")) / CLAIMS
    if not where.is_dir():
        return ()
    found: dict[tuple[str, ...], str] = {}
    claims: list[Claim] = []
    for entry in sorted(where.iterdir(), key=lambda entry: entry.name):
        if not entry.name.endswith(".toml"):
            continue
        for claim in _read(entry.name, entry.read_bytes()):
            key = (claim.title, claim.what, claim.dataset, claim.norm, claim.eps)
            if key in found:
                raise InputError(
                    f"{CLAIMS}/{entry.name} claims {claim.title!r} in the setting {claim.setting} again: "
                    f"{CLAIMS}/{found[key]} has it already. Add the number there."
                )
            found[key] = entry.name
            claims.append(claim)
    return tuple(claims)


def of_board(claims: Iterable[Claim], board: Board) -> tuple[Claim, ...]:
    """Those in the board's own setting."""
    return tuple(claim for claim in claims if claim.belongs_to(board))


def claimed_text(claims: Iterable[Claim], board: Board) -> str:
    """What was claimed of one defense, on one line; each setting but the board's own is named.

    `this setting: 78.1; imagenet30, ℓ∞ 8/255: 83.5`. Certified numbers of one system stand together:
    `cifar10, certified at ℓ2 1/4: 79.3, 1/2: 65.5`.
    """
    systems: dict[tuple[str, str], list[str]] = {}
    given = [claim for claim in claims if claim.claimed]
    several = len({claim.title for claim in given}) > 1
    for claim in given:
        numbers = " and ".join(f"{each.percent}{f' ({each.how})' if each.how else ''}" for each in claim.claimed)
        title = f"{claim.title}, " if several else ""
        if claim.what == "certified":
            envelope = ", best of several classifiers" if claim.envelope else ""
            where = f"{title}{claim.dataset}, certified{envelope}, at {NORM_SIGN[claim.norm]}"
            systems.setdefault((where, " "), []).append(f"{claim.eps}: {numbers}")
        else:
            own = claim.what == "robust" and claim.belongs_to(board)
            systems.setdefault((f"{title}{'this setting' if own else claim.setting}", ": "), []).append(numbers)
    return "; ".join(f"{where}{between}{', '.join(told)}" for (where, between), told in systems.items())


def _read(name: str, content: bytes) -> tuple[Claim, ...]:
    try:
        return _File.model_validate(tomllib.loads(content.decode())).claim
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError, InputError) as error:
        raise InputError(f"{CLAIMS}/{name} is not a valid list of claims: {explain(error)}") from error
