"""Verification: everything a record says that can be computed again, is.

What this can't see: a record whose attacks were never run with full force, and whose examples are therefore weak.
Its numbers follow from its examples, and only stronger examples say more (`assay audit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load
from torch import Tensor, from_numpy

from assay import data
from assay.audits import read_audits
from assay.boards import Board, load_board
from assay.bundles import Bundle, examine, read_bundle, read_regular, refuse_invalid
from assay.certification import broken_examples, rederive
from assay.certifying import stage_at
from assay.digest import sha256_of_file
from assay.errors import AssayError, InputError, IntegrityError
from assay.job import FINAL
from assay.leaderboards.samples import check_certification
from assay.norms import TOLERANCE
from assay.record import BUNDLE, COUNTS, RECORD, SAMPLES, Record, read_record
from assay.recount import check_board, check_protocol, check_results, check_verdict, read_samples
from assay.rescore import LEVEL, Counts, NotAtHandError, agreement, count_right, defense_of, draws_of, fresh
from assay.threat import ThreatModel, parse_eps

Status = Literal["ok", "failed", "skipped"]

_MOST_RECORD = 64 << 20
_MOST_COUNTS = 2 << 30
"""Bytes of a file that is read whole; a record takes some 30 kB, its counts 2 kB a sample."""


@dataclass(frozen=True)
class Item:
    """One thing that was computed again, and what came of it."""

    name: str
    status: Status
    message: str


@dataclass(frozen=True)
class Report:
    """All that was computed again of one record.

    Attributes:
        path: as it was given.
        items: in the order in which they were looked at. What can't be looked at is `skipped`, with the reason.
    """

    path: Path
    items: tuple[Item, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(item.status != "failed" for item in self.items)


class _SkipError(Exception):
    """Why an item can't be looked at."""


