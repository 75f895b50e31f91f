"""A record's pictures as PNG images inside the page, eight bits a channel, each with what a reader is told of it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from assay.errors import IntegrityError
from assay.pictures import PICTURES, Images, Pictures, choose, of_bundle, read_pictures
from assay.record import BUNDLE, SAMPLES, Record

_MOST_EDGE = 256
"""Larger images are shrunk to so many pixels before they are embedded."""


@dataclass(frozen=True)
class Shot:
    """One image: its data URI, its size in pixels, what stands below it."""

    uri: str
    width: int
    height: int
    what: str


@dataclass(frozen=True)
class Sample:
    """One sample's images, and its scores in [0, 1]: on the clean image, and what the attacks left."""

    id: int
    label: int
    clean: float
    left: float
    answers: tuple[int, int] | None
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Album:
    """What a record's page shows in pictures.

    Attributes:
        factor: how much differences are amplified around grey.
        purified: the purifier's work is among them.
        computed: they come from the file that `assay site --pictures` writes.
    """

    held: tuple[Sample, ...]
    fallen: tuple[Sample, ...]
    factor: float
    purified: bool
    computed: bool


def album(folder: Path, record: Record) -> Album | None:
    """The pictures of the record in `folder`; None where there are none to show.

    Without the file of pictures, digits are shown all the same, as their bundle and scikit-learn have them.

    Raises:
        IntegrityError: for a file of pictures or a bundle that is not the record's.
    """
    if BUNDLE not in record.files or SAMPLES not in record.files:
        return None
    found = read_pictures(folder, record)
    computed = found is not None
    if found is None and record.board.dataset != "digits":
        return None
    scores = _scores(folder)
    if found is None:
        held, fallen = choose(list(scores), [s[0] for s in scores.values()], [s[1] for s in scores.values()])
        found = of_bundle(folder, record, held, fallen)
    if found is None:
        return None
    absent = [i for i in found.ids.tolist() if i not in scores]
    if absent:
        raise IntegrityError(f"{folder / PICTURES} shows sample {absent[0]}, which is not in the record's samples.")
    change = found.adversarial - found.clean
    factor = 0.5 / max(float(np.abs(change).max()), 1e-6)
    samples = [_sample(found, k, scores[int(i)], factor) for k, i in enumerate(found.ids)]
    return Album(
        held=tuple(s for s, held in zip(samples, found.held, strict=True) if held),
        fallen=tuple(s for s, held in zip(samples, found.held, strict=True) if not held),
        factor=factor, purified=found.purified is not None, computed=computed,
    )  # fmt: skip


def _scores(folder: Path) -> dict[int, tuple[float, float]]:
    """Each sample's score on the clean image and under its strongest candidate, by id, in the record's order."""
    try:
        table = pd.read_parquet(folder / SAMPLES, columns=["id", "attack", "clean", "expected"], engine="pyarrow")
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{folder / SAMPLES} is not a sample table: {error}") from error
    final = table[table["attack"] == "final"]
    return {
        int(i): (float(clean), float(left))
        for i, clean, left in zip(final["id"], final["clean"], final["expected"], strict=True)
    }


def _sample(found: Pictures, k: int, scores: tuple[float, float], factor: float) -> Sample:
    clean, adversarial = found.clean[k], found.adversarial[k]
    # A factor that would whiten a gradient of rounding errors is no picture; grey is no change.
    images = [("clean", clean), ("attacked", adversarial), ("difference", 0.5 + factor * (adversarial - clean))]
    if found.purified is not None:
        images += [("clean, purified", found.purified[0, k]), ("attacked, purified", found.purified[1, k])]
    answers = None if found.answers is None else (int(found.answers[0, k]), int(found.answers[1, k]))
    shots = tuple(_shot(image, what) for what, image in images)
    return Sample(int(found.ids[k]), int(found.labels[k]), *scores, answers, shots)


def _shot(image: Images, what: str) -> Shot:
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))
    picture.thumbnail((_MOST_EDGE, _MOST_EDGE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Shot(uri, picture.width, picture.height, what)
