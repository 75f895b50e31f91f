"""The certified half of a run: counts that are kept, attacks at each radius, and what contradicts a certificate."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from assay.boards import Board
from assay.card import Card, Traits, Votes
from assay.certificates.smoothing import SMOOTHING
from assay.certification import rederive
from assay.checks.contradiction import contradiction
from assay.defense import aggregate, vote_counts
from assay.errors import CertificateError, DefenseError, InputError, IntegrityError
from assay.evaluation import execute
from assay.prepare import Prepared, prepare
from assay.record import COUNTS, Certification, Record, read_record
from assay.registry import resolve_certificate
from assay.rules import CERTIFYING

ZOO = Path(__file__).with_name("defense_zoo.py")
RADII = ("1/8", "1/4", "1/2")
VALUES = [0.125, 0.25, 0.5]
BUDGET = CERTIFYING["quick"].budget


@pytest.fixture(scope="module")
def board(zoo: ModuleType, toy_source: str) -> Board:
    found: Board = zoo.board(norm="l2", eps="1/4", n=24, radii=RADII, source=toy_source)
    return found


def prepared(name: str, board: Board, **options: Any) -> Prepared:
    return prepare(f"{ZOO}:{name}", board, trust=True, **options)


@pytest.fixture(scope="module")
def run(board: Board, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified") / "run"
    execute(prepared("SMOOTHED", board), folder)
    return folder


@pytest.fixture(scope="module")
def record(run: Path) -> Record:
    return read_record(run, files=True)


@pytest.fixture(scope="module")
def half(record: Record) -> Certification:
    assert record.certification is not None
    return record.certification


@pytest.fixture(scope="module")
def arrays(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(run / COUNTS)
    return found


def derived(arrays: dict[str, Any]) -> tuple[Any, Any]:
    """What follows from the stored counts: the derived certificate, and which samples are right."""
    counts = {name.removeprefix("count/"): value for name, value in arrays.items() if name.startswith("count/")}
    found = SMOOTHING.derive(counts, {"sigma": 0.25}, VALUES, BUDGET)
    return found, found.prediction == arrays["label"]


def test_every_certified_number_follows_from_the_stored_counts(
    record: Record, half: Certification, arrays: dict[str, Any]
) -> None:
    found, right = derived(arrays)
    assert (half.certificate, half.knobs) == ("smoothing", {"sigma": 0.25})
    assert half.right == right.sum()
    radius = np.where(right, np.maximum(found.radius, 0), 0)
    assert half.average_radius == pytest.approx(radius.mean(), abs=1e-12)
    assert half.abstained == (right & (radius == 0)).sum()
    assert len(half.curve) == (radius > 0).sum()
    assert list(half.curve) == sorted(half.curve, reverse=True)
    assert (np.asarray(half.curve) <= np.sort(radius)[::-1][: len(half.curve)]).all()
    for number, text in enumerate(RADII):
        claimed = right & found.claims[:, number]
        result = half.radii[text]
        assert result.value == claimed.mean()
        assert result.refuted == 0
        assert result.confident == max(claimed.sum() - 1, 0)  # the 99.9 % quantile of Bin(24, .001) is 1
        assert record.results is not None
        assert record.results.certified[text].value == result.value
    assert 0 < half.radii["1/4"].value < half.radii["1/8"].value
    assert half.drawn == arrays["count/drawn"].sum()


def test_certified_is_never_more_than_attacked(half: Certification, arrays: dict[str, Any]) -> None:
    found, right = derived(arrays)
    standing = right.copy()
    for number, (text, value) in enumerate(zip(RADII, VALUES, strict=True)):
        stage = f"radius-{text.replace('/', '-')}"
        attempted, broken = arrays[f"{stage}/attempted"], arrays[f"{stage}/broken"]
        np.testing.assert_array_equal(attempted, standing)
        assert not (broken & ~attempted).any()
        standing = standing & ~broken
        attacked = half.radii[text].attacked
        assert attacked is not None
        assert attacked.value == standing.mean()
        assert not (right & found.claims[:, number] & ~standing).any()
        assert half.radii[text].value <= attacked.value
        # Each sample that fell did so inside the radius, by an image that is kept.
        assert (arrays[f"{stage}/distance"][broken] <= value * (1 + 1e-5)).all()
        np.testing.assert_array_equal(arrays[f"{stage}/broken_id"], arrays["id"][broken])
        assert arrays[f"{stage}/broken_x"].shape == (broken.sum(), 1, 8, 8)
    # The attack does something: it breaks more, the larger the radius.
    assert half.radii["1/2"].attacked is not None
    assert half.radii["1/2"].attacked.value < half.radii["1/8"].attacked.value  # type: ignore[union-attr]


def test_attacks_at_larger_radii_leave_the_boards_own_adversarial_examples_alone(run: Path, record: Record) -> None:
    import pandas as pd

    table = pd.read_parquet(run / "samples.parquet")
    final = table[table["attack"] == "final"].set_index("id")
    bundle = load_file(run / "adversarial.safetensors")
    from assay import data

    x, _ = data.load("digits", bundle["id"].tolist())
    norms = np.linalg.norm((bundle["x_adv"] - x.numpy()).reshape(len(x), -1), axis=1)
    np.testing.assert_allclose(norms, final.loc[bundle["id"], "norm"], atol=1e-5)
    assert norms.max() <= 0.25 * (1 + 1e-5)


def test_no_call_is_lost_and_none_is_free(half: Certification, record: Record, arrays: dict[str, Any]) -> None:
    assert half.forward >= half.drawn
    assert record.cost.forward > half.forward
    steps, eot = half.options["steps"], half.options["eot"]
    attacked = sum(arrays[f"radius-{text.replace('/', '-')}/attempted"].sum() for text in ("1/8", "1/2"))
    assert half.backward <= attacked * steps * eot


def test_no_contradiction_with_an_honest_certificate(record: Record) -> None:
    finding = next(finding for finding in record.findings if finding.check == "contradiction")
    assert (finding.status, finding.value) == ("pass", 0.0)
    assert record.verdict == "verified"


@pytest.mark.usefixtures("few_checks")
def test_a_defense_that_is_not_the_model_it_certifies_fails(board: Board, tmp_path: Path) -> None:
    record = execute(prepared("TWO_FACED", board), tmp_path / "run")
    assert record.verdict == "failed"
    finding = next(finding for finding in record.findings if finding.check == "contradiction")
    assert finding.status == "fail"
    assert len(finding.samples) > 10
    assert "not the certified model" in finding.message
    assert record.results is not None  # what was measured stays to be seen


def test_an_interrupted_run_ends_in_the_same_record(board: Board, run: Path, tmp_path: Path) -> None:
    again = prepared("SMOOTHED", board)
    folder = tmp_path / "run"
    execute(again, folder)
    (folder / "record.json").unlink()
    shards = sorted((folder / "shards").glob("*.safetensors"))
    assert len(shards) == 2
    shards[1].unlink()
    assert execute(again, folder).outcome_sha256 == read_record(run).outcome_sha256


def test_the_certified_half_alone_has_the_same_counts(board: Board, run: Path, arrays: Any, tmp_path: Path) -> None:
    record = execute(prepared("SMOOTHED", board, certify_only=True), tmp_path / "run")
    assert record.results is None
    assert record.verdict == "incomplete"
    assert set(record.files) == {COUNTS}
    alone = load_file(tmp_path / "run" / COUNTS)
    assert not any(name.startswith("radius") for name in alone)
    for name in alone:
        np.testing.assert_array_equal(alone[name], arrays[name])
    assert record.certification is not None
    assert record.certification.attack == ""
    assert all(result.attacked is None for result in record.certification.radii.values())


def test_a_changed_count_is_seen(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    content = bytearray((copied / COUNTS).read_bytes())
    content[-1] ^= 1
    (copied / COUNTS).write_bytes(content)
    with pytest.raises(Exception, match="is missing or was changed"):
        read_record(copied, files=True)


def test_certified_numbers_follow_from_the_counts_or_the_record_is_refused(run: Path, record: Record) -> None:
    rederive(record, run)
    half = record.certification
    assert half is not None
    more = half.radii["1/4"].model_copy(update={"value": half.radii["1/4"].value + 1 / 24})
    forged = record.model_copy(update={"certification": half.model_copy(update={"radii": {**half.radii, "1/4": more}})})
    with pytest.raises(IntegrityError, match="its counts certify"):
        rederive(forged, run)
    forged = record.model_copy(update={"certification": half.model_copy(update={"average_radius": 0.9})})
    with pytest.raises(IntegrityError, match=r"average radius of 0\.9"):
        rederive(forged, run)


def test_some_attacks_alone_leave_the_certificate_out(board: Board) -> None:
    plan = prepared("SMOOTHED", board, only=["uniform"])
    assert plan.job.certificate is None
    assert plan.missing["certify"] == "not asked for (--attack)"


def test_boards_without_radii_certify_nothing(zoo: ModuleType, toy_source: str) -> None:
    plain = zoo.board(source=toy_source)
    assert prepared("SMOOTHED", plain).job.certificate is None
    with pytest.raises(InputError, match=r"board toy has no radii. These have: cifar10-l2, digits-l2"):
        prepared("SMOOTHED", plain, certify_only=True)


def test_a_defense_without_a_certificate_has_nothing_to_certify(board: Board) -> None:
    with pytest.raises(InputError, match="names no certificate"):
        prepared("ABSTAINING", board, certify_only=True)


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        ("optimised_sigma", "unsound: its noise level is optimised on the test image itself"),
        ("best_of_sigmas", "unsound: the largest radius among several noise levels"),
        ("memorised_sigma", "unsound: its noise levels depend on the test images that came before"),
        ("smoothign", "Did you mean 'smoothing'"),
    ],
)
def test_what_is_unsound_or_unknown_is_refused_with_the_reason(
    certificate: str, says: str, board: Board, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=says):
        resolve_certificate(certificate)
    from assay import prepare as module

    defense = zoo.SmoothedLinear()
    defense.card = defense.card.model_copy(update={"certificate": certificate})
    monkeypatch.setattr(module, "resolve_defense", lambda name, **given: zoo_spec(defense))
    with pytest.raises(InputError, match=says):
        prepare("toy", board)


def zoo_spec(defense: Any) -> Any:
    from assay.defense import DefenseSpec

    return DefenseSpec(defense.card, lambda dataset: defense)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"votes": Votes(draws=16, how="probabilities")},
            "answers by probabilities, its certificate smoothing",
        ),
        ({"handles": ("votes",)}, "lists no certified handle"),
    ],
)
def test_a_card_that_does_not_fit_its_certificate_is_refused(
    change: dict[str, Any], says: str, board: Board, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay import prepare as module

    defense = zoo.SmoothedLinear()
    defense.card = defense.card.model_copy(update=change)
    monkeypatch.setattr(module, "resolve_defense", lambda name, **given: zoo_spec(defense))
    with pytest.raises(InputError, match=says):
        prepare("toy", board)


@pytest.mark.parametrize(("certifies", "certificate"), [(True, ""), (False, "smoothing")])
def test_trait_and_certificate_go_together(certifies: bool, certificate: str) -> None:
    with pytest.raises(ValueError, match="go together"):
        Card(name="a", title="A", summary="", traits=Traits(certifies=certifies), certificate=certificate)


@pytest.mark.parametrize(
    ("radii", "norm", "says"),
    [
        (["1/2", "1/4"], "l2", "radii must increase, got 1/2, 1/4"),
        (["1/4", "1/4"], "l2", "radii must increase"),
        (["0.25"], "l2", "exact fraction"),
        (["1/4"], "linf", "radii are l2 radii"),
        ("1/4", "l2", "expected a list of fractions"),
    ],
)
def test_radii_of_a_board_are_checked(radii: Any, norm: str, says: str, zoo: ModuleType) -> None:
    with pytest.raises(ValueError, match=says):
        zoo.board(norm=norm, radii=radii)


def test_vote_counts_are_those_that_the_majority_was_made_of() -> None:
    votes = Votes(draws=64, how="majority")
    logits = torch.randn(500, 64, 10, generator=torch.Generator().manual_seed(0))
    logits[:, :, 3] += 2
    counted = torch.nn.functional.one_hot(logits.argmax(-1), 10).sum(1)
    assert (counted == 0).any()
    torch.testing.assert_close(vote_counts(aggregate(logits, votes), votes), counted)
    single = vote_counts(logits[:, 0], Votes(draws=1))
    assert torch.equal(single.argmax(-1), logits[:, 0].argmax(-1))
    assert torch.equal(single.sum(-1), torch.ones(500, dtype=torch.int64))


def finding(
    floor: Any,
    hits: Any,
    *,
    refuted: Any = None,
    claimed: Any = None,
    clean: Any = None,
    votes: int = 1000,
    alpha: float = 0.001,
) -> Any:
    floor, hits = np.asarray(floor, dtype=np.float64), np.asarray(hits)
    none = np.zeros((len(floor), 1), dtype=bool)
    return contradiction(
        np.arange(100, 100 + len(floor)), floor=floor, hits=hits, votes=votes, alpha=alpha,
        refuted=none if refuted is None else np.asarray(refuted), claimed=none if claimed is None else claimed,
        clean=clean,
    )  # fmt: skip


def test_votes_below_a_floor_contradict_and_chance_does_not() -> None:
    floor = np.full((200, 3), 0.7)
    fair = np.random.default_rng(0).binomial(1000, 0.7, size=(200, 3))
    assert finding(floor, fair).status == "pass"
    # Nothing is said where the floor is 0.
    assert finding(np.zeros((200, 3)), np.zeros((200, 3), dtype=int)).status == "pass"
    for wrong, status in ((0, "pass"), (1, "flag"), (4, "flag"), (5, "fail")):
        hits = fair.copy()
        hits[:wrong, 1] = 600
        found = finding(floor, hits)
        assert (found.status, found.value, found.threshold) == (status, wrong, 4.0), wrong
        assert found.samples == tuple(range(100, 100 + wrong))


def test_a_sample_counts_once_however_many_candidates_contradict_it() -> None:
    assert finding(np.full((10, 5), 0.9), np.full((10, 5), 100)).value == 10


def test_a_claim_that_an_attack_refutes_contradicts() -> None:
    refuted = np.zeros((50, 4), dtype=bool)
    refuted[7, 2:] = True
    found = finding(np.full((50, 2), 0.6), np.full((50, 2), 700), refuted=refuted)
    assert (found.status, found.value, found.samples) == ("flag", 1.0, (107,))
    assert "smaller alpha" in found.message


def test_records_without_a_certified_half_still_read(toy_run: Path) -> None:
    plain = json.loads((toy_run / "record.json").read_text())
    assert plain["certification"] is None
    assert read_record(toy_run).certification is None


def test_what_was_claimed_and_attacked_is_tested_whether_it_fell_or_not() -> None:
    """A certificate that says nothing of votes is allowed as many wrong claims as one that does."""
    claimed = np.ones((200, 1), dtype=bool)
    refuted = np.zeros((200, 1), dtype=bool)
    nothing = np.zeros((200, 1))
    assert finding(nothing, np.zeros((200, 1), int), claimed=claimed, refuted=refuted).message.endswith(
        "(200 samples tested)."
    )
    refuted[:2] = True
    found = finding(nothing, np.zeros((200, 1), int), claimed=claimed, refuted=refuted)
    assert (found.status, found.threshold) == ("flag", 4.0)


def test_votes_under_less_noise_than_was_certified_contradict() -> None:
    rng = np.random.default_rng(0)
    floor, hits = np.zeros((100, 1)), np.zeros((100, 1), int)
    drawn = np.full(100, 400)
    same = rng.binomial(400, 0.8, 100), drawn, rng.binomial(1000, 0.8, 100)
    assert finding(floor, hits, clean=same).status == "pass"
    less = rng.binomial(400, 0.8, 100), drawn, rng.binomial(1000, 0.97, 100)
    assert finding(floor, hits, clean=less).status == "fail"
    # Of samples that were not tried nothing is known.
    untried = np.zeros(100, int), np.zeros(100, int), np.full(100, 1000)
    assert finding(floor, hits, clean=untried).status == "pass"


OWN = """
from dataclasses import dataclass
import numpy as np
from assay.bounds import radius, lower_bound
from assay.certificate import Certificate, Certified, Judgement, Smoothed
from assay.certificate import checked_subject, count_votes, noised, strictly_within
import defense_zoo_under_test as zoo

