"""The command line: parse, one call, exit code. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from assay import __version__, cli_examine, cli_regress, cli_site, cli_submit, cli_verify
from assay.cli_options import (
    EXIT,
    AttackOption,
    BoardOption,
    DefenseArgument,
    DefenseOption,
    DeviceOption,
    FolderOption,
    NOption,
    OutOption,
    ProfileOption,
    SeedOption,
    ThreadsOption,
    TrustOption,
    profile_of,
    set_threads,
)
from assay.errors import AssayError, AttackError, CertificateError, DefenseError, InputError

_INTERRUPTED = 130

app = typer.Typer(
    name="assay",
    help="How much of a defense's claimed adversarial robustness is real.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"assay {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists defenses, attacks, certificates and boards, with their traits; loads no weights."""
    from assay import display
    from assay.boards import board_names, load_board
    from assay.registry import ATTACKS, CERTIFICATES, DEFENSES

    plugged, broken = DEFENSES.plugins()
    more_attacks, broken_attacks = ATTACKS.plugins()
    more_certificates, broken_certificates = CERTIFICATES.plugins()
    defenses = [*(DEFENSES[name] for name in DEFENSES), *plugged.values()]
    attacks = [*(ATTACKS[name] for name in ATTACKS), *more_attacks.values()]
    certificates = [*(CERTIFICATES[name] for name in CERTIFICATES), *more_certificates.values()]
    for message in (broken | broken_attacks | broken_certificates).values():
        typer.secho(f"warning: {message}", fg="yellow", err=True)
    boards = [load_board(name) for name in board_names()]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "defenses": [{**spec.card.model_dump(mode="json"), "options": spec.options} for spec in defenses],
                    "attacks": [{"name": a.name, "summary": a.summary, "handles": a.handles} for a in attacks],
                    "certificates": [{"name": c.name, "summary": c.summary, "source": c.source} for c in certificates],
                    "boards": [board.model_dump(mode="json", exclude={"ids"}) for board in boards],
                },
                indent=1,
            )
        )
        return
    display.registry(defenses, attacks, certificates, boards)


