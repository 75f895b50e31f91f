"""The record: the validated, immutable result of a run, and the only thing that tables are made from.

Field names are a contract with everybody who reads `record.json`. No torch here: tables are
rendered where none is installed.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, ValidationError, model_serializer

from assay.card import SLUG, Card, Strict, explain
from assay.digest import sha256_of_file, sha256_of_json
from assay.errors import InputError, IntegrityError
from assay.finding import Finding
from assay.protocol import ProfileName, Verdict
from assay.results import AttackResult, Certification, Estimate, RadiusResult, Results, RuleResult, Rules, Spending
from assay.threat import Norm

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "AttackResult", "BoardRef", "Certification", "Cost", "DefenseRef", "Estimate", "ProtocolRef", "Provenance",
    "RadiusResult", "Record", "Results", "RuleResult", "Rules", "Spending", "ThreatRef", "read_record",
    "write_atomically", "write_record",
]  # fmt: skip

SCHEMA: Literal["assay-record/1"] = "assay-record/1"
RECORD = "record.json"
SAMPLES: Literal["samples.parquet"] = "samples.parquet"
BUNDLE: Literal["adversarial.safetensors"] = "adversarial.safetensors"
COUNTS: Literal["certificates.safetensors"] = "certificates.safetensors"
FileName = Literal["samples.parquet", "adversarial.safetensors", "certificates.safetensors"]


class ProtocolRef(Strict):
    """Which protocol, under which profile; the digest covers its whole resolved content."""

    id: str
    digest: str
    profile: ProfileName
    mandatory: tuple[str, ...]
    missing: dict[str, str]


class ThreatRef(Strict):
    """The threat model, eps as a fraction."""

    norm: Norm
    eps: str


class BoardRef(Strict):
    """Which samples: `n` of the board's `size` ids; `ids_sha256` is the digest of the ids that were run."""

    name: str = Field(pattern=SLUG)
    dataset: str
    revision: str
    n: int
    size: int
    ids_sha256: str
    draws: int
    threat: ThreatRef


class DefenseRef(Strict):
    """Which defense: its card, its options, and the digests of its weights, source and parameters.

    Attributes:
        options: those that differ from their defaults, in text; of a path to weights the last part.
        state_sha256: of the parameters and buffers that were measured (`assay.provenance.state_sha256`), whatever file
            they came from: code that loads weights by itself names none. None in records made before it was kept.
    """

    name: str
    card: Card
    options: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, str]
    source_sha256: str | None
    state_sha256: str | None = None

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        # Absent, as in the records made before there were any: their digests hold.
        for name in ("options", "state_sha256"):
            if not getattr(self, name):
                plain.pop(name, None)
        return plain

    @property
    def title(self) -> str:
        """The card's title, with the options that set a row apart from the card's, unless one of them is that title."""
        return self.card.title if self._titled else self.with_options(self.card.title)

    @property
    def _titled(self) -> bool:
        """Whether an option gave the card its title, which then stands for all of them."""
        return self.options.get("title") == self.card.title

    def with_options(self, name: str) -> str:
        """`name (denoiser=ffdnet.pth, steps=3)`, the name alone where there are no options, or `name (title)`."""
        each = (f"{option}={value}" for option, value in self.options.items())
        given = self.card.title if self._titled else ", ".join(each)
        return f"{name} ({given})" if given else name

    @property
    def variant(self) -> str:
        """What folder names of this defense end in: empty without options, otherwise unlike any other options'."""
        if not self.options:
            return ""
        words = [self.card.title] if self._titled else [f"{name}={value}" for name, value in self.options.items()]
        shown = "+".join(re.sub(r"[^A-Za-z0-9_.=-]+", "-", word) for word in words)
        # Two files of one name are two defenses.
        return f"+{shown[:80]}+{sha256_of_json([self.options, self.weights])[:8]}"


class Spent(Strict):
    """Samples passed through the defense forward and backward, and wall seconds."""

    forward: int
    backward: int
    seconds: float


class Cost(Spent):
    """What the run took in all.

    Attributes:
        checks: what its checks took of that; None in records that were made before this was counted.
    """

    checks: Spent | None = None


class Provenance(Strict):
    """Where and with what the run was made."""

    assay: str
    code_sha256: str
    commit: str | None
    dirty: bool | None
    python: str
    platform: str
    device: str
    threads: int
    packages: dict[str, str]
    seed: int
    shard: int
    started: str
    finished: str


@dataclass(frozen=True)
class _Origin:
    """Where a record was read from; any two are equal, since the same record may lie in two places."""

    folder: Path | None = field(default=None, compare=False)


