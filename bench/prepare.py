"""From names to a run that can start: what is mandatory for this defense on this board, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from assay import __version__, data, provenance
from assay.boards import Board, board_names, load_board
from assay.calibrating import WHITE, Calibration
from assay.card import Card
from assay.certifying import PlannedCertificate, check_card
from assay.defense import Defense, DefenseSpec
from assay.digest import ids_digest, sha256_of_file
from assay.errors import InputError, nearest
from assay.job import Job, PlannedHealth
from assay.protocol import PlannedAttack, ProfileName, Protocol, load_protocol
from assay.record import (
    BoardRef,
    DefenseRef,
    ProtocolRef,
    ThreatRef,
)
from assay.registry import ATTACKS, DEFENSES, resolve_certificate, resolve_defense
from assay.rules import Certifying


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
            "defense": self.defense_ref.model_dump(mode="json"),
            "transfer_source": provenance.state_sha256(job.source) if job.source is not None else None,
            "board": self.board_ref.model_dump(mode="json"),
            "protocol": self.protocol_ref.model_dump(mode="json"),
            "attacks": {attack.name: dict(attack.options) for attack in job.planned},
            "certificate": _certificate_plan(job.certificate),
            "health": job.health is not None,
            "ids": list(job.ids),
            "shard": job.board.shard,
            "seed": job.seed,
            "device": job.device,
            "threads": provenance.threads(),
        }

    @cached_property
    def defense_ref(self) -> DefenseRef:
        """The defense as a record names it: its files and parameters as they were when this was first asked for."""
        weights = {name: sha256_of_file(path) for name, path in self.weight_files.items()}
        source = sha256_of_file(self.spec.source) if self.spec.source else None
        options = self.spec.recorded(self.job.board.dataset, self.options)
        return DefenseRef(
            name=self.name,
            card=self.spec.card,
            options=options,
            weights=weights,
            source_sha256=source,
            # Foreign code loads its weights from wherever it likes: what was loaded counts.
            state_sha256=provenance.state_sha256(self.job.defense),
        )

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
    certify_only: bool = False,
    trust: bool = False,
    options: Mapping[str, str] | None = None,
) -> Prepared:
    """Resolves names, loads weights, and works out the mandatory attacks.

    Args:
        name: a registered defense, `module:object` or `path.py:object`.
        board: a board's name or a path to its TOML.
        n: how many of the board's samples, by default the profile's.
        only: run these mandatory attacks alone; the record is then incomplete.
        certify_only: run the certified half alone, without any attack.
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
    spec = resolve_defense(name, trust=trust, norm=board.norm)
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
    if certify_only:
        missing = {planned.name: "not asked for (assay certify)" for planned in mandatory}
    missing |= {planned.name: "not asked for (--attack)" for planned in mandatory if only and planned.name not in only}
    rule = protocol.certifying[profile]
    certificate = _plan_certificate(defense, spec, board, rule, attacks=not certify_only, trust=trust)
    if certificate is None and certify_only:
        raise InputError(f"nothing to certify: {_why_not(spec, defense, board)}")
    if certificate is not None and only:
        certificate, missing = None, missing | {"certify": "not asked for (--attack)"}
    left_out = certify_only or any(only and attack.name not in only for attack in mandatory)
    planned = tuple(attack for attack in mandatory if attack.name not in missing)
    transfers = tuple(attack.name for attack in planned if attack.options.get("source") == "board")
    source_model = None
    if transfers:
        try:
            source_model = DEFENSES[board.source].build(board.dataset, device)
        except InputError as error:
            # Its weights may come with a package that is not here: the record is then incomplete, and says why.
            missing |= dict.fromkeys(transfers, f"{board.source}, which it transfers from, can't be loaded: {error}")
            planned = tuple(attack for attack in planned if attack.name not in transfers)
    job = Job(
        defense=defense,
        board=board,
        ids=board.ids[:size],
        planned=planned,
        attacks={attack.attack: ATTACKS[attack.attack] for attack in planned},
        source=source_model,
        checks=protocol.checks,
        seed=seed,
        selection=protocol.selection,
        certificate=certificate,
        # Some attacks alone are no measurement of a row, so nothing is asked about them.
        health=None if left_out else _plan_health(protocol, profile, board, device),
        device=device,
    )
    resolved = replace(spec, card=defense.card)
    return Prepared(name, resolved, job, protocol, profile, mandatory, missing, options)


