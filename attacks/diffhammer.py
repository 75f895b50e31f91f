"""Selective expectation over draws, and gradient grafting (DiffHammer: Wang et al., NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.attack import AttackSpec, Forward, Loss, Target
from assay.attacks import losses
from assay.attacks.eot import Standing, require_positive
from assay.defense import Stages
from assay.errors import InputError
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel

SIGNED = tuple(name for name in losses.LOSSES if not name.startswith("ce"))
"""Losses whose sign says whether a draw is wrong (or answers the target class)."""

Move = Callable[[Tensor], Tensor]
"""The step `(n, c, h, w)` that an ascent along gradients `(n, c, h, w)` would still take."""


@dataclass(frozen=True)
class Draws:
    """What N draws say of a point.

    Attributes:
        margins: `(n, N)`, the loss of each draw.
        gradients: `(n, N, c, h, w)` of each draw's loss, at the image or at what the draw made of it.
        logits: `(n, N, k)`.
    """

    margins: Tensor
    gradients: Tensor
    logits: Tensor


def select(draws: Draws, move: Move, *, sharpness: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Which draws are worth attacking together: weights `(n, N)` that sum to 1, and a representative each `(n,)`.

    A draw counts as far as it is predicted to fall: q_i = sigmoid(λ·(L_i + ⟨r, g_i⟩)/u), where r is
    the remaining step along the mean gradient Σ q_i·g_i / Σ q_i. Those two are found in turn, from
    the representative's own step on: the draw whose step is predicted to break most draws. u is the
    most that the step changes any draw's margin, so that λ is a pure number: a margin that the step
    could just undo is one unit away, whatever the scale of the logits. Where no draw can fall the
    weights go to those that come closest.
    """
    margins, gradients = draws.margins, torch.nan_to_num(draws.gradients, nan=0.0, posinf=0.0, neginf=0.0)
    flat = gradients.flatten(2)
    own = torch.stack([move(gradients[:, i]).flatten(1) for i in range(margins.shape[1])], 1)
    gains = own @ flat.mT  # [:, i, j]: what draw i's step adds to the margin of draw j
    chances = _predicted(margins[:, None], gains, sharpness).sigmoid()
    # Its own fall counts twice: a graft is exact for the draw whose path it takes, a guess for the others.
    representative = (chances.sum(2) + chances.diagonal(dim1=1, dim2=2)).argmax(1)
    towards = gradients[torch.arange(len(margins), device=margins.device), representative]
    weights = torch.full_like(margins, 1 / margins.shape[1])
    for _ in range(rounds):
        gain = (flat @ move(towards).flatten(1)[:, :, None]).squeeze(2)
        # The softmax of log q is q over its sum, also where every q underflows.
        weights = F.logsigmoid(_predicted(margins, gain, sharpness)).softmax(1)
        towards = weighted(weights, gradients)
    return weights, representative


def _predicted(margins: Tensor, gains: Tensor, sharpness: float) -> Tensor:
    largest = gains.flatten(1).abs().amax(1).clamp_min(1e-12).reshape(-1, *[1] * (gains.ndim - 1))
    return (sharpness * (margins + gains) / largest).clamp(-1e4, 1e4)


def weighted(weights: Tensor, gradients: Tensor) -> Tensor:
    """Σ_i w_i·g_i: `(n, N)` and `(n, N, c, h, w)` to `(n, c, h, w)`."""
    return (weights[:, :, None] * gradients.flatten(2)).sum(1).view_as(gradients[:, 0])


def unit(gradient: Tensor) -> Tensor:
    """Gradients over their length, 0 where they are 0 or not finite."""
    gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    rows = gradient.flatten(1)
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return F.normalize(rows, dim=1).view_as(gradient)


