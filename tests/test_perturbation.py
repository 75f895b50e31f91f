"""Adversarial examples of images that may not be passed on: exact with the images, and of no use without."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import zlib
from collections.abc import Iterator
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
from assay.certification import broken_examples
from assay.defense import DefenseSpec
from assay.errors import InputError, IntegrityError
from assay.perturbation import MASKED, bundle_bytes, ids_in, masked, most_bytes, strongest, unmasked
from assay.pictures import PICTURES
from assay.record import BUNDLE, COUNTS, RECORD, SAMPLES
from assay.registry import DEFENSES
from assay.verify import verify_record

FLOATS = arrays(np.float32, (3, 1, 2, 2), elements=st.floats(width=32))
LEADERBOARDS = Path(__file__).parents[1] / "leaderboards"


def small(seed: int = 0, n: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.9, (n, 1, 4, 4)).astype(np.float32)


@given(FLOATS, FLOATS)
def test_any_example_comes_back_to_the_last_bit(x_adv: np.ndarray, x: np.ndarray) -> None:
    kept = masked(x_adv, x)
    assert {name: array.dtype for name, array in kept.items()} == {"masked": np.uint8, "digest": np.uint8}
    np.testing.assert_array_equal(unmasked(x, kept).view(np.int32), x_adv.view(np.int32))
    assert len(kept["masked"]) + len(kept["digest"]) <= most_bytes(x.size)


def test_no_example_at_all_is_none() -> None:
    none = np.zeros((0, 1, 4, 4), np.float32)
    assert unmasked(none, masked(none, none)).shape == none.shape


def test_another_image_is_seen_by_its_last_bit() -> None:
    x = small()
    kept = masked(x + np.float32(0.05), x)
    x[2, 0, 1, 1] = np.nextafter(x[2, 0, 1, 1], np.float32(1))
    with pytest.raises(InputError, match="not, to the last bit, those that they were made of"):
        unmasked(x, kept)
    with pytest.raises(InputError, match="not, to the last bit"):
        unmasked(small()[[1, 0, 2]], kept)


@pytest.mark.parametrize("name", ["masked", "digest"])
@pytest.mark.parametrize("place", [0, 20, -1])
def test_one_changed_bit_is_refused(name: str, place: int) -> None:
    x = small()
    kept = {name: array.copy() for name, array in masked(x + np.float32(0.05), x).items()}
    kept[name][place] ^= 1
    with pytest.raises(InputError, match="can't be unmasked"):
        unmasked(x, kept)


@pytest.mark.parametrize(
    "packed",
    [zlib.compress(bytes(50_000_000), 9), zlib.compress(bytes(8)), b"no zlib", zlib.compress(bytes(64)) + b"more",
     zlib.compress(bytes(64))[:-3], b""],
    ids=["bomb", "too little", "no zlib", "more behind", "unfinished", "empty"],
)  # fmt: skip
def test_what_is_not_the_size_of_the_images_is_refused_before_it_is_made(
    packed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its author has the images, so its digest is right."""
    x = small(n=1)
    monkeypatch.setattr(zlib, "compress", lambda content, level: packed)
    kept = masked(x, x)
    monkeypatch.undo()
    tracemalloc.start()
    with pytest.raises(InputError, match=r"not those of 1 images of \(1, 4, 4\)"):
        unmasked(x, kept)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_file_tells_nothing_of_images() -> None:
    """Images of one grey each, moved by 8/255: what is kept of them is as random as what is kept of noise."""
    eps = np.float32(8 / 255)
    x = np.repeat(np.linspace(0.1, 0.9, 64, dtype=np.float32), 256).reshape(64, 1, 16, 16)
    signs = np.random.default_rng(0).choice([-eps, eps], x.shape).astype(np.float32)
    first, second = masked(x + signs, x), masked(x - signs, x)
    common = min(len(first["masked"]), len(second["masked"]))
    for found in (first["masked"], first["masked"][:common] ^ second["masked"][:common]):
        counts = np.bincount(found, minlength=256)
        # 255 degrees of freedom: a mean of 255, a standard deviation of 22.6.
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 255 + 6 * 22.6
    # The plain difference of the same bits tells how bright each was: another number of steps in each power of two.
    steps = (x + signs).view(np.int32) - x.view(np.int32)
    assert len({int(np.abs(each).max()).bit_length() for each in steps}) > 2
    # A digest of what is kept alone would tell who guesses it: the same change of other images has another.
    same = [masked(each, each)["digest"].tobytes() for each in (x, np.ascontiguousarray(x[::-1]))]
    assert same[0] != same[1]


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_a_type_that_numpy_does_not_have_is_no_bundle(dtype: str, tmp_path: Path) -> None:
    size = 2 if dtype == "BF16" else 1
    header = json.dumps({
        "id": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "x_adv": {"dtype": dtype, "shape": [1, 1, 1, 4], "data_offsets": [8, 8 + 4 * size]},
    }).encode()  # fmt: skip
    (tmp_path / "b").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 + 4 * size))
    with pytest.raises(IntegrityError, match="is not a bundle of adversarial examples"):
        ids_in(tmp_path / "b")


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
    np.testing.assert_array_equal(shown.x_adv, unmasked(x, kept))
    np.testing.assert_array_equal(shown.x, x)
    some = [4, 0, 9]
    found = strongest(run / BUNDLE, [ids[i] for i in some], lambda every: data.load("digits", every)[0].numpy())
    assert 0.05 < np.abs(found - x[some]).max() <= 0.1 + 1e-6
    np.testing.assert_array_equal(found, unmasked(x, kept)[some])
    with pytest.raises(InputError, match="has no sample 1796"):
        strongest(run / BUNDLE, [1796], lambda every: x)


