"""Claims: what a file of them must say, where they stand in the tables, and that they never touch a rank."""

from __future__ import annotations

import csv
import io
import re
import runpy
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from assay.boards import load_board
from assay.errors import InputError
from assay.leaderboards.claims import Claim, claimed_text, load_claims, of_board
from assay.leaderboards.render import render
from assay.leaderboards.rows import collect
from assay.protocol import PROTOCOLS
from assay.registry import DEFENSES

zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("record_zoo.py"))))
LEADERBOARDS = Path(__file__).parents[1] / "leaderboards"

HERE = """
[[claim]]
defense = "trained"
title = "Trained"
what = "robust"
dataset = "digits"
norm = "linf"
eps = "1/5"
[[claim.claimed]]
value = 0.95
attack = "PGD-20"
source.title = "A paper"
source.url = "https://example.org/a"
read = "table 1"
[[claim.fell_to]]
value = 0.4
precision = "about"
rule = "worst draw"
source.title = "Another paper"
read = "figure 2, from a third paper"
note = "Of 100 images."
"""
ELSEWHERE = HERE.replace('eps = "1/5"', 'eps = "8/255"').replace('"digits"', '"cifar10"')
CERTIFIED = """
[[claim]]
defense = "fair"
title = "Fair"
what = "certified"
dataset = "digits"
norm = "l2"
eps = "1/2"
envelope = true
[[claim.claimed]]
value = 0.8
precision = "at least"
source.title = "A paper"
read = "table 1"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A leaderboards folder with the boards `board` (linf 1/5) and `balls` (l2, radii), and no records."""
    monkeypatch.setitem(PROTOCOLS, "test.1", zoo.PROTOCOL)  # type: ignore[misc]
    zoo.write_board(tmp_path)
    zoo.write_board(tmp_path, "balls", radii=zoo.RADII)
    (tmp_path / "claims").mkdir()
    return tmp_path


def claim(folder: Path, *texts: str, name: str = "some") -> None:
    (folder / "claims" / f"{name}.toml").write_text("".join(texts))


def texts_of(folder: Path) -> dict[str, str]:
    return {path.name: content.decode() for path, content in render(folder).items()}


def test_a_claim_belongs_to_the_board_of_its_setting_only(folder: Path) -> None:
    claim(folder, HERE, ELSEWHERE, CERTIFIED)
    claims = load_claims(folder)
    assert [each.setting for each in claims] == [
        "digits, ℓ∞ 1/5", "cifar10, ℓ∞ 8/255", "digits, certified at ℓ2 1/2",
    ]  # fmt: skip
    assert of_board(claims, load_board("board", folder)) == claims[:1]
    assert of_board(claims, load_board("balls", folder)) == claims[2:]
    assert collect(folder, load_board("board", folder)).claims == claims[:1]


def test_claims_change_no_measured_cell_and_no_rank(folder: Path) -> None:
    zoo.write(folder, "trained", 0.5)
    zoo.write(folder, "better", 0.8)
    without = list(csv.DictReader(io.StringIO(texts_of(folder)["board.csv"])))
    claim(folder, HERE, ELSEWHERE)
    texts = texts_of(folder)
    with_ = list(csv.DictReader(io.StringIO(texts["board.csv"])))
    told = "this setting: 95 (PGD-20); cifar10, ℓ∞ 8/255: 95 (PGD-20)"
    assert [row.pop("claimed_elsewhere") for row in with_] == ["", told]
    assert [row.pop("claimed_elsewhere") for row in without] == ["", ""]
    assert with_ == without
    assert "& 95" not in texts["board.tex"]
    row = collect(folder, load_board("board", folder)).tables[0].rows[1]
    assert [each.dataset for each in row.claims] == ["digits", "cifar10"]
    assert row.known == 0.5


