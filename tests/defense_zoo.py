"""Toy defenses on the real digits, given to the harness as `defense_zoo.py:NAME`, whose robustness has a closed form.

A dozen of them break a rule each. `SLOW` takes its time, so that a run of it can be killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay import data
from assay.boards import Board
from assay.card import Card, Handle, Traits, Votes
from assay.certificate import Smoothed
from assay.defense import Defense
from assay.digest import ids_digest
from assay.noise import Noise

# The weights come from a file where this variable names one, as a user's own checkpoint would.
WEIGHTS = "ASSAY_TEST_WEIGHTS"


@cache
def ridge() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`W (10, 64)` and `b (10,)`, ridge regression on the digits' training split, in float32 precision."""
    x, y = data.load("digits", data.train_split("digits"))
    rows = np.concatenate([x.flatten(1).numpy(), np.ones((len(x), 1))], axis=1).astype(np.float64)
    wanted = np.eye(10)[y.numpy()] - 0.1
    solution = np.linalg.solve(rows.T @ rows + 10 * np.eye(65), rows.T @ wanted).T * 10
    solution = solution.astype(np.float32).astype(np.float64)
    return solution[:, :64], solution[:, 64]


class Linear(Defense):
    """`logits = W x + b`."""

    def __init__(
        self,
        name: str = "toy-linear",
        *,
        traits: Traits | None = None,
        n_classes: int = 10,
        votes: Votes | None = None,
        handles: Sequence[Handle] = (),
    ) -> None:
        super().__init__()
        self.card = Card(
            name=name,
            title=name,
            summary="A toy.",
            traits=traits or Traits(),
            votes=votes or Votes(),
            handles=tuple(handles),
            certificate="smoothing" if traits is not None and traits.certifies else "",
        )
        self.n_classes = n_classes
        weight, bias = ridge()
        self.register_buffer("weight", torch.from_numpy(weight).float())
        self.register_buffer("bias", torch.from_numpy(bias).float())
        if WEIGHTS in os.environ:
            self.weight = torch.load(os.environ[WEIGHTS], weights_only=True)
        self.eval()

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Abstaining(Linear):
    """Linear, but an eleventh answer, never right, with probability q: expected accuracy is 1 − q of the linear one."""

    def __init__(self, q: float = 0.25, name: str = "toy-abstaining", *, pause: float = 0.0) -> None:
        super().__init__(name, traits=Traits(stochastic=True), n_classes=11)
        self.q, self.pause = q, pause

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        time.sleep(self.pause)
        logits = super().draw(x, noise)
        silent = noise.uniform("abstain", shape=(), like=x) < self.q
        return torch.cat([logits, torch.where(silent, 1e3, -1e3)[:, None].to(logits)], 1)


class SmoothedLinear(Linear):
    """Linear under Gaussian noise, by majority, with the certificate for it.

    Where `two_faced` it answers something else wherever a pixel was moved: not the model that it has certified.
    """

    def __init__(self, name: str = "toy-smoothed", *, sigma: float = 0.25, two_faced: bool = False) -> None:
        traits = Traits(stochastic=True, non_differentiable=True, certifies=True)
        super().__init__(name, traits=traits, votes=Votes(draws=16, how="majority"), handles=("votes", "certified"))
        self.sigma, self.two_faced = sigma, two_faced

    def base(self, noised: Tensor, noise: Noise) -> Tensor:
        return super().draw(noised, noise)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logits = self.base(x + self.sigma * noise.normal("z", shape=x.shape[1:], like=x), noise)
        if not self.two_faced:
            return logits
        moved = (x * 16 != (x * 16).round()).flatten(1).any(1)
        return torch.where(moved[:, None], logits.roll(1, 1), logits)

    def certified(self) -> Smoothed:
        return Smoothed(self.sigma, self.base)


class Misbehaving(Linear):
    """Does `fault` to its answer, where `late` on attacked inputs alone (a digit's pixels are multiples of 1/16)."""

    def __init__(self, fault: str, *, late: bool = False) -> None:
        super().__init__(f"toy-{fault.replace('_', '-')}")
        self.fault: str | None = fault
        self.late = late

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logits = super().draw(x, noise)
        wrong = (x * 16 != (x * 16).round()).flatten(1).any(1) if self.late else torch.ones(len(x), dtype=torch.bool)
        if self.fault is None or not bool(wrong.any()):
            return logits
        if self.fault == "crash":
            raise RuntimeError("out of paper")
        if self.fault == "shape":
            return logits[:, :9]
        if self.fault == "infinite":
            return torch.where(wrong[:, None], torch.inf, logits)
        return torch.where(wrong[:, None], torch.nan, logits)


