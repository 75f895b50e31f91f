"""Shards to results: accuracies with intervals, and the sample table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from assay.certification import estimate, half_of
from assay.job import CLEAN, FINAL, Job
from assay.protocol import PlannedAttack
from assay.record import AttackResult, Certification, Cost, Estimate, Results, RuleResult, Rules, Spent
from assay.rundir import Arrays

_RULES = ("expected", "worst_of_n", "majority")


def join(shards: Sequence[Arrays]) -> Arrays:
    """The shards' arrays, one after the other."""
    return {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}


def _scores(arrays: Arrays, stage: str, draws: int) -> dict[str, NDArray[np.float64]]:
    """Each sample's score under each rule; a sample that was certainly broken before scores 0."""
    attempted = arrays[f"{stage}/attempted"]
    correct = np.where(attempted, arrays[f"{stage}/correct"], 0)
    return {
        "expected": correct / draws,
        "worst_of_n": (correct == draws).astype(np.float64),
        "majority": (attempted & arrays[f"{stage}/majority"]).astype(np.float64),
    }


def scores_of(arrays: Arrays, stage: str, draws: int) -> NDArray[np.float64]:
    """Each sample's expected score `(n,)` under an attack; 0 where it was certainly broken before."""
    return _scores(arrays, stage, draws)["expected"]


def summarise(job: Job, arrays: Arrays, certified: Certification | None = None) -> Results:
    """All accuracies of a run, those of its certified half among them.

    `robust` is measured on each sample's strongest candidate with draws that chose nothing: the
    minimum over attacks of scores from the same draws that selected it would be biased downwards.
    """
    draws = job.board.draws if job.defense.card.traits.stochastic else 1
    by_stage = {stage: _scores(arrays, stage, draws) for stage in job.scored}
    rules = {}
    for rule in _RULES:
        noise = estimate(by_stage["uniform"][rule]) if "uniform" in by_stage else None
        robust = estimate(by_stage[FINAL][rule])
        rules[rule] = RuleResult(**robust.model_dump(), clean=estimate(by_stage[CLEAN][rule]), noise=noise)
    expected = {stage: estimate(scores["expected"]) for stage, scores in by_stage.items()}
    attacks = {planned.name: _attack_result(planned, expected[planned.name], arrays) for planned in job.planned}
    radii = certified.radii if certified is not None else {}
    shares = {text: Estimate(**found.model_dump(include=set(Estimate.model_fields))) for text, found in radii.items()}
    return Results(
        clean=expected[CLEAN], robust=expected[FINAL], attacks=attacks, certified=shares, rules=Rules(**rules)
    )


def _attack_result(planned: PlannedAttack, estimate: Estimate, arrays: Arrays) -> AttackResult:
    column = f"{planned.name}/"
    return AttackResult(
        **estimate.model_dump(),
        family=planned.family,
        attempted=int(arrays[column + "attempted"].sum()),
        broken=int((arrays[column + "attempted"] & arrays[column + "certain"]).sum()),
        options=dict(planned.options),
        reasons=planned.reasons,
        forward=int(arrays[column + "forward"].sum()),
        backward=int(arrays[column + "backward"].sum()),
        seconds=round(float(arrays[column + "seconds"].sum()), 3),
    )


def total_cost(job: Job, arrays: Arrays, checks: Spent) -> Cost:
    """What the whole run took, its checks among it."""
    sums = {
        key: sum(arrays[f"{stage}/{key}"].sum() for stage in job.stages) for key in ("forward", "backward", "seconds")
    }
    return Cost(
        forward=int(sums["forward"]) + checks.forward,
        backward=int(sums["backward"]) + checks.backward,
        seconds=round(float(sums["seconds"]) + checks.seconds, 3),
        checks=checks,
    )


def sample_table(job: Job, arrays: Arrays) -> pd.DataFrame:
    """One row a sample and stage: scores under each rule, norm, calls, seconds, raw counts.

    A row with `attempted` False was not attacked: an earlier attack had certainly broken it. The certified
    radius is the sample's, 0 where its class is wrong or nothing is certified, NaN where nothing was tried.
    """
    draws = job.board.draws if job.defense.card.traits.stochastic else 1
    clean = _scores(arrays, CLEAN, draws)["expected"]
    radius = half_of(job.certificate, arrays).radius if job.certificate else np.full(len(clean), np.nan)
    frames = []
    for stage in job.scored:
        scores = _scores(arrays, stage, draws)
        frames.append(
            pd.DataFrame(
                {
                    "id": arrays["id"],
                    "label": arrays["label"],
                    "attack": stage,
                    "attempted": arrays[f"{stage}/attempted"],
                    "clean": clean,
                    **scores,
                    "correct_draws": arrays[f"{stage}/correct"],
                    "draws": draws,
                    "norm": arrays[f"{stage}/norm"],
                    "forward": arrays[f"{stage}/forward"],
                    "backward": arrays[f"{stage}/backward"],
                    "seconds": arrays[f"{stage}/seconds"],
                    "certified_radius": radius,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def outcome_of(table: pd.DataFrame) -> dict[str, list[Any]]:
    """The sample table without the wall clock, as plain data for a digest."""
    timeless = table.drop(columns=["seconds", "certified_radius"])
    return {str(name): column.tolist() for name, column in timeless.items()}


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """The table as a parquet file."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, engine="pyarrow", compression="zstd")
    return buffer.getvalue()
