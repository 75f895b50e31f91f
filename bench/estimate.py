"""How long a run will take, measured from a forward and a gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from assay import data
from assay.attack import Target
from assay.calibrating import WHITE
from assay.certifying import CERTIFY, PlannedCertificate
from assay.checks import SAMPLES
from assay.job import CLEAN, FINAL, Job
from assay.noise import Noise

_SAMPLES = 32
_ROWS = 512
"""Rows of the timed calls: enough that a batch is as efficient as it will be."""


def seconds_per_sample(job: Job, *, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds per stage and sample, upper bounds, from a timed forward and a timed gradient.

    Bounds, because samples that are certainly broken leave the cascade early. Each call is made
    twice and the faster counts: the first pays for lazy initialisation.
    """
    ids = job.ids[:_SAMPLES]
    x, y = data.load(job.board.dataset, ids, device=job.device)
    noise = Noise.from_seed(job.seed, ids).child("estimate")
    target = Target(job.defense, len(ids))
    repeats = max(1, (_ROWS if x[0].numel() < 1024 else _SAMPLES) // len(ids))

    def fastest(call: Callable[[], object]) -> float:
        spent = []
        for _ in range(2):
            started = clock()
            call()
            spent.append(clock() - started)
        return min(spent) / (len(ids) * repeats)

    forward = fastest(lambda: target.draws(x, noise, repeats))
    both = fastest(lambda: target.gradient(x, (y,), _cross_entropy, noise, draws=repeats))
    backward = max(0.0, both - forward)
    draws = job.board.draws if target.stochastic else 1
    scoring = draws * job.defense.card.votes.draws * forward
    chosen = sum(kept * draws for kept, draws in job.selection) * job.defense.card.votes.draws * forward
    seconds = {CLEAN: scoring, FINAL: scoring + chosen if target.stochastic else 0.0}
    if job.certificate is not None:
        seconds |= _certifying(job.certificate, forward, backward)
    for attack in job.planned:
        seconds[attack.name] = scoring + attack.forward * forward + attack.backward * backward
    return seconds


def seconds_of_checks(job: Job, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each check in all, roughly: what the digits' defenses took, in units of one call and of one attack.

    Args:
        seconds: per stage and sample, as `seconds_per_sample` found them.
    """
    votes, stochastic = job.defense.card.votes.draws, job.defense.card.traits.stochastic
    draws = job.board.draws if stochastic else 1
    # A gradient is about two calls.
    calls = SAMPLES * (300 + 60 * (votes - 1) + (400 if stochastic else 0))
    before = calls * seconds[CLEAN] / (draws * votes) / max(1, len(job.checks))
    found = dict.fromkeys(job.checks, before)
    if job.health is None:
        return found
    rule = job.health.rule
    samples = min(len(job.ids), rule.stochastic if stochastic else rule.samples)
    attack = max((seconds[attack.name] for attack in job.planned if attack.family in WHITE), default=0.0)
    return found | {name: runs * samples * attack for name, runs in _RUNS.items()}


_RUNS = {"outcomes": 7.1, "binarization": 2, "ablations": 1}
"""Runs of an attack that checks of it take; those of its outcomes share one at the board's radius."""


def _certifying(planned: PlannedCertificate, forward: float, backward: float) -> dict[str, float]:
    """Seconds of the certified half's stages; few samples take the sequential test's cap, so the bound is loose."""
    budget = planned.rule.budget
    steps = planned.options["steps"] * planned.options.get("eot", 1) * planned.options.get("restarts", 1)
    attacked = steps * (forward + backward) + budget.judging * forward
    return {CERTIFY: planned.most_draws * forward} | dict.fromkeys(planned.attacked, attacked)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(logits, y, reduction="none")