def test_markdown_has_a_column_of_claims_and_tells_how_they_fell(folder: Path) -> None:
    zoo.write(folder, "trained", 0.5)
    claim(folder, HERE, ELSEWHERE)
    text = texts_of(folder)["board.md"]
    header = next(line for line in text.splitlines() if line.startswith("| rank"))
    row = next(line for line in text.splitlines() if line.startswith("| 1 "))
    cells = dict(zip(header.split("|"), row.split("|"), strict=True))
    assert cells[" claimed elsewhere "] == " this setting: 95 (PGD-20); cifar10, ℓ∞ 8/255: 95 (PGD-20) "
    claimed, later = "95 (PGD-20), [A paper](https://example.org/a)", "about 40 (worst draw), Another paper"
    assert f"| Trained | {claimed} | {later} | 50.0, Trained |" in text
    assert "- Figure 2, from a third paper: Trained about 40 \\[Of 100 images.\\]." in text
    assert "| Trained | robust | 95 (PGD-20), [A paper](https://example.org/a) | – | table 1 | – |" in text


def test_a_reconstruction_is_not_shown_as_the_claimed_system(folder: Path) -> None:
    zoo.write(folder, "trained", 0.5, reconstruction=True)
    claim(folder, HERE)
    assert "50.0, Trained (a reconstruction, not the claimed system) |" in texts_of(folder)["board.md"]


def test_boards_without_claims_have_no_column_and_claims_need_no_row(folder: Path) -> None:
    zoo.write(folder, "other", 0.5)
    claim(folder, HERE)
    text = texts_of(folder)["board.md"]
    assert "claimed elsewhere |" not in text
    assert "about 40 (worst draw), Another paper | – |" in text
    assert "How claims fell" not in texts_of(folder)["balls.md"]


def test_claims_that_no_board_has_stand_in_the_index(folder: Path) -> None:
    claim(folder, HERE, ELSEWHERE)
    text = texts_of(folder)["index.md"]
    assert "| Trained | cifar10, ℓ∞ 8/255 | 95 (PGD-20)" in text
    assert "digits, ℓ∞ 1/5" not in text


def test_a_certified_claim_stands_beside_the_share_at_its_radius(folder: Path) -> None:
    zoo.write(folder, "fair", 0.7, on="balls", found=zoo.smoothed(0.5, 0.8))
    claim(folder, CERTIFIED)
    text = texts_of(folder)["balls.md"]
    assert "| Fair at 1/2 | 80+, A paper | – | 42.5, Fair |" in text
    assert "| digits, certified, best of several classifiers, at ℓ2 1/2: 80+ |" in text


EVIL = "<script>alert(1)</script> | \\\\input{x} [a](javascript:alert(1))"