@app.command()
def plan(
    defense: DefenseArgument,
    board: BoardOption = "digits-linf",
    profile: ProfileOption = "quick",
    n: NOption = None,
    device: DeviceOption = "cpu",
    attack: AttackOption = None,
    option: DefenseOption = None,
    trust: TrustOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Shows which attacks are mandatory and why, their cost, and the estimated time; runs none."""
    from assay import display
    from assay.defense import read_options
    from assay.estimate import seconds_of_checks, seconds_per_sample
    from assay.prepare import prepare

    set_threads(threads)
    options = read_options(option or ())
    prepared = prepare(
        defense, board, profile_of(profile), n=n, device=device, only=attack or (), trust=trust, options=options
    )
    seconds = seconds_per_sample(prepared.job)
    display.plan(prepared, seconds, seconds_of_checks(prepared.job, seconds))


@app.command()
def run(
    defense: Annotated[str | None, typer.Argument(help="A registered name, module:object or path.py:object.")] = None,
    board: BoardOption = "digits-linf",
    profile: ProfileOption = "quick",
    n: NOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    out: OutOption = None,
    attack: AttackOption = None,
    option: DefenseOption = None,
    trust: TrustOption = False,
    all_: Annotated[
        bool, typer.Option("--all", help="Run every registered defense that has weights for the board.")
    ] = False,
    publish: Annotated[
        Path | None, typer.Option("--publish", help="Copy the finished record into this leaderboards folder.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Evaluates a defense under a board's protocol; prints verdict and row, writes the record.

    The same command resumes an interrupted run. Exit codes: 0 verified or flagged, 3 failed,
    4 incomplete, 2 bad arguments, 1 a crash or an error of the run (what was finished is kept).
    """
    from assay import display
    from assay.defense import read_options
    from assay.evaluation import execute
    from assay.prepare import prepare
    from assay.progress import Progress
    from assay.publish import publish_record
    from assay.registry import DEFENSES

    if all_ == (defense is not None):
        raise InputError("give one defense, or --all.")
    if all_ and out is not None:
        raise InputError("--out names one run's folder; with --all the runs lie under ./runs.")
    if all_ and option:
        raise InputError("--option is for one defense; with --all each runs with its defaults.")
    if publish is not None and not (publish / "boards").is_dir():
        raise InputError(f"--publish {publish}: no boards/ in it; expected a leaderboards folder.")
    if publish is not None and attack:
        raise InputError("--attack makes the record incomplete, so it can't be published.")
    chosen, options = profile_of(profile), read_options(option or ())
    set_threads(threads)
    names = [defense] if defense is not None else list(DEFENSES)
    worst = 0
    for name in names:
        if all_ and not _has_weights(name, board):
            display.console.print(f"[dim]{name}: no weights for this board's data set, skipped.[/dim]")
            continue
        prepared = prepare(
            name, board, chosen, n=n, seed=seed, device=device, only=attack or (), trust=trust, options=options
        )
        folder = out or display.default_folder(prepared)
        try:
            with Progress(prepared) as reporter:
                record = execute(prepared, folder, reporter=reporter)
        except (DefenseError, AttackError, CertificateError) as error:
            if not all_:
                raise
            # One broken defense doesn't stop the night's other rows.
            typer.secho(f"{name}: {type(error).__name__}: {error}", fg="red", err=True)
            worst = max(worst, 1)
            continue
        display.outcome(record, folder)
        if publish is not None:
            display.console.print(f"published to {publish_record(folder, publish)}")
        worst = max(worst, EXIT[record.verdict])
    raise typer.Exit(worst)


@app.command()
def show(
    record: Annotated[Path, typer.Argument(help="record.json, or the folder that holds it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the record itself.")] = False,
) -> None:
    """Shows a record: verdict, numbers with intervals, findings; checks its digests and its certified numbers first."""
    from assay import display
    from assay.certification import rederive
    from assay.record import read_record

    found = read_record(record, files=True)
    rederive(found, record if record.is_dir() else record.parent)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1, sort_keys=True))
    else:
        display.outcome(found, record if record.is_dir() else record.parent)


@app.command()
def tables(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a table is out of date.")] = False,
    leaderboards: FolderOption = None,
) -> None:
    """Renders every board's tables from its committed records and claims, as Markdown, CSV and LaTeX."""
    from assay.leaderboards.render import check_tables, write_tables

    folder = leaderboards or Path("leaderboards")
    if not (folder / "boards").is_dir():
        raise InputError(f"{folder} holds no boards/; run this in a checkout or give --leaderboards DIR.")
    if check:
        stale = check_tables(folder)
        if stale:
            typer.echo("out of date: " + ", ".join(str(path) for path in stale) + "; run `assay tables`.", err=True)
            raise typer.Exit(1)
        typer.echo("all tables are up to date")
        return
    for path in write_tables(folder):
        typer.echo(path)


def _has_weights(name: str, board: str) -> bool:
    from assay.boards import load_board
    from assay.registry import DEFENSES

    spec = DEFENSES[name]
    # One without data sets runs on any, unless it needs to be told what it is.
    return load_board(board).dataset in spec.card.datasets or not (spec.card.datasets or spec.needs)


for commands in (cli_examine, cli_submit, cli_verify, cli_regress, cli_site):
    commands.add_to(app)


def main(arguments: list[str] | None = None) -> Any:
    """Runs the command line; an `AssayError` becomes one message and an exit code, not a traceback."""
    try:
        return app(arguments)
    except InputError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except AssayError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(1)
    except SystemExit as leaving:
        if leaving.code == _INTERRUPTED:  # typer has turned the KeyboardInterrupt into its exit code
            typer.secho("interrupted; the same command resumes the run.", err=True)
        raise


if __name__ == "__main__":
    main()