@dataclass
class _Verification:
    """One record under verification: what is known of it so far."""

    record: Record
    folder: Path
    leaderboards: Path | None
    device: str
    items: list[Item] = field(default_factory=list)
    board: Board | None = None
    images: tuple[Tensor, Tensor] | None = None
    bundle: Bundle | None = None
    stored: Counts | None = None
    norms: NDArray[np.float64] | None = None

    def look(self, name: str, check: Callable[[], str], *needs: str) -> bool:
        """Makes an item of a check; skipped where an item that it `needs` failed."""
        lacking = [item.name for item in self.items if item.name in needs and item.status != "ok"]
        self.items.append(
            Item(name, "skipped", f"not looked at: {', '.join(lacking)}") if lacking else _item(name, check)
        )
        return self.items[-1].status == "ok"

    def ids(self) -> tuple[int, ...]:
        assert self.board is not None
        return self.board.ids[: self.record.board.n]

    def look_at_files(self) -> str:
        for name, expected in self.record.files.items():
            file = self.folder / name
            if file.is_symlink():
                raise IntegrityError(f"{name} is a symbolic link; a record's files lie beside it.")
            if not file.is_file():
                raise IntegrityError(f"{name} is missing.")
            if sha256_of_file(file) != expected:
                raise IntegrityError(f"{name} was changed after the record was written: its digest is another.")
        expected_files = {SAMPLES, BUNDLE} if self.record.results is not None else set()
        expected_files |= {COUNTS} if self.record.certification is not None else set()
        if set(self.record.files) != expected_files:
            named, needed = (", ".join(sorted(names)) or "none" for names in (self.record.files, expected_files))
            raise IntegrityError(f"it names the files {named}; expected {needed}.")
        return ", ".join(self.record.files) or "none are named"

    def look_at_board(self) -> str:
        self.board = load_board(self.record.board.name, self.leaderboards)
        return check_board(self.record, self.board)

    def look_at_data(self) -> str:
        assert self.board is not None
        try:
            self.images = data.load(self.board.dataset, self.ids(), device=self.device)
        except InputError as error:
            raise _SkipError(str(error)) from error
        return f"{len(self.ids())} images of {self.board.dataset}"

    def look_at_verdict(self) -> str:
        assert self.board is not None
        return check_verdict(self.record, self.board)

    def look_at_results(self) -> str:
        assert self.images is not None
        table = read_samples(self.folder, self.record)
        final = table[table["attack"] == FINAL]
        self.stored = final["correct_draws"].to_numpy(np.int64)
        self.norms = final["norm"].to_numpy(np.float64)
        return check_results(self.record, table, self.ids(), self.images[1].tolist())

    def look_at_certified(self) -> str:
        assert self.images is not None
        record, (x, y) = self.record, self.images
        assert record.certification is not None
        check_certification(self.folder / RECORD, record)
        kept = load(read_regular(self.folder / COUNTS, _MOST_COUNTS, "the counts of a record"))
        if kept["id"].tolist() != list(self.ids()) or kept["label"].tolist() != y.tolist():
            raise IntegrityError(f"{COUNTS}: its ids or labels are not those of the board's samples.")
        rederive(record, self.folder)
        shareable, attacked = data.describe(record.board.dataset).shareable, 0
        for radius, result in record.certification.radii.items():
            stage = stage_at(radius)
            if result.attacked is None:
                continue
            broken = [self.ids().index(each) for each in kept[f"{stage}/broken_id"].tolist()]
            if broken != np.flatnonzero(kept[f"{stage}/broken"]).tolist():
                raise IntegrityError(f"{COUNTS}: at radius {radius} the examples are not of the samples that fell.")
            clean = x[broken].cpu()
            points = from_numpy(broken_examples(kept, stage, clean.numpy(), shareable=shareable))
            found = examine(points, clean, ThreatModel("l2", parse_eps(radius)))
            refuse_invalid(f"{COUNTS} at radius {radius}", [self.ids()[row] for row in broken], found)
            attacked += len(broken)
        return f"all counts; {attacked} examples inside their radii"

    def look_at_examples(self) -> str:
        assert self.board is not None
        assert self.images is not None
        x, _ = self.images
        bundle = read_bundle(self.folder / BUNDLE, ids=self.ids(), x=x.cpu())
        if bundle.ids.tolist() != list(self.ids()):
            raise IntegrityError(f"{BUNDLE} doesn't hold one image for each sample, in the board's order.")
        found = examine(bundle.images, x.cpu(), self.board.threat)
        refuse_invalid(BUNDLE, bundle.ids.tolist(), found)
        if not (bundle.masked or data.describe(self.board.dataset).shareable):
            raise IntegrityError(
                f"{BUNDLE} holds images of {self.board.dataset}, which may not be passed on; run it again with this "
                f"version, which masks them."
            )
        self.bundle = bundle
        if self.norms is not None and not np.allclose(found.norms, self.norms, rtol=0, atol=TOLERANCE):
            row = int(np.abs(found.norms - self.norms).argmax())
            raise IntegrityError(
                f"{SAMPLES} says the example of sample {bundle.ids[row]} lies {self.norms[row]:.7g} from its image, it "
                f"lies {found.norms[row]:.7g} away."
            )
        return f"{len(bundle)} inside {self.board.threat}, the farthest at {found.norms.max():.6g}"

    def look_at_audits(self) -> str:
        assert self.leaderboards is not None
        return f"{len(read_audits(self.leaderboards, self.record))} of this record"

    def look_at_scores(self, trust: bool, seed: int) -> str:
        assert self.board is not None
        record, board = self.record, self.board
        try:
            defense, note = defense_of(record, board, device=self.device, trust=trust)
        except NotAtHandError as error:
            raise _SkipError(str(error)) from error
        traits = (defense.card.traits, record.defense.card.traits)
        if traits[0] != traits[1]:
            here, said = (", ".join(found.names()) or "none" for found in traits)
            raise IntegrityError(f"{record.defense.name} declares the traits {here} here; the record says {said}.")
        assert self.images is not None
        assert self.bundle is not None
        assert self.stored is not None
        draws, ids = draws_of(record), self.ids()
        images, y = self.bundle.images.to(self.images[0].device), self.images[1]
        found = count_right(defense, board, ids, images, y, fresh(record, ids, seed, "verify"), draws)
        judged = _judge_stochastic if draws > 1 else _judge_deterministic
        message = judged(ids, self.stored, found, draws, note)
        return f"{message}; {note}" if note else message


