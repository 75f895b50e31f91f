"""What attacks increase: `loss(logits (n, k), y (n,)[, t (n,)]) -> (n,)`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from assay.attack import Loss
from assay.errors import InputError, nearest

_TINY = 1e-12


def pick(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each row's label, `(n,)`."""
    return logits.gather(1, labels[:, None]).squeeze(1)


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit above the right one: positive where the answer is wrong.

    Carlini & Wagner 2017 (arXiv 1608.04644), f_6 without its floor. A common shift of the logits,
    such as the one between logits and log-probabilities, leaves it unchanged.
    """
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -math.inf)
    return others.max(1).values - pick(logits, y)


def log_margin(outputs: Tensor, y: Tensor) -> Tensor:
    """The margin of log-probabilities, for a defense whose outputs are probabilities in [0, 1]."""
    return margin(outputs.clamp_min(_TINY).log(), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over z_(1) − z_(3), so that rescaling logits changes nothing.

    Croce & Hein 2020 (arXiv 2003.01690), eq. 6.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def ce_targeted(logits: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The log-probability of the class `t`."""
    return -F.cross_entropy(logits, t, reduction="none")


def margin_targeted(logits: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The logit of the class `t` above the right one."""
    return pick(logits, t) - pick(logits, y)


def dlr_targeted(logits: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Targeted difference of logits ratio: over z_(1) − (z_(3) + z_(4)) / 2.

    Croce & Hein 2020 (arXiv 2003.01690), eq. 7.
    """
    top = logits.topk(4, dim=1).values
    return margin_targeted(logits, y, t) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


@dataclass(frozen=True)
class NamedLoss:
    """A loss as options name it.

    Attributes:
        function: the loss.
        targeted: it takes a target class `t` beside `y`.
        min_classes: the fewest classes it is defined for.
    """

    function: Loss
    targeted: bool = False
    min_classes: int = 2


LOSSES: dict[str, NamedLoss] = {
    "ce": NamedLoss(ce),
    "margin": NamedLoss(margin),
    "log-margin": NamedLoss(log_margin),
    "dlr": NamedLoss(dlr, min_classes=3),
    "ce-targeted": NamedLoss(ce_targeted, targeted=True),
    "margin-targeted": NamedLoss(margin_targeted, targeted=True),
    "dlr-targeted": NamedLoss(dlr_targeted, targeted=True, min_classes=4),
}


def named(name: str, n_classes: int) -> NamedLoss:
    """The loss called `name`.

    Raises:
        InputError: for an unknown name, or a loss that needs more classes than there are.
    """
    if name not in LOSSES:
        raise InputError(f"no loss is called {name!r}.{nearest(name, LOSSES)}")
    loss = LOSSES[name]
    if n_classes < loss.min_classes:
        instead = "margin-targeted" if loss.targeted else "margin"
        raise InputError(
            f"the loss {name!r} needs at least {loss.min_classes} classes, the target has {n_classes}; use {instead!r}."
        )
    return loss
