from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.chain import Chain, State, inner_gradient
from assay.noise import Noise

SHAPE = (3, 1, 4, 4)
NOISE = Noise.from_seed(0, 3)


def _peak_memory() -> Any:
    """`benchmarks.memory`, which is in no package that a test could import."""
    path = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmarks_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PeakMemory


PeakMemory = _peak_memory()


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def start(x: Tensor, noise: Noise) -> Tensor:
    return x + 0.1 * noise.normal(shape=x.shape[1:], like=x)


def unguided(state: State, x: Tensor, noise: Noise) -> State:
    assert isinstance(state, Tensor)
    return torch.tanh(state) * 1.1 + 0.1 * x**2 + 0.05 * noise.normal(shape=x.shape[1:], like=x)


def energy(z: Tensor, x: Tensor) -> Tensor:
    """Not quadratic, and x is in it: its gradient's derivatives in z and in x both count."""
    return (torch.sin(3 * z) * x + (z - x) ** 4).flatten(1).sum(1)


def guided(state: State, x: Tensor, noise: Noise) -> State:
    assert isinstance(state, Tensor)
    moved = unguided(state, x, noise)
    assert isinstance(moved, Tensor)
    return moved - 0.1 * inner_gradient(lambda z: energy(z, x), state)


def first_order(state: State, x: Tensor, noise: Noise) -> State:
    assert isinstance(state, Tensor)
    moved = unguided(state, x, noise)
    assert isinstance(moved, Tensor)
    return moved - 0.1 * inner_gradient(lambda z: energy(z, x), state, second_order=False)


def guided_pair(state: State, x: Tensor, noise: Noise) -> State:
    """A state of two tensors, as momentum or a reverse process with memory has."""
    z, momentum = state
    new = guided(z, x, noise)
    assert isinstance(new, Tensor)
    momentum = 0.9 * momentum + 0.1 * new.square()
    return new + 0.1 * momentum, momentum


def readout(state: State, x: Tensor, noise: Noise) -> Tensor:
    z = state if isinstance(state, Tensor) else state[0] + state[1]
    return (z * x).flatten(1) + noise.normal(shape=(16,), like=x)


def pair_start(x: Tensor, noise: Noise) -> State:
    return start(x, noise), torch.zeros_like(x)


CHAINS = {
    "unguided": Chain(start, [unguided] * 6, readout),
    "guided": Chain(start, [guided] * 6, readout),
    "mixed": Chain(start, [unguided, guided, unguided], readout),
    "pair": Chain(pair_start, [guided_pair] * 4, readout),
    "no steps": Chain(start, [], readout),
    "default readout": Chain(pair_start, [guided_pair] * 2),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def gradient(chain: Chain, x: Tensor, **options: Any) -> Tensor:
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(chain(point, NOISE, **options).square().sum(), point)
    return slope


@chains
def test_the_exact_gradient_is_the_full_graphs(chain: Chain) -> None:
    exact, full = gradient(chain, images()), gradient(chain, images(), mode="full")
    assert full.abs().max() > 0.1
    torch.testing.assert_close(exact, full, rtol=0, atol=1e-10)


@chains
def test_the_gradient_is_the_slope_of_the_values(chain: Chain) -> None:
    x, exact = images(), gradient(chain, images())
    for i in range(4):
        direction = Noise.from_seed(1, 3).normal(i, shape=SHAPE[1:], like=x)
        h = 1e-5
        rise = chain(x + h * direction, NOISE).square().sum() - chain(x - h * direction, NOISE).square().sum()
        assert (exact * direction).sum().item() == pytest.approx(rise.item() / (2 * h), rel=1e-6)


def test_dropping_the_second_order_terms_gives_another_gradient() -> None:
    whole, dropped = CHAINS["guided"], Chain(start, [first_order] * 6, readout)
    x = images()
    assert torch.equal(whole(x, NOISE), dropped(x, NOISE))
    exact, partial = gradient(whole, x), gradient(dropped, x)
    assert (exact - partial).abs().max() > 0.1
    torch.testing.assert_close(partial, gradient(dropped, x, mode="full"), rtol=0, atol=1e-10)


@chains
def test_a_gradient_of_the_gradient_is_right_too(chain: Chain) -> None:
    def curvature(mode: str) -> Tensor:
        point = images().requires_grad_()
        options: Any = {"mode": mode}
        (slope,) = torch.autograd.grad(chain(point, NOISE, **options).square().sum(), point, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), point)
        return second

    torch.testing.assert_close(curvature("exact"), curvature("full"), rtol=1e-9, atol=1e-9)


