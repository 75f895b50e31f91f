"""Datasets with pinned revisions and index hashes.

A sample id is the row in the data set's own published order: the row of scikit-learn's
`load_digits`, the row of CIFAR-10's test split, or the official number of an image of ImageNet's
validation split less one (see `assay.imagenet`). What is loaded is held against a pinned digest, so
that a row of a table never rests on other images than its board names. Importing this module imports
no torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay import imagenet
from assay.digest import ids_digest
from assay.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

DATA_VARIABLE = "ASSAY_DATA"
"""The environment variable that names a local folder of data sets."""


@dataclass(frozen=True)
class Dataset:
    """What a data set is.

    Attributes:
        name: its name here.
        revision: what is pinned: a digest of the content, or a commit of the hub's repository.
        n_classes: k.
        shape: one image's `(c, h, w)`.
        labels: the name of each class; for imagenet its number.
        n_ids: sample ids run from 0 to n_ids - 1.
        content_sha256: the digest that the loaded data must have, see `_digits`, `_verified` and
            `_imagenet`.
        shareable: whether its licence lets anybody pass its images on. Of a data set that doesn't, records keep
            perturbations in place of adversarial examples (`assay.perturbation`).
    """

    name: str
    revision: str
    n_classes: int
    shape: tuple[int, int, int]
    labels: tuple[str, ...]
    n_ids: int
    content_sha256: str
    shareable: bool = False


_DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
_DIGITS_SPLIT_SHA256 = "0cd3a41f76f790603af9b2c255aff8d2d540b42117c6bfec4a31bcb729336379"
_DIGITS_TEST = 500
_CIFAR10_HUB = "uoft-cs/cifar10"
_CIFAR10_PROBES = 10
"""How many evenly spaced images enter CIFAR-10's digest, beside all labels."""

DATASETS = {
    "digits": Dataset(
        name="digits",
        revision=f"sklearn-digits:{_DIGITS_SHA256[:16]}",
        n_classes=10,
        shape=(1, 8, 8),
        labels=tuple("0123456789"),
        n_ids=1797,
        content_sha256=_DIGITS_SHA256,
        shareable=True,
    ),
    "cifar10": Dataset(
        name="cifar10",
        revision="0b2714987fa478483af9968de7c934580d0bb9a2",
        n_classes=10,
        shape=(3, 32, 32),
        labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        n_ids=10000,
        content_sha256="6cff95274c4c244cc571d5a463a442de004b1e408a247b3009daf9e3b2f87089",
    ),
    "imagenet": Dataset(
        name="imagenet",
        revision="49e2ee26f3810fb5a7536bbf732a7b07389a47b5",
        n_classes=1000,
        shape=(3, imagenet.CUT, imagenet.CUT),
        labels=tuple(str(i) for i in range(1000)),
        n_ids=50000,
        content_sha256="f5350687a5a78da7e645040d352767bc06c1c99d9dfb34f1623b2d1a1d046b76",
    ),
}


def describe(name: str) -> Dataset:
    """The data set called `name`.

    Raises:
        InputError: for an unknown name, with the nearest known one.
    """
    if name not in DATASETS:
        raise InputError(f"no data set is called {name!r}.{nearest(name, DATASETS)}")
    return DATASETS[name]


def load(name: str, ids: Sequence[int], *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images `x (n, c, h, w)` float32 in [0, 1] and labels `y (n,)` int64, in the order of `ids`.

    Raises:
        InputError: for an unknown data set, an id outside it, data that can't be found (the message
            says how to get it), or data whose content is not the pinned one.
    """
    import torch

    dataset = describe(name)
    wanted = [int(i) for i in ids]
    outside = [i for i in wanted if not 0 <= i < dataset.n_ids]
    if outside:
        raise InputError(f"{name} has sample ids 0 to {dataset.n_ids - 1}, got {outside[:5]}.")
    if name == "digits":
        images, labels = _digits()
        images, labels = images[wanted], labels[wanted]
        x = torch.from_numpy(images).to(torch.float32)[:, None] / 16
    else:
        images, labels = _decode(_cifar10(), wanted) if name == "cifar10" else _cut(_imagenet(), wanted)
        x = torch.from_numpy(images).to(torch.float32).permute(0, 3, 1, 2).contiguous() / 255
    return x.reshape(-1, *dataset.shape).to(device), torch.from_numpy(labels).to(torch.int64).to(device)


def train_split(name: str) -> tuple[int, ...]:
    """The sample ids that a defense of this project may be trained on, ascending.

    Raises:
        InputError: for an unknown name, and for data sets whose sample ids are those of a test split.
    """
    if describe(name).name != "digits":
        raise InputError(f"sample ids of {name} are rows of its test split; there are none to train on.")
    return tuple(sorted(_digits_permutation()[:-_DIGITS_TEST]))


def test_ids(name: str) -> tuple[int, ...]:
    """The sample ids of the pinned test split, ascending."""
    dataset = describe(name)
    if name == "digits":
        return tuple(sorted(_digits_permutation()[-_DIGITS_TEST:]))
    return tuple(range(dataset.n_ids))


def board_ids(name: str) -> tuple[int, ...]:
    """The sample ids of the data set's boards, in an order whose every prefix is representative.

    digits: 20 test images of each class, the first of each in the pinned permutation, one class
    after the other in turn, so that every prefix of 10·j ids is balanced. cifar10 and imagenet: 512
    evenly spaced ids in bit-reversed order, so that every prefix is spread over the test set, whose
    own order mixes the classes.
    """
    dataset = describe(name)
    if name == "digits":
        _, labels = _digits()
        test = _digits_permutation()[-_DIGITS_TEST:]
        columns = [[i for i in test if labels[i] == digit][:20] for digit in range(10)]
        return tuple(i for row in zip(*columns, strict=True) for i in row)
    reversed_bits = (int(f"{j:09b}"[::-1], 2) for j in range(512))
    return tuple(i * dataset.n_ids // 512 for i in reversed_bits)


@functools.cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images `(1797, 8, 8)` in 0..16 and labels, whose bytes have the pinned SHA-256."""
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    digest = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    _check_content("digits", digest, "the installed scikit-learn carries other digits; install another version")
    return images, labels


