"""The checks of what attacks did: attacks and defenses that they must catch, and honest ones that they must let by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay import data
from assay.attack import Attack, Target
from assay.attacks.apgd import apgd
from assay.attacks.bpda import bpda
from assay.attacks.diffhammer import diffhammer
from assay.attacks.pgd import pgd
from assay.attacks.square import square
from assay.attacks.step_losses import step_losses
from assay.attacks.surrogate import surrogate
from assay.attacks.through_chain import through_chain
from assay.attacks.transfer import transfer
from assay.attacks.uniform import uniform
from assay.card import Card, Handle, Traits
from assay.checks import (
    ablations,
    black_box_beats_white_box,
    calibration,
    converged,
    eps_curve,
    single_step_beats_iterative,
    unbounded,
)
from assay.checks.evidence import Evidence, StageScores, compare, whole_box
from assay.checks.subject import Subject
from assay.defense import Defense, Stages
from assay.errors import AttackError, InputError
from assay.finding import Finding
from assay.noise import Noise
from assay.norms import Ball
from assay.registry import DEFENSES
from assay.threat import ThreatModel

EPS = Fraction(1, 20)
RERUN: dict[str, Callable[[Evidence], Finding]] = {
    "unbounded": unbounded.check,
    "eps_curve": eps_curve.check,
    "converged": converged.check,
    "single_step_beats_iterative": single_step_beats_iterative.check,
}
"""The checks that run the attack again."""


def evidence(
    defense: Defense, attack: Attack = apgd, *, n: int = 32, eps: Fraction = EPS, norm: Any = "linf", **options: Any
) -> Evidence:
    ids = data.board_ids("digits")[:n]
    x, y = data.load("digits", ids)
    subject = Subject(defense, x, y, ids, Noise.from_seed(5, ids), ThreatModel(norm, eps))
    draws = 10 if defense.card.traits.stochastic else 1
    given = {"steps": 20, **options} if "steps" not in options and attack not in (square, uniform) else options
    return Evidence(subject, attack, given, n_draws=draws)


class Ridge(Defense):
    """The zoo's linear model, `change`d: `change(x, logits) -> logits`."""

    def __init__(
        self,
        zoo: ModuleType,
        change: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        before: Callable[[Tensor], Tensor] | None = None,
        traits: Traits | None = None,
        handles: Sequence[Handle] = (),
    ) -> None:
        super().__init__()
        self.inner = zoo.Linear()
        self.card = Card(name="ridge", title="R", summary="", traits=traits or Traits(), handles=tuple(handles))
        self.n_classes = 10
        self.change, self.before = change, before
        self.eval()

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        z = x if self.before is None else self.before(x)
        logits: Tensor = self.inner.draw(z, noise)
        return logits if self.change is None else self.change(x, logits)

    def stages(self) -> Stages:
        return Stages(lambda x, noise: x if self.before is None else self.before(x), self.inner.draw)


def rounded(x: Tensor) -> Tensor:
    return (x * 4).round() / 4


