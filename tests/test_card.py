from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from assay.card import TRAITS, Card, Claim, Traits, Votes

MINIMAL: dict[str, Any] = {"name": "diffpure", "title": "DiffPure", "summary": "Noise, then denoise."}


def test_a_card_survives_json() -> None:
    card = Card(
        **MINIMAL,
        traits=Traits(stochastic=True, purifies=True),
        handles=("stages", "chain"),
        votes=Votes(draws=8, how="probabilities"),
        weights={"digits.safetensors": "00" * 32},
        claims=(Claim(value=0.7, threat="linf 8/255", attack="AutoAttack", source="table 1"),),
    )
    assert Card.model_validate_json(card.model_dump_json()) == card


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 0.9},
        {"name": "Diff Pure"},
        {"name": ""},
        {"title": ""},
        {"url": "javascript:alert(1)"},
        {"url": "https://example.org/ and more"},
        {"handles": ("weights",)},
        {"traits": {"quick": True}},
        {"votes": {"draws": 0}},
        {"votes": {"how": "median"}},
        {"network_calls": -1},
        {"claims": ({"value": 70, "threat": "linf 8/255", "attack": "AA", "source": "x"},)},
        {"claims": ({"value": math.nan, "threat": "linf 8/255", "attack": "AA", "source": "x"},)},
    ],
)
def test_what_a_card_may_not_say(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Card(**{**MINIMAL, **change})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Claim(value=value, threat="l2 1/2", attack="PGD", source="x")


def test_a_card_can_not_be_changed() -> None:
    card = Card(**MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        card.name = "other"


def test_every_trait_is_named_once_and_in_order() -> None:
    assert tuple(Traits.model_fields) == TRAITS
    everything = Traits(**dict.fromkeys(TRAITS, True))
    assert everything.names() == TRAITS
    assert Traits(purifies=True).names() == ("purifies",)
    assert Traits().names() == ()
