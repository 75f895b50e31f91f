"""How often the parts of a defense run: rows that pass its modules, and rows that layers make, per image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SLACK = 0.5
"""Half a call: rows that several images share (a time embedding) make fractions."""
OPERATIONS = ("convolution", "addmm")
"""What layers become, and what no backward pass uses."""

Counts = dict[str, float]


def count(defense: nn.Module, n: int, run: Callable[[], object]) -> Counts:
    """Rows that pass each module with parameters, and each kind of operation, over n."""
    rows: defaultdict[str, float] = defaultdict(float)
    with hooked(defense, rows), _Operations(rows), _no_fast_path():
        run()
    return {name: count / n for name, count in rows.items()}


@contextmanager
def hooked(defense: nn.Module, rows: defaultdict[str, float]) -> Iterator[None]:
    """Adds the rows that pass each module with parameters, while it lasts."""
    hooks = []
    try:
        for name, module in defense.named_modules():
            if name and next(module.parameters(), None) is not None:
                hooks.append(module.register_forward_hook(_tally(name, rows)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tally(name: str, rows: defaultdict[str, float]) -> Callable[[nn.Module, Any, Any], None]:
    def tally(module: nn.Module, given: Any, made: Any) -> None:
        first = made[0] if isinstance(made, tuple | list) and made else made
        rows[name] += len(first) if isinstance(first, Tensor) and first.ndim else 1

    return tally


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Attention by its parts: without gradients torch would fuse a layer, whose parts are then never called."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Operations(TorchDispatchMode):
    """Counts the rows that convolutions and affine maps make."""

    def __init__(self, rows: defaultdict[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in OPERATIONS and isinstance(made, Tensor) and made.ndim:
            self.rows[f"all {name}"] += len(made)
        return made


def readings(defense: nn.Module, counts: Counts) -> tuple[float, float]:
    """The fewest and the most network calls of one draw that the counts allow."""
    low, high = _children(defense, "", counts)
    uncalled = [name for name, module in defense.named_modules() if name and not counts.get(name) and _own(module)]
    # A layer that isn't called may be used by hand: any of the operations may be a network then.
    return low, high + (sum(counts.get(f"all {name}", 0.0) for name in OPERATIONS) if uncalled else 0.0)


def _own(module: nn.Module) -> bool:
    """Whether a module has parameters itself."""
    return next(module.parameters(recurse=False), None) is not None


def _children(module: nn.Module, prefix: str, counts: Counts) -> tuple[float, float]:
    """The parts are one network, called as often as any of them is, or each is its own."""
    read = [_reading(child, f"{prefix}{name}", counts) for name, child in module.named_children()]
    return max((low for low, _ in read), default=0.0), sum(high for _, high in read)


def _reading(module: nn.Module, name: str, counts: Counts) -> tuple[float, float]:
    own = counts.get(name, 0.0)
    low, high = _children(module, f"{name}.", counts)
    inner = max((count for key, count in counts.items() if key.startswith(f"{name}.")), default=0.0)
    if not own:
        return low, high
    # Parts that are called more often than the whole: a process with networks inside, or a layer used repeatedly.
    return (own, max(own, high)) if inner > own + SLACK else (own, own)
