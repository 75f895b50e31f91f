"""The harness: evaluates the shards of a board; `reduce` makes the record of them.

A shard passes through stages: `clean`, each mandatory attack from cheap to dear on the samples
still standing, and `final`, which chooses each sample's strongest candidate and scores it with fresh draws.
Where the defense certifies and the board has radii, `certify` and an attack at each radius follow.
"""

from __future__ import annotations

from assay.job import Job
from assay.rundir import Arrays, RunDir
from assay.shard import Shard

__all__ = ["Job", "evaluate_shard", "run_shards"]


def run_shards(job: Job, store: RunDir) -> list[Arrays]:
    """Evaluates every shard that isn't on disk yet; returns all of them, in order.

    Raises:
        DefenseError: where the defense raises or answers nonsense; it names the sample ids.
        AttackError: where an attack raises or leaves its budget.
        CertificateError: where a certificate raises, or returns counts that no measurement has.
        IntegrityError: where a file on disk was truncated or edited.
    What was finished before stays on disk in each case.
    """
    return [evaluate_shard(job, store, index) for index in range(len(job.shards))]


def evaluate_shard(job: Job, store: RunDir, index: int) -> Arrays:
    """One shard, from disk where it is finished, resumed at its first unfinished stage otherwise.

    Returns:
        `id`, `label` `(n,)`; `adversarial (n, c, h, w)`, each sample's strongest candidate; and per
        stage `STAGE/correct` (right answers in the board's draws), `/majority`, `/attempted`,
        `/certain` (broken beyond doubt), `/norm`, `/forward`, `/backward`, `/seconds`, all `(n,)`.
        Where the run certifies: per stage `/hits` (votes for the true class) and `/distance` (l2);
        `certify/count/NAME`, n rows each; `radius-R/attempted`, `/broken`, `/answer`, `/distance` `(n,)`, and
        `/broken_id`, `/broken_x` of the samples that fell. Alone, the certified half has no candidates.
    """
    finished = store.read(store.shard_file(index))
    if finished is not None:
        for stage in job.stages:
            job.reporter.end(index, stage)
        return finished
    shard = Shard(job, index)
    for stage in job.stages:
        file = store.part_file(index, stage)
        part = store.read(file)
        if part is None:
            job.reporter.begin(index, stage, shard.concerns(stage))
            part = shard.run(stage)
            store.write(file, part)
        shard.absorb(stage, part)
        job.reporter.end(index, stage)
    store.finish(index, shard.arrays)
    return shard.arrays
