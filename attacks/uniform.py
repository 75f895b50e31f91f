"""Points drawn uniformly in the ball: what no adversary at all would do to the defense."""

from __future__ import annotations

from torch import Tensor

from assay.attack import AttackSpec, Target
from assay.attacks.eot import Standing, require_positive
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel


def uniform(
    target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, *, tries: int = 10, eot: int = 1
) -> Tensor:
    """The worst of `tries` random points: by the share of wrong draws, then by the margin.

    Args:
        tries: points a sample.
        eot: draws a point, for a stochastic target.

    Raises:
        InputError: for a count below 1.
    """
    require_positive(tries=tries)
    standing = Standing(target, x, y, noise, eot=eot)
    for attempt in range(tries):
        rows = standing.rows
        if not len(rows):
            break
        stream = noise.child("try", attempt)
        standing.look(rows, Ball(threat, x[rows]).random_point(stream[rows]), stream)
    return standing.result()


SPEC = AttackSpec(
    name="uniform",
    summary="Points drawn uniformly in the ball; the worst is kept.",
    attack=uniform,
    black_box=True,
)
