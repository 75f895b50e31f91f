"""A run's findings: each measured once and kept, acted on by the attacks, and decisive for the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import assay.calibrating
import assay.examination
import assay.health
from assay import data
from assay.card import Traits
from assay.checks import PREFLIGHT
from assay.defense import Defense
from assay.evaluation import execute
from assay.examination import Examination
from assay.finding import Finding
from assay.health import AttackHealth
from assay.job import Job, PlannedHealth
from assay.noise import Noise
from assay.prepare import Prepared, prepare
from assay.protocol import PROTOCOLS, PlannedAttack
from assay.record import Record, read_record
from assay.reporter import Silent
from assay.rules import HEALTH
from assay.rundir import RunDir

ZOO = Path(__file__).with_name("defense_zoo.py")


@pytest.fixture
def ready(zoo: ModuleType, toy_source: str) -> Callable[..., Prepared]:
    """`prepare` on the toy board, the whole protocol but for the slow reference AutoAttack and Square."""

    def make(name: str, n: int = 16, **changes: Any) -> Prepared:
        prepared = prepare(f"{ZOO}:{name}", zoo.board(source=toy_source, n=n), trust=True)
        planned = tuple(attack for attack in prepared.job.planned if attack.name not in ("autoattack", "square"))
        return replace(prepared, job=replace(prepared.job, planned=planned, **changes))

    return make


def by_name(record: Record) -> dict[str, Finding]:
    found = {finding.check: finding for finding in record.findings}
    assert len(found) == len(record.findings)
    return found


# What a run finds.


def test_a_run_finds_all_that_its_protocol_names(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    record = execute(ready("LINEAR"), tmp_path)
    protocol = PROTOCOLS["2026.1"]
    found = by_name(record)
    assert set(found) == {*protocol.checks, *protocol.health["quick"].checks}
    assert record.verdict == "verified"
    spent = record.cost.checks
    assert spent is not None
    own = [finding for name, finding in found.items() if name != "calibration"]
    # The defense is asked a second time whether it is constant; the first finding is replaced.
    assert spent.forward >= sum(finding.forward for finding in own) > 0
    assert spent.backward >= sum(finding.backward for finding in own) > 0
    assert record.results is not None
    attacked = sum(attack.forward for attack in record.results.attacks.values())
    assert record.cost.forward > attacked + spent.forward


def test_every_check_of_every_profile_exists() -> None:
    from assay.checks import GRADIENTS
    from assay.checks import HEALTH as CHECKS

    protocol = PROTOCOLS["2026.1"]
    assert set(protocol.checks) == {*PREFLIGHT, *GRADIENTS}
    for rule in protocol.health.values():
        assert set(rule.checks) == {*CHECKS, "constancy", "ablations", "binarization", "calibration"}


class Masked(Defense):
    """A linear model whose answer is rounded: right or wrong as it was, and flat wherever a gradient looks."""

    def __init__(self, linear: Defense) -> None:
        super().__init__()
        self.linear = linear
        self.card = linear.card.model_copy(update={"traits": Traits(non_differentiable=True)})
        self.n_classes = linear.n_classes
        self.eval()

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return torch.nn.functional.one_hot(self.linear.draw(x, noise).argmax(1), self.n_classes).float()


def test_masked_gradients_flag_the_row(ready: Callable[..., Prepared], zoo: ModuleType, tmp_path: Path) -> None:
    prepared = ready("LINEAR")
    masked = replace(prepared, job=replace(prepared.job, defense=Masked(zoo.LINEAR)))
    record = execute(masked, tmp_path)
    found = by_name(record)
    assert record.verdict == "flagged"
    assert found["unbounded"].status == "flag"
    assert found["binarization"].status == "flag"
    assert found["ablations"].status == "pass", "the attack works on the undefended model: it is not to blame"
    assert found["calibration"].status == "pass"


class Turning(Defense):
    """A linear model that answers something else after so many images."""

    def __init__(self, linear: Defense, after: int) -> None:
        super().__init__()
        self.linear, self.card, self.n_classes = linear, linear.card, linear.n_classes
        self.seen, self.after = 0, after
        self.eval()

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        self.seen += len(x)
        return self.linear.draw(x, noise).roll(1 if self.seen > self.after else 0, 1)


def test_a_defense_that_turns_while_it_is_attacked_fails(
    ready: Callable[..., Prepared], zoo: ModuleType, tmp_path: Path
) -> None:
    prepared = ready("LINEAR")
    counting = Turning(zoo.LINEAR, after=10**9)
    execute(replace(prepared, job=replace(prepared.job, defense=counting)), tmp_path / "honest")
    turning = Turning(zoo.LINEAR, after=counting.seen // 2)
    record = execute(replace(prepared, job=replace(prepared.job, defense=turning)), tmp_path / "turning")
    assert by_name(record)["constancy"].status == "fail"
    assert record.verdict == "failed"


# Measured once.


def test_a_finding_on_disk_is_not_measured_again(
    ready: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ready("LINEAR")
    first = execute(prepared, tmp_path)
    (tmp_path / "record.json").unlink()

    def measured(*given: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(assay.examination, "run_checks", measured)
    monkeypatch.setattr(assay.examination, "examine", measured)
    monkeypatch.setattr(assay.health, "examine", measured)
    again = execute(prepared, tmp_path)
    assert again.findings == first.findings
    assert again.cost == first.cost
    assert again.outcome_sha256 == first.outcome_sha256


@pytest.mark.parametrize("lost", ["modes", "eot", "outcomes", "binarization", "constancy-after", "calibration"])
def test_a_run_interrupted_between_checks_ends_in_the_same_record(
    ready: Callable[..., Prepared], tmp_path: Path, lost: str
) -> None:
    prepared = ready("ABSTAINING")
    remembered: dict[str, bytes] = {}

    class Watching(Silent):
        def examine(self, check: str) -> None:
            memory = store.check_file("memory")
            remembered[check] = memory.read_bytes() if memory.is_file() else b""

    store = RunDir(tmp_path, prepared.plan)
    first = execute(prepared, tmp_path, reporter=Watching())
    (tmp_path / "record.json").unlink()
    # As it was when the check began: it and all later ones are lost, and what was remembered since.
    for check in list(remembered)[list(remembered).index(lost) :]:
        store.check_file(check).unlink()
    store.check_file("memory").write_bytes(remembered[lost])
    again = execute(prepared, tmp_path)
    assert again.outcome_sha256 == first.outcome_sha256
    assert again.cost.model_copy(update={"seconds": 0, "checks": None}) == first.cost.model_copy(
        update={"seconds": 0, "checks": None}
    )


def test_a_defense_that_turns_while_its_run_is_interrupted_fails(
    ready: Callable[..., Prepared], zoo: ModuleType, tmp_path: Path
) -> None:
    prepared = ready("LINEAR")
    store = RunDir(tmp_path, prepared.plan)
    assert Examination(prepared.job, store).preflight()
    turned = Turning(zoo.LINEAR, after=0)
    later = Examination(replace(prepared.job, defense=turned, health=PlannedHealth(HEALTH["quick"])), store)
    assert later.preflight(), "from disk"
    later.health(replace(later.job, planned=()), {})
    assert later.findings["constancy"].status == "fail"


def test_a_damaged_finding_is_named(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = ready("LINEAR")
    execute(prepared, tmp_path)
    (tmp_path / "record.json").unlink()
    file = tmp_path / "shards" / "check.modes.finding"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Exception, match=r"check\.modes\.finding"):
        execute(prepared, tmp_path)


def test_a_board_is_calibrated_once(
    ready: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    health = ready("LINEAR").job.health
    assert health is not None
    calibration = health.calibration
    assert calibration is not None
    assert set(calibration.known_broken) == {"bit_depth", "saturated_logits", "random_resize"}
    measured = 0
    original = assay.calibrating.check_board

    def counting(*given: Any, **options: Any) -> Finding:
        nonlocal measured
        measured += 1
        return original(*given, **options)

    monkeypatch.setattr(assay.calibrating, "check_board", counting)
    first = calibration.finding()
    assert first.status == "pass"
    assert calibration.finding() == first
    assert measured == 1
    (file,) = (tmp_path / "cache" / "calibration").iterdir()
    file.write_text(file.read_text()[:-10])
    assert calibration.finding() == first, "a damaged cache costs time, nothing else"
    assert measured == 2
    replace(calibration, protocol="0" * 64).finding()
    assert measured == 3


def test_a_cache_that_cannot_be_written_costs_a_warning(
    ready: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(
        assay.calibrating, "check_board", lambda *_, **__: Finding(check="calibration", status="pass", message="")
    )
    health = ready("LINEAR").job.health
    assert health is not None
    assert health.calibration is not None
    assert health.calibration.finding().status == "pass"
    assert "can't be cached" in caplog.text


# The attack that is run again.


def planned(name: str, family: Any = "pgd", steps: int = 5, **options: Any) -> PlannedAttack:
    return PlannedAttack(name, "pgd", family, {"steps": steps, **options}, (), steps, steps)


def scored(**scores: list[int]) -> dict[str, Any]:
    """Arrays of a deterministic run; -1 where an attack attempted nothing."""
    arrays: dict[str, Any] = {}
    for name, row in {"clean": [1] * len(next(iter(scores.values()))), **scores}.items():
        arrays[f"{name}/attempted"] = np.array(row) >= 0
        arrays[f"{name}/correct"] = np.array(row)
        arrays[f"{name}/majority"] = np.array(row) > 0
        arrays[f"{name}/certain"] = np.array(row) == 0
        arrays["id"] = np.arange(len(row))
    return arrays


def test_the_strongest_attack_leaves_least_of_the_same_samples(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    job = ready("LINEAR").job
    subject = Examination(job, RunDir(tmp_path, {}))._subject

    def chosen(*attacks: PlannedAttack, **scores: list[int]) -> AttackHealth:
        return AttackHealth(replace(job, planned=attacks), scored(**scores), subject, HEALTH["quick"])

    a, b, dear = planned("a"), planned("b"), planned("b", steps=9)
    many = [1] * 8
    assert chosen(a, b, a=[*many, 1, 1], b=[*many, 0, 0]).attack is b
    assert chosen(a, dear, a=[*many, 0, 0], b=[*many, 1, 0]).attack is a
    assert chosen(a, dear, a=[*many, 1, 1], b=[*many, 1, 0]).attack is a, "one sample more is not worth a dearer attack"
    assert chosen(a, b, a=many, b=many).attack is b, "a tie goes to the later one"
    assert not chosen(a, b, a=many, b=many).evidence.others
    few = [-1] * 9
    rerun = chosen(a, b, a=[*few, 1], b=[*few, 0])
    assert len(rerun.evidence.others) == 1, "the few that earlier attacks left say little of the rest"
    # What the cascade spared an attack says nothing of it: both are run again, on the subject's images.
    weak, strong = planned("weak", alpha=1e-4), planned("strong", steps=20)
    again = chosen(weak, strong, weak=[0, 0, 1, 1], strong=[-1, -1, 1, 1])
    assert again.attack is strong
    (left,) = again.evidence.others
    assert left.mean() > again.evidence.attacked().mean()


class FallingError(Exception):
    pass


@pytest.mark.parametrize("error", [FallingError("out of ink"), MemoryError("no room")])
def test_an_error_of_the_attack_is_none_of_the_defense(
    ready: Callable[..., Prepared], tmp_path: Path, error: Exception
) -> None:
    """One that appears in the whole box alone, once hours of attacks are done."""
    prepared = ready("LINEAR")
    original = prepared.job.attacks["apgd"]

    def attack(target: Any, x: Tensor, y: Tensor, threat: Any, noise: Noise, **options: Any) -> Tensor:
        if threat.eps == 1:
            raise error
        return original.attack(target, x, y, threat, noise, **options)

    attacks = {**prepared.job.attacks, "apgd": replace(original, attack=attack)}
    planned = tuple(each for each in prepared.job.planned if each.attack != "pgd")
    job = replace(prepared.job, attacks=attacks, planned=planned)
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            execute(replace(prepared, job=job), tmp_path)
        assert not (tmp_path / "record.json").exists()
        job = replace(job, attacks=prepared.job.attacks)
        assert execute(replace(prepared, job=job), tmp_path).verdict == "verified", "nothing that was finished is lost"
        return
    found = by_name(execute(replace(prepared, job=job), tmp_path))["unbounded"]
    assert found.status == "fail"
    assert found.message.startswith("An error of the run: unbounded could not be measured, FallingError: out of ink")


def test_a_check_without_a_finding_leaves_the_record_incomplete(
    ready: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assay.examination, "attackable", lambda job: False)
    assert execute(ready("LINEAR"), tmp_path).verdict == "incomplete"


def test_all_attacks_by_name_are_a_whole_run(zoo: ModuleType, toy_source: str) -> None:
    board = zoo.board(source=toy_source)
    names = [attack.name for attack in prepare(f"{ZOO}:LINEAR", board, trust=True).mandatory]
    assert prepare(f"{ZOO}:LINEAR", board, trust=True, only=names).job.health is not None
    assert prepare(f"{ZOO}:LINEAR", board, trust=True, only=names[:-1]).job.health is None


# The draws behind a gradient.


@pytest.mark.parametrize(
    ("wanted", "most", "used", "status"),
    [(20, 40, 20, "pass"), (32, 40, 32, "pass"), (64, 40, 40, "flag"), (64, 128, 64, "pass"), (64, 8, 20, "pass")],
)
def test_measured_noise_raises_the_draws(
    ready: Callable[..., Prepared], tmp_path: Path, wanted: int, most: int, used: int, status: str
) -> None:
    attacks = (
        planned("averaging", eot=20, clip=True),
        planned("square", "black-box", eot=10),
        planned("more", eot=99, clip=True),
    )
    job = ready("ABSTAINING").job
    rule = replace(HEALTH["standard"], most_draws=most)
    job = replace(job, planned=attacks[:2], health=PlannedHealth(rule))
    examination = Examination(job, RunDir(tmp_path, {}))
    measured = {"clipped_count": wanted, "count": wanted}
    examination.findings["eot"] = Finding(check="eot", status="pass", message="Averaged.", data=measured)
    averaging, square = examination.adapted().planned
    assert averaging.options == {"steps": 5, "eot": used, "clip": True}
    assert averaging.forward == averaging.backward == 5 * used / 20
    assert square == attacks[1], "a black box averages no gradient"
    found = examination.findings["eot"]
    assert found.status == status
    assert found.data["used"] == used
    kept = Examination(replace(job, planned=attacks[2:]), RunDir(tmp_path, {}))
    kept.findings["eot"] = examination.findings["eot"]
    assert kept.adapted().planned == attacks[2:], "never fewer than planned"


def test_a_deterministic_defense_keeps_its_plan(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    job = ready("LINEAR").job
    examination = Examination(job, RunDir(tmp_path, {}))
    examination.findings["eot"] = Finding(check="eot", status="pass", message="", data={"count": 1})
    assert examination.adapted() is job


def test_the_attacks_of_a_run_use_the_draws_that_were_measured(toy_run: Path) -> None:
    record = read_record(toy_run)
    found = by_name(record)["eot"]
    assert record.results is not None
    averaging = {name: a.options["eot"] for name, a in record.results.attacks.items() if "clip" in a.options}
    assert averaging
    assert set(averaging.values()) == {found.data["used"]}


def test_images_examined_are_the_boards_first(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    job: Job = ready("LINEAR", n=30).job
    subject = Examination(job, RunDir(tmp_path, {}))._subject
    assert tuple(subject.ids) == job.ids[:16]
    assert torch.equal(subject.x, data.load("digits", job.ids[:16])[0])
    assert subject.threat.eps == Fraction(1, 10)
