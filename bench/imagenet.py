"""ImageNet's validation split: read from its files or its parquet shards, cut to 3×224×224 once.

A sample id is an image's number in the official order less one: id 0 is ILSVRC2012_val_00000001. A
class is a place among the 1,000 sorted WordNet ids. What is pinned is the hub's revision and the label
of every id, about which two public lists agree; a digest of pixels is not, for no copy may be passed on.

Pixels. The shorter side is resized to 256 (bicubic, antialiased) and the middle 224×224 taken,
RobustBench's `BicubicRes256Crop224`. This happens to the clean image, at loading: the threat model's
ball lies around 3×224×224 values in [0, 1]. A network that wants another size resizes inside the
defense, where gradients pass, see `assay.defenses.resize`.

Only what is asked for is decoded. Importing this module imports no torch.
"""

from __future__ import annotations

import io
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

HUB = "ILSVRC/imagenet-1k"
SHARDS = "validation-*.parquet"
SIDE, CUT = 256, 224
"""The shorter side after resizing, and the side of the middle that is kept."""
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?\.jpe?g", re.IGNORECASE)
"""An image's file name with its official number; the hub's copies carry their class's WordNet id too."""


class Split(ABC):
    """Images in the order of their ids, none of them decoded yet.

    Attributes:
        labels: `(n,)`, each id's class.
    """

    labels: NDArray[np.int64]

    @abstractmethod
    def encoded(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Pairs of a place in `ids` and that image's file content, in whichever order reads the least."""

    def pixels(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """The images `(n, 224, 224, 3)` in 0..255, in the order of `ids`.

        Raises:
            InputError: for a file that is no image.
        """
        import numpy as np
        from PIL import Image

        found = np.zeros((len(ids), CUT, CUT, 3), np.uint8)
        for place, content in self.encoded(ids):
            try:
                with Image.open(io.BytesIO(content)) as image:
                    found[place] = np.asarray(cut(image.convert("RGB")))
            except OSError as error:
                raise InputError(
                    f"image {ids[place]} of imagenet can't be decoded ({error}): its file is damaged; get it again."
                ) from error
        return found


class Folder(Split):
    """One folder a class, named by WordNet id, with the images under their official names."""

    def __init__(self, root: Path, n: int) -> None:
        classes = sorted(path for path in root.iterdir() if path.is_dir())
        found = [
            (int(match[1]), label, file)
            for label, folder in enumerate(classes)
            for file in folder.iterdir()
            if (match := _NAME.fullmatch(file.name))
        ]
        _check_numbers([number for number, _, _ in found], n, f"{root}/n????????/ILSVRC2012_val_????????.JPEG")
        found.sort()
        self._files = [file for _, _, file in found]
        self.labels = _array([label for _, label, _ in found])

    def encoded(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """As `Split.encoded`, in the order of `ids`."""
        for place, i in enumerate(ids):
            yield place, self._files[i].read_bytes()


class Parquet(Split):
    """The hub's shards, with the columns `image` (a struct of `bytes` and `path`) and `label`.

    Rows are sorted by the official numbers in their paths; rows without them are taken to be in order,
    which their labels then have to bear out.
    """

    def __init__(self, files: Sequence[Path], n: int) -> None:
        rows: list[tuple[int, int, int, int]] = []
        numbers, labels = [], []
        for shard, file in enumerate(files):
            with _open(file) as parquet:
                for group in range(parquet.num_row_groups):
                    # Neither column is an image, so that no image is read.
                    table = parquet.read_row_group(group, columns=["image.path", "label"])
                    labels += table["label"].to_pylist()
                    for row, image in enumerate(table["image"].to_pylist()):
                        match = _NAME.fullmatch(Path(image["path"] or "").name)
                        numbers.append(int(match[1]) if match else 0)
                        rows.append((len(rows), shard, group, row))
        if all(numbers):
            _check_numbers(numbers, n, str(files[0].parent / SHARDS))
            rows = [rows[i] for i in sorted(range(len(rows)), key=numbers.__getitem__)]
        elif len(rows) != n:
            raise InputError(
                f"imagenet has {n} validation images, {files[0].parent / SHARDS} has {len(rows)}: get all its shards."
            )
        self._shards = list(files)
        self._at = [where[1:] for where in rows]
        self.labels = _array([labels[first] for first, *_ in rows])

    def encoded(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """As `Split.encoded`, one row group after the other: each is read once and let go."""
        wanted = sorted((*self._at[i], place) for place, i in enumerate(ids))
        for (shard, group), members in itertools.groupby(wanted, key=lambda each: each[:2]):
            with _open(self._shards[shard]) as parquet:
                images = parquet.read_row_group(group, columns=["image.bytes"])["image"]
            for _, _, row, place in members:
                yield place, images[row].as_py()["bytes"]


def open_split(root: str, n: int) -> Split:
    """The validation split in a local folder of data sets.

    Args:
        root: holds `imagenet/val/<WordNet id>/ILSVRC2012_val_00000001.JPEG` …, or the hub's files as
            `imagenet/data/validation-00000-of-00014.parquet` …; or is that `imagenet` itself.
        n: how many images the split has.

    Raises:
        InputError: when neither is there, or images are missing.
    """
    homes = [Path(root) / "imagenet", Path(root)]
    for home in homes:
        if (home / "val").is_dir():
            return Folder(home / "val", n)
        if shards := sorted((home / "data").glob(SHARDS)):
            return Parquet(shards, n)
    raise InputError(
        f"imagenet is not in {root}: expected {homes[0]}/val/n01440764/ILSVRC2012_val_00000293.JPEG and the others, "
        f"or {homes[0]}/data/{SHARDS} of the hub's {HUB}; or the same without imagenet/."
    )


def open_hub(revision: str, n: int) -> Split:
    """The validation split from the hub, whose client fetches the shards (about 7 GB) once.

    Raises:
        InputError: when they can't be had.
    """
    import huggingface_hub

    try:
        # Its other splits are twenty times as large, and `datasets` would fetch them too.
        folder = huggingface_hub.snapshot_download(
            HUB, repo_type="dataset", revision=revision, allow_patterns=f"data/{SHARDS}"
        )
    # The client raises the errors of several HTTP libraries, which share no base class.
    except Exception as error:
        raise InputError(
            f"imagenet could not be loaded ({type(error).__name__}). It is the data set {HUB} at revision {revision} "
            "of the Hugging Face hub, which asks for consent to its terms: give it on its page, run `hf auth login`, "
            "and connect to the network once so that its shards are cached. Or set ASSAY_DATA to a folder that holds "
            "imagenet/val/<WordNet id>/ILSVRC2012_val_00000001.JPEG and the others."
        ) from error
    return open_split(folder, n)


def cut(image: Image) -> Image:
    """The middle 224×224 of an image whose shorter side is resized to 256, bicubic and antialiased."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    width, height = SIDE * width // short, SIDE * height // short
    left, top = round((width - CUT) / 2), round((height - CUT) / 2)
    # Of whole pixels only: a box given to `resize` would start between two.
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + CUT, top + CUT))


def _open(file: Path) -> Any:
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    try:
        parquet = pq.ParquetFile(file)
        columns = {parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)}
    except (OSError, ArrowException) as error:
        raise InputError(f"{file} can't be read as parquet ({error}): get it again.") from error
    missing = {"image.bytes", "image.path", "label"} - columns
    if missing:
        raise InputError(f"{file} lacks {', '.join(sorted(missing))}, which the shards of the hub's {HUB} have.")
    return parquet


def _check_numbers(numbers: Sequence[int], n: int, where: str) -> None:
    """Raises InputError where the official numbers aren't 1 to n."""
    expected = set(range(1, n + 1))
    absent, foreign = sorted(expected - set(numbers)), sorted(set(numbers) - expected)
    if absent or foreign or len(numbers) != n:
        lacking = f"; number {absent[0]} is missing" if absent else ""
        strange = f"; number {foreign[0]} is none of its" if foreign else ""
        raise InputError(
            f"imagenet has {n} validation images, {where} has {len(numbers)}{lacking}{strange}: get the whole split, "
            "each image once, in one folder a class."
        )


def _array(labels: Sequence[int]) -> NDArray[np.int64]:
    import numpy as np

    return np.asarray(labels, np.int64)
