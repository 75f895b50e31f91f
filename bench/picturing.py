"""Pictures computed: a record's own adversarial examples through the defense at hand, one draw of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from assay import data
from assay.defense import Defense
from assay.digest import sha256_of_file
from assay.errors import AssayError, InputError
from assay.noise import Noise
from assay.perturbation import strongest
from assay.pictures import Pictures, choose, write_pictures
from assay.record import BUNDLE, RECORD, SAMPLES, Record, read_record
from assay.registry import resolve_defense


def picture_all(leaderboards: Path, *, device: str = "cpu") -> Iterator[tuple[Path, str]]:
    """Writes the pictures of every record of a leaderboards folder whose defense is registered and at hand.

    Yields:
        each record's folder, and why it got no pictures; an empty reason where it did.

    Raises:
        IntegrityError: for a record, or a file of it, that was changed.
    """
    for file in sorted((leaderboards / "records").rglob(RECORD)):
        record = read_record(file, files=True)
        try:
            found = picture(file.parent, record, device=device)
        # One defense that can't be loaded doesn't keep the others' pictures from being made.
        except AssayError as error:
            yield file.parent, str(error)
            continue
        if found is None:
            yield file.parent, "nothing was attacked, so there is nothing to show"
        else:
            write_pictures(file.parent, record, found)
            yield file.parent, ""


def picture(folder: Path, record: Record, *, device: str = "cpu", trust: bool = False) -> Pictures | None:
    """A record's pictures, by its defense; None for a record without adversarial examples.

    Raises:
        InputError: where the defense, its weights or the data are not at hand, or are others than the record's.
    """
    if BUNDLE not in record.files or SAMPLES not in record.files:
        return None
    table = pd.read_parquet(folder / SAMPLES, columns=["id", "attack", "clean", "expected"], engine="pyarrow")
    final = table[table["attack"] == "final"]
    held, fallen = choose(final["id"].tolist(), final["clean"].tolist(), final["expected"].tolist())
    ids = [*held, *fallen]
    if not ids:
        return None
    defense = at_hand(record, device=device, trust=trust)
    clean, labels = data.load(record.board.dataset, ids, device=device)
    attacked = torch.from_numpy(strongest(folder / BUNDLE, ids, partial(_images, record.board.dataset))).to(device)
    # The same draw for both images of a sample, whatever else is shown.
    noise = Noise.from_seed(record.provenance.seed, rows=len(ids)).child("pictures")
    answers, purified = [], []
    with torch.no_grad():
        for x in (clean, attacked):
            answers.append(defense(x, noise).argmax(-1))
            if "stages" in defense.card.handles:
                purified.append(defense.stages().purify(x, noise.child("purify")).float())
    return Pictures(
        ids=np.array(ids, np.int64),
        labels=labels.cpu().numpy(),
        held=np.array([True] * len(held) + [False] * len(fallen)),
        clean=clean.cpu().numpy(),
        adversarial=attacked.cpu().numpy(),
        purified=torch.stack(purified).cpu().numpy() if purified else None,
        answers=torch.stack(answers).cpu().numpy(),
    )


def _images(dataset: str, ids: Sequence[int]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = data.load(dataset, ids)[0].numpy()
    return found


def at_hand(record: Record, *, device: str = "cpu", trust: bool = False) -> Defense:
    """The record's defense, loaded, with the weights that the record names.

    Raises:
        InputError: for a defense that isn't registered (foreign code runs with `trust` alone), can't be loaded
            here, or has other weights or another data revision than the record.
    """
    board, ref = record.board, record.defense
    if board.revision != data.describe(board.dataset).revision:
        raise InputError(f"the record is of {board.dataset} {board.revision}; this version reads another revision.")
    spec = resolve_defense(ref.name, trust=trust, norm=board.threat.norm)
    defense = spec.build(board.dataset, device, ref.options)
    found = {name: sha256_of_file(path) for name, path in spec.files(board.dataset, ref.options).items()}
    if found != ref.weights:
        raise InputError(f"the weights of {ref.name} that are at hand are not those of the record.")
    return defense
