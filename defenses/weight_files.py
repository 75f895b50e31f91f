"""Files of weights as the training commands write them: whole or not at all, each with its entry in the manifest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def entries_of(manifest: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries by file; none where it does not exist."""
    entries: dict[str, dict[str, Any]] = json.loads(manifest.read_text())["weights"] if manifest.exists() else {}
    return entries


def record(manifest: Path, file: str, entry: dict[str, Any]) -> None:
    """Puts one file's entry into the manifest, beside the others."""
    entries = {**entries_of(manifest), file: entry}
    write(manifest, (json.dumps({"weights": dict(sorted(entries.items()))}, indent=2) + "\n").encode())
