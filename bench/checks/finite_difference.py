"""`finite_difference`: the gradient that attacks are given is that of the forward pass, in direction and in size.

A defense can hand out any gradient: clamped, scaled or randomised by a hook, of a detached part, of a custom backward
pass, or of another schedule than the one that answers. Attacks that follow it then fail for a reason that has
nothing to do with robustness (Athalye, Carlini & Wagner 2018, "Obfuscated gradients", arXiv 1802.00420).

At a point just inside the box, on fixed noise, the slope of one draw along random directions and along the gradient
itself is compared with central differences, for the margin, the cross-entropy and a random mix of all logits, as
targeted losses see those; and once more where the margin's gradient leads, near the decision boundary, where an attack
spends its time and a gradient may be another than at the images. The differences are taken of a copy in double
precision where it answers as the defense does, else of the defense with larger steps; the gradient is always the
defense's own. The smallest step at which forward and backward difference agree decides. Where they never do,
the forward pass is rounded somewhere or full of kinks: the best of the steps counts then, less what the rounding
that shows in the second difference explains. Such a step says nothing where it moves no logit by what half precision
resolves, nor should have, and the first longer one that does moves them as far as the gradient told: a network in
bfloat16 is flat over tiny steps, and its gradient right.

Fails where the error exceeds `THRESHOLD` for more than `MOST` of the samples, flags above `SOME`, and where most
samples are too rough to tell. A defense that declares the trait `non_differentiable` is measured and never failed.
Costs 80 calls forward and 7 backward a sample; one less forward where no copy in double precision can be made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.checks.subject import Subject
from assay.finding import Finding, Status
from assay.target import Evaluation, Target

THRESHOLD = 0.1
"""Relative error beyond which a sample's gradient is called wrong; rounding in float32 makes it 0.001 or so."""
MOST, SOME = 0.4, 0.15
"""Share of samples with a wrong gradient above which the check fails, or flags: of 16, two may be accidents. Half of
the samples without a gradient are too many; rounding to eight bits on the way, straight through, reaches 0.4."""
UNCLEAR = 0.5
"""Share of samples without a slope to compare with above which the check flags."""
RANDOM = 3
"""Random directions beside the gradient's own."""
STEPS = {torch.float64: (1e-6, 1e-4, 1e-2, 3e-2), torch.float32: (1e-3, 4e-3, 1e-2, 3e-2)}
"""Step sizes, the furthest that a pixel moves, by the precision of the forward passes."""
FLAT = 1e-3
"""Slopes below this part of the logits' span (per unit of pixel value) are zero for this check."""
SMOOTH, ROUGH = 0.02, 0.25
"""How far the one-sided differences may lie from the central one, as a part of the slope: for a step that decides
alone, and for one that is used at all."""
PART = 0.6
"""Independent rounding errors make the central difference this part of what they make the second difference."""
RESOLUTION = 2**-7
"""What bfloat16 resolves, as a part of the logits' span: a network in half precision can't show a smaller move."""
MARGIN = 0.05
"""How far inside the box the slopes are measured, further than the largest step: at its edge a clip has two."""
FAR, HALVINGS, INNER = 0.3, 6, 0.03
"""How far a pixel is moved at most towards the decision boundary, how often the way there is halved, and how far from
the box's edge it stops: the largest step."""
SAME = 1e-3
"""Largest difference, as a part of the logits' span, at which the double-precision copy is the same function."""


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit above the right one, `(n,)`."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -math.inf).amax(1) - logits.masked_fill(~own, -math.inf).amax(1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy, `(n,)`."""
    return F.cross_entropy(logits, y, reduction="none")


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"margin": margin, "cross_entropy": cross_entropy}


@dataclass(frozen=True)
class _Measured:
    """Of each sample `(n,)`: its relative error, whether that is too large, whether there was no slope to compare."""

    error: Tensor
    wrong: Tensor
    rough: Tensor


