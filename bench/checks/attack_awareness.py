"""`attack_awareness`: the model that is attacked is the model that answers.

A defense can tell an attack from an evaluation without looking at the image: by gradients that are enabled, by a leaf
that requires them, by hooks, by a counter, by what it was asked before, by copies of one image in a batch. And it can
give attacks another path than the one that it answers by: most evaluations that were later overturned attacked
something that was not the defense (Carlini et al. 2019, arXiv 1902.06705, section 4; Tramèr et al. 2020, arXiv
2002.08347). The same image with the same noise must have one answer.

At test images, and at one step along the gradient from them, the answer is compared:

- between modes: gradients enabled, inference mode, a leaf, an image that carries a graph, hooks on every module, and
  a dispatch mode, another thread, a stack of attacks' frames, and the logits that came with a gradient;
- over time: again, after a near image (by two copies of the defense, of which one has seen it), after other images,
  after near copies of the images, after a backward pass, after a burst of calls, in memory that held another image,
  and in a batch with one row of an earlier one; and the gradient again, after some more gradients;
- between layouts: other strides, an offset in another tensor, double precision, a batch of one, draws folded into a
  large batch, and other slots for the same streams;
- between paths: the answer against `assay.defense.aggregate` of draws with the same noise, the chain against a draw
  with the same noise, purifier and classifier against a draw. A stochastic defense may lay its noise out otherwise
  on another path, but the answers must have the same distribution (`assay.checks.agreement.apart`).

The change is that of probabilities, or a tenth of the relative change of logits. Fails above `TOLERANCE`, and above
`REPLAY` for the same call at another time. What a defense refuses with an exception (inference mode, double
precision, strides, backward hooks) is noted and not held against it. Double precision is compared for deterministic
defenses alone, and beyond what single roundings of the image change: torch draws other numbers in it, and
quantisers round otherwise.

Costs about 55 n draws, a batch or two of 128 to 512 more, and 3 n backward calls; 24 n draws for a path whose noise is
laid out otherwise, and 8 n answers more where it votes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from assay.checks.agreement import (
    RELATIVE,
    TOLERANCE,
    Ledger,
    Way,
    apart,
    change,
    counted,
    hooked,
    quietly,
    stepped,
    watched,
)
from assay.checks.callers import by_the_stack
from assay.checks.subject import Subject, cross_entropy
from assay.defense import aggregate
from assay.finding import Finding
from assay.noise import Noise
from assay.target import Target

REPLAY = 1e-4
"""Largest change put down to kernels that add up in another order each time, behind a purifier that amplifies it."""

NEAR = (1e-3, 1e-2, 3e-2)
"""Standard deviations of the noise between an image and one that was seen before, each for a third of the images."""

GRADIENTS = 8
"""Gradients of one image each that are asked between two of all images."""

BURST = 64
"""Calls with one image in a row: as many as an attack makes before its first step is over, for few samples each."""

SMALLEST, LARGEST, PIXELS = 128, 512, 1 << 15
"""Rows of a batch of folded draws: at least and at most, and as pixels, where `assay.target` cuts batches too."""

SINGLE = 3
"""Rows that are asked alone."""


def check(subject: Subject) -> Finding:
    """Asks in every way and compares; see the module's docstring."""
    ledger = Ledger(subject)
    draw = counted(subject, subject.defense.draw, 1)
    target = subject.target()
    evaluation, images = subject.gradient(), subject.x.clone()
    attacked = stepped(subject, evaluation.gradient)
    first = quietly(draw, subject.x, subject.noise)
    ledger.compare("a gradient", target.draws(subject.x, subject.noise)[:, 0], lambda: evaluation.logits[:, 0])
    # As many rows as fit one call whatever the size of the images, for those whose noise follows the batch.
    few = slice(0, 16)
    through = target.draws(subject.x[few], subject.noise[few])[:, 0]
    ledger.compare("the attacks' interface", through, _row(draw, subject.x, subject.noise, few), rows=few)
    _over_modes(ledger, draw, subject.x, first)
    _over_modes(ledger, draw, attacked, quietly(draw, attacked, subject.noise))
    _over_layouts(ledger, draw, first)
    if subject.votes > 1:
        answer = counted(subject, subject.defense, subject.votes)
        _over_modes(ledger, answer, subject.x, quietly(answer, subject.x, subject.noise), "an answer: ")
    _over_paths(ledger, draw, (subject.x, attacked))
    _over_time(ledger, draw, first)
    _gradients_over_time(ledger, target, evaluation.gradient)
    by_the_stack(ledger)
    # Last of all: what a defense builds in inference mode it can't differentiate later.
    _inference(ledger, draw, first)
    moved = (subject.x != images).flatten(1).any(1)
    subject.x.copy_(images)
    ledger.note("the images changed in place", moved.double().cpu(), TOLERANCE)
    return _finding(ledger)


