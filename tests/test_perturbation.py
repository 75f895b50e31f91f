"""Adversarial examples of images that may not be passed on: exact with the images, and of no use without."""

from __future__ import annotations

import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

import assay
from assay import data, protocol
from assay.auditing import audit
from assay.defense import DefenseSpec
from assay.errors import InputError
from assay.perturbation import MASKED, bundle_bytes, masked, most_bytes, strongest, unmasked
from assay.record import BUNDLE, COUNTS, RECORD, SAMPLES
from assay.registry import DEFENSES
from assay.verify import verify_record

FLOATS = arrays(np.float32, (3, 1, 2, 2), elements=st.floats(width=32))
RECORDS = Path(__file__).parents[1] / "leaderboards" / "records"


def small(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.9, (3, 1, 4, 4)).astype(np.float32)


@given(FLOATS, FLOATS)
def test_any_example_comes_back_to_the_last_bit(x_adv: np.ndarray, x: np.ndarray) -> None:
    kept = masked(x_adv, x)
    assert {name: array.dtype for name, array in kept.items()} == {
        "masked": np.uint8, "length": np.int64, "digest": np.uint8,
    }  # fmt: skip
    np.testing.assert_array_equal(unmasked(x, kept, [1, 2, 3]).view(np.int32), x_adv.view(np.int32))
    assert len(kept["masked"]) <= 3 * most_bytes(x[0].size)


def test_no_example_at_all_is_none() -> None:
    none = np.zeros((0, 1, 4, 4), np.float32)
    assert unmasked(none, masked(none, none), []).shape == none.shape


@pytest.mark.parametrize("where", [0, 2])
def test_another_image_is_seen_by_its_last_bit(where: int) -> None:
    x = small()
    kept = masked(x + np.float32(0.05), x)
    x[where, 0, 1, 1] = np.nextafter(x[where, 0, 1, 1], np.float32(1))
    with pytest.raises(InputError, match=rf"of 1 of 3 samples \({(7, 8, 9)[where]}\)"):
        unmasked(x, kept, [7, 8, 9])


CHANGES: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "a byte": lambda kept: kept["masked"].__setitem__(20, kept["masked"][20] ^ 1),
    "a digest": lambda kept: kept["digest"].__setitem__((1, 3), kept["digest"][1, 3] ^ 1),
    "a length below nothing": lambda kept: kept["length"].__setitem__(0, -1),
    "another length": lambda kept: kept["length"].__setitem__(0, kept["length"][0] + 1),
    "an example left out": lambda kept: kept.update(masked=kept["masked"][: kept["length"][:2].sum()],
                                                    length=kept["length"][:2]),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_was_changed_is_refused(what: str) -> None:
    x = small()
    kept = {name: array.copy() for name, array in masked(x + np.float32(0.05), x).items()}
    CHANGES[what](kept)
    with pytest.raises(InputError, match="masked"):
        unmasked(x, kept, [7, 8, 9])


def test_what_unpacks_to_more_than_an_image_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x = small()[:1]
    bomb = zlib.compress(bytes(50_000_000), 9)
    monkeypatch.setattr(zlib, "compress", lambda content, level: bomb)
    kept = masked(x, x)
    monkeypatch.undo()
    tracemalloc.start()
    with pytest.raises(InputError, match="can't be unmasked"):
        unmasked(x, kept, [7])
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_file_tells_nothing_of_images() -> None:
    """Images of one grey each, moved by 8/255: what is kept of them is as random as what is kept of noise."""
    eps = np.float32(8 / 255)
    x = np.repeat(np.linspace(0.1, 0.9, 64, dtype=np.float32), 256).reshape(64, 1, 16, 16)
    signs = np.random.default_rng(0).choice([-eps, eps], x.shape).astype(np.float32)
    first, second = masked(x + signs, x), masked(x - signs, x)
    for found in (first["masked"], first["masked"] ^ second["masked"][: len(first["masked"])]):
        counts = np.bincount(found, minlength=256)
        # 255 degrees of freedom: a mean of 255, a standard deviation of 22.6.
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 255 + 6 * 22.6
    # The plain difference of the same bits tells how bright each was: another number of steps in each power of two.
    steps = (x + signs).view(np.int32) - x.view(np.int32)
    assert len({int(np.abs(each).max()).bit_length() for each in steps}) > 2


