"""Training losses on CIFAR-10: `loss(network, x, y, generator)` for images `x (n, c, h, w)` in [0, 1].

They are `fitting`'s with what a GPU asks for: all draws come from a generator on the images' device, and
networks may answer in 16 bits, so that losses are taken in 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from assay.defenses.augment import normal, uniform
from assay.defenses.conditional import LabelledDenoiser
from assay.defenses.denoiser import ScoreDenoiser, encode
from assay.defenses.networks_cifar10 import SelectedNet
from assay.defenses.schedule import column
from assay.defenses.selector import divergence
from assay.threat import parse_eps


def drop_labels(y: Tensor, share: float, none: int, generator: Generator) -> Tensor:
    """The labels with about this share of them replaced by `none`."""
    return torch.where(uniform(len(y), generator) < share, none, y)


def diffusion(
    denoiser: LabelledDenoiser, x: Tensor, y: Tensor, generator: Generator, *, mean: float, std: float, drop: float
) -> Tensor:
    """EDM's objective with `ln σ ~ N(mean, std²)` (Karras et al. 2022, table 1); a share `drop` has no label."""
    draws = torch.randn(len(x), generator=generator, device=x.device)
    sigma = (mean + std * draws).exp().clamp(*denoiser.sigma_range)
    clean = encode(x)
    noised = clean + column(sigma, x) * normal(x, generator)
    labels = drop_labels(y, drop, denoiser.n_classes, generator)
    weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
    errors = (denoiser.predict(noised, sigma, labels) - clean).square().flatten(1).mean(1)
    return (weight * errors).mean()


def noisy(network: nn.Module, x: Tensor, y: Tensor, generator: Generator, *, sigma: float) -> Tensor:
    """Cross-entropy on images with N(0, σ²) noise, σ in pixel units, not clipped (Cohen et al. 2019)."""
    return F.cross_entropy(network(x + sigma * normal(x, generator)).float(), y)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network as an attacker meets it: in evaluation mode, and without gradients of its own to pay for."""
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train().requires_grad_(True)


def ascend(x: Tensor, eps: float, steps: int, loss: Callable[[Tensor], Tensor], generator: Generator) -> Tensor:
    """Steps of 2.5·ε/steps up `loss` in the linf ball inside the box, from a start so near that it is x to the eye."""
    z = x + 1e-3 * normal(x, generator)
    for _ in range(steps):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z), z)
        z = z.detach() + 2.5 * eps / steps * gradient.sign()
        z = torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)
    return z.detach()


def divergence_from(logits: Tensor, probabilities: Tensor) -> Tensor:
    """KL(probabilities ‖ softmax(logits)), the mean over rows."""
    return F.kl_div(logits.float().log_softmax(1), probabilities, reduction="batchmean")


def trades(
    network: nn.Module, x: Tensor, y: Tensor, generator: Generator,
    *, eps: str, steps: int, beta: float, noise: float = 0.0,
) -> Tensor:  # fmt: skip
    """TRADES, see `fitting.fit_trades`; the attack meets the network as it is used, with running statistics."""
    if noise:
        x = x + noise * column(uniform(len(x), generator), x) * normal(x, generator)
    # Noised images leave [0, 1]; the attack may leave it with them.
    inside = x.clamp(0, 1)
    with frozen(network):
        with torch.no_grad():
            clean = network(inside).float().softmax(1)
        z = ascend(inside, float(parse_eps(eps)), steps, lambda z: divergence_from(network(z), clean), generator)
    logits = network(x).float()
    return F.cross_entropy(logits, y) + beta * divergence_from(network(z - inside + x), logits.softmax(1))


def score(denoiser: ScoreDenoiser, x: Tensor, y: Tensor, generator: Generator) -> Tensor:
    """Denoising score matching, see `fitting.fit_score`."""
    low, high = (math.log(sigma) for sigma in denoiser.sigma_range)
    sigma = column((low + (high - low) * uniform(len(x), generator)).exp(), x)
    z = normal(x, generator)
    # σ·s(x, σ) is the network's own answer.
    answer = denoiser.network(encode(x) + sigma * z).float()
    loss: Tensor = 0.5 * (answer + z).square().mean()
    return loss


def variational(
    network: SelectedNet, x: Tensor, y: Tensor, generator: Generator,
    *, targets: tuple[float, float], probe: float, kl: float, width: float, draws: int,
) -> Tensor:  # fmt: skip
    """The loss of variational smoothing, see `fitting_variational`."""
    low, high = (math.log(target) for target in targets)
    target = (low + (high - low) * uniform(len(x), generator)).exp()
    mean, std = (part.float() for part in network.selector(x + probe * normal(x, generator), target))
    sigma = (mean + std * torch.randn(len(x), generator=generator, device=x.device)).exp()
    rows = x.repeat_interleave(draws, 0)
    noised = rows + column(sigma.repeat_interleave(draws), rows) * normal(rows, generator)
    logs = network.classifier(noised).float().log_softmax(1).unflatten(0, (len(x), draws))
    answer = logs.logsumexp(1) - math.log(draws)
    return F.nll_loss(answer, y) + kl * divergence(mean, std, target, width).mean()
