"""What a defense shares with the attacks on it: the process's settings, and the functions that everyone calls.

Whoever turns on autocast, changes the default dtype, leaves a hook on every module, or puts a function of its own in
the place of `torch.autograd.grad` changes what an attack computes without touching an answer. A snapshot is taken
before the first call, compared later, and put back, so that what follows is measured with the settings as they were.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_TORCH = str(Path(torch.__file__).parent)
_MODULE = sys.modules[nn.Module.__module__]
_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")

Setting = tuple[Callable[[], Any], Callable[[Any], object] | None]
"""How to read it, and how to put it back."""

SETTINGS: Mapping[str, Setting] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "autocast on the CPU": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
    ),
    "autocast on the GPU": (
        lambda: torch.is_autocast_enabled("cuda"),
        lambda on: torch.set_autocast_enabled("cuda", on),
    ),
    "anomaly detection": (torch.is_anomaly_enabled, lambda on: torch.autograd.set_detect_anomaly(on)),
    "the precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the gradient mode": (torch.is_grad_enabled, lambda on: torch.set_grad_enabled(on)),
    # Nothing tells whether small numbers are flushed to 0, but one of them does.
    "denormal numbers": (
        lambda: bool(torch.full((1,), 1e-38).div(100) > 0),
        lambda kept: torch.set_flush_denormal(not kept),
    ),
    "hooks on every module": (
        lambda: tuple(dict(getattr(_MODULE, name)) for name in _HOOKS),
        lambda kept: _refill(kept),
    ),
    "hooks on saved tensors": (
        lambda: torch._C._autograd._top_saved_tensors_default_hooks(True),
        None,
    ),
    "dispatch modes": (lambda: [id(mode) for mode in _get_current_dispatch_mode_stack()], None),
}


class Ambient:
    """A snapshot of `SETTINGS`, and of the functions of torch and of this package."""

    def __init__(self) -> None:
        self.settings = {name: read() for name, (read, _) in SETTINGS.items()}
        self.functions = {(owner, name): value for owner, name, value in _functions()}
        self.found: dict[str, None] = {}

    def changed(self) -> list[str]:
        """The names of what is not as it was, or was not before it was put back."""
        return list(self.found | dict.fromkeys(self._changed()))

    def _changed(self) -> list[str]:
        names = [name for name, (read, _) in SETTINGS.items() if read() != self.settings[name]]
        names += [f"{owner.__name__}.{name}" for (owner, name), _ in self._replaced()]
        return names

    def restore(self) -> None:
        """Puts everything back that can be, and remembers what had to be."""
        self.found |= dict.fromkeys(self._changed())
        for name, (read, write) in SETTINGS.items():
            if write is not None and read() != self.settings[name]:
                write(self.settings[name])
        for (owner, name), value in self._replaced():
            setattr(owner, name, value)

    def _replaced(self) -> list[tuple[tuple[Any, str], object]]:
        return [
            ((owner, name), value)
            for (owner, name), value in self.functions.items()
            if (now := vars(owner).get(name)) is not value and not _of_torch(owner, now)
        ]


def generators() -> dict[str, object]:
    """The state of every global generator that a defense could draw from, in a form that compares."""
    kind, keys, position, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the legacy one is the global one
    states: dict[str, object] = {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "NumPy": (kind, np.asarray(keys).tobytes(), position, *rest),
        "Python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["CUDA"] = b"".join(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())
    return states


def _of_torch(owner: Any, now: object) -> bool:
    """Whether torch replaced a function of its own, as it does when parts of it are first imported."""
    code = getattr(now, "__code__", None)
    ours = getattr(owner, "__module__", owner.__name__).split(".")[0] == "assay"
    return not ours and code is not None and code.co_filename.startswith(_TORCH)


def _functions() -> Iterator[tuple[Any, str, object]]:
    """Owner, name and value of what an attack and the harness call."""
    for owner in (torch, torch.autograd, nn.functional, torch.Tensor, nn.Module):
        for name, value in vars(owner).items():
            if callable(value):
                yield owner, name, value
    for name, module in list(sys.modules.items()):
        # Attacks, checks and the harness; what a defense does to its own module is seen by its answers.
        if name.split(".")[0] == "assay" and not name.startswith("assay.defenses") and module is not None:
            for key, value in list(vars(module).items()):
                if getattr(value, "__module__", None) != name:
                    continue
                if inspect.isfunction(value):
                    yield module, key, value
                elif inspect.isclass(value):
                    yield from ((value, each, made) for each, made in vars(value).items() if inspect.isfunction(made))


def _refill(kept: Sequence[Mapping[Any, Any]]) -> object:
    for name, each in zip(_HOOKS, kept, strict=True):
        hooks = getattr(_MODULE, name)
        hooks.clear()
        hooks.update(each)
    return None
