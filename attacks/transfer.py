"""Transfer: white box on one model, scored on another (Papernot et al. 2016, arXiv 1605.07277)."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.attack import AttackSpec, Forward, Target
from assay.attacks.apgd import apgd
from assay.attacks.eot import CONFIRMING_DRAWS, badness
from assay.errors import InputError, nearest
from assay.noise import Noise
from assay.threat import ThreatModel

_LOSSES = {"ce": ("ce",), "margin": ("margin",), "both": ("ce", "margin")}


def transfer(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    source: Target | None = None,
    steps: int = 100,
    restarts: int = 1,
    eot: int = 1,
    loss: str = "both",
) -> Tensor:
    """Points that a source model gets as wrong as possible; the target is never asked.

    A run does not stop at the source's decision boundary: what lies far beyond it transfers best.
    Of several runs' points the one with the highest margin on the source is returned.

    Args:
        source: the model to attack, its own `Target` with the same slots; by default the classifier
            behind the target's purifier, alone.
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
    classify: Forward | None = None
    if source is None:
        source, classify = target, target.handle("stages")().classify
    candidates = [
        apgd(
            source,
            x,
            y,
            threat,
            noise.child(name),
            steps=steps,
            restarts=restarts,
            eot=eot,
            loss=name,
            forward=classify,
            judge=classify,
            stop=False,
        )
        for name in _LOSSES[loss]
    ]
    if len(candidates) == 1 or not len(x):
        return candidates[0]
    draws = max(eot, CONFIRMING_DRAWS) if source.stochastic else 1
    fresh = noise.child("select")
    answers = [source.draws(z, fresh, draws, forward=classify) for z in candidates]
    scores = torch.stack([badness(logits, y, source.card.votes) for logits in answers])
    return torch.stack(candidates)[scores.argmax(0), torch.arange(len(x), device=x.device)]


SPEC = AttackSpec(
    name="transfer",
    summary="White box on another model, or on the classifier behind the purifier; the target is never asked.",
    attack=transfer,
)
