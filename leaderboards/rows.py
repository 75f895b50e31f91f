"""From records to rows: which may share a table, how they are ranked, what each attack family left."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from assay.audits import Audit, read_audits
from assay.boards import Board, board_names
from assay.digest import ids_digest
from assay.errors import InputError
from assay.leaderboards.claims import Claim, load_claims, of_board
from assay.leaderboards.comparable import differences, why_unranked
from assay.leaderboards.ranking import LEVEL, ranks
from assay.leaderboards.samples import Scores, check_certification, final_scores, known_scores
from assay.protocol import FAMILIES, Family, ProfileName, load_protocol
from assay.record import RECORD, Record, read_record

__all__ = [
    "GROUPS", "LEVEL", "Group", "Incomparable", "Left", "Page", "Row", "Table", "collect", "refuse_strays",
]  # fmt: skip

Group = Literal["ranked", "known broken", "not ranked"]

GROUPS: tuple[Group, ...] = get_args(Group)
# The order of a page: the main table first, what is never ranked last.
_PROFILES: tuple[ProfileName, ...] = ("standard", "thorough", "quick")


@dataclass(frozen=True)
class Left:
    """What one family of attacks left of a row's accuracy.

    Attributes:
        value: the lowest accuracy in [0, 1] among the family's attacks.
        attack: the attack that reached it, of so many `attacks` of the family.
        broken: samples whose score the family's attacks lowered to 0.
        attempted: samples that were standing when the first of them ran.
        most_damage: below clean, no family went lower, and none that ran before it went as low.
    """

    value: float
    attack: str
    attacks: int
    broken: int
    attempted: int
    most_damage: bool


@dataclass(frozen=True)
class Row:
    """One record as a row.

    Attributes:
        path: of the record, relative to the leaderboards folder, with `/`.
        why: why the row isn't ranked; empty for ranked rows.
        left: for each attack family that ran.
        known: the best known robust accuracy: the mean over samples of the least of the record's score and those of
            its audits. The record's own where there is no audit, None where nothing was measured.
        audits: the oldest first.
        claims: numbers reported of its defense, in whatever setting; none of them takes part in ranking.
        rank: 1 + the number of ranked rows that are significantly better; None outside that group.
        tied: another row has the same rank.
    """

    record: Record
    path: str
    group: Group
    why: tuple[str, ...]
    left: Mapping[Family, Left]
    known: float | None = None
    audits: tuple[Audit, ...] = ()
    claims: tuple[Claim, ...] = ()
    rank: int | None = None
    tied: bool = False


@dataclass(frozen=True)
class Table:
    """Rows measured under one protocol digest, the only ones that may stand beside each other.

    Attributes:
        families: those that ran on any row.
        radii: the board's, where any row certifies.
    """

    profile: ProfileName
    digest: str
    families: tuple[Family, ...]
    radii: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def certifying(self) -> tuple[Row, ...]:
        """The rows that certify, in the table's order."""
        return tuple(row for row in self.rows if row.record.certification is not None)

    def group(self, name: Group) -> tuple[Row, ...]:
        """The rows of a group, best first."""
        return tuple(row for row in self.rows if row.group == name)

    def shared(self, name: Group) -> tuple[str, ...]:
        """Why none of a group's rows is ranked, where all share the reason: said once, not in every row."""
        rows = self.group(name)
        return (
            tuple(reason for reason in rows[0].why if all(reason in row.why for row in rows)) if len(rows) > 1 else ()
        )

    def why(self, row: Row) -> tuple[str, ...]:
        """A row's reasons beyond those that its whole group shares."""
        return tuple(reason for reason in row.why if reason not in self.shared(row.group))


@dataclass(frozen=True)
class Incomparable:
    """A record that no table of its board may show, and why."""

    record: Record
    path: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """All that is known of one board.

    Attributes:
        digest: that of the ranked `standard` profile.
        claims: all numbers reported elsewhere in the board's own setting, those without a row too.
    """

    board: Board
    digest: str
    tables: tuple[Table, ...]
    incomparable: tuple[Incomparable, ...]
    claims: tuple[Claim, ...] = ()

    @property
    def falls(self) -> tuple[tuple[Claim, tuple[Row, ...]], ...]:
        """How claims fell: each claim of the board that others tested or that a ranked row tests, with these rows."""
        ranked = [row for table in self.tables if table.profile == "standard" for row in table.group("ranked")]
        found = []
        for claim in self.claims:
            here = tuple(row for row in ranked if claim.defense and row.record.defense.card.name == claim.defense)
            if claim.fell_to or here:
                found.append((claim, here))
        return tuple(found)


