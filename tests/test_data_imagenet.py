"""ImageNet from the files and shards that people have: the same ids, labels and pixels from each, or a reason."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from assay import data, imagenet
from assay.errors import InputError

WNIDS = ("n01440764", "n01443537", "n15075141")
LABELS = (2, 0, 1, 1, 0, 2, 2)
"""The class of each of the toy split's images, in official order."""
SIZES = ((300, 240), (240, 300), (256, 256), (120, 90), (256, 341), (500, 375), (224, 224))
"""Width and height of each."""
FEATURES = '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
SAMPLE = Path(os.environ.get(data.DATA_VARIABLE, "")) / "imagenet-sample"

PUBLISHED = data.DATASETS["imagenet"]

Write = Callable[..., Path]


def official(i: int, suffix: str = "") -> str:
    return f"ILSVRC2012_val_{i + 1:08d}{suffix}.JPEG"


def jpeg(i: int) -> bytes:
    """Image i: a ramp over a level of its own, so that no two are alike and no pixel is its neighbour."""
    width, height = SIZES[i]
    ramp = np.linspace(0, 80, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    file = io.BytesIO()
    Image.fromarray((ramp + 20 * i + np.zeros(3)).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def pin(monkeypatch: pytest.MonkeyPatch, labels: tuple[int, ...]) -> None:
    """Makes a split with these labels the pinned one."""
    digest = hashlib.sha256(np.asarray(labels, "<u2").tobytes()).hexdigest()
    tiny = replace(data.DATASETS["imagenet"], n_ids=len(labels), content_sha256=digest)
    monkeypatch.setitem(data.DATASETS, "imagenet", tiny)


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A split of seven images in three classes is the pinned one; no data set opened before or after."""
    data._imagenet_at.cache_clear()
    pin(monkeypatch, LABELS)
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    yield
    data._imagenet_at.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`val/` in a data folder, one folder a class."""
    for i, label in enumerate(LABELS):
        home = tmp_path / "imagenet" / "val" / WNIDS[label]
        home.mkdir(parents=True, exist_ok=True)
        (home / official(i)).write_bytes(jpeg(i))
    return tmp_path / "imagenet" / "val"


@pytest.fixture
def shards(tmp_path: Path) -> Write:
    """Writes some images, in the order given, as two shards of the hub's layout, two rows a group."""

    def write(order: list[int], *, named: bool = True, content: dict[int, bytes] | None = None) -> Path:
        home = tmp_path / "imagenet" / "data"
        home.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "image": {
                    "bytes": (content or {}).get(i) or jpeg(i),
                    "path": official(i, f"_{WNIDS[LABELS[i]]}") if named else None,
                },
                "label": LABELS[i],
            }
            for i in order
        ]
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", image), ("label", pa.int64())], {"huggingface": FEATURES})
        for shard, part in enumerate((rows[:3], rows[3:])):
            table = pa.Table.from_pylist(part, schema)
            pq.write_table(table, home / f"validation-0000{shard}-of-00002.parquet", row_group_size=2)
        return home

    return write


def test_the_whole_split_is_described() -> None:
    assert (PUBLISHED.n_ids, PUBLISHED.n_classes, PUBLISHED.shape) == (50000, 1000, (3, 224, 224))
    assert len(PUBLISHED.labels) == 1000


def test_a_folder_of_images_is_read_in_official_order(folder: Path) -> None:
    x, y = data.load("imagenet", range(7))
    assert x.shape == (7, 3, 224, 224)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert 0 <= x.min() < x.max() <= 1
    assert y.tolist() == list(LABELS)
    # Each image's middle: its own level plus half of both ramps.
    middle = x[:, :, 111:113, 111:113].mean((1, 2, 3)) * 255
    assert torch.allclose(middle, torch.tensor([60.0 + 20 * i for i in range(7)]), atol=2)


def test_ids_choose_and_order(folder: Path) -> None:
    x, _ = data.load("imagenet", range(7))
    some, labels = data.load("imagenet", [5, 0, 5])
    assert torch.equal(some, x[[5, 0, 5]])
    assert labels.tolist() == [LABELS[5], LABELS[0], LABELS[5]]
    assert data.load("imagenet", [])[0].shape == (0, 3, 224, 224)
    with pytest.raises(InputError, match="imagenet has sample ids 0 to 6"):
        data.load("imagenet", [7])


def test_shards_in_any_order_hold_the_same_images(folder: Path, shards: Write) -> None:
    expected = data.load("imagenet", [6, 1, 2, 0, 5])
    data._imagenet_at.cache_clear()
    shutil.rmtree(folder)
    shards([4, 2, 6, 0, 5, 1, 3])
    x, y = data.load("imagenet", [6, 1, 2, 0, 5])
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])


