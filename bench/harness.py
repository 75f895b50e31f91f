"""The harness: evaluates the shards of a board and verifies every candidate itself; `reduce` makes the record of them.

A shard passes through stages: `clean`, each mandatory attack from cheap to dear on the samples
still standing, and `final`, which chooses each sample's strongest candidate and scores it with fresh draws.
Whether a candidate counts is decided here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay import data
from assay.attack import AttackSpec, Target
from assay.board import Board
from assay.checks import Subject, preflight
from assay.defense import Defense
from assay.errors import AssayError, AttackError, DefenseError
from assay.finding import Finding
from assay.noise import Noise
from assay.norms import TOLERANCE, distance, violation
from assay.protocol import PlannedAttack
from assay.reporter import Reporter, Silent
from assay.rules import SELECTION
from assay.rundir import Arrays, RunDir
from assay.shortlist import Round, Shortlist

CLEAN, FINAL = "clean", "final"
_PREFLIGHT_SAMPLES = 16


@dataclass(frozen=True)
class Job:
    """All that determines a run's result.

    Attributes:
        defense: in evaluation mode, parameters frozen, on `device`.
        board: with `ids`, the samples to run (a prefix of the board's).
        planned: the attacks to run, in order.
        attacks: registry name -> attack, for those of `planned`.
        source: the undefended model whose adversarial examples are transferred.
        checks: names of the preflight checks.
        seed: the run's seed.
        selection: rounds of the last choice among a stochastic defense's candidates.
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
        return [CLEAN, *(attack.name for attack in self.planned), FINAL]


def run_preflight(job: Job) -> Sequence[Finding]:
    """The preflight findings, measured on the board's first images."""
    ids = job.ids[:_PREFLIGHT_SAMPLES]
    x, y = data.load(job.board.dataset, ids, device=job.device)
    noise = Noise.from_seed(job.seed, ids).child("preflight")
    return preflight(Subject(job.defense, x, y, ids, noise), job.checks)


def run_shards(job: Job, store: RunDir) -> list[Arrays]:
    """Evaluates every shard that isn't on disk yet; returns all of them, in order.

    Raises:
        DefenseError: where the defense raises or answers nonsense; it names the sample ids.
        AttackError: where an attack raises or leaves its budget.
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
    """
    finished = store.read(store.shard_file(index))
    if finished is not None:
        for stage in job.stages:
            job.reporter.end(index, stage)
        return finished
    shard = _Shard(job, index)
    for stage in job.stages:
        file = store.part_file(index, stage)
        part = store.read(file)
        if part is None:
            job.reporter.begin(index, stage, int(shard.standing.sum()))
            part = shard.run(stage)
            store.write(file, part)
        shard.absorb(stage, part)
        job.reporter.end(index, stage)
    store.finish(index, shard.arrays)
    return shard.arrays


class _Shard:
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

    def run(self, stage: str) -> Arrays:
        """Computes a stage; the state is changed by `absorb` alone, so that a resume sees the same."""
        if stage == CLEAN:
            return self._score(stage, np.ones(len(self.ids), dtype=bool), self.x)
        if stage == FINAL:
            return self._repeat_lowest() if self.draws == 1 else self._choose_and_score()
        planned = next(attack for attack in self.job.planned if attack.name == stage)
        return self._attack(planned)

    def absorb(self, stage: str, part: Arrays) -> None:
        """Takes a stage's outcome into the cascade's state."""
        if stage == FINAL:
            self.arrays["adversarial"] = part["candidate"]
        else:
            rows = torch.from_numpy(part["attempted"].nonzero()[0])
            candidates = torch.from_numpy(part["candidate"]) if "candidate" in part else self.x[rows]
            self.shortlist.offer(rows, candidates, torch.from_numpy(part["correct"])[rows])
            self.standing &= ~part["certain"]
        self.arrays |= {f"{stage}/{key}": value for key, value in part.items() if key != "candidate"}

    def _attack(self, planned: PlannedAttack) -> Arrays:
        job, rows = self.job, torch.from_numpy(self.standing.nonzero()[0])
        if len(rows) == 0:
            return self._score(planned.name, self.standing, self.x[rows])
        spec = job.attacks[planned.attack]
        n = len(self.ids)
        target = Target(job.defense, n, white_box=not spec.black_box, on_calls=job.reporter.calls)
        options = dict(planned.options)
        if options.get("source") == "board":
            assert job.source is not None
            options["source"] = Target(job.source, n)
        noise = self.noise.child("attack", planned.name)[rows]
        x, y = self.x[rows], self.y[rows]
        started = time.perf_counter()
        with self._named(f"attack {planned.name}"):
            x_adv = spec.attack(target, x, y, job.board.threat, noise, **options)
        seconds = time.perf_counter() - started
        # Against the images as they are here: an attack may have moved its own copy of them.
        self._check_budget(planned.name, x_adv, self.x[rows], rows)
        x_adv = x_adv.detach()
        part = self._score(planned.name, self.standing, x_adv)
        calls = target.calls
        part["forward"] += calls.forward.numpy()
        part["backward"] += calls.backward.numpy()
        # Wall time is charged to samples in proportion to the calls they took; a transfer takes none.
        weight = calls.forward.numpy() if int(calls.forward.sum()) else self.standing.astype(np.int64)
        part["seconds"] += seconds * weight / weight.sum()
        part["candidate"] = x_adv.cpu().numpy()
        return part

    def _check_budget(self, name: str, x_adv: Tensor, x: Tensor, rows: Tensor) -> None:
        threat = self.job.board.threat
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
        if len(rows):
            y = self.y[rows]
            noise = self.noise.child("evaluate", stage)[rows]
            with self._named("the evaluation"):
                # A copy: a defense that writes into its input must not move a candidate that was checked.
                right, majority = _vote(target.answer(candidates.clone(), noise.child("first"), repeats=self.draws), y)
                lost = right == 0
                certain = lost.clone()
                if self.draws > 1 and bool(lost.any()):
                    again = noise.child("confirm")[lost]
                    confirmed, _ = _vote(target.answer(candidates[lost], again, repeats=self.draws), y[lost])
                    certain[lost] = confirmed == 0
            index = rows.numpy()
            part["correct"][index] = right.cpu().numpy()
            part["majority"][index] = majority.cpu().numpy()
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
            right, _ = _vote(target.answer(points, noise, repeats=draws), self.y[index.to(self.y.device)])
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

    def _named(self, what: str) -> _Named:
        return _Named(what, self.ids)


class _Named:
    """Turns whatever a defense or an attack raises into one error that names it and the sample ids."""

    def __init__(self, what: str, ids: Sequence[int]) -> None:
        self.what, self.ids = what, ids

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DefenseError):
            ids = [self.ids[slot] for slot in error.sample_ids]
            raise DefenseError(f"{error} (in {self.what}; samples {_listed(ids)})", ids) from error
        if isinstance(error, Exception) and not isinstance(error, AssayError):
            raise AttackError(
                f"{self.what} raised {type(error).__name__}: {error} (samples {_listed(list(self.ids))}). "
                f"An attack that fails is an error of the run, never robustness."
            ) from error


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def _vote(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Right answers among the draws `(n,)`, and whether a plurality vote over them is right `(n,)`."""
    answers = logits.argmax(-1)
    right = (answers == y[:, None]).sum(1)
    counts = torch.nn.functional.one_hot(answers, logits.shape[-1]).sum(1)
    others = counts.scatter(1, y[:, None], -1).amax(1)
    # A tie is not a right answer: the attacker may be the one who breaks it.
    return right, right > others