@functools.cache
def _digits_permutation() -> tuple[int, ...]:
    """The pinned order of the digits: the last 500 are the test split, the others train."""
    import numpy as np

    # RandomState's streams are frozen by numpy's policy; a Generator's may change between versions.
    order = tuple(np.random.RandomState(2026).permutation(1797).tolist())
    if ids_digest(order) != _DIGITS_SPLIT_SHA256:
        raise InputError("this numpy permutes differently, so the digits' split would not be the pinned one.")
    return order


def _check_content(name: str, digest: str, remedy: str) -> None:
    expected = describe(name).content_sha256
    if digest != expected:
        raise InputError(f"{name} has the content digest {digest}, expected {expected}: {remedy}.")


def _cifar10() -> Any:
    """The test split, whose labels and ten evenly spaced images have the pinned SHA-256."""
    root = os.environ.get(DATA_VARIABLE)
    return _cifar10_at(root) if root else _cifar10_hub()


@functools.cache
def _cifar10_at(root: str) -> Any:
    found = next((files for folder in _folders(root) if (files := sorted(folder.glob("test-*.parquet")))), None)
    if found is None:
        looked = " or ".join(str(folder / "test-*.parquet") for folder in _folders(root))
        raise InputError(f"cifar10 is not in {DATA_VARIABLE}={root}: expected {looked}.")
    return _verified(_quietly("parquet", data_files={"test": [str(file) for file in found]}))


def _folders(root: str) -> list[Path]:
    return [Path(root) / "cifar10" / "plain_text", Path(root) / "plain_text"]


@functools.cache
def _cifar10_hub() -> Any:
    revision = describe("cifar10").revision
    try:
        split = _quietly(_CIFAR10_HUB, revision=revision)
    # The hub's client raises the errors of several HTTP libraries, which share no base class.
    except Exception as error:
        raise InputError(
            f"cifar10 could not be loaded ({type(error).__name__}). It is the data set {_CIFAR10_HUB} at revision "
            f"{revision} of the Hugging Face hub: connect to the network once so that it is cached, or set "
            f"{DATA_VARIABLE} to a folder that holds cifar10/plain_text/test-00000-of-00001.parquet of it."
        ) from error
    return _verified(split)


def _quietly(path: str, **options: Any) -> Any:
    """`datasets.load_dataset`'s test split, without its progress bars."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, split="test", **options)
    finally:
        if shown:
            datasets.enable_progress_bars()


def _verified(split: Any) -> Any:
    import numpy as np

    rows = len(split)
    labels = np.asarray(split["label"][:], dtype=np.uint8)
    probes, _ = _decode(split, [i * rows // _CIFAR10_PROBES for i in range(_CIFAR10_PROBES)])
    digest = hashlib.sha256(labels.tobytes() + probes.tobytes()).hexdigest()
    _check_content("cifar10", digest, f"these are not the test images of {_CIFAR10_HUB} in their published order")
    return split


def _decode(split: Any, ids: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels `(n, h, w, c)` and labels of some rows; only those are decoded."""
    import numpy as np

    chosen = split.select(ids)[:] if ids else {"img": [], "label": []}
    images = [np.asarray(image.convert("RGB"), dtype=np.uint8) for image in chosen["img"]]
    return np.stack(images) if images else np.zeros((0, 32, 32, 3), np.uint8), np.asarray(chosen["label"], np.int64)


def _imagenet() -> imagenet.Split:
    """The validation split, whose labels have the pinned SHA-256 (as 16-bit numbers, the low byte first)."""
    return _imagenet_at(os.environ.get(DATA_VARIABLE))


@functools.cache
def _imagenet_at(root: str | None) -> imagenet.Split:
    dataset = describe("imagenet")
    n = dataset.n_ids
    split = imagenet.open_split(root, n) if root else imagenet.open_hub(dataset.revision, n)
    digest = hashlib.sha256(split.labels.astype("<u2").tobytes()).hexdigest()
    remedy = "these are not the validation images in their official order, or not in one folder a WordNet id"
    _check_content("imagenet", digest, remedy)
    return split


def _cut(split: imagenet.Split, ids: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels `(n, h, w, c)` and labels of some ids; only those are decoded."""
    return split.pixels(ids), split.labels[list(ids)]
