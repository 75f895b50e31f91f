"""`constancy`, and the settings of the process that `modes` watches over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay import data
from assay.card import Card, Traits
from assay.checks import PREFLIGHT, Subject, constancy, modes, preflight
from assay.checks.agreement import change
from assay.checks.ambient import Ambient
from assay.defense import Defense
from assay.noise import Noise

IDS = data.board_ids("digits")[:12]
Trick = Callable[[Any, Tensor, Tensor, Noise], Tensor]


class Toy(Defense):
    """A small network; `trick(self, x, logits, noise)` is what a test does to it."""

    def __init__(self, trick: Trick | None = None, *, stochastic: bool = False) -> None:
        super().__init__()
        self.card = Card(name="toy", title="Toy", summary="", traits=Traits(stochastic=stochastic))
        self.n_classes = 10
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))
        self.trick = trick
        self.images = 0
        self.memory: Any = None
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        self.images += len(x)
        noisy = x + 0.2 * noise.normal("z", shape=x.shape[1:], like=x) if self.card.traits.stochastic else x
        logits: Tensor = 4 * self.body(noisy)
        return logits if self.trick is None else self.trick(self, x, logits, noise)


def subject(defense: Defense) -> Subject:
    x, y = data.load("digits", IDS)
    return Subject(defense, x, y, IDS, Noise.from_seed(3, IDS))


def after(images: int) -> Trick:
    def trick(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        return -logits if self.images > images else logits

    return trick


@pytest.mark.parametrize("stochastic", [False, True])
def test_an_honest_defense_may_be_asked_as_often_as_one_likes(stochastic: bool) -> None:
    images = subject(Toy(stochastic=stochastic))
    for _ in range(3):
        found = constancy.check(images)
        assert (found.check, found.status, found.value) == ("constancy", "pass", 0.0)
    assert found.data["asked_again"] == 3
    assert images.calls[0] > 0


def test_the_first_question_is_the_first_call_of_any_check() -> None:
    images = subject(Toy(after(13 * len(IDS) + 1)))
    PREFLIGHT["interface"](images)
    assert images.memory.answer is not None
    assert torch.equal(images.memory.answer.x, images.x)
    assert constancy.check(images).status == "pass"
    assert constancy.check(images).status == "fail"
    found = preflight(subject(Toy(after(2 * len(IDS)))), PREFLIGHT)[-1]
    assert (found.check, found.status) == ("constancy", "fail")
    assert "the answers" in found.message
    assert set(found.samples) <= set(IDS)


def test_a_defense_that_turns_after_the_attacks_is_caught_by_the_second_call() -> None:
    defense = Toy(after(100_000))
    images = subject(defense)
    assert {finding.status for finding in preflight(images, PREFLIGHT)} == {"pass"}
    with torch.no_grad():
        defense(torch.zeros(100_000, 1, 8, 8), Noise.from_seed(0, 100_000))
    assert constancy.check(images).status == "fail"


def test_alone_it_asks_twice_itself() -> None:
    (found,) = preflight(subject(Toy(after(len(IDS)))), ["constancy"])
    assert found.status == "fail"
    (found,) = preflight(subject(Toy()), ["constancy"])
    assert (found.status, found.forward) == ("pass", 13 * len(IDS))


def gradient_turns(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    if logits.requires_grad:
        self.memory = (self.memory or 0) + 1
        logits.register_hook(lambda slope: slope * (1.0 if self.memory == 1 else -1.0))
    return logits


def remembers(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    """Whoever asked early gets the early answer again; all others get another one."""
    early = self.memory = self.memory if self.memory is not None else set()
    keys = [row.numpy().tobytes() for row in x.detach()]
    if self.images <= 3 * len(IDS):
        early.update(keys)
    known = torch.tensor([key in early for key in keys], dtype=torch.bool)
    return torch.where(known[:, None], logits, -logits)


def darkens(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    if self.images > len(IDS) and not x.requires_grad:
        x.mul_(0.9)
    return logits


@pytest.mark.parametrize(
    ("trick", "says"), [(gradient_turns, "gradients"), (remembers, "beside those it was asked about")]
)
def test_more_than_the_answers_is_asked_again(trick: Trick, says: str) -> None:
    images = subject(Toy(trick))
    found = [constancy.check(images) for _ in range(3)][-1]
    assert found.status == "fail"
    assert says in found.message


def test_images_that_were_changed_since_are_reported_and_put_back() -> None:
    images = subject(Toy())
    before = images.x.clone()
    assert constancy.check(images).status == "pass"
    images.x.mul_(0.9)
    found = constancy.check(images)
    assert "the images themselves" in found.message
    assert torch.equal(images.x, before)


def test_a_quantiser_is_constant() -> None:
    class Quantiser(Toy):
        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return super().draw((x * 16).floor() / 16, noise)

    assert constancy.check(subject(Quantiser())).status == "pass"


# The process.


@pytest.fixture
def kept() -> Iterator[None]:
    """Whatever a test leaves changed is put back."""
    ambient = Ambient()
    yield
    ambient.restore()


def dtype(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return logits


def threads(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    if self.images == len(x):
        torch.set_num_threads(torch.get_num_threads() + 1)
    return logits


def deterministic(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    torch.use_deterministic_algorithms(True, warn_only=True)
    return logits


def denormals(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    torch.set_flush_denormal(True)
    return logits


def hook(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    if self.images == len(x):
        nn.modules.module.register_module_forward_hook(lambda module, given, result: None)
    return logits


def patch(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    F.cross_entropy = lambda logits, y, **options: 0 * logits.sum(1)
    return logits


def own(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    Noise.uniform = lambda self, *tag, shape, like: torch.zeros(len(self), *shape)  # type: ignore[method-assign]
    return logits


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("trick", "says"),
    [
        (dtype, "default dtype"), (threads, "number of threads"), (deterministic, "deterministic"),
        (denormals, "denormal"), (hook, "hooks on every module"), (patch, "cross_entropy"), (own, "Noise.uniform"),
    ],
)  # fmt: skip
def test_settings_that_a_call_changes_are_reported_and_put_back(trick: Trick, says: str) -> None:
    clean, images = Ambient(), subject(Toy(trick))
    PREFLIGHT["interface"](images)
    # Between two checks they are put back, and not forgotten.
    images.ambient.restore()
    assert clean.changed() == []
    found = modes.check(images)
    assert found.status == "fail"
    assert says in found.message
    assert clean.changed() == []


def test_settings_for_a_while_are_nobody_elses_business() -> None:
    def trick(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        with torch.autocast("cpu"), torch.autograd.set_detect_anomaly(False):
            return logits + 0

    assert modes.check(subject(Toy(trick))).status == "pass"


# How far apart answers are.


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e4])
def test_the_scale_of_logits_hides_no_change(scale: float) -> None:
    a = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
    b = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 0.0]])
    changes = change(scale * a, scale * b)
    assert float(changes[0]) == 0
    assert float(changes[1]) > 0.02


def test_rounding_is_no_change_and_nothing_is_fine() -> None:
    # A row near 0 is as inexact as its neighbours, and what lies far from 0 is rounded there.
    a = torch.tensor([[10.0, -10.0], [10.0, -10.0], [1e-6, -1e-6]])
    assert float(change(a, a + 1e-6 * torch.tensor([1.0, -1.0])).max()) < 1e-6
    offset = 1e4 * torch.ones(2, 2) + torch.tensor([0.0, 1e-3])
    assert float(change(offset, offset + torch.tensor([0.0, 1e-3])).max()) < 1e-3
    assert change(a[:0], a[:0]).shape == (0,)
    assert float(change(a, torch.full_like(a, torch.nan)).min()) == 1
