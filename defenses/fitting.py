"""Training losses and loops: `fit(network, x, y, advance, epochs=…)` on images `x (n, c, h, w)` in [0, 1].

They draw from torch's global generator, which `recipes` forks and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay.defenses.denoiser import Denoiser, EDMDenoiser, UNetDenoiser, encode
from assay.defenses.schedule import column
from assay.norms import Ball
from assay.threat import Norm, ThreatModel, parse_eps

Perturb = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""What a training image becomes: `(network, x, y) -> x'`, drawing from the forked global generator."""
Advance = Callable[[], None]
"""Called after each epoch."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of a batch `(x, y)`."""

BATCH = 64


def unchanged(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Plain training."""
    return x


def gaussian(sigma: float) -> Perturb:
    """Adds N(0, σ²) noise, not clipped (Cohen et al. 2019)."""
    return lambda network, x, y: x + sigma * torch.randn_like(x)


def _ascend(x: Tensor, threat: ThreatModel, steps: int, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Steps of 2.5·ε/steps up `loss` from a random start in the ball."""
    ball = Ball(threat, x)
    if threat.norm == "linf":
        z = x + ball.eps * (2 * torch.rand_like(x) - 1)
    else:
        direction = F.normalize(torch.randn_like(x).flatten(1), dim=1).view_as(x)
        z = x + ball.eps * torch.rand(len(x), *[1] * (x.ndim - 1)) * direction
    z = ball.project(z)
    for _ in range(steps):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z), z)
        z = ball.step(z.detach(), gradient, 2.5 * ball.eps / steps)
    return z.detach()


def pgd(eps: str, steps: int, norm: Norm = "linf") -> Perturb:
    """PGD on the cross-entropy (Madry et al. 2018)."""
    threat = ThreatModel(norm, parse_eps(eps))
    return lambda network, x, y: _ascend(x, threat, steps, lambda z: F.cross_entropy(network(z), y))


def minimise(
    parameters: list[nn.Parameter],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    advance: Advance,
    *,
    epochs: int,
    rate: float = 3e-3,
    decay: float = 1e-4,
    batch: int = BATCH,
    ema: float = 0.0,
) -> None:
    """Adam with one cosine cycle; with `ema`, the parameters end as their running average."""
    optimizer = torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    weights: list[Tensor] = list(parameters)
    average = [weight.detach().clone() for weight in weights]
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            loss(x[rows], y[rows]).backward()
            optimizer.step()
            if ema:
                with torch.no_grad():
                    torch._foreach_lerp_(average, weights, 1 - ema)
        schedule.step()
        advance()
    if ema:
        with torch.no_grad():
            torch._foreach_copy_(weights, average)


def fit_classifier(
    network: nn.Module, x: Tensor, y: Tensor, advance: Advance, *, epochs: int, perturb: Perturb
) -> None:
    """Cross-entropy on perturbed images."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(perturb(network, x, y)), y)

    minimise(list(network.parameters()), loss, x, y, advance, epochs=epochs)


def fit_trades(
    network: nn.Module, x: Tensor, y: Tensor, advance: Advance, *, epochs: int, eps: str, steps: int, beta: float,
    noise: float = 0.0,
) -> None:  # fmt: skip
    """TRADES: `CE(f(x), y) + β·KL(f(x) ‖ f(x'))`, x' maximising the KL term.

    Zhang et al. 2019, arXiv 1901.08573, eq. 3. With `noise`, every image first gets Gaussian noise of its
    own level, uniform up to that many pixel units: the network is meant for half-denoised images.
    """

    threat = ThreatModel("linf", parse_eps(eps))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if noise:
            x = x + noise * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
        with torch.no_grad():
            clean = network(x).softmax(1)
        # Noised images leave [0, 1]; the attack inside training may leave it with them.
        x_adv = _ascend(x.clamp(0, 1), threat, steps, lambda z: _divergence(network(z), clean)) - x.clamp(0, 1) + x
        logits = network(x)
        return F.cross_entropy(logits, y) + beta * _divergence(network(x_adv), logits.softmax(1))

    minimise(list(network.parameters()), loss, x, y, advance, epochs=epochs)


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """KL(probabilities ‖ softmax(logits)), the mean over rows."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="batchmean")


def fit_denoiser(denoiser: UNetDenoiser, x: Tensor, y: Tensor, advance: Advance, *, epochs: int, ema: float) -> None:
    """The simple DDPM objective ‖ε − eps(x_t, t)‖² (Ho et al. 2020, eq. 14)."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        t = torch.randint(1, denoiser.schedule.levels + 1, (len(x),))
        z = torch.randn_like(x)
        alpha_bar = column(denoiser.alpha_bar(t), x)
        return F.mse_loss(denoiser.eps(alpha_bar.sqrt() * encode(x) + (1 - alpha_bar).sqrt() * z, t), z)

    minimise(list(denoiser.parameters()), loss, x, y, advance, epochs=epochs, rate=2e-3, decay=0, batch=128, ema=ema)


def fit_heads(
    denoiser: EDMDenoiser, x: Tensor, y: Tensor, advance: Advance, *, epochs: int, ema: float, mean: float, std: float
) -> None:
    """EDM's objective with `ln σ ~ N(mean, std²)` (Karras et al. 2022, table 1), on the head of each image's class
    and on the one without a class."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        sigma = (mean + std * torch.randn(len(x))).exp().clamp(*denoiser.sigma_range)
        clean = encode(x)
        heads = denoiser.heads(clean + column(sigma, x) * torch.randn_like(x), sigma)
        chosen = torch.stack([heads[torch.arange(len(x)), y], heads[:, -1]], 1)
        weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
        return (weight[:, None] * (chosen - clean[:, None]).square().flatten(2).mean(2)).mean()

    minimise(list(denoiser.parameters()), loss, x, y, advance, epochs=epochs, rate=2e-3, decay=0, batch=128, ema=ema)


def fit_score(denoiser: Denoiser, x: Tensor, y: Tensor, advance: Advance, *, epochs: int, ema: float) -> None:
    """Denoising score matching `½σ²‖s(x + σε, σ) + ε/σ‖²`, σ geometric over the denoiser's range.

    Vincent 2011, eq. 12, with the weights of Song & Ermon 2019 (arXiv 1907.05600, eq. 6).
    """
    low, high = (math.log(sigma) for sigma in denoiser.sigma_range)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        sigma = torch.empty(len(x)).uniform_(low, high).exp()
        z = torch.randn_like(x)
        score = denoiser.score(encode(x) + column(sigma, x) * z, sigma)
        return 0.5 * (column(sigma, x) * score + z).square().flatten(1).mean(1).mean()

    minimise(list(denoiser.parameters()), loss, x, y, advance, epochs=epochs, rate=2e-3, decay=0, batch=128, ema=ema)
