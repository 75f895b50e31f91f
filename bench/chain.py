"""Long differentiable processes with exact gradients whose memory does not grow with their length.

A purifier, or any iterated defense, is a chain: a start, steps, a readout, each a pure function
whose randomness is an argument. Because noise is replayed by its tag, a step can be run again
during the backward pass instead of keeping its graph: the chain stores one state a step and
builds one step's graph at a time.

`torch.utils.checkpoint` would do the bookkeeping, but not for a step that takes a gradient itself:
that gradient makes it recompute the step within the forward pass and keep what it recomputed, so
that a guided chain's memory grew as a full graph's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from assay.noise import Noise

State = Tensor | tuple[Tensor, ...]
Start = Callable[[Tensor, Noise], State]
Step = Callable[[State, Tensor, Noise], State]
Readout = Callable[[State, Tensor, Noise], Tensor]
Observer = Callable[[int, State], None]
Mode = Literal["exact", "full"]


_first_order: ContextVar[bool] = ContextVar("first_order", default=False)
"""Whether inner gradients are taken as constants just now; set by the parts of `Chain.first_order()` alone."""


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
    the children `start`, `(step, i)` and `readout` of the caller's noise. Gradients flow to `x`;
    other tensors that a part closes over are constants to an exact gradient.

    >>> double = Chain(lambda x, noise: x, [lambda state, x, noise: 2 * state] * 10)
    >>> x = torch.ones(1, 1, requires_grad=True)
    >>> double(x, Noise.from_seed(0, 1)).sum().backward()
    >>> x.grad
    tensor([[1024.]])
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
        run = _replayed if mode == "exact" and torch.is_grad_enabled() else _plain
        state = run(lambda none, x, noise: self.start(x, noise), (), x, noise.child("start"))
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

    def first_order(self) -> Chain:
        """The same process whose `inner_gradient`s have no gradient of their own: second-order terms dropped."""
        steps = [_constant(step) for step in self.steps]
        return Chain(_constant(self.start), steps, _constant(self.readout), self.network_calls)


def _constant(part: Callable[..., Any]) -> Callable[..., Any]:
    """`part` with its inner gradients as constants, in the forward pass and wherever a replay runs it again."""

    def run(*arguments: Any) -> Any:
        with _dropping_second_order():
            return part(*arguments)

    return run


@contextmanager
def _dropping_second_order() -> Iterator[None]:
    token = _first_order.set(True)
    try:
        yield
    finally:
        _first_order.reset(token)


def _plain(part: Step, state: State, x: Tensor, noise: Noise) -> State:
    return part(state, x, noise)


def _replayed(part: Step, state: State, x: Tensor, noise: Noise) -> State:
    """`part(state, x, noise)` without its graph, which the backward pass builds again."""
    single = isinstance(state, Tensor)
    shape: list[bool] = []

    def flat(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        result = part(parts[0] if single else parts, x, noise)
        shape[:] = [isinstance(result, Tensor)]
        return (result,) if isinstance(result, Tensor) else tuple(result)

    parts = (state,) if isinstance(state, Tensor) else state
    outputs: tuple[Tensor, ...] = _Replay.apply(flat, x, *parts)  # type: ignore[no-untyped-call]
    return outputs[0] if shape[0] else outputs


class _Replay(torch.autograd.Function):
    """A function of tensors that keeps its inputs alone and runs again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        outputs = function(*inputs)
        ctx.mark_non_differentiable(*(each for each in outputs if not each.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()  # somebody differentiates the gradient
        with torch.enable_grad():
            # Aliases, so that x's direct influence is told apart from that through the state.
            inputs = [
                tensor.view_as(tensor) if again else tensor.detach().requires_grad_(need)
                for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.function(*inputs)
        slopes: list[Tensor | None] = [None] * len(inputs)
        at = [i for i, need in enumerate(needed) if need]
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        if pairs and at:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [inputs[i] for i in at],
                [gradient for _, gradient in pairs],
                allow_unused=True,
                create_graph=again,
            )
            for i, slope in zip(at, found, strict=True):
                slopes[i] = slope
        return None, *slopes


def _observe(observe: Observer | None, i: int, state: State) -> None:
    if observe is not None:
        observe(i, state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state))


def inner_gradient(function: Callable[[Tensor], Tensor], at: Tensor, *, second_order: bool = True) -> Tensor:
    """The gradient of `function(at).sum()` with respect to `at`, for use inside a step.

    Works where gradients are disabled (a forward-only run). Where the caller is building a graph
    the result stays differentiable, through `at` and through whatever `function` closes over, so
    that the chain's own gradient has its second-order terms; `second_order=False` drops them,
    and so does `Chain.first_order`.
    """
    outer = torch.is_grad_enabled() and second_order and not _first_order.get()
    with torch.enable_grad():
        # An alias, so that what `function` closes over may depend on `at`: that is no part of this gradient.
        point = at.view_as(at) if outer and at.requires_grad else at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(point).sum(), point, create_graph=outer)
    return gradient
