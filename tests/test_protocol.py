from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.card import TRAITS, Card, Handle, Traits, Votes
from assay.errors import InputError
from assay.protocol import FAMILIES, PROFILES, PROTOCOLS, PlannedAttack, ProfileName, load_protocol, verdict
from assay.registry import ATTACKS

PROTOCOL = load_protocol("2026.1")
GRADIENT = ("pgd", "apgd", "bpda", "chain", "surrogate", "step-losses", "diffhammer")

cards = st.builds(
    lambda traits, handles, draws: Card(
        name="toy", title="Toy", summary="", traits=Traits(**dict.fromkeys(traits, True)), handles=tuple(handles),
        votes=Votes(draws=draws), certificate="smoothing" if "certifies" in traits else "",
    ),
    st.sets(st.sampled_from(TRAITS)),
    st.sets(st.sampled_from(get_args(Handle))),
    st.sampled_from([1, 8]),
)  # fmt: skip
classes = st.integers(2, 12)
profiles = st.sampled_from(PROFILES)


def plan(card: Card, k: int, profile: ProfileName) -> dict[str, PlannedAttack]:
    planned = PROTOCOL.plan(card, k, profile)
    by_name = {attack.name: attack for attack in planned}
    assert len(by_name) == len(planned)
    return by_name


@given(cards, classes, profiles)
def test_every_card_has_a_plan_with_the_attacks_that_any_defense_faces(
    card: Card, k: int, profile: ProfileName
) -> None:
    planned = plan(card, k, profile)
    assert {"uniform", "transfer", "pgd", "apgd-ce", "square"} <= set(planned)
    assert ("apgd-t" in planned) == (k >= 4)
    assert ("autoattack" in planned) == (k >= 4 and not card.traits.stochastic)
    assert ("transfer-components" in planned) == (card.traits.purifies or "components" in card.handles)
    assert ("diffhammer" in planned) == (card.traits.purifies and card.traits.stochastic)
    assert ("first-order" in planned) == card.traits.inner_gradient
    assert ("relaxed" in planned) == ({"relaxed", "chain"} <= set(card.handles))
    if card.traits.purifies:
        assert "bpda" in planned
    if card.traits.iterative:
        assert {"surrogate", "through_chain", "step_losses"} <= set(planned)
    if card.traits.non_differentiable and "stages" in card.handles:
        assert "bpda" in planned
    for attack in planned.values():
        assert attack.reasons
        assert attack.family in FAMILIES
        assert attack.forward >= 0
        assert attack.backward >= 0
        assert min(attack.options.get(name, 1) for name in ("steps", "eot", "tries", "queries", "targets")) >= 1


@given(cards, classes, profiles)
def test_no_attack_is_planned_where_it_would_refuse_to_run(card: Card, k: int, profile: ProfileName) -> None:
    for attack in plan(card, k, profile).values():
        spec = ATTACKS[attack.attack]
        assert set(attack.options) <= set(inspect.signature(spec.attack).parameters)
        assert k >= spec.min_classes
        assert not (spec.deterministic_only and card.traits.stochastic)
        if not attack.missing:
            assert set(spec.handles) <= set(card.handles)


@given(cards, classes, profiles)
def test_gradients_of_a_stochastic_defense_are_averaged_over_twenty_draws_or_more(
    card: Card, k: int, profile: ProfileName
) -> None:
    for attack in plan(card, k, profile).values():
        if attack.family in GRADIENT:
            eot = attack.options.get("eot", 1)
            assert eot >= (20 if profile != "quick" else 8) if card.traits.stochastic else eot == 1


