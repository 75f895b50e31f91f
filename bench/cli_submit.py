"""The commands of a defense's author: `assay new` and `assay submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli_options import ThreadsOption, TrustOption, set_threads
from assay.errors import InputError

REFUSED = 1
"""Exit code of `assay submit` where something speaks against the row."""


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    app.command()(new)
    app.command()(submit)


def new(
    name: Annotated[str, typer.Argument(help="PACKAGE, or PACKAGE/DEFENSE, in lower case.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write the package's folder into.")] = Path(),
) -> None:
    """Writes a small package with a defense that runs as it is, its card, a test and a README.

    Exit codes: 0 written, 2 bad arguments (nothing is written).
    """
    from assay.scaffold import next_commands, write_package

    folder = write_package(name, to)
    typer.echo(f"{folder}:")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        typer.echo(f"  {path.relative_to(folder)}")
    typer.echo("next:")
    for line in next_commands(name, folder):
        typer.echo(f"  {line}")


def submit(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    to: Annotated[Path, typer.Option("--to", help="The leaderboards folder to lay the row into.")] = Path(
        "leaderboards"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be laid where; write nothing.")] = False,
    source: Annotated[str, typer.Option("--source", help="Where the defense's code is: an address, or a name.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of an earlier record of the row.")] = False,
    trust: TrustOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Checks a finished run, scores its adversarial examples again, and lays it into a leaderboards folder.

    Everything appears at once or nothing does. Exit codes: 0 laid (or there already, or nothing objects to a dry
    run), 1 something objects or a file was changed, 2 bad arguments or a row that is there already.
    """
    from assay.submit import read_submission
    from assay.submit import submit as lay

    if not (to / "boards").is_dir():
        raise InputError(f"{to} holds no boards/; give --to the leaderboards folder of a checkout.")
    set_threads(threads)
    found = read_submission(run, to, source=source, trust=trust)
    for item in found.items:
        colour = {"failed": "red", "skipped": "yellow"}.get(item.status)
        typer.secho(f"{item.status:8}{item.name}: {_plain(item.message)}", fg=colour)
    if not found.ok:
        typer.secho("nothing was laid: see what failed above.", fg="red", err=True)
        raise typer.Exit(REFUSED)
    if not dry_run:
        lay(found, replace=replace)
    state = "is there already" if found.same else "would be laid" if dry_run else "laid"
    typer.echo(f"{state}: {to / found.folder}")
    for name, content in sorted(found.files.items()):
        typer.echo(f"  {name}  {len(content):,} bytes")
    if found.stands and not found.same:
        typer.echo(f"in place of record {found.stands[:12]}" + (", with --replace" if dry_run and not replace else ""))
    if not dry_run and not found.same:
        typer.echo(f"next: assay tables --leaderboards {to}, then commit {to} and open a pull request.")


def _plain(text: str) -> str:
    """Other people's text without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
