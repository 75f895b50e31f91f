"""`interface`: logits `(n, k)`, finite, floating point, for many images and for one, which stay as they were."""

from __future__ import annotations

import torch

from assay.checks.subject import Subject
from assay.finding import Finding


def check(subject: Subject) -> Finding:
    """Calls the defense on the whole batch and on one image.

    Nobody asks a defense about no image: much published code cannot tell how many features an empty batch has.

    Fails for fewer classes than the labels have, an exception, a wrong shape or dtype, a value that is not
    finite, or images changed in place: nothing later could tell such an answer from robustness. Costs n + 1
    forward calls.
    """
    k = subject.defense.n_classes
    beyond = subject.y >= k
    if bool(beyond.any()):
        labels = f"it declares {k} classes, and there are labels up to {int(subject.y.max())}"
        return _failed(labels, subject.ids_of(beyond))
    images = subject.x.clone()
    for rows in (slice(None), slice(0, 1)):
        expected = (len(subject.x[rows]), k)
        ids = tuple(subject.ids[rows])
        try:
            logits = subject.answer(rows)
        except Exception as error:
            return _failed(f"a batch of {expected[0]} images raised {type(error).__name__}: {error}", ids)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            came = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            return _failed(f"expected logits of shape {expected} (n, k), got {came}", ids)
        if type(logits) is not torch.Tensor:
            # A subclass decides for itself what a loss of it is.
            return _failed(f"expected a plain tensor, got a {type(logits).__name__}", ids)
        if not logits.is_floating_point():
            return _failed(f"expected floating-point logits, got {logits.dtype}", ids)
        finite = logits.isfinite().all(1)
        if not bool(finite.all()):
            bad = subject.ids_of(~finite) if rows == slice(None) else ids
            return _failed("expected finite logits, got NaN or infinity", bad)
    changed = (subject.x != images).flatten(1).any(1)
    if bool(changed.any()):
        subject.x.copy_(images)
        return _failed("it changes its input in place", subject.ids_of(changed))
    return Finding(check="interface", status="pass", message="Logits (n, k), finite, for many images and for one.")


def _failed(what: str, ids: tuple[int, ...]) -> Finding:
    return Finding(
        check="interface",
        status="fail",
        samples=ids,
        message=f"The defense doesn't keep its interface: {what}. Return finite logits (n, k) for images in [0, 1].",
    )
