"""Datasets: what is pinned is what is loaded, and what can't be loaded says why."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import assay.leaderboards
from assay import data
from assay.errors import InputError
from assay.threat import NORMS, parse_eps

BOARDS = sorted((Path(assay.leaderboards.__file__).parent / "boards").glob("*.toml"))
HERE = Path(os.environ.get(data.DATA_VARIABLE, ""))
HAS_CIFAR10 = data.DATA_VARIABLE in os.environ and any(HERE.glob("**/plain_text/test-*.parquet"))


@pytest.fixture
def fresh() -> Iterator[None]:
    """No data set opened before or after."""
    data._cifar10_at.cache_clear()
    data._cifar10_hub.cache_clear()
    yield
    data._cifar10_at.cache_clear()
    data._cifar10_hub.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Path:
    """A folder in the hub data set's layout with 20 images, image i all of value i; CIFAR-10's digest set to its."""
    rows = []
    for i in range(20):
        png = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(png, "PNG")
        rows.append({"img": {"bytes": png.getvalue(), "path": f"{i}.png"}, "label": i % 10})
    features = '{"info": {"features": {"img": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
    target = tmp_path / "data" / "cifar10" / "plain_text"
    target.mkdir(parents=True)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": features})
    pq.write_table(table, target / "test-00000-of-00001.parquet")
    labels = bytes(i % 10 for i in range(20))
    probes = np.stack([np.full((32, 32, 3), i, np.uint8) for i in range(0, 20, 2)])
    digest = data.hashlib.sha256(labels + probes.tobytes()).hexdigest()
    tiny = replace(data.DATASETS["cifar10"], n_ids=20, content_sha256=digest)
    monkeypatch.setitem(data.DATASETS, "cifar10", tiny)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "data"


def test_digits_are_the_published_rows() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ids = [1796, 3, 3]
    x, y = data.load("digits", ids)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert torch.equal(x, torch.tensor(bunch.images[ids] / 16, dtype=torch.float32)[:, None])
    assert y.tolist() == bunch.target[ids].tolist()


def test_digits_fill_the_box() -> None:
    x, y = data.load("digits", range(1797))
    assert (x.min(), x.max()) == (0, 1)
    assert y.unique().tolist() == list(range(10))


def test_split_covers_the_digits_once() -> None:
    train, test = data.train_split("digits"), data.test_ids("digits")
    assert (len(train), len(test)) == (1297, 500)
    assert sorted(train + test) == list(range(1797))
    assert list(train) == sorted(train)
    assert list(test) == sorted(test)


def test_another_permutation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data._digits_permutation.cache_clear()
    monkeypatch.setattr(data, "_DIGITS_SPLIT_SHA256", "0" * 64)
    with pytest.raises(InputError, match="permutes differently"):
        data.test_ids("digits")
    data._digits_permutation.cache_clear()


def test_another_content_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data._digits.cache_clear()
    changed = replace(data.DATASETS["digits"], content_sha256="0" * 64)
    monkeypatch.setitem(data.DATASETS, "digits", changed)
    with pytest.raises(InputError, match=r"digits has the content digest [0-9a-f]{64}, expected 0{64}"):
        data.load("digits", [0])
    data._digits.cache_clear()


def test_ids_digest_depends_on_order_and_boundaries() -> None:
    assert data.ids_digest([1, 2]) == data.ids_digest((1, 2))
    assert len({data.ids_digest(ids) for ids in ([1, 2], [2, 1], [12], [])}) == 4


def test_no_ids_give_an_empty_batch() -> None:
    x, y = data.load("digits", [])
    assert x.shape == (0, 1, 8, 8)
    assert y.shape == (0,)


@pytest.mark.parametrize("ids", [[1797], [-1], [0, 5000]])
def test_ids_outside_are_refused(ids: list[int]) -> None:
    with pytest.raises(InputError, match=r"digits has sample ids 0 to 1796, got"):
        data.load("digits", ids)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'cifar'.*Did you mean 'cifar10'"):
        data.load("cifar", [0])


def test_cifar10_has_no_train_split() -> None:
    with pytest.raises(InputError, match="test split"):
        data.train_split("cifar10")


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_boards_hold_the_generated_ids(path: Path) -> None:
    board = tomllib.loads(path.read_text())
    assert board["name"] == path.stem == f"{board['dataset']}-{board['norm']}"
    assert tuple(board["ids"]) == data.board_ids(board["dataset"])
    assert board["ids_sha256"] == data.ids_digest(board["ids"])
    assert board["revision"] == data.describe(board["dataset"]).revision
    assert set(board["ids"]) <= set(data.test_ids(board["dataset"]))
    assert len(set(board["ids"])) == len(board["ids"])


def test_boards_have_the_agreed_threats() -> None:
    boards = {path.stem: tomllib.loads(path.read_text()) for path in BOARDS}
    assert {name: board["eps"] for name, board in boards.items()} == {
        "digits-linf": "1/5",
        "digits-l2": "3/4",
        "cifar10-linf": "8/255",
        "cifar10-l2": "1/2",
        "imagenet-linf": "4/255",
        "imagenet-l2": "3",
    }
    assert all(parse_eps(board["eps"]) > 0 and board["norm"] in NORMS for board in boards.values())


@pytest.mark.parametrize("n", range(10, 201, 10))
def test_every_tenth_prefix_of_the_digits_boards_is_balanced(n: int) -> None:
    _, y = data.load("digits", data.board_ids("digits")[:n])
    assert y.bincount().tolist() == [n // 10] * 10


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 100, 512])
def test_every_prefix_of_the_photographs_boards_is_spread(name: str, n: int) -> None:
    ids = sorted(data.board_ids(name)[:n])
    gaps = np.diff([*ids, data.describe(name).n_ids + ids[0]])
    # Bit reversal's gaps differ by at most a factor of two, and by the rounding of the ids.
    assert gaps.max() <= 2 * gaps.min() + 2


def test_cifar10_reads_a_local_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (folder, folder / "cifar10"):
        monkeypatch.setenv(data.DATA_VARIABLE, str(root))
        x, y = data.load("cifar10", [19, 0, 7])
        assert x.shape == (3, 3, 32, 32)
        assert torch.equal(x[:, 1, 4, 5], torch.tensor([19.0, 0.0, 7.0]) / 255)
        assert y.tolist() == [9, 0, 7]
        assert data.load("cifar10", [])[0].shape == (0, 3, 32, 32)


def test_cifar10_with_other_labels_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = next(folder.glob("**/*.parquet"))
    table = pq.read_table(file)
    labels = [9, *table["label"].to_pylist()[1:]]
    pq.write_table(table.set_column(1, "label", pa.array(labels)), file)
    monkeypatch.setenv(data.DATA_VARIABLE, str(folder))
    with pytest.raises(InputError, match="not the test images"):
        data.load("cifar10", [0])


def test_a_folder_without_cifar10_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"expected .*cifar10/plain_text/test-\*\.parquet or .*plain_text"):
        data.load("cifar10", [0])


def test_cifar10_without_network_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match=r"uoft-cs/cifar10 at revision [0-9a-f]{40}.*ASSAY_DATA"):
        data.load("cifar10", [0])


def test_loading_leaves_progress_bars_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv(data.DATA_VARIABLE, str(folder))
    before = datasets.is_progress_bar_enabled()
    data.load("cifar10", [0])
    assert datasets.is_progress_bar_enabled() == before


@pytest.mark.skipif(not HAS_CIFAR10, reason="ASSAY_DATA names no folder with cifar10")
def test_real_cifar10_is_the_pinned_one(fresh: None) -> None:
    x, y = data.load("cifar10", range(10))
    assert x.shape == (10, 3, 32, 32)
    assert [data.describe("cifar10").labels[label] for label in y] == [
        "cat", "ship", "ship", "airplane", "frog", "frog", "automobile", "frog", "cat", "automobile",
    ]  # fmt: skip


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, assay.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
