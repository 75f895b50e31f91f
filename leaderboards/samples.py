"""What a record's own numbers and its sample table say of each other: no table shows numbers that contradict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from assay.audits import Audit, lowered
from assay.boards import Board
from assay.errors import IntegrityError
from assay.record import SAMPLES, Certification, Estimate, Record

Scores = NDArray[np.float64]

_FINAL = "final"
_TOLERANCE = 1e-9
_FLOORED = 1e-4
"""A curve's radii are floored to four decimals."""


def final_scores(file: Path, record: Record, board: Board) -> Scores:
    """A record's score for each of the samples it ran `(n,)`, a prefix of the board's, in the board's order.

    Raises:
        IntegrityError: where the sample table isn't part of the record, or says something else.
    """
    assert record.results is not None
    if SAMPLES not in record.files:
        raise IntegrityError(f"{file} names no {SAMPLES}; a ranked row needs it.")
    ids, values = _columns(file, ("id", "expected"), stage=_FINAL)
    expected = np.array(board.ids[: record.board.n])
    order = np.argsort(ids)
    if not np.array_equal(ids[order], np.sort(expected)):
        raise IntegrityError(f"{file.parent / SAMPLES} doesn't hold one {_FINAL!r} row for each of the board's ids.")
    scores: Scores = values[order][np.searchsorted(ids[order], expected)]
    # Written so that NaN doesn't pass.
    if not ((scores >= 0) & (scores <= 1)).all() or not abs(scores.mean() - record.results.robust.value) <= _TOLERANCE:
        raise IntegrityError(
            f"{file} says robust {record.results.robust.value}, but the scores in its {SAMPLES} "
            f"average {scores.mean()}."
        )
    return scores


def known_scores(file: Path, scores: Scores, audits: Sequence[Audit], record: Record, board: Board) -> Scores:
    """The best known score of each sample `(n,)`: the record's, or what an audit lowered it to.

    Raises:
        IntegrityError: for an audit that is not of this record's samples, or says that a deterministic defense is
            right in part.
    """
    if not audits:
        return scores
    ids = board.ids[: record.board.n]
    least = lowered(dict(zip(ids, scores.tolist(), strict=True)), audits)
    known: Scores = np.array([least[i] for i in ids], dtype=np.float64)
    if not record.defense.card.traits.stochastic and not np.isin(known, (0.0, 1.0)).all():
        raise IntegrityError(f"{file} is of a deterministic defense, but an audit of it has scores other than 0 and 1.")
    if abs(known.mean() - audits[-1].value_after) > _TOLERANCE:
        raise IntegrityError(
            f"the last audit of {file} says that {audits[-1].value_after} is left, but its scores leave {known.mean()}."
        )
    return known


def check_certification(file: Path, record: Record) -> None:
    """Compares a record's certified numbers with one another, and with the sample table where it has one.

    Raises:
        IntegrityError: where they disagree, or more is certified at a radius than an attack inside it left.
    """
    certification = record.certification
    if record.results is not None:
        stated = {} if certification is None else {r: _estimate(found) for r, found in certification.radii.items()}
        if record.results.certified != stated:
            raise IntegrityError(f"{file}: its results and its certification disagree on what is certified.")
    if certification is None:
        return
    for radius, found in certification.radii.items():
        if {found.n, found.attacked.n if found.attacked else found.n} != {record.board.n}:
            raise IntegrityError(f"{file}: its shares at radius {radius} are not of its {record.board.n} samples.")
        if found.attacked is not None and found.value > found.attacked.value + 1e-12:
            raise IntegrityError(
                f"{file} says {found.value} certified at radius {radius}, but an attack inside it left "
                f"{found.attacked.value}: what is certified can't be broken."
            )
    _check_curve(file, certification, record.board.n)
    if SAMPLES in record.files:
        _check_radii(file, certification, record.board.n)


def _check_curve(file: Path, certification: Certification, n: int) -> None:
    """One radius for each sample that is right and has one, falling; their mean is the average radius."""
    curve = certification.curve
    if len(curve) != certification.right - certification.abstained or certification.right > n:
        raise IntegrityError(
            f"{file}: {certification.right} of {n} samples right, {certification.abstained} of them without a "
            f"radius, but its curve holds {len(curve)}."
        )
    if list(curve) != sorted(curve, reverse=True) or (curve and curve[-1] < 0):
        raise IntegrityError(f"{file}: the radii of its curve don't fall towards 0.")
    if not _is_floor(sum(curve) / n, certification.average_radius):
        raise IntegrityError(
            f"{file} says average radius {certification.average_radius}, but its curve averages {sum(curve) / n}."
        )


def _check_radii(file: Path, certification: Certification, n: int) -> None:
    """The sample table's radii, one a sample, are those behind the average and the curve."""
    # Each sample's radius stands in all of its rows.
    ids, radii = np.unique(_columns(file, ("id", "certified_radius")), axis=1)
    if len(np.unique(ids)) != len(radii) or len(radii) != n or not np.isfinite(radii).all() or (radii < 0).any():
        raise IntegrityError(f"{file.parent / SAMPLES} doesn't hold one certified radius for each of {n} samples.")
    if abs(radii.mean() - certification.average_radius) > _TOLERANCE:
        raise IntegrityError(
            f"{file} says average radius {certification.average_radius}, but the radii in its {SAMPLES} "
            f"average {radii.mean()}."
        )
    found = np.sort(radii[radii > 0])[::-1].tolist()
    if len(found) != len(certification.curve) or not all(map(_is_floor, certification.curve, found)):
        raise IntegrityError(f"{file}: its curve is not made of the radii in its {SAMPLES}.")


def _is_floor(floored: float, value: float) -> bool:
    return -_TOLERANCE <= value - floored <= _FLOORED + _TOLERANCE


def _estimate(found: Estimate) -> Estimate:
    """The share alone, without what else is said of a radius."""
    return Estimate(**found.model_dump(include=set(Estimate.model_fields)))


def _columns(file: Path, columns: tuple[str, str], stage: str = "") -> tuple[Scores, Scores]:
    """Two columns of numbers of a record's sample table, NaN where empty; only one stage's rows where it is named.

    Raises:
        IntegrityError: where the table can't be read, or has no such columns.
    """
    names = [*columns, "attack"] if stage else list(columns)
    try:
        # From memory: looking up a file system and its threads takes longer than reading a small file.
        with pq.ParquetFile(pa.BufferReader((file.parent / SAMPLES).read_bytes())) as source:
            # Reading leaves out columns that are absent; selecting does not.
            table = source.read(columns=names, use_threads=False).select(names)
        if stage:
            table = table.filter(pc.equal(table["attack"], stage))
        first, second = (table[name].cast(pa.float64()).to_numpy() for name in columns)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise IntegrityError(f"{file.parent / SAMPLES} is not a sample table: {error}") from error
    return first, second