def test_it_is_the_same_run_as_one_that_holds_images(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.DATASETS, "digits", replace(data.DATASETS["digits"], shareable=True))
    shown = load_file(run_on(folder, "toy-kept", "toy", tmp_path / "run", "uniform", "apgd-ce") / BUNDLE)
    kept = load_file(run / BUNDLE)
    x = data.load("digits", kept["id"].tolist())[0].numpy()
    np.testing.assert_array_equal(unmasked(x, kept), shown["x_adv"])


def test_the_examples_of_certified_radii_are_kept_so_too(folder: Path, tmp_path: Path) -> None:
    run = run_on(folder, "toy-round", "ball", tmp_path / "run")
    kept = load_file(run / COUNTS)
    assert not [name for name in kept if name.endswith("/broken_x")]
    assert sum(len(kept[f"radius-{radius}/broken_id"]) for radius in ("1-8", "1-2")) > 0
    report = verify_record(run, leaderboards=folder)
    assert {item.name: item.status for item in report.items}["certified"] == "ok"
    assert report.ok


def test_images_that_fell_at_a_radius_are_refused_where_they_may_not_be_passed_on() -> None:
    x = small()
    shown = {"radius-1/broken_x": x}
    np.testing.assert_array_equal(broken_examples(shown, "radius-1", x, shareable=True), x)
    with pytest.raises(IntegrityError, match="may not be passed on"):
        broken_examples(shown, "radius-1", x, shareable=False)


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
    back = unmasked(x[rows].numpy(), lowered)
    np.testing.assert_array_equal(back, worst[rows])


def test_a_record_that_holds_such_images_is_refused(run: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "digits", replace(data.DATASETS["digits"], shareable=True))
        run_on(folder, "toy-kept", "toy", other, "uniform", "apgd-ce")
        assert verify_record(other, leaderboards=folder).ok
    (item,) = [item for item in verify_record(other, leaderboards=folder).items if item.status == "failed"]
    assert "may not be passed on" in item.message


def test_examples_of_a_changed_file_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = assay.read_record(copy)
    content = bytearray((copy / BUNDLE).read_bytes())
    content[-1] ^= 1
    (copy / BUNDLE).write_bytes(content)
    for given_as in (record, copy, copy / RECORD):
        with pytest.raises(IntegrityError, match="changed after the record was written"):
            assay.examples(given_as)


@pytest.mark.parametrize("name", [name for name, found in data.DATASETS.items() if not found.shareable])
def test_nothing_committed_passes_images_on(name: str) -> None:
    files = [
        file for part in ("records", "audits") for file in (LEADERBOARDS / part).glob(f"{name}-*/**/*.safetensors")
    ]
    assert len(files) > 10 or name != "cifar10"
    for file in files:
        assert file.name != PICTURES, file
        shown = [tensor for tensor in load_file(file) if tensor.endswith(("x_adv", "broken_x"))]
        assert not shown, file
