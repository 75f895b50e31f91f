"""Counts to certified accuracies: what a record says of the certified half, and what contradicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from assay.bounds import dataset_confidence, floor_radius
from assay.budget import Budget
from assay.certificate import Certified
from assay.certifying import CERTIFY, PlannedCertificate, answers_are_certified, counts_in, stood, votes_each
from assay.checks.contradiction import contradiction
from assay.errors import IntegrityError
from assay.finding import Finding
from assay.job import CLEAN, Job
from assay.perturbation import MASKED, masked, unmasked
from assay.record import COUNTS, Certification, Estimate, RadiusResult, Record, Spending
from assay.registry import CERTIFICATES
from assay.rundir import Arrays
from assay.statistics import mean_interval
from assay.threat import parse_eps

_DIGITS = 4


def estimate(scores: NDArray[np.float64]) -> Estimate:
    """The mean of scores in [0, 1], with its interval."""
    low, high = mean_interval(scores.tolist())
    return Estimate(value=float(scores.mean()), n=len(scores), low=low, high=high)


@dataclass(frozen=True)
class Half:
    """What follows from the arrays of a certified half, with the attacks' part in it.

    Attributes:
        derived: from the counts alone.
        right: `(n,)`, whose class the certificate has right.
        left: `(n, radii)`, not broken by an attack at the radius or a smaller one; None where nothing was attacked.
        refuted: `(n, radii)`, certified there and broken.
        radius: `(n,)`, 0 where the class is wrong, nothing is certified, or what is was broken beyond doubt inside.
    """

    derived: Certified
    right: NDArray[np.bool_]
    left: NDArray[np.bool_] | None
    refuted: NDArray[np.bool_]
    radius: NDArray[np.float64]

    @property
    def certified(self) -> NDArray[np.bool_]:
        """`(n, radii)`: right, claimed and not refuted."""
        return np.asarray(self.right[:, None] & self.derived.claims & ~self.refuted)


def half_of(planned: PlannedCertificate, arrays: Mapping[str, Any]) -> Half:
    """The certified half, from a shard's arrays or from all of them joined."""
    derived = planned.derive(arrays)
    right = np.asarray(derived.prediction == arrays["label"])
    broken_at = _broken_at(planned, arrays)
    standing = stood(planned, arrays)
    left = None
    refuted = np.zeros_like(derived.claims)
    if standing:
        left = np.stack(list(standing.values()), 1) & ~(broken_at[:, None] <= np.asarray(planned.values))
        refuted = right[:, None] & derived.claims & ~left
    holds = right & (derived.radius > 0) & ~(broken_at <= derived.radius)
    return Half(derived, right, left, refuted, np.where(holds, derived.radius, 0.0))


def _broken_at(planned: PlannedCertificate, arrays: Mapping[str, Any]) -> NDArray[np.float64]:
    """How near lies what breaks a sample beyond doubt, `(n,)`; infinite where nothing does.

    By the certificate's own judgement at its radii; and, where an answer of the defense is the certified model's
    most of the time, by the harness's scores, in which no certificate has a say: wrong in all draws, twice.
    """
    near = np.full(len(arrays["label"]), np.inf)
    for stage in planned.attacked:
        found = arrays[f"{stage}/broken"] & arrays[f"{stage}/sure"]
        near = np.where(found, np.minimum(near, arrays[f"{stage}/distance"]), near)
    if answers_are_certified(planned.certificate):
        for stage in _scored(arrays):
            found = arrays[f"{stage}/attempted"] & arrays[f"{stage}/certain"]
            near = np.where(found, np.minimum(near, arrays[f"{stage}/distance"]), near)
    return near


def _scored(arrays: Mapping[str, Any]) -> list[str]:
    """The stages whose candidates were scored by fresh votes."""
    # A certificate may call a count of its own hits: `certify/count/hits`.
    return [name.removesuffix("/hits") for name in arrays if name.endswith("/hits") and name.count("/") == 1]


def certification(planned: PlannedCertificate, arrays: Mapping[str, Any]) -> Certification:
    """All certified numbers of a run, derived from its counts."""
    half, budget = half_of(planned, arrays), planned.rule.budget
    n, sure = len(half.right), planned.certificate.deterministic
    radii = {}
    for number, text in enumerate(planned.radii):
        certified = half.certified[:, number]
        radii[text] = RadiusResult(
            **estimate(certified.astype(np.float64)).model_dump(),
            confident=int(certified.sum() if sure else dataset_confidence(int(certified.sum()), n, budget.alpha)),
            refuted=int(half.refuted[:, number].sum()),
            attacked=estimate(half.left[:, number].astype(np.float64)) if half.left is not None else None,
        )
    right, found = half.right, half.radius
    stages = [CERTIFY, *planned.attacked]
    cost = {key: sum(arrays[f"{stage}/{key}"].sum() for stage in stages) for key in ("forward", "backward", "seconds")}
    return Certification(
        certificate=planned.name,
        source_sha256=planned.source_sha256,
        knobs=dict(planned.knobs),
        budget=_spending(planned),
        radii=radii,
        right=int(right.sum()),
        abstained=int((right & (found == 0)).sum()),
        average_radius=float(found.mean()),
        curve=tuple(floor_radius(np.sort(found[found > 0])[::-1], _DIGITS).tolist()),
        attack=planned.attack.name if planned.attack else "",
        options=dict(planned.options) if planned.attack else {},
        drawn=int(counts_in(arrays)["drawn"].sum()),
        forward=int(cost["forward"]),
        backward=int(cost["backward"]),
        seconds=round(float(cost["seconds"]), 3),
    )


