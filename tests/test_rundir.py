from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import InputError, IntegrityError
from assay.rundir import RunDir, differences

PLAN = {"seed": 0, "attacks": {"pgd": {"steps": 20}}, "ids": [1, 2, 3]}


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run", PLAN)


def arrays() -> dict[str, np.ndarray]:
    return {
        "correct": np.arange(5),
        "certain": np.array([True, False, True, False, False]),
        "x": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
        "none": np.zeros((0, 3)),
    }


def test_arrays_come_back_as_they_were(store: RunDir) -> None:
    file = store.part_file(3, "pgd")
    assert store.read(file) is None
    store.write(file, arrays())
    found = store.read(file)
    assert found is not None
    for name, value in arrays().items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_the_same_arrays_make_the_same_bytes(store: RunDir, tmp_path: Path) -> None:
    file = store.shard_file(0)
    store.write(file, arrays())
    again = RunDir(tmp_path / "other", PLAN)
    again.write(again.shard_file(0), dict(reversed(arrays().items())))
    assert file.read_bytes() == again.shard_file(0).read_bytes()


def test_a_finished_shard_leaves_no_parts_of_it_and_keeps_the_others(store: RunDir) -> None:
    for shard, stage in [(1, "clean"), (1, "pgd"), (2, "clean")]:
        store.write(store.part_file(shard, stage), arrays())
    store.finish(1, arrays())
    names = sorted(path.name for path in (store.path / "shards").iterdir())
    assert names == ["0001.safetensors", "0002.clean.part"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_shard_is_named(store: RunDir, share: float) -> None:
    file = store.shard_file(0)
    store.write(file, arrays())
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(IntegrityError, match=r"0000\.safetensors"):
        store.read(file)


def test_any_edited_byte_is_noticed(store: RunDir) -> None:
    file = store.part_file(0, "pgd")
    store.write(file, arrays())
    content = file.read_bytes()
    for position in range(len(content)):
        edited = bytearray(content)
        edited[position] ^= 1
        file.write_bytes(bytes(edited))
        with pytest.raises(IntegrityError, match=r"0000\.pgd\.part"):
            store.read(file)


def test_a_shard_of_another_run_or_another_place_is_refused(store: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other", {**PLAN, "seed": 1})
    other.write(other.shard_file(0), arrays())
    store.shard_file(0).write_bytes(other.shard_file(0).read_bytes())
    with pytest.raises(IntegrityError, match="of another run"):
        store.read(store.shard_file(0))
    store.write(store.shard_file(1), arrays())
    store.shard_file(1).rename(store.shard_file(2))
    with pytest.raises(IntegrityError, match=r"0002\.safetensors"):
        store.read(store.shard_file(2))


def test_another_plan_is_refused_and_every_difference_listed(store: RunDir) -> None:
    changed = {"seed": 7, "attacks": {"pgd": {"steps": 40}, "square": {}}, "ids": [1, 2, 3]}
    with pytest.raises(InputError) as error:
        RunDir(store.path, changed)
    for line in ("seed: 0 -> 7", "attacks.pgd.steps: 20 -> 40", "attacks.square: null -> {}", "--out"):
        assert line in str(error.value)
    assert "ids" not in str(error.value)
    RunDir(store.path, json.loads(json.dumps(PLAN)))


def test_an_unreadable_plan_is_named(store: RunDir) -> None:
    file = store.path / "plan.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(IntegrityError, match=r"plan\.json"):
        RunDir(store.path, PLAN)


def test_a_second_process_is_refused_while_the_first_works(store: RunDir) -> None:
    second = RunDir(store.path, PLAN)
    with store.locked():
        with pytest.raises(InputError, match="another process"), second.locked():
            pytest.fail("both hold the lock")
        with pytest.raises(InputError, match="another process"), second.locked():
            pytest.fail("both hold the lock")
    with second.locked():
        pass


def test_of_two_plans_that_start_at_once_only_the_one_on_disk_goes_on(store: RunDir) -> None:
    # What the slower of two processes leaves when both found the folder empty.
    (store.path / "plan.json").write_text(json.dumps({**PLAN, "seed": 1}))
    with pytest.raises(InputError, match="seed: 1 -> 0"), store.locked():
        pytest.fail("the lock was given to a run whose plan is not on disk")


def test_what_a_killed_process_was_writing_is_swept_away(store: RunDir) -> None:
    store.write(store.shard_file(0), arrays())
    debris = [store.path / "shards" / ".0001.pgd.part.123.tmp", store.path / ".record.json.9.tmp"]
    for file in debris:
        file.write_bytes(b"half")
    with store.locked():
        assert not any(file.exists() for file in debris)
    assert store.shard_file(0).exists()


values = st.recursive(st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=6)


@given(values, values)
def test_differences_are_empty_exactly_for_equal_values(a: object, b: object) -> None:
    assert differences(a, a) == []
    if differences(a, b) == []:
        assert a == b
