"""The commands of who keeps a leaderboard, or doubts one: `assay verify` and `assay audit`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli_options import DeviceOption, FolderOption, ThreadsOption, TrustOption, set_threads
from assay.errors import InputError

if TYPE_CHECKING:
    from assay.auditing import Outcome
    from assay.verify import Report

_COLOURS = {"ok": "green", "failed": "red", "skipped": "yellow"}
_FAILED = 1


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    app.command()(verify)
    app.command()(audit)


def verify(
    paths: Annotated[list[Path], typer.Argument(help="Records, or folders that hold some at any depth.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    no_defense: Annotated[
        bool, typer.Option("--no-defense", help="Load no defense, so score no stored example again.")
    ] = False,
    leaderboards: FolderOption = None,
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Of the fresh draws.")] = 0,
    trust: TrustOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Computes records again: digests, protocol, numbers, norms, and the scores of the stored adversarial examples.

    Exit codes: 0 nothing failed, 1 something did, 2 bad arguments.
    """
    from assay.verify import verify_record

    found = list(_records(paths))
    set_threads(threads)
    reports = []
    for path in found:
        report = verify_record(
            path, defense=not no_defense, leaderboards=_folder(leaderboards), trust=trust, device=device, seed=seed
        )
        reports.append(report)
        if not as_json:
            _print(report, whole=len(found) == 1, without=("scores",) if no_defense else ())
    if as_json:
        typer.echo(json.dumps([_plain_report(report) for report in reports], indent=1))
    else:
        failed = sum(not report.ok for report in reports)
        typer.echo(f"{len(reports)} record{'s' * (len(reports) != 1)}: {len(reports) - failed} ok, {failed} failed")
    raise typer.Exit(0 if all(report.ok for report in reports) else _FAILED)


def audit(
    record: Annotated[Path, typer.Argument(help="record.json, or the folder that holds it.")],
    bundle: Annotated[
        Path, typer.Argument(help="Adversarial examples: safetensors with id (n,), x_adv (n,c,h,w); or a record's.")
    ],
    by: Annotated[str, typer.Option("--by", help="Who found them.")],
    note: Annotated[str, typer.Option("--note", help="How, in a line.")] = "",
    url: Annotated[str, typer.Option("--url", help="Where to read more.")] = "",
    leaderboards: FolderOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    device: DeviceOption = "cpu",
    seed: Annotated[int | None, typer.Option("--seed", help="Of the fresh draws, by default made up.")] = None,
    trust: TrustOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Scores somebody's adversarial examples; where they are valid and break more, lowers the row's best known number.

    Exit codes: 0 the examples were scored (an audit was written, or nothing is lowered and none was), 1 the record or
    its history doesn't match its digests, 2 bad arguments or a bundle that is none.
    """
    from assay import auditing

    set_threads(threads)
    outcome = auditing.audit(
        record,
        bundle,
        by,
        note=note,
        url=url,
        leaderboards=_folder(leaderboards),
        dry_run=dry_run,
        trust=trust,
        device=device,
        seed=seed,
    )
    for line in _told(outcome):
        typer.echo(_printable(line))


def _folder(given: Path | None) -> Path | None:
    """The leaderboards folder: the one given, or one here."""
    if given is not None:
        if not (given / "boards").is_dir():
            raise InputError(f"{given} holds no boards/; expected a leaderboards folder.")
        return given
    here = Path("leaderboards")
    return here if (here / "boards").is_dir() else None


def _records(paths: Sequence[Path]) -> Iterator[Path]:
    """Every record at or below some paths, each once.

    Raises:
        InputError: for a path that isn't there, or that holds none.
    """
    from assay.record import RECORD

    seen = set()
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} doesn't exist; expected a record, or a folder that holds some.")
        found = sorted(path.rglob(RECORD)) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path} holds no {RECORD}.")
        for file in found:
            if file not in seen:
                seen.add(file)
                yield file


def _print(report: Report, *, whole: bool, without: Sequence[str]) -> None:
    """One line a record, and below it what didn't pass, `without` what nobody asked for; `whole` of one alone."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [item for item in report.items if whole or (item.status != "ok" and item.name not in without)]
    status = "ok" if report.ok else "failed"
    console = Console(highlight=False)
    console.print(Text.assemble((f"{status:<8}", _COLOURS[status]), _printable(str(report.path))), soft_wrap=True)
    if not shown:
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in shown:
        # Text, not markup: what a record calls itself is its author's.
        table.add_row(Text(item.status, _COLOURS[item.status]), Text(item.name), Text(_printable(item.message)))
    console.print(table)


def _plain_report(report: Report) -> dict[str, object]:
    items = [{"name": item.name, "status": item.status, "message": item.message} for item in report.items]
    return {"path": str(report.path), "ok": report.ok, "items": items}


def _told(outcome: Outcome) -> Iterator[str]:
    """What came of an audit, in a few lines."""
    yield f"{outcome.valid} valid examples, {outcome.invalid} that don't count"
    for reason, n in outcome.reasons.items():
        yield f"  {n} {reason}"
    if outcome.note:
        yield f"note: {outcome.note}"
    if not outcome.samples:
        yield f"nothing is lowered: best known robust accuracy stays {100 * outcome.before:.1f} %"
        return
    yield (
        f"{len(outcome.samples)} samples lowered: best known robust accuracy {100 * outcome.before:.1f} % -> "
        f"{100 * outcome.after:.1f} %"
    )
    yield f"written to {outcome.file}" if outcome.file is not None else "nothing was written (dry run)"


def _printable(text: str) -> str:
    """Text that can't steer a terminal: what is not printable is shown by its number."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