def test_other_peoples_text_stays_text(folder: Path) -> None:
    zoo.write(folder, "trained", 0.5)
    changed = HERE.replace("A paper", EVIL).replace("PGD-20", EVIL).replace("table 1", EVIL)
    changed = changed.replace("Of 100 images.", EVIL).replace('title = "Trained"', f'title = "{EVIL}"')
    claim(folder, changed)
    for name, text in texts_of(folder).items():
        if name.endswith(".md"):
            # Escaped characters are text; of the rest nothing may open a tag or a link.
            plain = re.sub(r"\\.", "", text)
            assert "<" not in plain
            assert "](javascript" not in plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("value = 0.95", "value = 95"), r"some\.toml .*claim\.0\.claimed\.0\.value: .*less than or equal to 1"),
        (('eps = "1/5"', 'eps = "0.2"'), "eps must be an exact fraction.*Write it as '1/5'"),
        (('eps = "1/5"', "eps = 0.2"), "eps must be an exact fraction"),
        (('norm = "linf"', 'norm = "l1"'), "claim.0.norm"),
        (('what = "robust"', 'what = "certified"'), "a certified number belongs to an l2 radius"),
        (('read = "table 1"', ""), r"claimed\.0\.read: Field required"),
        (('source.title = "A paper"', ""), r"claimed\.0\.source\.title: Field required"),
        (("https://example.org/a", "javascript:alert(1)"), r"source\.url"),
        (('attack = "PGD-20"', 'atack = "PGD-20"'), r"claimed\.0\.atack: Extra inputs"),
        (('defense = "trained"', 'defense = "../trained"'), r"claim\.0\.defense"),
        (('rule = "worst draw"', 'rule = "best"'), r"fell_to\.0\.rule"),
        (("[[claim]]", "[[claim"), "not a valid list of claims"),
    ],
)
def test_what_is_no_claim_is_refused_with_the_field(folder: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in HERE
    claim(folder, HERE.replace(*change))
    with pytest.raises(InputError, match=f"(?s){message}"):
        render(folder)


def test_text_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "claims" / "some.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"claims/some\.toml is not a valid list"):
        load_claims(folder)


def test_one_system_has_one_claim_in_a_setting_whatever_the_file(folder: Path) -> None:
    claim(folder, HERE, name="a")
    claim(folder, HERE.replace("0.95", "0.96"), name="b")
    with pytest.raises(InputError, match=r"claims/b\.toml claims 'Trained' .* again: claims/a\.toml has it already"):
        load_claims(folder)


def test_one_source_gives_one_number_under_an_attack() -> None:
    plain = tomllib.loads(HERE)["claim"][0]
    twice = {**plain, "claimed": plain["claimed"] * 2}
    with pytest.raises(ValueError, match="two numbers by 'A paper' under the same attack and rule"):
        Claim.model_validate(twice)
    with pytest.raises(ValueError, match="at least one number"):
        Claim.model_validate({**plain, "claimed": [], "fell_to": []})


def test_numbers_are_shown_with_the_figures_that_they_have() -> None:
    number: dict[str, Any] = {"source": {"title": "A"}, "read": "b"}
    plain = tomllib.loads(HERE)["claim"][0]
    shown = [
        Claim.model_validate({**plain, "claimed": [{**number, **each}]}).claimed[0].percent
        for each in (
            {"value": 0.6971}, {"value": 0.7}, {"value": 0.7, "precision": "at least"},
            {"value": 0.05, "precision": "about"}, {"value": 0.0}, {"value": 1.0},
        )
    ]  # fmt: skip
    assert shown == ["69.71", "70", "70+", "about 5", "0", "100"]


# The claims that are packaged


def test_packaged_claims_name_registered_defenses_or_none() -> None:
    claims = load_claims(LEADERBOARDS)
    assert load_claims() == claims
    assert len(claims) > 30
    assert {each.defense for each in claims} - {""} <= set(DEFENSES)


def test_packaged_claims_are_the_notes_figures() -> None:
    claims = {(each.title, each.dataset, each.norm, each.eps): each for each in load_claims(LEADERBOARDS)}
    adp = claims["ADP", "cifar10", "linf", "8/255"]
    assert [number.value for number in (*adp.claimed, *adp.fell_to)] == [0.6971, 0.337]
    diffpure = claims["DiffPure, WRN-70-16", "cifar10", "linf", "8/255"]
    assert [(number.value, number.rule) for number in diffpure.fell_to] == [
        (0.4254, "average"), (0.2266, "worst draw"), (0.1719, "worst draw"), (0.3945, "majority"),
    ]  # fmt: skip
    cohen = [claims["Randomized smoothing (Cohen et al.)", "cifar10", "l2", r] for r in ("1/4", "1/2", "3/4", "1")]
    assert [each.claimed[0].value for each in cohen] == [0.6, 0.43, 0.32, 0.23]
    assert all(each.envelope for each in cohen)


def test_every_later_number_is_below_what_was_claimed() -> None:
    for each in load_claims(LEADERBOARDS):
        lowest = min((number.value for number in each.claimed), default=1.0)
        assert all(number.value < lowest for number in each.fell_to)


def test_numbers_of_one_defense_fit_on_a_line() -> None:
    smoothing = [each for each in load_claims(LEADERBOARDS) if each.defense == "denoised_smoothing"]
    assert claimed_text(smoothing, load_board("digits-l2")) == (
        "cifar10, certified, at ℓ2 1/4: 79.3, 1/2: 65.5, 3/4: 48.7, 1: 35.5"
    )
