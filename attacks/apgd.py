"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, algorithm 1): momentum, and a step that halves when it stalls."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from assay.attack import AttackSpec, Evaluation, Forward, Target
from assay.attacks import losses
from assay.attacks.eot import Standing, require_positive
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel

MOMENTUM = 0.75
"""The paper's α: the weight of the gradient step; the rest is the last move, continued."""


def checkpoints(steps: int) -> list[int]:
    """The iterations w_j = ⌈p_j · steps⌉, p_1 = .22, p_{j+1} = p_j + max(p_j − p_{j−1} − .03, .06); section 3.1."""
    found, point, period = [], 22, 22  # in whole percent, where nothing is rounded
    while point <= 100:
        found.append(-(-point * steps // 100))
        period = max(period - 3, 6)
        point += period
    return sorted(set(found))


@dataclass
class _Run:
    """One run's state, a row for each sample that still stands."""

    rows: Tensor
    z: Tensor
    previous: Tensor
    gradient: Tensor
    step: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_loss_at_checkpoint: Tensor
    rises: Tensor
    halved: Tensor

    @classmethod
    def begin(cls, rows: Tensor, z: Tensor, eps: float) -> _Run:
        nothing = torch.zeros_like(z)
        step = torch.full((len(z),), 2 * eps, dtype=z.dtype, device=z.device)
        low, high = torch.full_like(step, -torch.inf), torch.full_like(step, torch.inf)
        # The first checkpoint may not blame the lack of progress on a step that nothing has tried yet.
        halved = torch.ones_like(step, dtype=torch.bool)
        return cls(rows, z, z, nothing, step, high, z, nothing, low, low, torch.zeros_like(step), halved)

    def keep(self, mask: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[mask])

    def record(self, evaluation: Evaluation) -> None:
        """Takes in the evaluation of `z`."""
        self.gradient = evaluation.gradient
        self.rises = self.rises + (evaluation.loss > self.loss)
        self.loss = evaluation.loss
        better = self.loss > self.best_loss
        self.best = _choose(better, self.z, self.best)
        self.best_gradient = _choose(better, self.gradient, self.best_gradient)
        self.best_loss = _choose(better, self.loss, self.best_loss)

    def check(self, window: int, rho: float) -> None:
        """Halves the step, and restarts from the best point, where condition 1 or 2 of the paper holds."""
        few_rises = self.rises < rho * window
        no_progress = ~self.halved & (self.best_loss <= self.best_loss_at_checkpoint)
        self.halved = few_rises | no_progress
        self.step = _choose(self.halved, self.step / 2, self.step)
        self.z = _choose(self.halved, self.best, self.z)
        self.gradient = _choose(self.halved, self.best_gradient, self.gradient)
        self.loss = _choose(self.halved, self.best_loss, self.loss)
        self.best_loss_at_checkpoint = self.best_loss
        self.rises = torch.zeros_like(self.rises)

    def advance(self, ball: Ball, first: bool) -> None:
        moved = ball.step(self.z, self.gradient, self.step)
        if not first:
            moved = ball.project(self.z + MOMENTUM * (moved - self.z) + (1 - MOMENTUM) * (self.z - self.previous))
        self.previous, self.z = self.z, moved


def _choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def apgd(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    steps: int = 100,
    restarts: int = 1,
    eot: int = 1,
    clip: bool = False,
    loss: str = "ce",
    targets: int = 9,
    rho: float = 0.75,
    random_start: bool = True,
    forward: Forward | None = None,
    judge: Forward | None = None,
    stop: bool = True,
) -> Tensor:
    """Ascent from step length 2 · eps, without a step size to tune.

    For a stochastic target loss and gradient are means over `eot` draws, new ones each iteration.
    Costs at most `steps` gradients and one forward pass more a run, times `eot`; a targeted loss
    makes `targets` runs a restart and one forward pass in all to rank the classes.

    Args:
        steps: gradient steps a run.
        restarts: runs, each from a new random point.
        eot: draws averaged for each loss and gradient, for a stochastic target.
        clip: shortens the gradients of the steepest draws before they are averaged, see `Target.gradient`.
        loss: `"ce"`, `"margin"`, `"dlr"`, `"dlr-targeted"` or another name in `assay.attacks.losses`.
        targets: for a targeted loss, how many runner-up classes each restart aims at, at most k − 1.
        rho: a window whose share of rising iterations is lower halves the step.
        random_start: False lets the first run start at `x`.
        forward: differentiated in place of the target's own draw.
        judge, stop: see `assay.attacks.eot.Standing`.

    Raises:
        InputError: for a count below 1 or a loss that is unknown or needs more classes.
    """
    require_positive(steps=steps)
    named = losses.named(loss, target.n_classes)
    standing = Standing(target, x, y, noise, eot=eot, clip=clip, forward=forward, judge=judge, stop=stop)
    windows = dict(zip(checkpoints(steps), _gaps(checkpoints(steps)), strict=True))
    start_at_random = random_start
    for stream, labels in standing.runs(named, restarts, targets):
        rows = standing.rows
        ball = Ball(threat, x[rows])
        run = _Run.begin(rows, ball.random_point(stream[rows], "start") if start_at_random else x[rows], ball.eps)
        start_at_random = True
        for i in range(steps):
            evaluation, stands = standing.climb(run.rows, run.z, named.function, labels, stream.child("step", i))
            run.record(evaluation)
            if not bool(stands.all()):
                run.keep(stands)
                ball = ball[stands]
            if not len(run.rows):
                break
            if i in windows:
                run.check(windows[i], rho)
            run.advance(ball, first=i == 0)
        else:
            standing.look(run.rows, run.z, stream.child("step", steps))
    return standing.result()


def _gaps(points: list[int]) -> list[int]:
    return [b - a for a, b in zip([0, *points], points, strict=False)]


SPEC = AttackSpec(
    name="apgd",
    summary="Auto-PGD with cross-entropy, margin, DLR or targeted DLR; expectation over draws for stochastic targets.",
    attack=apgd,
)