def check(subject: Subject) -> Finding:
    """Compares slopes with differences; see the module."""
    x = _inside(subject)
    target = subject.target()
    weights = subject.noise.child("finite_difference").normal("mix", shape=(target.n_classes,), like=x)[0].double()
    losses: dict[str, Loss] = {**LOSSES, "mix": lambda logits, y: logits @ weights.to(logits.dtype)}
    given = target.gradient(x, (subject.y,), margin, subject.noise)
    logits = given.logits[:, 0].double()
    forward, dtype = _function(subject, target, x, logits)
    first = _measured(subject, target, forward, x, losses, STEPS[dtype])
    near = _undecided(subject, target, x, given)
    second = _measured(subject, target, forward, near, losses, STEPS[dtype])
    return _finding(subject, first, second, dtype)


def _measured(
    subject: Subject, target: Target, forward: Target, x: Tensor, losses: dict[str, Loss], sizes: tuple[float, ...]
) -> _Measured:
    """Slopes of the target against differences of `forward`, which takes float64 or float32."""
    exact = x.double() if forward is not target else x
    given = {name: target.gradient(x, (subject.y,), loss, subject.noise) for name, loss in losses.items()}
    logits = given["margin"].logits[:, 0].double()
    directions = [*_random(subject, x), _widest(given["margin"].gradient)]
    answers = [_around(forward, exact, directions, step, subject) for step in sizes]
    middle = forward.draws(exact, subject.noise)[:, 0].double()
    promised = _along(given["margin"].gradient, directions)
    mute = _mute(answers, middle, promised, sizes, RESOLUTION * span(logits))
    # Seen to be rounded: of differences over a step so much is rounding, at a quarter of half precision's.
    rounded = mute[0] & (answers[0] == middle).flatten(0, 1).all(2).all(0)
    slack = [rounded * RESOLUTION * span(logits) / (4 * step) for step in sizes]
    errors, rough = [], []
    for name, loss in losses.items():
        pairs = [_differences(each, middle, step, loss, subject.y) for step, each in zip(sizes, answers, strict=True)]
        worst, unclear = _compare(_along(given[name].gradient, directions), pairs, mute, slack, FLAT * span(logits))
        errors.append(worst)
        rough.append(unclear)
    error = torch.stack(errors).amax(0)
    wrong = error > THRESHOLD
    return _Measured(error, wrong, torch.stack(rough).any(0) & ~wrong)


def _undecided(subject: Subject, target: Target, x: Tensor, given: Evaluation) -> Tensor:
    """Points as an attack reaches them: from `x` along the gradient to where right and wrong class nearly tie.

    As far as `FAR` where they never do. Pixels that would leave the box stay where they are, or they would tie.
    """
    way = torch.sign(given.gradient.nan_to_num()) * torch.where(given.loss < 0, 1.0, -1.0)[:, None, None, None]

    def at(far: Tensor) -> Tensor:
        moved = x + far.to(x)[:, None, None, None] * way
        return torch.where((moved - 0.5).abs() > 0.5 - INNER, x, moved)

    low, high = torch.zeros(len(x), device=x.device), torch.full((len(x),), FAR, device=x.device)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        loss = margin(target.draws(at(middle), subject.noise)[:, 0], subject.y)
        crossed = (loss > 0) != (given.loss > 0)
        low, high = torch.where(crossed, low, middle), torch.where(crossed, middle, high)
    return at(low)


def span(logits: Tensor) -> Tensor:
    """How far the logits of a row lie apart, `(n,)`: what a change of them is measured by."""
    return (logits.amax(1) - logits.amin(1)).clamp_min(1e-30)


def precise(subject: Subject) -> Target | None:
    """A copy of the defense in double precision, counted as the subject's; None where it can't be made."""
    try:
        made = Target(copy.deepcopy(subject.defense).double(), len(subject.x))
    # Whatever a defense can't do in double precision, it is examined as it is.
    except Exception:
        return None
    subject.targets.append(made)
    return made


