"""`chain_exact`: the chain's memory-saving gradient is that of a full graph, and the chain is the defense.

A chain's gradient rebuilds one step's graph at a time (`assay.chain`). It misses what a step reaches other than
through its state and the image: a tensor closed over, a value cached by an earlier step, randomness of its own. The
attack then follows another gradient than the defense's: the flaw that Kassis, Hengartner & Yu 2024 ("DiffBreak",
arXiv 2411.16598) found in the gradients by which purifiers had been evaluated.

The reference runs start, steps and readout by hand with every graph kept. The gradient is that of a random mix of
logits, at a point inside the box, in double precision where the defense allows it. The chain's logits and its
gradient are also held against those of `draw`.

Fails where the gradients differ by more than `THRESHOLD` of the largest entry (`SINGLE` in single precision), the
logits by more than `LOGITS` of their span, or the gradient of `draw` by more than `DRAWN` where none of it is declared
non-differentiable. Flags handles that attacks use in the defense's place and that have nothing to do with it: a
surrogate, a relaxed process or components that answer as a draw does no more often than by chance, or that have no
gradient. Their attacks would fail whatever the defense is worth; others stand beside them, so that this is no failure.
Costs 2 calls forward for every image, and for `IMAGES` of them 5 more and 3 backward; 1 more forward, and 1 backward,
for each such handle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.chain import Chain
from assay.checks.finite_difference import MARGIN, answers_like, precise, span
from assay.checks.subject import Subject
from assay.finding import Finding
from assay.noise import Noise
from assay.target import Evaluation, Forward, Target

IMAGES = 2
"""Full graphs of long chains are large."""
THRESHOLD = 1e-10
"""In double precision the two gradients do the same arithmetic, up to the order of a few sums."""
SINGLE = 1e-3
"""The same in single precision, where long chains amplify rounding."""
LOGITS = 1e-3
"""Largest difference of chain and draw, as a part of the logits' span, put down to float32 kernels."""
DEAD = 0.5
"""Share of samples without a gradient above which a handle has none."""
CHANCE = 3.0
"""Standard deviations above the agreement of independent answers from which on two are related."""
FEWEST = 8
"""Images below which an agreement says nothing."""
DRAWN = 0.01
"""Largest relative difference of the gradients of chain and draw: well above rounding, well below another schedule."""


def check(subject: Subject) -> Finding:
    """Compares the chain with its own full graph and with the draw, and what stands in for them; see the module."""
    finding = _chain(subject)
    if finding.status != "pass":
        return finding
    problems = _unrelated(subject)
    if not problems:
        return finding
    return finding.model_copy(update={"status": "flag", "message": " ".join(problems)})


def _chain(subject: Subject) -> Finding:
    if "chain" not in subject.defense.card.handles:
        return Finding(check="chain_exact", status="pass", message="No chain handle: there is nothing to compare.")
    target = subject.target()
    chain: Chain = target.handle("chain")()
    drawn = target.draws(subject.x, subject.noise)[:, 0].double()
    chained = target.draws(subject.x, subject.noise, forward=chain)[:, 0].double()
    apart = ((drawn - chained).abs().amax(1) / span(drawn)).nan_to_num(nan=1.0)
    if bool((apart > LOGITS).any()):
        return _failed(
            "The chain's logits are not those of draw on the same noise: attacks through the chain would attack "
            "another defense. Build draw and chain from the same parts.",
            float(apart.max()),
            LOGITS,
            subject.ids_of(apart > LOGITS),
        )
    ids = tuple(subject.ids[:IMAGES])
    errors, against_draw, bound = _gradients(subject, target)
    data = {"logits": float(apart.max()), "draw_gradient": against_draw, "double_precision": bound == THRESHOLD}
    if errors > bound:
        return _failed(
            "The chain's gradient is not that of its full graph: a step reaches a tensor other than its state, the "
            "image and its noise. Hand everything that depends on the image on in the state.",
            errors,
            bound,
            ids,
            data,
        )
    if against_draw > DRAWN and not subject.defense.card.traits.non_differentiable:
        return _failed(
            "The gradients of chain and draw differ though their logits agree: one of them detaches or replaces a "
            "part. Give both the gradient of the forward pass, or declare the trait non_differentiable.",
            against_draw,
            DRAWN,
            ids,
            data,
        )
    return Finding(
        check="chain_exact",
        value=errors,
        threshold=bound,
        status="pass",
        message="The chain has the gradient of its full graph, and is the draw.",
        data=data,
    )


