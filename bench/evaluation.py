"""One evaluation from a plan to a record: what `assay run` does, without its printing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay import __version__, data, provenance
from assay.certification import certification, contradictions, count_bytes
from assay.digest import sha256_of_bytes
from assay.errors import IntegrityError
from assay.examination import Examination
from assay.harness import run_shards
from assay.job import Job
from assay.perturbation import bundle_bytes
from assay.prepare import Prepared
from assay.protocol import verdict
from assay.record import (
    BUNDLE,
    COUNTS,
    RECORD,
    SAMPLES,
    Cost,
    FileName,
    Provenance,
    Record,
    read_record,
    write_atomically,
    write_record,
)
from assay.reduce import join, outcome_of, parquet_bytes, sample_table, summarise, total_cost
from assay.reporter import Reporter, Silent
from assay.rundir import RunDir


def execute(prepared: Prepared, out: Path, *, reporter: Reporter | None = None) -> Record:
    """Runs, or resumes, the evaluation in folder `out`; returns its record, which is on disk too.

    Raises:
        InputError: where `out` holds a run with another plan.
        DefenseError, AttackError, IntegrityError: as `assay.harness.run_shards` does; what was
            finished stays on disk.
    """
    job = replace(prepared.job, reporter=reporter or Silent())
    started = datetime.now(UTC).isoformat(timespec="seconds")
    store = RunDir(out, prepared.plan)
    with store.locked():
        if (out / RECORD).is_file():
            return read_record(out, files=True)
        examination = Examination(job, store)
        if not examination.preflight():
            record = _record(prepared, examination, started)
            return _write(record.sealed(None), out, {})
        job = examination.adapted()
        arrays = join(run_shards(job, store))
        examination.health(job, arrays)
        files: dict[FileName, bytes] = {}
        update: dict[str, Any] = {"cost": total_cost(job, arrays, examination.spent)}
        outcome = None
        clean = _withheld(job)
        if job.certificate is not None:
            update["certification"] = certification(job.certificate, arrays)
            files[COUNTS] = count_bytes(job.certificate, arrays, clean)
        if job.scored:
            if job.certificate is not None:
                examination.findings["contradiction"] = contradictions(job, arrays)
            table = sample_table(job, arrays)
            outcome = outcome_of(table)
            update["results"] = summarise(job, arrays, update.get("certification"))
            files |= {SAMPLES: parquet_bytes(table), BUNDLE: bundle_bytes(arrays["id"], arrays["adversarial"], clean)}
        update["files"] = {name: sha256_of_bytes(content) for name, content in files.items()}
        record = _record(prepared, examination, started).model_copy(update=update)
        return _write(record.sealed(outcome), out, files)


def _withheld(job: Job) -> NDArray[np.float32] | None:
    """The images `(n, c, h, w)` where their data set's may not be passed on; None where a record may hold them."""
    dataset = job.board.dataset
    return None if data.describe(dataset).shareable else data.load(dataset, job.ids)[0].numpy()


def _record(prepared: Prepared, examination: Examination, started: str) -> Record:
    findings = tuple(examination.findings.values())
    missing = [*prepared.missing, *examination.missing]
    head, dirty = provenance.commit()
    return Record(
        protocol=prepared.protocol_ref,
        board=prepared.board_ref,
        defense=prepared.defense_ref,
        verdict=verdict((finding.status for finding in findings), missing=missing),
        results=None,
        findings=findings,
        cost=Cost(**examination.spent.model_dump(), checks=examination.spent),
        provenance=Provenance(
            assay=__version__,
            code_sha256=provenance.code_sha256(),
            commit=head,
            dirty=dirty,
            **provenance.machine(),
            device=prepared.job.device,
            threads=provenance.threads(),
            packages=provenance.package_versions(),
            seed=prepared.job.seed,
            shard=prepared.job.board.shard,
            started=started,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
        files={},
    )


def _write(record: Record, out: Path, files: Mapping[FileName, bytes]) -> Record:
    """The record last: where it exists, everything it speaks of does."""
    for name, content in files.items():
        write_atomically(out / name, content)
    write_record(record, out / RECORD)
    written = read_record(out, files=True)
    if written.digest != record.digest:
        raise IntegrityError(f"{out / RECORD} reads back differently from what was written.")
    return written
