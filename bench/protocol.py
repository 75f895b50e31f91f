"""The evaluation protocol: a versioned table from traits to mandatory attacks, budgets and decision rules.

Readable without torch. A protocol's digest covers everything that this file says of a profile, so
rows measured under different budgets never share a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from assay.card import TRAITS, Card, Handle
from assay.digest import sha256_of_json
from assay.errors import InputError, nearest
from assay.finding import Status

ProfileName = Literal["quick", "standard", "thorough"]
Verdict = Literal["verified", "flagged", "failed", "incomplete"]
Family = Literal["noise", "transfer", "pgd", "apgd", "autoattack", "bpda", "chain", "surrogate", "black-box"]
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


_RULES_2026_1 = (
    Rule(
        "uniform", "uniform", "noise", "any", "random points show what an attack must beat",
        _budget({"tries": 10}, {"tries": 10}, doubled="tries"),
    ),
    Rule(
        "transfer", "transfer", "transfer", "any", "adversarial examples of the board's undefended model",
        _budget({"steps": 20}, {"steps": 50}, fixed={"source": "board"}),
    ),
    Rule(
        "transfer-classifier", "transfer", "transfer", "purifies", "attacks the classifier alone, past the purifier",
        _budget({"steps": 20}, {"steps": 50}, fixed={"source": "classifier"}), handles=("stages",),
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
        "bpda", "bpda", "bpda", "stochastic", "the gradient is averaged over draws",
        _budget({"steps": 15, "eot": 8}, {"steps": 50, "eot": 20}), handles=("stages",),
    ),
    Rule(
        "surrogate", "surrogate", "surrogate", "iterative", "fewer steps, same total noise (Lee & Kim 2023)",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}, fixed={"chain_steps": 5}), handles=("surrogate",),
    ),
    Rule(
        "surrogate", "surrogate", "surrogate", "stochastic", "the gradient is averaged over draws",
        _budget({"steps": 15, "eot": 8}, {"steps": 50, "eot": 20}, fixed={"chain_steps": 5}), handles=("surrogate",),
    ),
    Rule(
        "apgd-ce", "apgd", "apgd", "any", "parameter-free PGD on the cross-entropy (Croce & Hein 2020)",
        _budget({"steps": 20}, {"steps": 100}, fixed={"loss": "ce"}),
    ),
    Rule(
        "apgd-ce", "apgd", "apgd", "stochastic", "the gradient is averaged over draws",
        _budget({"steps": 15, "eot": 8}, {"steps": 50, "eot": 20}, fixed={"loss": "ce"}),
    ),
    Rule(
        "pgd", "pgd", "pgd", "any", "projected gradient ascent from a random start (Madry et al. 2018)",
        _budget({"steps": 20}, {"steps": 100}, fixed={"loss": "ce"}),
    ),
    Rule(
        "pgd", "pgd", "pgd", "stochastic", "the gradient is averaged over draws",
        _budget({"steps": 15, "eot": 8}, {"steps": 50, "eot": 20}, fixed={"loss": "ce"}),
    ),
    Rule(
        "through_chain", "through_chain", "chain", "iterative", "the exact gradient through every step, margin loss",
        _budget({"steps": 20, "eot": 1}, {"steps": 100, "eot": 1}, fixed={"loss": "margin"}), handles=("chain",),
    ),
    Rule(
        "through_chain", "through_chain", "chain", "stochastic", "the gradient is averaged over draws",
        _budget({"steps": 15, "eot": 8}, {"steps": 50, "eot": 20}, fixed={"loss": "margin"}), handles=("chain",),
    ),
    Rule(
        "apgd-t", "apgd", "apgd", "any", "targets the runner-up classes, where untargeted losses stall",
        _budget({"steps": 20, "targets": 3}, {"steps": 100, "targets": 9}, fixed={"loss": "dlr-targeted"}),
        min_classes=4,
    ),
    Rule(
        "apgd-t", "apgd", "apgd", "stochastic", "the gradient is averaged over draws",
        _budget({"steps": 15, "targets": 1, "eot": 8}, {"steps": 50, "targets": 1, "eot": 20},
                fixed={"loss": "dlr-targeted"}),
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
        _budget({"queries": 50, "eot": 8}, {"queries": 500, "eot": 10}, doubled="queries"),
    ),
    Rule(
        "square", "square", "black-box", "non_differentiable", "five times the queries where gradients say little",
        _budget({"queries": 1000}, {"queries": 25000}, doubled="queries"),
    ),
    Rule(
        "square", "square", "black-box", "stochastic+non_differentiable", "five times the queries, averaged",
        _budget({"queries": 100, "eot": 8}, {"queries": 2500, "eot": 10}, doubled="queries"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class PlannedAttack:
    """A mandatory attack of one run: what, with which options, why, and what it costs at most.

    Attributes:
        forward, backward: samples passed through the defense per image, an upper bound: samples
            that are certainly broken leave early.
        missing: why it can't run on this defense, or empty.
    """

    name: str
    attack: str
    family: Family
    options: Options
    reasons: tuple[str, ...]
    forward: int
    backward: int
    missing: str = ""


@dataclass(frozen=True)
class Protocol:
    """A version of the protocol.

    Attributes:
        id: such as `2026.1`.
        rules: the table.
        checks: preflight checks, by name; any `fail` stops a run.
        samples: how many of a board's ids each profile takes (None: all of them).
        ranked: profiles whose rows may be ranked.
        decision: the rule behind the ranking number of stochastic defenses.
    """

    id: str
    rules: tuple[Rule, ...]
    checks: tuple[str, ...]
    samples: Mapping[ProfileName, int | None]
    ranked: tuple[ProfileName, ...] = ("standard", "thorough")
    decision: str = "expected"

    def digest(self, profile: ProfileName) -> str:
        """The SHA-256 of all that this protocol prescribes under a profile; its explanations are left out."""
        resolved = asdict(self)
        resolved["rules"] = [
            {key: value for key, value in asdict(rule).items() if key != "why"}
            | {"options": dict(rule.options[profile])}
            for rule in self.rules
        ]
        resolved["samples"] = self.samples[profile]
        return sha256_of_json({"profile": profile, **resolved})

    def plan(self, card: Card, n_classes: int, profile: ProfileName, *, source: str = "") -> tuple[PlannedAttack, ...]:
        """The mandatory attacks for a defense, in the cascade's order, with their reasons.

        `source` is the board's undefended model: its own adversarial examples are no transfer, so
        that model is exempt from them.
        """
        held = {"any", *card.traits.names()} | (set() if card.traits.stochastic else {"deterministic"})
        planned: dict[str, tuple[Rule, list[str]]] = {}
        for rule in self.rules:
            if n_classes < rule.min_classes or not held.issuperset(rule.trait.split("+")):
                continue
            if rule.trait == "stochastic" and rule.name not in planned:
                continue  # it modifies an attack that another trait asks for
            if card.name == source and rule.options[profile].get("source") == "board":
                continue
            if rule.where_offered and not set(rule.handles) <= set(card.handles):
                continue
            reasons = [*planned[rule.name][1]] if rule.name in planned else []
            planned[rule.name] = (rule, [*reasons, f"{rule.trait}: {rule.why}"])
        return tuple(_planned(rule, reasons, card, n_classes, profile) for rule, reasons in planned.values())


def _planned(rule: Rule, reasons: Iterable[str], card: Card, n_classes: int, profile: ProfileName) -> PlannedAttack:
    options = dict(rule.options[profile])
    forward, backward = COSTS[rule.attack](options, n_classes, card.votes.draws)
    absent = [handle for handle in rule.handles if handle not in card.handles]
    missing = f"the card offers no {', '.join(absent)} handle" if absent else ""
    return PlannedAttack(rule.name, rule.attack, rule.family, options, tuple(reasons), forward, backward, missing)


def _ascent(options: Options, n_classes: int, votes: int) -> tuple[int, int]:
    runs = options.get("restarts", 1) * min(options.get("targets", 1), max(1, n_classes - 1))
    steps = options["steps"] * options.get("eot", 1) * runs
    return steps + 4 * options.get("eot", 1) * runs, steps


COSTS: Mapping[str, Callable[[Options, int, int], tuple[int, int]]] = {
    "uniform": lambda o, k, v: (o["tries"] * o.get("eot", 1), 0),
    "transfer": lambda o, k, v: (0, 0),
    "pgd": _ascent,
    "apgd": _ascent,
    # The identity backward costs next to nothing beside the purifier's forward.
    "bpda": lambda o, k, v: (_ascent(o, k, v)[0], 0),
    "through_chain": _ascent,
    "surrogate": _ascent,
    # apgd-ce 100 steps, apgd-t and fab-t 9 × 100 (fab: two forwards a step), square 5,000.
    "autoattack": lambda o, k, v: (100 + 900 + 1800 + 5000, 100 + 900 + 900),
    "square": lambda o, k, v: (o["queries"] * o.get("eot", 1), 0),
}
"""attack -> (options, classes, votes) -> forward and backward calls per image, upper bounds."""

PROTOCOLS: Mapping[str, Protocol] = {
    "2026.1": Protocol(
        id="2026.1",
        rules=_RULES_2026_1,
        checks=("interface", "modes", "honest_randomness", "batch_independence"),
        samples={"quick": 50, "standard": None, "thorough": None},
    ),
}


def load_protocol(name: str) -> Protocol:
    """The protocol of a version.

    Raises:
        InputError: for an unknown version.
    """
    if name not in PROTOCOLS:
        raise InputError(f"no protocol {name!r}.{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def verdict(statuses: Iterable[Status], *, missing: Iterable[str] = ()) -> Verdict:
    """What a record concludes: `failed` beats `incomplete` beats `flagged` beats `verified`."""
    found = set(statuses)
    if "fail" in found:
        return "failed"
    if any(missing):
        return "incomplete"
    return "flagged" if "flag" in found else "verified"


assert set(TRAITS) >= {part for p in PROTOCOLS.values() for r in p.rules for part in r.trait.split("+")} - {
    "any",
    "deterministic",
}
