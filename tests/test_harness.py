"""The harness on defenses whose robust accuracy is known in closed form, and on attacks that cheat or fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from assay import data
from assay.attack import AttackSpec, Target
from assay.boards import Board
from assay.defense import Defense
from assay.errors import AttackError, DefenseError
from assay.guard import vote as _vote
from assay.harness import Job, run_shards
from assay.noise import Noise
from assay.norms import distance
from assay.protocol import PlannedAttack
from assay.reduce import join, sample_table, summarise
from assay.registry import ATTACKS
from assay.reporter import Silent
from assay.rundir import RunDir
from assay.threat import ThreatModel

Fake = Callable[[Target, Tensor, Tensor, ThreatModel, Noise], Any]


def job_of(defense: Defense, board: Board, attacks: Mapping[str, Any], **changes: Any) -> Job:
    """A job with fake attacks (functions), or real ones (name -> options), in the given order."""
    planned, specs = [], {}
    for name, attack in attacks.items():
        options = attack if isinstance(attack, dict) else {}
        registered = options.pop("attack", name)
        specs[registered] = ATTACKS[registered] if isinstance(attack, dict) else AttackSpec(name, "A fake.", attack)
        planned.append(PlannedAttack(name, registered, "pgd", options, ("any: a test",), 1, 1))
    fields = {"board": board, "ids": board.ids, "planned": tuple(planned), "attacks": specs}
    return Job(**{"defense": defense, **fields, "source": None, "checks": (), "seed": 0, **changes})


def idle(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    return x.clone()


@pytest.fixture
def best(zoo: ModuleType) -> Fake:
    """The attack that no other can beat on the zoo's linear defenses."""

    def attack(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
        found: Tensor = zoo.linf_worst_point(x, y, float(threat.eps))
        return found

    return attack


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run", {"a": "test"})


def run(job: Job, store: RunDir) -> dict[str, Any]:
    return join(run_shards(job, store))


class Log(Silent):
    def __init__(self) -> None:
        self.begun: list[tuple[int, str, int]] = []
        self.ended: list[tuple[int, str]] = []
        self.forward = 0

    def begin(self, shard: int, stage: str, samples: int) -> None:
        self.begun.append((shard, stage, samples))

    def calls(self, count: int) -> None:
        self.forward += count

    def end(self, shard: int, stage: str) -> None:
        self.ended.append((shard, stage))


# Closed forms.

REAL = {
    "uniform": {"tries": 10},
    "apgd-ce": {"attack": "apgd", "steps": 20, "loss": "ce"},
    "pgd": {"steps": 20},
    "apgd-t": {"attack": "apgd", "steps": 20, "targets": 3, "loss": "dlr-targeted"},
    "square": {"queries": 200},
}


def real() -> dict[str, Any]:
    return {name: dict(options) for name, options in REAL.items()}


@pytest.mark.parametrize("eps", ["1/50", "1/10", "1/5"])
def test_robust_accuracy_of_a_linear_model_is_the_closed_form_exactly(zoo: ModuleType, store: RunDir, eps: str) -> None:
    board = zoo.board(eps=eps, n=50)
    job = job_of(zoo.LINEAR, board, real())
    arrays = run(job, store)
    x, y = data.load("digits", board.ids)
    exact = zoo.linf_robust(x, y, float(board.threat.eps))
    np.testing.assert_array_equal(arrays["final/correct"] == 1, exact)
    results = summarise(job, arrays)
    assert results.robust.value == exact.mean()
    assert results.clean.value == zoo.linf_robust(x, y, 0.0).mean()
    assert results.robust.n == 50
    for rule in (results.rules.expected, results.rules.worst_of_n, results.rules.majority):
        assert rule.value == results.robust.value
        assert rule.clean == results.clean


@pytest.mark.parametrize("eps", ["1/5", "1/2"])
def test_robust_accuracy_in_l2_is_the_closed_form_within_a_hundredth_of_eps(
    zoo: ModuleType, store: RunDir, eps: str
) -> None:
    board = zoo.board(norm="l2", eps=eps, n=50)
    arrays = run(job_of(zoo.LINEAR, board, real()), store)
    x, y = data.load("digits", board.ids)
    radius = float(board.threat.eps)
    stands = arrays["final/correct"] == 1
    assert stands[zoo.l2_robust(x, y, radius)].all()
    assert not stands[~zoo.l2_robust(x, y, 0.99 * radius)].any()


@pytest.mark.parametrize("q", [0.05, 0.45])
def test_the_three_rules_of_a_stochastic_defense_agree_with_their_closed_forms(
    zoo: ModuleType, store: RunDir, best: Fake, q: float
) -> None:
    board = zoo.board(n=100, shard=30)
    job = job_of(zoo.Abstaining(q), board, {"uniform": {"tries": 3}, "best": best})
    results = summarise(job, run(job, store))
    x, y = data.load("digits", board.ids)
    clean, robust = (zoo.linf_robust(x, y, eps).sum() for eps in (0.0, 0.1))
    right, draws = 1 - q, board.draws
    exact = {"expected": right, "worst_of_n": right**draws, "majority": binom.sf(draws // 2, draws, right)}
    for rule, p in exact.items():
        trials = draws if rule == "expected" else 1
        found = getattr(results.rules, rule)
        for estimate, count in ((found, robust), (found.clean, clean)):
            error = (count * p * (1 - p) / trials) ** 0.5 / 100
            assert abs(estimate.value - p * count / 100) <= 4 * error + 1e-12, rule
            assert estimate.low <= estimate.value <= estimate.high
    assert results.robust.value == results.rules.expected.value
    assert 0 < robust < clean


def test_the_strongest_candidate_is_chosen_among_lucky_ones(zoo: ModuleType, store: RunDir) -> None:
    class Fading(zoo.Abstaining):  # type: ignore[name-defined, misc]
        """Abstains with a probability that the first pixel sets: .45 at 0, .6 at .1."""

        def draw(self, x: torch.Tensor, noise: Noise) -> torch.Tensor:
            logits = zoo.Linear.draw(self, x, noise)
            silent = noise.uniform("abstain", shape=(), like=x) < 0.45 + 1.5 * x[:, 0, 0, 0]
            return torch.cat([logits, torch.where(silent, 1e3, -1e3)[:, None].to(logits)], 1)

    def lit(target: Target, x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        z = x.clone()
        z[:, 0, 0, 0] = 0.1
        return z

    board = zoo.board(n=100, shard=50)
    x, y = data.load("digits", board.ids)
    stands = zoo.linf_robust(x, y, 0.0) & zoo.linf_robust(lit(None, x), y, 0.0)  # type: ignore[arg-type]
    assert (x[:, 0, 0, 0] == 0).all()
    arrays = run(job_of(Fading(), board, {**{f"idle{i}": idle for i in range(8)}, "lit": lit}), store)
    # Among nine candidates at .55, luck on the board's 20 draws would hide the one at .4 from most samples.
    found = arrays["final/correct"][stands].mean() / 20
    assert 0.4 - 0.03 < found < 0.4 + 0.04


def test_the_final_score_is_taken_on_draws_that_chose_nothing(zoo: ModuleType, store: RunDir) -> None:
    board = zoo.board(n=40)
    attacks = {f"idle{i}": idle for i in range(8)}
    arrays = run(job_of(zoo.Abstaining(0.45), board, attacks), store)
    stands = zoo.linf_robust(*data.load("digits", board.ids), 0.0)
    lowest = np.min([arrays[f"{stage}/correct"] for stage in ("clean", *attacks)], axis=0)[stands].mean() / 20
    final = arrays["final/correct"][stands].mean() / 20
    error = (0.45 * 0.55 / 20 / stands.sum()) ** 0.5
    assert lowest < 0.55 - 6 * error  # the minimum of nine scores flatters the attacks
    assert abs(final - 0.55) < 4 * error
    assert len({arrays[f"{stage}/correct"].tobytes() for stage in ("clean", *attacks, "final")}) == 10


def test_certain_samples_leave_and_only_they(zoo: ModuleType, store: RunDir, best: Fake) -> None:
    board = zoo.board()
    seen: list[Tensor] = []

    def watching(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
        seen.append(x.clone())
        return x.clone()

    arrays = run(job_of(zoo.ABSTAINING, board, {"best": best, "watching": watching}), store)
    x, y = data.load("digits", board.ids)
    clean, robust = zoo.linf_robust(x, y, 0.0), zoo.linf_robust(x, y, 0.1)
    np.testing.assert_array_equal(arrays["best/attempted"], clean)
    np.testing.assert_array_equal(arrays["watching/attempted"], robust)
    assert torch.equal(torch.cat(seen), x[robust])
    # The broken keep the candidate that broke them, those that stand keep something in the ball.
    np.testing.assert_array_equal(arrays["final/correct"] == 0, ~robust)
    candidates = torch.from_numpy(arrays["adversarial"])
    assert torch.equal(candidates[~robust & clean], zoo.linf_worst_point(x, y, 0.1)[~robust & clean])
    assert bool((distance("linf", candidates, x) <= 0.1 + 1e-7).all())


def test_a_sample_wrong_in_one_set_of_draws_alone_stays(zoo: ModuleType, store: RunDir) -> None:
    # Wrong with probability .93: all 20 draws are wrong for about a quarter of the samples, 40 for one in 18.
    board = zoo.board(n=100)
    arrays = run(job_of(zoo.Abstaining(0.93), board, {"idle": idle}), store)
    lost = arrays["clean/correct"] == 0
    certain = arrays["clean/certain"]
    assert not (certain & ~lost).any()
    assert 0 < certain.sum() < lost.sum()
    np.testing.assert_array_equal(arrays["idle/attempted"], ~certain)


def test_a_vote_needs_more_than_a_tie() -> None:
    answers = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 2], [1, 1, 1, 1], [0, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(answers, 3).float()
    right, majority = _vote(logits, torch.zeros(5, dtype=torch.int64))
    assert right.tolist() == [2, 3, 2, 0, 4]
    assert majority.tolist() == [False, True, True, False, True]


# Every candidate is verified by the harness.


def just_outside(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    z = x.double() + (float(threat.eps) + 1e-6) * torch.where(x > 0.5, -1, 1)
    return z.float()


def outside_the_box(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    return x - 1e-3


def not_a_number(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    z = x.clone()
    z[0, 0, 3, 3] = torch.nan
    return z


def infinite(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    z = x.clone()
    z[0, 0, 3, 3] = torch.inf
    return z


def fewer_rows(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    return x[1:]


def double(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    return x.double()


def nothing(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> None:
    return None


def raising(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    raise KeyError("steps")


def moving_the_image(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    return x.copy_(1 - x)


def moving_image_and_label(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
    y.add_(1).remainder_(10)
    return x.zero_()


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (just_outside, "1e-06"),
        (outside_the_box, "0.001"),
        (not_a_number, "left its budget"),
        (infinite, "left its budget"),
        (fewer_rows, "expected candidates"),
        (double, "expected candidates"),
        (nothing, "NoneType"),
        (raising, "KeyError"),
        (moving_the_image, "left its budget"),
        (moving_image_and_label, "left its budget"),
    ],
)
def test_an_attack_that_cheats_or_fails_is_an_error_and_never_robustness(
    zoo: ModuleType, store: RunDir, attack: Fake, says: str
) -> None:
    board = zoo.board()
    with pytest.raises(AttackError) as error:
        run(job_of(zoo.LINEAR, board, {"idle": idle, "culprit": attack}), store)
    message = str(error.value)
    assert says in message
    assert "culprit" in message
    if attack not in (fewer_rows, double, nothing):
        named = [int(i) for i in re.search(r"samples \[?([\d, ]+)", message)[1].split(",")]  # type: ignore[index]
        assert set(named) <= set(board.ids[:15])
    if attack in (not_a_number, infinite):
        assert named == [board.ids[0]]
    assert {path.name for path in (store.path / "shards").iterdir()} == {"0000.clean.part", "0000.idle.part"}


def test_a_candidate_that_still_has_a_graph_is_taken(zoo: ModuleType, store: RunDir) -> None:
    def attached(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
        return x.clone().requires_grad_() * 1

    assert "final/correct" in run(job_of(zoo.LINEAR, zoo.board(), {"attached": attached}), store)


def test_float32_rounding_is_no_violation(zoo: ModuleType, store: RunDir) -> None:
    def rounding(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
        return (x + float(threat.eps)).clamp(0, 1)

    run(job_of(zoo.LINEAR, zoo.board(), {"rounding": rounding}), store)


# Defenses that fail in the middle of a run.


@pytest.mark.parametrize(("fault", "says"), [("crash", "out of paper"), ("shape", "(15, 9)"), ("nan", "not finite")])
def test_a_defense_that_fails_on_attacked_inputs_is_one_error_that_keeps_what_was_done(
    zoo: ModuleType, store: RunDir, fault: str, says: str
) -> None:
    board = zoo.board()
    defense = zoo.Misbehaving(fault, late=True)
    job = job_of(defense, board, {"idle": idle, "uniform": {"tries": 2}})
    with pytest.raises(DefenseError) as error:
        run(job, store)
    assert says in str(error.value)
    assert "attack uniform" in str(error.value)
    stands = zoo.linf_robust(*data.load("digits", board.ids[:15]), 0.0)
    standing = {i for i, ok in zip(board.ids[:15], stands, strict=True) if ok}
    assert set(error.value.sample_ids) == standing
    assert str(error.value.sample_ids[0]) in str(error.value)
    assert {path.name for path in (store.path / "shards").iterdir()} == {"0000.clean.part", "0000.idle.part"}

    defense.fault = None
    log = Log()
    arrays = run(replace(job, reporter=log), store)
    assert log.begun[0] == (0, "uniform", len(standing))
    assert [stage for shard, stage in log.ended if shard == 0] == ["clean", "idle", "uniform", "final"]
    fresh = run(job, RunDir(store.path.parent / "fresh", {"a": "test"}))
    np.testing.assert_array_equal(arrays["adversarial"], fresh["adversarial"])


# Accounting and resume.


def test_finished_shards_are_not_computed_again(zoo: ModuleType, store: RunDir) -> None:
    job = job_of(zoo.ABSTAINING, zoo.board(), {"idle": idle})
    first, log = run(job, store), Log()
    again = run(replace(job, reporter=log), store)
    assert log.begun == []
    assert log.forward == 0
    assert log.ended == [(shard, stage) for shard in range(3) for stage in ("clean", "idle", "final")]
    np.testing.assert_array_equal(first["adversarial"], again["adversarial"])


def test_calls_are_charged_to_the_samples_that_caused_them(zoo: ModuleType, store: RunDir) -> None:
    def three(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
        target.draws(x[1:], noise[1:], 2)
        target.gradient(x, (y,), lambda z, t: z.sum(1), noise)
        return x.clone()

    log = Log()
    job = job_of(zoo.ABSTAINING, zoo.board(n=5), {"three": three}, reporter=log)
    arrays = run(job, store)
    attempted = arrays["three/attempted"]
    first = int(attempted.argmax())
    expected = np.where(attempted, 3 + 20, 0)
    expected[first] -= 2
    np.testing.assert_array_equal(arrays["three/forward"], expected)
    np.testing.assert_array_equal(arrays["three/backward"], attempted.astype(int))
    assert log.forward == sum(arrays[f"{stage}/forward"].sum() for stage in job.stages)


def test_an_attack_that_never_asks_the_target_still_costs_time(
    zoo: ModuleType, store: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("assay.shard.time.perf_counter", lambda: float(next(clock)))
    job = job_of(zoo.LINEAR, zoo.board(n=5), {"idle": idle})
    arrays = run(job, store)
    assert arrays["idle/seconds"].sum() == pytest.approx(2)  # one tick for the attack, one for its score


def test_shards_do_not_change_what_a_stochastic_sample_answers(zoo: ModuleType, tmp_path: Path) -> None:
    attacks = {"pgd": {"steps": 3, "eot": 4}}
    found = [
        run(job_of(zoo.ABSTAINING, zoo.board(shard=size), {k: dict(v) for k, v in attacks.items()}),
            RunDir(tmp_path / str(size), {}))
        for size in (40, 7)
    ]  # fmt: skip
    for name in ("clean/correct", "pgd/correct", "final/correct"):
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_the_sample_table_says_what_the_arrays_say(zoo: ModuleType, store: RunDir, best: Fake) -> None:
    board = zoo.board()
    job = job_of(zoo.ABSTAINING, board, {"best": best, "idle": idle})
    arrays = run(job, store)
    table = sample_table(job, arrays)
    assert table["id"].tolist() == [*board.ids] * 4
    assert table["attack"].unique().tolist() == ["clean", "best", "idle", "final"]
    idle_rows = table[table["attack"] == "idle"]
    assert (idle_rows.loc[~idle_rows["attempted"], "expected"] == 0).all()
    final = table[table["attack"] == "final"]
    assert summarise(job, arrays).robust.value == pytest.approx(final["expected"].mean())
    assert (table["expected"] * 20 == table["correct_draws"]).all() or (~table["attempted"]).any()
    assert ((table["worst_of_n"] == 1) == (table["correct_draws"] == 20)).all()
