"""A pytest plugin: a test that fails where a defense's robustness has fallen below a baseline's.

    @pytest.mark.robustness(baseline="baseline/record.json", defense="my.module:DEFENSE", n=50)
    def test_my_defense_is_as_robust_as_it_was() -> None: ...

    def test_after_compression(robustness):
        robustness.holds("my.module:COMPRESSED", baseline="baseline/record.json")

What a marked test does beyond that is its own affair: it may be empty. Paths are relative to the test's file. The
evaluation behind it is kept in the user's cache (`ASSAY_CACHE`), see `assay.rerun`. Every project that has this
package installed loads this module, so it imports nothing but pytest before a test asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from assay.regression import Regression

_MARKER = "robustness"
_TAKES = "robustness(baseline, defense=None, n=None, alpha=0.01, board=None, seed=None, device=None, options=None)"


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known."""
    config.addinivalue_line(
        "markers", f"{_TAKES}: the defense's robustness hasn't fallen below that of the record `baseline`."
    )


class Robustness:
    """Holds defenses against baselines; `folder` is the one that relative paths start from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def holds(
        self,
        defense: str | None = None,
        *,
        baseline: str | Path,
        n: int | None = None,
        alpha: float | None = None,
        board: str | None = None,
        seed: int | None = None,
        device: str | None = None,
        options: dict[str, str] | None = None,
    ) -> Regression:
        """Fails the test where the defense's robustness has fallen below the baseline's; returns the comparison.

        Args:
            defense: a registered name, `module:object` or `path.py:object`; by default the baseline's, which must
                then be a registered one: code that a test names is trusted, code that a record names is not.
            baseline: a record, or the folder that holds it.
            n: the first so many of its samples, by default all.
            alpha: how often an unchanged defense may be called fallen, by default `assay.regress.ALPHA`.
            board: where the baseline's board is not a packaged one, its TOML file.
            seed, device: of the rerun, by default the baseline's.
            options: the defense's, as text.

        Raises:
            InputError: for whatever the caller can correct.
        """
        __tracebackhide__ = True
        from assay.record import read_record
        from assay.regress import ALPHA, compare
        from assay.rerun import rerun

        level = ALPHA if alpha is None else alpha
        before = read_record(self._folder / baseline, files=True)
        done = rerun(
            before,
            None if defense is None else self._located(defense),
            board=str(self._folder / board) if board is not None and board.endswith(".toml") else board,
            n=n,
            alpha=level,
            seed=seed,
            device=device,
            options=options,
            trust=defense is not None,
        )
        found = compare(before, done.record, n=n, alpha=level)
        if not found.ok:
            pytest.fail(f"{found.text()}\nthe run: {done.folder}", pytrace=False)
        return found

    def _located(self, defense: str) -> str:
        """`path.py:object` from the test's folder, where the file is there; any other name as it is."""
        location, colon, name = defense.rpartition(":")
        here = self._folder / location
        return f"{here}:{name}" if colon and location.endswith(".py") and here.is_file() else defense


@pytest.fixture
def robustness(request: pytest.FixtureRequest) -> Robustness:
    """`robustness.holds(defense, baseline=…)` fails the test where robustness has fallen below the baseline's."""
    return Robustness(request.path.parent)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Judges what a test is marked with, before the test's own body."""
    __tracebackhide__ = True
    for marker in item.iter_markers(_MARKER):
        given: dict[str, Any] = dict(marker.kwargs)
        if marker.args or "baseline" not in given:
            pytest.fail(f"a marker says {_TAKES}, with names; got {marker.args} {given}.", pytrace=False)
        try:
            Robustness(item.path.parent).holds(**given)
        except TypeError as error:
            if "holds()" not in str(error):
                raise
            pytest.fail(f"a marker says {_TAKES}: {error}.", pytrace=False)
