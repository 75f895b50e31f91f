"""The committed leaderboards: their tables follow from their records, and their boards are calibrated."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.boards import load_board
from assay.certification import rederive
from assay.leaderboards.render import check_tables
from assay.protocol import load_protocol
from assay.record import Record, read_record
from assay.registry import DEFENSES

FOLDER = Path(__file__).parents[1] / "leaderboards"
BOARDS = ("digits-linf", "digits-l2")


def _rows(name: str) -> dict[str, Record]:
    """The board's records under its current protocol, by defense: its standard one, or a quick one until that is made.

    Rows measured with options of their own are left out, and those of defenses that are not the project's.
    """
    board = load_board(name)
    records = [read_record(path, files=True) for path in sorted((FOLDER / "records" / name).rglob("record.json"))]
    digests = [load_protocol(board.protocol).digest(profile) for profile in ("quick", "standard")]
    found = {
        record.defense.card.name: record
        for digest in digests
        for record in records
        if record.protocol.digest == digest and not record.defense.options and record.defense.name in list(DEFENSES)
    }
    if found:
        return found
    pytest.skip(f"the protocol has changed since the records of {name} were made: run the board again")


def test_the_tables_are_what_the_records_say() -> None:
    assert check_tables(FOLDER) == []


@pytest.mark.parametrize("name", BOARDS)
def test_a_row_is_of_the_weights_that_are_packaged(name: str) -> None:
    board = load_board(name)
    samples = load_protocol(board.protocol).samples
    for defense, record in _rows(name).items():
        assert record.board.n == (samples[record.protocol.profile] or len(board.ids))
        assert record.defense.weights
        assert record.defense.weights.items() <= DEFENSES[defense].card.weights.items()
        assert record.provenance.dirty is False or not record.ranked


@pytest.mark.parametrize("name", BOARDS)
def test_every_registered_defense_has_its_row(name: str) -> None:
    expected = {each for each in DEFENSES if load_board(name).dataset in DEFENSES[each].card.datasets}
    assert set(_rows(name)) == expected


@pytest.mark.parametrize("name", BOARDS)
def test_the_board_is_calibrated(name: str) -> None:
    rows = _rows(name)
    robust = {defense: record.results.robust for defense, record in rows.items() if record.results}
    trained = robust["adversarial_training"]
    for defense, record in rows.items():
        if record.defense.card.known_broken or defense == "undefended":
            # Fifty samples don't separate intervals; the board's two hundred do.
            assert robust[defense].value < trained.value / 2
            assert record.protocol.profile == "quick" or robust[defense].high < trained.low


@pytest.mark.parametrize("name", BOARDS)
def test_no_attack_alone_does_better_than_all_of_them_beyond_chance(name: str) -> None:
    for record in _rows(name).values():
        assert record.results is not None
        for attack in record.results.attacks.values():
            # A sample that leaves after 0 of 40 draws counts as 0 from then on, and may yet be right in one of 20.
            assert record.results.robust.value <= attack.high + 0.05 * record.defense.card.traits.stochastic
            if not record.defense.card.traits.stochastic:
                assert record.results.robust.value <= attack.value


def test_every_defense_that_certifies_has_certified_columns() -> None:
    """On the digits-l2 board: beside the attacked ones, of the same samples, and no adversarial example refutes one."""
    board = load_board("digits-l2")
    certifying = {name: record for name, record in _rows("digits-l2").items() if record.defense.card.traits.certifies}
    assert set(certifying) == {name for name in DEFENSES if DEFENSES[name].card.certificate}
    for name, record in certifying.items():
        half = record.certification
        assert half is not None
        assert tuple(half.radii) == board.radii
        for radius, result in half.radii.items():
            assert result.attacked is not None
            assert result.value <= result.attacked.value
            assert result.n == record.board.n
            assert result.refuted == 0, (name, radius)
        # A smaller radius is certified for at least as many; some are, at the smallest.
        shares = [result.value for result in half.radii.values()]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0.3
        assert next(f for f in record.findings if f.check == "contradiction").value == 0


def test_committed_certificates_follow_from_their_counts() -> None:
    for path in sorted((FOLDER / "records" / "digits-l2").rglob("record.json")):
        rederive(read_record(path, files=True), path.parent)
