"""`input_mutation`: a call leaves its images and its noise as they were, and its answer stays what it was.

An attack passes its iterate: a defense that moves it in place replaces the attack by its own steps, and the harness
then scores another image than the attack proposed. An answer whose memory the next call fills again, or that is a view
of the image, changes after it was compared; images kept by reference and written to later are the same fault.

Every way in is called on copies: the answer, and the handles `chain` and `stages`, without gradients, then a draw with
a leaf that requires them. Compared bit for bit are the images (at once, and after calls with other images), the
noise's streams, the answers before and after later calls, and whether the leaf was given a gradient or has lost its
`requires_grad`. A write that changes no value (a clamp of what lies inside) is no change.

Fails: for any difference. The threshold is 0: memory has no rounding. Costs 4n to 9n forward calls, without a
backward call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.checks.subject import Subject
from assay.finding import Finding
from assay.noise import Noise

THRESHOLD = 0.0


@dataclass(frozen=True)
class _Way:
    """A function of images and noise that attacks call, and the draws that one call costs.

    A purifier may give its images back: nothing says that it must find something to clean.
    """

    name: str
    run: Callable[[Tensor, Noise], Tensor]
    cost: int = 1
    may_return_images: bool = False


def check(subject: Subject) -> Finding:
    """Calls every way in on copies and compares; see the module's docstring."""
    found: dict[str, Tensor] = {}
    for way in _ways(subject):
        for what, rows in _faults(subject, way).items():
            found[f"{way.name}: {what}"] = rows
    for what, rows in _leaf_faults(subject).items():
        found[f"a draw with requires_grad: {what}"] = rows
    rows = torch.stack(list(found.values())).any(0) if found else torch.zeros(len(subject.x), dtype=torch.bool)
    return Finding(
        check="input_mutation",
        value=float(rows.sum()),
        threshold=THRESHOLD,
        status="fail" if found else "pass",
        samples=subject.ids_of(rows),
        message=(
            f"A call changes what it was given or has returned ({'; '.join(list(found)[:3])}): work on a copy, and "
            "return memory of its own."
            if found
            else "Images, noise and earlier answers stay as they were."
        ),
        data={"faults": list(found)},
    )


def _ways(subject: Subject) -> list[_Way]:
    defense = subject.defense
    ways = [_Way("the answer", defense, subject.votes)]
    if subject.votes > 1:
        ways.append(_Way("a draw", defense.draw))
    if "chain" in defense.card.handles:
        ways.append(_Way("the chain", defense.chain()))
    if "stages" in defense.card.handles:
        stages = defense.stages()
        purify = _Way("the purifier", stages.purify, may_return_images=True)
        ways += [purify, _Way("the classifier", stages.classify)]
    return ways


def _faults(subject: Subject, way: _Way) -> dict[str, Tensor]:
    """What one call, and then another with other images, change; the rows behind each."""
    every = torch.ones(len(subject.x), dtype=torch.bool)
    x, noise = subject.x.clone(), Noise(subject.noise.keys.clone(), subject.noise.slots.clone())
    keys, slots = noise.keys, noise.slots
    with torch.no_grad():
        first = way.run(x, noise)
        kept = first.clone()
        faults = _moved("images changed in place", x, subject.x)
        same = noise.keys is keys and noise.slots is slots
        if not (same and torch.equal(keys, subject.noise.keys) and torch.equal(slots, subject.noise.slots)):
            faults["noise changed"] = every
        # Other images in the same shape and with other noise: whatever is kept between calls is overwritten now.
        way.run(1 - subject.x, subject.noise.child("other"))
        if "images changed in place" not in faults:
            faults |= _moved("images changed by a later call", x, subject.x)
        faults |= _moved("an answer changed by a later call", first, kept)
        if "an answer changed by a later call" not in faults and not way.may_return_images:
            x.copy_(1 - x)
            faults |= _moved("the answer is a view of the images", first, kept)
    subject.charge(2 * way.cost)
    return faults


def _leaf_faults(subject: Subject) -> dict[str, Tensor]:
    """What a draw of a leaf that requires gradients changes, beside its values."""
    every = torch.ones(len(subject.x), dtype=torch.bool)
    leaf, plain = subject.x.clone().requires_grad_(), subject.x.clone()
    subject.charge(2)
    try:
        with torch.enable_grad():
            subject.defense.draw(leaf, subject.noise)
            subject.defense.draw(plain, subject.noise)
    except Exception:
        # A write to a leaf raises, and so does much else: `attack_awareness` is where no draw with a graph shows.
        return {}
    faults = _moved("images changed in place", leaf.detach(), subject.x)
    if leaf.grad is not None or not leaf.requires_grad:
        faults["its gradient or requires_grad was set"] = every
    if plain.requires_grad:
        faults["requires_grad was set on images without it"] = every
    return faults


def _moved(what: str, now: Tensor, then: Tensor) -> dict[str, Tensor]:
    """`what` with its rows, where any differ: NaN equals NaN here, it is no change."""
    if now.shape != then.shape:
        return {what: torch.ones(len(then), dtype=torch.bool)}
    rows = ((now != then) & ~(now.isnan() & then.isnan())).flatten(1).any(1).cpu()
    return {what: rows} if bool(rows.any()) else {}
