"""The gradient of a shorter process (Lee & Kim 2023, arXiv 2303.09051, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from assay.attack import AttackSpec, Target
from assay.attacks.eot import require_positive
from assay.attacks.pgd import pgd
from assay.chain import Chain
from assay.noise import Noise
from assay.threat import ThreatModel

STEP = 0.007 / (8 / 255)
"""The paper's step length, .007 at eps = 8/255, in units of eps."""


def surrogate(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    steps: int = 50,
    eot: int = 20,
    clip: bool = False,
    chain_steps: int = 5,
    alpha: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
) -> Tensor:
    """PGD from `x` itself on the defense's own process in fewer steps with the same total noise.

    Cheaper than the exact gradient, so that more draws and iterations fit. What broke the shorter
    process counts only once the whole defense confirms it, and the final choice is the whole
    defense's.

    Args:
        steps: gradient steps (the paper's number is 200).
        eot: draws averaged for each loss and gradient, for a stochastic target.
        clip: shortens the gradients of the steepest draws before they are averaged, see `Target.gradient`.
        chain_steps: the most steps of the shorter process.
        alpha: step length in pixel units; by default the paper's .007 at 8/255, in proportion to eps.
        restarts: runs; the paper makes one, those after it start at random points.
        loss: a name in `assay.attacks.losses`.

    Raises:
        ThreatViolation: where the defense offers no `surrogate`.
        InputError: for a bad option.
    """
    require_positive(chain_steps=chain_steps)
    shorter: Chain = target.handle("surrogate")(chain_steps)

    def forward(z: Tensor, draws: Noise) -> Tensor:
        return shorter(z, draws, mode="exact")

    size = STEP * float(threat.eps) if alpha is None else alpha
    return pgd(
        target,
        x,
        y,
        threat,
        noise,
        steps=steps,
        alpha=size,
        restarts=restarts,
        eot=eot,
        clip=clip,
        loss=loss,
        random_start=False,
        forward=forward,
    )


SPEC = AttackSpec(
    name="surrogate",
    summary="PGD along the gradient of the same process with fewer steps, judged on the whole process.",
    attack=surrogate,
    handles=("surrogate",),
)
