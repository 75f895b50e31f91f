"""Audits: adversarial examples that somebody else found, and what they lower a row to. The files, without torch.

An audit lies in `audits/BOARD/DEFENSE/PROFILE/NNN.json` of a leaderboards folder, its examples beside it. The numbers
are the history: an audit is never overwritten, and each begins where the one before it ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from assay.card import SLUG, Strict, explain
from assay.digest import sha256_of_bytes, sha256_of_file, sha256_of_json
from assay.errors import InputError, IntegrityError
from assay.record import Record, write_atomically

SCHEMA: Literal["assay-audit/1"] = "assay-audit/1"
AUDITS = "audits"
_NUMBERED = re.compile(r"(\d{3,})\.(json|safetensors)")
_ROUNDING = 1e-9
"""Means of the same scores, added up in another order."""


class AuditedBundle(Strict):
    """The examples behind an audit.

    Attributes:
        file: beside the audit; it holds the examples of `Audit.samples`, in their order.
        sha256: of that file.
        given_sha256: of the file that was handed in, which may have held examples that lower nothing.
    """

    file: str = Field(pattern=r"^\d{3,}\.safetensors$")
    sha256: str
    given_sha256: str


class AuditedSample(Strict):
    """One sample that the audit lowers.

    Attributes:
        expected: its score in [0, 1] under the board's ranking rule, on draws that chose nothing.
        norm: how far the example lies from its image, in the board's norm.
    """

    id: int = Field(ge=0)
    expected: float = Field(ge=0, le=1)
    norm: float = Field(ge=0)


class Signature(Strict):
    """Who found an audit's examples; `note` and `url` say more. Other people's text: one printable line each."""

    by: str = Field(min_length=1, max_length=200)
    note: str = Field(default="", max_length=2000)
    url: str = Field(default="", pattern=r"^(https?://\S+)?$", max_length=600)

    @field_validator("by", "note", "url")
    @classmethod
    def _one_line(cls, text: str) -> str:
        # Control characters and marks that turn the writing direction could fake other lines of a report.
        if not text.isprintable():
            raise ValueError("expected one line of printable text")
        return text

    @field_validator("by")
    @classmethod
    def _signed(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("expected a name")
        return text


class Audit(Signature):
    """What somebody's adversarial examples do to a row.

    Attributes:
        record_digest: of the record that it is about; another record of the same defense is not concerned.
        defense: the card's name.
        samples: those that it lowers; of a stochastic defense beyond chance (`assay.auditing`).
        n_valid: examples inside the ball and the box. `n_invalid` were not, or not finite: `reasons` counts why.
        draws, seed: behind the scores; an audit can be repeated to the last bit on the same hardware.
        value_before, value_after: best known robust accuracy over the record's samples.
        digest: of all of this, its own field left out.
    """

    schema_: Literal["assay-audit/1"] = Field(default=SCHEMA, alias="schema")
    record_digest: str
    board: str = Field(pattern=SLUG)
    defense: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    bundle: AuditedBundle
    samples: tuple[AuditedSample, ...] = Field(min_length=1)
    n_valid: int = Field(ge=1)
    n_invalid: int = Field(ge=0)
    reasons: dict[str, int] = Field(default_factory=dict)
    draws: int = Field(ge=1)
    seed: int = Field(ge=0)
    value_before: float = Field(ge=0, le=1)
    value_after: float = Field(ge=0, le=1)
    digest: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Audit:
        ids = [sample.id for sample in self.samples]
        if len(set(ids)) != len(ids):
            raise ValueError("a sample is audited twice")
        if len(ids) > self.n_valid or sum(self.reasons.values()) != self.n_invalid:
            raise ValueError("the counts of valid and invalid examples don't add up")
        if self.value_after > self.value_before:
            raise ValueError("an audit lowers a value, it never raises one")
        return self

    def sealed(self) -> Audit:
        """This audit with its digest filled in."""
        return self.model_copy(update={"digest": _digest(self.as_json())})

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, as written."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return data


def _digest(plain: dict[str, Any]) -> str:
    return sha256_of_json({key: value for key, value in plain.items() if key != "digest"})


def read_audits(folder: Path, record: Record) -> tuple[Audit, ...]:
    """The audits of a record in a leaderboards folder, the oldest first.

    Audits of an earlier record of the same defense are left out: what they found can be audited again.

    Raises:
        IntegrityError: for a file that is no audit, was changed after it was written, has lost its examples, or
            doesn't begin where the one before it ended.
    """
    found = []
    value = record.results.robust.value if record.results is not None else None
    for number, file in sorted(_numbered(folder / AUDITS / record.place, "json").items()):
        audit = _read(file, number)
        if audit.record_digest != record.digest:
            continue
        if value is None or abs(audit.value_before - value) > _ROUNDING:
            raise IntegrityError(
                f"{file} lowers a best known value of {audit.value_before}, but what stands before it says {value}: "
                f"an earlier audit is missing, or this one is of another record."
            )
        found.append(audit)
        value = audit.value_after
    return tuple(found)


def _read(file: Path, number: int) -> Audit:
    if file.is_symlink():
        raise IntegrityError(f"{file} is a symbolic link; an audit is a file.")
    try:
        text = file.read_text()
        audit = Audit.model_validate_json(text, strict=True)
        found = _digest(json.loads(text))
    except (OSError, ValueError, ValidationError) as error:
        reason = explain(error) if isinstance(error, ValueError) else str(error)
        raise IntegrityError(f"{file} is not a valid audit: {reason}") from error
    if found != audit.digest:
        raise IntegrityError(f"{file} was changed after it was written: its digest says {audit.digest}.")
    bundle = file.with_name(audit.bundle.file)
    if audit.bundle.file != _name(number, "safetensors"):
        raise IntegrityError(
            f"{file} names {audit.bundle.file} as its examples, expected {_name(number, 'safetensors')}."
        )
    if bundle.is_symlink() or not bundle.is_file() or sha256_of_file(bundle) != audit.bundle.sha256:
        raise IntegrityError(f"{bundle} is missing or was changed after its audit was written.")
    return audit


def lowered(scores: Mapping[int, float], audits: Iterable[Audit]) -> dict[int, float]:
    """Best known scores by sample id: of a record's own, the least that any audit found.

    Raises:
        IntegrityError: for an audit of a sample that the record doesn't have.
    """
    known = dict(scores)
    for audit in audits:
        for sample in audit.samples:
            if sample.id not in known:
                raise IntegrityError(f"an audit by {audit.by} is of sample {sample.id}, which the record doesn't have.")
            known[sample.id] = min(known[sample.id], sample.expected)
    return known


def write_audit(folder: Path, record: Record, audit: Audit, examples: bytes) -> Path:
    """Adds an audit to a record's history; returns its file. The examples are written first.

    Args:
        folder: a leaderboards folder.
        audit: whose `bundle.file`, `bundle.sha256` and `digest` are filled in here.

    Raises:
        InputError: for a folder without boards.
    """
    if not (folder / "boards").is_dir():
        raise InputError(f"{folder} holds no boards/; expected a leaderboards folder.")
    place = folder / AUDITS / record.place
    place.mkdir(parents=True, exist_ok=True)
    # Examples without an audit are what a crash left: their number is not used again.
    number = 1 + max((*_numbered(place, "json"), *_numbered(place, "safetensors")), default=0)
    bundle = audit.bundle.model_copy(update={"file": _name(number, "safetensors"), "sha256": sha256_of_bytes(examples)})
    sealed = audit.model_copy(update={"bundle": bundle}).sealed()
    write_atomically(place / bundle.file, examples)
    text = json.dumps(sealed.as_json(), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(place / _name(number, "json"), text.encode() + b"\n")
    return place / _name(number, "json")


def _numbered(place: Path, suffix: str) -> dict[int, Path]:
    """The files of a history, by number."""
    files = list(place.iterdir()) if place.is_dir() else []
    matches = [(file, _NUMBERED.fullmatch(file.name)) for file in files]
    return {int(match[1]): file for file, match in matches if match is not None and match[2] == suffix}


def _name(number: int, suffix: str) -> str:
    return f"{number:03d}.{suffix}"
