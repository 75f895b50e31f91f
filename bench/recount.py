"""A record's numbers counted again: from its protocol, its board and its own sample table, without the defense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from assay import data
from assay.boards import Board
from assay.digest import ids_digest, sha256_of_json
from assay.errors import IntegrityError
from assay.job import CLEAN, FINAL
from assay.norms import TOLERANCE
from assay.protocol import Protocol, load_protocol, verdict
from assay.record import SAMPLES, AttackResult, Estimate, Record
from assay.reduce import outcome_of
from assay.statistics import mean_interval
from assay.threat import parse_eps

_ROUNDING = 1e-9
"""Means and intervals of the same scores on another machine."""
_RULES = ("expected", "worst_of_n", "majority")
_COLUMNS = {
    "id", "label", "attack", "attempted", "clean", *_RULES, "correct_draws", "draws", "norm", "forward", "backward",
    "seconds", "certified_radius",
}  # fmt: skip


def check_protocol(record: Record) -> str:
    """What to say of a record whose protocol is the current one.

    Raises:
        InputError: for an unknown protocol.
        IntegrityError: for another content than the protocol has now, which no table compares.
    """
    ref = record.protocol
    now = load_protocol(ref.id).digest(ref.profile)
    if ref.digest != now:
        raise IntegrityError(
            f"measured under another state of protocol {ref.id} {ref.profile} ({ref.digest[:12]}, here {now[:12]}): no "
            f"table compares it with present rows; run it again."
        )
    return f"{ref.id} {ref.profile} ({now[:12]})"


def check_board(record: Record, board: Board) -> str:
    """What to say of a record whose samples, threat and draws are its board's.

    Raises:
        IntegrityError: naming everything that differs.
    """
    ran = record.board
    said = {
        "data set": (f"{ran.dataset} {ran.revision}", f"{board.dataset} {board.revision}"),
        "threat": (f"{ran.threat.norm} {ran.threat.eps}", str(board.threat)),
        "draws": (ran.draws, board.draws),
        "size": (ran.size, len(board.ids)),
        "ids": (ran.ids_sha256, ids_digest(board.ids[: ran.n])),
        "protocol": (record.protocol.id, board.protocol),
    }
    wrong = [f"{name} {said[name][0]}, here {said[name][1]}" for name in said if said[name][0] != said[name][1]]
    if not 1 <= ran.n <= ran.size:
        wrong.append(f"{ran.n} of {ran.size} samples")
    now = data.describe(board.dataset).revision
    if board.revision != now:
        wrong.append(f"the board's images are {board.revision}, this version of assay reads {now}")
    if record.certification is not None and set(record.certification.radii) != set(board.radii):
        wrong.append(
            f"certified radii {', '.join(record.certification.radii)}, here {', '.join(board.radii) or 'none'}"
        )
    if wrong:
        raise IntegrityError(f"not the samples of board {board.name}: {'; '.join(wrong)}.")
    return f"{board.name}, {ran.n} of {ran.size} samples"


def check_verdict(record: Record, board: Board) -> str:
    """What to say of a record whose verdict follows from what was asked and what was found.

    Raises:
        IntegrityError: where a mandatory part is absent and nothing says so, an attack had other options than
            the protocol's, or the verdict is another.
    """
    protocol, ref, card = load_protocol(record.protocol.id), record.protocol, record.defense.card
    exempt = board.source if record.defense.name == board.source and not record.defense.options else ""
    planned = protocol.plan(card, data.describe(board.dataset).n_classes, ref.profile, source=exempt)
    names = tuple(attack.name for attack in planned)
    if ref.mandatory != names:
        raise IntegrityError(
            f"the card's traits demand the attacks {', '.join(names)}; the record names {', '.join(ref.mandatory)}."
        )
    ran = record.results.attacks if record.results else {}
    absent = [name for name in names if name not in ran and name not in ref.missing]
    if absent and record.results is not None:
        raise IntegrityError(f"mandatory attacks are absent from its results: {', '.join(absent)}.")
    for attack in planned:
        if attack.name in ran:
            _check_options(ran[attack.name], attack.options, attack.name)
    unasked = _without_finding(record, protocol)
    found = verdict((finding.status for finding in record.findings), missing=[*ref.missing, *unasked])
    if found != record.verdict:
        lacking = f" It has no finding of {', '.join(unasked)}." if unasked else ""
        raise IntegrityError(f"its findings make it {found}, but it says {record.verdict}.{lacking}")
    if record.results is None and not (record.verdict == "failed" or record.certification is not None):
        raise IntegrityError(f"it says {record.verdict}, but nothing was measured.")
    return f"{record.verdict}: {len(ran)} attacks, {len(record.findings)} findings"


def _check_options(result: AttackResult, wanted: Any, name: str) -> None:
    given = result.options
    for option, value in wanted.items():
        # Where the gradients were noisy a run averages more draws than the protocol's table says.
        more = option == "eot" and isinstance(given.get(option), int) and given[option] >= value
        if given.get(option) != value and not more:
            raise IntegrityError(f"{name} ran with {option} = {given.get(option)!r}, the protocol's is {value!r}.")


def _without_finding(record: Record, protocol: Protocol) -> list[str]:
    asked = (*protocol.checks, *protocol.health[record.protocol.profile].checks)
    there = {finding.check for finding in record.findings}
    return [name for name in asked if name not in there]


def read_samples(folder: Path, record: Record) -> pd.DataFrame:
    """A record's sample table.

    Raises:
        IntegrityError: where it is none, or has other columns or more rows than the record's stages have.
    """
    file = folder / SAMPLES
    assert record.results is not None
    stages = {CLEAN, *record.results.attacks, FINAL}
    try:
        # A small file can unpack to any size: how many rows it has is looked at first.
        with pq.ParquetFile(file) as parquet:
            rows, columns = parquet.metadata.num_rows, set(parquet.schema_arrow.names)
            if rows != record.board.n * len(stages) or columns != _COLUMNS:
                raise IntegrityError(
                    f"{file} has {rows} rows and the columns {', '.join(sorted(columns)[:20])}; expected "
                    f"{record.board.n} rows for each of {len(stages)} stages and {', '.join(sorted(_COLUMNS))}."
                )
        table = pd.read_parquet(file, engine="pyarrow")
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{file} is not a sample table: {error}") from error
    if set(table["attack"]) != stages:
        raise IntegrityError(f"{file} has other stages than the record: {', '.join(sorted(set(table['attack'])))}.")
    return table


def check_results(record: Record, table: pd.DataFrame, ids: Sequence[int], labels: Sequence[int]) -> str:
    """What to say of a record whose accuracies, intervals and digest follow from its sample table.

    Args:
        ids: the record's samples, in the board's order; `labels` theirs.

    Raises:
        IntegrityError: where one doesn't, or the table contradicts itself.
    """
    results, draws = record.results, record.board.draws if record.defense.card.traits.stochastic else 1
    assert results is not None
    stages = {str(name): rows for name, rows in table.groupby("attack", sort=False)}
    for name, rows in stages.items():
        _check_stage(name, rows, ids, labels, draws, float(parse_eps(record.board.threat.eps)))
        _require(rows["clean"].tolist() == stages[CLEAN]["expected"].tolist(), f"{name}: its clean scores are others")
    _check_cascade(record, stages)
    for name, stated in _stated(record):
        stage, rule = name.split(" ")
        found = _mean(stages[stage][rule].to_numpy(np.float64))
        same = all(
            math.isclose(getattr(found, key), getattr(stated, key), abs_tol=_ROUNDING)
            for key in ("value", "n", "low", "high")
        )
        _require(
            same,
            f"the record says {stated.value:.4f} [{stated.low:.4f}, {stated.high:.4f}] of {stated.n} for {stage} "
            f"({rule}), its sample table {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] of {found.n}",
        )
    _check_outcome(record, table)
    return f"robust {results.robust.value:.3f}, clean {results.clean.value:.3f} over {record.board.n} samples"


def _check_stage(
    name: str, rows: pd.DataFrame, ids: Sequence[int], labels: Sequence[int], draws: int, eps: float
) -> None:
    _require(rows["id"].tolist() == list(ids), f"{name}: its ids are not the board's, one row each")
    _require(rows["label"].tolist() == list(labels), f"{name}: its labels are not the data set's")
    correct = rows["correct_draws"].to_numpy()
    attempted = rows["attempted"].to_numpy(bool)
    _require(set(rows["draws"]) == {draws}, f"{name}: a score is of {draws} draws on this board")
    _require(bool(((correct >= 0) & (correct <= draws)).all()), f"{name}: more right answers than draws")
    counted = np.where(attempted, correct, 0)
    _require(bool(np.allclose(rows["expected"], counted / draws, atol=_ROUNDING)), f"{name}: expected is no count")
    _require(bool((rows["worst_of_n"] == (counted == draws)).all()), f"{name}: worst_of_n is not of its counts")
    majority = rows["majority"].to_numpy()
    # Below half it depends on how the wrong answers are spread.
    sure = np.where(2 * counted > draws, 1.0, np.where(counted == 0, 0.0, majority))
    _require(bool(np.isin(majority, (0.0, 1.0)).all() and (majority == sure).all()), f"{name}: majority is impossible")
    norm = rows["norm"].to_numpy(np.float64)
    _require(bool(((norm >= 0) & (norm <= eps + TOLERANCE)).all()), f"{name}: a norm lies outside the ball")


def _check_cascade(record: Record, stages: dict[str, pd.DataFrame]) -> None:
    """Who leaves the cascade never comes back, and had no right answer when it left."""
    assert record.results is not None
    attacks = record.results.attacks
    order = [CLEAN, *attacks]
    _require(list(stages) == [*order, FINAL], "its stages stand in another order than its attacks")
    standing = np.ones(record.board.n, dtype=bool)
    left = np.zeros(record.board.n, dtype=bool)
    for number, name in enumerate(order):
        attempted = stages[name]["attempted"].to_numpy(bool)
        right = stages[name]["correct_draws"].to_numpy() > 0
        _require(bool((~attempted | standing).all()), f"{name}: it attacked samples that had fallen")
        if number:
            _require(bool((attempted | left).all()), f"{name}: it left out samples that stood")
        standing, left = attempted, left | (attempted & ~right)
        if not record.defense.card.traits.stochastic:
            standing = attempted & right
        if name in attacks:
            stated, rows = attacks[name], stages[name]
            following = stages[order[number + 1]]["attempted"].to_numpy(bool) if number + 1 < len(order) else None
            _require(stated.attempted == attempted.sum(), f"{name}: the record says {stated.attempted} attempted")
            # Of a stochastic sample without a right answer a second set of draws decides whether it has fallen.
            fell = attempted & (~following if following is not None else ~right)
            certain = following is not None or not record.defense.card.traits.stochastic
            agrees = stated.broken == fell.sum() if certain else stated.broken <= fell.sum()
            _require(bool(agrees), f"{name}: the record says {stated.broken} broken, its sample table {fell.sum()}")
            for way in ("forward", "backward"):
                _require(getattr(stated, way) == rows[way].sum(), f"{name}: its {way} calls are others")
    final = stages[FINAL]["expected"].to_numpy()
    _require(bool(stages[FINAL]["attempted"].all()), "final: a sample was left out")
    if not record.defense.card.traits.stochastic:
        lowest = np.min([stages[name]["expected"].to_numpy() for name in order], axis=0)
        _require(bool((final == lowest).all()), "final: it is not the lowest score of each sample")


def _stated(record: Record) -> Iterable[tuple[str, Estimate]]:
    """Every accuracy of a record, by the stage and the rule that it is of."""
    results = record.results
    assert results is not None
    yield f"{CLEAN} expected", results.clean
    yield f"{FINAL} expected", results.robust
    yield from ((f"{name} expected", result) for name, result in results.attacks.items())
    for rule in _RULES:
        found = getattr(results.rules, rule)
        yield f"{FINAL} {rule}", found
        yield f"{CLEAN} {rule}", found.clean
        if found.noise is not None:
            yield f"uniform {rule}", found.noise


def _mean(scores: NDArray[np.float64]) -> Estimate:
    low, high = mean_interval(scores.tolist())
    return Estimate(value=float(scores.mean()), n=len(scores), low=low, high=high)


def _check_outcome(record: Record, table: pd.DataFrame) -> None:
    plain = {key: value for key, value in record.as_json().items() if key != "digest"}
    # A record that was written before a field existed has another text now, and so another outcome.
    if sha256_of_json(plain) == record.digest:
        found = record.sealed(outcome_of(table)).outcome_sha256
        _require(found == record.outcome_sha256, "its outcome has another digest than outcome_sha256 says")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise IntegrityError(f"{otherwise}.")
