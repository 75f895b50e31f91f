"""One evaluation from names to a record: what `assay run` and `assay plan` do, without their printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from assay import __version__, data, provenance
from assay.board import Board, load_board
from assay.defense import DefenseSpec
from assay.digest import ids_digest, sha256_of_bytes, sha256_of_file
from assay.errors import InputError, IntegrityError, nearest
from assay.finding import Finding
from assay.harness import Job, run_preflight, run_shards
from assay.protocol import PlannedAttack, ProfileName, Protocol, load_protocol, verdict
from assay.record import (
    BUNDLE,
    RECORD,
    SAMPLES,
    BoardRef,
    Cost,
    DefenseRef,
    ProtocolRef,
    Provenance,
    Record,
    ThreatRef,
    read_record,
    write_atomically,
    write_record,
)
from assay.reduce import bundle_bytes, join, outcome_of, parquet_bytes, sample_table, summarise, total_cost
from assay.registry import ATTACKS, DEFENSES, resolve_defense
from assay.reporter import Reporter, Silent
from assay.rundir import RunDir


@dataclass(frozen=True)
class Prepared:
    """A run whose names are resolved and whose weights are loaded.

    Attributes:
        name: the defense as it was asked for; `options` its options, in text.
        mandatory: all attacks that the protocol demands; `job.planned` holds those that will run.
        missing: mandatory attack -> why it won't run.
    """

    name: str
    spec: DefenseSpec
    job: Job
    protocol: Protocol
    profile: ProfileName
    mandatory: tuple[PlannedAttack, ...]
    missing: dict[str, str]
    options: Mapping[str, str]

    @property
    def plan(self) -> dict[str, Any]:
        """What determines the result, as written to `plan.json` and compared on a resume."""
        job = self.job
        return {
            "assay": __version__,
            "code_sha256": provenance.code_sha256(),
            "packages": provenance.package_versions(),
            "defense": {
                "name": self.name,
                **self.defense_ref.model_dump(mode="json", exclude={"name"}),
                # Foreign code loads its weights from wherever it likes: what was loaded counts.
                "state_sha256": provenance.state_sha256(job.defense),
            },
            "transfer_source": provenance.state_sha256(job.source) if job.source is not None else None,
            "board": self.board_ref.model_dump(mode="json"),
            "protocol": self.protocol_ref.model_dump(mode="json"),
            "attacks": {attack.name: dict(attack.options) for attack in job.planned},
            "ids": list(job.ids),
            "shard": job.board.shard,
            "seed": job.seed,
            "device": job.device,
            "threads": provenance.threads(),
        }

    @property
    def defense_ref(self) -> DefenseRef:
        """The defense as a record names it."""
        weights = {name: sha256_of_file(path) for name, path in self.weight_files.items()}
        source = sha256_of_file(self.spec.source) if self.spec.source else None
        options = self.spec.recorded(self.job.board.dataset, self.options)
        return DefenseRef(name=self.name, card=self.spec.card, options=options, weights=weights, source_sha256=source)

    @property
    def weight_files(self) -> Mapping[str, Path]:
        """The weight files behind the defense."""
        return self.spec.files(self.job.board.dataset, self.options)

    @property
    def board_ref(self) -> BoardRef:
        """The board as a record names it."""
        board, ids = self.job.board, self.job.ids
        return BoardRef(
            name=board.name,
            dataset=board.dataset,
            revision=board.revision,
            n=len(ids),
            size=len(board.ids),
            ids_sha256=ids_digest(ids),
            draws=board.draws,
            threat=ThreatRef(norm=board.norm, eps=board.eps),
        )

    @property
    def protocol_ref(self) -> ProtocolRef:
        """The protocol as a record names it."""
        return ProtocolRef(
            id=self.protocol.id,
            digest=self.protocol.digest(self.profile),
            profile=self.profile,
            mandatory=tuple(attack.name for attack in self.mandatory),
            missing=self.missing,
        )


def prepare(
    name: str,
    board: str | Board,
    profile: ProfileName = "quick",
    *,
    n: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    only: Sequence[str] = (),
    trust: bool = False,
    options: Mapping[str, str] | None = None,
) -> Prepared:
    """Resolves names, loads weights, and works out the mandatory attacks.

    Args:
        name: a registered defense, `module:object` or `path.py:object`.
        board: a board's name or a path to its TOML.
        n: how many of the board's samples, by default the profile's.
        only: run these mandatory attacks alone; the record is then incomplete.
        trust: execute code from outside the registry.
        options: the defense's options, as text.

    Raises:
        InputError: for whatever the caller can correct.
    """
    board = board if isinstance(board, Board) else load_board(board)
    protocol = load_protocol(board.protocol)
    size = min(len(board.ids), protocol.samples[profile] or len(board.ids)) if n is None else n
    if not 1 <= size <= len(board.ids):
        raise InputError(f"--n must lie in 1 to {len(board.ids)}, the size of {board.name}; got {size}.")
    check_device(device)
    dataset = data.describe(board.dataset)
    if board.revision != dataset.revision:
        raise InputError(
            f"{board.name} is made of revision {board.revision} of {board.dataset}, this version of assay reads "
            f"{dataset.revision}: other images, so another board."
        )
    spec = resolve_defense(name, trust=trust)
    options = dict(options or {})
    defense = spec.build(board.dataset, device, options)
    if defense.n_classes < dataset.n_classes:
        raise InputError(f"{name} has {defense.n_classes} classes, {board.dataset} has {dataset.n_classes}.")
    # A card may call itself what it likes: only the registered model is exempt from its own transfer.
    source = board.source if name == board.source and not spec.recorded(board.dataset, options) else ""
    mandatory = protocol.plan(defense.card, defense.n_classes, profile, source=source)
    unknown = [attack for attack in only if attack not in {planned.name for planned in mandatory}]
    if unknown:
        known = nearest(unknown[0], [planned.name for planned in mandatory])
        raise InputError(f"{unknown[0]!r} is not an attack of this plan.{known}")
    missing = {planned.name: planned.missing for planned in mandatory if planned.missing}
    missing |= {planned.name: "not asked for (--attack)" for planned in mandatory if only and planned.name not in only}
    planned = tuple(attack for attack in mandatory if attack.name not in missing)
    needs_source = any(attack.options.get("source") == "board" for attack in planned)
    job = Job(
        defense=defense,
        board=board,
        ids=board.ids[:size],
        planned=planned,
        attacks={attack.attack: ATTACKS[attack.attack] for attack in planned},
        source=DEFENSES[board.source].build(board.dataset, device) if needs_source else None,
        checks=protocol.checks,
        seed=seed,
        selection=protocol.selection,
        device=device,
    )
    resolved = replace(spec, card=defense.card)
    return Prepared(name, resolved, job, protocol, profile, mandatory, missing, options)


def check_device(device: str) -> None:
    """Raises InputError for a device that torch doesn't know or that isn't here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {device!r} can't be used here ({reason.rstrip('.')}): use 'cpu', or 'cuda' where there is one."
        ) from error


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
        findings = tuple(run_preflight(job))
        if any(finding.status == "fail" for finding in findings):
            record = _record(prepared, findings, started)
            return _write(record.sealed(None), out, {})
        arrays = join(run_shards(job, store))
        table = sample_table(job, arrays)
        files = {SAMPLES: parquet_bytes(table), BUNDLE: bundle_bytes(arrays)}
        record = _record(prepared, findings, started).model_copy(
            update={
                "results": summarise(job, arrays),
                "cost": total_cost(job, arrays),
                "files": {name: sha256_of_bytes(content) for name, content in files.items()},
            }
        )
        return _write(record.sealed(outcome_of(table)), out, files)


