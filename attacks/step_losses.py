"""A loss at every step of an iterated defense (DiffAttack: Kang, Song & Li 2023, arXiv 2311.16124, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from assay.attack import AttackSpec, Target
from assay.attacks.ascent import ascend
from assay.chain import Chain, Start, State, Step
from assay.errors import InputError
from assay.noise import Noise
from assay.threat import ThreatModel


def leading(state: State) -> Tensor:
    """The part of a state whose deviation counts, one row a sample `(n, m)`: the state itself, or its first tensor."""
    part = state if isinstance(state, Tensor) else state[0]
    return part.reshape(len(part), math.prod(part.shape[1:]))


def trajectory(chain: Chain, x: Tensor, noise: Noise) -> tuple[list[Tensor], Tensor]:
    """The leading part of each state of a run on `x`, after the start and each step, and its output; no gradient."""
    states: list[Tensor] = []
    with torch.no_grad():
        output = chain(x.detach(), noise, observe=lambda i, state: states.append(leading(state)))
    return states, output


def lead(logits: Tensor) -> Tensor:
    """By how much each row's first answer leads its second, `(n,)`; 1 where it does not."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return torch.where(first > second, first - second, torch.ones_like(first))


def deviation(state: State, reference: Tensor, like: Tensor) -> Tensor:
    """How far a state lies from a reference `(n, m)`, whatever its unit: `(n,)` in [0, 4], in `like`'s dtype.

    `2·‖s − r‖² / (‖s‖² + ‖r‖²)`, which is the squared distance over the reference's own square
    while that is small. It stays finite where a reference is 0, as an accumulator's start is.
    """
    part, reference = leading(state).to(like.dtype), reference.to(like.dtype)
    scale = part.square().sum(1) + reference.square().sum(1)
    distance = (part - reference).square().sum(1)
    # Two zero states are no deviation; a plain quotient would have a NaN for its gradient there.
    return 2 * distance / torch.where(scale > 0, scale, torch.ones_like(scale))


def with_deviations(chain: Chain, reference: Sequence[Tensor]) -> Chain:
    """The same process, whose output has one more column: the mean of its states' deviations from `reference`.

    Args:
        chain: `x -> logits (n, k)`.
        reference: as `trajectory` returns it, with the rows that the chain will be run on.
    """
    share = 1 / len(reference)

    def start(x: Tensor, noise: Noise) -> State:
        state = chain.start(x, noise)
        return _carry(share * deviation(state, reference[0], x), state)

    def stepping(step: Step, at: Tensor) -> Step:
        def run(carried: State, x: Tensor, noise: Noise) -> State:
            total, state = _split(carried)
            state = step(state, x, noise)
            return _carry(total + share * deviation(state, at, x), state)

        return run

    def readout(carried: State, x: Tensor, noise: Noise) -> Tensor:
        total, state = _split(carried)
        return torch.cat([chain.readout(state, x, noise), total[:, None]], 1)

    begin: Start = start
    steps = [stepping(step, at) for step, at in zip(chain.steps, reference[1:], strict=True)]
    return Chain(begin, steps, readout, chain.network_calls)


def _carry(total: Tensor, state: State) -> State:
    # The marker tells a state of one tensor from a tuple of one.
    return (total, state) if isinstance(state, Tensor) else (total, total.new_zeros(len(total), 0), *state)


def _split(carried: State) -> tuple[Tensor, State]:
    return (carried[0], carried[1]) if len(carried) == 2 else (carried[0], tuple(carried[2:]))


def step_losses(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    steps: int = 50,
    eot: int = 20,
    clip: bool = False,
    weight: float = 0.03,
    alpha: float | None = None,
    restarts: int = 1,
    optimizer: str = "apgd",
    loss: str = "margin",
) -> Tensor:
    """Ascent on the classification loss plus the deviation of every step's state, through the whole process.

    A long process can leave the classification loss without a useful gradient although its first
    steps still have one; a loss at each step reaches them. The paper holds the reverse process
    against the forward diffusion of the same image. A chain knows no forward process, so here each
    state is held against the state at the same step when the unattacked image runs through the
    chain under the same noise. That run costs one forward pass more for every draw.

    The bonus is `weight` times the mean over all states of `deviation`, in units of the largest
    mean square that a perturbation can have in the ball and of the lead that the clean run's answer
    has: a process that passes the full budget on to all its states adds about `weight` of the
    margin that there is to overcome. It is small by default, because any deviation will do for it: it
    decides where the classification loss says little, and leaves the rest alone.

    Args:
        steps, restarts, loss: as for `apgd` and `pgd`.
        eot: draws averaged for each loss and gradient, for a stochastic target.
        clip: shortens the gradients of the steepest draws before they are averaged, see `Target.gradient`.
        weight: what the deviations count beside the classification loss, at least 0.
        alpha: PGD's step length in pixel units; by default 2.5 · eps / steps.
        optimizer: `"apgd"` or `"pgd"`.

    Raises:
        ThreatViolation: where the defense offers no `chain`.
        InputError: for a bad option.
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise InputError(f"step_losses needs a weight of at least 0, got {weight}.")
    chain: Chain = target.handle("chain")()
    # Rows come in chunks, subsets and draws of the batch; their slots say whose they are.
    row = torch.zeros(int(noise.slots.max()) + 1 if len(x) else 0, dtype=torch.int64)
    row[noise.slots] = torch.arange(len(x))
    budget = float(threat.eps) ** 2 / (1 if threat.norm == "linf" else max(1, math.prod(x.shape[1:])))
    factor = weight / budget if budget > 0 else 0.0

    def forward(z: Tensor, draws: Noise) -> Tensor | tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return chain(z, draws)
        clean = x[row[draws.slots].to(x.device)]
        reference, answer = trajectory(chain, clean, draws)
        target.charge(draws)
        output = with_deviations(chain, reference)(z, draws, mode="exact")
        return output[:, :-1], factor * lead(answer) * output[:, -1]

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
    name="step_losses",
    summary="Ascent through all of a defense's steps with a loss at each that pulls its state off the clean path.",
    attack=step_losses,
    handles=("chain",),
)
