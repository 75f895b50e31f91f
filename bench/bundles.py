"""Bundles: adversarial examples in a file, a record's own or anybody's; what may not be in one is refused here.

A bundle is a safetensors file, as a record's `adversarial.safetensors` is one: `id` int64 `(n,)`, the sample ids, each
once and in any order, and `x_adv` float32 `(n, c, h, w)`, one image for each. Where a data set's images may not be
passed on, a record holds masked perturbations in their place (`assay.perturbation`): `masked` uint8 `(m,)` and `digest`
uint8 `(32,)`. Either is read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import Tensor

from assay.digest import sha256_of_bytes
from assay.errors import InputError
from assay.norms import TOLERANCE, distance, violation
from assay.perturbation import DIGEST, MASKED, PLAIN, most_bytes, unmasked
from assay.threat import BOX, ThreatModel

_ID = {"id": "I64"}
_HEADER = 64 << 10
"""Bytes that a header may take: three tensors and a few words of metadata need a few hundred."""
_BLOCK = 64


@dataclass(frozen=True)
class Bundle:
    """Adversarial examples.

    Attributes:
        ids: `(n,)` int64, each once.
        images: `(n, c, h, w)` float32. Nothing is said of their values: see `examine`.
        masked: whether the file holds perturbations, not images.
        sha256: of the file.
    """

    ids: NDArray[np.int64]
    images: Tensor
    masked: bool
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examined:
    """What a bundle's examples are worth.

    Attributes:
        reasons: for each why it doesn't count, empty where it does.
        norms: `(n,)` float64, each one's distance from its image in the threat model's norm.
        excess: `(n,)` float64, by how much it leaves the ball or the box; NaN where it is not finite.
    """

    reasons: tuple[str, ...]
    norms: NDArray[np.float64]
    excess: NDArray[np.float64]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which examples count, `(n,)`."""
        return np.asarray([not reason for reason in self.reasons], dtype=bool)


