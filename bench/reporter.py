"""Who is told how a run gets on."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Told what happens, for progress bars. Every method may do nothing."""

    def begin(self, shard: int, stage: str, samples: int) -> None:
        """A stage starts on so many samples."""

    def calls(self, count: int) -> None:
        """So many samples went forward through the defense."""

    def end(self, shard: int, stage: str) -> None:
        """A stage is finished, or was found finished on disk."""

    def examine(self, check: str) -> None:
        """A check starts."""

    def examined(self, check: str) -> None:
        """A check is finished, or was found finished on disk."""


class Silent:
    """A reporter that reports nothing."""

    def begin(self, shard: int, stage: str, samples: int) -> None:
        """Does nothing."""

    def calls(self, count: int) -> None:
        """Does nothing."""

    def end(self, shard: int, stage: str) -> None:
        """Does nothing."""

    def examine(self, check: str) -> None:
        """Does nothing."""

    def examined(self, check: str) -> None:
        """Does nothing."""
