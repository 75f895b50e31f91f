"""The cascade on one shard: what stands, each sample's best candidate, and whether it counts.

Whether a candidate counts is decided here and nowhere else: its budget in float64, its score with fresh draws.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay import data
from assay.attack import AttackSpec, Target
from assay.bounds import NO_CLASS
from assay.certifying import CERTIFY, answers_are_certified, certify, judge, standing_at, tally, threat_at
from assay.errors import AssayError, AttackError, CertificateError
from assay.guard import Named, vote
from assay.job import CLEAN, FINAL, Job
from assay.noise import Noise
from assay.norms import TOLERANCE, distance, violation
from assay.protocol import PlannedAttack
from assay.rundir import Arrays
from assay.shortlist import Shortlist
from assay.target import Calls
from assay.threat import ThreatModel
from assay.transferred import transferred


class Shard:
    """The cascade's state on one shard: which samples stand, and the best candidate of each."""

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.ids = job.shards[index]
        self.x, self.y = data.load(job.board.dataset, self.ids, device=job.device)
        self.noise = Noise.from_seed(job.seed, self.ids)
        self.draws = job.board.draws if job.defense.card.traits.stochastic else 1
        self.shortlist = Shortlist(self.x, job.selection[0][0] if self.draws > 1 else 1)
        self.standing = np.ones(len(self.ids), dtype=bool)
        self.arrays: Arrays = {
            "id": np.asarray(self.ids, dtype=np.int64),
            "label": self.y.cpu().numpy(),
        }

    def concerns(self, stage: str) -> int:
        """How many samples a stage is about."""
        planned = self.job.certificate
        if planned is not None and stage in planned.attacked:
            return int(standing_at(planned, stage, self.arrays).sum())
        return len(self.ids) if stage == CERTIFY else int(self.standing.sum())

    def run(self, stage: str) -> Arrays:
        """Computes a stage; the state is changed by `absorb` alone, so that a resume sees the same."""
        if stage == CLEAN:
            return self._score(stage, np.ones(len(self.ids), dtype=bool), self.x)
        if stage == FINAL:
            return self._repeat_lowest() if self.draws == 1 else self._choose_and_score()
        if stage == CERTIFY:
            return self._certify()
        if stage in self.job.certifying:
            return self._attack_radius(stage)
        planned = next(attack for attack in self.job.planned if attack.name == stage)
        return self._attack(planned)

    def absorb(self, stage: str, part: Arrays) -> None:
        """Takes a stage's outcome into the cascade's state."""
        if stage == FINAL:
            self.arrays["adversarial"] = part["candidate"]
        elif stage in self.job.scored:
            rows = torch.from_numpy(part["attempted"].nonzero()[0])
            candidates = torch.from_numpy(part["candidate"]) if "candidate" in part else self.x[rows]
            # One that is certainly broken keeps the candidate of which that was confirmed.
            scores = torch.from_numpy(part["correct"] - part["certain"])
            self.shortlist.offer(rows, candidates, scores[rows])
            self.standing &= ~part["certain"]
        self.arrays |= {f"{stage}/{key}": value for key, value in part.items() if key != "candidate"}

    def _attack(self, planned: PlannedAttack) -> Arrays:
        rows = torch.from_numpy(self.standing.nonzero()[0])
        if len(rows) == 0:
            return self._score(planned.name, self.standing, self.x[rows])
        spec = self.job.attacks[planned.attack]
        x_adv, calls, seconds = self._candidates(planned.name, spec, self.job.board.threat, rows, planned.options)
        part = self._score(planned.name, self.standing, x_adv)
        part["forward"] += calls.forward.numpy()
        part["backward"] += calls.backward.numpy()
        # A transfer takes no calls of the defense.
        weight = calls.forward.numpy() if int(calls.forward.sum()) else self.standing.astype(np.int64)
        part["seconds"] += seconds * weight / weight.sum()
        part["candidate"] = x_adv.cpu().numpy()
        return part

    def _candidates(
        self, name: str, spec: AttackSpec, threat: ThreatModel, rows: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Calls, float]:
        """An attack's candidates for some rows, inside their budget; its calls; wall seconds."""
        job, n = self.job, len(self.ids)
        target = Target(job.defense, n, white_box=not spec.black_box, on_calls=job.reporter.calls)
        noise = self.noise.child("attack", name)
        started = time.perf_counter()
        with self._named(f"attack {name}"):
            if options.get("source") == "board":
                x_adv = transferred(job, spec.attack, options, self.ids, self.x, self.y, noise)[rows]
            else:
                x_adv = spec.attack(target, self.x[rows], self.y[rows], threat, noise[rows], **options)
        seconds = time.perf_counter() - started
        # Against the images as they are here: an attack may have moved its own copy of them.
        self._check_budget(name, threat, x_adv, self.x[rows], rows)
        return x_adv.detach(), target.calls, seconds

    def _certify(self) -> Arrays:
        assert self.job.certificate is not None
        target = Target(self.job.defense, len(self.ids), on_calls=self.job.reporter.calls)
        with self._named(f"certificate {self.job.certificate.name}", CertificateError):
            return certify(self.job.certificate, target, self.x, self.y, self.noise.child("certify"))

    def _attack_radius(self, stage: str) -> Arrays:
        """The strongest adversarial example at a radius, judged by the certified model.

        At the board's own eps that is the cascade's choice, at a larger radius the choice where it breaks
        the model and the attack's candidate elsewhere.
        """
        planned = self.job.certificate
        assert planned is not None
        assert planned.attack is not None
        n, threat = len(self.ids), threat_at(planned, stage)
        standing = standing_at(planned, stage, self.arrays)
        part: Arrays = {
            "attempted": standing,
            "broken": np.zeros(n, dtype=bool),
            "sure": np.zeros(n, dtype=bool),
            "answer": np.full(n, NO_CLASS, dtype=np.int64),
            "distance": np.zeros(n),
            "forward": np.zeros(n, dtype=np.int64),
            "backward": np.zeros(n, dtype=np.int64),
            "seconds": np.zeros(n),
        }
        started = time.perf_counter()
        points = torch.from_numpy(self.arrays["adversarial"].copy()).to(self.x)
        noise = self.noise.child("judge", stage)
        rows = standing.nonzero()[0]
        if threat.eps >= self.job.board.threat.eps:
            # The final stage has scored these already: `final/certain` says where the defense is wrong throughout.
            self._judge(stage, part, rows, points, noise.child("choice"), scored=True)
            rows = (standing & ~part["broken"]).nonzero()[0]
        if threat.eps != self.job.board.threat.eps and len(rows):
            index = torch.from_numpy(rows)
            x_adv, calls, _ = self._candidates(stage, planned.attack, threat, index, planned.options)
            points[index.to(points.device)] = x_adv
            part["forward"] += calls.forward.numpy()
            part["backward"] += calls.backward.numpy()
            self._judge(stage, part, rows, points, noise, scored=False)
        part["seconds"] = np.where(standing, (time.perf_counter() - started) / max(1, int(standing.sum())), 0.0)
        broken = part["broken"]
        part["broken_id"] = self.arrays["id"][broken]
        part["broken_x"] = points[torch.from_numpy(broken).to(points.device)].cpu().numpy()
        return part

    def _judge(
        self, stage: str, part: Arrays, rows: NDArray[np.int64], points: Tensor, noise: Noise, *, scored: bool
    ) -> None:
        """Enters what the certified model answers to some rows' points, and unless `scored` what the defense does."""
        assert self.job.certificate is not None
        if not len(rows):
            return
        index = torch.from_numpy(rows)
        planned = self.job.certificate
        target = Target(self.job.defense, len(self.ids), on_calls=self.job.reporter.calls)
        certified = planned.derive(self.arrays).claims[rows, list(planned.attacked).index(stage)]
        with self._named("the judgement of the certified model", CertificateError):
            found = judge(planned, target, self.x[index], points[index], self.y[index], certified, noise[index])
        kept = np.flatnonzero(certified & ~found["broken"])
        if not scored and len(kept) and answers_are_certified(planned.certificate):
            # What a certificate says of its own claims is held against what the defense answers.
            with self._named("the evaluation"):
                lost = self._wrong_throughout(target, points, index[torch.from_numpy(kept)], noise.child("answers"))
            found["broken"][kept] |= lost
            found["sure"][kept] |= lost
        for key, value in found.items():
            part[key][rows] = value
        part["forward"] += target.calls.forward.numpy()

    def _check_budget(self, name: str, threat: ThreatModel, x_adv: Tensor, x: Tensor, rows: Tensor) -> None:
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or x_adv.dtype != x.dtype:
            came = f"{tuple(x_adv.shape)} {x_adv.dtype}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise AttackError(f"attack {name} returned {came}, expected candidates {tuple(x.shape)} {x.dtype}.")
        excess = violation(threat.norm, float(threat.eps), x_adv, x)
        wrong = ~(excess <= TOLERANCE)
        if bool(wrong.any()):
            ids = [self.ids[i] for i in rows[wrong.cpu()].tolist()]
            worst = float(excess[wrong].nan_to_num(float("inf")).max())
            raise AttackError(
                f"attack {name} left its budget ({threat}) or the box by {worst:.3g} on samples {ids[:8]}: an "
                f"error of the run, never robustness. Candidates must be finite and inside the ball."
            )

    def _score(self, stage: str, attempted: np.ndarray[Any, np.dtype[np.bool_]], candidates: Tensor) -> Arrays:
        """Scores candidates of the attempted samples with fresh draws of the defense's full answer."""
        n = len(self.ids)
        rows = torch.from_numpy(attempted.nonzero()[0])
        target = Target(self.job.defense, n, on_calls=self.job.reporter.calls)
        started = time.perf_counter()
        part = {
            "correct": np.zeros(n, dtype=np.int64),
            "majority": np.zeros(n, dtype=bool),
            "certain": np.zeros(n, dtype=bool),
            "attempted": attempted.copy(),
            "norm": np.zeros(n),
        }
        if self.job.certificate is not None:
            part |= {"hits": np.zeros(n, dtype=np.int64), "distance": np.zeros(n)}
        if len(rows):
            y = self.y[rows]
            noise = self.noise.child("evaluate", stage)[rows]
            with self._named("the evaluation"):
                # A copy: a defense that writes into its input must not move a candidate that was checked.
                answers = target.answer(candidates.clone(), noise.child("first"), repeats=self.draws)
                right, majority = vote(answers, y)
                lost = right == 0
                certain = lost.clone()
                if self.draws > 1 and bool(lost.any()):
                    again = noise.child("confirm")[lost]
                    confirmed, _ = vote(target.answer(candidates[lost], again, repeats=self.draws), y[lost])
                    certain[lost] = confirmed == 0
            index = rows.numpy()
            part["correct"][index] = right.cpu().numpy()
            part["majority"][index] = majority.cpu().numpy()
            if self.job.certificate is not None:
                part["hits"][index] = tally(answers, y, self.job.defense.card.votes)
                part["distance"][index] = distance("l2", candidates, self.x[rows]).cpu().numpy()
            part["certain"][index] = certain.cpu().numpy()
            norm = self.job.board.threat.norm
            part["norm"][index] = distance(norm, candidates, self.x[rows]).cpu().numpy()
        part["forward"] = target.calls.forward.numpy().copy()
        part["backward"] = target.calls.backward.numpy().copy()
        part["seconds"] = np.where(attempted, (time.perf_counter() - started) / max(1, len(rows)), 0.0)
        return part

    def _repeat_lowest(self) -> Arrays:
        """A deterministic defense answers a candidate the same way twice: no call is spent on it."""
        scores, best = self.shortlist.lowest()
        right = (scores > 0).numpy()
        n = len(self.ids)
        return {
            "correct": right.astype(np.int64),
            "majority": right,
            "certain": ~right,
            "attempted": np.ones(n, dtype=bool),
            "norm": distance(self.job.board.threat.norm, best, self.x).cpu().numpy(),
            "forward": np.zeros(n, dtype=np.int64),
            "backward": np.zeros(n, dtype=np.int64),
            "seconds": np.zeros(n),
            "candidate": best.cpu().numpy(),
        }

    def _choose_and_score(self) -> Arrays:
        """Chooses among each sample's shortlist on draws of their own, then scores the choice on fresh ones.

        A sample that is broken beyond doubt keeps the candidate that broke it: no call could choose better.
        """
        n = len(self.ids)
        target = Target(self.job.defense, n, on_calls=self.job.reporter.calls)

        def count(points: Tensor, index: Tensor, draws: int, number: int) -> Tensor:
            # A sample's candidates share their draws: what differs between their scores is then theirs.
            noise = self.noise.child("select", number)[index]
            right, _ = vote(target.answer(points, noise, repeats=draws), self.y[index.to(self.y.device)])
            return right.cpu()

        _, best = self.shortlist.lowest()
        rows = torch.from_numpy(self.standing.nonzero()[0])
        started = time.perf_counter()
        with self._named("the last choice"):
            if len(rows):
                best[rows] = self.shortlist.choose(rows, self.job.selection, count)
        seconds = (time.perf_counter() - started) / n
        part = self._score(FINAL, np.ones(n, dtype=bool), best)
        part["forward"] += target.calls.forward.numpy()
        part["seconds"] += seconds
        part["candidate"] = best.cpu().numpy()
        return part

    def _wrong_throughout(self, target: Target, points: Tensor, rows: Tensor, noise: Noise) -> NDArray[np.bool_]:
        """Whether the defense answers some rows' points wrongly in all draws, and in all of a second set."""
        lost = torch.ones(len(rows), dtype=torch.bool)
        for again in ("first", "confirm") if self.draws > 1 else ("first",):
            left = rows[lost]
            if len(left):
                answers = target.answer(points[left], noise.child(again)[left], repeats=self.draws)
                lost[lost.clone()] = (vote(answers, self.y[left])[0] == 0).cpu()
        return lost.numpy()

    def _named(self, what: str, error: type[AssayError] = AttackError) -> Named:
        return Named(what, self.ids, error)