def test_the_folder_itself_may_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(folder.parent))
    assert data.load("imagenet", [1])[1].tolist() == [0]


def test_the_hubs_own_names_are_read_in_a_folder(folder: Path) -> None:
    for file in list(folder.glob("*/*")):
        file.rename(file.with_name(f"{file.stem}_{file.parent.name}.JPEG"))
    (folder / "readme.txt").write_text("not a class")
    (folder / WNIDS[0] / "thumbs.db").write_text("not an image")
    assert data.load("imagenet", range(7))[1].tolist() == list(LABELS)


def test_rows_without_names_are_taken_in_order_if_their_labels_agree(shards: Write) -> None:
    shards([0, 1, 2, 3, 4, 5, 6], named=False)
    assert data.load("imagenet", range(7))[1].tolist() == list(LABELS)
    data._imagenet_at.cache_clear()
    shards([1, 0, 2, 3, 4, 5, 6], named=False)
    with pytest.raises(InputError, match="not the validation images in their official order"):
        data.load("imagenet", [0])


def test_only_what_is_asked_for_is_decoded(folder: Path) -> None:
    (folder / WNIDS[LABELS[3]] / official(3)).write_bytes(b"no image")
    data.load("imagenet", [0, 1, 2, 4, 5, 6])
    with pytest.raises(InputError, match="image 3 of imagenet can't be decoded"):
        data.load("imagenet", [2, 3])


