"""`batch_independence`: a sample's answer doesn't depend on the other samples of the batch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from assay.checks.agreement import change
from assay.checks.subject import Subject
from assay.finding import Finding
from assay.noise import Noise

COPY = 0.02
"""How far a near copy is away, in any pixel."""

THRESHOLD = 1e-3
"""Largest change, of probabilities or a tenth of the logits' relative one, put down to float32 kernels that differ with
the batch size."""


def check(subject: Subject) -> Finding:
    """Reorders, splits and pads the batch, with each sample's noise kept, and compares.

    The batch is reversed; moved by one place behind its first row; cut into pieces of odd sizes, so that both ends
    stand alone; and every row is put between an image that no data set has and a near copy of itself. A defense that
    sees its neighbours can average an attack away, and its number would depend on the order of the evaluation. Fails
    beyond `THRESHOLD`. Costs 7n forward calls.
    """
    n = len(subject.x)
    whole = subject.answer()
    backwards = torch.arange(n - 1, -1, -1)
    # An honest answer hangs on nothing but its row: what is kept by the first one, or by the place's parity, shows.
    behind = torch.tensor([0, *range(2, n), *range(1, min(2, n))])
    others = [subject.answer(order)[order.argsort()] for order in (backwards, behind)]
    cuts = sorted({0, min(1, n), n // 3 + 1 if n > 2 else n, max(n - 1, 0), n})
    others.append(torch.cat([subject.answer(slice(a, b)) for a, b in pairwise(cuts)]))
    others.append(_padded(subject))
    worst = torch.stack([change(whole, other) for other in others]).amax(0).cpu()
    failed = bool((worst > THRESHOLD).any())
    return Finding(
        check="batch_independence",
        value=float(worst.max()),
        threshold=THRESHOLD,
        status="fail" if failed else "pass",
        samples=subject.ids_of(worst > THRESHOLD),
        message=(
            "A sample's answer changes with its neighbours or its place in the batch: each row must be "
            "computed from its own image and noise alone."
            if failed
            else "Reordering, splitting and padding the batch changes no answer."
        ),
    )


def _padded(subject: Subject) -> Tensor:
    """The answers between strange images, which a statistic of the batch would follow, and copies, as attacks have."""
    x, noise = subject.x, subject.noise
    kinds = torch.stack([1 - x, torch.zeros_like(x), torch.ones_like(x), _uniform(x, noise)])
    strange = kinds[torch.arange(len(x)) % len(kinds), torch.arange(len(x))]
    near = (x + COPY * (2 * _uniform(x, noise.child("near")) - 1)).clamp(0, 1)
    keys = torch.stack([noise.child("strange").keys, noise.keys, noise.child("copy").keys], 1).flatten()
    streams = Noise(keys, noise.slots.repeat_interleave(3))
    return subject.answer(noise=streams, x=torch.stack([strange, x, near], 1).flatten(0, 1))[1::3]


def _uniform(x: Tensor, noise: Noise) -> Tensor:
    return noise.uniform("padding", shape=x.shape[1:], like=x)
