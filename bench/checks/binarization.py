"""`binarization`: can the attack find an adversarial example that is known to exist?

Zimmermann, Brendel, Tramèr & Carlini 2022, "Increasing confidence in adversarial robustness evaluations" (arXiv
2206.13991). Around a clean image a new decision boundary is planted inside the ball: the defense's own features are
read out by a linear head of two classes, which puts the image and points strictly inside the ball (radius η · eps)
in class 0 and one point of the ball's edge in class 1. There is an adversarial example by construction. An attack
that misses it can't be believed where it finds none around the defense's own boundary; most of the defenses that were
broken after publication fail this test.

Features are what feeds the defense's last affine layer, found by execution, or its logits (`binary_head`). One edge
point against many inner ones, as in the paper's default: edge points surround the image, so that no linear head could
have several of them on its far side, while one can be separated from inner points in ten dimensions as in 512. The
head is linear discriminant analysis with a ridge, in closed form; of several edge points and ridges the pair that
separates best on inner points it hasn't seen is taken, for boundaries that chance can find test nothing. The threshold
lies close to the edge point. The binary margin at the image is the defense's own: logits that saturate an attack's
loss still do.

Of a stochastic defense a point's score is its mean over draws (the median where draws are counted as votes), with the
same noise at all points of a sample: what varies is the point. Where noise outweighs the ball, random edge points
hardly differ, so the edge point is steered to where scores rise, by their covariance with pixels (no gradient is
used). The height of image and edge point is then measured with fresh draws, and the threshold put `SIGMAS` standard
errors or more below the edge point. Success is class 1 in the answer of `JUDGED` fresh draws.

value: the success rate (ASR) over planted boundaries. Beside it in `data`, R-ASR: what random search would find with
as many points as the attack evaluated, 1 − (1 − p)^T, p the share of the ball's edge beyond the boundary. Boundaries
with R-ASR above `CHANCE` are left out. Flags: ASR below 90 % and more than one miss (the paper asks for about 95 %; an
attack with a true rate of 97 % is below 90 % of 32 boundaries once in sixty times), or fewer than `FEWEST` boundaries.

Cost in model calls, beside the attack on the boundaries: 641 forward a sample of a deterministic defense, and 3 a
boundary; 113 · d + 256 · 2 + 64 · 3 a sample of a stochastic one, d = 8 draws, or as many as it votes with, at most 32;
and a few to find the features and the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.checks.binary_head import BinaryDefense, with_own_features
from assay.checks.planting import DETERMINISTIC, plant, stochastic_points
from assay.checks.subject import Subject
from assay.defense import aggregate
from assay.finding import Finding
from assay.noise import Noise
from assay.norms import TOLERANCE, violation
from assay.target import Target
from assay.threat import ThreatModel

THRESHOLD = 0.9
"""Least success rate: PROTOCOL.md, section 4."""
CHANCE = 0.5
"""A boundary that random search finds more often than that is no test."""
FEWEST = 4
"""Boundaries below which no success rate is stated."""
BOUNDARIES = 32
"""As many as this in all where the defense is deterministic and its images few, at most `PER_SAMPLE` for one."""
PER_SAMPLE = 4
JUDGED = 64
"""Fresh draws of a stochastic defense for one judgement."""
TWO_CLASSES = {"dlr": "margin", "dlr-targeted": "margin", "margin-targeted": "margin", "ce-targeted": "ce"}
"""What losses that need a third class, or aim at one of several, become with two."""


def check(
    subject: Subject,
    attack: Callable[..., Tensor],
    options: Mapping[str, Any] | None = None,
    longer: Mapping[str, Any] | None = None,
) -> Finding:
    """Plants boundaries around the images and sends the attack for them; see the module.

    Args:
        attack: an `assay.attack.Attack`.
        options: its options; a loss that needs three classes, or aims at one of several, becomes one for two classes.
        longer: with these it is sent again for what it missed, where that would be an objection.
    """
    stochastic = subject.defense.card.traits.stochastic
    n = len(subject.x)
    per = 1 if stochastic else min(PER_SAMPLE, max(1, math.ceil(BOUNDARIES / max(1, n))))
    own = subject.target()
    noise = subject.noise.child("binarization")
    base = with_own_features(subject.defense, subject.x, noise.child("features"), own)
    points = stochastic_points(subject.votes) if stochastic else DETERMINISTIC
    planted = plant(subject, base, points, per, noise.child("plant"))

    binary = BinaryDefense(base, planted.heads).eval()
    x, still = subject.x.repeat_interleave(per, 0), torch.zeros(n * per, dtype=torch.int64, device=subject.x.device)
    rows = Noise(noise.draws(per).keys, torch.arange(n * per))
    target = Target(binary, n * per)
    subject.targets.append(target)
    sound = planted.sound & ~_found(target, x, rows.child("clean")) & _found(target, planted.edge, rows.child("edge"))

    success, tries = torch.zeros_like(sound), 0
    for settings in (options or {}, longer):
        left = (sound & ~success).nonzero()[:, 0] if tries else torch.arange(n * per, device=x.device)
        if settings is None or (tries and not _objects(int(success[sound].sum()), int(sound.sum()))):
            break
        before = target.calls.forward.clone(), target.calls.backward.clone()
        part, given = rows[left.cpu()], _for_two_classes(settings, subject.defense.n_classes)
        attacked = attack(target, x[left], still[left], subject.threat, part.child("attack"), **given)
        # An attack that asks for gradients looks at a point for each; what else it calls confirms and chooses.
        forward, backward = (
            int((now - then).max())
            for now, then in zip((target.calls.forward, target.calls.backward), before, strict=True)
        )
        tries += max(1, (backward or forward) // max(1, int(given.get("eot", 1)) if stochastic else 1))
        inside = _inside(subject.threat, attacked, x[left])
        final = torch.where(inside[:, None, None, None], attacked, x[left])
        success[left] = inside & _found(target, final, part.child("judge"))
    return _report(subject, success, sound, planted.chance, tries, per, base.n_classes)


def _objects(found: int, count: int) -> bool:
    """Whether so few of the boundaries were found that the attack can't be believed."""
    # One miss among fewer than ten is no rate.
    return found < THRESHOLD * count and count - found > 1


