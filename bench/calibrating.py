"""The calibration of a board: measured once for a board, a protocol and this code, then read from the user's cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from pydantic import ValidationError

from assay import data, provenance
from assay.attack import AttackSpec
from assay.boards import Board
from assay.checks.calibration import check_board
from assay.defense import DefenseSpec
from assay.digest import ids_digest, sha256_of_json
from assay.finding import Finding
from assay.noise import Noise
from assay.protocol import PlannedAttack
from assay.record import write_atomically

_LOG = logging.getLogger(__name__)
WHITE = frozenset({"pgd", "apgd", "bpda", "chain", "surrogate", "step-losses", "diffhammer"})
"""Families that follow a gradient of the whole defense."""


def cache_folder() -> Path:
    """Where measurements that several runs share are kept: `ASSAY_CACHE`, by default the user's own cache."""
    return Path(os.environ.get("ASSAY_CACHE") or user_cache_path("assay"))


def machine_key(device: str) -> dict[str, Any]:
    """Everything but its subject that decides a measurement to the last bit: code, packages, processor, threads."""
    return {
        "code": provenance.code_sha256(),
        "packages": provenance.package_versions(),
        "machine": provenance.machine(),
        "device": [device, _model(device)],
        "threads": provenance.threads(),
    }


def _model(device: str) -> str:
    """What kind of processor it is, as far as that decides the last bits of a number."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.backends.cpu.get_cpu_capability())


@dataclass(frozen=True)
class Calibration:
    """What a board's attacks are held against before its rows are believed.

    Attributes:
        board: whose images, threat model and draws these are; it takes the first `samples` of its ids.
        protocol: the digest of what the protocol prescribes.
        planned: the attacks, white box and black, that the protocol demands of a linear model and of known-broken
            defenses.
        attacks: registry name -> attack, for those of `planned`.
        known_broken: registered defenses known to be broken that have weights for the board's data, by name.
        undefended: the board's undefended model.
    """

    board: Board
    protocol: str
    planned: tuple[PlannedAttack, ...]
    attacks: Mapping[str, AttackSpec]
    known_broken: Mapping[str, DefenseSpec]
    undefended: DefenseSpec
    samples: int
    device: str = "cpu"

    def finding(self) -> Finding:
        """The finding, from the cache where it was measured before."""
        file = cache_folder() / "calibration" / f"{self._key()}.json"
        try:
            return Finding.model_validate_json(file.read_text())
        except (OSError, ValidationError):
            found = self._measure()
        if found.status == "fail":  # for somebody to repair, and then to be measured again
            return found
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, found.model_dump_json(indent=1).encode() + b"\n")
        except OSError as error:
            _LOG.warning("the calibration can't be cached in %s: %s", file.parent, error)
        return found

    def _measure(self) -> Finding:
        ids = self.board.ids[: self.samples]
        x, y = data.load(self.board.dataset, ids, device=self.device)
        return check_board(
            self.board.threat,
            x,
            y,
            # Of its own seed: the board is calibrated, not a run.
            Noise.from_seed(0, ids).child("calibration"),
            [(self.attacks[attack.attack].attack, attack.options) for attack in self.planned],
            {name: spec.build(self.board.dataset, self.device) for name, spec in self.known_broken.items()},
            # It is asked for nothing else; its weights may come with a package that is not here.
            undefended=self.undefended.build(self.board.dataset, self.device) if self.known_broken else None,
            train=data.load(self.board.dataset, self.board.ids, device=self.device),
            n_draws=self.board.draws,
            ids=ids,
        )

    def _key(self) -> str:
        board, held = self.board, {**self.known_broken, "": self.undefended}
        return sha256_of_json(
            {
                "board": [board.name, board.dataset, board.revision, board.norm, board.eps, board.draws],
                "ids": ids_digest(board.ids),
                "protocol": self.protocol,
                "weights": {name: spec.card.weights for name, spec in held.items()},
                **machine_key(self.device),
            }
        )
