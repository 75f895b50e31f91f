"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search with square-shaped changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.attack import AttackSpec, Target
from assay.attacks.eot import Standing, mean_answer, require_positive
from assay.attacks.losses import margin
from assay.noise import Noise
from assay.norms import Ball
from assay.threat import ThreatModel

SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The share of pixels a square covers halves after these iterations (the paper's section 5, for 10,000 queries)."""
BLOCK = 10
"""For a stochastic target, this many candidates in turn are compared on the same draws, then new ones are drawn."""


def square(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    noise: Noise,
    *,
    queries: int = 5000,
    eot: int = 1,
    p_init: float = 0.8,
) -> Tensor:
    """Changes one random square at a time and keeps what increases the margin; logits only.

    The schedule is the paper's for 10,000 queries whatever `queries` is, as in the authors' suite.
    For a stochastic target the loss is the margin of the probability averaged over `eot` draws (of
    single draws, also where the defense votes). Candidates of one block of iterations and the
    point they compete with share their draws; each block starts with new draws and a new estimate
    for the incumbent, so that a lucky draw protects nobody for long.

    Args:
        queries: the most points evaluated a sample.
        eot: draws a point, for a stochastic target.
        p_init: the share of pixels in the first squares.

    Raises:
        InputError: for a count below 1.
    """
    require_positive(queries=queries)
    standing = Standing(target, x, y, noise, eot=eot)
    rows = standing.rows
    if not len(rows):
        return standing.result()
    change = _change_linf if threat.norm == "linf" else _change_l2
    start = _stripes if threat.norm == "linf" else _tiles
    ball = Ball(threat, x)
    best = ball.project(x + ball.eps * start(x, noise.child("start")))
    values, loss = x.new_zeros(len(x), BLOCK, 0), x.new_full((len(x),), -math.inf)
    for i in range(queries):
        block, position = divmod(i, BLOCK)
        stream = noise.child("block", block)
        if position == 0:
            values = stream[rows].uniform("change", shape=(BLOCK, 5 + x.shape[1]), like=x)
        if i == 0 or (position == 0 and target.stochastic):
            logits, stands = standing.look(rows, best, stream)
            loss = margin(mean_answer(logits), y[rows])
        else:
            side = math.sqrt(_share(i - 1, p_init) * x.shape[-2] * x.shape[-1])
            candidate = ball.project(ball.x + change(best - ball.x, ball.eps, side, values[:, position]))
            logits, stands = standing.look(rows, candidate, stream)
            found = margin(mean_answer(logits), y[rows])
            best = torch.where((found > loss)[:, None, None, None], candidate, best)
            loss = torch.maximum(found, loss)
        if not bool(stands.all()):
            rows, best, loss, values, ball = rows[stands], best[stands], loss[stands], values[stands], ball[stands]
        if not len(rows):
            break
    return standing.result()


def _share(i: int, p_init: float) -> float:
    """The share of pixels that the square of candidate `i` covers."""
    halvings = sum(i > threshold for threshold in SCHEDULE)
    return p_init * 0.5**halvings


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -torch.ones_like(u), torch.ones_like(u))


