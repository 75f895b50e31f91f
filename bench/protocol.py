"""The evaluation protocol: a versioned table from traits to mandatory attacks, budgets and decision rules.

Readable without torch. A protocol's digest covers everything that this file and `rules` say of
a profile, so rows measured under different budgets never share a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from assay.card import TRAITS, Card
from assay.digest import sha256_of_json
from assay.errors import InputError, nearest
from assay.finding import Status
from assay.rules import (
    CERTIFYING,
    FAMILIES,
    HEALTH,
    PROFILES,
    RULES_2026_1,
    SELECTION,
    Certifying,
    Family,
    Health,
    Options,
    ProfileName,
    Rule,
)

__all__ = [
    "FAMILIES",
    "PROFILES",
    "PROTOCOLS",
    "Certifying",
    "Family",
    "Health",
    "Options",
    "PlannedAttack",
    "ProfileName",
    "Protocol",
    "Rule",
    "Verdict",
    "load_protocol",
    "verdict",
]

Verdict = Literal["verified", "flagged", "failed", "incomplete"]


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
        checks: checks of the defense and of its gradients, by name; any `fail` stops a run before an attack.
        samples: how many of a board's ids each profile takes (None: all of them).
        ranked: profiles whose rows may be ranked.
        decision: the rule behind the ranking number of stochastic defenses.
        selection: rounds of the last choice among a stochastic defense's candidates: how many of each
            sample take part, and the fresh draws each gets. The winners are scored on draws of their own.
        certifying: per profile, how defenses that certify are certified, and attacked at the board's radii.
        health: per profile, what is asked about the attacks once they have run.
    """

    id: str
    rules: tuple[Rule, ...]
    checks: tuple[str, ...]
    samples: Mapping[ProfileName, int | None]
    ranked: tuple[ProfileName, ...] = ("standard", "thorough")
    decision: str = "expected"
    selection: tuple[tuple[int, int], ...] = SELECTION
    certifying: Mapping[ProfileName, Certifying] = field(default_factory=lambda: CERTIFYING)
    health: Mapping[ProfileName, Health] = field(default_factory=lambda: HEALTH)

    def digest(self, profile: ProfileName) -> str:
        """The SHA-256 of all that this protocol prescribes under a profile; its explanations are left out."""
        resolved = asdict(self)
        resolved["rules"] = [
            {key: value for key, value in asdict(rule).items() if key != "why"}
            | {"options": dict(rule.options[profile])}
            for rule in self.rules
        ]
        resolved["samples"] = self.samples[profile]
        resolved["certifying"] = asdict(self.certifying[profile])
        resolved["health"] = asdict(self.health[profile])
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
    return steps + options.get("eot", 1) * runs + 4 * _judging(options), steps


def _judging(options: Options) -> int:
    """Draws of a judgement that no evaluation of the search had a part in."""
    eot: int = options.get("eot", 1)
    return max(eot, 10) if eot > 1 else 1


COSTS: Mapping[str, Callable[[Options, int, int], tuple[int, int]]] = {
    "uniform": lambda o, k, v: (o["tries"] * o.get("eot", 1), 0),
    # Another model's calls are not the defense's; of its own parts two are assumed.
    "transfer": lambda o, k, v: (4 * o["steps"] + 50, 4 * o["steps"]) if o["source"] == "components" else (0, 0),
    "pgd": _ascent,
    "apgd": _ascent,
    # The identity backward costs next to nothing beside the purifier's forward.
    "bpda": lambda o, k, v: (_ascent(o, k, v)[0], 0),
    "through_chain": _ascent,
    "surrogate": _ascent,
    # The clean image's trajectory beside the attacked one's.
    "step_losses": lambda o, k, v: (_ascent(o, k, v)[0] + _ascent(o, k, v)[1], _ascent(o, k, v)[1]),
    # All draws through the purifier and the classifier, their gradients from the classifier alone but for one path.
    "diffhammer": lambda o, k, v: (
        o["restarts"] * (o["steps"] * (2 * o["eot"] + 1) + o["eot"]) + 3 * _judging(o),
        o["restarts"] * o["steps"] * (o["eot"] + 1),
    ),
    # apgd-ce 100 steps, apgd-t and fab-t 9 × 100 (fab: two forwards a step), square 5,000.
    "autoattack": lambda o, k, v: (100 + 900 + 1800 + 5000, 100 + 900 + 900),
    "square": lambda o, k, v: (o["queries"] * o.get("eot", 1), 0),
}
"""attack -> (options, classes, votes) -> forward and backward calls per image, upper bounds."""

PROTOCOLS: Mapping[str, Protocol] = {
    "2026.1": Protocol(
        id="2026.1",
        rules=RULES_2026_1,
        checks=(
            "interface",
            "modes",
            "honest_randomness",
            "batch_independence",
            "range",
            "attack_awareness",
            "input_mutation",
            "memorised_inputs",
            "declared_traits",
            "constancy",
            "finite_difference",
            "chain_exact",
            "replay",
            "step_count",
            "zero_gradients",
            "eot",
            "saturation",
        ),
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
