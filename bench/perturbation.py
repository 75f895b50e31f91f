"""Adversarial examples of images that may not be passed on: in a file that says nothing of them without the images.

An adversarial image is its image within 8/255: who may not pass on the one may not pass on the other. Their difference
tells less, but of floats it tells how bright a pixel is, by rounding and at the edges of the box. So an example is kept
as

    masked = zlib(bits(x') − bits(x)) ⊕ SHAKE-256(digest ‖ bits(x)),    digest = SHA-256(zlib(…)), its first 16 bytes,

where bits are those of float32 as int32, their difference taken modulo 2³². Who has the image computes the same key and
has the example back to the last bit; the digest tells whether that was the image, to its last bit, and makes the key
another for every example of it.

No torch here: pages are drawn where none is installed.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
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
MASKED = {"masked": "U8", "length": "I64", "digest": "U8"}
"""The tensors of a bundle of masked perturbations, likewise."""
_DIGEST = 16
_DOMAIN = b"assay/perturbation/1"


def most_bytes(size: int) -> int:
    """Bytes that one example of `size` pixels takes at most in either form, its id left out."""
    raw = 4 * size
    return raw + raw // 1000 + 64 + 8 + _DIGEST  # what zlib adds to bytes that don't compress, generously


def masked(x_adv: Images, x: Images) -> dict[str, NDArray[np.uint8] | NDArray[np.int64]]:
    """Examples of the images `x`, both `(n, c, h, w)` float32, as they may be passed on.

    Returns:
        `masked` uint8 `(m,)`, one example's bytes after the other's; `length` int64 `(n,)`, how many each has;
        `digest` uint8 `(n, 16)`.
    """
    after, before = (np.ascontiguousarray(each, dtype=np.float32).view(np.int32) for each in (x_adv, x))
    packed = [zlib.compress(each.tobytes(), 9) for each in after - before]
    digests = [hashlib.sha256(each).digest()[:_DIGEST] for each in packed]
    found = [_xor(each, digest, image) for each, digest, image in zip(packed, digests, before, strict=True)]
    return {
        "masked": np.frombuffer(b"".join(found), dtype=np.uint8),
        "length": np.array([len(each) for each in found], dtype=np.int64),
        "digest": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST),
    }


def unmasked(x: Images, kept: Mapping[str, NDArray[Any]], ids: Sequence[int] | NDArray[np.int64]) -> Images:
    """The examples `(n, c, h, w)` float32 that `masked` was given, from their images `x` and what it made of them.

    Args:
        ids: of the samples, for the error.

    Raises:
        InputError: where an image is not, to the last bit, the one that the example was made of.
    """
    before = np.ascontiguousarray(x, dtype=np.float32).view(np.int32)
    parts = _parts(kept)
    if len(parts) != len(before):
        raise InputError(f"{len(parts)} masked perturbations are not those of {len(before)} images.")
    found, wrong = np.empty_like(before), []
    for row, (part, digest, image) in enumerate(zip(parts, kept["digest"], before, strict=True)):
        moved = _unpacked(_xor(part, digest.tobytes(), image), digest.tobytes(), image.nbytes)
        if moved is None:
            wrong.append(str(ids[row]))
        else:
            found[row] = image + np.frombuffer(moved, dtype=np.int32).reshape(image.shape)
    if wrong:
        raise InputError(
            f"the perturbations of {len(wrong)} of {len(parts)} samples ({', '.join(wrong[:8])}"
            f"{', …' if len(wrong) > 8 else ''}) can't be unmasked: the images here are not, to the last bit, those "
            f"that they were made of (another decoder of image files?), or the file was changed."
        )
    return found.view(np.float32)


def _parts(kept: Mapping[str, NDArray[Any]]) -> list[bytes]:
    """The bytes of each example."""
    content, lengths = kept["masked"].tobytes(), kept["length"]
    if (lengths < 0).any() or lengths.sum() != len(content):
        raise InputError(f"masked perturbations of {len(content)} bytes are not as long as is said of them.")
    ends = lengths.cumsum().tolist()
    return [content[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def _xor(content: bytes, digest: bytes, image: NDArray[np.int32]) -> bytes:
    key = hashlib.shake_256(_DOMAIN + digest + image.tobytes()).digest(len(content))
    return np.bitwise_xor(np.frombuffer(content, np.uint8), np.frombuffer(key, np.uint8)).tobytes()


def _unpacked(packed: bytes, digest: bytes, size: int) -> bytes | None:
    """The `size` bytes that were compressed to `packed`; None where it has another digest. No more is ever made."""
    if hashlib.sha256(packed).digest()[:_DIGEST] != digest:
        return None
    try:
        found = zlib.decompressobj().decompress(packed, size + 1)
    except zlib.error:
        return None
    return found if len(found) == size else None


def bundle_bytes(ids: NDArray[np.int64], x_adv: Images, x: Images | None = None) -> bytes:
    """A bundle's file, see `assay.bundles`: of images `(n, c, h, w)`, or with their clean ones `x` masked."""
    kept = {"x_adv": np.ascontiguousarray(x_adv, dtype=np.float32)} if x is None else masked(x_adv, x)
    content: bytes = save({"id": np.ascontiguousarray(ids, dtype=np.int64), **kept})
    return content


