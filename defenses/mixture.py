"""The exact denoiser of a mixture of Gaussians: every prediction is a closed form. The oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.defenses.denoiser import Denoiser
from assay.defenses.schedule import Schedule, Sigma
from assay.errors import InputError


class MixtureDenoiser(Denoiser):
    """The denoiser of a mixture of isotropic Gaussians, with or without classes.

    Under p_0 = Σ_j w_j N(μ_j, s_j² I) the noised density is p_σ = Σ_j w_j N(μ_j, (s_j² + σ²) I), and
    E[x_0 | x] = Σ_j r_j(x)·(μ_j + s_j²/(s_j² + σ²)·(x − μ_j)) with responsibilities r_j.

    Args:
        weights: `(m,)`, positive, summing to 1.
        means: `(m, c, h, w)` in [−1, 1].
        stds: `(m,)`, s_j ≥ 0.
        labels: `(m,)` int64, the class of each component; every class 0 … k−1 must have one.
        schedule: see `Denoiser`.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    labels: Tensor

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        stds: Tensor,
        labels: Tensor | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(schedule, sigma_range=(0.0, math.inf))
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        self.register_buffer("labels", torch.zeros(len(weights), dtype=torch.int64) if labels is None else labels)
        self.n_classes = 0 if labels is None else int(labels.max()) + 1
        if self.n_classes and len(self.labels.unique()) != self.n_classes:
            raise InputError(f"every class from 0 to {self.n_classes - 1} needs a component.")

    def _parts(self, x: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        """Log joint densities `(n, m)`, and each component's posterior mean `(n, m, d)`."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
        variances = self.stds**2 + level**2
        residuals = x.flatten(1)[:, None] - self.means.flatten(1)
        squared = residuals.square().sum(-1) / variances
        joint = self.weights.log() - 0.5 * (squared + residuals.shape[-1] * (2 * math.pi * variances).log())
        return joint, self.means.flatten(1) + (self.stds**2 / variances)[..., None] * residuals

    def log_density(self, x: Tensor, sigma: Sigma) -> Tensor:
        """log p_σ(x), `(n,)`; σ = 0 is the density of clean images."""
        return self._parts(x, sigma)[0].logsumexp(1)

    def posterior(self, x: Tensor, sigma: Sigma) -> Tensor:
        """The probability of each component given `x`, `(n, m)`."""
        return self._parts(x, sigma)[0].softmax(1)

    def _members(self) -> Tensor:
        """`(k, m)`: whether a component belongs to a class."""
        return self.labels == torch.arange(self.n_classes, device=self.labels.device)[:, None]

    def class_log_density(self, x: Tensor, sigma: Sigma) -> Tensor:
        """log p_σ(x | class) for every class, `(n, k)`."""
        joint = self._parts(x, sigma)[0][:, None].masked_fill(~self._members(), -math.inf)
        priors = self.weights.log().expand(self.n_classes, -1).masked_fill(~self._members(), -math.inf)
        return joint.logsumexp(2) - priors.logsumexp(1)

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`."""
        joint, means = self._parts(x, sigma)
        return (joint.softmax(1)[..., None] * means).sum(1).reshape(x.shape)

    def denoise_each(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise_each`."""
        if not self.n_classes:
            return super().denoise_each(x, sigma)
        joint, means = self._parts(x, sigma)
        shares = joint[:, None].masked_fill(~self._members(), -math.inf).softmax(2)
        return (shares @ means).reshape(len(x), self.n_classes, *x.shape[1:])
