"""`assay site`: a static site of boards, defenses and records. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli_options import DeviceOption, FolderOption, ThreadsOption, set_threads
from assay.errors import InputError


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(site)


def site(
    out: Annotated[Path, typer.Option("--out", "-o", help="The site's folder: a new one, or one of an earlier call.")],
    leaderboards: FolderOption = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="First compute each record's pictures, with the defenses at hand.")
    ] = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
) -> None:
    """Renders a static site of all boards, defenses and records; it needs no network and no server.

    --pictures writes pictures.safetensors beside each record whose defense is registered and has the record's
    weights: what it answered, and what its purifier made of the images. Exit codes: 0 done, 2 bad arguments,
    1 a record that was changed.
    """
    from assay.leaderboards.site import MARKER, check_out, write_site

    folder = leaderboards or Path("leaderboards")
    if not (folder / "boards").is_dir():
        raise InputError(f"{folder} holds no boards/; run this in a checkout or give --leaderboards DIR.")
    if (folder / MARKER).exists():
        raise InputError(f"{folder} is a site that this command made, not the leaderboards folder it was made from.")
    check_out(out)  # before minutes are spent on pictures
    if pictures:
        from assay.picturing import picture_all

        set_threads(threads)
        for where, reason in picture_all(folder, device=device):
            typer.echo(f"{where}: no pictures: {reason}" if reason else f"{where}: pictures", err=bool(reason))
    written = write_site(folder, out)
    typer.echo(f"{len(written)} pages in {out}; open {out / 'index.html'}")
