"""The command that guards a number: `assay regress`."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli_options import DefenseOption, ThreadsOption, TrustOption, set_threads
from assay.errors import AssayError, InputError

if TYPE_CHECKING:
    from assay.record import Record
    from assay.regression import Regression

REGRESSED, TROUBLE = 1, 2
"""Exit codes: 1 says that robustness fell and nothing else, so a crash is 2, as with grep and diff."""
_ALPHA = 0.01


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(regress)


def regress(
    baseline: Annotated[Path, typer.Argument(help="The record to hold against: record.json or its folder.")],
    candidate: Annotated[
        Path | None, typer.Argument(help="The record to judge; without one the baseline's defense is run again.")
    ] = None,
    defense: Annotated[
        str | None, typer.Option("--defense", help="Run this one instead: a registered name or module:object.")
    ] = None,
    board: Annotated[
        str | None, typer.Option("--board", "-b", help="The baseline's board, where it is a TOML file of your own.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Only the first N of the baseline's samples.")] = None,
    alpha: Annotated[
        float, typer.Option("--alpha", help="How often an unchanged defense may be called fallen.")
    ] = _ALPHA,
    seed: Annotated[int | None, typer.Option("--seed", help="The rerun's seed, by default the baseline's.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="The rerun's device, by default the baseline's.")
    ] = None,
    option: DefenseOption = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the report here as JUnit XML.")] = None,
    trust: TrustOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Tells whether a defense's robustness has fallen below a baseline's, on which samples, and with which p-value.

    A rerun is kept in the cache: as long as weights, source and code are unchanged it costs nothing.
    Exit codes: 0 no drop beyond chance, 1 a significant drop or a check that newly fails, 2 bad arguments, records
    that can't be compared, or a crash.
    """
    again = {"defense": defense, "board": board, "seed": seed, "device": device, "option": option}
    try:
        found = _compared(baseline, candidate, n, alpha, again, trust=trust, threads=threads)
        _write(found, json_, junit)
    except InputError:
        raise
    except AssayError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        raise typer.Exit(TROUBLE) from error
    except Exception:
        traceback.print_exc(file=sys.stderr)
        sys.exit(TROUBLE)
    typer.echo(found.text())
    raise typer.Exit(0 if found.ok else REGRESSED)


def _compared(
    baseline: Path,
    candidate: Path | None,
    n: int | None,
    alpha: float,
    again: Mapping[str, Any],
    *,
    trust: bool,
    threads: int | None,
) -> Regression:
    """The comparison; `again` are the options of a rerun, by name."""
    from assay.record import read_record
    from assay.regress import compare

    before = read_record(baseline, files=True)
    if candidate is None:
        return compare(before, _measured(before, n, alpha, again, trust=trust, threads=threads), n=n, alpha=alpha)
    if given := [f"--{name}" for name, value in again.items() if value is not None]:
        raise InputError(f"{', '.join(given)} is for a rerun, but the finished record {candidate} is given.")
    return compare(before, read_record(candidate, files=True), n=n, alpha=alpha)


def _measured(
    before: Record, n: int | None, alpha: float, again: Mapping[str, Any], *, trust: bool, threads: int | None
) -> Record:
    from assay.defense import read_options
    from assay.progress import Progress
    from assay.rerun import rerun

    # Threads can change the last bits of a result, so an unchanged defense gets the baseline's.
    set_threads(threads if threads is not None else before.provenance.threads)
    given = {name: value for name, value in again.items() if name != "option"}
    options = read_options(again["option"]) if again["option"] else None
    done = rerun(before, n=n, alpha=alpha, options=options, trust=trust, watch=Progress, **given)
    typer.echo(f"{'unchanged, so from the cache' if done.cached else 'measured'}: {done.folder}", err=True)
    return done.record


def _write(found: Regression, json_: Path | None, junit: Path | None) -> None:
    from assay.record import write_atomically

    text = json.dumps(found.as_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    for path, content in ((json_, text.encode()), (junit, found.junit())):
        if path is not None:
            try:
                write_atomically(path, content)
            except OSError as error:
                raise InputError(f"the report can't be written to {path}: {error}.") from error
