"""A baseline's evaluation made again: on its samples, under its profile, with its defense or with another.

What a run of the same plan has measured is kept in the user's cache: the plan holds the digests of weights, source,
code and protocol, the sample ids and the seed, so nothing is measured again as long as none of them changes. Neither
may what a defense of somebody's own is made of: the code around its file, and the versions of all that is installed.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from assay.boards import Board
from assay.calibrating import cache_folder
from assay.digest import ids_digest, sha256_of_file, sha256_of_json
from assay.errors import InputError
from assay.evaluation import execute
from assay.power import require_samples
from assay.prepare import Prepared, prepare
from assay.record import RECORD, Record
from assay.regress import ALPHA
from assay.reporter import Reporter, Silent

Watch = Callable[[Prepared], AbstractContextManager[Reporter]]
"""Who is told how a run gets on, such as `assay.progress.Progress`."""


@dataclass(frozen=True)
class Rerun:
    """What was measured.

    Attributes:
        folder: the run's, with its record and files.
        cached: it was all there already.
    """

    record: Record
    folder: Path
    cached: bool


def rerun(
    baseline: Record,
    defense: str | None = None,
    *,
    board: str | Board | None = None,
    n: int | None = None,
    alpha: float = ALPHA,
    seed: int | None = None,
    device: str | None = None,
    options: Mapping[str, str] | None = None,
    trust: bool = False,
    watch: Watch | None = None,
) -> Rerun:
    """Runs the baseline's evaluation again, or takes it from the cache; an interrupted one is resumed.

    Args:
        defense: another one than the baseline's, under the names that `assay run` takes.
        board: where the baseline's board is not a packaged one, its TOML file.
        n: the first so many of the baseline's samples, by default all.
        alpha: of the comparison to come: too few samples for it are refused before anything runs.
        seed, device: by default the baseline's. With both, an unchanged defense answers to the last bit alike.
        options: the defense's, as text; by default those of the baseline where it is the baseline's defense.
        trust: execute code from outside the registry.

    Raises:
        InputError: for whatever the caller can correct, such as a board that has changed since.
        DefenseError, AttackError, IntegrityError: as `assay.evaluation.execute` does.
    """
    n = baseline.board.n if n is None else n
    if n > baseline.board.n:
        raise InputError(f"the baseline holds {baseline.board.n} samples, so n can't be {n}.")
    require_samples(n, alpha)
    if options is None:
        options = baseline.defense.options if defense in (None, baseline.defense.name) else {}
    prepared = prepare(
        defense or baseline.defense.name,
        board if board is not None else baseline.board.name,
        baseline.protocol.profile,
        n=n,
        seed=baseline.provenance.seed if seed is None else seed,
        device=baseline.provenance.device if device is None else device,
        options=options,
        trust=trust,
    )
    _refuse_other_samples(baseline, prepared)
    folder = cache_folder() / "runs" / sha256_of_json([prepared.plan, _surroundings(prepared)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise InputError(
            f"runs can't be kept in {folder.parent}: {error}; set ASSAY_CACHE to another folder."
        ) from error
    with lock:
        # Tests that run side by side and share a defense wait for the one that measures it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / RECORD).is_file():
            return Rerun(execute(prepared, folder), folder, cached=True)
        with watch(prepared) if watch else nullcontext(Silent()) as reporter:
            return Rerun(execute(prepared, folder, reporter=reporter), folder, cached=False)


def _surroundings(prepared: Prepared) -> dict[str, dict[str, str]]:
    """What a defense's own file may import: the Python files of its package, or beside it, and what is installed.

    A plan knows the one file. A guard that took a measurement of older code for one of today's would guard nothing.
    """
    installed = {found.name: found.version for found in metadata.distributions() if found.name}
    if prepared.spec.source is None:
        return {"installed": installed}
    root, files = prepared.spec.source.resolve().parent, "*.py"
    while (root / "__init__.py").is_file():
        root, files = root.parent, f"{root.name}/**/*.py"
    hashes = {str(file.relative_to(root)): sha256_of_file(file) for file in sorted(root.glob(files)) if file.is_file()}
    return {"installed": installed, "files": hashes}


def _refuse_other_samples(baseline: Record, prepared: Prepared) -> None:
    """Before hours are spent on what can't be compared."""
    before, now = baseline.board, prepared.board_ref
    there = prepared.job.board.ids[: before.n]
    reasons = []
    if prepared.protocol_ref.digest != baseline.protocol.digest:
        digests = (each.digest[:12] for each in (baseline.protocol, prepared.protocol_ref))
        reasons.append("protocol {} {} ({} in the baseline, {} here)".format(
            prepared.protocol.id, prepared.profile, *digests))  # fmt: skip
    if (before.dataset, before.revision) != (now.dataset, now.revision) or before.ids_sha256 != ids_digest(there):
        reasons.append("samples")
    if before.threat != now.threat:
        reasons.append(f"threat model ({before.threat.norm} {before.threat.eps} in the baseline, "
                       f"{now.threat.norm} {now.threat.eps} here)")  # fmt: skip
    if before.draws != now.draws:
        reasons.append(f"draws ({before.draws} in the baseline, {now.draws} here)")
    if reasons:
        raise InputError(
            f"board {before.name} has changed since the baseline: other {', other '.join(reasons)}. "
            f"Measure a new baseline."
        )