@dataclass(frozen=True)
class Subject:
    sigma: float
    classify: object

class Own(Certificate):
    name, summary, source = "own", "Votes, counted plainly.", "this test"
    answers = "majority"
    def knobs(self, subject):
        return {"sigma": checked_subject(subject, Subject).sigma}
    def measure(self, target, x, y, noise, radii, budget):
        subject = target.handle("certified")()
        forward = noised(subject.sigma, subject.classify)
        first = count_votes(target, x, noise.child("selection"), budget.selection, forward)
        votes = count_votes(target, x, noise.child("estimation"), budget.draws, forward)
        return {"selection": first, "votes": votes, "drawn": first.sum(1) + votes.sum(1)}
    def derive(self, counts, knobs, radii, budget):
        chosen = counts["selection"].argmax(1)
        hits = counts["votes"][np.arange(len(chosen)), chosen]
        found = radius(lower_bound(hits, budget.draws, budget.alpha), knobs["sigma"])
        return Certified(chosen, found, strictly_within(found, radii))
    def floor(self, counts, knobs, radii, budget, distance):
        return np.zeros_like(distance)
    def judge(self, target, x, noise, budget):
        subject = target.handle("certified")()
        votes = count_votes(target, x, noise, budget.judging, noised(subject.sigma, subject.classify))
        return Judgement(votes.argmax(1), np.ones(len(votes), bool))

