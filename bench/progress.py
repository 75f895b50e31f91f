"""The bar of a run, weighted by how long each stage is estimated to take."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from assay.certifying import CERTIFY
from assay.display import console, duration, plan
from assay.errors import DefenseError
from assay.estimate import seconds_of_checks, seconds_per_sample
from assay.prepare import Prepared


class Progress:
    """A bar over all checks and all stages of all shards, weighted by their estimated time; prints the plan first."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        try:
            self._seconds = seconds_per_sample(prepared.job)
            self._checks = seconds_of_checks(prepared.job, self._seconds)
        except DefenseError:  # for the preflight checks to say: here nothing is known of its speed
            self._seconds, self._checks = dict.fromkeys(prepared.job.stages, 0.0), {}
        self._sizes = [len(shard) for shard in prepared.job.shards]
        self._weights = {
            (i, stage): self._seconds[stage] * size
            for i, size in enumerate(self._sizes)
            for stage in prepared.job.stages
        }
        self._calls = {attack.name: attack.forward for attack in prepared.job.planned}
        if prepared.job.certificate is not None:
            self._calls[CERTIFY] = prepared.job.certificate.most_draws
        self._total = max(sum(self._weights.values()) + sum(self._checks.values()), 1e-9)
        self._done = 0.0
        self._within = 0.0
        self._current: tuple[int, str] | None = None
        self._checking = ""
        self._spent = 0.0
        self._spent_weight = 0.0
        self._started = time.perf_counter()
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=self._total, left="")
        self._note = Text()
        self._live = Live(Group(self._bar, self._note), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        plan(self._prepared, self._seconds, dict(self._checks))
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, shard: int, stage: str, samples: int) -> None:
        """A stage starts; its weight shrinks with the samples still standing."""
        self._current, self._within = (shard, stage), 0.0
        self._started = time.perf_counter()
        size = self._sizes[shard]
        self._bar.update(
            self._task, description=f"shard {shard + 1}/{len(self._sizes)}  {stage}  ({samples} of {size} standing)"
        )

    def calls(self, count: int) -> None:
        """Moves the bar within the stage."""
        if self._current is None:
            return
        stage = self._current[1]
        calls = self._calls.get(stage, 0)
        if calls:
            whole = self._weights[self._current]
            self._within = min(whole, self._within + count * whole / (calls * self._sizes[self._current[0]]))
            self._show()

    def end(self, shard: int, stage: str) -> None:
        """Completes the stage's part of the bar."""
        self._complete(self._weights[(shard, stage)], ran=self._current == (shard, stage))

    def examine(self, check: str) -> None:
        """A check starts; nothing tells how far it is."""
        self._current, self._checking = None, check
        self._started = time.perf_counter()
        self._bar.update(self._task, description=f"check {check}")

    def examined(self, check: str) -> None:
        """Completes the check's part of the bar."""
        # A check that is made again after the attacks has no part of its own.
        self._complete(self._checks.pop(check, 0.0), ran=self._checking == check)
        self._checking = ""

    def _complete(self, weight: float, *, ran: bool) -> None:
        self._done += weight
        if ran:
            self._spent += time.perf_counter() - self._started
            self._spent_weight += weight
        self._current, self._within = None, 0.0
        self._show()

    def _show(self) -> None:
        remaining = self._total - self._done - self._within
        # Stages found on disk took no time: the pace comes from those that ran in this process.
        pace = self._spent / self._spent_weight if self._spent_weight > 0 else 1.0
        self._bar.update(
            self._task, completed=self._done + self._within, left=f"about {duration(remaining * pace)} left"
        )