@pytest.fixture(scope="module")
def withheld(zoo: ModuleType, toy_run: Path) -> Iterator[None]:
    """Digits as though their images might not be passed on; a protocol that asks little, and two defenses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "digits", replace(data.DATASETS["digits"], shareable=False))
        asked = replace(protocol.PROTOCOLS["2026.1"], checks=("interface",))
        patch.setitem(protocol.PROTOCOLS, "2026.1", asked)  # type: ignore[arg-type]
        for model in (zoo.Linear("toy-kept"), zoo.SmoothedLinear("toy-round")):
            spec = DefenseSpec(model.card, lambda dataset, model=model: model)
            patch.setitem(DEFENSES._entries, model.card.name, spec)
        yield


@pytest.fixture(scope="module")
def folder(zoo: ModuleType, withheld: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaderboards")
    (folder / "boards").mkdir()
    zoo.write_board(folder / "boards", zoo.board(n=30))
    ball = zoo.write_board(folder / "boards", zoo.board(n=12, name="ball", norm="l2", eps="1/4", radii=("1/8", "1/2")))
    ball.write_text(ball.read_text() + 'radii = ["1/8", "1/2"]\n')
    return folder


def run_on(folder: Path, name: str, board: str, out: Path, *attacks: str) -> Path:
    from assay.evaluation import execute
    from assay.prepare import prepare

    path = str(folder / "boards" / f"{board}.toml")
    execute(prepare(name, path, only=attacks), out)
    return out


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on(folder, "toy-kept", "toy", tmp_path_factory.mktemp("kept") / "run", "uniform", "apgd-ce")


def test_a_record_of_images_that_may_not_be_passed_on_holds_none(run: Path, folder: Path) -> None:
    kept = load_file(run / BUNDLE)
    assert set(kept) == {"id", *MASKED}
    report = verify_record(run, leaderboards=folder)
    assert report.ok, [item for item in report.items if item.status == "failed"]
    assert {item.name for item in report.items if item.status == "ok"} >= {"examples", "scores"}
    ids = kept["id"].tolist()
    x = data.load("digits", ids)[0].numpy()
    shown = assay.examples(run)
    assert (shown.ids, shown.y.tolist()) == (tuple(ids), data.load("digits", ids)[1].tolist())
    np.testing.assert_array_equal(shown.x_adv, unmasked(x, kept, ids))
    np.testing.assert_array_equal(shown.x, x)
    some = [4, 0, 9]
    found = strongest(run / BUNDLE, [ids[i] for i in some], x[some])
    assert 0.05 < np.abs(found - x[some]).max() <= 0.1 + 1e-6
    np.testing.assert_array_equal(found, unmasked(x, kept, ids)[some])
    with pytest.raises(InputError, match="has no sample 1796"):
        strongest(run / BUNDLE, [1796], x[:1])


def test_it_is_the_same_run_as_one_that_holds_images(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.DATASETS, "digits", replace(data.DATASETS["digits"], shareable=True))
    shown = load_file(run_on(folder, "toy-kept", "toy", tmp_path / "run", "uniform", "apgd-ce") / BUNDLE)
    kept = load_file(run / BUNDLE)
    x = data.load("digits", kept["id"].tolist())[0].numpy()
    np.testing.assert_array_equal(unmasked(x, kept, kept["id"]), shown["x_adv"])


def test_the_examples_of_certified_radii_are_kept_so_too(folder: Path, tmp_path: Path) -> None:
    run = run_on(folder, "toy-round", "ball", tmp_path / "run")
    kept = load_file(run / COUNTS)
    assert not [name for name in kept if name.endswith("/broken_x")]
    assert sum(len(kept[f"radius-{radius}/broken_length"]) for radius in ("1-8", "1-2")) > 0
    report = verify_record(run, leaderboards=folder)
    assert {item.name: item.status for item in report.items}["certified"] == "ok"
    assert report.ok


@pytest.mark.parametrize("form", ["images", "masked"])
def test_an_audit_takes_either_form_and_masks_what_it_keeps(
    form: str, zoo: ModuleType, folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "leaderboards"
    shutil.copytree(folder, here)
    row = here / "records" / "toy" / "toy-kept" / "quick"
    row.parent.mkdir(parents=True)
    source = run_on(here, "toy-kept", "toy", tmp_path / "run", "uniform")
    shutil.copytree(source, row, ignore=lambda _, names: set(names) - {RECORD, SAMPLES, BUNDLE})
    ids = np.array(zoo.board(n=30).ids)
    x, y = data.load("digits", ids.tolist())
    worst = zoo.linf_worst_point(x, y, 0.1).numpy()
    (tmp_path / "given").write_bytes(bundle_bytes(ids, worst, x.numpy() if form == "masked" else None))
    told = audit(row, tmp_path / "given", "A. Nother", leaderboards=here)
    assert len(told.samples) > 3
    lowered = load_file(here / "audits" / "toy" / "toy-kept" / "quick" / "001.safetensors")
    rows = [ids.tolist().index(each) for each in lowered["id"].tolist()]
    assert [sample.id for sample in told.samples] == lowered["id"].tolist()
    back = unmasked(x[rows].numpy(), lowered, lowered["id"])
    np.testing.assert_array_equal(back, worst[rows])


@pytest.mark.parametrize("name", [name for name, found in data.DATASETS.items() if not found.shareable])
def test_no_committed_record_passes_images_on(name: str) -> None:
    for path in sorted(RECORDS.glob(f"{name}-*/*/*/{BUNDLE}")):
        assert set(load_file(path)) == {"id", *MASKED}, path
        counts = path.with_name(COUNTS)
        if counts.is_file():
            assert not [tensor for tensor in load_file(counts) if tensor.endswith("broken_x")], counts