class Boaster(Own):
    name = "boaster"
    def derive(self, counts, knobs, radii, budget):
        found = super().derive(counts, knobs, radii, budget)
        return Certified(found.prediction, np.full(len(found.radius), 9.0), np.ones_like(found.claims))
    def judge(self, target, x, noise, budget):
        found = super().judge(target, x, noise, budget)
        return Judgement(found.answer, np.zeros(len(x), bool))

class Patchy(Own):
    name = "patchy"
    def derive(self, counts, knobs, radii, budget):
        found = super().derive(counts, knobs, radii, budget)
        claims = found.claims.copy()
        claims[:, 0] = False
        return Certified(found.prediction, found.radius, claims | True & (np.arange(len(radii)) == len(radii) - 1))

class Thrower(Own):
    name = "thrower"
    def measure(self, target, x, y, noise, radii, budget):
        raise ZeroDivisionError("no pixels")

class Impostor(Own):
    name = "smoothing"

class Speechless(Own):
    summary = None

class Mine(zoo.SmoothedLinear):
    def __init__(self, certificate, sigma=0.25, drawn=0.25):
        super().__init__("toy-own", sigma=drawn)
        self.certified_sigma = sigma
        self.card = self.card.model_copy(update={"certificate": certificate})
    def certified(self):
        kind = Subject if ":" in self.card.certificate else Smoothed
        return kind(self.certified_sigma, self.base)

