"""`eot`: how many draws a gradient of a stochastic defense needs, from how well disjoint draws agree.

An attack on a defense that answers at random climbs a mean over draws (expectation over transformation, Athalye et al.
2018, arXiv 1802.00420). With too few of them it climbs noise, and the defense looks robust because its attacker was
cheap: purifiers lost accuracy with the draws of the attack alone (Lee & Kim 2023, arXiv 2303.09051).

Measured: the cosine between estimates of disjoint draws, of 1, 4, 16 and 64 draws each, and how far joining two of them
moves the direction of one (1 − cosine). Gradients are of the margin, taken as attacks take them (of the mean
probability where the defense votes, which is no mean of losses and settles far more slowly), half-way to the edge of
the threat ball along the first step. Everything is measured twice, from the same calls: averaged plainly, and with no
draw's gradient longer than the median of its sample's (`Target.gradient`'s `clip`), as attacks average them.

Two estimates of k draws with independent noise have the cosine c = ka / (ka + 1), with a = |E g|² / tr Var g, and
doubling the draws moves them by 1 − √((1 + c) / 2). So log(c / (1 − c)) is linear in log k with slope 1. Between the
measured numbers of draws it is interpolated with the slope that was measured: votes (a rare draw decides which class
is the rival) and heavy tails (rare huge gradients) make it flatter, and one ratio `a` would promise too much.
`data["closed_form"]` is what the median image's ratio would give, to be compared with `data["raw"]`, the count of plain
averages. Curves are means over pairs and images: cosines are bounded, so no image rules, and a median would hide that
an image agrees with itself in one pair and not in the next.

`data["clipped_count"]` is the smallest of `GRID` where doubling moves the direction of clipped draws by under `MOVES`;
the count to use, `data["count"]`, is that between `LEAST` and `MOST`. Flags where even 64 clipped draws leave a cosine
under `THRESHOLD`, and where there is no gradient to average; never fails.
Cost per image, of at most `IMAGES`: 16 + 128 gradients, 16 + 340 where the defense votes; none if deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.checks.subject import Subject
from assay.finding import Finding
from assay.noise import Noise
from assay.norms import Ball
from assay.target import Target

IMAGES = 8
"""Images that gradients are taken at. On the digits the count of a voting defense then varies with the seed by one or
two places on `GRID`, that of the others by one."""
DRAWS = (1, 4, 16, 64)
"""Numbers of draws whose estimates are compared; those of the protocol."""
GROUPS = 4
"""Disjoint estimates for each number of draws, where an estimate is no mean of single draws' gradients: six pairs."""
FIRST = 8
"""Draws of each of the two estimates at the images themselves, whose mean is the first step's direction."""
MOVES = 0.05
"""Draws are enough where twice as many move the direction by less; the protocol's. It is a cosine c of 0.805."""
THRESHOLD = 0.5
"""Cosine at the most draws below which gradients say little: twice as many would still turn it by 30 degrees."""
GRID = (1, 2, 4, 8, 16, 20, 32, 64, 128)
"""The counts to choose from; where none is enough, the last."""
LEAST = 20
"""The protocol's fewest draws for an attack on a stochastic defense."""
MOST = 64
"""The most that an attack is asked for: beyond it, steps and restarts are the better use of as many calls."""


def check(subject: Subject) -> Finding:
    """Compares gradients of the margin between disjoint draws; see the module for what, why and how much it costs."""
    if not subject.defense.card.traits.stochastic:
        data: dict[str, Any] = {"draws": [], "cosine": [], "moves": [], "clipped": [], "clipped_moves": []}
        data |= {"raw": 1, "clipped_count": 1, "count": 1}
        return Finding(check="eot", status="pass", data=data, message="Deterministic: one gradient says it all.")
    target = subject.target()
    x, y, noise = subject.x[:IMAGES], subject.y[:IMAGES], subject.noise[:IMAGES].child("eot")
    first, clipped_first = _estimates(target, x, y, noise.child("first"), FIRST, 2)
    z = Ball(subject.threat, x).step(x, clipped_first.mean(1), float(subject.threat.eps) / 2)
    if target.card.votes.draws == 1:
        # A mean over draws is a mean of gradients: one set of single draws gives every number of them.
        singles = gram(_estimates(target, z, y, noise, 1, 2 * max(DRAWS))[0])
        grams, clipped = ([_sums(found, k) for k in DRAWS] for found in (singles, clip(singles)))
    else:
        pairs = [_estimates(target, z, y, noise.child(k), k, GROUPS) for k in DRAWS]
        grams, clipped = ([gram(pair[i]) for pair in pairs] for i in (0, 1))
    alive = torch.stack([found.diagonal(dim1=1, dim2=2).sum(1) > 0 for found in grams]).any(0)
    data = {"images": len(x), "alive": int(alive.sum()), "at_images": _mean(cosine(gram(first))[None])[0]}
    return _finding(subject, grams, clipped, alive, data)


