"""Pictures of a record: a few samples that held and a few that fell, as they were, attacked, and purified.

They lie in `pictures.safetensors` beside a record and are no part of it: nothing is measured from them, and no
digest covers them. What can be checked of them is checked when they are read. No torch here: pages are drawn
where none is installed; `assay.picturing` computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from assay.errors import InputError, IntegrityError
from assay.perturbation import holds_images, ids_in, strongest
from assay.record import BUNDLE, Record, write_atomically
from assay.threat import parse_eps

PICTURES = "pictures.safetensors"
SCHEMA = "assay-pictures/1"
MOST = 8
"""So many samples that held, and so many that fell."""
LARGEST = 64 * 2**20
"""Bytes of the largest file that is read: 16 samples of 4 images of 3×512×512 float32 fit."""
_SLACK = 1e-6
"""How far outside its ball a stored image may lie: it was judged in float64 and is stored in float32."""

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """Samples of one record, those that held first.

    Attributes:
        ids, labels: `(n,)` int64.
        held: `(n,)` bool; False where the sample fell.
        clean, adversarial: `(n, c, h, w)` float32 in [0, 1].
        purified: what one draw of the purifier made of the two, `(2, n, c, h, w)` in about [0, 1]; None for a
            defense without one.
        answers: the class that the defense answered on the two with the same noise, `(2, n)`; None where it
            wasn't asked.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    held: NDArray[np.bool_]
    clean: Images
    adversarial: Images
    purified: Images | None = None
    answers: NDArray[np.int64] | None = None


def choose(ids: Sequence[int], clean: Sequence[float], left: Sequence[float]) -> tuple[list[int], list[int]]:
    """The samples that are shown: the first that held, and the first that fell, in the order given.

    A sample held where it is right in at least half of its draws under the strongest candidate. It fell where it
    was so on the clean image and is not any more; one that was never right did neither.

    Args:
        ids: sample ids, with each one's score in [0, 1] on the `clean` image and what the attacks `left`.
    """
    scored = list(zip(ids, clean, left, strict=True))
    held = [i for i, _, after in scored if after >= 0.5]
    fallen = [i for i, before, after in scored if before >= 0.5 > after]
    return held[:MOST], fallen[:MOST]


def write_pictures(folder: Path, record: Record, pictures: Pictures) -> Path:
    """Writes `pictures.safetensors` beside a record; returns its path."""
    arrays: dict[str, NDArray[Any] | None] = {
        "id": pictures.ids, "label": pictures.labels, "held": pictures.held, "clean": pictures.clean,
        "adversarial": pictures.adversarial, "purified": pictures.purified, "answer": pictures.answers,
    }  # fmt: skip
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    write_atomically(folder / PICTURES, save(plain, metadata={"schema": SCHEMA, "record": record.digest}))
    return folder / PICTURES


def read_pictures(folder: Path, record: Record) -> Pictures | None:
    """The pictures beside a record; None where there are none, or where they are another record's.

    Raises:
        IntegrityError: for a file that is not one of pictures, or whose images contradict the record: other
            samples' adversarial examples, or clean images that they don't lie around.
    """
    path = folder / PICTURES
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST:
            raise _Unfit(f"it has {path.stat().st_size} bytes; at most {LARGEST} are read")
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                raise _Unfit(f"its schema is {metadata.get('schema')!r}, expected {SCHEMA!r}")
            if metadata.get("record") != record.digest:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        pictures = _validated(arrays)
        _compare(pictures, record, folder)
    except (OSError, SafetensorError, TypeError, _Unfit) as error:
        raise IntegrityError(
            f"{path} does not hold this record's pictures: {error}. Delete it, or make it again with "
            f"`assay site --pictures`."
        ) from error
    return pictures


def originals(record: Record, ids: Sequence[int]) -> tuple[Images, NDArray[np.int64]] | None:
    """The clean images and labels of sample ids where they are at hand without torch: digits, from scikit-learn.

    None for another data set, and for ids outside it. Which digits an installed scikit-learn carries isn't
    checked here: see `around`.
    """
    if record.board.dataset != "digits":
        return None
    from sklearn.datasets import load_digits

    bunch = load_digits()
    if any(not 0 <= i < len(bunch.images) for i in ids):
        return None
    images: Images = (bunch.images[list(ids)][:, None] / 16).astype(np.float32)
    return images, bunch.target[list(ids)].astype(np.int64)


