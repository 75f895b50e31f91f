"""The exact gradient of an iterated defense, whatever its length."""

from __future__ import annotations

from torch import Tensor

from assay.attack import AttackSpec, Target
from assay.attacks.ascent import ascend
from assay.chain import Chain
from assay.errors import InputError, nearest
from assay.noise import Noise
from assay.threat import ThreatModel

VARIANTS = ("exact", "first-order", "relaxed")


def through_chain(
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
    optimizer: str = "apgd",
    loss: str = "margin",
    variant: str = "exact",
) -> Tensor:
    """Ascent along the gradient of the whole process, second-order terms of inner gradients included.

    The chain keeps its states and rebuilds one step's graph at a time, so memory grows with the
    states alone. This is the attack that "gradient obfuscation by length" has to survive.

    Args:
        steps, restarts, loss: as for `apgd` and `pgd`.
        eot: draws averaged for each loss and gradient, for a stochastic target.
        clip: shortens the gradients of the steepest draws before they are averaged, see `Target.gradient`.
        alpha: PGD's step length in pixel units; by default 2.5 · eps / steps.
        optimizer: `"apgd"` or `"pgd"`.
        variant: `"exact"`; `"first-order"` takes the gradients that steps compute for themselves as
            constants; `"relaxed"` goes through the defense's `relaxed` chain, where its discrete
            choices are soft, and what it breaks counts only once the defense itself confirms it.

    Raises:
        ThreatViolation: where the defense offers no `chain`, or no `relaxed`.
        InputError: for a bad option.
    """
    if variant not in VARIANTS:
        raise InputError(f"through_chain has no variant called {variant!r}.{nearest(variant, VARIANTS)}")
    chain: Chain = target.handle("relaxed" if variant == "relaxed" else "chain")()
    if variant == "first-order":
        chain = chain.first_order()

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
        clip=clip,
        restarts=restarts,
        loss=loss,
    )


SPEC = AttackSpec(
    name="through_chain",
    summary="Ascent along the exact gradient through all of a defense's steps, averaged over draws.",
    attack=through_chain,
    handles=("chain",),
)
