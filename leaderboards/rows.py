"""From records to rows: which may share a table, how they are ranked, what each attack family left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from assay.boards import Board, board_names
from assay.digest import ids_digest
from assay.errors import InputError
from assay.leaderboards.samples import Scores, check_certification, ranked_scores
from assay.protocol import FAMILIES, Family, ProfileName, load_protocol
from assay.record import RECORD, Record, read_record
from assay.statistics import mcnemar, paired_permutation

Group = Literal["ranked", "known broken", "not ranked"]

GROUPS: tuple[Group, ...] = get_args(Group)
LEVEL = 0.05
"""Two rows get different ranks where a paired test's p-value lies below this; no correction for many rows."""
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
        rank: 1 + the number of ranked rows that are significantly better; None outside that group.
        tied: another row has the same rank.
    """

    record: Record
    path: str
    group: Group
    why: tuple[str, ...]
    left: Mapping[Family, Left]
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
    """All that is known of one board. `digest` is that of the ranked `standard` profile."""

    board: Board
    digest: str
    tables: tuple[Table, ...]
    incomparable: tuple[Incomparable, ...]


def collect(folder: Path, board: Board) -> Page:
    """A board's tables, from `records/BOARD/**/record.json` in a leaderboards folder.

    Raises:
        InputError: for a file that is not a record.
        IntegrityError: for a record that was changed after it was written, or that contradicts itself or
            its own sample table.
    """
    protocol = load_protocol(board.protocol)
    rows: dict[ProfileName, list[tuple[Row, Scores | None]]] = {profile: [] for profile in _PROFILES}
    incomparable = []
    for file in sorted((folder / "records" / board.name).rglob(RECORD)):
        record = read_record(file, files=True)
        check_certification(file, record)
        path = file.relative_to(folder).as_posix()
        if reasons := _differences(record, board, protocol.digest(record.protocol.profile)):
            incomparable.append(Incomparable(record, path, reasons))
            continue
        row = _row(record, path, board)
        scores = ranked_scores(file, record, board) if row.group == "ranked" else None
        rows[record.protocol.profile].append((row, scores))
    tables = []
    for profile, found in rows.items():
        if found:
            families = tuple(family for family in FAMILIES if any(family in row.left for row, _ in found))
            radii = board.radii if any(row.record.certification is not None for row, _ in found) else ()
            tables.append(Table(profile, protocol.digest(profile), families, radii, _ranked(found)))
    return Page(board, protocol.digest("standard"), tuple(tables), tuple(incomparable))


def refuse_strays(folder: Path) -> None:
    """Raises InputError for records that belong to no board: no table would show them."""
    known = set(board_names(folder))
    for file in sorted((folder / "records").rglob(RECORD)):
        name = file.relative_to(folder / "records").parts[0]
        if name not in known:
            raise InputError(
                f"{file} belongs to no board: boards/{name}.toml doesn't exist. Add it, or move the record."
            )


def _differences(record: Record, board: Board, digest: str) -> tuple[str, ...]:
    """Why a record can't be compared with this board's rows; empty where it can."""
    ran, protocol = record.board, record.protocol
    reasons = []
    if (protocol.id, protocol.digest) != (board.protocol, digest):
        reasons.append(
            f"protocol {protocol.id} {protocol.profile} ({protocol.digest[:12]}), here {board.protocol} ({digest[:12]})"
        )
    if ran.name != board.name:
        reasons.append(f"run on board {ran.name}")
    if (ran.dataset, ran.revision) != (board.dataset, board.revision):
        reasons.append(f"data {ran.dataset} {ran.revision}, here {board.dataset} {board.revision}")
    if (ran.threat.norm, ran.threat.eps) != (board.norm, board.eps):
        reasons.append(f"threat {ran.threat.norm} {ran.threat.eps}, here {board.threat}")
    if ran.draws != board.draws:
        reasons.append(f"{ran.draws} draws a candidate, here {board.draws}")
    if ran.size != len(board.ids) or ran.ids_sha256 != ids_digest(board.ids[: ran.n]):
        reasons.append(f"other samples ({ran.n} of {ran.size}, ids {ran.ids_sha256[:12]})")
    if record.certification is not None and set(record.certification.radii) != set(board.radii):
        radii, here = (", ".join(found) or "none" for found in (record.certification.radii, board.radii))
        reasons.append(f"certified radii {radii}, here {here}")
    return tuple(reasons)


def _row(record: Record, path: str, board: Board) -> Row:
    why = _why_unranked(record, board)
    group: Group = "not ranked" if why else "known broken" if record.defense.card.known_broken else "ranked"
    return Row(record, path, group, why, _families(record))


def _why_unranked(record: Record, board: Board) -> tuple[str, ...]:
    reasons = []
    if record.protocol.profile == "quick":
        reasons.append("the quick profile is never ranked")
    if record.board.n < record.board.size:
        reasons.append(f"{record.board.n} of the board's {record.board.size} samples")
    if record.verdict == "failed":
        checks = ", ".join(finding.check for finding in record.findings if finding.status == "fail")
        reasons.append(f"failed: {checks}" if checks else "failed")
    ran = record.results.attacks if record.results else {}
    absent = {name: "not in the record" for name in record.protocol.mandatory if name not in ran}
    if board.radii and record.defense.card.traits.certifies and record.certification is None:
        absent["certify"] = "not in the record"
    absent |= record.protocol.missing
    if record.results is None and record.certification is not None:
        reasons.append("the certified half alone, without any attack")
    elif record.results is None and record.verdict != "failed":
        reasons.append("nothing was measured")
    elif record.results is not None and absent:
        reasons += [f"missing {name}: {reason}" for name, reason in absent.items()]
    if not reasons and not record.ranked:
        reasons.append(record.verdict)
    return tuple(reasons)


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
    scores = {row.path: score for row, score in found if score is not None}
    rows = [row for row, _ in found]
    competing = [row for row in rows if row.group == "ranked"]
    ranks = {row.path: 1 + sum(_better(other, row, scores) for other in competing) for row in competing}
    shared = [rank for rank in ranks.values() if list(ranks.values()).count(rank) > 1]
    placed = [replace(row, rank=ranks.get(row.path), tied=ranks.get(row.path) in shared) for row in rows]
    return tuple(sorted(placed, key=_order))


def _order(row: Row) -> tuple[int, bool, bool, float, str, str]:
    results, card = row.record.results, row.record.defense.card
    robust = results.robust.value if results else 0.0
    # Calibrators stand below the defenses that they calibrate, also where nothing is ranked.
    return GROUPS.index(row.group), results is None, card.known_broken, -robust, card.name, row.path


def _better(a: Row, b: Row, scores: Mapping[str, Scores]) -> bool:
    """Whether row `a` is significantly more robust than row `b` on the same samples.

    Deterministic rows are counts and get McNemar's exact test; where one is an expectation over
    draws, a paired permutation test.
    """
    first, second = scores[a.path], scores[b.path]
    if first.mean() <= second.mean():
        return False
    counts = not any(row.record.defense.card.traits.stochastic for row in (a, b))
    test = mcnemar if counts else paired_permutation
    return test(first.tolist(), second.tolist()) < LEVEL
