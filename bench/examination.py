"""A run's findings: those made of the defense before it is attacked, and of the attacks once they have run.

Each is written to the run's folder as soon as it is measured, so that a resume spends nothing on it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from assay import data
from assay.checks import SAMPLES, Subject, broken_run, constancy, examine, run_checks
from assay.checks.eot import LEAST, recommended_draws
from assay.checks.subject import Asked
from assay.finding import Finding
from assay.health import AttackHealth, attackable, averages, raised, with_draws
from assay.job import Job
from assay.noise import Noise
from assay.record import Spent
from assay.rundir import Arrays, RunDir


@dataclass
class Examination:
    """The findings of one run, each measured once.

    Attributes:
        findings: by what was measured, in order.
        spent: what they cost; a board's calibration is not a run's cost.
    """

    job: Job
    store: RunDir
    findings: dict[str, Finding] = field(default_factory=dict)
    spent: Spent = field(default_factory=lambda: Spent(forward=0, backward=0, seconds=0.0))

    def __post_init__(self) -> None:
        self._subject = _subject(self.job, SAMPLES, "preflight")
        self._recall()

    @property
    def missing(self) -> tuple[str, ...]:
        """Checks that the protocol asks for and that have no finding."""
        asked = (*self.job.checks, *(self.job.health.rule.checks if self.job.health else ()))
        return tuple(name for name in asked if name not in self.findings)

    def preflight(self) -> bool:
        """Examines the defense and its gradients; returns whether it may be attacked."""
        for name in self.job.checks:
            self._keep(name, partial(_one, self._subject, name))
            if name == "interface" and self.findings[name].status == "fail":
                break
        return all(finding.status != "fail" for finding in self.findings.values())

    def adapted(self) -> Job:
        """The job with as many draws behind each gradient as the measured noise of the gradients asks for."""
        health, found = self.job.health, self.findings.get("eot")
        if health is None or found is None or not self.job.defense.card.traits.stochastic:
            return self.job
        wanted = recommended_draws(found.data)
        draws = min(wanted, health.rule.most_draws)
        planned = tuple(with_draws(attack, draws) for attack in self.job.planned)
        used = min((int(attack.options["eot"]) for attack in planned if averages(attack.options)), default=draws)
        self.findings["eot"] = _judged(found, used, wanted, health.rule.most_draws)
        certificate = self.job.certificate
        if certificate is not None and averages(certificate.options):
            certificate = replace(certificate, options=raised(certificate.options, draws))
        return replace(self.job, planned=planned, certificate=certificate)

    def health(self, job: Job, arrays: Arrays) -> None:
        """Examines the attacks of the adapted `job`, given what they left."""
        if job.health is None:
            return
        rule = job.health.rule
        if attackable(job):
            samples = rule.stochastic if job.defense.card.traits.stochastic else rule.samples
            subject = replace(_subject(job, samples, "health"), ambient=self._subject.ambient)
            chosen: list[AttackHealth] = []

            def health(name: str = "") -> AttackHealth:
                if not chosen:
                    chosen.append(AttackHealth(job, arrays, subject, rule, name))
                return chosen[0]

            # One unit: these checks share runs of the attack, and those that choose it.
            outcomes = self._keep("outcomes", lambda: health().outcomes(), subject, rule.checks)
            name = str(outcomes[0].data["attack"])
            for check in ("binarization", "ablations"):
                if check in rule.checks:
                    self._keep(check, lambda check=check: [health(name).apart()[check]()])  # type: ignore[misc]
        if "constancy" in rule.checks:
            again = partial(constancy.check, self._subject)
            self._keep("constancy-after", lambda: [examine("constancy", self._subject, again)])
        if "calibration" in rule.checks and job.health.calibration is not None:
            self._keep("calibration", lambda: [self._calibration()])

    def _calibration(self) -> Finding:
        assert self.job.health is not None
        assert self.job.health.calibration is not None
        try:
            return self.job.health.calibration.finding()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return broken_run("calibration", error)

    def _keep(
        self,
        name: str,
        measure: Callable[[], Sequence[Finding]],
        subject: Subject | None = None,
        only: Sequence[str] | None = None,
    ) -> list[Finding]:
        """The findings of a unit, from disk where they were measured before; enters them.

        Args:
            subject: of which the unit counts calls beside those of its findings.
            only: the names of those that are entered.
        """
        file = self.store.check_file(name)
        kept = self.store.read(file)
        if kept is None:
            self.job.reporter.examine(name)
            started, before = time.perf_counter(), subject.calls if subject else (0, 0)
            found = list(measure())
            shared = [
                now - then - sum(getattr(finding, way) for finding in found)
                for way, now, then in zip(("forward", "backward"), subject.calls, before, strict=True)
            ] if subject else [0, 0]  # fmt: skip
            text = json.dumps([finding.model_dump(mode="json") for finding in found], allow_nan=False)
            kept = {
                "findings": np.frombuffer(text.encode(), dtype=np.uint8),
                "shared": np.asarray(shared, dtype=np.int64),
                "seconds": np.asarray([time.perf_counter() - started]),
            }
            self._remember()
            self.store.write(file, kept)
        findings = [Finding.model_validate(each) for each in json.loads(kept["findings"].tobytes())]
        self.findings |= {each.check: each for each in findings if only is None or each.check in only}
        if name != "calibration":
            self.spent = Spent(
                forward=self.spent.forward + sum(each.forward for each in findings) + int(kept["shared"][0]),
                backward=self.spent.backward + sum(each.backward for each in findings) + int(kept["shared"][1]),
                seconds=round(self.spent.seconds + float(kept["seconds"][0]), 3),
            )
        self.job.reporter.examined(name)
        return findings

    def _remember(self) -> None:
        """Keeps the defense's first answer and gradient for the process that resumes this one."""
        memory = self._subject.memory
        arrays: Arrays = {"asked_again": np.asarray([memory.asked_again])}
        for name, asked in (("answer", memory.answer), ("gradient", memory.gradient)):
            if asked is not None:
                parts = {
                    "images": asked.images,
                    "x": asked.x,
                    "keys": asked.noise.keys,
                    "slots": asked.noise.slots,
                    "logits": asked.logits,
                }
                parts |= {} if asked.gradient is None else {"gradient": asked.gradient}
                arrays |= {f"{name}/{part}": value.cpu().numpy() for part, value in parts.items()}
        self.store.write(self.store.check_file("memory"), arrays)

    def _recall(self) -> None:
        kept = self.store.read(self.store.check_file("memory"))
        if kept is None:
            return
        memory, x = self._subject.memory, self._subject.x
        memory.asked_again = int(kept["asked_again"][0])

        def asked(name: str) -> Asked | None:
            found: dict[str, Any] = {
                key.removeprefix(f"{name}/"): torch.from_numpy(value.copy())
                for key, value in kept.items()
                if key.startswith(f"{name}/")
            }
            if not found:
                return None
            noise = Noise(found.pop("keys"), found.pop("slots"))
            return Asked(noise=noise, **{key: value.to(x.device) for key, value in found.items()})

        memory.answer, memory.gradient = asked("answer"), asked("gradient")


def _one(subject: Subject, name: str) -> list[Finding]:
    return list(run_checks(subject, (name,)))


def _subject(job: Job, samples: int, stream: str) -> Subject:
    ids = job.ids[:samples]
    x, y = data.load(job.board.dataset, ids, device=job.device)
    return Subject(job.defense, x, y, ids, Noise.from_seed(job.seed, ids).child(stream), job.board.threat)


def _judged(found: Finding, used: int, wanted: int, most: int) -> Finding:
    """The finding with what the run made of it: too few draws are an objection, except to a profile that is no row."""
    told = found.model_copy(update={"data": {**found.data, "used": used}})
    if used >= wanted or most < LEAST or found.status == "fail":
        return told
    message = f"{found.message} The attacks of this run average {used}, the most that the profile has room for."
    return told.model_copy(update={"status": "flag", "message": message})