def _plan_health(protocol: Protocol, profile: ProfileName, board: Board, device: str) -> PlannedHealth:
    """What is asked about the attacks, with the board's calibration: all known-broken defenses that have weights."""
    rule = protocol.health[profile]
    if "calibration" not in rule.checks:
        return PlannedHealth(rule)
    known_broken = {
        spec.card.name: spec
        for spec in map(DEFENSES.__getitem__, DEFENSES)
        if spec.card.known_broken and board.dataset in spec.card.datasets
    }
    classes = data.describe(board.dataset).n_classes
    # The linear model's card has no traits.
    cards = [Card(name="linear", title="Linear", summary=""), *(each.card for each in known_broken.values())]
    demanded = [attack for card in cards for attack in protocol.plan(card, classes, profile)]
    planned = {
        (attack.attack, repr(sorted(attack.options.items()))): attack
        for attack in demanded
        if attack.family in (*WHITE, "black-box") and not attack.missing
    }
    attacks = {attack.attack: ATTACKS[attack.attack] for attack in planned.values()}
    digest = protocol.digest(profile)
    undefended = DEFENSES[board.source]
    return PlannedHealth(
        rule,
        Calibration(
            board, digest, tuple(planned.values()), attacks, known_broken, undefended, rule.calibrating, device
        ),
    )


def _plan_certificate(
    defense: Defense, spec: DefenseSpec, board: Board, rule: Certifying, *, attacks: bool, trust: bool
) -> PlannedCertificate | None:
    """The certified half of a run; None where the defense or the board has none.

    Raises:
        InputError: for a card whose certificate is unknown, unsound, or about another model, or a certificate
            that can't work on the defense.
    """
    card = defense.card
    if not card.certificate:
        return None
    certificate, file = resolve_certificate(card.certificate, trust=trust, beside=spec.source)
    check_card(card, certificate)
    try:
        knobs = certificate.knobs(defense.certified())
    except NotImplementedError as error:
        raise InputError(f"{card.name} can't be certified by {card.certificate}: {error}; implement it.") from error
    try:
        plain = json.loads(json.dumps(knobs, allow_nan=False)) == knobs
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise InputError(
            f"the knobs of {card.certificate} must be plain JSON data, without NaN or tuples; got {knobs!r}."
        )
    if not board.radii:
        return None
    attack = ATTACKS[rule.attack] if attacks else None
    options = rule.stochastic if card.traits.stochastic else rule.options
    digest = sha256_of_file(file) if file else None
    return PlannedCertificate(certificate, card.certificate, knobs, board.radii, rule, attack, options, digest)


def _why_not(spec: DefenseSpec, defense: Defense, board: Board) -> str:
    if not board.radii:
        others = [name for name in board_names() if load_board(name).radii]
        return f"board {board.name} has no radii. These have: {', '.join(others)}."
    options = f" Perhaps one of its options changes that: {', '.join(spec.options)}." if spec.options else ""
    return f"the card of {defense.card.name} names no certificate.{options}"


def _certificate_plan(planned: PlannedCertificate | None) -> dict[str, Any] | None:
    if planned is None:
        return None
    return {
        "name": planned.name,
        "source_sha256": planned.source_sha256,
        "knobs": dict(planned.knobs),
        "radii": list(planned.radii),
        "budget": asdict(planned.rule.budget),
        "attack": [planned.attack.name, dict(planned.options)] if planned.attack else None,
    }


def check_device(device: str) -> None:
    """Raises InputError for a device that torch doesn't know or that isn't here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {device!r} can't be used here ({reason.rstrip('.')}): use 'cpu', or 'cuda' where there is one."
        ) from error
