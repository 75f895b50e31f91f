"""A run on disk: its plan, one file a finished shard, atomic writes, and resume.

    plan.json                    what is being run; a resume with another plan is refused
    shards/0003.safetensors      a finished shard
    shards/0003.pgd.part         a finished stage of a shard in progress; removed with its shard's end
    shards/check.eot.finding     a finding
    record.json  samples.parquet  adversarial.safetensors

Every file is written under a temporary name, synced and renamed, so `kill -9` at any moment loses
at most the stage in progress. Every shard file carries a digest over its content and its plan.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from assay.digest import canonical_json, sha256_of_bytes, sha256_of_json
from assay.errors import InputError, IntegrityError
from assay.record import write_atomically

Arrays = dict[str, NDArray[Any]]


class RunDir:
    """A run's folder.

    Args:
        path: created if absent.
        plan: plain JSON data that determines the result; compared with the plan already there.

    Raises:
        InputError: where the folder holds a run with another plan; the message lists what differs.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self.path = path
        self.plan_digest = sha256_of_json(plan)
        self._plan = json.loads(canonical_json(plan))
        (path / "shards").mkdir(parents=True, exist_ok=True)
        if not (path / "plan.json").is_file():
            write_atomically(path / "plan.json", json.dumps(self._plan, indent=1, sort_keys=True).encode() + b"\n")
        self._refuse_another_plan()

    def _refuse_another_plan(self) -> None:
        file = self.path / "plan.json"
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise IntegrityError(f"{file} is not readable JSON: {error}") from error
        changes = differences(found, self._plan)
        if changes:
            listed = "\n  ".join(changes[:12])
            raise InputError(
                f"{self.path} holds a run with another plan, so it can't be resumed:\n  {listed}\n"
                f"Give another --out, or remove that folder to start anew."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process; the lock dies with it. Clears away what a killed one left half written.

        Raises:
            InputError: where another process holds it, or was first to write another plan.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"another process is working on {self.path}; wait for it or give another --out."
                ) from error
            self._refuse_another_plan()
            for debris in [*self.path.glob(".*.tmp"), *(self.path / "shards").glob(".*.tmp")]:
                debris.unlink()
            yield

    def shard_file(self, shard: int) -> Path:
        """Where a finished shard lies."""
        return self.path / "shards" / f"{shard:04d}.safetensors"

    def part_file(self, shard: int, stage: str) -> Path:
        """Where a finished stage of an unfinished shard lies."""
        return self.path / "shards" / f"{shard:04d}.{stage}.part"

    def check_file(self, name: str) -> Path:
        """Where a finding lies once it is measured."""
        return self.path / "shards" / f"check.{name}.finding"

    def read(self, file: Path) -> Arrays | None:
        """The arrays of a shard or part file; None where there is none.

        Raises:
            IntegrityError: where the file is truncated, edited or of another run; it is named.
        """
        if not file.is_file():
            return None
        advice = "remove it to have it computed again"
        try:
            with safe_open(str(file), "numpy") as opened:
                digest = (opened.metadata() or {}).get("digest")
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, ValueError, OSError) as error:
            raise IntegrityError(f"{file} is truncated or not a shard ({error}); {advice}.") from error
        if digest != self._digest(file.name, arrays):
            raise IntegrityError(f"{file} doesn't match its digest: it was edited, or is of another run; {advice}.")
        return arrays

    def write(self, file: Path, arrays: Arrays) -> None:
        """Writes a shard or part file, atomically, with its digest."""
        ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
        write_atomically(file, save(ordered, {"digest": self._digest(file.name, ordered)}))

    def finish(self, shard: int, arrays: Arrays) -> None:
        """Writes a shard and removes its parts."""
        self.write(self.shard_file(shard), arrays)
        for part in (self.path / "shards").glob(f"{shard:04d}.*.part"):
            part.unlink()

    def _digest(self, name: str, arrays: Arrays) -> str:
        contents = [
            [key, str(value.dtype), list(value.shape), sha256_of_bytes(np.ascontiguousarray(value).tobytes())]
            for key, value in sorted(arrays.items())
        ]
        return sha256_of_json([self.plan_digest, name, contents])


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """What differs between two JSON values, a line each: `path: found -> wanted`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines: list[str] = []
        for key in sorted(set(found) | set(wanted)):
            lines += differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if found == wanted:
        return []
    return [f"{path}: {_short(found)} -> {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
