"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) as its authors package it: the reference, called and not copied."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from assay.attack import AttackSpec, Target
from assay.errors import InputError
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel

_NORMS = {"linf": "Linf", "l2": "L2"}
_SMALLEST_L2 = 5
"""Square's l2 start tiles the image five times a side; on fewer pixels the package divides by zero."""


class _Model(nn.Module):
    """What the package sees of a target: float32 images in, logits out, each call on fresh noise."""

    def __init__(self, target: Target, noise: Noise, dtype: torch.dtype) -> None:
        super().__init__()
        self._target = target
        self._noise = noise
        self._dtype = dtype
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        noise = self._noise.child("call", self._calls)[torch.arange(len(x)) % len(self._noise)]
        self._calls += 1
        # Foreign candidates may be NaN where gradients were 0; the defense is owed images.
        images = torch.nan_to_num(x)
        if not x.requires_grad:
            return self._target.forward_graph(images.to(self._dtype), noise).float()
        # As in every attack here: entries of a gradient that are not finite count as 0, and so does a
        # severed graph's, so that a defense can't stop the attack with either.
        images = images * 1
        images.register_hook(lambda slope: torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0))
        logits = self._target.forward_graph(images.to(self._dtype), noise).float()
        return logits + 0 * images.flatten(1).sum(1, keepdim=True)


def autoattack(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    version: str = "standard",
    batch_size: int = 250,
) -> Tensor:
    """The reference suite, its candidates projected onto the ball; unbroken samples come back unchanged.

    `standard` runs APGD-CE, APGD-T, FAB-T and Square on a deterministic target. `rand` runs
    APGD-CE and APGD-DLR with 20 draws an iteration, and gives a sample up after one unlucky draw,
    which its score on fresh noise will show: a comparison, not an upper bound. It attacks single
    draws, also of a defense that votes. The package works in float32, on whole batches, and seeds
    torch's global generator; that is forked here and put back, as are the interpreter's trace hook
    and the warnings it would print.

    Args:
        version: `"standard"` or `"rand"`.
        batch_size: samples the package attacks at a time, without chunks.

    Raises:
        InputError: for an unknown version, `standard` on a target that answers at random (it would
            report luck as success), fewer than 4 classes (both versions rest on the DLR loss), or
            l2 images under 5 pixels a side.
    """
    if version not in ("standard", "rand"):
        raise InputError(f"autoattack's version must be 'standard' or 'rand', got {version!r}.")
    if version == "standard" and target.stochastic:
        raise InputError(f"{target.card.name} answers at random; autoattack needs version='rand' for it.")
    if target.n_classes < SPEC.min_classes:
        raise InputError(f"autoattack needs at least {SPEC.min_classes} classes, the target has {target.n_classes}.")
    if version == "standard" and threat.norm == "l2" and min(x.shape[-2:]) < _SMALLEST_L2:
        raise InputError(f"autoattack needs l2 images of at least {_SMALLEST_L2} pixels a side, got {tuple(x.shape)}.")
    if not len(x):
        return x.clone()
    images = x.detach().float()
    model = _Model(target, noise, x.dtype).eval()
    with _contained(x.device):
        # Imported here: the package costs a second, and most runs that list attacks never call it.
        from pyautoattack import AutoAttack

        suite = AutoAttack(
            model, norm=_NORMS[threat.norm], eps=float(threat.eps), seed=noise.seed(), version=version, device=x.device
        )
        quiet = logging.Logger("autoattack", level=logging.CRITICAL + 1)
        suite.verbose = False
        suite.logger = suite.apgd.logger = suite.apgd_targeted.logger = quiet
        # The package indexes the k-th class for its k-th target without asking how many there are.
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, target.n_classes - 1)
        found, _ = suite.run_standard_evaluation(images, y, batch_size=batch_size)
    found = found.detach().to(x.dtype)
    broken = (found != images.to(x.dtype)).flatten(1).any(1) & found.isfinite().flatten(1).all(1)
    return torch.where(broken[:, None, None, None], Ball(threat, x).project(found), x)


@contextlib.contextmanager
def _contained(device: torch.device) -> Iterator[None]:
    """Keeps what the package does to the process inside: the global generators, the trace hook, warnings."""
    trace = sys.gettrace()
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.settrace(trace)


SPEC = AttackSpec(
    name="autoattack",
    summary="The reference suite: 'standard' for deterministic targets, 'rand' as a comparison for stochastic ones.",
    attack=autoattack,
    min_classes=4,
)
