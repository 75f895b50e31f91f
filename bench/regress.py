"""A record held against a baseline of the same samples: what fell, whether that can be chance, what could be seen.

Only samples on which the two records differ say anything. A defense whose scores are all 0 or 1 gets McNemar's exact
test, one whose scores are expectations over draws a paired permutation test; both one-sided, for a drop. An unchanged
defense under another seed falls and rises alike, so it is reported with probability `alpha` at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from assay.digest import ids_digest
from assay.errors import InputError, IntegrityError
from assay.power import detectable_flips, detectable_shift, require_samples
from assay.record import SAMPLES, Record
from assay.regression import NAMES, Change, Comparison, Regression, Side, What
from assay.statistics import mcnemar, paired_permutation

ALPHA = 0.01
"""How often an unchanged defense under another seed may be called fallen, over all comparisons of one call together.

A guard is run at every change, so 0.05 would cry wolf once in twenty; 0.001 asks for eleven fallen samples where eight
do, and would miss drops that matter on 200 samples. With the baseline's seed on the same hardware nothing differs at
all, whatever `alpha`."""
_CLEAN, _FINAL = "clean", "final"
_TOLERANCE = 1e-9


def compare(baseline: Record, candidate: Record, *, n: int | None = None, alpha: float = ALPHA) -> Regression:
    """Compares two records sample by sample; both were read from disk, so that their sample tables can be.

    Args:
        n: only the first so many of the baseline's samples. Where the candidate holds fewer of them, only those.

    Raises:
        InputError: for records that say nothing of each other, with the reasons; for fewer samples than could show
            any drop at `alpha`.
        IntegrityError: for a sample table that isn't the record's.
    """
    if reasons := differences(baseline, candidate):
        raise InputError("these records can't be compared: " + "; ".join(reasons) + ".")
    failed = _failures(baseline, candidate)
    first = _scores(baseline)
    if candidate.results is None:  # a preflight check failed: nothing else was measured
        return _regression(baseline, candidate, tuple(first.index), alpha, failed, ())
    second = _scores(candidate)
    ids = tuple(first.index[:n])
    ids = tuple(id_ for id_ in ids if id_ in second.index)
    certified = baseline.certification is not None and candidate.certification is not None
    whats: tuple[What, ...] = ("clean", "robust", "radius") if certified else ("clean", "robust")
    require_samples(len(ids), alpha, len(whats))
    counts = not any(record.defense.card.traits.stochastic for record in (baseline, candidate))
    found = tuple(_compare(what, first.loc[list(ids)], second.loc[list(ids)], counts, alpha / len(whats))
                  for what in whats)  # fmt: skip
    return _regression(baseline, candidate, ids, alpha, failed, found)


def differences(baseline: Record, candidate: Record) -> tuple[str, ...]:
    """Why two records say nothing of each other; empty where they do."""
    pairs = (
        ("board", baseline.board.name, candidate.board.name),
        ("data", *(f"{each.board.dataset} {each.board.revision}" for each in (baseline, candidate))),
        ("threat model", *(f"{r.board.threat.norm} {r.board.threat.eps}" for r in (baseline, candidate))),
        ("draws a candidate", baseline.board.draws, candidate.board.draws),
        ("profile", baseline.protocol.profile, candidate.protocol.profile),
        ("protocol", *(f"{each.protocol.id} ({each.protocol.digest[:12]})" for each in (baseline, candidate))),
    )
    reasons = [f"{name} {before} in the baseline, {after} in the candidate" for name, before, after in pairs
               if before != after]  # fmt: skip
    if not reasons and baseline.certification and candidate.certification:
        before, after = (", ".join(r.certification.radii) for r in (baseline, candidate) if r.certification)
        if before != after:
            reasons.append(f"certified radii {before} in the baseline, {after} in the candidate")
    if baseline.results is None:
        reasons.append(f"the baseline is {baseline.verdict} and measured no robust accuracy")
    if candidate.results is None and candidate.verdict != "failed":
        reasons.append(f"the candidate is {candidate.verdict} and measured no robust accuracy")
    lacking = {name: why for name, why in candidate.protocol.missing.items() if name not in baseline.protocol.missing}
    reasons += [f"the candidate lacks {name}: {why}" for name, why in lacking.items()]
    reasons += [f"the baseline lacks {name}: {why}" for name, why in baseline.protocol.missing.items()
                if name not in candidate.protocol.missing and candidate.results is not None]  # fmt: skip
    return tuple(reasons)


def _scores(record: Record) -> pd.DataFrame:
    """Clean, robust and radius for each sample, by id in the order of the run, with what left it least."""
    frame = record.to_frame()
    finals, cleans = (frame[frame["attack"] == stage].set_index("id") for stage in (_FINAL, _CLEAN))
    if finals.index.has_duplicates or ids_digest(finals.index.tolist()) != record.board.ids_sha256:
        raise IntegrityError(f"the {SAMPLES} of {record.defense.name} doesn't hold one {_FINAL!r} row for each sample.")
    if not cleans.index.equals(finals.index):
        raise IntegrityError(f"the {SAMPLES} of {record.defense.name} doesn't hold one {_CLEAN!r} row for each sample.")
    scores = pd.DataFrame({"clean": cleans["expected"], "robust": finals["expected"]})
    assert record.results is not None
    for what, stated in (("clean", record.results.clean), ("robust", record.results.robust)):
        if not abs(scores[what].mean() - stated.value) <= _TOLERANCE:
            raise IntegrityError(
                f"the record of {record.defense.name} says {what} {stated.value}, but the scores in its {SAMPLES} "
                f"average {scores[what].mean()}."
            )
    attacks = frame[~frame["attack"].isin((_CLEAN, _FINAL))].drop_duplicates(["id", "attack"])
    least = attacks.sort_values("expected", kind="stable").drop_duplicates("id").set_index("id")["attack"]
    return scores.assign(radius=finals["certified_radius"], attack=least.reindex(scores.index).fillna(""))


def _compare(what: What, before: pd.DataFrame, after: pd.DataFrame, counts: bool, level: float) -> Comparison:
    first, second = (side[what].to_numpy(dtype=np.float64) for side in (before, after))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise IntegrityError(f"a {SAMPLES} holds a {NAMES[what]} that is not finite.")
    attacks = after["attack"] if what == "robust" else [""] * len(after)
    moved = [
        Change(id=int(id_), before=float(a), after=float(b), attack=str(attack) if b < a else "")
        for id_, a, b, attack in zip(before.index, first, second, attacks, strict=True)
        if a != b
    ]
    moved.sort(key=lambda change: -abs(change.after - change.before))  # stable: equal changes in the board's order
    fell, rose = (tuple(c for c in moved if (c.after < c.before) is down) for down in (True, False))
    exact = counts and what != "radius" and bool(np.isin([first, second], (0.0, 1.0)).all())
    two_sided = (mcnemar if exact else paired_permutation)(first.tolist(), second.tolist())
    if exact:
        least = detectable_flips(len(first), float(first.mean()), len(rose) / len(first), level)
        assumes = f"if {len(rose)} in {len(first)} samples rise meanwhile, as here"
    else:
        least = detectable_shift(first, second, level)
        assumes = "about, if what falls loses its whole score, and the rest differs as much as here"
    return Comparison(
        what=what,
        test="mcnemar" if exact else "permutation",
        before=float(first.mean()),
        after=float(second.mean()),
        # Under the null either sign is as likely, so half of the two-sided p lies on the side of a drop.
        p=1.0 if not moved else two_sided / 2 if first.sum() > second.sum() else 1 - two_sided / 2,
        level=level,
        detectable=least,
        assumes=assumes,
        fell=fell,
        rose=rose,
    )


def _failures(baseline: Record, candidate: Record) -> tuple[str, ...]:
    if candidate.verdict != "failed" or baseline.verdict == "failed":
        return ()
    found = [f"{finding.check}: {finding.message}" for finding in candidate.findings if finding.status == "fail"]
    return tuple(found) or ("the candidate's verdict is failed, the baseline's was not",)


def _changed(baseline: Record, candidate: Record) -> tuple[str, ...]:
    """What differs besides the scores, as far as the records tell."""
    a, b = baseline, candidate
    same = {
        "the defense": a.defense.name == b.defense.name,
        "its options": a.defense.options == b.defense.options,
        "its weights": a.defense.weights == b.defense.weights,
        "its source": a.defense.source_sha256 == b.defense.source_sha256,
        # None where a record is older than the digest.
        "its parameters": a.defense.state_sha256 == b.defense.state_sha256
        or None in (a.defense.state_sha256, b.defense.state_sha256),
        "its card": a.defense.card == b.defense.card,
        "assay's own code": a.provenance.code_sha256 == b.provenance.code_sha256,
    }
    changes = [name for name, equal in same.items() if not equal]
    for name in ("seed", "device", "threads", "platform", "python"):
        before, after = getattr(a.provenance, name), getattr(b.provenance, name)
        changes += [f"{name} {before} -> {after}"] if before != after else []
    packages: Sequence[Mapping[str, str]] = (a.provenance.packages, b.provenance.packages)
    for name in sorted(set(packages[0]) | set(packages[1])):
        before, after = (each.get(name, "absent") for each in packages)
        changes += [f"{name} {before} -> {after}"] if before != after else []
    ran = [set(record.results.attacks) if record.results else set() for record in (a, b)]
    if all(ran) and ran[0] != ran[1]:
        changes += [f"attacks no longer run: {', '.join(sorted(ran[0] - ran[1]))}"] if ran[0] - ran[1] else []
        changes += [f"attacks run in addition: {', '.join(sorted(ran[1] - ran[0]))}"] if ran[1] - ran[0] else []
    return tuple(changes)


def _regression(
    baseline: Record,
    candidate: Record,
    ids: Sequence[int],
    alpha: float,
    failed: tuple[str, ...],
    comparisons: tuple[Comparison, ...],
) -> Regression:
    sides = [
        Side(name=record.defense.with_options(record.defense.name), digest=record.digest, verdict=record.verdict,
             seed=record.provenance.seed)
        for record in (baseline, candidate)
    ]  # fmt: skip
    return Regression(
        baseline=sides[0], candidate=sides[1], board=baseline.board.name, profile=baseline.protocol.profile,
        protocol=baseline.protocol.digest, ids=tuple(map(int, ids)), size=baseline.board.n, alpha=alpha,
        changed=_changed(baseline, candidate), failed=failed, comparisons=comparisons,
    )  # fmt: skip