def read_regular(path: Path, most: int, what: str) -> bytes:
    """The content of a file that is one: no link, no device, at most `most` bytes, read through one handle.

    Raises:
        InputError: for anything else; a file that is too large isn't read.
    """
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link; give {what} itself.")
    # A pipe would wait for somebody to write into it; and the file may be replaced after the look at it above.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}; expected {what}.") from error
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise InputError(f"{path} is not a file; expected {what}.")
        if state.st_size > most:
            raise InputError(f"{path} has {state.st_size} bytes, {what} at most {most}; it was not read.")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def read_bundle(path: Path, *, ids: Sequence[int], x: Tensor) -> Bundle:
    """Reads adversarial examples for some of the samples `ids`, whose images are `x (n, c, h, w)`, on the CPU.

    Raises:
        InputError: for a file that is no such bundle, with what is wrong with it, or is masked by other images than
            `x`; one that is larger than so many images need is refused before anything is read.
    """
    shape = tuple(x.shape[1:])
    most = 8 * len(ids) + most_bytes(len(ids) * math.prod(shape)) + _HEADER
    content = read_regular(path, most, f"a bundle of {len(ids)} images")
    header = _header(path, content)
    form = _check_header(path, header, len(ids), shape)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error
    found = tensors["id"].astype(np.int64)
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path} has more than one image for {_listed(values[counts > 1])}; give one a sample.")
    unknown = values[~np.isin(values, np.asarray(ids, dtype=np.int64))]
    if len(unknown):
        raise InputError(
            f"{path} has images for {_listed(unknown)}, not among the record's {len(ids)} samples: it was made for "
            f"another board or data set."
        )
    if form is PLAIN:
        images = np.array(tensors["x_adv"], dtype=np.float32)
    else:
        rows = {each: row for row, each in enumerate(ids)}
        clean = x[[rows[each] for each in found.tolist()]].numpy()
        try:
            images = unmasked(clean, tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return Bundle(found, torch.from_numpy(images), form is MASKED, sha256_of_bytes(content))


def _header(path: Path, content: bytes) -> dict[str, Any]:
    """What a safetensors file says of its tensors, before any of them is made."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(_HEADER, len(content) - 8):
        raise InputError(f"{path} is not a safetensors file of examples: its header can't be read.")
    try:
        header = json.loads(content[8 : 8 + size], object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file: its header is no JSON ({error}).") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} is not a safetensors file: its header is no JSON object.")
    return {name: value for name, value in header.items() if name != "__metadata__"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _check_header(path: Path, header: dict[str, Any], most: int, shape: tuple[int, ...]) -> Mapping[str, str]:
    """Which form a bundle has, `PLAIN` or `MASKED`, once its header is one of such a bundle."""
    form = next((form for form in (PLAIN, MASKED) if set(header) == {*_ID, *form}), None)
    if form is None:
        names = ", ".join(repr(name[:40]) for name in sorted(header)[:8]) or "none"
        raise InputError(
            f"{path} holds the tensors {names}; expected exactly 'id' and 'x_adv', or those of masked perturbations: "
            f"'id', 'masked' and 'digest'."
        )
    shapes = {}
    for name, dtype in {**_ID, **form}.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        if entry.get("dtype") != dtype:
            raise InputError(f"{path}: {name} has dtype {str(entry.get('dtype'))[:20]}, expected {dtype}.")
        shapes[name] = entry.get("shape")
    n = shapes["id"][0] if isinstance(shapes["id"], list) and len(shapes["id"]) == 1 else None
    fits: dict[str, Any] = {"x_adv": [n, *shape], "digest": [DIGEST]}
    size = shapes.get("masked")
    if isinstance(size, list) and len(size) == 1:
        fits["masked"] = size  # as many bytes as it likes
    if not isinstance(n, int) or any(shapes[name] != fits.get(name, ()) for name in form):
        named = ", ".join(f"{name} {str(shapes[name])[:60]}" for name in form)
        expected = f"[n, {', '.join(map(str, shape))}]" if form is PLAIN else f"[m] and [{DIGEST}]"
        raise InputError(f"{path}: id has shape {str(shapes['id'])[:60]} and {named}; expected [n] and {expected}.")
    if not 1 <= n <= most:
        raise InputError(f"{path} holds {n} images; expected 1 to {most}, the record's samples.")
    return form


def examine(images: Tensor, x: Tensor, threat: ThreatModel) -> Examined:
    """Holds examples `(n, c, h, w)` against their images `x`: finite, in the box, in the ball, measured in float64.

    Both on the CPU.
    """
    low, high = BOX
    reasons: list[str] = []
    norms, excess = np.zeros(len(x)), np.zeros(len(x))
    for start in range(0, len(x), _BLOCK):  # float64 takes twice the room, several times
        part = slice(start, start + _BLOCK)
        z, centre = images[part], x[part]
        norms[part] = distance(threat.norm, z, centre).numpy()
        excess[part] = violation(threat.norm, float(threat.eps), z, centre).numpy()
        pixels = z.double().flatten(1)
        outside = torch.maximum(low - pixels, pixels - high).amax(1) > TOLERANCE
        for by, boxed in zip(excess[part].tolist(), outside.tolist(), strict=True):
            if math.isnan(by):
                reasons.append("not finite")
            elif boxed:
                reasons.append(f"outside the box [{low:g}, {high:g}]")
            else:
                reasons.append("" if by <= TOLERANCE else f"outside the ball {threat}")
    return Examined(tuple(reasons), norms, excess)


def refuse_invalid(what: str, ids: Sequence[int], found: Examined) -> None:
    """Raises InputError where any example doesn't count, with the samples and by how much the worst is outside."""
    wrong = np.flatnonzero(~found.valid)
    if len(wrong):
        reasons = "; ".join(sorted({found.reasons[row] for row in wrong}))
        by = np.nan_to_num(found.excess[wrong], nan=math.inf).max()
        named = _listed(np.asarray(ids)[wrong])
        raise InputError(f"{what}: {named}: {reasons} (by {by:.3g} at most; up to {TOLERANCE:g} is rounding).")


def _listed(ids: NDArray[np.int64]) -> str:
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:8].tolist()))}{more}"