def verify_record(
    path: Path,
    *,
    defense: bool = True,
    leaderboards: Path | None = None,
    trust: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Computes a record again: digests, protocol, board, verdict, numbers, examples, and their scores.

    With the defense at hand, of the record's weights, each stored adversarial example is answered once more: a
    deterministic defense must give every stored outcome; of a stochastic one the stored counts, which are of draws
    that chose nothing, and as many from fresh draws must be of the same probabilities (`assay.rescore.agreement`, two
    exact tests that together fail an honest record with probability at most `LEVEL`). That takes as many model calls as
    the samples times the board's draws, and nothing else takes any.

    Args:
        path: `record.json`, or the folder that holds it.
        defense: look for the defense and score the examples.
        leaderboards: the folder whose boards (and audits) hold, by default the packaged boards.
        trust: execute code from outside the registry.
        seed: of the fresh draws.

    Raises:
        InputError: where there is no record at all. What is wrong with one is in the report.
    """
    file = path / RECORD if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no record at {file}; expected record.json or the folder that holds it.")
    records: list[Record] = []

    def read() -> str:
        read_regular(file, _MOST_RECORD, "a record")
        records.append(read_record(file))
        return f"{records[0].defense.card.name}, digest {records[0].digest[:12]}"

    first = _item("record", read)
    if not records:
        return Report(path, (first,))
    record = records[0]
    state = _Verification(record, file.parent, leaderboards, device, [first])
    state.look("files", state.look_at_files)
    current = state.look("protocol", lambda: check_protocol(record))
    state.look("board", state.look_at_board)
    if current:
        state.look("verdict", state.look_at_verdict, "board")
    state.look("data", state.look_at_data, "board")
    if record.results is not None:
        state.look("results", state.look_at_results, "files", "board", "data")
    if record.certification is not None:
        state.look("certified", state.look_at_certified, "files", "board", "data")
    if record.results is not None:
        state.look("examples", state.look_at_examples, "files", "board", "data")
    if leaderboards is not None:
        state.look("audits", state.look_at_audits)
    if record.results is not None and defense:
        state.look("scores", lambda: state.look_at_scores(trust, seed), "files", "board", "data", "results", "examples")
    elif record.results is not None:
        state.items.append(Item("scores", "skipped", "the defense was not asked for"))
    return Report(path, tuple(state.items))


def _item(name: str, check: Callable[[], str]) -> Item:
    try:
        return Item(name, "ok", check())
    except _SkipError as reason:
        return Item(name, "skipped", str(reason))
    except AssayError as error:
        return Item(name, "failed", str(error))
    except Exception as error:  # a library met by a hostile file may raise anything: it is the file's fault
        return Item(name, "failed", f"it can't be read: {type(error).__name__}: {error}")


def _judge_deterministic(ids: Sequence[int], stored: Counts, found: Counts, draws: int, note: str) -> str:
    wrong = np.flatnonzero(stored != found)
    if len(wrong):
        weaker = int((found[wrong] < stored[wrong]).sum())
        raise IntegrityError(
            f"{len(wrong)} of {len(ids)} stored outcomes are not what the defense answers here: {weaker} held in the "
            f"record and fall here, {len(wrong) - weaker} fell and hold. Samples {_listed(ids, wrong)}.{_aside(note)}"
        )
    return f"all {len(ids)} stored outcomes again"


def _judge_stochastic(ids: Sequence[int], stored: Counts, found: Counts, draws: int, note: str) -> str:
    together, each = agreement(stored, found, draws)
    said, here = stored.mean() / draws, found.mean() / draws
    if min(together, each) < LEVEL / 2:
        far = np.argsort(-np.abs(stored - found), kind="stable")[:8]
        raise IntegrityError(
            f"the stored examples leave {here:.3f} on fresh draws, the record says {said:.3f}: more than chance allows "
            f"(p = {together:.1e} for the sum, {each:.1e} for the farthest sample). Farthest apart: samples "
            f"{_listed(ids, far)}.{_aside(note)}"
        )
    return f"{here:.3f} on {draws} fresh draws each, the record says {said:.3f}: within chance (p = {together:.2g})"


def _aside(note: str) -> str:
    return f" Note: {note}." if note else ""


def _listed(ids: Sequence[int], rows: NDArray[np.int64]) -> str:
    return ", ".join(str(ids[row]) for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