class Fickle(Mine):
    calls = 0
    def certified(self):
        Fickle.calls += 1
        return Smoothed(0.5 if Fickle.calls == 1 else 0.25, self.base)

class Muffled(Mine):
    def forward(self, x, noise):
        return (0.01 * super().forward(x, noise)).clamp_min(-0.05)

FAIR = Mine("own.py:Own")
BOASTING = Mine("own.py:Boaster")
PATCHY = Mine("own.py:Patchy")
THROWING = Mine("own.py:Thrower")
POSING = Mine("own.py:Impostor")
SPEECHLESS = Mine("own.py:Speechless")
QUIET = Mine("smoothing", sigma=0.25, drawn=0.15)
FICKLE = Fickle("smoothing")
MUFFLED = Muffled("smoothing")
"""


@pytest.fixture
def own(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with defenses and certificates of somebody's own, away from the working directory."""
    import sys

    monkeypatch.setitem(sys.modules, "defense_zoo_under_test", zoo)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def evaluated(own: Path, name: str, board: Board) -> Record:
    return execute(prepare(f"{own}:{name}", board, trust=True), own.parent / f"run-{name}")


def test_a_third_party_brings_a_defense_and_its_certificate_in_one_file(own: Path, board: Board) -> None:
    record = evaluated(own, "FAIR", board)
    assert record.verdict == "verified"
    half = record.certification
    assert half is not None
    assert (half.certificate, half.knobs) == ("own.py:Own", {"sigma": 0.25})
    assert half.source_sha256 == hashlib.sha256(own.read_bytes()).hexdigest()
    assert 0 < half.radii["1/8"].value <= half.radii["1/8"].attacked.value  # type: ignore[union-attr]
    # Its plan names its code: the same command with other code doesn't resume.
    (own.parent / "run-FAIR" / "record.json").unlink()
    own.write_text(OWN + "\n# changed\n")
    with pytest.raises(InputError, match="another plan"):
        evaluated(own, "FAIR", board)


