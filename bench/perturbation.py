"""Adversarial examples of images that may not be passed on: in a file that is of no use without the images.

An adversarial image is its image within 8/255: who may not pass on the one may not pass on the other. Their difference
tells less, but of floats it tells how bright a pixel is, by rounding and at the edges of the box, and so does how well
it compresses. So the examples x' of the images x of a file are kept together, as

    masked = p ⊕ SHAKE-256(digest ‖ k),
    p = zlib(bits(x') − bits(x)),    k = SHA-256(bits(x)),    digest = SHA-256(k ‖ p),

where bits are those of float32 as int32, of all images one after the other, their difference taken modulo 2³², and a
constant goes before what is hashed with k. Who has the images computes the same k and has the examples back to the last
bit; the digest tells whether they are the images, to their last bit, and makes the key another for every file. Who
hasn't them learns how many bytes p has.

No torch here: pages are drawn where none is installed.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from assay.errors import InputError, IntegrityError

Images = NDArray[np.float32]
PLAIN = {"x_adv": "F32"}
"""The tensor of a bundle of images, beside `id`, and its type in a safetensors header."""
MASKED = {"masked": "U8", "digest": "U8"}
"""The tensors of a bundle of masked perturbations, likewise."""
DIGEST = 32
_DOMAIN = b"assay/perturbation/1"


def most_bytes(size: int) -> int:
    """Bytes that examples of `size` pixels in all take at most in either form, their ids left out."""
    raw = 4 * size
    return raw + raw // 1000 + 64 + DIGEST  # what zlib adds to bytes that don't compress, generously


def masked(x_adv: Images, x: Images) -> dict[str, NDArray[np.uint8]]:
    """Examples of the images `x`, both `(n, c, h, w)` float32, as they may be passed on.

    Returns:
        `masked` uint8 `(m,)` and `digest` uint8 `(32,)`.
    """
    after, before = _bits(x_adv), _bits(x)
    packed = zlib.compress((after - before).tobytes(), 9)
    key = hashlib.sha256(before.tobytes()).digest()
    digest = _digest(key, packed)
    return {"masked": _mask(packed, digest, key), "digest": np.frombuffer(digest, dtype=np.uint8)}


def unmasked(x: Images, kept: Mapping[str, NDArray[Any]]) -> Images:
    """The examples `(n, c, h, w)` float32 that `masked` was given, from their images `x` and what it made of them.

    Raises:
        InputError: where the images are not, to the last bit, those that the examples were made of. Nothing larger
            than they are is ever unpacked.
    """
    before = _bits(x)
    key = hashlib.sha256(before.tobytes()).digest()
    digest = kept["digest"].tobytes()
    packed = _mask(kept["masked"].tobytes(), digest, key).tobytes()
    if _digest(key, packed) != digest:
        raise InputError(
            "its perturbations can't be unmasked: the images here are not, to the last bit, those that they were made "
            "of (another decoder of image files?), or the file was changed."
        )
    moved = _unpacked(packed, before.nbytes)
    if moved is None:
        raise InputError(f"its perturbations are not those of {len(before)} images of {before.shape[1:]}.")
    return (before + np.frombuffer(moved, dtype=np.int32).reshape(before.shape)).view(np.float32)


def _bits(images: Images) -> NDArray[np.int32]:
    return np.ascontiguousarray(images, dtype=np.float32).view(np.int32)


def _digest(key: bytes, packed: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + key + packed).digest()


def _mask(content: bytes, digest: bytes, key: bytes) -> NDArray[np.uint8]:
    stream = hashlib.shake_256(_DOMAIN + digest + key).digest(len(content))
    return np.bitwise_xor(np.frombuffer(content, np.uint8), np.frombuffer(stream, np.uint8))


def _unpacked(packed: bytes, size: int) -> bytes | None:
    """The `size` bytes that were compressed to `packed`; None where it is anything else."""
    unpacking = zlib.decompressobj()
    try:
        found = unpacking.decompress(packed, size + 1)
    except zlib.error:
        return None
    return found if len(found) == size and unpacking.eof and not unpacking.unused_data else None


def bundle_bytes(ids: NDArray[np.int64], x_adv: Images, x: Images | None = None) -> bytes:
    """A bundle's file, see `assay.bundles`: of images `(n, c, h, w)`, or with their clean ones `x` masked."""
    kept = {"x_adv": np.ascontiguousarray(x_adv, dtype=np.float32)} if x is None else masked(x_adv, x)
    content: bytes = save({"id": np.ascontiguousarray(ids, dtype=np.int64), **kept})
    return content


def holds_images(path: Path) -> bool:
    """Whether a record's bundle holds images, not masked perturbations. Reads its header alone.

    Raises:
        IntegrityError: where the bundle can't be read.
    """
    try:
        with safe_open(path, "np") as file:
            return "x_adv" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is not a bundle of adversarial examples: {error}") from error


def ids_in(path: Path) -> list[int]:
    """The sample ids of a record's bundle, in its order.

    Raises:
        IntegrityError: where the bundle can't be read.
    """
    return [int(each) for each in _read(path)["id"]]


def strongest(path: Path, ids: Sequence[int], images: Callable[[list[int]], Images]) -> Images:
    """A record's strongest candidates of some samples, `(n, c, h, w)`, in the order of their ids.

    Args:
        path: the record's bundle.
        images: gives those of sample ids `(n, c, h, w)`. Asked for all of the bundle's where they are masked.

    Raises:
        InputError: for a sample that the bundle doesn't hold, and where it is masked by other images.
        IntegrityError: where the bundle can't be read. Its digest is `assay.record.read_record`'s to check.
    """
    arrays = _read(path)
    stored = arrays["id"].tolist()
    places = {i: row for row, i in enumerate(stored)}
    absent = [i for i in ids if i not in places]
    if absent:
        raise InputError(f"{path} has no sample {absent[0]}.")
    if "x_adv" in arrays:
        found: Images = arrays["x_adv"]
    else:
        clean = images(stored)
        try:
            found = unmasked(clean, arrays)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return found[[places[i] for i in ids]]


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """A bundle's tensors, of types and shapes that fit each other."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Types that NumPy doesn't have raise what they like.
    except (OSError, SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(f"{path} is not a bundle of adversarial examples: {error}") from error
    if not _fits(arrays):
        raise IntegrityError(
            f"{path}: expected id (n,) and x_adv (n, c, h, w) in float32, or masked (m,) and digest ({DIGEST},)."
        )
    return arrays


def _fits(arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether tensors are a bundle's: their names, types and shapes."""
    types = {"id": np.int64, "x_adv": np.float32, "masked": np.uint8, "digest": np.uint8}
    if any(array.dtype != types.get(name) for name, array in arrays.items()):
        return False
    shapes = {name: array.shape for name, array in arrays.items()}
    if set(shapes) == {"id", *PLAIN}:
        return len(shapes["x_adv"]) == 4 and shapes["id"] == shapes["x_adv"][:1]
    if set(shapes) == {"id", *MASKED}:
        return len(shapes["id"]) == len(shapes["masked"]) == 1 and shapes["digest"] == (DIGEST,)
    return False