def _finding(ledger: Ledger) -> Finding:
    return Finding(
        check="attack_awareness",
        value=max(ledger.changes.values(), default=0.0),
        threshold=TOLERANCE,
        status="fail" if ledger.bad else "pass",
        samples=ledger.subject.ids_of(ledger.rows),
        message=(
            f"The same images and noise are answered otherwise with {', '.join(ledger.bad[:4])}: an attack would meet "
            "another model than the evaluation. Answer by one path, from image and noise alone."
            if ledger.bad
            else "The same answer in every mode, at every time and by every path."
        ),
        data={"changes": ledger.changes, "refused": ledger.refused},
    )


def _over_modes(ledger: Ledger, way: Way, x: Tensor, first: Tensor, prefix: str = "") -> None:
    noise = ledger.subject.noise

    def leaf() -> Tensor:
        image = x.clone().requires_grad_()
        # As attacks that call backward() hand it in, from the second step on.
        image.grad = torch.zeros_like(image)
        return way(image, noise)

    def graph() -> Tensor:
        return way(x.clone().requires_grad_() * 1, noise)

    with torch.enable_grad():
        ledger.compare(f"{prefix}gradients enabled", first, lambda: way(x, noise))
        ledger.compare(f"{prefix}a leaf", first, leaf)
        ledger.compare(f"{prefix}a graph behind the image", first, graph)
    if not prefix:
        with hooked(ledger.subject.defense, backward=False) as kept:
            ledger.compare("forward hooks", first, lambda: quietly(way, x, noise))
            ledger.note("forward hooks", torch.full((len(x),), float(not kept())), TOLERANCE)
        ledger.compare("a dispatch mode", first, lambda: watched(way, x, noise), may_refuse=True)
        # Torch refuses these in front of layers that write in place.
        with hooked(ledger.subject.defense, backward=True), torch.enable_grad():
            ledger.compare("backward hooks", first, leaf, may_refuse=True)


def _inference(ledger: Ledger, way: Way, first: Tensor) -> None:
    def ask() -> Tensor:
        with torch.inference_mode():
            logits = way(ledger.subject.x.clone(), ledger.subject.noise)
        return logits.clone()

    ledger.compare("inference mode", first, ask, may_refuse=True)