def test_a_certificate_that_judges_itself_kindly_is_refuted_by_the_harness(own: Path, board: Board) -> None:
    with pytest.raises(CertificateError, match="other radii than those below"):
        evaluated(own, "PATCHY", board)
    record = evaluated(own, "BOASTING", board)
    assert record.verdict == "failed"
    half = record.certification
    assert half is not None
    assert half.radii["1/2"].refuted >= 4
    assert all(result.value <= result.attacked.value for result in half.radii.values() if result.attacked)
    # What was refuted is in no curve and in no average.
    assert len(half.curve) == half.right - half.abstained
    assert half.abstained >= half.radii["1/2"].refuted


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("THROWING", CertificateError, "certificate own.py:Thrower raised ZeroDivisionError: no pixels"),
        ("POSING", InputError, "calls itself 'smoothing', which is registered"),
        ("SPEECHLESS", InputError, "says nothing of its summary"),
        ("FICKLE", CertificateError, "returned other knobs than before: sigma = 0.25; first it was sigma = 0.5"),
        ("MUFFLED", DefenseError, "log shares of 16 votes"),
    ],
)
def test_certificates_and_models_that_do_not_keep_to_their_word_are_errors(
    name: str, error: type[Exception], says: str, own: Path, board: Board
) -> None:
    with pytest.raises(error, match=says):
        evaluated(own, name, board)


def test_a_defense_that_answers_under_less_noise_than_it_certifies_fails(own: Path, board: Board) -> None:
    record = evaluated(own, "QUIET", board)
    assert record.verdict == "failed"
    assert next(f for f in record.findings if f.check == "contradiction").status == "fail"


def test_a_certificates_path_is_looked_for_beside_its_defense(own: Path) -> None:
    with pytest.raises(InputError, match="neither here nor as"):
        resolve_certificate("other.py:Own", trust=True, beside=own)
    with pytest.raises(InputError, match="add --trust"):
        resolve_certificate(f"{own}:Own")
    with pytest.raises(InputError, match="expected a Certificate"):
        resolve_certificate(f"{own}:FAIR", trust=True)
    with pytest.raises(InputError, match="no object 'Owm'"):
        resolve_certificate(f"{own}:Owm", trust=True)


def test_the_documents_example_runs_as_it_stands(board: Board, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "certificates.md").read_text()
    (tmp_path / "mine.py").write_text(text.split("```python\n")[1].split("```")[0])
    record = execute(prepare(f"{tmp_path / 'mine.py'}:DEFENSE", board, trust=True), tmp_path / "run")
    assert record.verdict == "verified"
    assert record.certification is not None
    assert record.certification.right > 0