class Misled(torch.autograd.Function):
    """Right where an image is; its gradient is reversed at pixels that were moved by more than .01."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        off = (x - (x * 16).round() / 16).abs() > 0.01
        return torch.where(off, -gradients[0], gradients[0])


def misled(x: Tensor) -> Tensor:
    moved: Tensor = Misled.apply(x)  # type: ignore[no-untyped-call]
    return moved


# Attacks that do their work badly.


def backwards(
    target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, *, steps: int = 20, eot: int = 1
) -> Tensor:
    """Descends the loss."""
    ball, z = Ball(threat, x), x
    for i in range(steps):
        found = target.gradient(z, (y,), torch.nn.CrossEntropyLoss(reduction="none"), noise.child(i), draws=eot)
        z = ball.step(z, -found.gradient, 0.25 * ball.eps)
    return z


def idle(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, *, steps: int = 20) -> Tensor:
    return Ball(threat, x).random_point(noise)


def far(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, *, steps: int = 20) -> Tensor:
    return (x + 2 * float(threat.eps)).clamp(0, 1)


def one_row(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, *, steps: int = 20) -> Tensor:
    return x[:1]


def near_only(target: Target, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise, *, steps: int = 20) -> Tensor:
    """Works in small balls, stalls in larger ones."""
    return apgd(target, x, y, threat, noise, steps=steps) if threat.eps < Fraction(3, 20) else x


# Closed forms.


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", Fraction(1, 2))])
def test_the_curve_of_a_linear_model_is_its_closed_form(zoo: ModuleType, norm: Any, eps: Fraction) -> None:
    found = evidence(zoo.Linear(), norm=norm, eps=eps, loss="margin")
    exact = zoo.linf_robust if norm == "linf" else zoo.l2_robust
    x, y = found.subject.x, found.subject.y
    finding = eps_curve.check(found)
    truth = [float(exact(x, y, float(Fraction(radius))).mean()) for radius in finding.data["eps"]]
    assert finding.status == "pass"
    assert finding.data["accuracy"] == pytest.approx(truth, abs=1 / 32 + 1e-9)
    assert truth[0] > truth[2] > truth[4]


@pytest.mark.parametrize("name", RERUN)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("n", [1, 32])
@pytest.mark.parametrize("stochastic", [False, True])
def test_an_honest_attack_on_an_honest_defense_is_healthy(
    zoo: ModuleType, name: str, norm: Any, n: int, stochastic: bool
) -> None:
    eps = EPS if norm == "linf" else Fraction(1, 2)
    made = evidence(zoo.Abstaining() if stochastic else zoo.Linear(), n=n, norm=norm, eps=eps)
    before = made.subject.x.clone(), torch.random.get_rng_state()
    finding = RERUN[name](made)
    assert (finding.check, finding.status) == (name, "pass"), finding.message
    assert made.subject.calls[0] > 0
    assert made.subject.calls[1] > 0
    assert torch.equal(made.subject.x, before[0])
    assert torch.equal(torch.random.get_rng_state(), before[1])
    again = evidence(zoo.Abstaining() if stochastic else zoo.Linear(), n=n, norm=norm, eps=eps)
    assert RERUN[name](again).model_dump_json() == finding.model_dump_json()


@pytest.mark.parametrize("attack", [apgd, pgd, square])
def test_a_model_that_guesses_is_unbroken_by_nobody(zoo: ModuleType, attack: Attack) -> None:
    class Guessing(Defense):
        card = Card(name="guess", title="G", summary="", traits=Traits(stochastic=True))
        n_classes = 10

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return noise.normal("z", shape=(10,), like=x)

    # Nothing to break, no gradient at all: what is left is a guess, and no attack does better.
    options: dict[str, Any] = {"queries": 20, "eot": 4} if attack is square else {"eot": 4}
    made = evidence(Guessing(), attack, **options)
    assert {check(made).status for check in RERUN.values()} == {"pass"}


# What must be caught.


def test_masked_gradients_are_caught_with_the_whole_box_for_a_budget(zoo: ModuleType) -> None:
    quantised = Ridge(zoo, before=rounded, handles=("stages",))
    severed = Ridge(zoo, lambda x, logits: logits.detach())
    saturated = Ridge(zoo, lambda x, logits: 1e4 * logits)
    for defense in (quantised, severed, saturated):
        found = unbounded.check(evidence(defense))
        assert found.status == "flag"
        assert "Gradient masking" in found.message
        assert found.value is not None
        assert found.value > 0.8
        assert len(found.samples) > 25
    # The attack that isn't fooled by it arrives, and so the defense is not blamed.
    assert unbounded.check(evidence(quantised, bpda)).status == "pass"
    assert unbounded.check(evidence(saturated, loss="margin")).status == "pass"


def test_masked_draws_are_caught_though_some_are_wrong_anyway(zoo: ModuleType) -> None:
    class Shaken(Ridge):
        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            right = super().draw(x, noise)
            silent = noise.uniform("lost", shape=(), like=x) < 0.5
            return torch.where(silent[:, None], noise.normal("z", shape=(10,), like=x), right).detach()

    found = unbounded.check(evidence(Shaken(zoo, traits=Traits(stochastic=True)), eot=4))
    assert found.status == "flag"
    assert found.threshold == 0.1


def test_an_attack_that_stops_too_early_has_not_converged(zoo: ModuleType) -> None:
    # Steps that cannot cross half the ball; with twice as many they do.
    short = evidence(zoo.Linear(), pgd, eps=4 * EPS, steps=3, alpha=0.7 * float(EPS), random_start=False)
    found = converged.check(short)
    assert found.status == "flag"
    assert found.data["steps"] == [3, 6]
    assert found.value == pytest.approx(found.data["accuracy"][0] - found.data["accuracy"][1])
    assert len(found.samples) >= 7
    assert converged.check(evidence(zoo.Linear(), pgd, steps=20)).status == "pass"
    # One sample alone says nothing.
    assert converged.check(evidence(zoo.Linear(), pgd, n=1, steps=3, alpha=0.01, random_start=False)).status == "pass"


def test_random_search_is_doubled_in_queries(zoo: ModuleType) -> None:
    found = converged.check(evidence(zoo.Linear(), square, queries=2))
    assert found.data["queries"] == [2, 4]
    assert "no number of steps" in converged.check(evidence(zoo.Linear(), uniform, tries=2)).message
    assert "no steps" in single_step_beats_iterative.check(evidence(zoo.Linear(), square, queries=2)).message


def test_a_curve_that_rises_is_caught_whether_the_attack_or_the_defense_makes_it(zoo: ModuleType) -> None:
    ids = data.board_ids("digits")[:32]
    known = data.load("digits", ids)[0]

    def revert(x: Tensor) -> Tensor:
        apart = (x[:, None] - known[None]).abs().flatten(2).amax(2)
        distance, nearest = apart.min(1)
        return torch.where((distance > 0.15)[:, None, None, None], known[nearest], x)

    for made in (evidence(zoo.Linear(), near_only, eps=2 * EPS), evidence(Ridge(zoo, before=revert), eps=2 * EPS)):
        found = eps_curve.check(made)
        assert found.status == "flag", found.data
        assert "radius 1/5 than at" in found.message
        assert found.value == pytest.approx(found.data["accuracy"][4] - min(found.data["accuracy"]))
        assert found.samples
    assert eps_curve.check(evidence(zoo.Linear(), backwards)).status == "pass"  # never rises: unbounded sees it


def test_a_loss_that_misleads_is_caught_by_a_single_step(zoo: ModuleType) -> None:
    rough = evidence(Ridge(zoo, before=misled), pgd, eps=2 * EPS, random_start=False)
    found = single_step_beats_iterative.check(rough)
    assert found.status == "flag", found.data
    assert found.data["steps"] == [20, 1]
    honest = evidence(zoo.Linear(), pgd, eps=2 * EPS, random_start=False)
    assert single_step_beats_iterative.check(honest).status == "pass"


def test_an_attack_outside_its_budget_is_an_error_of_the_run(zoo: ModuleType) -> None:
    with pytest.raises(AttackError, match="left its budget"):
        eps_curve.check(evidence(zoo.Linear(), far))
    with pytest.raises(AttackError, match="expected candidates of shape"):
        converged.check(evidence(zoo.Linear(), one_row))


# Black boxes against white boxes.

N = 200


def stage(family: str, score: Any, attempted: Any = None, n: int = N) -> StageScores:
    scores = np.asarray(score, dtype=np.float64)
    seen = np.ones(n, dtype=bool) if attempted is None else np.asarray(attempted)
    return StageScores(family, seen, scores, seen & (scores == 0), data.board_ids("digits")[:n])


def with_stages(made: Evidence, stages: Mapping[str, StageScores]) -> Evidence:
    return Evidence(made.subject, made.attack, made.options, made.n_draws, stages, np.ones(N))


def first(count: int) -> Any:
    return np.arange(N) < count


def test_a_random_search_that_breaks_what_gradients_left_is_caught(zoo: ModuleType) -> None:
    made, strong = evidence(zoo.Linear()), first(50)
    for more, status in [(0, "pass"), (1, "pass"), (40, "flag")]:
        white = stage("apgd", ~strong)
        # The last ones: not among the subject's images, whose samples the first attack broke.
        black = stage("black-box", ~(np.arange(N) >= N - more), ~strong)
        found = black_box_beats_white_box.check(with_stages(made, {"apgd-ce": white, "square": black}))
        assert found.status == status
        assert found.value == pytest.approx(more / N)
        assert len(found.samples) == (more if status == "flag" else 0)


def test_a_transfer_before_all_gradients_is_held_against_a_new_run(zoo: ModuleType) -> None:
    def run(defense: Defense, *, transferred: int = N) -> Finding:
        early = stage("transfer", ~first(transferred))
        late = stage("apgd", np.ones(N), ~first(transferred))
        return black_box_beats_white_box.check(
            with_stages(evidence(defense, eps=Fraction(1, 5)), {"transfer": early, "apgd-ce": late})
        )

    assert run(zoo.Linear()).status == "pass"  # gradients break them as well
    masked = run(Ridge(zoo, before=rounded))
    assert masked.status == "flag"
    assert "transfer" in masked.message
    assert set(masked.samples) <= set(data.board_ids("digits")[:32])
    assert run(Ridge(zoo, before=rounded), transferred=0).status == "pass"


def test_scores_of_draws_are_compared_on_what_both_attacked(zoo: ModuleType) -> None:
    generator = np.random.default_rng(0)

    def noisy(mean: float) -> Any:
        return generator.binomial(20, mean, N) / 20

    made = with_stages(evidence(zoo.Abstaining(), n=4), {})
    for black, status in [(0.5, "pass"), (0.8, "pass"), (0.3, "flag")]:
        stages = {
            "pgd": stage("pgd", noisy(0.7)),
            "bpda": stage("bpda", noisy(0.5)),
            "autoattack": stage("autoattack", noisy(0.0)),
            "square": stage("black-box", noisy(black)),
        }
        assert black_box_beats_white_box.check(with_stages(made, stages)).status == status


def test_without_a_black_box_nothing_is_compared(zoo: ModuleType) -> None:
    stages = {"apgd-ce": stage("apgd", np.ones(N)), "autoattack": stage("autoattack", np.zeros(N))}
    found = black_box_beats_white_box.check(with_stages(evidence(zoo.Linear()), stages))
    assert (found.status, found.value) == ("pass", None)


# Ablations.

WORKING: list[tuple[Attack, dict[str, Any]]] = [
    (apgd, {}),
    (apgd, {"loss": "dlr-targeted", "targets": 9}),
    (pgd, {}),
    (bpda, {"eot": 1}),
    (surrogate, {"eot": 1, "chain_steps": 3, "steps": 60}),
    (through_chain, {"eot": 1}),
    (through_chain, {"eot": 1, "variant": "relaxed"}),
    (step_losses, {"eot": 1}),
    (diffhammer, {"eot": 2, "restarts": 1}),
    (transfer, {"source": "components"}),
]


@pytest.mark.parametrize("eps", [EPS, Fraction(1, 5)])
@pytest.mark.parametrize(("attack", "options"), WORKING)
def test_attacks_that_work_pass_whatever_handles_they_use(
    zoo: ModuleType, attack: Attack, options: dict[str, Any], eps: Fraction
) -> None:
    defense = Ridge(zoo, before=rounded, handles=("stages",))
    plain = {"undefended": zoo.Linear(), "identity": ablations.identity_purifier(defense)}
    found = ablations.check(evidence(defense, attack, eps=eps, **options), plain)
    assert found.status == "pass", found.data
    assert set(found.data) == set(plain)


@pytest.mark.parametrize("attack", [backwards, idle])
def test_an_attack_that_fails_without_a_defense_is_the_one_to_blame(zoo: ModuleType, attack: Attack) -> None:
    for eps in (EPS, Fraction(1, 5), Fraction(1, 1000)):
        found = ablations.check(evidence(zoo.Linear(), attack, eps=eps), {"undefended": zoo.Linear()})
        if attack is idle and eps < EPS:
            continue  # within a thousandth nothing falls, and noise in the whole box breaks all: nobody could tell
        assert found.status == "fail", found.data
        assert "the attack, not the defense" in found.message
        assert found.samples


def test_a_loss_that_the_classifier_saturates_is_the_attacks_fault(zoo: ModuleType) -> None:
    saturated = Ridge(zoo, lambda x, logits: 1e4 * logits)
    assert ablations.check(evidence(saturated), {"classifier": saturated}).status == "fail"
    assert ablations.check(evidence(saturated, loss="margin"), {"classifier": saturated}).status == "pass"


def test_the_identity_takes_the_purifiers_place(zoo: ModuleType) -> None:
    purified = Ridge(zoo, before=rounded, traits=Traits(purifies=True), handles=("stages",))
    bare = ablations.identity_purifier(purified)
    x, noise = evidence(purified).subject.x + 0.03, Noise.from_seed(0, 32)
    assert torch.equal(bare(x, noise), zoo.Linear()(x, noise))
    assert not bare.card.traits.purifies
    for chain in (bare.chain(), bare.surrogate(3), bare.relaxed()):
        assert torch.equal(chain(x, noise), zoo.Linear()(x, noise))
    with pytest.raises(InputError, match="no 'stages' handle"):
        ablations.identity_purifier(zoo.Linear())


def test_a_classifier_that_takes_no_raw_images_is_skipped(zoo: ModuleType) -> None:
    def shrunk(x: Tensor) -> Tensor:
        return x[..., :4]

    class Small(Ridge):
        def stages(self) -> Stages:
            def classify(x: Tensor, noise: Noise) -> Tensor:
                if x.shape[-1] != 4:
                    raise ValueError("four columns, please")
                return x.flatten(1)[:, :10]

            return Stages(lambda x, noise: shrunk(x), classify)

    bare = ablations.identity_purifier(Small(zoo, handles=("stages",)))
    found = ablations.check(evidence(zoo.Linear()), {"identity": bare})
    assert found.status == "pass"
    assert "four columns" in found.data["identity"]["skipped"]
    assert ablations.check(evidence(zoo.Linear()), {}).value is None


# Calibration.

ATTACKS: list[tuple[Attack, dict[str, Any]]] = [
    (apgd, {"steps": 20, "loss": "margin-targeted", "targets": 9, "eot": 4}),
    (bpda, {"steps": 20, "eot": 4}),
]
BROKEN = ("bit_depth", "saturated_logits", "random_resize")


def calibrated(attacks: Any = ATTACKS, broken: Sequence[str] = (), **changes: Any) -> Finding:
    ids = data.board_ids("digits")[:32]
    x, y = data.load("digits", ids)
    threat = changes.pop("threat", ThreatModel("linf", Fraction(1, 5)))
    defenses = {name: DEFENSES[name].build("digits") for name in broken}
    return calibration.check_board(threat, x, y, Noise.from_seed(1, ids), attacks, defenses, ids=ids, **changes)


def test_a_sound_board_is_calibrated() -> None:
    found = calibrated(broken=BROKEN, n_draws=10, train=data.load("digits", data.train_split("digits")[:300]))
    assert found.status == "pass", found.message
    assert {f"{name} at 1/5" for name in BROKEN} < set(found.data)
    assert found.forward > found.backward > 0
    assert 0.2 < [v for k, v in found.data.items() if "linear" in k][1]["exact"] < 0.8


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_closed_forms_agree_with_those_of_the_zoo(zoo: ModuleType, norm: Any) -> None:
    x, y = data.load("digits", data.board_ids("digits")[:32])
    weight, bias = (torch.from_numpy(part) for part in zoo.ridge())
    exact = zoo.linf_robust if norm == "linf" else zoo.l2_robust
    for eps in (0.0, 0.03, 0.1, 0.5, 2.0):
        leads = calibration.worst_leads(calibration.Linear(weight, bias), x, y, norm, eps)
        assert np.array_equal((leads < 0).all(1).numpy(), exact(x, y, eps))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_alone_calibrates_either_norm_and_catches_bad_attacks(norm: Any) -> None:
    threat = ThreatModel(norm, Fraction(1, 10) if norm == "linf" else Fraction(1))
    assert calibrated(ATTACKS[:1], threat=threat).status == "pass"
    for attack in (backwards, idle):
        found = calibrated([(attack, {})], threat=threat)
        assert found.status == "fail"
        assert "linear model" in found.message
        assert found.samples


def test_a_board_on_which_a_broken_defense_stands_is_broken() -> None:
    blind = calibrated([(apgd, {"steps": 20, "loss": "margin"})], ["bit_depth"])
    assert blind.status == "fail"
    assert "bit_depth, known to be broken" in blind.message
    assert "linear model" not in blind.message


def test_at_a_radius_that_spares_everybody_broken_defenses_are_measured_further_out() -> None:
    mild = ThreatModel("linf", Fraction(1, 10))
    alone = calibrated(broken=["bit_depth"], threat=mild)
    assert alone.status == "fail", "the radius spares bit_depth, as it would spare an undefended model"
    found = calibrated(broken=["bit_depth"], threat=mild, undefended=DEFENSES["undefended"].build("digits"))
    assert found.status == "pass", found.message
    assert found.data["undefended at 1/10"]["accuracy"] > calibration.UNDEFENDED
    assert found.data["undefended at 1/5"]["accuracy"] <= calibration.UNDEFENDED
    assert found.data["bit_depth at 1/5"]["accuracy"] < calibration.LEFT


# Statistics, and the whole.


def test_the_paired_test_looks_one_way() -> None:
    assert compare([1] * 7 + [0] * 9, [0] * 16) == pytest.approx((7 / 16, 2.0**-7))
    assert compare([1] * 7 + [0] * 9, [0] * 16).significant()
    assert not compare([1] * 6 + [0] * 9, [0] * 15).significant()
    assert compare([0] * 16, [1] * 16).p == 1
    assert compare([], []) == (0.0, 1.0)
    assert compare([0.5] * 10, [0.4] * 10).p == pytest.approx(2.0**-10)
    assert not compare([0.5] * 10, [0.495] * 10).significant()  # sure, and of no matter
    assert whole_box("l2", torch.zeros(1, 3, 32, 32)) == 56


def test_a_run_is_made_once(zoo: ModuleType) -> None:
    made = evidence(zoo.Linear())
    made.attacked()
    before = made.subject.calls
    made.attacked(EPS)
    made.attacked(None, steps=20)
    assert made.subject.calls == before
    assert made.of(zoo.Abstaining()).n_draws == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "options"),
    [
        ("undefended", 16, {"steps": 20}),
        ("adversarial_training", 16, {"steps": 20}),
        ("trades", 16, {"steps": 20}),
        ("smoothing", 16, {"steps": 15, "eot": 8}),
        ("diffpure", 4, {"steps": 6, "eot": 2}),
    ],
)
def test_registered_defenses_are_healthy(name: str, n: int, options: dict[str, Any]) -> None:
    defense = DEFENSES[name].build("digits")
    made = evidence(defense, n=n, eps=Fraction(1, 5), **options)
    found = [check(made) for check in RERUN.values()]
    plain: dict[str, Defense] = {"undefended": DEFENSES["undefended"].build("digits"), "itself": defense}
    if "stages" in defense.card.handles:
        plain["identity"] = ablations.identity_purifier(defense)
    found.append(ablations.check(made, plain))
    assert {finding.status for finding in found} == {"pass"}, [finding.message for finding in found]
