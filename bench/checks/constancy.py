"""`constancy`: the defense answers now what it answered first.

A defense that counts its calls, adapts to what it sees, or waits for the clock passes every check that looks at one
moment, and is another one by the time that its attacks are scored. The first answer that it gave to any check, and the
first gradient, are kept with their questions; the same is asked again at the end of the examination, and after the
attacks of a run. A defense could keep its early answers for those who ask again: so the images are asked about at a
distance too, where nobody has asked, and none may stand alone (`memorised_inputs`).

Fails where an answer changes by more than `REPLAY`, or a gradient by more than `SLOPE` of its length; where the images
of the examination are no longer what they were; where these questions change settings of the process; and where more
images stand alone than there would be around unknown ones. Costs 11n forward calls and n backward ones, 9n forward
more where an image stands alone, and n of each more where nothing was asked before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.bounds import wrong_at_most
from assay.checks.agreement import change
from assay.checks.ambient import Ambient
from assay.checks.memorised_inputs import NEAR, alone
from assay.checks.subject import Asked, Subject, cross_entropy
from assay.finding import Finding
from assay.noise import Noise

REPLAY = 1e-4
"""Largest change put down to kernels that add up in another order each time, as in `attack_awareness`."""

SLOPE = 1e-2
"""Largest relative change of a gradient."""

SCALE = 1e-3
"""How far a pixel moves at most, from a question that was asked before to one that wasn't."""


def check(subject: Subject) -> Finding:
    """Asks what was asked first; may be called as often as one likes. See the module's docstring."""
    memory = subject.memory
    if memory.answer is None:
        subject.answer()
    if memory.gradient is None:
        subject.gradient()
    answer, gradient = memory.answer, memory.gradient
    if answer is None or gradient is None:
        return Finding(check="constancy", status="pass", message="Nothing was asked: there are no images.")
    memory.asked_again += 1
    # As it is now, for the attacks that ran since the first call may have settings of their own.
    ambient = Ambient()
    moved = (subject.x != answer.images).flatten(1).any(1)
    subject.x.copy_(answer.images)
    found = {
        "the answers": _again(subject, answer),
        "the gradients": _gradient_again(subject, gradient),
        "the images themselves": moved.double().cpu(),
    }
    limits = {"the answers": REPLAY, "the gradients": SLOPE, "the images themselves": 0.0}
    bad = [what for what, changes in found.items() if bool((changes > limits[what]).any())]
    rows = torch.stack([changes > limits[what] for what, changes in found.items()]).any(0)
    if settings := ambient.changed():
        ambient.restore()
        bad += settings
    standing = torch.zeros_like(rows) if bad else _remembered(subject)
    if bool(standing.any()):
        bad, rows = ["the images beside those it was asked about"], standing
    changes = {what: float(each.max()) for what, each in found.items()}
    return Finding(
        check="constancy",
        value=changes["the answers"],
        threshold=REPLAY,
        status="fail" if bad else "pass",
        samples=subject.ids_of(rows),
        message=(
            f"Not what it was at first: {', '.join(bad[:4])}. The defense that was attacked is not the one that "
            "was examined: answer from image and noise alone, not from what was asked before, nor from the time."
            if bad
            else "The first answer and gradient, asked for again, are what they were."
        ),
        data={"changes": changes, "asked_again": memory.asked_again},
    )


def _again(subject: Subject, first: Asked) -> Tensor:
    """`(n,)`: how far the answers to the first question have moved; its own rows may have been fewer."""
    with torch.no_grad():
        logits: Tensor = subject.defense(first.x.clone(), _copy(first.noise))
    n = len(subject.x)
    subject._counted().calls.forward += torch.bincount(first.noise.slots, minlength=n) * subject.votes
    changes = torch.zeros(n, dtype=torch.float64)
    return changes.scatter_reduce(0, first.noise.slots, change(first.logits, logits).cpu(), "amax")


def _gradient_again(subject: Subject, first: Asked) -> Tensor:
    assert first.gradient is not None
    now = subject.target().gradient(first.x.clone(), (subject.y,), cross_entropy, _copy(first.noise)).gradient
    a, b = (each.nan_to_num().double().flatten(1) for each in (first.gradient, now))
    size = torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp_min(torch.finfo(torch.float32).tiny)
    relative: Tensor = (a - b).norm(dim=1) / size
    return relative.cpu()


def _remembered(subject: Subject) -> Tensor:
    """`(n,)`: images whose answer is shared by none beside them, where that is more than chance has it nearby.

    The distance is along noise that is new each time.
    """
    noise = subject.noise.child("constancy", subject.memory.asked_again)

    def draw(x: Tensor, streams: Noise) -> Tensor:
        return subject.target().draws(x, subject.noise)[:, 0]

    at_test = alone(draw, subject.x, noise, SCALE)
    if not bool(at_test.any()):
        return at_test.cpu()
    near = (subject.x + NEAR * noise.child("near").normal(shape=subject.x.shape[1:], like=subject.x)).clamp(0, 1)
    n, elsewhere = len(at_test), int(alone(draw, near, noise, SCALE).sum())
    allowed = n if elsewhere == n else wrong_at_most(n, elsewhere / n) if elsewhere else 0
    # One image alone is what rounding to half precision does now and then; what is remembered is all that was asked.
    return at_test.cpu() if int(at_test.sum()) > max(1, allowed) else torch.zeros(n, dtype=torch.bool)


def _copy(noise: Noise) -> Noise:
    return Noise(noise.keys.clone(), noise.slots.clone())