def _inside(subject: Subject) -> Tensor:
    """The images drawn in from the box's edge, and moved so that no two pixels tie in a maximum."""
    wobble = subject.noise.child("finite_difference").uniform("point", shape=subject.x.shape[1:], like=subject.x)
    return MARGIN + (1 - 2 * MARGIN) * subject.x + MARGIN / 2 * (wobble - 0.5)


def _random(subject: Subject, x: Tensor) -> list[Tensor]:
    noise = subject.noise.child("finite_difference")
    # Signs move every pixel by the step: none leaves the box.
    return [noise.uniform("direction", i, shape=x.shape[1:], like=x).sub(0.5).sign().double() for i in range(RANDOM)]


def _widest(gradient: Tensor) -> Tensor:
    """The gradient with a largest entry of 1 a row: no pixel leaves the box. 0 where it is 0 or not finite."""
    finite = torch.nan_to_num(gradient.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(1)
    largest = finite.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, finite / largest.clamp_min(1e-300), 0.0).reshape(gradient.shape)


def _function(subject: Subject, target: Target, x: Tensor, logits: Tensor) -> tuple[Target, torch.dtype]:
    """What differences are taken of: the copy in double precision if it computes these logits, else the defense."""
    copied = precise(subject)
    if copied is not None and answers_like(copied, subject, x, logits):
        return copied, torch.float64
    return target, torch.float32


def answers_like(copied: Target, subject: Subject, x: Tensor, logits: Tensor) -> bool:
    """Whether a copy in double precision gives these logits of a draw at `x`, but for rounding."""
    try:
        answer = copied.draws(x.double(), subject.noise[: len(x)])[:, 0]
    # A layer that takes float32 alone, or a module that was not copied: the defense itself has to do.
    except Exception:
        return False
    same = (answer - logits).abs().amax(1) <= SAME * span(logits)
    return answer.dtype == torch.float64 and float(same.double().mean()) > 1 - SOME


def _around(forward: Target, x: Tensor, directions: list[Tensor], step: float, subject: Subject) -> Tensor:
    """The logits of one draw on both sides of `x`, `(2, directions, n, k)`.

    Batches keep their size: randomness that follows the batch (`ForeignModule`) must not change.
    """
    moves = [sign * step * each.to(x.dtype) for sign in (1, -1) for each in directions]
    logits = torch.stack([forward.draws(x + move, subject.noise)[:, 0].double() for move in moves])
    return logits.reshape(2, len(directions), *logits.shape[1:])


