"""Stored adversarial examples answered again: the defense at hand, fresh draws, and what chance may change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor

from assay.boards import Board
from assay.card import explain
from assay.defense import Defense
from assay.digest import sha256_of_file
from assay.errors import AssayError, InputError
from assay.guard import Named, vote
from assay.noise import Noise
from assay.provenance import package_versions, state_sha256
from assay.record import Record
from assay.registry import resolve_defense
from assay.target import Target

Counts = NDArray[np.int64]

LEVEL = 1e-4
"""How often an honest record of a stochastic defense may fail `agreement`, at most."""


class NotAtHandError(InputError):
    """The record's defense, with the record's weights, can't be had here; the message says why."""


def defense_of(record: Record, board: Board, *, device: str = "cpu", trust: bool = False) -> tuple[Defense, str]:
    """The defense of a record, built as its run built it, and what to say of differences that may change answers.

    Raises:
        NotAtHandError: where its name leads nowhere (or needs `trust`), an option was cut to a file's name, or a
            weight file is absent or has another digest.
    """
    ref = record.defense
    try:
        spec = resolve_defense(ref.name, trust=trust, norm=board.norm)
        files = spec.files(board.dataset, ref.options)
        found = {name: sha256_of_file(path) for name, path in files.items()}
        others = sorted(name for name in {*found, *ref.weights} if found.get(name) != ref.weights.get(name))
        if others:
            raise NotAtHandError(f"{ref.name} has other weights here than the record's: {', '.join(others)}")
        defense = spec.build(board.dataset, device, ref.options)
        source = sha256_of_file(spec.source) if spec.source else None
    except NotAtHandError:
        raise
    except AssayError as error:
        raise NotAtHandError(f"{ref.name} can't be had here: {error}") from error
    except Exception as error:  # somebody's code, or a file of weights, may raise anything
        reason = explain(error) if isinstance(error, ValueError) else str(error)
        raise NotAtHandError(f"{ref.name} can't be had here: {type(error).__name__}: {reason}") from error
    made, torch = record.provenance, package_versions().get("torch", "")
    notes = ["its source file has another digest than the record's"] if source != ref.source_sha256 else []
    if ref.state_sha256 not in (None, state_sha256(defense)):
        # Not refused: a buffer that is computed at loading, as a schedule is, may differ in its last bits.
        notes.append("its parameters have another digest than the record's")
    if (made.device, made.packages.get("torch", "")) != (device, torch):
        notes.append(f"the record was made on {made.device} with torch {made.packages.get('torch')}, this is {device} "
                     f"with {torch}")  # fmt: skip
    return defense, "; ".join(notes)


def count_right(
    defense: Defense, board: Board, ids: Sequence[int], images: Tensor, y: Tensor, noise: Noise, draws: int
) -> Counts:
    """How many of a defense's `draws` full answers to each image are right, `(n,)`.

    Args:
        images: `(n, c, h, w)`, one for each of `ids`; `y` `(n,)` the labels.
        noise: a stream for each sample.

    Raises:
        DefenseError: where the defense raises, or answers what isn't finite.
    """
    counts = []
    for start in range(0, len(ids), board.shard):
        part = slice(start, start + board.shard)
        target = Target(defense, len(ids))
        with Named("the evaluation", ids):
            right, _ = vote(target.answer(images[part].clone(), noise[part], repeats=draws), y[part])
        counts.append(right.cpu().numpy().astype(np.int64))
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


def draws_of(record: Record) -> int:
    """The draws behind one score: the board's, of a deterministic defense one."""
    return record.board.draws if record.defense.card.traits.stochastic else 1


def fresh(record: Record, ids: Sequence[int], seed: int, *tag: str) -> Noise:
    """Streams that no stage of the record's own run used, for each of `ids`."""
    return Noise.from_seed(seed, ids).child("rescore", record.digest, *tag)


def agreement(stored: Counts, found: Counts, draws: int) -> tuple[float, float]:
    """Two p-values that both counts `(n,)` of right answers, each of `draws`, are of the same probabilities.

    Nothing is assumed of the probabilities, one a sample: given how many of a sample's 2·draws answers are right,
    those of the second set are hypergeometric (Fisher's conditional argument), which is exact for any number of
    draws. The stored counts have to be of draws that chose nothing, as those of a run's last stage are.

    Returns:
        that the sums agree, from the exact distribution of the sum; and that each sample does, the least of
        the samples' p-values times their number. Both two-sided, at most 1.
    """
    total = stored + found
    free = (total > 0) & (total < 2 * draws)  # nothing can differ where all answers are right, or none
    if not free.any():
        return 1.0, 1.0
    counts = np.arange(draws + 1)
    mass = hypergeom.pmf(counts[None, :], 2 * draws, total[free][:, None], draws)
    both = found[free]
    low = np.where(counts <= both[:, None], mass, 0).sum(1)
    high = np.where(counts >= both[:, None], mass, 0).sum(1)
    each = min(1.0, float((2 * np.minimum(low, high)).min() * free.sum()))
    law = np.ones(1)
    for row in mass:
        law = np.convolve(law, row)
    at = int(both.sum())
    tails = law[: at + 1].sum(), law[at:].sum()
    return min(1.0, 2 * float(min(tails))), each


def fewer(known: Counts, found: Counts, draws: int) -> NDArray[np.float64]:
    """For each sample the one-sided p-value `(n,)` that an example is no worse for the defense than the best known.

    Fisher's exact test of `found` against `known` right answers, each of `draws`.
    """
    return np.asarray(hypergeom.cdf(found, 2 * draws, known + found, draws))


def discoveries(p: NDArray[np.float64], level: float) -> NDArray[np.bool_]:
    """Which of independent hypotheses to reject so that at most `level` of the rejections are false on average.

    The step-up procedure of Benjamini & Hochberg (1995); where all hypotheses are true it rejects any of them with
    probability at most `level`.
    """
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= level * np.arange(1, len(p) + 1) / max(1, len(p)))
    rejected = np.zeros(len(p), dtype=bool)
    if len(below):
        rejected[order[: below[-1] + 1]] = True
    return rejected
