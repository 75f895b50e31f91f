"""Backward pass differentiable approximation (Athalye, Carlini & Wagner 2018, arXiv 1802.00420, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.attack import AttackSpec, Forward, Target
from assay.attacks.ascent import ascend
from assay.defense import Stages
from assay.noise import Noise
from assay.threat import ThreatModel


def straight_through(stages: Stages) -> Forward:
    """The real purifier forward and the identity backward, then the classifier."""

    def forward(x: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            purified = stages.purify(x.detach(), noise.child("purify"))
        # x − x is exactly 0: the classifier sees the purifier's output to the last bit, with x's gradient.
        return stages.classify(purified + (x - x.detach()), noise.child("classify"))

    return forward


def bpda(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    steps: int = 50,
    eot: int = 20,
    clip: bool = False,
    alpha: float | None = None,
    restarts: int = 1,
    optimizer: str = "pgd",
    loss: str = "ce",
) -> Tensor:
    """Ascent on the classifier's loss at the purified image, as if purifying changed nothing.

    Right where the purifier stays near its input and its own gradient is useless (quantisation,
    a severed graph) or too dear.

    Args:
        steps, restarts, loss: as for `pgd` and `apgd`.
        eot: draws averaged for each loss and gradient, for a stochastic target.
        clip: shortens the gradients of the steepest draws before they are averaged, see `Target.gradient`.
        alpha: PGD's step length in pixel units; by default 2.5 · eps / steps.
        optimizer: `"pgd"` or `"apgd"`.

    Raises:
        ThreatViolation: where the defense offers no `stages`.
        InputError: for a bad option.
    """
    forward = straight_through(target.handle("stages")())
    return ascend(
        optimizer,
        target,
        x,
        y,
        threat,
        noise,
        forward=forward,
        alpha=alpha,
        steps=steps,
        eot=eot,
        clip=clip,
        restarts=restarts,
        loss=loss,
    )


SPEC = AttackSpec(
    name="bpda",
    summary="Ascent with the real purifier forward and the identity backward, averaged over draws.",
    attack=bpda,
    handles=("stages",),
)