@given(cards, classes, profiles)
def test_a_handle_that_the_card_lacks_makes_the_record_incomplete(card: Card, k: int, profile: ProfileName) -> None:
    needs = {"bpda": "stages", "diffhammer": "stages", "surrogate": "surrogate"}
    needs |= dict.fromkeys(("through_chain", "step_losses", "first-order"), "chain")
    planned = plan(card, k, profile)
    for attack in planned.values():
        handle = needs.get(attack.name)
        if attack.name == "transfer-components" and card.traits.purifies:
            handle = "stages"  # a purifier's classifier stands in for components it doesn't name
        assert bool(attack.missing) == (handle is not None and handle not in card.handles)
        if attack.missing:
            assert handle
            assert handle in attack.missing
    missing = {attack.name: attack.missing for attack in planned.values() if attack.missing}
    assert verdict(["pass", "flag"], missing=missing) == ("incomplete" if missing else "flagged")


@given(cards, classes)
def test_a_declared_trait_never_removes_an_attack_but_autoattack(card: Card, k: int) -> None:
    honest = set(plan(card, k, "standard"))
    silent = set(plan(card.model_copy(update={"traits": Traits()}), k, "standard"))
    assert silent - honest <= {"autoattack"}


@given(cards, classes)
def test_profiles_scale_the_budgets_and_not_the_set(card: Card, k: int) -> None:
    quick, standard, thorough = (plan(card, k, profile) for profile in PROFILES)
    assert list(quick) == list(standard) == list(thorough)
    for name in standard:
        assert quick[name].forward <= standard[name].forward <= thorough[name].forward
        before, after = standard[name].options, thorough[name].options
        if "steps" in before:
            assert after["steps"] == 2 * before["steps"]
            assert after.get("restarts", 1) == 5 * before.get("restarts", 1)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_names_only_attacks_checks_and_traits_that_exist(name: str) -> None:
    from assay.checks import GRADIENTS, PREFLIGHT

    protocol = PROTOCOLS[name]
    assert set(protocol.checks) <= {*PREFLIGHT, *GRADIENTS}
    assert {rule.attack for rule in protocol.rules} <= set(ATTACKS)
    for rule in protocol.rules:
        assert set(rule.options) == set(PROFILES)
        assert set(ATTACKS[rule.attack].handles) <= set(rule.handles)


def test_the_digest_covers_what_a_profile_prescribes_and_nothing_of_the_others() -> None:
    digests = {profile: PROTOCOL.digest(profile) for profile in PROFILES}
    assert len(set(digests.values())) == 3
    rule = PROTOCOL.rules[-1]
    dearer = replace(rule, options={**rule.options, "standard": {**rule.options["standard"], "queries": 1}})
    changed = replace(PROTOCOL, rules=(*PROTOCOL.rules[:-1], dearer))
    assert {profile: changed.digest(profile) != digests[profile] for profile in PROFILES} == {
        "quick": False, "standard": True, "thorough": False,
    }  # fmt: skip
    for other in (
        replace(PROTOCOL, decision="majority"),
        replace(PROTOCOL, checks=PROTOCOL.checks[:-1]),
        replace(PROTOCOL, rules=PROTOCOL.rules[::-1]),
        replace(PROTOCOL, samples={**PROTOCOL.samples, "quick": 99}),
    ):
        assert other.digest("quick") != digests["quick"]
    reworded = replace(PROTOCOL, rules=tuple(replace(rule, why="in other words") for rule in PROTOCOL.rules))
    assert reworded.digest("quick") == digests["quick"]


def test_the_digest_is_the_same_in_every_process_and_needs_no_torch() -> None:
    code = (
        "import sys; from assay.protocol import load_protocol as l; print(l('2026.1').digest('standard'));"
        "assert 'torch' not in sys.modules"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.strip() == PROTOCOL.digest("standard")


def test_an_unknown_version_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"2026\.1"):
        load_protocol("2026.2")


@pytest.mark.parametrize(
    ("statuses", "missing", "expected"),
    [
        ([], [], "verified"),
        (["pass"], [], "verified"),
        (["pass", "flag"], [], "flagged"),
        (["flag"], ["pgd"], "incomplete"),
        (["pass", "fail", "flag"], ["pgd"], "failed"),
    ],
)
def test_verdicts(statuses: list, missing: list[str], expected: str) -> None:
    assert verdict(statuses, missing=missing) == expected
