"""The pixels of CIFAR-10's two splits, whole, as training and its measurements need them.

Boards read single test images through `assay.data`. Training reads 50,000 at once, so this module goes
through the parquet files directly and keeps bytes. What is read is held against a digest of all labels and
pixels in the published order. Where parquet can't be read, `python -m assay.defenses.cifar10_split FOLDER OUT`
has made one safetensors file of each: the same compressed images, one after the other.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from assay.data import DATA_VARIABLE, describe
from assay.defenses.weight_files import write
from assay.errors import InputError

Split = Literal["train", "test"]
CONTENT = {
    "train": "d12c98b5c6d1c8f3ee705d14ab38dccf995510e8044d36d18154ece4e3b8060f",
    "test": "1695efc9dc931b768f20f5cb2956256bc3a12eba128a3d7f6f8a6a6910d3b57e",
}
"""SHA-256 of a split's labels `(n,)` and then its pixels `(n, h, w, c)`, all uint8."""
_HUB = "uoft-cs/cifar10"


def read_split(split: Split, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Images `(n, 3, 32, 32)` uint8 and labels `(n,)` int64, in the published order.

    Args:
        split: train, from `ASSAY_DATA` or from the hub, or test.
        first: only so many of the first images, whose digest is not checked: for trying things out.

    Raises:
        InputError: for files that can't be found or read, or other content than the pinned one.
    """
    files = _files(split)
    pixels, labels = [], []
    for png, label in _rows(files):
        pixels.append(_decoded(png, files))
        labels.append(label)
        if first is not None and len(labels) >= first:
            break
    x, y = np.stack(pixels) if pixels else np.zeros((0, 32, 32, 3), np.uint8), np.asarray(labels, dtype=np.uint8)
    if first is None:
        found = hashlib.sha256(y.tobytes() + x.tobytes()).hexdigest()
        if found != CONTENT[split]:
            raise InputError(
                f"{files[0].parent} holds {len(y)} images with the content digest {found}, expected {CONTENT[split]}: "
                f"they are not CIFAR-10's {split} split in its published order. Get the files again from {_HUB}."
            )
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long()


def pack(folder: Path, out: Path) -> list[Path]:
    """Rewrites every `*.parquet` of a folder as a safetensors file of the same images; returns what was written."""
    made = []
    for file in sorted(folder.glob("*.parquet")):
        rows = list(_rows([file]))
        content = {
            "png": torch.frombuffer(bytearray(b"".join(png for png, _ in rows)), dtype=torch.uint8),
            "ends": torch.tensor([len(png) for png, _ in rows]).cumsum(0),
            "label": torch.tensor([label for _, label in rows]),
        }
        made.append(out / f"{file.stem}.safetensors")
        write(made[-1], save(content))
    return made


def _files(split: Split) -> Sequence[Path]:
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        return [_download(split)]
    folders = [Path(root) / "cifar10" / "plain_text", Path(root) / "plain_text"]
    for folder in folders:
        for suffix in ("parquet", "safetensors"):
            if files := sorted(folder.glob(f"{split}-*.{suffix}")):
                return files
    looked = " or ".join(str(folder / f"{split}-*.parquet") for folder in folders)
    raise InputError(
        f"CIFAR-10's {split} split is not in {DATA_VARIABLE}={root}: expected {looked}. "
        f"Put the parquet files of the hub data set {_HUB} there, or unset {DATA_VARIABLE} to download them."
    )


def _download(split: Split) -> Path:
    name, revision = f"plain_text/{split}-00000-of-00001.parquet", describe("cifar10").revision
    try:
        return Path(hf_hub_download(_HUB, name, repo_type="dataset", revision=revision))
    # The hub's client raises the errors of its HTTP library as well as its own, which share no base class.
    except Exception as error:
        raise InputError(
            f"CIFAR-10's {split} split could not be loaded ({type(error).__name__}). It is {name} of the data set "
            f"{_HUB} at revision {revision}: connect to the network, or set {DATA_VARIABLE} to a folder that holds "
            f"cifar10/{name}."
        ) from error


def _rows(files: Sequence[Path]) -> Iterator[tuple[bytes, int]]:
    """The compressed image and the label of every row."""
    for file in files:
        if file.suffix == ".safetensors":
            packed = load_file(file)
            png, start = packed["png"].numpy().tobytes(), 0
            for end, label in zip(packed["ends"].tolist(), packed["label"].tolist(), strict=True):
                yield png[start:end], label
                start = end
            continue
        # Only here: a machine that is lent for training may not have it.
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(file).iter_batches(1000, columns=["img", "label"]):
            for row in batch.to_pylist():
                yield row["img"]["bytes"], row["label"]


def _decoded(png: bytes, files: Sequence[Path]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.uint8)
    if pixels.shape != (32, 32, 3):
        raise InputError(f"{files[0].parent} holds an image of shape {pixels.shape}, expected (32, 32, 3).")
    return pixels


if __name__ == "__main__":
    for path in pack(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"{path}: {path.stat().st_size} bytes")
