"""The half-space, whose exact radius is the distance to its plane: sound certificates hold, broken ones are caught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from assay.bounds import ABSTAIN, bernstein_lower_bound, lower_bound, radius
from assay.budget import Budget
from assay.card import Card, Traits, Votes
from assay.certificate import Certificate, Certified, Counts, Smoothed, count_votes, noised, subject_of
from assay.certificates.smoothing import SMOOTHING, TWO_CLASS, SmoothingCertificate, chosen_class, fixed_counts
from assay.certificates.soft_smoothing import SOFT_SMOOTHING
from assay.certifying import PlannedCertificate, refuse_impossible_counts
from assay.defense import Defense
from assay.errors import CertificateError, InputError
from assay.noise import Noise
from assay.rules import CERTIFYING
from assay.target import Target

SIGMA = 0.25


class HalfSpace(Defense):
    """Class 1 where the first coordinate is above 1/2: the smoothed model's exact radius is the distance to the plane.

    Args:
        certificate: the card's; with `soft_smoothing` the scores are 1 and 0, so that means are shares.
        sigma: of the smoothing.
        votes: draws of an answer.
    """

    def __init__(self, certificate: str = "smoothing", sigma: float = SIGMA, votes: int = 1) -> None:
        super().__init__()
        how: Any = "probabilities" if certificate == "soft_smoothing" else "majority"
        self.card = Card(
            name="half-space", title="Half-space", summary="", traits=Traits(stochastic=True, certifies=True),
            handles=("certified",), votes=Votes(draws=votes, how=how), certificate=certificate,
        )  # fmt: skip
        self.n_classes = 2
        self.sigma = sigma

    def classify(self, noised_: Tensor, noise: Noise) -> Tensor:
        above = (noised_.flatten(1)[:, 0] > 0.5).to(noised_)
        return 200 * torch.stack([1 - above, above], 1)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return noised(self.sigma, self.classify)(x, noise)

    def certified(self) -> Smoothed:
        return Smoothed(self.sigma, self.classify)


def points(margins: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Images of one pixel at these distances from the plane, all of class 1 where the margin is positive."""
    x = torch.from_numpy(0.5 + margins).float().reshape(-1, 1, 1, 1)
    return x, torch.ones(len(x), dtype=torch.int64)


def certify(
    certificate: Certificate,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    radii: Sequence[float],
    budget: Budget,
    seed: int = 0,
) -> tuple[Certified, dict[str, NDArray[Any]], Target]:
    """Measured and derived, on rows numbered from 0."""
    target = Target(defense, len(x))
    counts = certificate.measure(target, x, y, Noise.from_seed(seed, len(x)), radii, budget)
    return certificate.derive(counts, certificate.knobs(defense.certified()), radii, budget), counts, target


def too_many(wrong: int, trials: int, alpha: float) -> bool:
    """Whether so many wrong certificates in so many trials refute an error probability of at most alpha."""
    return bool(stats.binom.sf(wrong - 1, trials, alpha) < 1e-4)


def share(margin: float | NDArray[np.float64], sigma: float = SIGMA) -> Any:
    """The probability of class 1 at a margin."""
    return special.ndtr(np.asarray(margin) / sigma)


class Broken(SmoothingCertificate):
    """What all broken certificates have in common: the counts of one that is sound."""

    name: ClassVar[str] = "broken"


class ReusedDraws(Broken):
    """Estimates the class's probability from the draws that chose the class."""

    def measure(
        self, target: Target, x: Tensor, y: Tensor, noise: Noise, radii: Sequence[float], budget: Budget
    ) -> dict[str, NDArray[Any]]:
        subject: Smoothed = subject_of(target, Smoothed)
        votes = count_votes(target, x, noise.child("selection"), budget.draws, noised(subject.sigma, subject.classify))
        empty = np.zeros((len(x), len(radii)), np.int64)
        return {"selection": votes, "votes": votes, "at_hits": empty, "at_draws": empty, "drawn": votes.sum(1)}