@chains
def test_a_replay_is_equal_to_the_bit(chain: Chain) -> None:
    x = images(torch.float32)
    with torch.no_grad():
        first = chain(x, NOISE)
    states: list[State] = []
    assert torch.equal(chain(x.clone().requires_grad_(), NOISE, observe=lambda i, s: states.append(s)), first)
    assert torch.equal(chain(x, NOISE, mode="full"), first)
    for i, step in enumerate(chain.steps):
        again, kept = step(states[i], x, NOISE.child("step", i)), states[i + 1]
        for a, b in zip(_parts(again), _parts(kept), strict=True):
            assert torch.equal(a, b)


@chains
def test_rows_do_not_meet(chain: Chain) -> None:
    x, rows = images(), torch.tensor([2, 0])
    torch.testing.assert_close(chain(x[rows], NOISE[rows]), chain(x, NOISE)[rows], rtol=0, atol=1e-14)


@chains
def test_forward_only_keeps_no_graph(chain: Chain) -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = chain(images().requires_grad_(), NOISE)
    assert not output.requires_grad
    inner = sum(step in (guided, guided_pair) for step in chain.steps)
    assert len(saved) <= 20 * inner  # a guided step's own graph passes by; nothing else is packed
    assert not chain(images(), NOISE).requires_grad


@pytest.mark.parametrize("mode", ["exact", "full"])
@chains
def test_an_observer_sees_every_state_detached(chain: Chain, mode: Any) -> None:
    seen: list[tuple[int, State]] = []
    chain(images().requires_grad_(), NOISE, mode=mode, observe=lambda i, state: seen.append((i, state)))
    assert [i for i, _ in seen] == list(range(len(chain) + 1))
    assert not any(part.requires_grad for _, state in seen for part in _parts(state))


def test_observing_changes_nothing() -> None:
    chain, x = CHAINS["guided"], images()
    assert torch.equal(gradient(chain, x), gradient(chain, x, observe=lambda i, state: None))


@chains
def test_then_puts_a_function_behind_the_process(chain: Chain) -> None:
    def classify(z: Tensor, noise: Noise) -> Tensor:
        return z.flatten(1)[:, :4].exp() + noise.normal(shape=(4,), like=z)

    longer, x = chain.then(classify), images()
    assert len(longer) == len(chain)
    assert longer.network_calls == chain.network_calls
    assert longer(x, NOISE).shape == (3, 4)
    torch.testing.assert_close(gradient(longer, x), gradient(longer, x, mode="full"), rtol=0, atol=1e-9)


