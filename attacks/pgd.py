"""Projected gradient ascent (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from torch import Tensor

from assay.attack import AttackSpec, Forward, Target
from assay.attacks import losses
from assay.attacks.eot import Standing, require_positive
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel


def pgd(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    steps: int = 40,
    alpha: float | None = None,
    restarts: int = 1,
    eot: int = 1,
    clip: bool = False,
    loss: str = "ce",
    targets: int = 9,
    random_start: bool = True,
    forward: Forward | None = None,
    judge: Forward | None = None,
    stop: bool = True,
) -> Tensor:
    """Steps of fixed length: sign steps for linf, normalised steps for l2.

    Costs at most `restarts · steps` gradients and `restarts` forward passes more, times `eot`.

    Args:
        steps: gradient steps a run.
        alpha: step length in pixel units; by default 2.5 · eps / steps.
        restarts: runs, each from a new random point.
        eot: draws averaged for each loss and gradient, for a stochastic target.
        clip: shortens the gradients of the steepest draws before they are averaged, see `Target.gradient`.
        loss: a name in `assay.attacks.losses`.
        targets: for a targeted loss, how many runner-up classes each restart aims at.
        random_start: False lets the first run start at `x`.
        forward: differentiated in place of the target's own draw.
        judge, stop: see `assay.attacks.eot.Standing`.

    Raises:
        InputError: for a count below 1 or a loss that is unknown or needs more classes.
    """
    require_positive(steps=steps)
    named = losses.named(loss, target.n_classes)
    standing = Standing(target, x, y, noise, eot=eot, clip=clip, forward=forward, judge=judge, stop=stop)
    size = 2.5 * float(threat.eps) / steps if alpha is None else alpha
    start_at_random = random_start
    for stream, labels in standing.runs(named, restarts, targets):
        rows = standing.rows
        ball = Ball(threat, x[rows])
        z = ball.random_point(stream[rows], "start") if start_at_random else x[rows]
        start_at_random = True
        for step in range(steps):
            evaluation, stands = standing.climb(rows, z, named.function, labels, stream.child("step", step))
            gradient = evaluation.gradient
            if not bool(stands.all()):
                rows, z, gradient, ball = rows[stands], z[stands], gradient[stands], ball[stands]
            if not len(rows):
                break
            z = ball.step(z, gradient, size)
        else:
            standing.look(rows, z, stream.child("step", steps))
    return standing.result()


SPEC = AttackSpec(
    name="pgd",
    summary="Projected gradient ascent with restarts: sign steps for linf, normalised steps for l2.",
    attack=pgd,
)