class SigmaOfTheImage(Broken):
    """Tries several noise levels and keeps the largest radius of each image."""

    levels: ClassVar[tuple[float, ...]] = (0.1, 0.15, 0.25, 0.4, 0.6)

    def measure(
        self, target: Target, x: Tensor, y: Tensor, noise: Noise, radii: Sequence[float], budget: Budget
    ) -> dict[str, NDArray[Any]]:
        subject: Smoothed = subject_of(target, Smoothed)
        hits = [
            count_votes(target, x, noise.child("level", i), budget.draws, noised(sigma, subject.classify))[:, 1]
            for i, sigma in enumerate(self.levels)
        ]
        drawn = np.full(len(x), budget.draws * len(self.levels))
        return {"selection": np.eye(2, dtype=np.int64)[y.numpy()], "hits": np.stack(hits, 1), "drawn": drawn}

    def derive(self, counts: Counts, knobs: Mapping[str, Any], radii: Sequence[float], budget: Budget) -> Certified:
        found = radius(lower_bound(counts["hits"], budget.draws, budget.alpha), np.asarray(self.levels)).max(1)
        return Certified(chosen_class(counts), found, found[:, None] > np.asarray(radii))


class MultipliedCounts(Broken):
    """Lets every draw stand for ten."""

    def derive(self, counts: Counts, knobs: Mapping[str, Any], radii: Sequence[float], budget: Budget) -> Certified:
        chosen = chosen_class(counts)
        hits, _, tried = fixed_counts(counts, chosen, budget)
        found = radius(lower_bound(10 * hits, 10 * budget.draws, budget.alpha), knobs["sigma"])
        found = np.where(tried, found, ABSTAIN)
        return Certified(chosen, found, found[:, None] > np.asarray(radii))


class RoundedRadii(Broken):
    """Rounds radii to two decimals before they are compared."""

    def derive(self, counts: Counts, knobs: Mapping[str, Any], radii: Sequence[float], budget: Budget) -> Certified:
        sound = super().derive(counts, knobs, radii, budget)
        found = np.round(sound.radius, 2)
        return Certified(sound.prediction, found, found[:, None] >= np.asarray(radii))


class DroppedAbstentions(Broken):
    """Leaves out the samples for which nothing is certified."""

    def measure(
        self, target: Target, x: Tensor, y: Tensor, noise: Noise, radii: Sequence[float], budget: Budget
    ) -> dict[str, NDArray[Any]]:
        counts = super().measure(target, x, y, noise, radii, budget)
        found = self.derive(counts, {"sigma": SIGMA}, radii, budget)
        kept = found.radius > 0
        return {name: value[kept] for name, value in counts.items()}


class MultipliedDraws(Broken):
    """Stores ten times the counts, and says that it made ten times the draws."""

    def measure(
        self, target: Target, x: Tensor, y: Tensor, noise: Noise, radii: Sequence[float], budget: Budget
    ) -> dict[str, NDArray[Any]]:
        counts = super().measure(target, x, y, noise, radii, budget)
        return {name: 10 * value for name, value in counts.items()}


