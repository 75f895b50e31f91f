"""What the checks of an attack's health are given: a strong attack to run again, and how the board's attacks did.

Scores are expected: the share of right answers in draws that no attack has seen. Two runs of an attack that are
compared start from the same points and are judged on the same draws, so that what differs is what was changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.attack import Attack
from assay.checks.subject import Subject
from assay.defense import Defense
from assay.errors import AttackError
from assay.noise import Noise
from assay.norms import TOLERANCE, Ball, violation
from assay.statistics import mcnemar, paired_permutation
from assay.threat import Norm, ThreatModel

LEVEL = 0.01
"""The level of each one-sided paired test: about one healthy run in a hundred raises a check's alarm, at most."""
MATERIAL = 0.01
"""A smaller difference of accuracies is no alarm, however sure it is: it would change no row."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class StageScores:
    """One attack of the cascade on the whole board, n samples in the order of `ids`.

    Attributes:
        family: the attack's, as the protocol calls it.
        attempted: `(n,)`; an attack is spared the samples that an earlier one broke beyond doubt.
        score: `(n,)` in [0, 1], the expected score of its candidates; of no meaning where not attempted.
        certain: `(n,)`, broken beyond doubt by this attack.
        ids: the samples.
    """

    family: str
    attempted: NDArray[np.bool_]
    score: Scores
    certain: NDArray[np.bool_]
    ids: Sequence[int]


class Comparison(NamedTuple):
    """By how much the second of two rows of scores lies lower, on average, and how likely chance explains it."""

    difference: float
    p: float

    def significant(self, tests: int = 1, of: float = 1.0) -> bool:
        """Whether it counts as one of so many tests, made on a share `of` the samples that a row is about."""
        return self.difference * of >= MATERIAL and self.p < LEVEL / tests


def compare(first: Sequence[float] | Scores, second: Sequence[float] | Scores) -> Comparison:
    """The one-sided paired test that `second` is lower: exact McNemar for 0 and 1, a permutation test otherwise."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not a.size:
        return Comparison(0.0, 1.0)
    difference = float((a - b).mean())
    if difference <= 0:
        return Comparison(difference, 1.0)
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    # Both tests are symmetric: half of their two tails lies on the side that was seen.
    return Comparison(difference, (mcnemar if binary else paired_permutation)(a.tolist(), b.tolist()) / 2)


def whole_box(norm: Norm, x: Tensor) -> Fraction:
    """An exact radius from which any point of the box reaches every other: 1, or its diagonal rounded up."""
    return Fraction(1) if norm == "linf" else Fraction(max(1, ceil(sqrt(x[0].numel()))))