def _record(prepared: Prepared, findings: tuple[Finding, ...], started: str) -> Record:
    head, dirty = provenance.commit()
    return Record(
        protocol=prepared.protocol_ref,
        board=prepared.board_ref,
        defense=prepared.defense_ref,
        verdict=verdict((finding.status for finding in findings), missing=prepared.missing),
        results=None,
        findings=findings,
        cost=Cost(forward=0, backward=0, seconds=0.0),
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


def _write(record: Record, out: Path, files: Mapping[str, bytes]) -> Record:
    """The record last: where it exists, everything it speaks of does."""
    for name, content in files.items():
        write_atomically(out / name, content)
    write_record(record, out / RECORD)
    written = read_record(out, files=True)
    if written.digest != record.digest:
        raise IntegrityError(f"{out / RECORD} reads back differently from what was written.")
    return written


def publish_record(run: Path, leaderboards: Path) -> Path:
    """Copies a finished run's record and files to `records/BOARD/DEFENSE/PROFILE/` of a leaderboards folder.

    Raises:
        InputError: for a folder without boards, or an incomplete record.
        IntegrityError: where the run's files don't match their digests.
    """
    record = read_record(run, files=True)
    if not (leaderboards / "boards").is_dir():
        raise InputError(f"{leaderboards} holds no boards/; expected a leaderboards folder.")
    if record.verdict == "incomplete":
        missing = ", ".join(record.protocol.missing)
        raise InputError(f"the record of {record.defense.name} is incomplete ({missing}); it can't stand on a board.")
    name = record.defense.card.name.replace("/", "--") + record.defense.variant
    folder = leaderboards / "records" / record.board.name / name / record.protocol.profile
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*record.files, RECORD):
        write_atomically(folder / name, (run / name).read_bytes())
    return folder
