"""`honest_randomness`: an answer is a function of image and noise, and stochastic as declared."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.checks.agreement import change
from assay.checks.ambient import generators
from assay.checks.subject import Subject, gap
from assay.finding import Finding

THRESHOLD = 1e-5
"""Largest difference of probabilities put down to floating point."""

TOKEN = 1e-4
"""Largest change, of probabilities or a tenth of the logits' relative one, that is no randomness: a token of noise
would spare a defense the attacks on deterministic ones."""

NEAR = 0.05
"""Standard deviation of the noise that leads off the data."""


def check(subject: Subject) -> Finding:
    """Calls the defense twice with the same noise, then with other noise, and watches the global generators.

    Noise that begins where an attack leads is noise all the same, so the same is asked at images `NEAR` of noise away.
    Fails where the same noise gives different answers (a hidden generator: nothing could be replayed), where a defense
    declared deterministic varies or one declared stochastic never does, or where a global generator (torch's, NumPy's
    or Python's) is left in another state. Votes may be unanimous on clean images: there it is single draws that must
    vary. Costs 6n forward calls, and 2n draws where the answers are the same.
    """
    before = generators()
    x, other = subject.x, subject.noise.child("other")
    near = (x + NEAR * subject.noise.child("near").normal(shape=x.shape[1:], like=x)).clamp(0, 1)
    places = (x, near)
    pairs = [(subject.answer(x=place), subject.answer(x=place)) for place in places]
    drawn = [name for name, state in generators().items() if state != before[name]]
    replay = torch.stack([_apart(first, again) for first, again in pairs]).amax(0)
    others = [subject.answer(x=place, noise=other) for place in places]
    varies = torch.stack([_apart(first, each) for (first, _), each in zip(pairs, others, strict=True)]).amax(0)
    stochastic = subject.defense.card.traits.stochastic
    if bool((replay > THRESHOLD).any()):
        return _failed(
            float(replay.max()),
            "The same image and noise gave different answers: randomness must come from the noise argument.",
            subject.ids_of(replay > THRESHOLD),
        )
    if drawn:
        return _failed(1.0, f"A forward pass moves {drawn[0]}'s global generator: draw from the noise instead.")
    if not stochastic and bool((varies > THRESHOLD).any()):
        return _failed(
            float(varies.max()),
            "Declared deterministic, but the answer changes with the noise: declare the trait 'stochastic'.",
            subject.ids_of(varies > THRESHOLD),
        )
    moved = max(float(change(first, each).max()) for (first, _), each in zip(pairs, others, strict=True))
    if stochastic and moved <= TOKEN and not _draws_vary(subject, near):
        return _failed(moved, "Declared stochastic, but the answer never changes with the noise: drop the trait.")
    return Finding(
        check="honest_randomness",
        value=float(replay.max()),
        threshold=THRESHOLD,
        status="pass",
        message="Same noise, same answer; varies with the noise exactly as declared.",
    )


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """The change of probabilities, or a hundredth of the logits' relative one, which no scale of them hides."""
    return torch.maximum(gap(a, b), 0.1 * change(a, b)).cpu()


def _draws_vary(subject: Subject, near: Tensor) -> bool:
    if subject.votes == 1:
        return False
    target = subject.target()
    first, other = (target.draws(near, subject.noise.child(name))[:, 0] for name in ("one", "two"))
    return bool((change(first, other) > TOKEN).any())


def _failed(value: float, message: str, ids: tuple[int, ...] = ()) -> Finding:
    return Finding(
        check="honest_randomness", value=value, threshold=THRESHOLD, status="fail", samples=ids, message=message
    )