@dataclass(frozen=True)
class Evidence:
    """An attack that can be run again, and what the board's attacks achieved.

    Attributes:
        subject: the defense, a few of the board's images (8 to 64), the threat model and a stream of noise.
        attack: the run's strongest white-box attack, `options` its keyword arguments.
        n_draws: answers a judgement takes, 1 for a deterministic defense.
        stages: every attack of the cascade, in order, on the whole board.
        clean: `(n,)`, the board's expected scores without an attack.
        others: `(n,)` each, what the run's other white-box attacks left of the subject's images, where they were run.
    """

    subject: Subject
    attack: Attack
    options: Mapping[str, Any] = field(default_factory=dict)
    n_draws: int = 1
    stages: Mapping[str, StageScores] = field(default_factory=dict)
    clean: Scores = field(default_factory=lambda: np.zeros(0))
    others: tuple[Scores, ...] = ()
    _known: dict[Hashable, Scores] = field(default_factory=dict, repr=False, compare=False)

    def of(self, defense: Defense) -> Evidence:
        """The same attack, images and noise with another defense; its calls count as this examination's."""
        draws = self.n_draws if defense.card.traits.stochastic else 1
        return replace(self, subject=replace(self.subject, defense=defense), n_draws=draws, _known={})

    def judge(self, x_adv: Tensor, noise: Noise | None = None) -> Scores:
        """The share of right answers among `n_draws` fresh ones, `(n,)`; by default the same draws at each call."""
        streams = self.subject.noise.child("judge") if noise is None else noise
        answers = self.subject.target().answer(x_adv.clone(), streams, repeats=self.n_draws)
        right = answers.argmax(-1) == self.subject.y[:, None].to(answers.device)
        return np.asarray(right.double().mean(1).cpu().numpy())

    def unattacked(self) -> Scores:
        """The scores of the images as they are, `(n,)`."""
        return self._once("unattacked", lambda: self.judge(self.subject.x))

    def attacked(self, eps: Fraction | None = None, **changes: Any) -> Scores:
        """The scores under the attack, `(n,)`, at another radius or with other options where given.

        An option `alpha` grows with the radius. A run that was made before is not made again.

        Raises:
            AttackError: where a candidate leaves its budget.
        """
        threat = self.subject.threat if eps is None else replace(self.subject.threat, eps=eps)
        options = {**self._scaled(threat), **changes}
        key = (threat, tuple(sorted((name, repr(value)) for name, value in options.items())))
        return self._once(key, lambda: self.judge(self._candidates(threat, self.subject.x, options)))

    def unbounded(self) -> Scores:
        """The scores where any image may replace the sample's, `(n,)`.

        The attack begins near the sample, at a random point of the board's ball, where it can be told to: noise
        drawn from the whole box is misread by most classifiers, and would hide that no gradient leads anywhere.
        """
        images = self.subject.x
        threat = replace(self.subject.threat, eps=whole_box(self.subject.threat.norm, images))
        start = Ball(self.subject.threat, images).random_point(self.subject.noise.child("near"))
        options = self._scaled(threat)
        if self.accepts("random_start"):
            options["random_start"] = False
        return self._once("unbounded", lambda: self.judge(self._candidates(threat, start, options)))

    def accepts(self, option: str) -> bool:
        """Whether the attack names this option."""
        return option in inspect.signature(self.attack).parameters

    def option(self, name: str) -> Any:
        """An option's value, given or by default; None where there is no such option."""
        parameters = inspect.signature(self.attack).parameters
        return self.options.get(name, parameters[name].default if name in parameters else None)

    def length(self) -> tuple[str, int] | None:
        """The option that says how long the attack searches, and its value; None where there is none."""
        for name in ("steps", "queries"):
            value = self.option(name)
            if isinstance(value, int) and value > 0:
                return name, value
        return None

    def ids_of(self, mask: NDArray[np.bool_]) -> tuple[int, ...]:
        """The sample ids of the subject's images where `mask` holds."""
        return self.subject.ids_of(torch.from_numpy(np.asarray(mask)))

    def _scaled(self, threat: ThreatModel) -> dict[str, Any]:
        """The options at another radius: a given step length keeps its share of it."""
        options, own = dict(self.options), self.subject.threat.eps
        if options.get("alpha") is not None and own:
            options["alpha"] = options["alpha"] * float(threat.eps / own)
        return options

    def candidates(self) -> Tensor:
        """The attack's own candidates on the subject's images.

        Raises:
            AttackError: where one leaves its budget.
        """
        return self._candidates(self.subject.threat, self.subject.x, self.options)

    def _candidates(self, threat: ThreatModel, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        subject = self.subject
        noise = subject.noise.child("attack")
        x_adv = self.attack(subject.target(), x.clone(), subject.y.clone(), threat, noise, **options)
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
            came = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise AttackError(f"the attack returned {came}, expected candidates of shape {tuple(x.shape)}.")
        excess = violation(threat.norm, float(threat.eps), x_adv, x)
        if not bool((excess <= TOLERANCE).all()):
            raise AttackError(f"the attack left its budget ({threat}) or the box by {float(excess.max()):.3g}.")
        return x_adv.detach()

    @property
    def made(self) -> bool:
        """Whether any run was made."""
        return bool(self._known)

    def _once(self, key: Hashable, run: Callable[[], Scores]) -> Scores:
        if key not in self._known:
            self._known[key] = run()
        return self._known[key]


def listed(scores: Scores) -> list[float]:
    """Scores as plain JSON."""
    return [round(float(score), 6) for score in scores]
