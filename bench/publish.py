"""A finished record into a leaderboards folder: all of a row's files at once, or nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from assay.errors import InputError
from assay.record import RECORD, Record, read_record, write_atomically

_STAGING = ".laying-"
_MOVED = "replaced"
"""Where in a staging folder the row that is being replaced waits, under its path in the leaderboards folder."""


def row_folder(record: Record) -> Path:
    """Where a record's files lie in a leaderboards folder."""
    return Path("records") / record.place


def row_files(record: Record, run: Path) -> dict[str, bytes]:
    """The record and the files that it speaks of, by name; their digests are not looked at here."""
    return {name: (run / name).read_bytes() for name in (*record.files, RECORD)}


def refuse_incomplete(record: Record, leaderboards: Path) -> None:
    """Raises InputError for a folder without boards, or a record with a mandatory part missing."""
    if not (leaderboards / "boards").is_dir():
        raise InputError(f"{leaderboards} holds no boards/; expected a leaderboards folder.")
    if record.verdict == "incomplete":
        missing = ", ".join(record.protocol.missing)
        raise InputError(f"the record of {record.defense.name} is incomplete ({missing}); it can't stand on a board.")


def publish_record(run: Path, leaderboards: Path) -> Path:
    """Lays a finished run's record and files into a leaderboards folder, in place of that row's earlier ones.

    Raises:
        InputError: for a folder without boards, or an incomplete record.
        IntegrityError: where the run's files don't match their digests.
    """
    record = read_record(run, files=True)
    refuse_incomplete(record, leaderboards)
    lay_down(leaderboards, row_folder(record), row_files(record, run))
    return leaderboards / row_folder(record)


def lay_down(leaderboards: Path, folder: Path, files: Mapping[str, bytes]) -> None:
    """Makes a folder of a leaderboards folder hold exactly these files, or changes nothing.

    They are written beside `records/` first, where nothing looks for records, and appear by one rename. A folder
    that is there already is moved aside by another rename just before, and moved back whatever goes wrong; where the
    process is killed between the two, the next call moves it back.

    Args:
        folder: relative to the leaderboards folder.

    Raises:
        InputError: where the folder can't be written to.
    """
    target = leaderboards / folder
    try:
        with _staging(leaderboards) as staging:
            for name, content in files.items():
                (staging / "made" / folder).mkdir(parents=True, exist_ok=True)
                write_atomically(staging / "made" / folder / name, content)
            # What is renamed is the topmost folder that isn't there yet: its parents are not made before.
            top = folder
            while not (leaderboards / top.parent).is_dir():
                top = top.parent
            if not target.exists():
                (staging / "made" / top).rename(leaderboards / top)
            else:
                (staging / _MOVED / folder.parent).mkdir(parents=True)
                target.rename(staging / _MOVED / folder)
                (staging / "made" / folder).rename(target)
            _sync((leaderboards / top).parent)
    except OSError as error:
        raise InputError(f"{target} can't be written: {error}. Nothing was changed.") from error


@contextmanager
def _staging(leaderboards: Path) -> Iterator[Path]:
    """A folder of this process's own, gone afterwards; clears away what killed processes left."""
    for left in leaderboards.glob(f"{_STAGING}*"):
        with _lock(left) as free:
            if free:
                _move_back(left, leaderboards)
                shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=leaderboards))
    try:
        with _lock(staging) as held:
            if not held:
                raise InputError(f"another process is working on {leaderboards}; try again.")
            yield staging
    finally:
        _move_back(staging, leaderboards)
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process holds a folder's lock, which dies with the process that took it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its own process has just cleared it away
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)


def _move_back(staging: Path, leaderboards: Path) -> None:
    """Puts a replaced row back where no other stands in its place."""
    for row in (staging / _MOVED).glob("records/*/*/*"):
        target = leaderboards / row.relative_to(staging / _MOVED)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            row.rename(target)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