def ids_in(path: Path) -> list[int]:
    """The sample ids of a record's bundle, in its order.

    Raises:
        IntegrityError: where the bundle can't be read.
    """
    return [int(each) for each in _read(path)["id"]]


def strongest(path: Path, ids: Sequence[int], clean: Images) -> Images:
    """A record's strongest candidates of some samples, `(n, c, h, w)`, in the order of their ids.

    Args:
        path: the record's bundle.
        clean: their images `(n, c, h, w)`, with which they are unmasked where they are masked.

    Raises:
        InputError: for a sample that the bundle doesn't hold, and where it is masked by other images.
        IntegrityError: where the bundle can't be read. Its digest is `assay.record.read_record`'s to check.
    """
    arrays = _read(path)
    places = {i: row for row, i in enumerate(arrays["id"].tolist())}
    absent = [i for i in ids if i not in places]
    if absent:
        raise InputError(f"{path} has no sample {absent[0]}.")
    rows = [places[i] for i in ids]
    if "x_adv" in arrays:
        found: Images = arrays["x_adv"][rows]
        return found
    parts = _parts(arrays)
    some = {
        "masked": np.frombuffer(b"".join(parts[row] for row in rows), dtype=np.uint8),
        "length": arrays["length"][rows],
        "digest": arrays["digest"][rows],
    }
    return unmasked(clean, some, ids)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """A bundle's tensors, of types and shapes that fit each other."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is not a bundle of adversarial examples: {error}") from error
    if not _fits(arrays):
        raise IntegrityError(
            f"{path}: expected id (n,) and x_adv (n, c, h, w) in float32, or masked (m,), length (n,) and digest "
            f"(n, 16)."
        )
    return arrays


def _fits(arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether tensors are a bundle's: their names, types and shapes."""
    form = PLAIN if "x_adv" in arrays else MASKED
    if set(arrays) != {"id", *form}:
        return False
    types = {"x_adv": np.float32, "masked": np.uint8, "digest": np.uint8, "id": np.int64, "length": np.int64}
    shape = arrays["id"].shape
    same = [arrays[name].shape for name in ("id", "length") if name in arrays]
    return (
        all(array.dtype == types[name] for name, array in arrays.items())
        and all(each == shape and len(shape) == 1 for each in same)
        and (form is MASKED or (arrays["x_adv"].ndim == 4 and arrays["x_adv"].shape[:1] == shape))
        and (form is PLAIN or (arrays["masked"].ndim == 1 and arrays["digest"].shape == (*shape, _DIGEST)))
    )
