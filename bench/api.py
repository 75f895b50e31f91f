"""What the command line does, from Python and in notebooks: `assay.run`, `.load_defense`, `.board`, `.examples`.

>>> import assay
>>> assay.board("digits-linf").threat
ThreatModel(norm='linf', eps=Fraction(1, 5), knowledge='white-box')
>>> assay.load_defense("undefended").card.title
'Undefended'
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import PrivateAttr

from assay import boards
from assay.errors import InputError
from assay.protocol import ProfileName
from assay.record import BUNDLE, Record, read_record

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from assay.defense import Defense

Option = str | int | float | bool


class Board(boards.Board):
    """A board that can be run on, and whose table can be read."""

    _leaderboards: Path = PrivateAttr()

    def table(self) -> pd.DataFrame:
        """The board's rows, best first, from the committed records: what its CSV file holds.

        Accuracies in [0, 1], radii in pixel units; a column is missing a value where nothing was measured. Only rows
        of one profile and of group `ranked` may be compared by their `rank`.

        Raises:
            InputError, IntegrityError: for records that are none, or were changed.
        """
        import pandas as pd

        from assay.leaderboards.rows import collect
        from assay.leaderboards.spreadsheet import board_csv

        return pd.read_csv(io.StringIO(board_csv(collect(self._leaderboards, self))))

    def run(self, defense: str, **arguments: Any) -> Record:
        """As `assay.run(defense, board=…, **arguments)` on this board."""
        return run(defense, board=self, **arguments)


def board(name: str, leaderboards: str | Path | None = None) -> Board:
    """A board by name, or from a TOML file.

    Args:
        leaderboards: a folder of boards and records, by default those that this package carries.

    Raises:
        InputError: for an unknown name (with the nearest), or a file that is not a valid board.
    """
    folder = Path(str(resources.files("assay.leaderboards"))) if leaderboards is None else Path(leaderboards)
    found = Board.model_validate(boards.load_board(name, folder).model_dump())
    found._leaderboards = folder
    return found


def load_defense(
    name: str, board: str | boards.Board = "digits-linf", *, device: str = "cpu", trust: bool = False, **options: Option
) -> Defense:
    """A defense as a torch module: `logits = defense(x, noise)`, `x (n, c, h, w)` in [0, 1], `assay.noise.Noise`.

    Args:
        name: a registered defense, `module:object` or `path.py:object`.
        board: whose data set and threat model its weights are for.
        trust: execute code from outside the registry.
        options: the defense's own.

    Raises:
        InputError: for an unknown name or option, or a data set that it has no weights for.
    """
    from assay.registry import resolve_defense

    found = boards.load_board(board) if isinstance(board, str) else board
    spec = resolve_defense(name, trust=trust, norm=found.norm)
    return spec.build(found.dataset, device, _texts(options))


def run(
    defense: str,
    board: str | boards.Board = "digits-linf",
    profile: ProfileName = "quick",
    *,
    n: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    options: Mapping[str, Option] | None = None,
    out: str | Path | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Record:
    """Evaluates a defense under a board's protocol, or resumes that; returns the record, which is on disk too.

    What `assay run` does, with the same arguments; `record.to_frame()` is the table of its samples. Called again
    with the same arguments and unchanged code it returns the record that is there.

    Args:
        defense: a registered defense, `module:object` or `path.py:object`.
        n: only the board's first n samples, which is never ranked.
        options: the defense's.
        out: the run's folder, by default the one that `assay run` takes, under `./runs`.
        trust: execute code from outside the registry.
        progress: print the plan and a bar.

    Raises:
        InputError: for whatever the caller can correct.
        DefenseError, AttackError, CertificateError, IntegrityError: where the run breaks; what was finished is kept.
    """
    from assay.display import default_folder
    from assay.evaluation import execute
    from assay.prepare import prepare
    from assay.progress import Progress
    from assay.protocol import PROFILES
    from assay.reporter import Reporter, Silent

    if profile not in PROFILES:
        raise InputError(f"no profile is called {profile!r}: expected one of {', '.join(PROFILES)}.")
    prepared = prepare(
        defense, board, profile, n=n, seed=seed, device=device, trust=trust, options=_texts(options or {})
    )
    with Progress(prepared) if progress else nullcontext(Silent()) as found:
        reporter: Reporter = found
        return execute(prepared, default_folder(prepared) if out is None else Path(out), reporter=reporter)


class Examples(NamedTuple):
    """Samples of a record, in the board's order.

    Attributes:
        ids: sample ids.
        x: images `(n, c, h, w)` float32 in [0, 1].
        y: labels `(n,)` int64.
        x_adv: each one's strongest adversarial example, like `x`; the image itself or a random point of its ball where
            nothing was stronger.
    """

    ids: tuple[int, ...]
    x: Tensor
    y: Tensor
    x_adv: Tensor


def examples(record: Record | str | Path) -> Examples:
    """A record's adversarial examples with their images and labels.

    Args:
        record: that was read from disk, or its `record.json` or folder.

    Raises:
        InputError: for a record that was not read from disk or measured nothing, or whose data set isn't at hand or
            has other images here.
        IntegrityError: for a file that doesn't match its digest.
    """
    from torch import from_numpy

    from assay import data
    from assay.perturbation import ids_in, strongest

    found = read_record(Path(record)) if isinstance(record, str | Path) else record
    board, path = found.board, found.file(BUNDLE)
    if board.revision != data.describe(board.dataset).revision:
        raise InputError(f"the record is of {board.dataset} {board.revision}; this version reads another revision.")
    ids = ids_in(path)
    x, y = data.load(board.dataset, ids)
    return Examples(tuple(ids), x, y, from_numpy(strongest(path, ids, lambda _: x.numpy())))


def _texts(options: Mapping[str, Option]) -> dict[str, str]:
    """Options as a command line would have them."""
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}
