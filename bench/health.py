"""What is asked of a run's attacks once they have run, and of which of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from assay.calibrating import WHITE
from assay.checks import HEALTH, Evidence, Subject, ablations, binarization, examine
from assay.checks.evidence import Scores, StageScores
from assay.defense import Defense
from assay.errors import DefenseError
from assay.finding import Finding
from assay.job import CLEAN, Job
from assay.protocol import PlannedAttack
from assay.reduce import scores_of
from assay.rules import Health, Options
from assay.rundir import Arrays

SHARED = 0.9
"""Attacks that met nearly the same samples, and half of all, are compared by what they left of those; others have to be
run again."""


class AttackHealth:
    """The strongest white-box attack of a run, and what is asked of it.

    Args:
        subject: the images it is run on again.
        name: the attack's, where it was chosen before.
    """

    def __init__(self, job: Job, arrays: Arrays, subject: Subject, rule: Health, name: str = "") -> None:
        white = [attack for attack in job.planned if attack.family in WHITE]
        runs = {attack.name: _evidence(job, arrays, attack, subject) for attack in white}
        left = {} if name else _left(job, arrays, runs)
        self.attack = next(attack for attack in white if attack.name == name) if name else _weakest(white, left)
        again = [runs[attack.name] for attack in white if attack is not self.attack and runs[attack.name].made]
        self.evidence = replace(runs[self.attack.name], others=tuple(each.attacked() for each in again))
        self._job, self._subject, self._rule = job, subject, rule

    def outcomes(self) -> list[Finding]:
        """What follows from running the attack otherwise; these checks share its runs."""
        return [self._told(name, partial(check, self.evidence)) for name, check in HEALTH.items()]

    def apart(self) -> Mapping[str, Callable[[], Finding]]:
        """Checks that share nothing: planted boundaries, and the defense without its mechanism."""
        return {
            "binarization": partial(self._told, "binarization", self._planted),
            "ablations": partial(self._told, "ablations", self._ablated),
        }

    def _planted(self) -> Finding:
        """With a shorter search than the attack's own, which is spent on what that one missed."""
        own = dict(self.attack.options)
        known = {name: self.evidence.option(name) for name in self._rule.planted}
        shorter = {name: min(value, known[name]) for name, value in self._rule.planted.items() if known[name]}
        longer = own if any(known[name] != value for name, value in shorter.items()) else None
        return binarization.check(self._subject, self.evidence.attack, {**own, **shorter}, longer)

    def _ablated(self) -> Finding:
        found: dict[str, Defense] = {}
        if self._job.source is not None:
            found["the undefended model"] = self._job.source
        if "stages" in self._job.defense.card.handles:
            found["the defense without its purifier"] = ablations.identity_purifier(self._job.defense)
        return ablations.check(self.evidence, found)

    def _told(self, name: str, measure: Callable[[], Finding]) -> Finding:
        finding = examine(name, self._subject, measure, blamed=DefenseError)
        return finding.model_copy(update={"data": {"attack": self.attack.name, **finding.data}})


def attackable(job: Job) -> bool:
    """Whether any attack of the run follows a gradient of the whole defense."""
    return any(attack.family in WHITE for attack in job.planned)


def _left(job: Job, arrays: Arrays, runs: Mapping[str, Evidence]) -> Mapping[str, Scores]:
    """What each attack left of the same samples: of the board's, or of the subject's, on which it is then run again.

    The cascade spares an attack what an earlier one has broken beyond doubt, so what attacks of a deterministic
    defense left of the board can't be compared.
    """
    met = np.stack([arrays[f"{name}/attempted"] for name in runs])
    common = np.logical_and.reduce(met)
    if common.sum() >= max(SHARED * met.sum(1).max(), met.shape[1] / 2):
        return {name: scores_of(arrays, name, _draws(job))[common] for name in runs}
    return {name: run.attacked() for name, run in runs.items()}


def _weakest(white: Sequence[PlannedAttack], left: Mapping[str, Scores]) -> PlannedAttack:
    """The attack that leaves least; of those within one sample of it the cheapest, and of these the last.

    One whose search has a length comes before any other.
    """
    able = [attack for attack in white if "steps" in attack.options] or list(white)
    means = {attack.name: float(left[attack.name].mean()) for attack in able}
    least = min(means.values()) + 1 / max(1, len(left[able[0].name])) + 1e-9
    close = [attack for attack in able if means[attack.name] <= least]
    return min(reversed(close), key=lambda attack: attack.forward + attack.backward)


def _evidence(job: Job, arrays: Arrays, attack: PlannedAttack, subject: Subject) -> Evidence:
    return Evidence(
        subject=subject,
        attack=job.attacks[attack.attack].attack,
        options=dict(attack.options),
        n_draws=_draws(job),
        stages={planned.name: _stage(job, arrays, planned) for planned in job.planned},
        clean=scores_of(arrays, CLEAN, _draws(job)),
    )


def _stage(job: Job, arrays: Arrays, attack: PlannedAttack) -> StageScores:
    return StageScores(
        family=attack.family,
        attempted=arrays[f"{attack.name}/attempted"],
        score=scores_of(arrays, attack.name, _draws(job)),
        certain=arrays[f"{attack.name}/certain"],
        ids=tuple(arrays["id"].tolist()),
    )


def _draws(job: Job) -> int:
    return job.board.draws if job.defense.card.traits.stochastic else 1


def averages(options: Options) -> bool:
    """Whether an attack averages gradients over draws, and may be told over how many."""
    return "clip" in options and "eot" in options


def raised(options: Options, draws: int) -> dict[str, Any]:
    """The options with at least so many draws."""
    return {**options, "eot": max(int(options["eot"]), draws)}


def with_draws(attack: PlannedAttack, draws: int) -> PlannedAttack:
    """The attack with at least so many draws behind a gradient; unchanged where it averages none."""
    if not averages(attack.options) or attack.options["eot"] >= draws:
        return attack
    more = draws / int(attack.options["eot"])
    return replace(
        attack,
        options=raised(attack.options, draws),
        forward=round(more * attack.forward),
        backward=round(more * attack.backward),
    )
