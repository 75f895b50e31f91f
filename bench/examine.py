"""An examination without attacks: what `assay check` does, without its printing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from assay import data
from assay.boards import load_board
from assay.checks import GRADIENTS, PREFLIGHT, SAMPLES, Subject, run_checks
from assay.errors import InputError, nearest
from assay.finding import Finding
from assay.noise import Noise
from assay.registry import resolve_defense


def examine(
    name: str,
    board: str,
    options: Mapping[str, str] | None = None,
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> Iterator[Finding]:
    """Runs the preflight and gradient checks on the board's first images, one after the other.

    Args:
        name: a registered defense, `module:object` or `path.py:object`.
        board: a board's name or a path to its TOML.
        options: the defense's options, as text.
        only: these checks alone.
        trust: execute code from outside the registry.

    Raises:
        InputError: for an unknown name of any of these.
    """
    checks = {**PREFLIGHT, **GRADIENTS}
    for each in only:
        if each not in checks:
            raise InputError(f"no check is called {each!r}.{nearest(each, checks)}")
    found = load_board(board)
    defense = resolve_defense(name, trust=trust, norm=found.norm).build(found.dataset, device, dict(options or {}))
    ids = found.ids[:SAMPLES]
    x, y = data.load(found.dataset, ids, device=device)
    subject = Subject(defense, x, y, ids, Noise.from_seed(seed, ids).child("preflight"), found.threat)
    yield from run_checks(subject, only or checks)
