"""Examples of a board's undefended model: made once for all rows, and never other ones than a run would make."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from assay import data, provenance
from assay.attack import Target
from assay.defense import DefenseSpec
from assay.job import Job
from assay.noise import Noise
from assay.prepare import Prepared, prepare
from assay.record import BUNDLE, Record
from assay.registry import DEFENSES
from assay.transferred import KEPT, transferred

Seen = list[int]
ZOO = Path(__file__).with_name("defense_zoo.py")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "transfer"


@pytest.fixture
def source(zoo: ModuleType) -> Iterator[tuple[str, Seen]]:
    """A registered undefended model, and the rows that it is asked about."""
    seen: Seen = []

    class Counted(zoo.Linear):  # type: ignore[name-defined, misc]
        def draw(self, x: torch.Tensor, noise: Noise) -> torch.Tensor:
            seen.append(len(x))
            answer: torch.Tensor = super().draw(x, noise)
            return answer

    DEFENSES._entries["counted-source"] = DefenseSpec(
        zoo.NAMESAKE.card.model_copy(update={"name": "counted-source"}), lambda dataset: Counted("counted-source")
    )
    yield "counted-source", seen
    del DEFENSES._entries["counted-source"]


@pytest.fixture
def ready(zoo: ModuleType, source: tuple[str, Seen]) -> Callable[..., Prepared]:
    def make(name: str = "LINEAR", *, seed: int = 0, **changes: Any) -> Prepared:
        board = zoo.board(source=source[0], **changes)
        return prepare(f"{ZOO}:{name}", board, trust=True, only=("transfer",), seed=seed)

    return make


def run(prepared: Prepared, out: Path) -> Record:
    from assay.evaluation import execute

    return execute(prepared, out)


def examples(job: Job, index: int = 0) -> torch.Tensor:
    """What `transferred` gives for one shard."""
    ids = job.shards[index]
    x, y = data.load(job.board.dataset, ids)
    (planned,) = job.planned
    noise = Noise.from_seed(job.seed, ids).child("attack", "transfer")
    return transferred(job, job.attacks["transfer"].attack, planned.options, ids, x, y, noise)


def test_a_second_row_asks_the_source_nothing(
    ready: Callable[..., Prepared], source: tuple[str, Seen], cache: Path, tmp_path: Path
) -> None:
    seen = source[1]
    first = run(ready("LINEAR"), tmp_path / "a")
    assert sum(seen) > 0
    assert len(list(cache.iterdir())) == 3  # a file a shard
    seen.clear()
    run(ready("ABSTAINING"), tmp_path / "b")
    assert sum(seen) == 0
    # And a row from cached examples is the row that made them, to the bit.
    again = run(ready("LINEAR"), tmp_path / "c")
    assert sum(seen) == 0
    assert again.outcome_sha256 == first.outcome_sha256
    assert (tmp_path / "c" / BUNDLE).read_bytes() == (tmp_path / "a" / BUNDLE).read_bytes()


def test_they_are_what_the_attack_finds_whatever_stands(ready: Callable[..., Prepared]) -> None:
    job = ready().job
    ids, (planned,) = job.shards[0], job.planned
    x, y = data.load(job.board.dataset, ids)
    noise = Noise.from_seed(0, ids).child("attack", "transfer")
    assert job.source is not None
    options = {**planned.options, "source": Target(job.source, len(ids))}
    direct = job.attacks["transfer"].attack(Target(job.defense, len(ids)), x, y, job.board.threat, noise, **options)
    made, cached = examples(job), examples(job)
    assert torch.equal(made, direct)
    assert torch.equal(cached, direct)
    assert not torch.equal(direct, x)


def test_what_they_depend_on_tells_them_apart(
    ready: Callable[..., Prepared], source: tuple[str, Seen], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,) = ready().job.planned
    other = replace(planned, options={**planned.options, "steps": 3})
    retrained = ready().job
    assert retrained.source is not None
    retrained.source.weight.mul_(1.5)
    jobs = [
        ready().job,
        ready(seed=1).job,
        ready(eps="1/5").job,
        ready(norm="l2").job,
        replace(ready().job, planned=(other,)),
        retrained,
    ]
    for number, job in enumerate(jobs, start=1):
        examples(job)
        assert len(list(cache.iterdir())) == number
    examples(jobs[0], index=1)
    assert len(list(cache.iterdir())) == len(jobs) + 1
    monkeypatch.setattr(provenance, "code_sha256", lambda: "0" * 64)
    source[1].clear()
    examples(jobs[0])
    assert sum(source[1]) > 0


@pytest.mark.parametrize("harm", ["cut", "text", "shape", "nan", "dtype", "name"])
def test_a_file_that_is_no_such_thing_is_made_again(harm: str, ready: Callable[..., Prepared], cache: Path) -> None:
    from safetensors.numpy import load_file, save_file

    job = ready().job
    made = examples(job)
    (file,) = cache.iterdir()
    array = load_file(file)["x_adv"]
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif harm == "text":
        file.write_text("not a tensor")
    else:
        changed = {
            "shape": {"x_adv": np.ascontiguousarray(array[:-1])},
            "nan": {"x_adv": np.where(np.arange(8) == 3, np.float32("nan"), array)},
            "dtype": {"x_adv": array.astype(np.float64)},
            "name": {"x": array},
        }[harm]
        save_file(changed, file)
    assert torch.equal(examples(job), made)
    assert np.array_equal(load_file(file)["x_adv"], made.numpy())


def test_what_nothing_read_for_long_goes_when_another_is_written(ready: Callable[..., Prepared], cache: Path) -> None:
    examples(ready().job)
    (read,) = cache.glob("*.safetensors")
    unread, fresh = cache / "unread.safetensors", cache / "fresh.safetensors"
    for file, age in ((read, 2 * KEPT), (unread, 2 * KEPT), (fresh, 0.5 * KEPT)):
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    examples(ready().job)  # reading writes nothing, and marks what it read
    assert unread.is_file()
    examples(ready(seed=1).job)
    assert read.is_file()
    assert fresh.is_file()
    assert not unread.is_file()


def test_where_nothing_can_be_kept_they_are_made_and_that_is_said(
    ready: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = examples(ready().job)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "file"))
    assert torch.equal(examples(ready().job), made)
    assert "can't be cached" in caplog.text
