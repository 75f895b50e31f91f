"""Canonical JSON and SHA-256: one way to turn data into a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def canonical_json(data: Any) -> str:
    """JSON with sorted keys, no spaces, no NaN: equal data, equal text.

    Raises:
        ValueError: for NaN or an infinity.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def sha256_of_json(data: Any) -> str:
    """The SHA-256 of `data`'s canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """The SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ids_digest(ids: Sequence[int]) -> str:
    """The SHA-256 of a list of sample ids, order included: of their decimals joined by commas."""
    return hashlib.sha256(",".join(str(int(i)) for i in ids).encode()).hexdigest()