class Record(Strict):
    """A finished run.

    Attributes:
        results: None where a preflight check failed before anything was measured, or where the certified half
            ran alone.
        certification: None where the defense doesn't certify or the board has no radii.
        outcome_sha256: the digest of everything that depends neither on the wall clock nor on the
            state of the checkout (the code has its own digest). Two runs of one plan on the same
            hardware with the same libraries, interrupted or not, agree in it.
        digest: the digest of the whole record, its own field left out.
    """

    schema_: Literal["assay-record/1"] = Field(default=SCHEMA, alias="schema")
    protocol: ProtocolRef
    board: BoardRef
    defense: DefenseRef
    verdict: Verdict
    results: Results | None
    certification: Certification | None = None
    findings: tuple[Finding, ...]
    cost: Cost
    provenance: Provenance
    files: dict[FileName, str]
    outcome_sha256: str = ""
    digest: str = ""
    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    def sealed(self, samples: Any) -> Record:
        """This record with its digests filled in; `samples` is the per-sample outcome, as plain JSON data."""
        plain = self.as_json()
        timeless = {key: value for key, value in plain.items() if key not in ("digest", "outcome_sha256", "files")}
        made = [self.files.get(BUNDLE, ""), *([self.files[COUNTS]] if COUNTS in self.files else [])]
        outcome = sha256_of_json([_without_incidentals(timeless), *made, samples])
        plain["outcome_sha256"] = outcome
        return self.model_copy(update={"outcome_sha256": outcome, "digest": _digest(plain)})

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, as written."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return data

    def to_frame(self) -> pd.DataFrame:
        """The sample table: one row a sample and stage (`clean`, each attack, `final`), as `assay.reduce` makes it.

        Raises:
            InputError: for a record that wasn't read from disk, or that measured no samples.
            IntegrityError: where the table is missing or was changed.
        """
        import pandas as pd

        return pd.read_parquet(self.file(SAMPLES), engine="pyarrow")

    def file(self, name: FileName) -> Path:
        """A file of the record's, once it matches its digest.

        Raises:
            InputError: for a record that wasn't read from disk, or that measured no samples.
            IntegrityError: where the file is missing or was changed.
        """
        if self._origin.folder is None or name not in self.files:
            why = "was not read from disk" if name in self.files else "measured no samples"
            raise InputError(f"the record of {self.defense.name} {why}, so it has no {name}.")
        return _checked(self, name, self._origin.folder)

    @property
    def place(self) -> PurePosixPath:
        """Where its row lies below `records/` and `audits/`: BOARD/DEFENSE/PROFILE, a `/` of the name as `--`."""
        name = self.defense.card.name.replace("/", "--") + self.defense.variant
        return PurePosixPath(self.board.name, name, self.protocol.profile)

    @property
    def ranked(self) -> bool:
        """Whether a table may rank it: a ranked profile, all of the board's ids, nothing missing or failed."""
        complete = self.board.n == self.board.size and self.protocol.profile != "quick"
        return complete and self.verdict in ("verified", "flagged")


_INCIDENTAL = ("seconds", "started", "finished", "commit", "dirty")


def _without_incidentals(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_incidentals(v) for k, v in value.items() if k not in _INCIDENTAL}
    return [_without_incidentals(item) for item in value] if isinstance(value, list) else value


def _digest(plain: dict[str, Any]) -> str:
    return sha256_of_json({key: value for key, value in plain.items() if key != "digest"})


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, never sees half of it: temporary name, sync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_record(record: Record, path: Path) -> None:
    """Writes a sealed record as readable, strict JSON."""
    text = json.dumps(record.as_json(), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(path, text.encode() + b"\n")


def read_record(path: Path, *, files: bool = False) -> Record:
    """Reads and validates a record; with `files`, its sample table and bundle too.

    Args:
        path: `record.json`, or the folder that holds it.

    Raises:
        InputError: for a file that is absent or is not a record.
        IntegrityError: for a record, or a file of it, that doesn't match its digest.
    """
    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no record at {path}; expected record.json or the folder that holds it.")
    try:
        text = path.read_text()
        plain = json.loads(text, parse_constant=_refuse_constant)
        record = Record.model_validate_json(text, strict=True)
        found = _digest(plain)
    except (ValueError, ValidationError) as error:
        raise InputError(f"{path} is not a valid record: {explain(error)}") from error
    if found != record.digest:
        raise IntegrityError(f"{path} was changed after it was written: its digest says {record.digest}.")
    record._origin = _Origin(path.parent)
    if files:
        for name in record.files:
            _checked(record, name, path.parent)
    return record


def _checked(record: Record, name: FileName, folder: Path) -> Path:
    """A file of the record's, once it matches its digest."""
    file = folder / name
    if not file.is_file() or sha256_of_file(file) != record.files[name]:
        raise IntegrityError(f"{file} is missing or was changed after the record was written.")
    return file


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a record may hold")