def _window(like: Tensor, size: int, u_row: Tensor, u_column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A random window of `size`² pixels a sample: its mask `(n, 1, h, w)`, and each pixel's row and column in it."""
    h, w = like.shape[-2:]
    top = (u_row * (h - size + 1)).long().clamp(max=h - size)
    left = (u_column * (w - size + 1)).long().clamp(max=w - size)
    row = torch.arange(h, device=like.device)[None, :, None] - top[:, None, None]
    column = torch.arange(w, device=like.device)[None, None, :] - left[:, None, None]
    mask = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    return mask[:, None], row, column


def _stripes(x: Tensor, noise: Noise) -> Tensor:
    """The linf start: vertical stripes of ±1, `(n, c, h, w)`."""
    n, c, _, w = x.shape
    return _signs(noise.uniform("stripes", shape=(c, 1, w), like=x)).expand(n, c, x.shape[2], w)


def _change_linf(delta: Tensor, eps: float, side: float, u: Tensor) -> Tensor:
    """One square a sample is set to ±eps, a sign for each channel (algorithm 2)."""
    size = min(max(round(side), 1), *delta.shape[-2:])
    mask, _, _ = _window(delta, size, u[:, 0], u[:, 1])
    return torch.where(mask, eps * _signs(u[:, 5:])[:, :, None, None], delta)


def _bumps(size: int, like: Tensor) -> Tensor:
    """η, `(size, size)` of unit length: two half-windows of opposite sign, each peaked in its middle (eq. 2)."""
    halves = []
    for height, sign in ((size // 2, 1.0), (size - size // 2, -1.0)):
        row = torch.arange(height, device=like.device, dtype=like.dtype)[:, None] - height // 2
        column = torch.arange(size, device=like.device, dtype=like.dtype)[None, :] - size // 2
        ring = torch.maximum(row.abs(), column.abs()).long()
        reach = max(height // 2 + 1, size // 2 + 1)
        # A pixel in ring r is covered by the nested squares of radius r and more, each adding 1 / (radius + 1)².
        weights = 1 / torch.arange(1, reach + 1, device=like.device, dtype=like.dtype) ** 2
        half = weights.flip(0).cumsum(0).flip(0)[ring]
        halves.append(sign * half / torch.linalg.vector_norm(half).clamp_min(1e-12))
    bumps = torch.cat(halves)
    length: Tensor = torch.linalg.vector_norm(bumps)
    return bumps / length


def _tiles(x: Tensor, noise: Noise) -> Tensor:
    """The l2 start: a grid of about 5 × 5 bumps with random signs and orientations, of unit length a sample."""
    n, c, h, w = x.shape
    size = max(min(h, w) // 5, 1)
    down, across = h // size, w // size
    bumps = _bumps(size, x)
    turned = noise.uniform("turned", shape=(1, down, across), like=x) < 0.5
    signs = _signs(noise.uniform("signs", shape=(c, down, across), like=x))
    upright = turned[..., None, None]
    grid = signs[..., None, None] * torch.where(upright, bumps, bumps.T)
    grid = grid.permute(0, 1, 2, 4, 3, 5).reshape(n, c, down * size, across * size)
    delta = torch.zeros_like(x)
    top, left = (h - down * size) // 2, (w - across * size) // 2
    delta[:, :, top : top + down * size, left : left + across * size] = grid
    return delta / _length(delta, (1, 2, 3))


def _change_l2(delta: Tensor, eps: float, side: float, u: Tensor) -> Tensor:
    """One window's budget is emptied and moves, with what is left of eps, into another window (algorithm 3)."""
    c, h, w = delta.shape[1:]
    size = max(round(side), 3)
    size = min(size + 1 - size % 2, h, w)
    into, row, column = _window(delta, size, u[:, 0], u[:, 1])
    out_of, _, _ = _window(delta, size, u[:, 2], u[:, 3])
    bumps = _bumps(size, delta)
    row, column = row.clamp(0, size - 1), column.clamp(0, size - 1)
    turned = (u[:, 4] < 0.5)[:, None, None]
    shape = torch.where(turned, bumps.T[row, column], bumps[row, column])[:, None]
    old = delta * into
    new = into * (shape * _signs(u[:, 5:])[:, :, None, None] + old / _length(old))
    free = (eps**2 - _length(delta, (1, 2, 3)) ** 2).clamp_min(0) / c
    budget = (free + _length(delta * (into | out_of)) ** 2).sqrt()
    moved = torch.where(into, new / _length(new) * budget, delta * ~out_of)
    return eps * moved / _length(moved, (1, 2, 3))


def _length(delta: Tensor, dims: tuple[int, ...] = (2, 3)) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta, dim=dims, keepdim=True)
    return length.clamp_min(1e-12)


SPEC = AttackSpec(
    name="square",
    summary="Random search with square-shaped changes; logits only, averaged over draws for stochastic targets.",
    attack=square,
    black_box=True,
)
