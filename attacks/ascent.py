"""PGD or APGD by name, for the attacks that only differ in what they differentiate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from assay.attack import Forward, Target
from assay.attacks.apgd import apgd
from assay.attacks.pgd import pgd
from assay.errors import InputError, nearest
from assay.noise import Noise
from assay.threat import ThreatModel

OPTIMIZERS = ("apgd", "pgd")


def ascend(
    optimizer: str,
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    forward: Forward,
    alpha: float | None = None,
    **options: Any,
) -> Tensor:
    """Attacks `target` along the gradient of `forward`, with the options of `pgd` or `apgd`.

    Args:
        optimizer: `"pgd"` or `"apgd"`.
        alpha: PGD's step length; APGD chooses its own.

    Raises:
        InputError: for an unknown optimizer, or an `alpha` given to APGD.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"no optimizer is called {optimizer!r}.{nearest(optimizer, OPTIMIZERS)}")
    if optimizer == "pgd":
        return pgd(target, x, y, threat, noise, forward=forward, alpha=alpha, **options)
    if alpha is not None:
        raise InputError(f"apgd chooses its own step length; leave out alpha={alpha}, or use optimizer='pgd'.")
    return apgd(target, x, y, threat, noise, forward=forward, **options)
