"""Transfer: white box on one model, scored on another (Papernot et al. 2016, arXiv 1605.07277)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.attack import AttackSpec, Forward, Target
from assay.attacks.apgd import apgd
from assay.attacks.eot import CONFIRMING_DRAWS, badness
from assay.errors import InputError, nearest
from assay.noise import Noise
from assay.threat import ThreatModel

_LOSSES = {"ce": ("ce",), "margin": ("margin",), "both": ("ce", "margin")}
COMPONENTS = "components"


def transfer(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    source: Target | str | None = None,
    steps: int = 100,
    restarts: int = 1,
    eot: int = 1,
    loss: str = "both",
) -> Tensor:
    """Points that a source model gets as wrong as possible, which never sees the whole defense.

    A run does not stop at the source's decision boundary: what lies far beyond it transfers best.
    Of several runs' points on one source the one with the highest margin there is returned, and the
    target is never asked. Of the points of several components the target's own draws choose, one
    for each sample: 10 for each component, 1 where the target is deterministic.

    Args:
        source: the model to attack, its own `Target` with the same slots; or `"components"` for each
            of the classifiers that the defense names in its `components`, in turn; or None for the
            classifier behind the target's purifier, which is also what `"components"` means where
            a defense names none.
        steps: gradient steps of each APGD run.
        restarts: APGD runs for each loss.
        eot: draws averaged for each loss and gradient, for a stochastic source.
        loss: `"ce"`, `"margin"`, or `"both"` for a run each.

    Raises:
        ThreatViolation: where there is no source and the defense offers no `stages`.
        InputError: for a bad option.
    """
    if loss not in _LOSSES:
        raise InputError(f"transfer has no loss called {loss!r}.{nearest(loss, _LOSSES)}")
    if isinstance(source, str) and source != COMPONENTS:
        raise InputError(f"transfer has no source called {source!r}.{nearest(source, (COMPONENTS,))}")
    options: dict[str, Any] = {"steps": steps, "restarts": restarts, "eot": eot}
    if isinstance(source, Target):
        return _furthest(source, x, y, threat, noise, _LOSSES[loss], None, options)
    if source is None or COMPONENTS not in target.card.handles:
        classify: Forward = target.handle("stages")().classify
        return _furthest(target, x, y, threat, noise, _LOSSES[loss], classify, options)
    components: Mapping[str, Forward] = target.handle("components")()
    if not components:
        raise InputError(f"{target.card.name} lists the handle 'components' and names none.")
    candidates = [
        _furthest(target, x, y, threat, noise.child(COMPONENTS, name), _LOSSES[loss], component, options)
        for name, component in components.items()
    ]
    return _worst(target, candidates, x, y, noise.child("choose"), eot, None)


def _furthest(
    source: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    named: Sequence[str],
    forward: Forward | None,
    options: Mapping[str, Any],
) -> Tensor:
    """The point of each sample that `forward`, or the source itself, gets most wrong."""
    candidates = [
        apgd(source, x, y, threat, noise.child(name), loss=name, forward=forward, judge=forward, stop=False, **options)
        for name in named
    ]
    return _worst(source, candidates, x, y, noise.child("select"), options["eot"], forward)


def _worst(
    judge: Target, candidates: list[Tensor], x: Tensor, y: Tensor, noise: Noise, eot: int, forward: Forward | None
) -> Tensor:
    if len(candidates) == 1 or not len(x):
        return candidates[0]
    draws = max(eot, CONFIRMING_DRAWS) if judge.stochastic else 1
    answers = [judge.draws(z, noise, draws, forward=forward) for z in candidates]
    scores = torch.stack([badness(logits, y, judge.card.votes) for logits in answers])
    return torch.stack(candidates)[scores.argmax(0), torch.arange(len(x), device=x.device)]


SPEC = AttackSpec(
    name="transfer",
    summary="White box on another model, on a defense's components or on the classifier behind its purifier.",
    attack=transfer,
)
