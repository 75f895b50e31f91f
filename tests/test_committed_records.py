"""The committed leaderboards: their tables follow from their records, and their boards are calibrated."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.board import load_board
from assay.leaderboards.render import check_tables
from assay.protocol import load_protocol
from assay.record import Record, read_record
from assay.registry import DEFENSES

FOLDER = Path(__file__).parents[1] / "leaderboards"
BOARDS = ("digits-linf", "digits-l2")


def _rows(name: str) -> dict[str, Record]:
    """The board's standard records under its current protocol, by defense."""
    digest = load_protocol(load_board(name).protocol).digest("standard")
    records = [read_record(path, files=True) for path in sorted((FOLDER / "records" / name).rglob("record.json"))]
    rows = {record.defense.card.name: record for record in records if record.protocol.digest == digest}
    if not rows:
        pytest.skip(f"the protocol has changed since the records of {name} were made: run the board again")
    return rows


def test_the_tables_are_what_the_records_say() -> None:
    assert check_tables(FOLDER) == []


@pytest.mark.parametrize("name", BOARDS)
def test_a_row_is_of_the_weights_that_are_packaged(name: str) -> None:
    for defense, record in _rows(name).items():
        assert record.board.n == len(load_board(name).ids)
        assert record.defense.weights
        assert record.defense.weights.items() <= DEFENSES[defense].card.weights.items()
        assert record.provenance.dirty is False


@pytest.mark.parametrize("name", BOARDS)
def test_the_board_is_calibrated(name: str) -> None:
    rows = _rows(name)
    robust = {defense: record.results.robust for defense, record in rows.items() if record.results}
    assert robust["undefended"].high < robust["adversarial_training"].low
    for defense, record in rows.items():
        if record.defense.card.known_broken:
            assert robust[defense].high < robust["adversarial_training"].low


@pytest.mark.parametrize("name", BOARDS)
def test_no_attack_alone_does_better_than_all_of_them_beyond_chance(name: str) -> None:
    for record in _rows(name).values():
        assert record.results is not None
        for attack in record.results.attacks.values():
            assert record.results.robust.value <= attack.high
            if not record.defense.card.traits.stochastic:
                assert record.results.robust.value <= attack.value
