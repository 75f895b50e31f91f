"""The commands that look at one side of a defense: `assay certify` and `assay check`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from assay.cli_options import (
    EXIT,
    BoardOption,
    DefenseArgument,
    DefenseOption,
    DeviceOption,
    NOption,
    OutOption,
    ProfileOption,
    SeedOption,
    ThreadsOption,
    TrustOption,
    profile_of,
    set_threads,
)

FLAGGED, FAILED = 5, 3
"""Exit codes of `assay check` where a check objects."""


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    app.command()(certify)
    app.command()(check)


def certify(
    defense: DefenseArgument,
    board: BoardOption = "digits-l2",
    profile: ProfileOption = "quick",
    n: NOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    out: OutOption = None,
    option: DefenseOption = None,
    trust: TrustOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Runs the certified half of an evaluation alone: no attack, so no robust accuracy and no row.

    `assay run` does it too, for every defense that certifies, and attacks the certified model at each radius.
    The same command resumes. Exit codes: 0 done, 3 a preflight check failed, 2 bad arguments, 1 a crash.
    """
    from assay import display
    from assay.defense import read_options
    from assay.evaluation import execute
    from assay.prepare import prepare
    from assay.progress import Progress

    set_threads(threads)
    options, chosen = read_options(option or ()), profile_of(profile)
    prepared = prepare(
        defense, board, chosen, n=n, seed=seed, device=device, certify_only=True, trust=trust, options=options
    )
    folder = out or display.default_folder(prepared)
    with Progress(prepared) as reporter:
        record = execute(prepared, folder, reporter=reporter)
    display.outcome(record, folder)
    raise typer.Exit(0 if record.certification is not None else EXIT[record.verdict])


def check(
    defense: DefenseArgument,
    board: BoardOption = "digits-linf",
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    option: DefenseOption = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Run this check alone (repeatable).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust: TrustOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Examines a defense without attacking it: preflight and gradient checks, in minutes, for its author's own loop.

    Exit codes: 0 every check passed, 5 one flagged, 3 one failed, 2 bad arguments.
    """
    from assay import display
    from assay.defense import read_options
    from assay.examine import examine

    set_threads(threads)
    options = read_options(option or ())
    findings = list(examine(defense, board, options, only=only or (), seed=seed, device=device, trust=trust))
    if as_json:
        typer.echo(json.dumps([finding.model_dump(mode="json") for finding in findings], indent=1))
    else:
        display.findings(defense, findings)
    statuses = {finding.status for finding in findings}
    raise typer.Exit(FAILED if "fail" in statuses else FLAGGED if "flag" in statuses else 0)