def _for_two_classes(options: Mapping[str, Any], n_classes: int) -> dict[str, Any]:
    """The options with a loss for two classes. A run that aimed at each of several classes has one to aim at: the
    others become restarts, or the attack would be tested with a fraction of its search."""
    settings = dict(options)
    loss = settings.get("loss")
    if loss in TWO_CLASSES:
        settings["loss"] = TWO_CLASSES[loss]
        targets = settings.pop("targets", None)
        if str(loss).endswith("targeted") and targets is not None:
            settings["restarts"] = settings.get("restarts", 1) * min(int(targets), n_classes - 1)
    return settings


def _inside(threat: ThreatModel, z: Tensor, x: Tensor) -> Tensor:
    """Which rows are finite and inside ball and box."""
    return violation(threat.norm, float(threat.eps), z, x) <= TOLERANCE


def _found(target: Target, z: Tensor, noise: Noise) -> Tensor:
    """Whether the binary defense's answer is class 1, `(m,)`: the only one, or that of `JUDGED` draws together."""
    draws = JUDGED if target.stochastic else 1
    logits = target.draws(z, noise, draws)
    votes = target.card.votes
    if draws == 1 or (votes.draws > 1 and votes.how != "majority"):
        answer = aggregate(logits, votes)
        return answer[:, 1] > answer[:, 0]
    return (logits[..., 1] > logits[..., 0]).double().mean(1) > 0.5


def _report(
    subject: Subject, success: Tensor, sound: Tensor, chance: Tensor, tries: int, per: int, features: int
) -> Finding:
    by_chance = 1 - (1 - chance.clamp(0, 1)) ** tries
    tested = sound & (by_chance <= CHANCE)
    count, found = int(tested.sum()), int((success & tested).sum())
    missed = tested & ~success
    random = float(by_chance[tested].mean()) if count else None
    data = {
        "planted": int(sound.sum()),
        "left_to_chance": int((sound & ~tested).sum()),
        "tested": count,
        "found": found,
        "random_success": random,
        "points": tries,
        "features": features,
    }
    if count < FEWEST:
        return Finding(
            check="binarization",
            threshold=THRESHOLD,
            status="flag",
            message=(
                f"Only {count} of {len(sound)} decision boundaries could be planted in the ball: the defense's outputs "
                "hardly tell the ball's edge from its inside, and whether the attack would find an adversarial example "
                "is untested. Look for outputs that are constant, rounded or drowned in noise."
            ),
            data=data,
        )
    rate, flagged = found / count, _objects(found, count)
    said = f"The attack finds {found} of {count} adversarial examples that were planted in the ball"
    return Finding(
        check="binarization",
        value=rate,
        threshold=THRESHOLD,
        status="flag" if flagged else "pass",
        samples=subject.ids_of(missed.unflatten(0, (-1, per)).any(1)) if flagged else (),
        message=(
            f"{said}: it can't be believed where it finds none. Look for gradients that vanish or mislead, and adapt "
            "the attack until it passes."
            if flagged
            else f"{said}; random search would find {100 * (random or 0.0):.0f} %."
        ),
        data=data,
    )
