"""`calibration`: on a board, defenses known to be broken fall, and a linear model scores what algebra says.

Before a board's numbers are believed, its attacks are held against what is known (Carlini et al. 2019, arXiv
1902.06705, section 5.2; Athalye, Carlini & Wagner 2018, arXiv 1802.00420, for the broken defenses).

* The robust accuracy of a linear model is exact: the worst point of the ball and the box for each rival class has a
  closed form, coordinate by coordinate in linf, one water level in l2. It is fitted by ridge regression on given
  images and attacked at the board's radius, where nothing or everything may fall, and at the median distance to its
  decision boundaries, where about half must. The attacks may leave at most `TOLERANCE` more than is true, or one
  sample, and nothing less: that would be an image outside the ball.
* Each known-broken defense is left with less than `SHARE` of its clean accuracy, and with less than `LEFT`: at the
  board's radius or, where that spares an undefended model more than `UNDEFENDED`, at the smallest doubling of it
  that doesn't. At a radius that spares any classifier a broken defense proves nothing.

Each defense faces the attacks given in turn, each attack the samples that are left, and the strongest candidate of each
sample is judged on fresh draws; an attack that needs a handle which a defense doesn't offer is spared it. Fails where
anything is off: an error of the board, never a merit of a defense.

Cost in model calls: for each known-broken defense, and for the undefended model at each radius tried, every attack once
with a judgement for each and two more; the linear model's calls, two runs of every attack, are counted too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from assay.attack import Attack
from assay.card import Card
from assay.checks.ablations import Bare
from assay.checks.evidence import Evidence, Scores, whole_box
from assay.checks.subject import Subject
from assay.defense import Defense
from assay.errors import ThreatViolation
from assay.finding import Finding
from assay.noise import Noise
from assay.target import Target
from assay.threat import Norm, ThreatModel

SHARE, LEFT = 0.5, 0.15
"""A known-broken defense keeps less than this share of its clean accuracy, and less than this of all samples."""
UNDEFENDED = 0.05
"""The most that a radius may spare of the undefended model, for known-broken defenses to be measured there."""
TOLERANCE = 0.05
"""How much more than is true the attacks may leave of a linear model: an untargeted loss may miss the best rival."""
SLIVER = 1e-4
"""Leads of a rival that are smaller than this, in units of the largest lead, fall either way in float32."""
RIDGE = 1.0


class Linear(Defense):
    """`logits = W x + b` in the images' precision."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.card = Card(name="linear", title="Linear", summary="Ridge regression, whose robustness is known exactly.")
        self.n_classes = len(bias)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eval()

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """The logits; the noise is ignored."""
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return x.flatten(1) @ weight.T + bias


def fit_linear(x: Tensor, y: Tensor, n_classes: int) -> Linear:
    """Ridge regression of ±1 labels on images `(n, c, h, w)`, in its dual form: n may be far less than the pixels."""
    rows = torch.cat([x.double().flatten(1), x.new_ones(len(x), 1).double()], 1)
    wanted = one_hot(y, n_classes).double() - 1 / n_classes
    gram = rows @ rows.T + RIDGE * torch.eye(len(x), dtype=torch.float64, device=x.device)
    # Ten times the regression: its logits then differ by as much as a trained network's.
    weight = 10 * (torch.linalg.solve(gram, wanted).T @ rows)
    return Linear(weight[:, :-1].to(x.dtype), weight[:, -1].to(x.dtype))


def worst_leads(linear: Linear, x: Tensor, y: Tensor, norm: Norm, eps: float) -> Tensor:
    """The largest lead over the right class that each rival can take inside ball and box, `(n, k − 1)` float64."""
    weight, bias = linear.get_buffer("weight").double(), linear.get_buffer("bias").double()
    rivals = (~one_hot(y, len(bias)).bool()).nonzero()[:, 1].view(len(y), -1)
    slope, offset = weight[rivals] - weight[y][:, None], bias[rivals] - bias[y][:, None]
    centre = x.double().flatten(1)[:, None]
    if norm == "linf":
        low, high = (centre - eps).clamp(0, 1), (centre + eps).clamp(0, 1)
        return (torch.where(slope > 0, high, low) * slope).sum(2) + offset
    # δ = clip(a / λ, −x, 1 − x), λ the smallest for which it has length eps (or the corner of the box it points to).
    small = torch.full(slope.shape[:2], 1e-9, dtype=torch.float64, device=x.device)
    large = torch.full_like(small, 1e9)
    for _ in range(100):
        middle = (small * large).sqrt()
        step = torch.minimum(torch.maximum(slope / middle[..., None], -centre), 1 - centre)
        inside = torch.linalg.vector_norm(step, dim=2) <= eps
        small, large = torch.where(inside, small, middle), torch.where(inside, middle, large)
    step = torch.minimum(torch.maximum(slope / large[..., None], -centre), 1 - centre)
    return ((centre + step) * slope).sum(2) + offset


