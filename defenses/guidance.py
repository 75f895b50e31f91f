"""Guided purification: a reverse process whose every step is pulled by a gradient, in one or more rounds.

The state is `(z, *kept)`: the image at its noise level, and what the guidance keeps of the input (a
label, a feature). Those depend on the input, so they belong to the state: the chain's gradient
reaches the input through them.

Two forms of guidance, in `x = x_0 + σ·ε` units. One corrects the predicted image,
`x̃_0 = D(z, σ) + s·σ²·∇_z log p`, which is the `ε̃ = ε − s·√(1−ᾱ)·∇_{x_t} log p` of a
variance-preserving process (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2). The other moves the
mean of a step with variance v, `μ̃ = μ + s·v·∇_z log p` (the same paper's algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from assay.chain import Chain, State, Step, inner_gradient
from assay.defenses.denoiser import check_sigmas, decode
from assay.defenses.purifier import Purifier, posterior, sample
from assay.errors import InputError
from assay.noise import Noise

TEMPERATURE = 0.5
"""By which a relaxed chain divides logits where the defense itself takes the largest."""


def label_weights(logits: Tensor, temperature: float) -> Tensor:
    """The label of each row as weights of the classes `(n, k)`: one-hot, or soft for a temperature above 0."""
    if temperature > 0:
        return (logits / temperature).softmax(1)
    return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)


def label_log_probability(logits: Tensor, weights: Tensor) -> Tensor:
    """Σ_j w_j log p_j of each row, `(n,)`: for one-hot weights the label's log-probability."""
    return (weights * logits.log_softmax(1)).sum(1)


def gradient_through(
    inner: Callable[[Tensor], Tensor], outer: Callable[[Tensor], Tensor], at: Tensor
) -> tuple[Tensor, Tensor]:
    """`inner(at)` and the inner gradient of `outer(inner(at)).sum()` with respect to `at`.

    One evaluation of `inner` serves both, wherever the value has the gradient's graph or needs none.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def value(point: Tensor) -> Tensor:
        seen.append((point, inner(point)))
        return outer(seen[-1][1])

    gradient = inner_gradient(value, at)
    point, result = seen[0]
    if not point.is_leaf:
        return result, gradient
    # The gradient was a constant, so its graph is gone; a value that must be differentiated is made again.
    return (inner(at) if torch.is_grad_enabled() and at.requires_grad else result.detach()), gradient


_KINKED = frozenset(
    ("relu", "leaky_relu", "prelu", "_prelu_kernel", "rrelu_with_noise", "threshold", "clamp_min", "maximum", "minimum",
     "hardtanh", "hardswish", "hardsigmoid", "max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d")
)  # fmt: skip


class _Operations(TorchDispatchMode):
    """The names of the operations that run within."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).split(".")[1].removesuffix("_"))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def has_kinks(network: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the gradient of what `network` makes of `x (n, c, h, w)` jumps, as that of a network of ReLUs does.

    A process that such a gradient moves far moves in jumps: what autograd gives of it is its slope between two jumps,
    and not how it changes. (The pull of `robust_guidance` is too faint for its check to see any.)
    """
    with _Operations() as seen:
        network(x)
    return not seen.names.isdisjoint(_KINKED)


@dataclass(frozen=True)
class GuidedPurifier(Purifier):
    """Diffuses and denoises `rounds` times; a subclass keeps what it needs of the input and guides the mean.

    Attributes:
        rounds: times that the image is diffused to `level` and denoised; each after the first begins
            with the last one's result. The guidance keeps to the input itself.
    """

    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"a purifier takes at least 1 round, got {self.rounds}.")

    @property
    def network_calls(self) -> int:
        """Network forwards of one purification, per sample."""
        return self.rounds * self.steps

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the guidance needs of the input pixels `x (n, c, h, w)`, a row a sample."""
        return ()

    def mean(
        self, z: Tensor, kept: tuple[Tensor, ...], x: Tensor, sigma: float, lower: float, noise: Noise
    ) -> tuple[Tensor, float]:
        """Mean `(n, c, h, w)` and variance of the step from `z` at `sigma` to `lower`; here without any guidance."""
        return posterior(z, self.denoiser.denoise(z, sigma), sigma, lower)

    def begin(self, x: Tensor, noise: Noise) -> State:
        """The start of the chain: the diffused image and what is kept."""
        return self.start(x, noise), *self.keep(x)

    def guided_step(self, sigma: float, lower: float, again: bool) -> Step:
        """The reverse step from one σ to the next lower one; `again` diffuses the image up to that σ first."""

        def reverse(state: State, x: Tensor, noise: Noise) -> State:
            z, *kept = state
            if again:
                z = z + sigma * noise.normal("again", shape=z.shape[1:], like=z)
            mean, variance = self.mean(z, tuple(kept), x, sigma, lower, noise)
            return sample(mean, variance, noise), *kept

        return reverse

    def readout(self, state: State, x: Tensor, noise: Noise) -> Tensor:
        """The purified pixels, not clipped; see `Purifier.readout`."""
        return decode(state[0])

    def shortened(self, steps: int) -> Self:
        """At most `steps` >= 1 steps over all rounds, from the same level; rounds that get no step are left out."""
        rounds = min(self.rounds, steps)
        return replace(self, rounds=rounds, steps=min(self.steps, steps // rounds))

    def chain(self) -> Chain:
        """See `Purifier.chain`."""
        check_sigmas(self.denoiser, self.sigmas[:-1], f"level {self.level}")
        steps = [
            self.guided_step(sigma, lower, again=round_ > 0 and sigma == self.sigmas[0])
            for round_ in range(self.rounds)
            for sigma, lower in pairwise(self.sigmas)
        ]
        return Chain(self.begin, steps, self.readout, self.network_calls)
