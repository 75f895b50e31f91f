"""What defenses with options share: cards that stay true of what was built, and the denoiser that a user brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.card import Card, Votes
from assay.chain import Chain
from assay.defenses.checkpoints import WEIGHTS, load_packaged
from assay.defenses.conditional import cifar10_denoiser, cifar10_files
from assay.defenses.denoiser import Denoiser, UNetDenoiser, small_unet
from assay.defenses.denoiser_sources import denoiser_files, take_denoiser
from assay.digest import sha256_of_file
from assay.errors import InputError

ON_UNET = ("digits", "cifar10") if cifar10_files() else ("digits",)
"""Data sets with a packaged diffusion model."""


def with_files(card: Card, files: Mapping[str, Path], **changes: Any) -> Card:
    """The card with these weight files, and other fields changed."""
    weights = {name: sha256_of_file(path) for name, path in files.items()}
    return card.model_copy(update={**changes, "weights": weights})


def with_traits(card: Card, **traits: bool) -> Card:
    """The card with some traits set."""
    return card.model_copy(update={"traits": card.traits.model_copy(update=traits)})


def without_handle(card: Card, handle: str) -> Card:
    """The card without one of its handles."""
    return card.model_copy(update={"handles": tuple(other for other in card.handles if other != handle)})


def with_votes(card: Card, draws: int) -> Card:
    """The card with another number of votes. A single draw is not voted on, and so it has its own gradient.

    Raises:
        InputError: for fewer than one.
    """
    if draws < 1:
        raise InputError(f"a defense answers from at least 1 vote, got {draws}.")
    voting = card.model_copy(update={"votes": Votes(draws=draws, how=card.votes.how)})
    if draws > 1:
        return voting
    single = without_handle(voting, "votes")
    return with_traits(single, non_differentiable=False) if card.votes.how == "majority" else single


def with_purifier(card: Card, process: Chain) -> Card:
    """The card with another purification before its classifier: one step is no process of several."""
    calls = process.network_calls + 1
    # The chain runs every part again in its backward pass.
    changed = card.model_copy(update={"network_calls": calls, "gradient_calls": 2 * calls})
    return with_traits(changed, iterative=len(process) > 1)


def answers_from(votes: int) -> str:
    """How a majority answers, for a summary."""
    return "answers from one such draw" if votes == 1 else f"answers by a majority of {votes} such draws"


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it needs one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_scale(name: str, value: float) -> None:
    """Refuses a guidance that would push the wrong way.

    Raises:
        InputError: for a negative scale.
    """
    if not value >= 0:
        raise InputError(f"{name} must be at least 0 (0 leaves the guidance out), got {value:g}.")


def unet_files(source: str, dataset: str, packaged: str) -> dict[str, Path]:
    """The weight files that `unet_or_taken` reads, by name."""
    if source:
        return denoiser_files(source)
    return cifar10_files() if dataset == "cifar10" else {packaged: WEIGHTS / packaged}


def unet_or_taken(source: str, dataset: str, packaged: str) -> Denoiser:
    """The denoiser that a user brings; for an empty source the packaged one: a U-Net of digits, or cifar10's, if any.

    Raises:
        InputError: for a source that can't be used, see `take_denoiser`.
    """
    if source:
        return take_denoiser(source, dataset)
    if dataset == "cifar10":
        return cifar10_denoiser()
    denoiser = UNetDenoiser(small_unet())
    load_packaged(denoiser, packaged)
    return denoiser