def _spending(planned: PlannedCertificate) -> Spending:
    """The budget, without what the certificate has no use for."""
    given = asdict(planned.rule.budget)
    if not planned.certificate.sequential:
        given["cap"] = None
    if planned.certificate.deterministic:
        given |= {"alpha": 0.0, "draws": 1, "selection": 0, "judging": 1}
    return Spending(**given)


def contradictions(job: Job, arrays: Mapping[str, Any]) -> Finding:
    """What every attack's candidates say against the certificate; see `assay.checks.contradiction`."""
    planned = job.certificate
    assert planned is not None
    half, budget, stages = half_of(planned, arrays), planned.rule.budget, _scored(arrays)
    counts, card = counts_in(arrays), job.defense.card
    draws = job.board.draws if card.traits.stochastic else 1
    votes = votes_each(card.votes, draws)

    def column(key: str) -> NDArray[Any]:
        return np.stack([arrays[f"{stage}/{key}"] for stage in stages], 1)

    floor = planned.certificate.floor(counts, planned.knobs, planned.values, budget, column("distance"))
    shares = planned.certificate.shares(counts, budget)
    return contradiction(
        arrays["id"],
        floor=np.where(half.right[:, None] & column("attempted"), floor, 0.0),
        hits=column("hits"),
        votes=votes,
        claimed=half.right[:, None] & half.derived.claims,
        refuted=half.refuted,
        clean=None if shares is None else (*shares, arrays[f"{CLEAN}/hits"]),
        alpha=budget.alpha,
        certain=planned.certificate.deterministic,
    )


def count_bytes(
    planned: PlannedCertificate, arrays: Mapping[str, Any], clean: NDArray[np.float32] | None = None
) -> bytes:
    """Raw counts and adversarial examples of the certified half, as safetensors.

    `id (n,)`, `label (n,)`, `count/NAME` with n rows each; per radius `RADIUS/attempted`, `/broken`, `/sure`,
    `/answer`, `/distance` `(n,)`, and `/broken_id`, `/broken_x` of the samples that fell. With the images `clean
    (n, c, h, w)`, which may not be passed on, `/broken_masked` and `/broken_digest` stand in place of `/broken_x`
    (`assay.perturbation`).
    """
    kept: Arrays = {"id": arrays["id"], "label": arrays["label"]}
    kept |= {f"count/{name}": value for name, value in counts_in(arrays).items()}
    for stage in planned.attacked:
        for key in ("attempted", "broken", "sure", "answer", "distance", "broken_id"):
            kept[f"{stage}/{key}"] = arrays[f"{stage}/{key}"]
        found = arrays[f"{stage}/broken_x"]
        shown = {"x": found} if clean is None else masked(found, clean[arrays[f"{stage}/broken"]])
        kept |= {f"{stage}/broken_{name}": value for name, value in shown.items()}
    content: bytes = save({name: np.ascontiguousarray(value) for name, value in sorted(kept.items())})
    return content


def broken_examples(
    kept: Mapping[str, NDArray[Any]], stage: str, clean: NDArray[np.float32], *, shareable: bool
) -> NDArray[np.float32]:
    """The examples `(m, c, h, w)` of a radius that `count_bytes` kept, of the images `clean`, which may be `shareable`.

    Raises:
        IntegrityError: for images that may not be passed on.
        InputError: for perturbations that are masked by other images.
    """
    if f"{stage}/broken_x" not in kept:
        return unmasked(clean, {name: kept[f"{stage}/broken_{name}"] for name in MASKED})
    if not shareable:
        raise IntegrityError(f"{COUNTS} holds images that may not be passed on; run it again with this version.")
    return np.array(kept[f"{stage}/broken_x"])


def rederive(record: Record, folder: Path) -> None:
    """Derives a record's certified numbers again from its stored counts; what it says has to follow from them.

    Certificates from outside the registry are left out: their code isn't executed for this.

    Raises:
        IntegrityError: where they don't, or the counts are missing.
    """
    stated = record.certification
    if stated is None or stated.certificate not in CERTIFICATES:
        return
    if COUNTS not in record.files:
        raise IntegrityError(f"{folder}: the record certifies but names no {COUNTS}.")
    kept = load_file(folder / COUNTS)
    counts = {name.removeprefix("count/"): value for name, value in kept.items() if name.startswith("count/")}
    spent = stated.budget
    budget = Budget(
        draws=spent.draws, cap=spent.cap or spent.draws, selection=max(1, spent.selection), judging=spent.judging,
        batch=spent.batch, alpha=spent.alpha or 0.5, beta=spent.beta,
    )  # fmt: skip
    radii = [float(parse_eps(text)) for text in stated.radii]
    try:
        found = CERTIFICATES[stated.certificate].derive(counts, stated.knobs, radii, budget)
    except (KeyError, ValueError, IndexError) as error:
        raise IntegrityError(f"{folder / COUNTS} doesn't hold what {stated.certificate} counts: {error}") from error
    right = found.prediction == kept["label"]
    claims = right[:, None] & found.claims
    for number, (text, result) in enumerate(stated.radii.items()):
        if claims[:, number].sum() != round(result.value * result.n) + result.refuted:
            raise IntegrityError(
                f"{folder}: the record says {result.value:.3f} certified at {text} and {result.refuted} refuted, but "
                f"its counts certify {claims[:, number].sum()} of {result.n}."
            )
    radius = np.where(right, np.maximum(found.radius, 0.0), 0.0)
    if stated.right != right.sum() or stated.average_radius > radius.mean() + 1e-9:
        raise IntegrityError(
            f"{folder}: the record says {stated.right} right and an average radius of {stated.average_radius:.4f}; "
            f"its counts say {right.sum()} and at most {radius.mean():.4f}."
        )