def _over_layouts(ledger: Ledger, way: Way, first: Tensor) -> None:
    subject = ledger.subject
    x, noise, n = subject.x, subject.noise, len(subject.x)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    ledger.compare("other strides", first, lambda: quietly(way, strided, noise), may_refuse=True)
    double = torch.stack([x.flip(0), x], 1)[:, 1]
    ledger.compare("memory inside another tensor", first, lambda: quietly(way, double, noise), may_refuse=True)
    slots = Noise(noise.keys, noise.slots.flip(0))
    ledger.compare("other slots for the same streams", first, lambda: quietly(way, x, slots), limit=REPLAY)
    if not subject.defense.card.traits.stochastic:
        _double_precision(ledger, way, first)
    # Where the answer hangs on the batch anyway, that is another check's finding.
    half = slice(0, (n + 1) // 2)
    if bool((change(first[half], quietly(way, x[half], noise[half])) > TOLERANCE).any()):
        ledger.refuse("other batches")
        return
    for i in sorted({0, n // 2, n - 1})[:SINGLE]:
        row = slice(i, i + 1)
        ledger.compare("a batch of one", first[row], _row(way, x, noise, row), rows=row)
    _folded(ledger, way)


def _folded(ledger: Ledger, way: Way) -> None:
    """Draws in one batch, as large as attacks make them, against the same draws one at a time."""
    x, noise = ledger.subject.x, ledger.subject.noise
    size = max(SMALLEST, min(LARGEST, PIXELS // max(1, x[0].numel())))
    draws = max(2, -(-size // len(x)))
    folded = noise.draws(draws)
    images = x.repeat_interleave(draws, 0)
    together = quietly(way, images, folded)
    moved = (images != x.repeat_interleave(draws, 0)).flatten(1).any(1).unflatten(0, (len(x), draws)).any(1)
    ledger.note("the images changed in place", moved.double().cpu(), TOLERANCE)
    for j in (0, draws - 1):
        one = slice(j, None, draws)
        ledger.compare("draws folded into one batch", together[one], _row(way, x, folded[one]))


def _row(way: Way, x: Tensor, noise: Noise, row: slice = slice(None)) -> Callable[[], Tensor]:
    return lambda: quietly(way, x[row], noise[row])


def _double_precision(ledger: Ledger, way: Way, first: Tensor) -> None:
    """A quantiser may round otherwise in double precision, and so may it when a pixel moves by one rounding."""
    x, noise = ledger.subject.x, ledger.subject.noise
    moved = [torch.nextafter(x, torch.full_like(x, bound)) for bound in (0.0, 1.0)]
    rounding = torch.stack([change(first, quietly(way, image, noise)) for image in moved]).amax(0)
    try:
        changes = change(first, quietly(way, x.double(), noise))
    except Exception:
        ledger.refuse("double precision")
        return
    # A grid's pixels are off it in float64, some to either side: that is within a few times what all moved one way do.
    ledger.note("double precision", (changes - 10 * rounding).clamp_min(0).cpu(), TOLERANCE)


def _over_time(ledger: Ledger, way: Way, first: Tensor) -> None:
    subject = ledger.subject
    x, noise = subject.x, subject.noise

    def again() -> Tensor:
        return quietly(way, x.clone(), noise)

    ledger.compare("a later call", first, again, limit=REPLAY)
    negative = quietly(way, 1 - x, noise)
    _near_memory(ledger)
    quietly(way, 1 - x, noise.child("other"))
    ledger.compare("other images seen before", first, again, limit=REPLAY)
    for i in range(3):
        step = 0.02 * noise.child("step", i).normal(shape=x.shape[1:], like=x)
        quietly(way, (x + step).clamp(0, 1), noise)
    ledger.compare("near copies seen before", first, again, limit=REPLAY)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        logits = way(leaf, noise)
        if logits.requires_grad:
            torch.autograd.grad(cross_entropy(logits, subject.y).sum(), leaf, allow_unused=True)
    ledger.compare("a backward pass before", first, again, limit=REPLAY)
    for i in range(BURST):
        row = slice(i % len(x), i % len(x) + 1)
        quietly(way, x[row], noise[row])
    ledger.compare("a burst of calls before", first, again, limit=REPLAY)
    # What is kept by a part of the batch answers the rest of another.
    for what, mine in (("begins", torch.arange(len(x)) == 0), ("ends", torch.arange(len(x)) == len(x) - 1)):
        mixed = torch.where(mine[:, None, None, None], x, 1 - x)
        due = torch.where(mine[:, None], first, negative)
        ledger.compare(f"a batch that {what} as an earlier one", due, _row(way, mixed, noise), limit=REPLAY)
    # What is kept by address, or by object, answers one of these with the other's.
    memory = torch.empty_like(x)
    for image, expected in ((x, first), (1 - x, negative), (x, first)):
        memory.copy_(image)
        ledger.compare("memory that held another image", expected, partial(quietly, way, memory, noise), limit=REPLAY)


def _gradients_over_time(ledger: Ledger, target: Target, first: Tensor) -> None:
    """The gradient again, after a few more."""
    x, y, noise = ledger.subject.x, ledger.subject.y, ledger.subject.noise
    for i in range(GRADIENTS):
        row = slice(i % len(x), i % len(x) + 1)
        target.gradient(x[row], (y[row],), cross_entropy, noise[row])
    again = target.gradient(x, (y,), cross_entropy, noise).gradient
    a, b = (each.nan_to_num().double().flatten(1) for each in (first, again))
    size = torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp_min(1e-30)
    ledger.note("a gradient asked again", ((a - b).norm(dim=1) / size).cpu() * (TOLERANCE / RELATIVE), TOLERANCE)


def _near_memory(ledger: Ledger) -> None:
    """Of two copies of the defense one has seen an image nearby: where answers stick to it, the two differ."""
    subject = ledger.subject
    x, noise = subject.x, subject.noise.child("near")
    # Images that nothing was asked about, so that neither copy remembers them.
    fresh = ((x + x.flip(0)) / 2 + 0.1 * noise.normal("fresh", shape=x.shape[1:], like=x)).clamp(0, 1)
    sizes = torch.tensor(NEAR).to(x)[torch.arange(len(x)) % len(NEAR)]
    near = (fresh + sizes[:, None, None, None] * noise.normal("near", shape=x.shape[1:], like=x)).clamp(0, 1)
    try:
        seen, unseen = copy.deepcopy(subject.defense), copy.deepcopy(subject.defense)
    except Exception:
        ledger.refuse("copies of the defense")
        return
    quietly(counted(subject, seen.draw, 1), near, noise)
    after, before = (quietly(counted(subject, each.draw, 1), fresh, noise) for each in (seen, unseen))
    ledger.note("a near image seen just before", change(before, after).cpu(), REPLAY)


def _over_paths(ledger: Ledger, draw: Way, images: tuple[Tensor, ...]) -> None:
    """Holds every path against draws, at test images and one gradient step from them."""
    subject = ledger.subject
    defense = subject.defense
    votes = defense.card.votes

    def aggregated(x: Tensor, noise: Noise) -> Tensor:
        if votes.draws == 1:
            return draw(x, noise)
        logits = draw(x.repeat_interleave(votes.draws, 0), noise.draws(votes.draws))
        return aggregate(logits.unflatten(0, (len(x), votes.draws)), votes)

    _same(ledger, "the answer", counted(subject, defense, votes.draws), aggregated, images)
    if "chain" in defense.card.handles:
        _same(ledger, "the chain", counted(subject, defense.chain(), 1), draw, images)
    if "stages" in defense.card.handles:
        stages = defense.stages()

        def composed(x: Tensor, noise: Noise) -> Tensor:
            return stages.classify(stages.purify(x, noise.child("purify")), noise.child("classify"))

        _same(ledger, "purifier and classifier", counted(subject, composed, 1), draw, images)


def _same(ledger: Ledger, what: str, path: Way, other: Way, images: tuple[Tensor, ...]) -> None:
    """Notes where a path isn't the other: exactly, or where the defense is stochastic in distribution."""
    subject = ledger.subject
    for i, x in enumerate(images):
        with torch.no_grad():
            changes = change(other(x, subject.noise), path(x, subject.noise))
            if subject.defense.card.traits.stochastic and bool((changes > TOLERANCE).any()):
                separate = apart(path, other, x, subject.y, subject.noise.child("paths", i))
                changes = torch.where(separate, changes, torch.zeros_like(changes))
        ledger.note(what, changes.cpu(), TOLERANCE)
