"""The adversarial examples that a board's undefended model hands on: made once, then read from the user's cache.

They depend on the board, the seed and that model, and on no defense, so that every row of a board would make the same
ones again: on CIFAR-10 that takes longer than all other attacks on a small network together. They are made for whole
shards, whatever stands: the batch decides a result's last bits, and a row must not depend on what was cached.
Files that nothing has read for 90 days go when another is written: a version of the code that is gone reads none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from assay import provenance
from assay.attack import Attack, Target
from assay.calibrating import cache_folder, machine_key
from assay.digest import ids_digest, sha256_of_json
from assay.job import Job
from assay.noise import Noise
from assay.record import write_atomically

_LOG = logging.getLogger(__name__)
KEPT = 90 * 24 * 3600
"""Seconds that a file is kept after it was last read."""


def transferred(
    job: Job, attack: Attack, options: Mapping[str, Any], ids: tuple[int, ...], x: Tensor, y: Tensor, noise: Noise
) -> Tensor:
    """What an attack on the job's undefended model finds around the images of a shard, `(n, c, h, w)` like `x`.

    Args:
        attack: with the option `source`, which gets that model.
        options: the others; where `source` stands among them it is replaced.
        ids: of the shard's samples; `x (n, c, h, w)` in [0, 1] and `y (n,)` are theirs, `noise` has n rows.
    """
    assert job.source is not None
    file = cache_folder() / "transfer" / f"{_key(job, options, ids)}.safetensors"
    found = _read(file, x)
    if found is not None:
        return found
    source = Target(job.source, len(ids))
    made = attack(source, x, y, job.board.threat, noise, **{**options, "source": source}).detach()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({"x_adv": made.cpu().contiguous()}))
        _drop_unread(file.parent)
    except OSError as error:
        _LOG.warning("transferred examples can't be cached in %s: %s", file.parent, error)
    return made


def _read(file: Path, x: Tensor) -> Tensor | None:
    """Cached examples around `x`; None where there are none, or a file that can't be theirs."""
    try:
        found = load_file(file)["x_adv"]
    except (OSError, SafetensorError, KeyError):
        return None
    fits = found.shape == x.shape and found.dtype == x.dtype and bool(torch.isfinite(found).all())
    if not fits:
        return None
    with contextlib.suppress(OSError):  # a cache that others share may be read-only
        os.utime(file)
    return found.to(x.device)


def _drop_unread(folder: Path) -> None:
    now = time.time()
    for file in folder.glob("*.safetensors"):
        # Another process may drop it at the same time.
        with contextlib.suppress(FileNotFoundError):
            if now - file.stat().st_mtime > KEPT:
                file.unlink()


def _key(job: Job, options: Mapping[str, Any], ids: tuple[int, ...]) -> str:
    board = job.board
    return sha256_of_json(
        {
            "board": [board.name, board.dataset, board.revision, board.norm, board.eps],
            "ids": ids_digest(ids),
            "seed": job.seed,
            "options": dict(options),
            "source": provenance.state_sha256(job.source) if job.source is not None else None,
            **machine_key(job.device),
        }
    )
