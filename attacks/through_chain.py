"""The exact gradient of an iterated defense, whatever its length."""

from __future__ import annotations

from torch import Tensor

from assay.attack import AttackSpec, Target
from assay.attacks.ascent import ascend
from assay.chain import Chain
from assay.noise import Noise
from assay.threat import ThreatModel


def through_chain(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    steps: int = 50,
    eot: int = 20,
    alpha: float | None = None,
    restarts: int = 1,
    optimizer: str = "apgd",
    loss: str = "margin",
) -> Tensor:
    """Ascent along the gradient of the whole process, second-order terms of inner gradients included.

    The chain keeps its states and rebuilds one step's graph at a time, so memory grows with the
    states alone. This is the attack that "gradient obfuscation by length" has to survive.

    Args:
        steps, restarts, loss: as for `apgd` and `pgd`.
        eot: draws averaged for each loss and gradient, for a stochastic target.
        alpha: PGD's step length in pixel units; by default 2.5 · eps / steps.
        optimizer: `"apgd"` or `"pgd"`.

    Raises:
        ThreatViolation: where the defense offers no `chain`.
        InputError: for a bad option.
    """
    chain: Chain = target.handle("chain")()

    def forward(z: Tensor, draws: Noise) -> Tensor:
        return chain(z, draws, mode="exact")

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
        restarts=restarts,
        loss=loss,
    )


SPEC = AttackSpec(
    name="through_chain",
    summary="Ascent along the exact gradient through all of a defense's steps, averaged over draws.",
    attack=through_chain,
    handles=("chain",),
)
