"""Cards of a defense with other options than the registry's: what a card says stays true of what was built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.card import Card, Votes
from assay.digest import sha256_of_file
from assay.errors import InputError


def with_files(card: Card, files: Mapping[str, Path], **changes: Any) -> Card:
    """The card with these weight files, and other fields changed."""
    weights = {name: sha256_of_file(path) for name, path in files.items()}
    return card.model_copy(update={**changes, "weights": weights})


def with_votes(card: Card, draws: int) -> Card:
    """The card with another number of votes. A single draw is not voted on, and so it has its own gradient.

    Raises:
        InputError: for fewer than one.
    """
    if draws < 1:
        raise InputError(f"a defense answers from at least 1 vote, got {draws}.")
    changes: dict[str, Any] = {"votes": Votes(draws=draws, how=card.votes.how)}
    if draws == 1:
        changes["handles"] = tuple(handle for handle in card.handles if handle != "votes")
        if card.votes.how == "majority":
            changes["traits"] = card.traits.model_copy(update={"non_differentiable": False})
    return card.model_copy(update=changes)