def collect(folder: Path, board: Board, claims: Sequence[Claim] | None = None) -> Page:
    """A board's tables, from `records/BOARD/**/record.json` and `audits/` in a leaderboards folder.

    Args:
        claims: by default those of `claims/`.

    Raises:
        InputError: for a file that is not a record, or not a list of claims.
        IntegrityError: for a record or an audit that was changed after it was written, or that contradicts itself or
            its own sample table.
    """
    claims = load_claims(folder) if claims is None else claims
    protocol = load_protocol(board.protocol)
    digests = {profile: protocol.digest(profile) for profile in _PROFILES}
    prefixes = {len(board.ids): ids_digest(board.ids)}
    rows: dict[ProfileName, list[tuple[Row, Scores | None]]] = {profile: [] for profile in _PROFILES}
    incomparable = []
    audited = (folder / "audits" / board.name).is_dir()
    of_defense = {name: tuple(claim for claim in claims if claim.defense == name) for name in _named(claims)}
    for file in _records(folder / "records" / board.name):
        record = read_record(file, files=True)
        check_certification(file, record)
        path = file.relative_to(folder).as_posix()
        if (n := record.board.n) not in prefixes:
            prefixes[n] = ids_digest(board.ids[:n])
        if reasons := differences(record, board, digests[record.protocol.profile], prefixes[n]):
            incomparable.append(Incomparable(record, path, reasons))
            continue
        row = _row(record, path, board, of_defense.get(record.defense.card.name, ()))
        row = replace(row, audits=read_audits(folder, record)) if audited else row
        scores = None
        if row.group == "ranked" or row.audits:
            scores = known_scores(file, final_scores(file, record, board), row.audits, record, board)
        if row.audits and scores is not None:
            row = replace(row, known=float(scores.mean()))
        rows[record.protocol.profile].append((row, scores))
    tables = []
    for profile, found in rows.items():
        if found:
            families = tuple(family for family in FAMILIES if any(family in row.left for row, _ in found))
            radii = board.radii if any(row.record.certification is not None for row, _ in found) else ()
            tables.append(Table(profile, digests[profile], families, radii, _ranked(found)))
    return Page(board, digests["standard"], tuple(tables), tuple(incomparable), of_board(claims, board))


def refuse_strays(folder: Path) -> None:
    """Raises InputError for records that belong to no board: no table would show them."""
    known, records = set(board_names(folder)), folder / "records"
    for entry in sorted(records.iterdir()) if records.is_dir() else ():
        for file in _records(entry) if entry.name not in known else ():
            raise InputError(
                f"{file} belongs to no board: boards/{entry.name}.toml doesn't exist. Add it, or move the record."
            )


def _records(folder: Path) -> Iterator[Path]:
    """Every `record.json` below a folder, in the order of their paths' parts."""
    found = [Path(root, RECORD) for root, _, files in os.walk(folder) if RECORD in files]
    yield from sorted(found, key=lambda file: file.parts)


def _named(claims: Sequence[Claim]) -> set[str]:
    return {claim.defense for claim in claims if claim.defense}


def _row(record: Record, path: str, board: Board, claims: tuple[Claim, ...]) -> Row:
    why = why_unranked(record, board)
    group: Group = "not ranked" if why else "known broken" if record.defense.card.known_broken else "ranked"
    known = record.results.robust.value if record.results is not None else None
    return Row(record, path, group, why, _families(record), known=known, claims=claims)


def _families(record: Record) -> dict[Family, Left]:
    """What each family left, and which did the most damage.

    Samples broken earlier count as broken under every later attack, so the last attacks inherit
    the lowest value; the damage belongs to the one that reached it first in the cascade.
    """
    if record.results is None:
        return {}
    attacks = record.results.attacks
    order = [name for name in record.protocol.mandatory if name in attacks]
    order += [name for name in attacks if name not in order]
    if not order:
        return {}
    lowest = min(order, key=lambda name: attacks[name].value)  # the first of equals
    left: dict[Family, Left] = {}
    for family in FAMILIES:
        members = [name for name in order if attacks[name].family == family]
        if members:
            best = min(members, key=lambda name: attacks[name].value)
            left[family] = Left(
                value=attacks[best].value,
                attack=best,
                attacks=len(members),
                broken=sum(attacks[name].broken for name in members),
                attempted=max(attacks[name].attempted for name in members),
                most_damage=lowest in members and attacks[lowest].value < record.results.clean.value,
            )
    return left


def _ranked(found: Sequence[tuple[Row, Scores | None]]) -> tuple[Row, ...]:
    """The rows in order, best first, the ranked ones with their ranks."""
    competing = [(row, scores) for row, scores in found if row.group == "ranked" and scores is not None]
    ranked: dict[str, int] = {}
    if competing:
        stochastic = np.array([row.record.defense.card.traits.stochastic for row, _ in competing])
        scores = np.stack([each for _, each in competing])
        ranked = dict(zip((row.path for row, _ in competing), ranks(scores, stochastic), strict=True))
    shared = Counter(ranked.values())
    placed = [
        replace(row, rank=ranked[row.path], tied=shared[ranked[row.path]] > 1) if row.path in ranked else row
        for row, _ in found
    ]
    return tuple(sorted(placed, key=_order))


def _order(row: Row) -> tuple[int, bool, bool, float, str, str]:
    card = row.record.defense.card
    # Calibrators stand below the defenses that they calibrate, also where nothing is ranked.
    return GROUPS.index(row.group), row.known is None, card.known_broken, -(row.known or 0.0), card.name, row.path