def check_board(
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    noise: Noise,
    attacks: Sequence[tuple[Attack, Mapping[str, Any]]],
    known_broken: Mapping[str, Defense],
    *,
    undefended: Defense | None = None,
    train: tuple[Tensor, Tensor] | None = None,
    n_draws: int = 20,
    ids: Sequence[int] | None = None,
) -> Finding:
    """The finding; its value is how far the linear model's accuracy lies from the truth, at worst.

    Args:
        threat: the board's.
        x, y, noise: a few of its images `(n, c, h, w)`, their labels, a stream each.
        attacks: the board's attacks with their options; a single one breaks no board of several defenses.
        known_broken: defenses by name.
        undefended: says at which radius they must fall, by default at the board's.
        train: images and labels that the linear model is fitted on, by default `x` and `y`.
        n_draws: answers a judgement takes of a stochastic defense.
        ids: the samples' ids, by default their places.
    """
    names = tuple(range(len(x))) if ids is None else tuple(ids)
    data: dict[str, Any] = {}
    faults: list[str] = []
    blamed = np.zeros(len(x), dtype=bool)
    targets: list[Target] = []

    def evidence(defense: Defense, faced: ThreatModel) -> Evidence:
        subject = Subject(defense, x, y, names, noise, faced, targets)
        return Evidence(subject, attacks[0][0], n_draws=n_draws if defense.card.traits.stochastic else 1)

    fatal = threat
    if undefended is not None and known_broken:
        widest = whole_box(threat.norm, x)
        while fatal.eps < widest:
            remains = float(_attacked(evidence(undefended, fatal), attacks).mean())
            data[f"undefended at {fatal.eps}"] = {"accuracy": remains}
            if remains <= UNDEFENDED:
                break
            fatal = replace(fatal, eps=min(2 * fatal.eps, widest))
    for name, defense in known_broken.items():
        seen = evidence(defense, fatal)
        clean, left = seen.unattacked(), _attacked(seen, attacks)
        data[f"{name} at {fatal.eps}"] = {"clean": float(clean.mean()), "accuracy": float(left.mean())}
        if left.mean() >= LEFT or left.mean() >= SHARE * clean.mean():
            faults.append(f"{name}, known to be broken, keeps {left.mean():.0%} of {clean.mean():.0%}")
            blamed |= left >= LEFT
    # Four classes at least, for losses that need so many; ten at most, for the closed form looks at each rival's every
    # pixel. It holds for any labels, so of more classes only the last digit is told apart.
    k = min(10, max([4, int(y.max()) + 1, *(defense.n_classes for defense in known_broken.values())]))
    fitted, labels = train or (x, y)
    y = y % k
    linear = fit_linear(fitted, labels % k, k)
    off = 0.0
    for eps in dict.fromkeys((threat.eps, _median_distance(linear, x, y, threat.norm))):
        left = _attacked(evidence(Bare(linear), replace(threat, eps=eps)), attacks)
        leads = worst_leads(linear, x, y, threat.norm, float(eps)).amax(1).cpu().numpy()
        sliver = SLIVER * max(1.0, float(np.abs(leads).max()))
        least, most = float((leads < -sliver).mean()), float((leads < sliver).mean())
        found = float(left.mean())
        data[f"linear at {eps}"] = {"accuracy": found, "exact": float((leads < 0).mean())}
        off = max(off, found - most, least - found)
        if found < least - 1e-9 or found > most + max(TOLERANCE, 1 / len(x)) + 1e-9:
            faults.append(f"a linear model keeps {found:.0%} at radius {eps}, where exactly {least:.0%} is true")
            blamed |= (left > 0) != (leads < 0)
    forward = sum(int(target.calls.forward.sum()) for target in targets)
    backward = sum(int(target.calls.backward.sum()) for target in targets)
    known = "Known-broken defenses fall, and t" if known_broken else "No known-broken defense has weights here; t"
    return Finding(
        check="calibration",
        value=off,
        threshold=TOLERANCE,
        status="fail" if faults else "pass",
        samples=tuple(sample for sample, bad in zip(names, blamed.tolist(), strict=True) if bad),
        message=(
            f"An error of the board: {'; '.join(faults)}. Repair its attacks or budgets before any row is believed."
            if faults
            else f"{known}he attacks leave of a linear model what its closed form says."
        ),
        data=data,
        forward=forward,
        backward=backward,
    )


def _attacked(evidence: Evidence, attacks: Sequence[tuple[Attack, Mapping[str, Any]]]) -> Scores:
    """The scores of each sample's strongest candidate, chosen on other draws than it is judged on."""
    subject = evidence.subject
    best, lowest = subject.x.clone(), evidence.unattacked().copy()
    for attack, options in attacks:
        left = np.flatnonzero(lowest > 0)
        if not len(left):
            break
        part = _rows(evidence, torch.from_numpy(left))
        try:
            x_adv = replace(part, attack=attack, options=options).candidates()
        except ThreatViolation:
            continue
        scores = part.judge(x_adv)
        lower = scores < lowest[left]
        best[torch.from_numpy(left[lower])] = x_adv[torch.from_numpy(lower)]
        lowest[left] = np.minimum(scores, lowest[left])
    return evidence.judge(best, subject.noise.child("final"))


def _rows(evidence: Evidence, rows: Tensor) -> Evidence:
    """The same for some of the images: what has fallen is not attacked again."""
    subject = evidence.subject
    noise = Noise(subject.noise.keys[rows], torch.arange(len(rows)))
    ids = [subject.ids[row] for row in rows.tolist()]
    kept = replace(subject, x=subject.x[rows], y=subject.y[rows], ids=ids, noise=noise)
    return replace(evidence, subject=kept, _known={})


def _median_distance(linear: Linear, x: Tensor, y: Tensor, norm: Norm) -> Fraction:
    """The median distance of rightly read images to the nearest decision boundary, the box aside; an exact fraction."""
    bare = worst_leads(linear, x, y, "linf", 0.0)
    weight = linear.get_buffer("weight").double()
    rivals = (~one_hot(y, len(weight)).bool()).nonzero()[:, 1].view(len(y), -1)
    slope = weight[rivals] - weight[y][:, None]
    dual = slope.abs().sum(2) if norm == "linf" else torch.linalg.vector_norm(slope, dim=2)
    distance = (-bare / dual.clamp_min(1e-12)).amin(1)
    right = distance[distance > 0]
    if not len(right):
        return Fraction(1, 100)
    return max(Fraction(1, 10_000), Fraction(float(right.median())).limit_denominator(10_000))
