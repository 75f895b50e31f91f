"""Audits made: somebody's adversarial examples scored as a run would score them, and what they lower.

A stochastic defense's score is a count of draws, and of many counts some are low by chance. So an example counts
where all of this holds: on fresh draws, as many as the board's, it has fewer right answers than the best known example
of its sample, beyond what chance allows among all examples of the bundle (one-sided Fisher tests, at most `FALSE` of
those that are taken wrongly so on average); and a second set of draws, which chose nothing, still gives it fewer.
Its score is that of the second set. The draws' seed is made up when the audit is made: nobody can fit examples to it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from assay import data
from assay.audits import Audit, AuditedBundle, AuditedSample, Signature, lowered, read_audits, write_audit
from assay.boards import Board, load_board
from assay.bundles import Bundle, Examined, examine, read_bundle
from assay.card import explain
from assay.defense import Defense
from assay.errors import InputError
from assay.job import FINAL
from assay.perturbation import bundle_bytes
from assay.record import RECORD, Record, read_record
from assay.recount import check_board, check_protocol, check_results, read_samples
from assay.rescore import count_right, defense_of, discoveries, draws_of, fewer, fresh

FALSE = 0.01
"""The share of a stochastic defense's lowered samples that may be no better than what was known."""


@dataclass(frozen=True)
class Outcome:
    """What a bundle does to a row.

    Attributes:
        valid, invalid: how many of its examples count; `reasons` says how many don't, and why.
        samples: those that it lowers; empty where it lowers nothing.
        before, after: best known robust accuracy.
        file: the audit that was written; None where nothing is lowered, or on a dry run.
        note: what to know of the defense at hand.
    """

    record: Record
    valid: int
    reasons: Mapping[str, int]
    samples: tuple[AuditedSample, ...]
    before: float
    after: float
    file: Path | None = None
    note: str = ""

    @property
    def invalid(self) -> int:
        """How many examples don't count."""
        return sum(self.reasons.values())


def audit(
    path: Path,
    bundle: Path,
    by: str,
    *,
    note: str = "",
    url: str = "",
    leaderboards: Path | None = None,
    dry_run: bool = False,
    trust: bool = False,
    device: str = "cpu",
    seed: int | None = None,
) -> Outcome:
    """Scores third-party adversarial examples against a record's defense; writes an audit where they lower its row.

    Args:
        path: the record, `record.json` or its folder.
        bundle: the examples, see `assay.bundles`; of any of the record's samples.
        by: who found them; `note` and `url` say more.
        leaderboards: the folder that holds the record's row, where the audit is written.
        dry_run: write nothing; then the row need not be anywhere.
        seed: of the fresh draws, by default made up.

    Raises:
        InputError: for a bundle that is none, a defense that isn't at hand, or a row that the folder doesn't hold.
        IntegrityError: for a record, or an audit of it, that was changed or contradicts itself.
    """
    try:
        signature = Signature(by=by, note=note, url=url)
    except ValidationError as error:
        raise InputError(f"an audit is signed, but {explain(error)}.") from error
    record = read_record(path, files=True)
    if record.results is None:
        raise InputError(f"{path}: nothing was measured, so nothing can be lowered.")
    if not dry_run:
        _refuse_absent(leaderboards, record)
    board = load_board(record.board.name, leaderboards)
    check_protocol(record)
    check_board(record, board)
    ids = board.ids[: record.board.n]
    x, y = data.load(board.dataset, ids, device=device)
    given = read_bundle(bundle, ids=ids, x=x.cpu())
    known = _known(record, path, leaderboards, ids, y)
    rows = np.asarray([ids.index(each) for each in given.ids.tolist()], dtype=np.int64)
    found = examine(given.images, x[rows].cpu(), board.threat)
    reasons = {reason: found.reasons.count(reason) for reason in sorted(set(found.reasons) - {""})}
    before = float(np.mean(list(known.values())))
    seed = secrets.randbits(32) if seed is None else seed
    defense, said = defense_of(record, board, device=device, trust=trust)
    trial = _Trial(record, board, given, y[rows], seed)
    samples = trial.lowering(defense, found, np.asarray([known[each] for each in given.ids.tolist()]))
    after = {**known, **{sample.id: sample.expected for sample in samples}}
    outcome = Outcome(
        record, int(found.valid.sum()), reasons, samples, before, float(np.mean(list(after.values()))), note=said
    )
    if not samples or dry_run:
        return outcome
    assert leaderboards is not None
    chosen = [given.ids.tolist().index(sample.id) for sample in samples]
    written = Audit(
        **signature.model_dump(),
        record_digest=record.digest,
        board=board.name,
        defense=record.defense.card.name,
        date=datetime.now(UTC).date().isoformat(),
        bundle=AuditedBundle(file="000.safetensors", sha256="", given_sha256=given.sha256),
        samples=samples,
        n_valid=outcome.valid,
        n_invalid=outcome.invalid,
        reasons=reasons,
        draws=draws_of(record),
        seed=seed,
        value_before=before,
        value_after=outcome.after,
    )
    clean = None if data.describe(board.dataset).shareable else x[rows[chosen]].cpu().numpy()
    examples = bundle_bytes(given.ids[chosen], given.images[chosen].numpy(), clean)
    file = write_audit(leaderboards, record, written, examples)
    return Outcome(record, outcome.valid, reasons, samples, before, outcome.after, file, said)