def test_each_row_group_is_read_once_and_no_other(shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    home = shards([0, 1, 2, 3, 4, 5, 6])
    split = imagenet.open_split(str(home.parent), 7)
    read: list[tuple[int, list[str]]] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: object, i: int, columns: list[str]) -> object:
        read.append((i, columns))
        return original(self, i, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    split.pixels([4, 0, 3, 1])  # rows 1, 0 of the second shard's first group; 0 and 1 of the first's
    assert read == [(0, ["image.bytes"])] * 2
    assert imagenet.open_split(str(home.parent), 7).labels.tolist() == list(LABELS)
    assert all("image.bytes" not in columns for _, columns in read[2:])


def test_a_damaged_row_is_named(shards: Write) -> None:
    shards([0, 1, 2, 3, 4, 5, 6], content={5: jpeg(5)[:200]})
    data.load("imagenet", [4, 6])
    with pytest.raises(InputError, match="image 5 of imagenet can't be decoded"):
        data.load("imagenet", [5])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_every_kind_of_picture_becomes_three_colours(shards: Write, mode: str) -> None:
    file = io.BytesIO()
    flat = Image.new("RGB", (64, 80), (200, 200, 200))
    (flat.quantize() if mode == "P" else flat.convert(mode)).save(file, "TIFF" if mode == "CMYK" else "PNG")
    shards([0, 1, 2, 3, 4, 5, 6], content={2: file.getvalue()})
    x, _ = data.load("imagenet", [2])
    assert torch.allclose(x, torch.tensor(200 / 255), atol=1.5 / 255)


@pytest.mark.parametrize(
    ("size", "left", "top"), [((256, 256), 16, 16), ((256, 341), 16, 58), ((300, 256), 38, 16), ((342, 256), 59, 16)]
)
def test_the_middle_is_taken_without_resampling_where_the_shorter_side_is_256(
    size: tuple[int, int], left: int, top: int
) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    found = np.asarray(imagenet.cut(Image.fromarray(pixels)))
    assert np.array_equal(found, pixels[top : top + 224, left : left + 224])


@pytest.mark.parametrize("size", [(512, 700), (130, 97), (500, 375)])
def test_resizing_is_bicubic_and_antialiased(size: tuple[int, int]) -> None:
    width, height = size
    # Grey enough for no overshoot to leave 0..255, which Pillow would cut off between the two directions.
    pixels = np.random.RandomState(0).randint(90, 166, (height, width, 3)).astype(np.uint8)
    short = min(size)
    to = (256 * height // short, 256 * width // short)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(x, to, mode="bicubic", antialias=True)
    top, left = (round((side - 224) / 2) for side in to)
    found = torch.from_numpy(np.array(imagenet.cut(Image.fromarray(pixels)))).permute(2, 0, 1).double()
    # Pillow rounds to whole numbers after each of the two directions.
    assert (found - expected[0, :, top : top + 224, left : left + 224]).abs().max() <= 1.5


def test_missing_images_are_counted(folder: Path) -> None:
    (folder / WNIDS[LABELS[3]] / official(3)).unlink()
    with pytest.raises(InputError, match=r"has 7 validation images, .*val/.* has 6; number 4 is missing"):
        data.load("imagenet", [0])


def test_images_that_are_none_of_its_are_named(folder: Path) -> None:
    (folder / WNIDS[0] / official(99)).write_bytes(jpeg(0))
    with pytest.raises(InputError, match="has 8; number 100 is none of its"):
        data.load("imagenet", [0])


def test_an_image_in_two_classes_is_refused(folder: Path) -> None:
    shutil.copy(folder / WNIDS[LABELS[0]] / official(0), folder / WNIDS[1])
    with pytest.raises(InputError, match="has 8: get the whole split, each image once"):
        data.load("imagenet", [0])


def test_a_folder_without_classes_is_refused(folder: Path) -> None:
    for file in list(folder.glob("*/*")):
        file.rename(folder / file.name)
    with pytest.raises(InputError, match=r"has 0; number 1 is missing.*in one folder a class"):
        data.load("imagenet", [0])


def test_classes_under_other_names_are_refused(folder: Path) -> None:
    (folder / WNIDS[0]).rename(folder / "tench")
    with pytest.raises(InputError, match=r"imagenet has the content digest .* or not in one folder a WordNet id"):
        data.load("imagenet", [0])


def test_too_few_shards_are_counted(shards: Write) -> None:
    home = shards([0, 1, 2, 3, 4, 5, 6], named=False)
    (home / "validation-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"has 7 validation images, .*validation-\*\.parquet has 3: get all"):
        data.load("imagenet", [0])


@pytest.mark.parametrize("table", [{"img": [b""], "label": [0]}, {"image": [b""], "label": [0]}])
def test_other_columns_are_refused(tmp_path: Path, table: dict[str, list[object]]) -> None:
    home = tmp_path / "imagenet" / "data"
    home.mkdir(parents=True)
    pq.write_table(pa.table(table), home / "validation-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"lacks image\.bytes, image\.path, which"):
        data.load("imagenet", [0])


def test_a_damaged_shard_is_named(shards: Write) -> None:
    home = shards([0, 1, 2, 3, 4, 5, 6])
    (home / "validation-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"00001-of-00002\.parquet can't be read as parquet"):
        data.load("imagenet", [0])


def test_a_folder_without_imagenet_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"imagenet/val/n01440764/ILSVRC2012_val_00000293\.JPEG.*validation-\*\.parq"):
        data.load("imagenet", [0])


def test_the_hubs_shards_are_fetched_at_the_pinned_revision(shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    home = shards([4, 2, 6, 0, 5, 1, 3])
    asked: list[tuple[str, dict[str, object]]] = []

    def download(repository: str, **options: object) -> str:
        asked.append((repository, options))
        return str(home.parent)

    monkeypatch.delenv(data.DATA_VARIABLE)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert data.load("imagenet", [3, 0])[1].tolist() == [LABELS[3], LABELS[0]]
    data.load("imagenet", [1])
    revision = data.describe("imagenet").revision
    patterns = "data/validation-*.parquet"
    assert asked == [("ILSVRC/imagenet-1k", {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns})]


def test_without_consent_or_network_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*args: object, **options: object) -> None:
        raise PermissionError("access is restricted")

    monkeypatch.delenv(data.DATA_VARIABLE)
    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(InputError, match=r"PermissionError.*ILSVRC/imagenet-1k at revision [0-9a-f]{40}.*terms.*ASSAY"):
        data.load("imagenet", [0])


def test_it_has_no_train_split() -> None:
    with pytest.raises(InputError, match="none to train on"):
        data.train_split("imagenet")
    assert data.test_ids("imagenet") == tuple(range(7))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="ASSAY_DATA names no folder with imagenet-sample")
def test_a_thousand_real_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture a class in the hub's layout, already 224×224; they are none of the validation split's."""
    home = tmp_path / "imagenet" / "data"
    home.mkdir(parents=True)
    (home / "validation-00000-of-00001.parquet").symlink_to(SAMPLE / "validation-00000-of-00001.parquet")
    pin(monkeypatch, tuple(range(1000)))
    ids = [999, 0, 500, 7]
    x, y = data.load("imagenet", ids)
    assert y.tolist() == ids
    assert x.shape == (4, 3, 224, 224)
    assert (x.amin((1, 2, 3)) < 0.3).all()
    assert (x.amax((1, 2, 3)) > 0.7).all()


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="ASSAY_DATA names no folder with imagenet-sample")
def test_real_pictures_of_another_set_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "imagenet" / "data"
    home.mkdir(parents=True)
    (home / "validation-00000-of-00001.parquet").symlink_to(SAMPLE / "validation-00000-of-00001.parquet")
    pin(monkeypatch, tuple(reversed(range(1000))))
    with pytest.raises(InputError, match="not the validation images"):
        data.load("imagenet", [0])


def test_importing_the_module_imports_neither_torch_nor_its_readers() -> None:
    code = "import sys, assay.imagenet; sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
