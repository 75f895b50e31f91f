"""How long a run will take, measured from two calls."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.nn.functional import cross_entropy

from assay import data
from assay.attack import Target
from assay.harness import CLEAN, FINAL, Job
from assay.noise import Noise

_SAMPLES = 32
_ROWS = 512
"""Rows of the timed calls: enough that a batch is as efficient as it will be."""


def seconds_per_sample(job: Job, *, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds per stage and sample, upper bounds, from one timed forward and one timed gradient.

    Bounds, because samples that are certainly broken leave the cascade early.
    """
    ids = job.ids[:_SAMPLES]
    x, y = data.load(job.board.dataset, ids, device=job.device)
    noise = Noise.from_seed(job.seed, ids).child("estimate")
    target = Target(job.defense, len(ids))
    repeats = max(1, (_ROWS if x[0].numel() < 1024 else _SAMPLES) // len(ids))
    rows = len(ids) * repeats
    target.draws(x, noise)  # the first call pays for lazy initialisation
    started = clock()
    target.draws(x, noise, repeats)
    forward = (clock() - started) / rows
    started = clock()
    target.gradient(x, (y,), lambda z, t: cross_entropy(z, t, reduction="none"), noise, draws=repeats)
    backward = max(0.0, (clock() - started) / rows - forward)
    draws = job.board.draws if target.stochastic else 1
    scoring = draws * job.defense.card.votes.draws * forward
    seconds = {CLEAN: scoring, FINAL: scoring if target.stochastic else 0.0}
    for attack in job.planned:
        seconds[attack.name] = scoring + attack.forward * forward + attack.backward * backward
    return seconds