class MultipliedSilently(MultipliedDraws):
    """The same, but is honest about its draws."""

    def measure(
        self, target: Target, x: Tensor, y: Tensor, noise: Noise, radii: Sequence[float], budget: Budget
    ) -> dict[str, NDArray[Any]]:
        counts = super().measure(target, x, y, noise, radii, budget)
        return {**counts, "drawn": counts["drawn"] // 10}


ALPHA = 0.1
"""Large, so that a certificate that is wrong twice as often as it may be is seen in 10,000 trials."""
TRIALS = 10_000
sound = pytest.mark.parametrize("certificate", [SMOOTHING, TWO_CLASS, SOFT_SMOOTHING], ids=lambda c: c.name)


def overclaims(certificate: Certificate, margin: float, budget: Budget, radii: list[float]) -> tuple[int, int]:
    """Of `TRIALS` certificates of one point: radii above its margin, and claims at the margin itself or beyond."""
    defense = HalfSpace("soft_smoothing" if certificate is SOFT_SMOOTHING else "smoothing")
    x, y = points(np.full(TRIALS, margin))
    # The margin as it is in float32, where the image lies.
    exact = float(x[0]) - 0.5
    derived, _, _ = certify(certificate, defense, x, y, radii, budget)
    right = derived.prediction == 1
    wrong_claims = derived.claims[:, [r >= exact for r in radii]].any(1)
    return int((right & (derived.radius > exact)).sum()), int((right & wrong_claims).sum())


@sound
@pytest.mark.parametrize("margin", [0.02, 0.1, 0.25])
def test_ten_thousand_certificates_claim_too_much_with_probability_alpha_at_most(
    certificate: Certificate, margin: float
) -> None:
    budget = Budget(draws=100, cap=400, selection=10, batch=20, alpha=ALPHA)
    fixed, claimed = overclaims(certificate, margin, budget, [margin + 1e-6, margin + 0.1])
    assert not too_many(fixed, TRIALS, ALPHA), f"{fixed} of {TRIALS}"
    assert not too_many(claimed, TRIALS, ALPHA), f"{claimed} of {TRIALS}"


@pytest.mark.parametrize("certificate", [SMOOTHING, TWO_CLASS], ids=lambda c: c.name)
def test_a_bound_from_votes_uses_its_alpha_up(certificate: Certificate) -> None:
    """A Clopper–Pearson bound errs nearly as often as it may: one that never did would give radius away."""
    budget = Budget(draws=1_000, cap=1_000, selection=10, batch=1_000, alpha=ALPHA)
    fixed, _ = overclaims(certificate, 0.2, budget, [0.2])
    level = ALPHA if certificate is SMOOTHING else ALPHA / 2
    assert 0.6 * level < fixed / TRIALS <= 1.15 * ALPHA


@sound
def test_the_exact_radius_is_reached_within_the_bound_of_the_draws(certificate: Certificate) -> None:
    budget = Budget(draws=4_000, cap=4_000, selection=50)
    defense = HalfSpace("soft_smoothing" if certificate is SOFT_SMOOTHING else "smoothing")
    margins = np.linspace(0.1, 0.5, 200)
    x, y = points(margins)
    derived, _, _ = certify(certificate, defense, x, y, [0.25], budget)
    # What one in a thousand binomial draws would give at the least.
    unlucky = stats.binom.ppf(0.001, 4_000, share(margins)).astype(np.int64)
    if certificate is SOFT_SMOOTHING:
        bound = bernstein_lower_bound(unlucky, unlucky, 4_000, budget.alpha)
    else:
        bound = lower_bound(unlucky, 4_000, budget.alpha if certificate is SMOOTHING else budget.alpha / 2)
    assert (derived.radius >= radius(bound, SIGMA) - 1e-9).mean() >= 0.99
    assert (derived.radius <= margins).all()


def test_claims_at_the_boards_radii_need_few_draws() -> None:
    margins = np.linspace(-0.2, 1.0, 400)
    x, y = points(margins)
    budget = Budget(draws=1, cap=20_000, selection=50, batch=50)
    derived, counts, target = certify(SMOOTHING, HalfSpace(), x, y, [0.25, 0.5], budget)
    right = derived.prediction == 1
    assert not (derived.claims & (margins[:, None] <= [0.25, 0.5])).any()
    assert (derived.claims[:, 0] & right)[margins > 0.3].all()
    assert (derived.claims[:, 1] & right)[margins > 0.6].all()
    # Whoever is far from a radius, on either side, is decided soon.
    assert np.median(counts["drawn"]) < 1_000
    np.testing.assert_array_equal(counts["drawn"], target.calls.forward.numpy())


def test_no_draw_goes_to_a_sample_whose_class_is_wrong() -> None:
    x, y = points(np.array([0.3, -0.3]))
    budget = Budget(draws=100, cap=100, selection=20)
    derived, counts, _ = certify(SMOOTHING, HalfSpace(), x, y, [0.1], budget)
    assert derived.prediction.tolist() == [1, 0]
    assert counts["drawn"].tolist() == [120, 20]
    assert derived.radius[1] == ABSTAIN
    assert not derived.claims[1].any()


@pytest.mark.parametrize(
    ("broken", "margin", "radii"),
    [
        (ReusedDraws(), 0.0, [0.0]),
        (SigmaOfTheImage(), 0.1, [0.1]),
        (MultipliedCounts(), 0.1, [0.1]),
        # The image lies a little inside 1/4, where no radius may be certified at 1/4.
        (RoundedRadii(), 0.247, [0.25]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Certificate) else "",
)
def test_a_certificate_that_is_wrong_too_often_is_caught(
    broken: Certificate, margin: float, radii: list[float]
) -> None:
    # Selecting from the draws that are counted doubles the error of a model whose two classes tie.
    draws = 20_000 if isinstance(broken, RoundedRadii) else 100
    budget = Budget(draws=draws, cap=draws, selection=10, alpha=ALPHA)
    trials = 2_000 if isinstance(broken, RoundedRadii) else TRIALS
    x, _ = points(np.full(trials, margin))
    defense = HalfSpace()
    target = Target(defense, trials)
    # With the labels that each copy's own draws choose: the certificate is about the class that it names.
    y = torch.ones(trials, dtype=torch.int64)
    counts = broken.measure(target, x, y, Noise.from_seed(0, trials), radii, budget)
    derived = broken.derive(counts, {"sigma": SIGMA}, radii, budget)
    exact = float(x[0]) - 0.5
    wrong = (derived.radius > exact) | derived.claims[:, 0] & (radii[0] >= exact)
    if margin == 0:
        # Both classes have probability 1/2: any radius for either is wrong.
        wrong = derived.radius > 0
    assert too_many(int(wrong.sum()), trials, ALPHA), f"{wrong.sum()} of {trials} were not enough to tell"
    # And the sound one, on the same images, is not caught.
    counts = SMOOTHING.measure(Target(defense, trials), x, y, Noise.from_seed(0, trials), radii, budget)
    derived = SMOOTHING.derive(counts, {"sigma": SIGMA}, radii, budget)
    wrong = (derived.radius > exact) | derived.claims[:, 0] & (radii[0] >= exact)
    if margin == 0:
        wrong = derived.radius > 0
    assert not too_many(int(wrong.sum()), trials, ALPHA)


def planned(certificate: Certificate, budget: Budget) -> PlannedCertificate:
    rule = replace(CERTIFYING["quick"], budget=budget)
    return PlannedCertificate(certificate, certificate.name, {"sigma": SIGMA}, ("1/4",), rule, None, {})


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (DroppedAbstentions(), "of 50 samples: one that abstains has a row too"),
        (MultipliedDraws(), "counts are of draws that were made"),
        (MultipliedSilently(), "a draw is counted once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Certificate) else "",
)
def test_counts_that_no_measurement_has_are_refused(broken: Certificate, says: str) -> None:
    budget = Budget(draws=100, cap=100, selection=20)
    x, y = points(np.linspace(-0.1, 0.4, 50))
    target = Target(HalfSpace(), 50)
    counts = broken.measure(target, x, y, Noise.from_seed(0, 50), [0.25], budget)
    with pytest.raises(CertificateError, match=says):
        refuse_impossible_counts(planned(broken, budget), counts, target)
    target = Target(HalfSpace(), 50)
    refuse_impossible_counts(
        planned(SMOOTHING, budget), SMOOTHING.measure(target, x, y, Noise.from_seed(0, 50), [0.25], budget), target
    )


def test_counts_of_another_number_of_draws_are_refused() -> None:
    """A number of draws that follows the data has no fixed-number bound."""
    budget = Budget(draws=100, cap=100, selection=20)
    x, y = points(np.linspace(0.1, 0.4, 5))
    _, counts, _ = certify(SMOOTHING, HalfSpace(), x, y, [0.25], budget)
    counts["votes"][2] //= 2
    with pytest.raises(InputError, match="expected 100 estimation draws"):
        SMOOTHING.derive(counts, {"sigma": SIGMA}, [0.25], budget)


def test_selection_estimation_and_judgement_use_draws_of_their_own() -> None:
    seen: list[torch.Tensor] = []

    class Watched(HalfSpace):
        def classify(self, noised_: torch.Tensor, noise: Noise) -> torch.Tensor:
            seen.append(noised_.flatten())
            return super().classify(noised_, noise)

    x, y = points(np.linspace(0.1, 0.4, 5))
    budget = Budget(draws=200, cap=400, selection=50, judging=30, batch=50)
    certify(SMOOTHING, Watched(), x, y, [0.25], budget)
    SMOOTHING.judge(Target(Watched(), 5), x, Noise.from_seed(0, 5).child("judge"), budget)
    every = torch.cat(seen)
    # 24 bits of a normal value repeat by chance; whole streams would repeat hundreds.
    assert len(every) - len(every.unique()) < 5


def test_the_floor_is_the_true_probability_or_less_at_every_distance() -> None:
    margins = np.linspace(0.05, 0.5, 100)
    x, y = points(margins)
    budget = Budget(draws=500, cap=2_000, selection=50)
    derived, counts, _ = certify(SMOOTHING, HalfSpace(), x, y, [0.1, 0.25], budget)
    distance = np.linspace(0, 1, 21)[None].repeat(100, 0)
    floor = SMOOTHING.floor(counts, {"sigma": SIGMA}, [0.1, 0.25], budget, distance)
    assert floor.shape == distance.shape
    assert (floor <= share(margins[:, None] - distance)).all()
    # And no less than what a claim says: more than a half inside its radius.
    inside = derived.claims[:, 1, None] & (distance < 0.25) & (derived.prediction == 1)[:, None]
    assert inside.any()
    assert (floor[inside] > 0.5).all()


@sound
def test_a_judgement_names_the_leader_and_is_sure_only_far_from_the_plane(certificate: Certificate) -> None:
    x, _ = points(np.array([-0.4, -0.001, 0.001, 0.4]))
    defense = HalfSpace("soft_smoothing" if certificate is SOFT_SMOOTHING else "smoothing")
    found = certificate.judge(Target(defense, 4), x, Noise.from_seed(0, 4), Budget(draws=1, cap=1, judging=500))
    assert found.answer[[0, 3]].tolist() == [0, 1]
    assert found.sure.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "sigma", [torch.full((3,), 0.25), lambda x: 0.25, "0.25", True], ids=["a tensor", "a function", "text", "a flag"]
)
def test_a_noise_level_of_the_image_is_refused_with_the_reason(sigma: object) -> None:
    with pytest.raises(InputError, match=r"one number for all images.*selected_smoothing.*elastic_smoothing"):
        Smoothed(sigma, lambda noised, noise: noised)  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_a_noise_level_that_is_none_is_refused(sigma: float) -> None:
    with pytest.raises(InputError, match="positive finite"):
        Smoothed(sigma, lambda noised, noise: noised)


def test_nothing_is_certified_of_no_samples() -> None:
    x, y = points(np.zeros(0))
    for certificate in (SMOOTHING, TWO_CLASS, SOFT_SMOOTHING):
        defense = HalfSpace("soft_smoothing" if certificate is SOFT_SMOOTHING else "smoothing")
        derived, _, _ = certify(certificate, defense, x, y, [0.25], Budget(draws=10, cap=10))
        assert derived.radius.shape == (0,)
        assert certificate.judge(Target(defense, 0), x, Noise.from_seed(0, 0), Budget(draws=10, cap=10)).sure.shape == (
            0,
        )


class Spread(HalfSpace):
    """One class of thirteen has probability .4 whatever the image, the others share the rest: two-class radius .174."""

    def __init__(self) -> None:
        super().__init__("two_class_smoothing")
        self.n_classes = 13

    def classify(self, noised_: Tensor, noise: Noise) -> Tensor:
        draw = noise.uniform("class", shape=(), like=noised_)
        chosen = torch.where(draw < 0.4, torch.zeros_like(draw), 1 + (draw - 0.4) / 0.05).long().clamp_max(12)
        return torch.nn.functional.one_hot(chosen, 13).to(noised_)


def test_the_floor_of_two_classes_does_not_follow_from_their_radius() -> None:
    """Certified at r, two classes bound the lead at r, not the probability of the first: here it is .4 throughout."""
    x, _ = points(np.full(100, 0.3))
    y = torch.zeros(100, dtype=torch.int64)
    budget = Budget(draws=10_000, cap=10_000, selection=100)
    derived, counts, _ = certify(TWO_CLASS, Spread(), x, y, [0.05, 0.1], budget)
    assert derived.claims.all()
    floor = TWO_CLASS.floor(counts, {"sigma": SIGMA}, [0.05, 0.1], budget, np.zeros((100, 1)))
    assert (floor <= 0.4).all()