def around(clean: Images, adversarial: Images, record: Record) -> bool:
    """Whether each adversarial image `(n, c, h, w)` lies in the record's ball around its clean one."""
    if clean.shape != adversarial.shape:
        return False
    threat, change = record.board.threat, (adversarial.astype(np.float64) - clean).reshape(len(clean), -1)
    lengths = np.abs(change).max(1) if threat.norm == "linf" else np.linalg.norm(change, axis=1)
    return bool((lengths <= float(parse_eps(threat.eps)) + _SLACK).all())


class _Unfit(Exception):
    """What is wrong with a file of pictures."""


def _validated(arrays: dict[str, NDArray[Any]]) -> Pictures:
    """Pictures of arrays whose names, types, shapes and values are as they must be."""
    kinds = {"id": np.int64, "label": np.int64, "held": np.bool_, "clean": np.float32, "adversarial": np.float32}
    optional = {"purified": np.float32, "answer": np.int64}
    if not set(kinds) <= set(arrays) <= {*kinds, *optional}:
        raise _Unfit(
            f"it holds {', '.join(sorted(arrays))}; expected {', '.join(kinds)}, perhaps {', '.join(optional)}"
        )
    for name, array in arrays.items():
        expected = {**kinds, **optional}[name]
        if array.dtype != expected:
            raise _Unfit(f"{name} is of {array.dtype}, expected {np.dtype(expected)}")
    n, clean = len(np.atleast_1d(arrays["id"])), arrays["clean"]
    if clean.ndim != 4 or clean.shape[0] != n or clean.shape[1] not in (1, 3) or not 0 < n <= 2 * MOST:
        raise _Unfit(f"expected 1 to {2 * MOST} images (n, 1 or 3, h, w), got {clean.shape} for {n} ids")
    shapes = {"id": (n,), "label": (n,), "held": (n,), "adversarial": clean.shape, "purified": (2, *clean.shape),
              "answer": (2, n)}  # fmt: skip
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise _Unfit(f"{name} has the shape {arrays[name].shape}, expected {shape}")
    if len(set(arrays["id"].tolist())) != n:
        raise _Unfit("an id stands there twice")
    for name in ("clean", "adversarial", "purified"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise _Unfit(f"{name} holds a value that is not finite")
    for name in ("clean", "adversarial"):
        if arrays[name].min() < -_SLACK or arrays[name].max() > 1 + _SLACK:
            raise _Unfit(f"{name} leaves the box [0, 1]")
    return Pictures(
        arrays["id"], arrays["label"], arrays["held"], clean, arrays["adversarial"], arrays.get("purified"),
        arrays.get("answer"),
    )  # fmt: skip


def _compare(pictures: Pictures, record: Record, folder: Path) -> None:
    """Raises where the adversarial images are not the record's own, or not around the clean ones."""
    ids = pictures.ids.tolist()
    if holds_images(folder / BUNDLE):
        try:
            kept = strongest(folder / BUNDLE, ids, lambda _: pictures.clean)
        except InputError as error:
            raise _Unfit(str(error)) from error
        for i, image, own in zip(ids, pictures.adversarial, kept, strict=True):
            if not np.array_equal(own, image):
                raise _Unfit(f"its adversarial example of sample {i} is not the one in {BUNDLE}")
    # What is masked takes all of the record's images to compare, which aren't here.
    elif not set(ids) <= set(ids_in(folder / BUNDLE)):
        raise _Unfit(f"it shows samples that {BUNDLE} doesn't hold")
    if not around(pictures.clean, pictures.adversarial, record):
        threat = record.board.threat
        raise _Unfit(f"a clean image is further than {threat.norm} {threat.eps} from its adversarial example")
    known = originals(record, pictures.ids.tolist())
    if known is not None and not np.array_equal(known[0], pictures.clean):
        raise _Unfit(f"its clean images are not those of {record.board.dataset}")


def of_bundle(folder: Path, record: Record, held: Sequence[int], fallen: Sequence[int]) -> Pictures | None:
    """Pictures without the defense: clean and adversarial images of some samples, where the clean ones are at hand.

    Raises:
        InputError: for a sample that the record's bundle doesn't hold.
    """
    ids = [*held, *fallen]
    known = originals(record, ids)
    if not ids or BUNDLE not in record.files or known is None:
        return None
    if not holds_images(folder / BUNDLE):
        return None
    adversarial = strongest(folder / BUNDLE, ids, lambda _: known[0])
    if not around(known[0], adversarial, record):
        return None
    flags = np.array([True] * len(held) + [False] * len(fallen))
    return Pictures(np.array(ids, np.int64), known[1], flags, known[0], adversarial)