def _differences(answers: Tensor, middle: Tensor, step: float, loss: Loss, y: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences, and how far the one-sided ones lie from them, `(directions, n)` each."""
    up, down = (torch.stack([loss(logits, y) for logits in side]) for side in answers)
    return (up - down) / (2 * step), (up - 2 * loss(middle, y) + down).abs() / (2 * step)


def _along(gradient: Tensor, directions: list[Tensor]) -> Tensor:
    """Slopes along directions, `(directions, n)`."""
    return torch.stack([(gradient.double() * each).flatten(1).sum(1) for each in directions])


def _mute(
    answers: list[Tensor], middle: Tensor, promised: Tensor, sizes: tuple[float, ...], resolution: Tensor
) -> list[Tensor]:
    """For each step the rows `(n,)` of which it says nothing: hardly moved, as told, and soon moved as told.

    A function that no step moves is flat, and one that first moves by a leap is quantised, whatever its gradient says.
    """
    moves = [_size((up_down - middle).abs().amax(3).amax(0)[:RANDOM]) for up_down in answers]
    still = [move < resolution for move in moves]
    # Logits far apart are no sign of rounding: what a long step moves must stay, to the last bit, over a short one.
    moving, stays = answers[-1] != middle, answers[0] == middle
    coarse = 2 * (moving & stays).sum((0, 1, 3)) >= moving.sum((0, 1, 3))
    found, soon = [], moves[-1] > 0  # or as far as can be seen: the longest step too may be too short
    for i in reversed(range(len(sizes))):
        told = sizes[i] * _size(promised[:RANDOM])
        soon = torch.where(still[i], soon, moves[i] <= told + 2 * resolution)
        found.append(coarse & still[i] & soon & (told < resolution))
    return found[::-1]


def _compare(
    slopes: Tensor, pairs: list[tuple[Tensor, Tensor]], mute: list[Tensor], slack: list[Tensor], flat: Tensor
) -> tuple[Tensor, Tensor]:
    """Relative error of each sample `(n,)`, and where no step has a slope to compare with.

    Random directions are taken together, and apart from the gradient's own, whose slope is so much larger.
    """
    error = torch.full_like(flat, torch.inf)
    settled = torch.zeros_like(flat, dtype=torch.bool)
    for (central, bend), nothing, less in zip(pairs, mute, slack, strict=True):
        parts, doubts, scale = [], [], flat
        for rows in (slice(0, RANDOM), slice(RANDOM, None)):
            analytic, numeric = _size(slopes[rows]), _size(central[rows])
            # Of the second group too: the margin's own direction may be no more than another to a mix of logits.
            scale = torch.maximum(torch.maximum(analytic, numeric), scale)
            parts.append((_size(slopes[rows] - central[rows]) - less).clamp_min(0) / scale)
            doubts.append(_size(bend[rows]) / scale)
        numeric = _size(central[:RANDOM])
        smooth = (numeric > flat) & (_size(bend[:RANDOM]) <= SMOOTH * numeric)
        smooth &= ~(nothing & (central[:RANDOM] == 0).any(0))  # rounded moves that are equal by chance
        worst, doubt = torch.stack(parts).amax(0), torch.stack(doubts).amax(0)
        excused = torch.where((doubt <= ROUGH) & ~nothing, (worst - PART * doubt).clamp_min(0), torch.inf)
        error = torch.where(settled, error, torch.where(smooth, worst, torch.minimum(error, excused)))
        settled |= smooth
    known = error.isfinite()
    return torch.where(known, error, 0.0), ~known


def _size(slopes: Tensor) -> Tensor:
    """Root mean square over directions, `(n,)`; a slope that is not finite counts as a large one."""
    return torch.nan_to_num(slopes, nan=1e30, posinf=1e30, neginf=-1e30).square().mean(0).sqrt()


def _finding(subject: Subject, first: _Measured, second: _Measured, dtype: torch.dtype) -> Finding:
    shares = [float(each.wrong.double().mean()) for each in (first, second)]
    worst, share = (first, shares[0]) if shares[0] >= shares[1] else (second, shares[1])
    unclear = float(first.rough.double().mean())
    declared = subject.defense.card.traits.non_differentiable
    status: Status = "pass"
    if not declared and (share > SOME or unclear > UNCLEAR):
        status = "fail" if share > MOST else "flag"
    where = "" if worst is first else " near the decision boundary"
    if declared and share > SOME:
        message = (
            f"The gradient of {share:.0%} of the samples isn't the forward pass's, as non_differentiable declares."
        )
    elif share > SOME:
        message = (
            f"For {share:.0%} of the samples the gradient is not the slope of the forward pass{where}: remove hooks, "
            "detached parts and custom backward passes, or declare the trait non_differentiable so that other attacks "
            "are added."
        )
    elif status == "flag":
        message = (
            f"For {unclear:.0%} of the samples the forward pass is too rough for its slope to be measured; trust "
            "attacks without gradients, or declare the trait non_differentiable."
        )
    else:
        message = "The gradient is the slope of the forward pass, in direction and in size."
    return Finding(
        check="finite_difference",
        value=share,
        threshold=MOST,
        status=status,
        samples=subject.ids_of(worst.wrong),
        message=message,
        data={
            "median_error": float(worst.error.median()),
            "largest_error": float(worst.error.max()),
            "wrong": {"image": shares[0], "boundary": shares[1]},
            "unclear": unclear,
            "double_precision": dtype == torch.float64,
        },
    )
