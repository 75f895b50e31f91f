"""A finished run as a row of a leaderboards folder: whether it may stand there, what would be laid, and laying it."""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from assay import provenance
from assay.boards import Board, load_board
from assay.digest import sha256_of_file
from assay.errors import AssayError, InputError
from assay.prepare import Prepared, prepare
from assay.protocol import load_protocol
from assay.publish import lay_down, row_files, row_folder
from assay.record import RECORD, Record, read_record
from assay.registry import DEFENSES, is_foreign, resolve_defense
from assay.verify import Item, verify_record

CARD, SOURCE = "card.json", "source.json"
"""What lies beside a submitted record: its defense's card, and where the code is."""


@dataclass(frozen=True)
class Submission:
    """What a run would lay into a leaderboards folder, and what speaks against it.

    Attributes:
        folder: relative to the leaderboards folder.
        files: contents by name, the record's last.
        items: what was looked at, each with its outcome.
        stands: the digest of the record that lies there already; empty where nothing does.
        same: what lies there already is exactly this.
    """

    record: Record
    leaderboards: Path
    folder: Path
    files: Mapping[str, bytes]
    items: tuple[Item, ...]
    stands: str
    same: bool

    @property
    def ok(self) -> bool:
        """Whether nothing objects."""
        return all(item.status != "failed" for item in self.items)


def read_submission(run: Path, leaderboards: Path, *, source: str = "", trust: bool = False) -> Submission:
    """Examines a finished run as a row of a leaderboards folder; writes nothing.

    The defense is loaded again, as the record names it, and its stored adversarial examples are scored again.

    Args:
        run: the run's folder.
        source: where the defense's code is: an address, or a reference such as a package and its version.
        trust: execute code from outside the registry.

    Raises:
        InputError: for a run that isn't finished, a folder without boards, an unknown defense, foreign code without
            `trust`, or a `source` that is none.
        IntegrityError: where the record or one of its files was changed.
    """
    if not (leaderboards / "boards").is_dir():
        raise InputError(f"{leaderboards} holds no boards/; expected a leaderboards folder.")
    if run.is_dir() and not (run / RECORD).is_file() and (run / "plan.json").is_file():
        raise InputError(f"{run} holds a run that isn't finished; the assay run that began it resumes it.")
    _refuse_source(source)
    record = read_record(run, files=True)
    run = run if run.is_dir() else run.parent
    resolve_defense(record.defense.name, trust=trust, norm=record.board.threat.norm)
    items = tuple(_items(record, run, leaderboards, source=source, trust=trust))
    folder = row_folder(record)
    files = {CARD: _json(record.defense.card.model_dump(mode="json"))}
    if source:
        files[SOURCE] = _json(
            {"reference": source, "source_sha256": record.defense.source_sha256, "record": record.digest}
        )
    files |= row_files(record, run)
    there = leaderboards / folder
    found = {path.name: path.read_bytes() for path in there.iterdir() if path.is_file()} if there.is_dir() else {}
    try:
        stands = read_record(there).digest if found else ""
    except AssayError:
        stands = "unreadable"
    return Submission(record, leaderboards, folder, files, items, stands, found == files)


def submit(submission: Submission, *, replace: bool = False) -> Path:
    """Lays a submission down, all of it by one rename; returns its folder. Does nothing where exactly this is there.

    Args:
        replace: put it in the place of another record of that defense and profile.

    Raises:
        InputError: where something objects, another record stands there, or the folder can't be written to.
    """
    target = submission.leaderboards / submission.folder
    failed = [item.name for item in submission.items if item.status == "failed"]
    if failed:
        raise InputError(f"{submission.record.defense.name} can't be submitted: {', '.join(failed)}; nothing was laid.")
    if submission.same:
        return target
    if submission.stands and not replace:
        same = submission.stands == submission.record.digest
        what = "this record, with other files beside it" if same else f"another record ({submission.stands[:12]})"
        raise InputError(f"{target} holds {what}. Add --replace to put this submission in its place.")
    lay_down(submission.leaderboards, submission.folder, submission.files)
    return target


def _items(record: Record, run: Path, leaderboards: Path, *, source: str, trust: bool) -> Iterator[Item]:
    """What is looked at, from cheap to dear."""
    ranked = record.verdict in ("verified", "flagged")
    yield _item("eligible", "" if ranked else f"a row has to be verified or flagged, this run is {record.verdict}",
                record.verdict)  # fmt: skip
    try:
        board = load_board(record.board.name, leaderboards)
    except InputError as error:
        yield _item("board", str(error))
        return
    protocol, profile = load_protocol(board.protocol), record.protocol.profile
    current = (record.protocol.id, record.protocol.digest) == (protocol.id, protocol.digest(profile))
    yield _item(
        "current",
        "" if current else f"run under {record.protocol.id} {profile} ({record.protocol.digest[:12]}), the board's is "
        f"now {protocol.id} ({protocol.digest(profile)[:12]}): run it again",
        f"{protocol.id} {profile}, the board's own",
    )  # fmt: skip
    expected = min(len(board.ids), protocol.samples[profile] or len(board.ids))
    yield _item("samples", "" if record.board.n == expected else f"{profile} takes {expected} samples of {board.name}, "
                f"this run has {record.board.n}: run it without --n", f"{record.board.n} of {board.name}")  # fmt: skip
    yield _item("mandatory", _missing(record, board), f"{len(record.protocol.mandatory)} attacks")
    yield _item("name", _misnamed(record, leaderboards), record.defense.name)
    yield _item("source", _unsourced(record, source), "hashed" + (f"; {source}" if source else ""))
    try:
        prepared = prepare(
            record.defense.name, board, profile, n=min(record.board.n, len(board.ids)), seed=record.provenance.seed,
            trust=trust, options=record.defense.options,
        )  # fmt: skip
    except Exception as error:  # its author's code, which may raise anything
        hint = " Of an option that is a path the record keeps the last part: stand in that folder."
        yield _item("defense", f"it can't be loaded again: {_said(error)}{hint if record.defense.options else ''}")
        return
    yield _item("defense", _differs(record, prepared), "loaded again, the same as was measured")
    yield _item(
        "weights", _unreachable(record, prepared, source), f"{', '.join(record.defense.weights) or 'none'}, hashed"
    )
    report = verify_record(run, defense=True, leaderboards=leaderboards, trust=trust)
    for item in report.items:
        # A maintainer may lack the defense; its author has it.
        unscored = item.name == "scores" and item.status == "skipped"
        yield Item("scores", "failed", f"not scored again: {item.message}") if unscored else item