def _unrelated(subject: Subject) -> list[str]:
    """What is wrong with the handles that stand in for the defense."""
    handles, target = subject.defense.card.handles, subject.target()
    found: dict[str, list[Forward]] = {}
    if "surrogate" in handles:
        steps = len(target.handle("chain")()) if "chain" in handles else 2
        found["surrogate"] = [target.handle("surrogate")(max(1, steps // 2))]
    if "relaxed" in handles:
        found["relaxed"] = [target.handle("relaxed")()]
    if "components" in handles:
        found["components"] = list(target.handle("components")().values())
    drawn = target.draws(subject.x, subject.noise)[:, 0].argmax(1) if found else subject.y
    problems = []
    for name, parts in found.items():
        given = [_given(subject, target, part) for part in parts]
        if given and len(drawn) >= FEWEST and not any(_related(each.logits[:, 0].argmax(1), drawn) for each in given):
            problems.append(
                f"The {name} handle answers as a draw does no more often than by chance: attacks through it would "
                "attack something else. Build it from the defense's own parts."
            )
        # A component may have no gradient: transfer then takes another.
        elif given and all(_dead(each.gradient) > DEAD for each in given):
            problems.append(f"The {name} handle has no gradient: attacks through it would stand still.")
    return problems


def _given(subject: Subject, target: Target, part: Forward) -> Evaluation:
    mix = subject.noise.child("chain_exact").normal("mix", shape=(target.n_classes,), like=subject.x)
    return target.gradient(subject.x, (mix,), lambda logits, mix: (logits * mix).sum(1), subject.noise, forward=part)


def _related(answers: Tensor, drawn: Tensor) -> bool:
    """Whether two sets of answers agree more often than independent ones with their frequencies would."""
    both = int(torch.maximum(answers.amax(), drawn.amax())) + 1
    first, second = (each.bincount(minlength=both).double() / len(drawn) for each in (answers, drawn))
    chance = float((first * second).sum())
    apart = CHANCE * math.sqrt(chance * (1 - chance) / len(drawn))
    # Where nearly all answers are one class anyway, nothing could be told.
    return chance + apart >= 1 or float((answers == drawn).double().mean()) > chance + apart


def _dead(gradient: Tensor) -> float:
    flat = gradient.flatten(1)
    return float((~flat.isfinite().all(1) | (flat == 0).all(1)).double().mean())


def by_hand(chain: Chain) -> Forward:
    """The chain with every graph kept, whatever its own `__call__` does."""

    def run(x: Tensor, noise: Noise) -> Tensor:
        state = chain.start(x, noise.child("start"))
        for i, step in enumerate(chain.steps):
            state = step(state, x, noise.child("step", i))
        return chain.readout(state, x, noise.child("readout"))

    return run


def _gradients(subject: Subject, original: Target) -> tuple[float, float, float]:
    """Relative errors of the chain's gradient against the full graph's and against the draw's, and the bound."""
    x = MARGIN + (1 - 2 * MARGIN) * subject.x[:IMAGES]
    noise = subject.noise[: len(x)]
    copied = precise(subject)
    if copied is not None and answers_like(copied, subject, x, original.draws(x, noise)[:, 0].double()):
        try:
            return *_errors(copied, x.double(), noise), THRESHOLD
        # A chain that single precision alone can run is compared in single precision.
        except Exception:
            copied = None
    return *_errors(original, x, noise), SINGLE


def _errors(target: Target, x: Tensor, noise: Noise) -> tuple[float, float]:
    chain: Chain = target.handle("chain")()
    mix = noise.child("chain_exact").normal("mix", shape=(target.n_classes,), like=x)
    exact, full, drawn = (
        target.gradient(x, (mix,), lambda logits, mix: (logits * mix).sum(1), noise, forward=forward).gradient
        for forward in (chain, by_hand(chain), target.defense.draw)
    )
    return _error(exact, full), _error(exact, drawn)


def _error(a: Tensor, b: Tensor) -> float:
    """The largest relative difference of two gradients over the samples; 0 where both are zero, 1 at most if finite."""
    size = torch.maximum(a.abs(), b.abs()).flatten(1).amax(1)
    error = (a - b).abs().flatten(1).amax(1) / size.clamp_min(torch.finfo(a.dtype).tiny)
    return float(error.nan_to_num(nan=2.0, posinf=2.0).max())


def _failed(
    message: str, value: float, threshold: float, ids: tuple[int, ...], data: dict[str, float | bool] | None = None
) -> Finding:
    return Finding(
        check="chain_exact",
        value=value,
        threshold=threshold,
        status="fail",
        samples=ids,
        message=message,
        data=data or {},
    )