def recommended_draws(check_data: Mapping[str, Any]) -> int:
    """The draws that each gradient of an attack should average, from this check's `Finding.data`.

    To raise an attack's planned `eot` to, never to lower it, where it clips its draws. 1 for a deterministic defense;
    the protocol's least where the check has no answer (it raised, or wasn't run).
    """
    count = check_data.get("count")
    if isinstance(count, bool) or not isinstance(count, int | float) or not count >= 1:
        return LEAST
    return int(min(count, MOST))


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit above the right one, `(n,)`: logits and log-probabilities give the same."""
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -math.inf)
    return others.max(1).values - logits.gather(1, y[:, None]).squeeze(1)


def gram(gradients: Tensor) -> Tensor:
    """Inner products of each sample's estimates, `(n, m, …)` to `(n, m, m)` float64, up to a factor for each sample.

    Values that are not finite count as 0, as they do for an attack's step.
    """
    flat = torch.nan_to_num(gradients.flatten(2), nan=0.0, posinf=0.0, neginf=0.0)
    largest = flat.abs().amax((1, 2), keepdim=True)
    flat = torch.where(largest > 0, flat / largest, flat)
    # One sample after the other: float64 copies of all gradients of large images would take gigabytes.
    rows = [row.double() @ row.double().mT for row in flat]
    return torch.stack(rows) if rows else flat.new_zeros(0, flat.shape[1], flat.shape[1], dtype=torch.float64)


def clip(products: Tensor) -> Tensor:
    """The inner products `(n, m, m)` once no gradient is longer than the median of its sample's that don't vanish.

    >>> clip(torch.tensor([[[100.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]]]))[0, 0, 0]
    tensor(1.)
    """
    norms = products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    norms = torch.where(norms > 0, norms, torch.full_like(norms, math.nan))
    scale = (norms.nanmedian(1, keepdim=True).values / norms).nan_to_num(1.0).clamp_max(1)
    return products * scale[:, :, None] * scale[:, None, :]


def cosine(products: Tensor, k: int = 1) -> Tensor:
    """The mean cosine between all pairs of means over k disjoint draws, `(n,)`; 0 for a pair where one vanishes."""
    sums = _sums(products, k)
    squares = sums.diagonal(dim1=1, dim2=2).clamp_min(0)
    return _mean_of_pairs(sums, squares[:, :, None] * squares[:, None, :])


def moves(products: Tensor, k: int = 1) -> Tensor:
    """How far joining k disjoint draws moves the mean of k others, `(n,)`: 1 − cosine, the mean over all pairs."""
    sums = _sums(products, k)
    squares = sums.diagonal(dim1=1, dim2=2).clamp_min(0)[:, :, None]
    joined = (squares + squares.mT + 2 * sums).clamp_min(0)
    return 1 - _mean_of_pairs(squares + sums, squares * joined)


def enough(draws: Sequence[int], moved: Sequence[float]) -> int | None:
    """The smallest count of `GRID` where doubling moves the direction by under `MOVES`; None where there is none.

    `moved[i]` is measured for `draws[i]` draws, increasing. Outside `draws` the closed form (slope 1) goes on; within,
    the slope is the measured one. Agreement that more draws undo was luck: the fewer had not met the rare ones.
    """
    settled = [max(moved[i:]) for i in range(len(moved))]
    agreed = [2 * (1 - min(m, 1.0)) ** 2 - 1 for m in settled]
    odds = [math.log(c / (1 - c)) for c in (min(max(c, 1e-4), 1 - 1e-6) for c in agreed)]
    places = [math.log(k) for k in draws]
    for count in GRID:
        at = math.log(count)
        i = max(0, sum(place <= at for place in places) - 1)
        inside = at >= places[0] and i + 1 < len(places)
        slope = (odds[i + 1] - odds[i]) / (places[i + 1] - places[i]) if inside else 1.0
        if closed_form(math.exp(odds[i] + slope * (at - places[i]))) < MOVES:
            return count
    return None


def closed_form(ka: float) -> float:
    """How far doubling k draws moves their mean where |E g|² / tr Var g is a and noise independent, from `k · a`.

    >>> round(closed_form(4.128), 3)
    0.05
    """
    return 1 - math.sqrt((1 + ka / (ka + 1)) / 2)


def _sums(products: Tensor, k: int) -> Tensor:
    """Inner products `(n, m // k, m // k)` of sums over k draws each, from those of the draws `(n, m, m)`."""
    groups = products.shape[1] // k
    used = products[:, : groups * k, : groups * k]
    n = len(products)
    return used.reshape(n, groups, k, groups, k).sum((2, 4))


def _mean_of_pairs(inner: Tensor, squared_lengths: Tensor) -> Tensor:
    """The mean over pairs `i ≠ j` of `inner / √squared_lengths`, `(n,)`; 0 for a pair of no length."""
    lengths = squared_lengths.sqrt()
    values = torch.where(lengths > 0, inner / lengths, torch.zeros_like(inner)).clamp(-1, 1)
    m = inner.shape[1]
    mean: Tensor = (values.sum((1, 2)) - values.diagonal(dim1=1, dim2=2).sum(1)) / (m * (m - 1))
    return mean


def _estimates(target: Target, z: Tensor, y: Tensor, noise: Noise, draws: int, groups: int) -> tuple[Tensor, Tensor]:
    """`(n, groups, c, h, w)`: gradients at `z`, each over `draws` draws that it shares with no other; and clipped."""
    points, labels = z.repeat_interleave(groups, 0), y.repeat_interleave(groups)
    found = target.gradient(points, (labels,), margin, noise.draws(groups), draws=draws, clip=True)
    shape = (len(z), groups, *z.shape[1:])
    plain = found.gradient if found.unclipped is None else found.unclipped
    return plain.reshape(shape), found.gradient.reshape(shape)


def _mean(curves: Tensor) -> list[float]:
    """The mean over samples of curves `(k, n)`; zeros for no samples."""
    return [round(float(curve.mean()), 4) if len(curve) else 0.0 for curve in curves]


def _finding(
    subject: Subject, grams: Sequence[Tensor], clipped: Sequence[Tensor], alive: Tensor, data: dict[str, Any]
) -> Finding:
    cosines, tamed = (torch.stack([cosine(found) for found in side]) for side in (grams, clipped))
    moved, tamed_moved = (_mean(torch.stack([moves(found) for found in side])[:, alive]) for side in (grams, clipped))
    some = bool(alive.any())
    # The ratio of each image is the median of what its cosines say, so that no single number of draws rules.
    odds = cosines.clamp(1e-4, 1 - 1e-6)
    ratios = (odds / (1 - odds) / torch.tensor(DRAWS).to(odds)[:, None])[:, alive]
    ratio = round(float(ratios.quantile(0.5, dim=0).quantile(0.5)), 4) if some else 0.0
    raw, settled = enough(DRAWS, moved), enough(DRAWS, tamed_moved)
    data |= {
        "draws": list(DRAWS),
        "cosine": _mean(cosines[:, alive]),
        "moves": moved,
        "clipped": _mean(tamed[:, alive]),
        "clipped_moves": tamed_moved,
        "ratio": ratio,
        "closed_form": enough([1], [closed_form(ratio)]),
        "raw": raw,
        "clipped_count": settled,
        "count": min(MOST, max(LEAST, settled or MOST)) if some else LEAST,
    }
    last = data["clipped"][-1]
    below = torch.zeros(len(subject.x), dtype=torch.bool)
    below[: len(alive)] = (tamed[-1] < THRESHOLD).cpu()
    return Finding(
        check="eot",
        value=last,
        threshold=THRESHOLD,
        status="flag" if last < THRESHOLD else "pass",
        samples=subject.ids_of(below),
        message=_message(data) if some else SILENT,
        data=data,
    )


SILENT = (
    "No draw has a gradient, so there is nothing to average: trust the black-box and transfer attacks, and "
    "give a stand-in with gradients (stages, relaxed or components)."
)


def _message(data: Mapping[str, Any]) -> str:
    last, settled, count = data["clipped"][-1], data["clipped_count"], data["count"]
    agree = (
        f"Gradients over {DRAWS[-1]} disjoint draws, clipped as attacks clip them, agree with a cosine of {last:.2f} "
        f"({data['cosine'][-1]:.2f} unclipped)"
    )
    if last < THRESHOLD:
        return (
            f"{agree}: they say little even with {count} draws. Trust the black-box attacks and the transfer from "
            "its components, and select draws before averaging."
        )
    if settled is None or settled > MOST:
        return f"{agree}, and doubling still moves them at {count}: use {count} clipped draws, and transfer beside."
    plain = f"plain averaging takes {data['raw']}" if data["raw"] else f"plain averaging takes over {GRID[-1]}"
    return (
        f"{agree}, and from {settled} draws on doubling hardly moves them ({plain}): use {count} clipped draws for "
        "each gradient."
    )
