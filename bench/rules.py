"""The rules of each protocol version: which trait makes which attack mandatory, with which options.

Data, readable without torch. What is done with it stands in `protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from assay.budget import Budget
from assay.card import Handle

ProfileName = Literal["quick", "standard", "thorough"]
Family = Literal[
    "noise",
    "transfer",
    "pgd",
    "apgd",
    "autoattack",
    "bpda",
    "chain",
    "surrogate",
    "step-losses",
    "diffhammer",
    "black-box",
]
Options = Mapping[str, Any]

PROFILES: tuple[ProfileName, ...] = get_args(ProfileName)
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Rule:
    """One row of the table: defenses with `trait` must face `attack` with these options.

    Rules are read from top to bottom. A later rule with the name of an earlier one that applies
    changes that attack's options and adds its reason; the attack stays where it first stood, so
    the table's order is the cascade's order, from cheap to dear.

    Attributes:
        name: the attack's name in plans, records and tables.
        attack: the registry's name.
        family: the table column it counts towards.
        trait: a trait of the card, or `any`, or `deterministic` (not stochastic).
        why: a sentence for the plan.
        options: keyword arguments of the attack, per profile.
        handles: handles that the attack needs; a defense without them leaves its record incomplete.
        min_classes: defenses with fewer classes are exempt.
        where_offered: asked only of defenses that offer the handles.
    """

    name: str
    attack: str
    family: Family
    trait: str
    why: str
    options: Mapping[ProfileName, Options]
    handles: tuple[Handle, ...] = ()
    min_classes: int = 2
    where_offered: bool = False


def _budget(quick: Options, standard: Options, *, doubled: str = "steps", fixed: Options | None = None) -> Any:
    """Options per profile; `thorough` is `standard` with five times the restarts and `doubled` doubled."""
    shared = dict(fixed or {})
    thorough = dict(standard)
    thorough[doubled] = 2 * standard[doubled]
    if doubled == "steps":
        thorough["restarts"] = 5 * standard.get("restarts", 1)
    return {"quick": {**shared, **quick}, "standard": {**shared, **standard}, "thorough": {**shared, **thorough}}


_MEAN = "gradients are averaged over draws, and the longest are clipped first"


def _averaging(steps: int, **fixed: Any) -> Any:
    """Options of an attack whose gradients are means over draws, which a few of heavy-tailed length would rule."""
    return _budget({"steps": 15, "eot": 8}, {"steps": steps, "eot": 20}, fixed={"clip": True, **fixed})


RULES_2026_1 = (
    Rule(
        "uniform", "uniform", "noise", "any", "random points show what an attack must beat",
        _budget({"tries": 10}, {"tries": 10}, doubled="tries"),
    ),
    Rule(
        "transfer", "transfer", "transfer", "any", "adversarial examples of the board's undefended model",
        _budget({"steps": 20}, {"steps": 50}, fixed={"source": "board"}),
    ),
    Rule(
        "transfer-components", "transfer", "transfer", "any", "attacks the defense's own parts",
        _budget({"steps": 20}, {"steps": 50}, fixed={"source": "components"}), handles=("components",),
        where_offered=True,
    ),
    Rule(
        "transfer-components", "transfer", "transfer", "purifies", "attacks the classifier alone, past the purifier",
        _budget({"steps": 20}, {"steps": 50}, fixed={"source": "components"}), handles=("stages",),
    ),
    Rule(
        "bpda", "bpda", "bpda", "non_differentiable", "the identity backward gets past steps without a gradient",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}), handles=("stages",), where_offered=True,
    ),
    Rule(
        "bpda", "bpda", "bpda", "purifies", "the identity backward through the purifier (Athalye et al. 2018)",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}), handles=("stages",),
    ),
    Rule(
        "bpda", "bpda", "bpda", "stochastic", _MEAN,
        _averaging(20), handles=("stages",),
    ),
    Rule(
        "surrogate", "surrogate", "surrogate", "iterative", "fewer steps, same total noise (Lee & Kim 2023)",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}, fixed={"chain_steps": 3}), handles=("surrogate",),
    ),
    Rule(
        "surrogate", "surrogate", "surrogate", "stochastic", _MEAN,
        _averaging(20, chain_steps=3), handles=("surrogate",),
    ),
    Rule(
        "apgd-ce", "apgd", "apgd", "any", "parameter-free PGD on the cross-entropy (Croce & Hein 2020)",
        _budget({"steps": 20}, {"steps": 100}, fixed={"loss": "ce"}),
    ),
    Rule(
        "apgd-ce", "apgd", "apgd", "stochastic", _MEAN,
        _averaging(30, loss="ce"),
    ),
    Rule(
        "pgd", "pgd", "pgd", "any", "projected gradient ascent from a random start (Madry et al. 2018)",
        _budget({"steps": 20}, {"steps": 100}, fixed={"loss": "ce"}),
    ),
    Rule(
        "pgd", "pgd", "pgd", "stochastic", _MEAN,
        _averaging(10, loss="ce"),
    ),
    Rule(
        "through_chain", "through_chain", "chain", "iterative", "the exact gradient through every step, margin loss",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}, fixed={"loss": "margin"}), handles=("chain",),
    ),
    Rule(
        "through_chain", "through_chain", "chain", "stochastic", _MEAN,
        _averaging(30, loss="margin"), handles=("chain",),
    ),
    Rule(
        "relaxed", "through_chain", "chain", "any", "discrete choices inside the defense softened for the gradient",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}, fixed={"loss": "margin", "variant": "relaxed"}),
        handles=("relaxed", "chain"), where_offered=True,
    ),
    Rule(
        "relaxed", "through_chain", "chain", "stochastic", _MEAN,
        _averaging(20, loss="margin", variant="relaxed"),
        handles=("relaxed", "chain"),
    ),
    Rule(
        "first-order", "through_chain", "chain", "inner_gradient", "drops second-order terms, should they mislead",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}, fixed={"loss": "margin", "variant": "first-order"}),
        handles=("chain",),
    ),
    Rule(
        "first-order", "through_chain", "chain", "stochastic", _MEAN,
        _averaging(20, loss="margin", variant="first-order"),
        handles=("chain",),
    ),
    Rule(
        "step_losses", "step_losses", "step-losses", "iterative", "pulls the trajectory away at each step (DiffAttack)",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}), handles=("chain",),
    ),
    Rule(
        "step_losses", "step_losses", "step-losses", "stochastic", _MEAN,
        _averaging(15), handles=("chain",),
    ),
    Rule(
        "diffhammer", "diffhammer", "diffhammer", "purifies+stochastic", "attacks the draws that can fall (DiffHammer)",
        _budget({"steps": 15, "eot": 8, "restarts": 1}, {"steps": 30, "eot": 20, "restarts": 1}),
        handles=("stages",),
    ),
    Rule(
        "apgd-t", "apgd", "apgd", "any", "targets the runner-up classes, where untargeted losses stall",
        _budget({"steps": 20, "targets": 3}, {"steps": 100, "targets": 9}, fixed={"loss": "dlr-targeted"}),
        min_classes=4,
    ),
    Rule(
        "apgd-t", "apgd", "apgd", "stochastic", _MEAN,
        _budget({"steps": 15, "targets": 1, "eot": 8}, {"steps": 15, "targets": 1, "eot": 20},
                fixed={"clip": True, "loss": "dlr-targeted"}),
        min_classes=4,
    ),
    Rule(
        "autoattack", "autoattack", "autoattack", "deterministic", "the authors' own AutoAttack, standard",
        {name: {"version": "standard"} for name in PROFILES}, min_classes=4,
    ),
    Rule(
        "square", "square", "black-box", "any", "needs no gradient, so masking can't stop it",
        _budget({"queries": 500}, {"queries": 5000}, doubled="queries"),
    ),
    Rule(
        "square", "square", "black-box", "stochastic", "each comparison averages draws",
        _budget({"queries": 50, "eot": 8}, {"queries": 200, "eot": 10}, doubled="queries"),
    ),
    Rule(
        "square", "square", "black-box", "non_differentiable", "five times the queries where gradients say little",
        _budget({"queries": 1000}, {"queries": 25000}, doubled="queries"),
    ),
    Rule(
        "square", "square", "black-box", "stochastic+non_differentiable", "five times the queries, averaged",
        _budget({"queries": 100, "eot": 8}, {"queries": 1000, "eot": 10}, doubled="queries"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Certifying:
    """What a profile asks of a defense that certifies.

    Attributes:
        budget: draws and error probabilities.
        attack: the registry's attack that is run at each of the board's radii.
        options: its options on a deterministic defense; `stochastic` on any other.
    """

    budget: Budget
    attack: str
    options: Options
    stochastic: Options


CERTIFYING: Mapping[ProfileName, Certifying] = {
    # A sequential test with a cap of n draws reaches 2.6σ, 3.35σ, 3.8σ.
    "quick": Certifying(
        Budget(draws=400, cap=2_000), "apgd",
        {"steps": 20, "loss": "margin-targeted", "targets": 3}, {"steps": 15, "eot": 8, "loss": "ce", "clip": True},
    ),
    "standard": Certifying(
        Budget(draws=2_000, cap=20_000, judging=1_000), "apgd",
        {"steps": 100, "loss": "margin-targeted", "targets": 9}, {"steps": 30, "eot": 20, "loss": "ce", "clip": True},
    ),
    "thorough": Certifying(
        Budget(draws=10_000, cap=100_000, judging=2_000), "apgd",
        {"steps": 200, "loss": "margin-targeted", "targets": 9},
        {"steps": 60, "restarts": 5, "eot": 20, "loss": "ce", "clip": True},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Health:
    """What a profile asks about its attacks once they have run: whether what they left says anything.

    Attributes:
        checks: by name; the strongest white-box attack is run again for most of them.
        samples: images of a deterministic defense that it is run on; `stochastic` of any other.
        planted: options of that attack against planted boundaries, in place of its own.
        calibrating: images that the board's attacks are calibrated on.
        most_draws: draws that a gradient may average at most, where its measured noise asks for more than planned.
    """

    checks: tuple[str, ...]
    samples: int
    stochastic: int
    planted: Options
    calibrating: int
    most_draws: int


_HEALTH = (
    "constancy",
    "unbounded",
    "eps_curve",
    "converged",
    "single_step_beats_iterative",
    "black_box_beats_white_box",
    "binarization",
    "ablations",
    "calibration",
)

HEALTH: Mapping[ProfileName, Health] = {
    "quick": Health(_HEALTH, samples=16, stochastic=8, planted={"steps": 20}, calibrating=32, most_draws=8),
    "standard": Health(_HEALTH, samples=32, stochastic=16, planted={"steps": 20}, calibrating=64, most_draws=40),
    "thorough": Health(_HEALTH, samples=64, stochastic=32, planted={"steps": 50}, calibrating=64, most_draws=64),
}

SELECTION = ((8, 10), (4, 20), (2, 50))
"""Rounds of the last choice among a stochastic defense's candidates: how many of each sample, and the draws of each."""
