"""`black_box_beats_white_box`: noise, transfer and random search break no more than attacks along the gradient.

An attack that knows the gradient can do all that one without it can. Where the latter does better the gradients
are masked (Athalye, Carlini & Wagner 2018, arXiv 1802.00420, section 3.1; Papernot et al. 2017, arXiv 1602.02697).

The cascade spares attacks the samples that an earlier one broke beyond doubt, so a fair comparison needs samples
that both have attempted, and care with what was left out:

* On the board, for a black box that ran after white boxes. Every sample that it attempted, they had too. It must
  leave less than each of them on those samples. That whatever a white box breaks is left out favours the black box:
  it may break a few more by luck, which is why its gain must be a point of the whole board's accuracy
  (AutoAttack warns of Square at 0.2 points). Where no white box came first, it must beat each that came later, on
  the samples that it left standing itself, which favours the white boxes.
* On the subject's images, for every black box. What an early one broke no white box has attempted; so the strongest
  of them is run again, on all images, and held against the black box's own scores: a paired test with both
  directions open.

`autoattack` holds Square within itself and counts for neither side. Both tests are paired, at level `LEVEL`
divided by how many black boxes there are and by the two comparisons. Flags `gradient masking` where either is
significant.

Cost in model calls: one run of the attack on the subject's images, which other checks share, and n judgements.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from assay.checks.evidence import MATERIAL, Comparison, Evidence, StageScores, compare
from assay.finding import Finding

BLACK_BOX = frozenset({"noise", "transfer", "black-box"})
"""The families of attacks that follow no gradient of the whole defense."""
MIXED = frozenset({"autoattack"})
"""Those that hold attacks of both kinds."""
Lead = tuple[Comparison, tuple[int, ...], float]
"""A comparison, the samples that only the black box breaks, and the share of its subject that was compared."""


def check(evidence: Evidence) -> Finding:
    """The finding; its value is the largest share of samples by which a black box beats the white boxes."""
    names = list(evidence.stages)
    black = [name for name in names if evidence.stages[name].family in BLACK_BOX]
    leads: dict[str, Lead] = {}
    for name in black:
        board = _on_board(evidence, name)
        if board is not None:
            leads[f"{name}, board"] = board
        leads[f"{name}, subject"] = _on_subject(evidence, evidence.stages[name])
    if not leads:
        return Finding(check="black_box_beats_white_box", status="pass", message="No black-box attack was run.")
    tests = 2 * len(black)
    flagged = {where for where, (lead, _, share) in leads.items() if lead.significant(tests, share)}
    worst = max(leads, key=lambda where: (where in flagged, leads[where][0].difference * leads[where][2]))
    lead, samples, share = leads[worst]
    return Finding(
        check="black_box_beats_white_box",
        value=max(0.0, lead.difference * share),
        threshold=MATERIAL,
        status="flag" if flagged else "pass",
        samples=samples if flagged else (),
        message=(
            f"Gradient masking: {worst.split(',')[0]}, which follows no gradient of the defense, takes away "
            f"{lead.difference * share:.1%} more accuracy than the white-box attacks. Add BPDA, margin losses or "
            f"transfer from its parts."
            if flagged
            else "No black-box attack breaks more than the white-box attacks."
        ),
        data={
            "leads": {where: found[0].difference * found[2] for where, found in leads.items()},
            "p": {where: found[0].p for where, found in leads.items()},
        },
    )


def _on_board(evidence: Evidence, name: str) -> Lead | None:
    """The black box against whichever white box does best against it; None where there is none."""
    stages, names = evidence.stages, list(evidence.stages)
    white = [other for other in names if stages[other].family not in BLACK_BOX | MIXED]
    before = [other for other in white if names.index(other) < names.index(name)]
    box = stages[name]
    found = [_against(box, stages[other]) for other in before or white]
    return max(found, key=lambda lead: (lead[0].p, -lead[0].difference)) if found else None


def _against(black: StageScores, white: StageScores) -> Lead:
    both = black.attempted & white.attempted
    ids = np.asarray(black.ids)[both]
    first, second = white.score[both], black.score[both]
    return compare(first, second), _ids(ids[second < first]), float(both.mean()) if both.size else 0.0


def _on_subject(evidence: Evidence, black: StageScores) -> Lead:
    """The black box's scores on the board against a new run of the white box, on the subject's images."""
    place = {sample: row for row, sample in enumerate(black.ids)}
    pairs = [(i, place[sample]) for i, sample in enumerate(evidence.subject.ids) if sample in place]
    pairs = [(i, row) for i, row in pairs if black.attempted[row]]
    if not pairs:
        return Comparison(0.0, 1.0), (), 0.0
    mine, theirs = [i for i, _ in pairs], [row for _, row in pairs]
    strongest = np.minimum.reduce([evidence.attacked(), *evidence.others])
    first, second = strongest[mine], black.score[theirs]
    ids = np.asarray(evidence.subject.ids)[mine]
    return compare(first, second), _ids(ids[second < first]), len(pairs) / len(evidence.subject.ids)


def _ids(found: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(sample) for sample in found)