class _Exact:
    """Every draw's own gradient through the whole defense."""

    forward: Forward | None = None

    def __init__(self, target: Target, draws: int) -> None:
        self._target, self._n = target, draws

    def draw(self, z: Tensor, labels: tuple[Tensor, ...], loss: Loss, noise: Noise) -> Draws:
        """N draws at each row of `z`, with `noise`'s draws."""
        return self._split(z.repeat_interleave(self._n, 0), labels, loss, noise.draws(self._n), len(z), None)

    def pull_back(self, z: Tensor, noise: Noise, representative: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at `z` of what `draw` gave a gradient of."""
        return gradient

    def _split(
        self, rows: Tensor, labels: tuple[Tensor, ...], loss: Loss, noise: Noise, n: int, forward: Forward | None
    ) -> Draws:
        repeated = tuple(label.repeat_interleave(self._n, 0) for label in labels)
        found = self._target.gradient(rows, repeated, loss, noise, forward=forward)
        grouped = (n, self._n)
        return Draws(
            found.loss.reshape(grouped),
            found.gradient.reshape(*grouped, *rows.shape[1:]),
            found.logits.reshape(*grouped, self._target.n_classes),
        )


class _Grafted(_Exact):
    """Gradients at all draws' purified images, taken back to the image through one draw's purifier."""

    def __init__(self, target: Target, draws: int) -> None:
        super().__init__(target, draws)
        self._stages: Stages = target.handle("stages")()
        self.forward = self._compose

    def _compose(self, x: Tensor, noise: Noise) -> Tensor:
        purified = self._stages.purify(x, noise.child("purify"))
        return self._stages.classify(purified, noise.child("classify"))

    def draw(self, z: Tensor, labels: tuple[Tensor, ...], loss: Loss, noise: Noise) -> Draws:
        rows, folded = z.repeat_interleave(self._n, 0), noise.draws(self._n)
        purified = self._target.push(rows, folded.child("purify"), self._stages.purify)
        return self._split(purified, labels, loss, folded.child("classify"), len(z), self._stages.classify)

    def pull_back(self, z: Tensor, noise: Noise, representative: Tensor, gradient: Tensor) -> Tensor:
        chosen = torch.arange(len(z), device=representative.device) * self._n + representative
        path = noise.draws(self._n)[chosen].child("purify")
        return self._target.pull_back(z, path, self._stages.purify, gradient)


def diffhammer(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    steps: int = 50,
    restarts: int = 3,
    eot: int = 10,
    loss: str = "margin",
    targets: int = 9,
    sharpness: float = 5.0,
    rounds: int = 5,
    graft: bool = True,
) -> Tensor:
    """Ascent along the gradient of those draws that can be broken together, not of all draws.

    Where a defense's draws pull in different directions their mean gradient serves none of them.
    Each iteration here takes N draws at the current point, finds those worth attacking (`select`)
    and follows their weighted gradient g. With a graft their gradients are taken at the purified
    images, where they cost a classifier's backward pass each, and their mean goes back through one
    draw's purifier, so that N draws cost one backward pass through the process.

    The direction of iteration i is v·ĝ + (1 − v) times the last, v = (i + 1)^-½, from unit vectors;
    steps fall linearly from 2 · eps to 0, their rest (at most the ball's diameter) being the move that
    `select` looks ahead by.

    Costs `restarts · steps · (2·N + 1)` forward and `restarts · steps · (N + 1)` backward passes at
    most, of which `N` of either are the classifier's alone, and N forward passes a restart more;
    without a graft `restarts · steps · N` of both.

    Args:
        steps: iterations a restart.
        restarts: runs, each from a new random point.
        eot: N, for a stochastic target; a deterministic one has one draw.
        loss: a loss whose sign tells a wrong draw, one of `SIGNED`.
        targets: for a targeted loss, how many runner-up classes each restart aims at.
        sharpness: the paper's λ.
        rounds: of expectation and maximisation.
        graft: False takes each draw's exact gradient through the whole defense, which then needs no `stages`.

    Raises:
        ThreatViolation: where the defense offers no `stages`, for a graft.
        InputError: for a bad option.
    """
    require_positive(steps=steps, rounds=rounds)
    if not sharpness > 0:
        raise InputError(f"sharpness must be above 0, got {sharpness}.")
    named = losses.named(loss, target.n_classes)
    if loss not in SIGNED:
        raise InputError(f"diffhammer needs a loss whose sign tells a wrong draw, one of {SIGNED}, not {loss!r}.")
    source = (_Grafted if graft else _Exact)(target, eot if target.stochastic else 1)
    standing = Standing(target, x, y, noise, eot=eot, forward=source.forward)
    for stream, labels in standing.runs(named, restarts, targets):
        rows = standing.rows
        ball = Ball(threat, x[rows])
        z, past = ball.random_point(stream[rows], "start"), torch.zeros_like(x[rows])
        sizes = step_sizes(ball.eps, steps)
        for i, size in enumerate(sizes):
            drawn = stream.child("step", i)
            draws = source.draw(z, tuple(label[rows] for label in labels), named.function, drawn[rows])
            stands = standing.show(rows, z, draws.logits, drawn)
            if not bool(stands.all()):
                rows, z, past, ball = rows[stands], z[stands], past[stands], ball[stands]
                draws = Draws(draws.margins[stands], draws.gradients[stands], draws.logits[stands])
            if not len(rows):
                break
            move = partial(_look_ahead, ball, z, min(2 * ball.eps, sum(sizes[i:])))
            weights, chosen = select(draws, move, sharpness=sharpness, rounds=rounds)
            gradient = source.pull_back(z, drawn[rows], chosen, weighted(weights, draws.gradients))
            past = averaged(past, gradient, i)
            z = ball.step(z, past, size)
        else:
            standing.look(rows, z, stream.child("step", steps))
    return standing.result()


def averaged(past: Tensor, gradient: Tensor, i: int) -> Tensor:
    """The direction of iteration i = 0, 1, …: a share (i + 1)^-½ of the new gradient's, the rest the last one's."""
    share = 1 / math.sqrt(i + 1)
    return share * unit(gradient) + (1 - share) * past


def step_sizes(eps: float, steps: int) -> list[float]:
    """Falling linearly from the ball's diameter: far at first, and fine where the selection has settled."""
    return [2 * eps * (1 - i / steps) for i in range(steps)]


def _look_ahead(ball: Ball, z: Tensor, size: float, gradient: Tensor) -> Tensor:
    """The feasible step of length `size` along a gradient; where a purified image has another shape, any step."""
    if gradient.shape != z.shape:
        return size * ball.steepest(gradient)
    return ball.step(z, gradient, size) - z


SPEC = AttackSpec(
    name="diffhammer",
    summary="Ascent along the draws that can be broken together, their gradients grafted on one draw's purifier.",
    attack=diffhammer,
    handles=("stages",),
)