def test_then_does_not_change_the_process_before_it() -> None:
    purified: list[State] = []
    chain = CHAINS["unguided"]
    chain(images(), NOISE, observe=lambda i, state: purified.append(state))
    behind: list[State] = []
    chain.then(lambda z, noise: z)(images(), NOISE, observe=lambda i, state: behind.append(state))
    assert all(
        torch.equal(a, b)
        for a, b in zip(purified, behind, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


def test_a_severed_chain_has_no_gradient() -> None:
    chain = Chain(start, [lambda state, x, noise: torch.round(_parts(state)[0].detach() * 4) / 4])
    point = images().requires_grad_()
    (slope,) = torch.autograd.grad(chain(point, NOISE).sum(), point, allow_unused=True)
    assert slope is None or slope.abs().max() == 0


def test_a_state_may_carry_integers() -> None:
    def counted(state: State, x: Tensor, noise: Noise) -> State:
        z, count = state
        return z * count.reshape(-1, 1, 1, 1), count + 1

    chain = Chain(lambda x, noise: (x, torch.ones(len(x), dtype=torch.int64)), [counted] * 3)
    torch.testing.assert_close(chain(images(), NOISE), 6 * images())
    torch.testing.assert_close(gradient(chain, images()), 72 * images())


def test_a_step_that_changes_its_state_in_place_is_found_out() -> None:
    def careless(state: State, x: Tensor, noise: Noise) -> State:
        assert isinstance(state, Tensor)
        return state.mul_(2).sin()

    with pytest.raises(RuntimeError, match=r"in-?place"):
        gradient(Chain(start, [careless] * 2), images())


def test_inner_gradient_works_where_gradients_are_off() -> None:
    x = images()
    with torch.no_grad():
        slope = inner_gradient(lambda z: z.square().flatten(1).sum(1), x)
    assert torch.equal(slope, 2 * x)
    assert not slope.requires_grad
    assert not x.requires_grad


def _parts(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def _peak(kind: str, steps: int, mode: Any) -> int:
    weight = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1

    def step(state: State, x: Tensor, noise: Noise) -> State:
        assert isinstance(state, Tensor)

        def network(z: Tensor) -> Tensor:
            hidden = torch.nn.functional.silu(torch.nn.functional.conv2d(z, weight, padding=1))
            return torch.nn.functional.conv_transpose2d(hidden, weight, padding=1)

        moved = state + 0.1 * network(state) + 0.01 * noise.normal(shape=x.shape[1:], like=x)
        if kind == "guided":
            moved = moved - 0.1 * inner_gradient(lambda z: (network(z) * x).flatten(1).sum(1), state)
        return moved

    x = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    noise = Noise.from_seed(0, 16)
    with PeakMemory(known=[x, weight]) as memory:
        torch.autograd.grad(Chain(start, [step] * steps)(x, noise, mode=mode).square().sum(), x)
    return int(memory.peak)


@pytest.mark.parametrize("kind", ["unguided", "guided"])
def test_memory_does_not_grow_with_the_steps_beyond_the_states(kind: str) -> None:
    state = 16 * 16 * 16 * 4
    short, long = _peak(kind, 10, "exact"), _peak(kind, 100, "exact")
    assert long <= 1.2 * short + 90 * state
    # The same instrument sees a full graph grow, by far more than a state a step.
    assert _peak(kind, 100, "full") - _peak(kind, 10, "full") > 90 * 10 * state


def test_what_an_inner_gradient_closes_over_is_no_part_of_it() -> None:
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64).requires_grad_()
    kept = 2 * x  # depends on the point, but is held fixed while the gradient is taken
    gradient = inner_gradient(lambda z: (kept * z.square()).flatten(1).sum(1), x)
    assert torch.allclose(gradient, 4 * x**2)
    (slope,) = torch.autograd.grad(gradient.sum(), x)
    # The result still depends on both: 2 · 2x · x has the slope 8x.
    assert torch.allclose(slope, 8 * x)


def test_a_first_order_chain_takes_inner_gradients_for_constants() -> None:
    def step(state: State, x: Tensor, noise: Noise) -> State:
        assert isinstance(state, Tensor)
        return state - 0.1 * inner_gradient(lambda z: z.pow(4).flatten(1).sum(1), state)

    chain = Chain(lambda x, noise: x, [step, step])
    x, noise = torch.rand(3, 1, 2, 2, dtype=torch.float64), Noise.from_seed(0, 3)
    for mode in ("exact", "full"):
        point = x.clone().requires_grad_()
        output = chain.first_order()(point, noise, mode=mode)
        assert torch.equal(output, chain(x, noise))
        (slope,) = torch.autograd.grad(output.sum(), point)
        assert torch.equal(slope, torch.ones_like(x))
    point = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(chain(point, noise).sum(), point)
    after = x - 0.4 * x**3
    assert torch.allclose(exact, (1 - 1.2 * after**2) * (1 - 1.2 * x**2))
