"""The training loss of variational smoothing; see `fitting` for what all training loops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from assay.defenses.fitting import Advance, minimise
from assay.defenses.schedule import column
from assay.defenses.selector import VariationalNet, divergence


def fit_variational(
    network: VariationalNet,
    x: Tensor,
    y: Tensor,
    advance: Advance,
    *,
    epochs: int,
    targets: tuple[float, float],
    probe: float,
    kl: float,
    width: float,
    draws: int,
) -> None:
    """`CE(mean_k softmax f(x + σ·ε_k), y) + λ·KL(q(σ | x) ‖ reference)`, σ ~ q reparameterised.

    Hase et al. 2024, arXiv 2407.11844, as we rebuilt it. Selector and classifier train together.

    Args:
        targets: each image's target level is log-uniform between these, in pixel units; the
            selector is told it, so that one training serves every target at test time.
        probe: τ, the noise that the selector sees, in pixel units; the same as at test time.
        kl: λ.
        width: the reference's standard deviation of ln σ.
        draws: k.
    """
    low, high = (math.log(target) for target in targets)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        target = torch.empty(len(x)).uniform_(low, high).exp()
        mean, std = network.selector(x + probe * torch.randn_like(x), target)
        sigma = (mean + std * torch.randn_like(mean)).exp()
        rows = x.repeat_interleave(draws, 0)
        noised = rows + column(sigma.repeat_interleave(draws), rows) * torch.randn_like(rows)
        logs = network.classifier(noised).log_softmax(1).unflatten(0, (len(x), draws))
        answer = logs.logsumexp(1) - math.log(draws)
        return F.nll_loss(answer, y) + kl * divergence(mean, std, target, width).mean()

    minimise(list(network.parameters()), loss, x, y, advance, epochs=epochs)