def _item(name: str, problem: str, message: str = "") -> Item:
    return Item(name, "failed" if problem else "ok", problem or message)


def _missing(record: Record, board: Board) -> str:
    """Which mandatory parts the record lacks."""
    ran = record.results.attacks if record.results else {}
    absent = {name: "not in the record" for name in record.protocol.mandatory if name not in ran}
    if board.radii and record.defense.card.traits.certifies and record.certification is None:
        absent["certify"] = "not in the record"
    absent |= record.protocol.missing
    return "; ".join(f"{name}: {reason}" for name, reason in absent.items())


def _misnamed(record: Record, leaderboards: Path) -> str:
    """Why a row of this name would be taken for another defense's."""
    name, own = record.defense.name, record.defense.card.name
    if own != name and own in DEFENSES:
        return f"{name} calls itself {own} on its card, the name of a registered defense: choose another"
    try:
        there = read_record(leaderboards / row_folder(record)).defense.name
    except AssayError:
        return ""
    return "" if there == name else f"the row {row_folder(record)} is of {there}: choose another name on the card"


def _unsourced(record: Record, source: str) -> str:
    if record.defense.source_sha256 is None:
        return "the record has no digest of the defense's source: set source=Path(__file__) on its DefenseSpec"
    if is_foreign(record.defense.name) and not source:
        return (
            f"{record.defense.name} doesn't say where its code can be had: add --source ADDRESS, or make it an "
            f"installable package (assay new)"
        )
    return ""


def _differs(record: Record, prepared: Prepared) -> str:
    """What of the defense is no longer what was measured."""
    spec, then = prepared.spec, record.defense
    source = sha256_of_file(spec.source) if spec.source else None
    options = spec.recorded(record.board.dataset, then.options)
    state = provenance.state_sha256(prepared.job.defense)
    problems = [
        f"its {what} {'was' if what == 'source' else 'are'} changed since the run"
        for what, same in (
            ("source", source == then.source_sha256),
            ("parameters", then.state_sha256 in (None, state)),
            ("card or options", (spec.card, options) == (then.card, then.options)),
            ("mandatory attacks", prepared.protocol_ref.mandatory == record.protocol.mandatory),
            ("samples or threat model", prepared.board_ref == record.board),
        )
        if not same
    ]
    return "; ".join(problems)


def _unreachable(record: Record, prepared: Prepared, source: str) -> str:
    """Which weights are no longer those that were measured, or could be had by nobody else."""
    problems = []
    card, files = record.defense.card, prepared.weight_files
    for name, digest in record.defense.weights.items():
        file = files.get(name)
        if file is None or not file.is_file():
            problems.append(f"{name} isn't here")
        elif sha256_of_file(file) != digest:
            problems.append(f"{file} is no longer what was measured")
        elif not (_travels(file, prepared) or source or (card.url and card.weights.get(name) == digest)):
            problems.append(
                f"{file} lies apart from the code: put it beside it, or declare its digest in the card's weights and "
                f"in url where it can be had, or add --source ADDRESS"
            )
    if not record.defense.weights and any(True for _ in prepared.job.defense.parameters()):
        problems.append("the defense has parameters, but names no weight file: give its DefenseSpec weight_files")
    return "; ".join(problems)


def _travels(file: Path, prepared: Prepared) -> bool:
    """Whether who has the code has this file too: it lies beside it, in this project, or in an installed package."""
    roots = [Path(str(resources.files("assay.defenses"))), Path(sysconfig.get_path("purelib"))]
    roots += [prepared.spec.source.parent] if prepared.spec.source else []
    return any(file.resolve().is_relative_to(root.resolve()) for root in roots)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, AssayError) else f"{type(error).__name__}: {error}"


def _refuse_source(source: str) -> None:
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(?=\S)", source)
    known = scheme is None or scheme[0].lower() in ("https:", "http:", "git+https:", "doi:", "swh:")
    if len(source) > 600 or not source.isprintable() or not known or (source and not source.strip()):
        raise InputError(
            f"--source takes an address (https://…) or a reference of at most 600 printable characters, got {source!r}."
        )


def _json(data: object) -> bytes:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