@dataclass(frozen=True)
class _Trial:
    """The examples of one bundle before the defense; `y` are their labels."""

    record: Record
    board: Board
    bundle: Bundle
    y: Tensor
    seed: int

    def lowering(self, defense: Defense, found: Examined, known: NDArray[np.float64]) -> tuple[AuditedSample, ...]:
        """The examples that lower their sample's best `known` score, with the scores that they lower it to."""
        draws = draws_of(self.record)
        counts = np.rint(known * draws).astype(np.int64)
        # Nothing lies below 0: such a sample is worth no call.
        rows = np.flatnonzero(found.valid & (counts > 0))
        scores = self._score(defense, rows, draws, "first")
        if draws > 1:
            taken = discoveries(fewer(counts[rows], scores, draws), FALSE)
            rows = rows[taken]
            scores = self._score(defense, rows, draws, "second")
        better = scores < counts[rows]
        return tuple(
            AuditedSample(id=int(self.bundle.ids[row]), expected=score / draws, norm=float(found.norms[row]))
            for row, score in zip(rows[better].tolist(), scores[better].tolist(), strict=True)
        )

    def _score(self, defense: Defense, rows: NDArray[np.int64], draws: int, stage: str) -> NDArray[np.int64]:
        ids = self.bundle.ids[rows].tolist()
        noise = fresh(self.record, ids, self.seed, "audit", stage)
        images = self.bundle.images[rows].to(self.y.device)
        return count_right(defense, self.board, ids, images, self.y[rows], noise, draws)


def _known(record: Record, path: Path, leaderboards: Path | None, ids: Sequence[int], y: Tensor) -> dict[int, float]:
    """The best known score of each of a record's samples, in the board's order."""
    table = read_samples(path if path.is_dir() else path.parent, record)
    check_results(record, table, ids, y.tolist())
    final = table[table["attack"] == FINAL]
    scores = dict(zip(final["id"].tolist(), final["expected"].tolist(), strict=True))
    return lowered(scores, read_audits(leaderboards, record) if leaderboards is not None else ())


def _refuse_absent(leaderboards: Path | None, record: Record) -> None:
    """Raises InputError unless a leaderboards folder holds a record: an audit lowers a row."""
    if leaderboards is None or not (leaderboards / "boards").is_dir():
        raise InputError("an audit is written into a leaderboards folder: give --leaderboards DIR, or --dry-run.")
    for file in sorted((leaderboards / "records" / record.board.name).rglob(RECORD)):
        try:
            if json.loads(file.read_text())["digest"] == record.digest:
                return
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise InputError(
        f"{leaderboards} holds no row of this record of {record.defense.card.name} ({record.digest[:12]}): submit it "
        f"first, or give --dry-run to see what the examples would do."
    )
