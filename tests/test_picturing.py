"""Pictures computed from a committed record, by the registered defense that it names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from assay.errors import InputError
from assay.pictures import PICTURES, read_pictures
from assay.picturing import picture, picture_all
from assay.record import RECORD, read_record

RECORDS = Path(__file__).parents[1] / "leaderboards" / "records"
SHOWN = RECORDS / "digits-linf" / "bit_depth" / "standard"


def test_a_deterministic_defense_answers_as_its_record_says() -> None:
    record = read_record(SHOWN)
    found = picture(SHOWN, record)
    assert found is not None
    assert found.answers is not None
    # Clean images of fallen samples are right, attacked ones wrong; nothing else made them fall.
    np.testing.assert_array_equal(found.answers[0], found.labels)
    np.testing.assert_array_equal(found.answers[1] == found.labels, found.held)
    assert found.purified is not None
    # Two bits leave four levels.
    assert len(np.unique(found.purified.round(4))) <= 4
    assert np.abs(found.adversarial - found.clean).max() <= 0.2 + 1e-6


def test_other_weights_are_not_the_records() -> None:
    record = read_record(SHOWN)
    changed = dict.fromkeys(record.defense.weights, "0" * 64)
    other = record.model_copy(update={"defense": record.defense.model_copy(update={"weights": changed})})
    with pytest.raises(InputError, match="weights"):
        picture(SHOWN, other)


def test_one_defense_that_is_not_at_hand_keeps_no_other_waiting(tmp_path: Path) -> None:
    for name in ("bit_depth", "saturated_logits"):
        shutil.copytree(RECORDS / "digits-linf" / name / "standard", tmp_path / "records" / "digits-linf" / name)
    from assay.record import write_record

    foreign = tmp_path / "records" / "digits-linf" / "saturated_logits"
    record = read_record(foreign)
    ref = record.defense.model_copy(update={"name": "somebody.s:THING"})
    write_record(record.model_copy(update={"defense": ref}).sealed(None), foreign / RECORD)
    found = {folder.name: reason for folder, reason in picture_all(tmp_path)}
    assert found["bit_depth"] == ""
    assert "trust" in found["saturated_logits"]
    shown = tmp_path / "records" / "digits-linf" / "bit_depth"
    assert read_pictures(shown, read_record(shown)) is not None
    assert not (foreign / PICTURES).exists()
