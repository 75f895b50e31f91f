"""Every registered certificate, and every registered defense that certifies, by the same tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from assay import data
from assay.bounds import ABSTAIN
from assay.budget import Budget
from assay.certificate import Smoothed, count_votes, noised
from assay.certificates.elastic_smoothing import ElasticSmoothing, elastic_noised
from assay.certification import rederive
from assay.certifying import check_card
from assay.defense import Defense
from assay.evaluation import execute
from assay.noise import Noise
from assay.prepare import prepare
from assay.registry import CERTIFICATES, DEFENSES
from assay.target import Target

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    **{name: (name, {}) for name in DEFENSES if DEFENSES[name].card.certificate},
    "smoothing, soft": ("smoothing", {"soft": "true"}),
    "diffusion_classifier, bounded": ("diffusion_classifier", {"bound": "1", "lowest": "1"}),
    "smoothing, two classes": ("smoothing", {}),
    "smoothing, elastic": ("smoothing", {}),
    "diffusion_classifier, bounded, by Lipschitz": ("diffusion_classifier", {"bound": "1", "lowest": "1"}),
}
"""Defenses that certify, some with options, and some under a certificate that no registered defense names."""
OTHERS = {
    "smoothing, two classes": "two_class_smoothing",
    "smoothing, elastic": "elastic_smoothing",
    "diffusion_classifier, bounded, by Lipschitz": "diffusion_lipschitz",
}
RHO = 0.1
RADII = [0.05, 0.25, 0.5]
BUDGET = Budget(draws=120, cap=240, selection=40, judging=60)
every = pytest.mark.parametrize("variant", sorted(VARIANTS))


class Built(dict[str, Defense]):
    """Each variant, built when it is asked for first."""

    def __missing__(self, variant: str) -> Defense:
        name, options = VARIANTS[variant]
        defense = DEFENSES[name].build("digits", options=options)
        if variant in OTHERS:
            defense.card = defense.card.model_copy(update={"certificate": OTHERS[variant]})
        if OTHERS.get(variant) == "elastic_smoothing":
            subject = defense.certified()
            assert isinstance(subject, Smoothed)
            elastic = ElasticSmoothing(brighter_is_noisier, RHO, 64, subject.classify)
            defense.certified = lambda: elastic  # type: ignore[method-assign]
            defense.draw = elastic_noised(elastic)  # type: ignore[method-assign]
        self[variant] = defense
        return defense


def brighter_is_noisier(x: torch.Tensor) -> torch.Tensor:
    """ln σ rises with the mean pixel, whose slope is 1/8 on 64 pixels: by `RHO` a unit at most."""
    return 0.25 * (8 * RHO * (x.flatten(1).mean(1) - 0.3)).exp()


@pytest.fixture(scope="module")
def built() -> dict[str, Defense]:
    return Built()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return data.load("digits", data.board_ids("digits")[:6])


def measured(defense: Defense, x: torch.Tensor, y: torch.Tensor, noise: Noise) -> tuple[dict[str, Any], Target]:
    target = Target(defense, len(x))
    return CERTIFICATES[defense.card.certificate].measure(target, x, y, noise, RADII, BUDGET), target


@pytest.mark.parametrize("name", sorted(CERTIFICATES))
def test_a_certificate_says_what_it_is(name: str) -> None:
    certificate = CERTIFICATES[name]
    assert certificate.name == name
    assert certificate.summary.endswith(".")
    assert certificate.source


def test_every_certificate_has_a_model_here() -> None:
    built = Built()
    assert {built[variant].card.certificate for variant in VARIANTS} == set(CERTIFICATES)


def test_every_procedure_in_the_folder_is_registered() -> None:
    folder = Path(__file__).parents[1] / "bench" / "certificates"
    modules = {type(CERTIFICATES[name]).__module__.rpartition(".")[2] for name in CERTIFICATES}
    # What a certificate stands on, too long for its own file.
    helpers = {"__init__", "layers", "error_margins"}
    assert modules == {path.stem for path in folder.glob("*.py")} - helpers


@every
def test_card_handle_and_certificate_fit(variant: str, built: dict[str, Defense]) -> None:
    defense = built[variant]
    certificate = CERTIFICATES[defense.card.certificate]
    check_card(defense.card, certificate)
    knobs = certificate.knobs(defense.certified())
    # What is stored in a record is strict JSON.
    assert json.loads(json.dumps(knobs, allow_nan=False)) == knobs


@every
def test_counts_have_a_row_a_sample_and_no_more_than_the_calls(
    variant: str, built: dict[str, Defense], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    counts, target = measured(built[variant], *batch, Noise.from_seed(0, 6))
    assert {len(value) for value in counts.values()} == {6}
    assert (counts["drawn"] <= target.calls.forward.numpy()).all()
    assert (counts["drawn"] > 0).all()
    assert not target.calls.backward.any()


@every
def test_the_same_noise_gives_the_same_counts_whatever_the_other_rows(
    variant: str, built: dict[str, Defense], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    noise = Noise.from_seed(0, 6)
    whole, _ = measured(built[variant], x, y, noise)
    again, _ = measured(built[variant], x, y, noise)
    rows = Noise(noise.keys[[1, 4]], torch.arange(2))
    part, _ = measured(built[variant], x[[1, 4]], y[[1, 4]], rows)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
        if value.dtype.kind in "iu":
            # Larger batches may round a rare tie between classes the other way.
            assert np.abs(value[[1, 4]] - part[name]).max() <= 1, name
        else:
            np.testing.assert_allclose(value[[1, 4]], part[name], rtol=1e-4, atol=1e-4, err_msg=name)


@every
def test_radii_claims_and_floors_agree(
    variant: str, built: dict[str, Defense], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    certificate = CERTIFICATES[built[variant].card.certificate]
    knobs = certificate.knobs(built[variant].certified())
    counts, _ = measured(built[variant], x, y, Noise.from_seed(0, 6))
    derived = certificate.derive(counts, knobs, RADII, BUDGET)
    assert derived.prediction.dtype == np.int64
    assert derived.radius.shape == (6,)
    assert derived.claims.shape == (6, 3)
    assert ((derived.radius > 0) | (derived.radius == ABSTAIN)).all()
    # A larger radius is claimed only where the smaller ones are.
    assert (np.diff(derived.claims.astype(int), axis=1) <= 0).all()
    distance = np.tile(np.linspace(0, 2, 9), (6, 1))
    floor = certificate.floor(counts, knobs, RADII, BUDGET, distance)
    assert floor.shape == distance.shape
    assert ((floor >= 0) & (floor <= 1)).all()
    assert (np.diff(floor, axis=1) <= 1e-12).all()


@every
def test_no_sample_is_certified_under_another_label(
    variant: str, built: dict[str, Defense], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    defense = built[variant]
    certificate = CERTIFICATES[defense.card.certificate]
    counts, _ = measured(defense, x, (y + 1) % 10, Noise.from_seed(0, 6))
    derived = certificate.derive(counts, certificate.knobs(defense.certified()), RADII, BUDGET)
    wrong = derived.prediction != ((y + 1) % 10).numpy()
    assert wrong.all()


@every
def test_the_judgement_of_a_clean_image_is_the_label_mostly(
    variant: str, built: dict[str, Defense], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    certificate = CERTIFICATES[built[variant].card.certificate]
    found = certificate.judge(Target(built[variant], 6), x, Noise.from_seed(1, 6), BUDGET)
    assert (found.answer == y.numpy()).sum() >= 5
    assert found.answer.shape == found.sure.shape == (6,)


@pytest.mark.parametrize(
    "variant",
    sorted(v for v, (n, _) in VARIANTS.items() if v not in OTHERS and DEFENSES[n].card.certificate == "smoothing"),
)
def test_what_is_certified_is_what_is_drawn(
    variant: str, built: dict[str, Defense], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The votes of a draw, and of the base classifier under the certificate's noise, have one distribution."""
    x, _ = batch
    defense = built[variant]
    subject = defense.certified()
    assert isinstance(subject, Smoothed)
    draws = 800
    own = count_votes(Target(defense, 6), x, Noise.from_seed(2, 6), draws, defense.draw)
    made = count_votes(Target(defense, 6), x, Noise.from_seed(3, 6), draws, noised(subject.sigma, subject.classify))
    for row in range(6):
        both = np.stack([own[row], made[row]])
        both = both[:, both.sum(0) > 0]
        if both.shape[1] > 1:
            assert stats.chi2_contingency(both).pvalue > 1e-4, (row, both)


@pytest.mark.slow
@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize("variant", sorted(v for v in VARIANTS if v not in OTHERS))
def test_a_whole_run_certifies_and_no_attack_refutes_it(variant: str, tmp_path: Path) -> None:
    name, options = VARIANTS[variant]
    prepared = prepare(name, "digits-l2", n=4, options=options)
    # Four images say nothing of an attack's health, which is asked about elsewhere.
    record = execute(replace(prepared, job=replace(prepared.job, health=None)), tmp_path / "run")
    assert record.verdict == "verified"
    assert record.certification is not None
    assert record.certification.average_radius > 0
    for result in record.certification.radii.values():
        assert result.refuted == 0
        assert result.attacked is not None
        assert result.value <= result.attacked.value
    assert next(finding for finding in record.findings if finding.check == "contradiction").status == "pass"
    rederive(record, tmp_path / "run")
