"""All that determines a run's result, and the stages that each of its shards passes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from assay.attack import AttackSpec
from assay.boards import Board
from assay.calibrating import Calibration
from assay.certifying import CERTIFY, PlannedCertificate
from assay.defense import Defense
from assay.protocol import PlannedAttack
from assay.reporter import Reporter, Silent
from assay.rules import SELECTION, Health
from assay.shortlist import Round

CLEAN, FINAL = "clean", "final"


@dataclass(frozen=True)
class PlannedHealth:
    """What is asked about a run's attacks once they have run.

    Attributes:
        rule: which checks, on how many images.
        calibration: of the board, for which nothing is measured twice.
    """

    rule: Health
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Job:
    """All that determines a run's result.

    Attributes:
        defense: in evaluation mode, parameters frozen, on `device`.
        board: with `ids`, the samples to run (a prefix of the board's).
        planned: the attacks to run, in order.
        attacks: registry name -> attack, for those of `planned`.
        source: the undefended model whose adversarial examples are transferred.
        checks: names of the checks that precede the attacks.
        seed: the run's seed.
        selection: rounds of the last choice among a stochastic defense's candidates.
        certificate: the certified half, where the defense certifies and the board has radii.
        health: None where attacks were left out on request, or none runs.
    """

    defense: Defense
    board: Board
    ids: tuple[int, ...]
    planned: tuple[PlannedAttack, ...]
    attacks: Mapping[str, AttackSpec]
    source: Defense | None
    checks: tuple[str, ...]
    seed: int
    selection: tuple[Round, ...] = SELECTION
    certificate: PlannedCertificate | None = None
    health: PlannedHealth | None = None
    device: str = "cpu"
    reporter: Reporter = field(default_factory=Silent)

    @property
    def shards(self) -> list[tuple[int, ...]]:
        """The sample ids of each shard."""
        size = self.board.shard
        return [self.ids[i : i + size] for i in range(0, len(self.ids), size)]

    @property
    def stages(self) -> list[str]:
        """The stages of a shard, in order."""
        return [*self.scored, *self.certifying]

    @property
    def scored(self) -> list[str]:
        """The stages whose candidates are scored; none where the certified half runs alone."""
        alone = self.certificate is not None and self.certificate.attack is None
        return [] if alone else [CLEAN, *(attack.name for attack in self.planned), FINAL]

    @property
    def certifying(self) -> list[str]:
        """The stages of the certified half."""
        return [CERTIFY, *self.certificate.attacked] if self.certificate is not None else []
