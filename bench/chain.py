"""Long differentiable processes with exact gradients whose memory does not grow with their length.

A purifier, or any iterated defense, is a chain: a start, steps, a readout, each a pure function
whose randomness is an argument. Because noise is replayed by its tag, a step can be run again
during the backward pass instead of keeping its graph: the chain stores one state a step and
builds one step's graph at a time. `torch.utils.checkpoint` does the bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assay.noise import Noise

State = Tensor | tuple[Tensor, ...]
Start = Callable[[Tensor, Noise], State]
Step = Callable[[State, Tensor, Noise], State]
Readout = Callable[[State, Tensor, Noise], Tensor]
Observer = Callable[[int, State], None]
Mode = Literal["exact", "full"]


def _first(state: State, x: Tensor, noise: Noise) -> Tensor:
    """The default readout: the state itself, or its first part."""
    return state if isinstance(state, Tensor) else state[0]


@dataclass(frozen=True)
class Chain:
    """`readout(step_T(… step_1(start(x))))`.

    Attributes:
        start: `(x, noise) -> state`.
        steps: each `(state, x, noise) -> state`, pure: no global RNG, no module state changed.
        readout: `(state, x, noise) -> output (n, …)`; by default the state.
        network_calls: network forwards of one run per sample, as declared.

    A state is a tensor or a tuple of tensors with rows first. Start, step i and the readout get
    the children `start`, `(step, i)` and `readout` of the caller's noise.
    """

    start: Start
    steps: Sequence[Step]
    readout: Readout = field(default=_first)
    network_calls: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __call__(self, x: Tensor, noise: Noise, *, mode: Mode = "exact", observe: Observer | None = None) -> Tensor:
        """Runs the chain on `x (n, c, h, w)`.

        Args:
            mode: `"exact"` keeps states and rebuilds each step's graph in the backward pass;
                `"full"` keeps every graph, as a reference. Both give the same gradient; where
                gradients are disabled neither keeps anything.
            observe: called with `(i, state)`, detached, after the start (i = 0) and each step.
        """
        save = mode == "exact" and torch.is_grad_enabled()

        def run(part: Callable[..., State], *args: object) -> State:
            if not save:
                return part(*args)
            result: State = checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
            return result

        state = run(self.start, x, noise.child("start"))
        _observe(observe, 0, state)
        for i, step in enumerate(self.steps):
            state = run(step, state, x, noise.child("step", i))
            _observe(observe, i + 1, state)
        output = run(self.readout, state, x, noise.child("readout"))
        assert isinstance(output, Tensor)
        return output

    def then(self, function: Callable[[Tensor, Noise], Tensor]) -> Chain:
        """The same process with `function(output, noise)` after its readout: a classifier behind a purifier."""

        def readout(state: State, x: Tensor, noise: Noise) -> Tensor:
            return function(self.readout(state, x, noise.child("inner")), noise.child("then"))

        return Chain(self.start, self.steps, readout, self.network_calls)


def _observe(observe: Observer | None, i: int, state: State) -> None:
    if observe is not None:
        observe(i, state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state))


def inner_gradient(function: Callable[[Tensor], Tensor], at: Tensor, *, second_order: bool = True) -> Tensor:
    """The gradient of `function(at).sum()` with respect to `at`, for use inside a step.

    Works where gradients are disabled (a forward-only run). Where the caller is building a graph
    the result stays differentiable, through `at` and through whatever `function` closes over, so
    that the chain's own gradient has its second-order terms; `second_order=False` drops them.
    """
    outer = torch.is_grad_enabled() and second_order
    with torch.enable_grad():
        point = at if outer and at.requires_grad else at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(point).sum(), point, create_graph=outer)
    return gradient
