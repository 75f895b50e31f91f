"""This project's own guard, with its own plugin: the digits defenses are as robust as their committed records say.

On the same machine a few samples say it to the last bit; elsewhere a drop beyond chance would be seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from assay.pytest_plugin import Robustness

RECORDS = "../leaderboards/records"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("defense", "n"),
    [("undefended", 50), ("saturated_logits", 50), ("adversarial_training", 20), ("trades", 20)],
)
def test_no_digits_defense_fell_below_its_record(robustness: Robustness, defense: str, n: int) -> None:
    found = robustness.holds(baseline=f"{RECORDS}/digits-linf/{defense}/standard", n=n)
    assert len(found.ids) == n
    assert found.comparisons[0].detectable is not None


@pytest.mark.robustness(baseline=f"{RECORDS}/digits-linf/bit_depth/standard", n=20)
def test_bit_depth_is_no_worse_than_its_record() -> None:
    """The marker says it all."""


def test_the_guard_can_fail(robustness: Robustness) -> None:
    baseline = f"{RECORDS}/digits-linf/adversarial_training/standard"
    with pytest.raises(pytest.fail.Exception, match="REGRESSED: robust accuracy fell") as failure:
        robustness.holds("undefended", baseline=baseline, n=20)
    assert "20 of the baseline's 200 samples" in str(failure.value)
