from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import InputError
from assay.threat import ThreatModel, parse_eps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8/255", Fraction(8, 255)),
        ("16/510", Fraction(8, 255)),
        (" 1/2 ", Fraction(1, 2)),
        ("1", Fraction(1)),
        ("0", Fraction(0)),
        (2, Fraction(2)),
        (Fraction(3, 4), Fraction(3, 4)),
    ],
)
def test_an_exact_radius_is_read_exactly(text: str | int | Fraction, expected: Fraction) -> None:
    assert parse_eps(text) == expected


@pytest.mark.parametrize(
    ("text", "suggested"),
    [
        ("0.031", "8/255"),
        ("0.0314", "8/255"),
        ("0.03137254901960784", "8/255"),
        ("0.0157", "4/255"),
        ("0.016", "4/255"),
        ("0.004", "1/255"),
        (".5", "1/2"),
        ("0.5", "1/2"),
        ("0.25", "1/4"),
        ("0.2", "1/5"),
        ("0.1", "1/10"),
        ("0.75", "3/4"),
        ("1.0", "1"),
        ("0.3", "3/10"),
        ("0.123", "123/1000"),
        ("0.001", "1/1000"),
        ("5e-2", "1/20"),
    ],
)
def test_a_decimal_is_refused_with_the_fraction_it_stands_for(text: str, suggested: str) -> None:
    with pytest.raises(InputError, match=rf"exact fraction.*'{text}'.*Write it as '{suggested}'"):
        parse_eps(text)


@pytest.mark.parametrize(
    "junk", ["", "eight", "8/0", "8/", "/255", "-8/255", "nan", "inf", "1e999", "8/255/2", "8 / 255"]
)
def test_junk_is_refused_without_a_suggestion(junk: str) -> None:
    with pytest.raises(InputError, match="exact fraction") as error:
        parse_eps(junk)
    assert "Write it as" not in str(error.value)


@pytest.mark.parametrize("value", [0.5, True, None, (8, 255)])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="exact fraction"):
        parse_eps(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, Fraction(-8, 255)])
def test_a_negative_radius_is_refused(value: int | Fraction) -> None:
    with pytest.raises(InputError, match="negative"):
        parse_eps(value)


@given(st.fractions(min_value=0, max_value=10))
def test_what_is_printed_can_be_read(eps: Fraction) -> None:
    assert parse_eps(str(eps)) == eps


def test_a_threat_model_is_exact_printable_and_hashable() -> None:
    threat = ThreatModel("linf", "16/510")  # type: ignore[arg-type]
    assert threat.eps == Fraction(8, 255)
    assert str(threat) == "linf 8/255"
    assert threat == ThreatModel("linf", Fraction(8, 255))
    assert len({threat, ThreatModel("linf", Fraction(8, 255))}) == 1


def test_unknown_norm_and_knowledge_are_refused() -> None:
    with pytest.raises(InputError, match=r"linf, l2.*'l1'"):
        ThreatModel("l1", Fraction(1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"white-box.*'grey-box'"):
        ThreatModel("l2", Fraction(1), "grey-box")  # type: ignore[arg-type]
