"""Each preflight check against defenses that it must catch and defenses that it must let through."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from assay import data
from assay.card import Card, Traits, Votes
from assay.checks import PREFLIGHT, Subject, preflight
from assay.defense import Defense, ForeignModule
from assay.finding import Finding
from assay.noise import Noise

STOCHASTIC = Traits(stochastic=True)


class Toy(Defense):
    """A small network; `change(self, x, logits, noise)` is what a test does to it."""

    def __init__(self, change: Callable[..., Any] | None = None, traits: Traits | None = None, draws: int = 1) -> None:
        super().__init__()
        votes = Votes(draws=draws, how="probabilities")
        self.card = Card(name="toy", title="Toy", summary="", traits=traits or Traits(), votes=votes)
        self.n_classes = 10
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
            self.head = nn.Linear(144, 10)
        self.change = change
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits if self.change is None else self.change(self, x, logits, noise)


def subject(defense: Defense, n: int = 12) -> Subject:
    ids = data.board_ids("digits")[:n]
    x, y = data.load("digits", ids)
    return Subject(defense, x, y, ids, Noise.from_seed(3, ids))


def check(name: str, defense: Defense) -> Finding:
    found = PREFLIGHT[name](subject(defense))
    assert found.check == name
    assert found.message
    return found


# What a defense may do wrong, and the check that must see it.


def count(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.count += 1
    return logits


def count_unsaved(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.unsaved += 1
    return logits


def learn(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.head.bias.data.add_(1e-3)
    return logits


def keep_dropout(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.body[-1].train()
    return logits


def global_generator(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits + torch.randn_like(logits)


def functional_dropout(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return dropout(logits, 0.5, training=True)


def reseed(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    torch.manual_seed(0)
    return logits + torch.randn_like(logits)


def draw_and_forget(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    torch.rand(1)
    return logits


def own_generator(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.generator = getattr(self, "generator", None) or torch.Generator().manual_seed(0)
    return logits + torch.randn(logits.shape, generator=self.generator)


def honest(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits + noise.normal("logits", shape=(10,), like=logits)


def centre(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits - logits.mean(0)


def first_row(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return torch.cat([logits[:1] * 3, logits[1:]])


def slots(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits * (1 + (torch.arange(len(logits)) % 2))[:, None]


def clamp_in_place(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    x.clamp_(0, 0.5)
    return logits


def crash(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    raise RuntimeError("out of paper")


def wrong_shape(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits[:, :9]


def one_row_short(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits.squeeze(0)


def labels(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return nn.functional.one_hot(logits.argmax(1), 10)


def infinite(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return torch.where((x.flatten(1).sum(1) > x.flatten(1).sum(1).median())[:, None], torch.inf, logits)


def nothing(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Any:
    return None


CAUGHT = [
    ("interface", crash, None, "out of paper"),
    ("interface", wrong_shape, None, "(12, 9)"),
    ("interface", one_row_short, None, "(1, 10)"),
    ("interface", labels, None, "int64"),
    ("interface", infinite, None, "NaN or infinity"),
    ("interface", nothing, None, "NoneType"),
    ("interface", clamp_in_place, None, "in place"),
    ("modes", count, None, "count"),
    ("modes", count_unsaved, None, "unsaved"),
    ("modes", learn, None, "head.bias"),
    ("honest_randomness", global_generator, None, "different answers"),
    ("honest_randomness", global_generator, STOCHASTIC, "different answers"),
    ("honest_randomness", functional_dropout, STOCHASTIC, "different answers"),
    ("honest_randomness", own_generator, STOCHASTIC, "different answers"),
    ("honest_randomness", reseed, STOCHASTIC, "global generator"),
    ("honest_randomness", draw_and_forget, None, "global generator"),
    ("honest_randomness", honest, None, "declare the trait"),
    ("honest_randomness", None, STOCHASTIC, "drop the trait"),
    ("batch_independence", centre, None, "neighbours"),
    ("batch_independence", first_row, None, "place in the batch"),
    ("batch_independence", slots, None, "place in the batch"),
]


@pytest.mark.parametrize(("name", "change", "traits", "says"), CAUGHT)
def test_a_defense_that_breaks_a_rule_is_caught(
    name: str, change: Callable[..., Any] | None, traits: Traits | None, says: str
) -> None:
    with torch.random.fork_rng():
        found = check(name, Toy(change, traits))
    assert found.status == "fail"
    assert says in found.message
    assert set(found.samples) <= set(subject(Toy()).ids)


@pytest.mark.parametrize("name", PREFLIGHT)
@pytest.mark.parametrize(
    ("change", "traits", "draws"), [(None, None, 1), (honest, STOCHASTIC, 1), (honest, STOCHASTIC, 4)]
)
def test_an_honest_defense_passes_every_check(
    name: str, change: Callable[..., Any] | None, traits: Traits | None, draws: int
) -> None:
    found = check(name, Toy(change, traits, draws))
    assert found.status == "pass", found.message


def test_ids_of_the_samples_behind_a_finding() -> None:
    images = subject(Toy())
    mass = images.x.flatten(1).sum(1)
    heavy = (mass > mass.median()).tolist()
    assert check("interface", Toy(infinite)).samples == tuple(
        i for i, bad in zip(images.ids, heavy, strict=True) if bad
    )
    assert check("batch_independence", Toy(first_row)).samples[0] == images.ids[0]


def test_training_mode_is_caught_before_and_after_a_forward_pass() -> None:
    defense = Toy()
    defense.body[1].train()
    assert check("modes", defense).status == "fail"
    assert "body.1" in check("modes", defense).message
    # A forward that switches dropout on is seen because `interface` has called it by then.
    switching = Toy(keep_dropout)
    assert [f.status for f in preflight(subject(switching), PREFLIGHT)][:2] == ["pass", "fail"]


def test_batch_statistics_are_caught() -> None:
    # eval() can't reach a layer that computes its statistics by hand, or keeps none.
    class Unkept(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.body[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()

    assert check("batch_independence", Unkept()).status == "fail"


def test_a_defense_that_moves_its_input_leaves_the_subject_as_it_was() -> None:
    images = subject(Toy(clamp_in_place))
    before = images.x.clone()
    assert PREFLIGHT["interface"](images).samples
    assert torch.equal(images.x, before)


def test_nothing_is_measured_after_a_broken_interface_and_all_else_is_in_order() -> None:
    found = preflight(subject(Toy(crash)), reversed(list(PREFLIGHT)))
    assert [f.check for f in found] == ["interface"]
    assert [f.check for f in preflight(subject(Toy()), reversed(list(PREFLIGHT)))] == list(PREFLIGHT)
    assert [f.check for f in preflight(subject(Toy()), ["modes"])] == ["modes"]


@pytest.mark.parametrize("fault", [torch.nan, None])
@pytest.mark.parametrize("calls", [3, 4, 6, 7])
def test_a_defense_that_fails_after_a_few_calls_fails_its_check_and_not_the_program(
    calls: int, fault: float | None
) -> None:
    seen = []

    def tire(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        seen.append(len(x))
        if len(seen) > calls:
            if fault is None:
                raise RuntimeError("out of paper")
            return logits * fault
        return logits

    found = preflight(subject(Toy(tire)), PREFLIGHT)
    assert found[0].status == "pass"
    assert "fail" in {f.status for f in found}
    assert len(found) == len(PREFLIGHT)


def test_the_checks_do_not_move_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    preflight(subject(Toy(honest, STOCHASTIC)), PREFLIGHT)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_foreign_module_with_dropout_is_honest_once_it_is_declared_stochastic() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dropout(x.flatten(1)[:, 20:30] + 1, 0.5, training=True)

    with torch.random.fork_rng():
        card = Card(name="toy", title="Toy", summary="")
        assert check("honest_randomness", ForeignModule(Dropping(), card, 10)).status == "fail"
        declared = card.model_copy(update={"traits": STOCHASTIC})
        assert check("honest_randomness", ForeignModule(Dropping(), declared, 10)).status == "pass"


def test_the_zoo_behaves(zoo: ModuleType) -> None:
    # Most checks leave the data, where a late fault shows.
    asked = ("interface", "modes")
    for defense in (zoo.LINEAR, zoo.ABSTAINING, zoo.LATE_NAN, zoo.LATE_CRASH):
        assert {f.status for f in preflight(subject(defense), asked)} == {"pass"}
    for defense in (zoo.LATE_NAN, zoo.LATE_CRASH):
        assert "fail" in {f.status for f in preflight(subject(defense), PREFLIGHT)}
    for defense in (zoo.CRASH, zoo.SHAPE, zoo.NAN):
        (found,) = preflight(subject(defense), PREFLIGHT)
        assert found.status == "fail"


def test_a_unanimous_vote_is_no_lack_of_randomness() -> None:
    class Sure(Defense):
        card = Card(name="sure", title="Sure", summary="", traits=STOCHASTIC, votes=Votes(draws=8, how="majority"))
        n_classes = 2

        def __init__(self, spread: float) -> None:
            super().__init__()
            self.spread = spread

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            z = self.spread * noise.normal("z", shape=(2,), like=x)
            return torch.tensor([0.0, 100.0]) + z

    assert check("honest_randomness", Sure(0.1)).status == "pass"
    assert check("honest_randomness", Sure(0.0)).status == "fail"