LINEAR = Linear()
ABSTAINING = Abstaining()
SLOW = Abstaining(name="toy-slow", pause=float(os.environ.get("ASSAY_TEST_PAUSE", "0.02")))
CRASH, SHAPE, NAN = (Misbehaving(fault) for fault in ("crash", "shape", "nan"))
LATE_CRASH, LATE_NAN = (Misbehaving(fault, late=True) for fault in ("crash", "nan"))
SMOOTHED = SmoothedLinear()
TWO_FACED = SmoothedLinear("toy-two-faced", two_faced=True)
NAMESAKE = Linear("toy-source")
FEW_CLASSES = Linear("toy-few", n_classes=5)


def board(**changes: Any) -> Board:
    """A small board of digits: linf 1/10, 40 samples in shards of 15, 20 draws."""
    ids = tuple(changes.pop("ids", data.board_ids("digits")[: changes.pop("n", 40)]))
    fields: dict[str, Any] = {
        "name": "toy",
        "dataset": "digits",
        "revision": data.describe("digits").revision,
        "norm": "linf",
        "eps": "1/10",
        "protocol": "2026.1",
        "draws": 20,
        "shard": 15,
        "ids": ids,
        "ids_sha256": ids_digest(ids),
    }
    return Board(**{**fields, **changes})


def write_board(folder: Path, found: Board) -> Path:
    """The board as the TOML file that a user would write."""
    values = found.model_dump(mode="json")
    lines = [f"{key} = {values[key]!r}".replace("'", '"') for key in values if key not in ("radii", "description")]
    path = folder / f"{found.name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def linf_robust(x: Tensor, y: Tensor, eps: float) -> NDArray[np.bool_]:
    """Which samples no image of the linf ball and the box makes `ridge()` misread: exact, coordinate by coordinate."""
    return np.asarray((_worst_linf(x, y, eps) < 0).all(1))


def _worst_linf(x: Tensor, y: Tensor, eps: float) -> NDArray[np.float64]:
    """The greatest lead that each other class can take, `(n, 9)`."""
    weight, bias = ridge()
    centre, labels = x.flatten(1).double().numpy(), y.numpy()
    low, high = np.clip(centre - eps, 0, 1), np.clip(centre + eps, 0, 1)
    slope, offset = _rivals(weight, bias, labels)
    return np.asarray((np.where(slope > 0, high[:, None], low[:, None]) * slope).sum(2) + offset)


def linf_worst_point(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The image of the linf ball and the box where the rival with the greatest lead takes it, shaped like `x`."""
    weight, bias = ridge()
    slope, _ = _rivals(weight, bias, y.numpy())
    towards = slope[np.arange(len(x)), _worst_linf(x, y, eps).argmax(1)] > 0
    step = torch.from_numpy(np.where(towards, eps, -eps)).reshape(x.shape)
    # One float32 rounding inside, as `Ball.project` would have it.
    return (x.double() + step * (1 - 1e-6)).clamp(0, 1).float()


def l2_robust(x: Tensor, y: Tensor, eps: float) -> NDArray[np.bool_]:
    """The same for the l2 ball and the box, exact: δ = clip(a / λ, −x, 1 − x), λ by bisection on the length."""
    weight, bias = ridge()
    centre = x.flatten(1).double().numpy()[:, None]
    slope, offset = _rivals(weight, bias, y.numpy())
    small, large = np.full(slope.shape[:2], 1e-9), np.full(slope.shape[:2], 1e9)
    for _ in range(200):
        middle = np.sqrt(small * large)
        inside = np.linalg.norm(np.clip(slope / middle[..., None], -centre, 1 - centre), axis=2) <= eps
        small, large = np.where(inside, small, middle), np.where(inside, middle, large)
    step = np.clip(slope / large[..., None], -centre, 1 - centre)
    return np.asarray((((centre + step) * slope).sum(2) + offset < 0).all(1))


def _rivals(
    weight: NDArray[np.float64], bias: NDArray[np.float64], y: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slope `(n, 9, d)` and offset `(n, 9)` of each other class's lead over the right one."""
    others = np.array([[j for j in range(len(bias)) if j != label] for label in y])
    return weight[others] - weight[y][:, None], bias[others] - bias[y][:, None]
