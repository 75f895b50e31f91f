"""The checks of gradients, chains and their costs, against defenses that they must catch and must let through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, dropout

from assay import data
from assay.card import Card, Handle, Traits, Votes
from assay.chain import Chain, State
from assay.checks import chain_exact, finite_difference, replay, saturation, step_count, zero_gradients
from assay.checks.subject import Subject
from assay.defense import Defense, ForeignModule, Stages
from assay.finding import Finding
from assay.noise import Noise
from assay.registry import DEFENSES
from assay.threat import ThreatModel

CHECKS: dict[str, ModuleType] = {
    "finite_difference": finite_difference,
    "chain_exact": chain_exact,
    "replay": replay,
    "step_count": step_count,
    "zero_gradients": zero_gradients,
    "saturation": saturation,
}
Change = Callable[..., Any]


def same(self: Any, value: Tensor, noise: Noise) -> Tensor:
    return value


class Toy(Defense):
    """A small smooth network; `before` changes its image, `after` its logits."""

    def __init__(self, before: Change = same, after: Change = same, traits: Traits | None = None) -> None:
        super().__init__()
        self.card = Card(name="toy", title="Toy", summary="", traits=traits or Traits(), network_calls=1)
        self.n_classes = 10
        self.before, self.after = before, after
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logits: Tensor = self.after(self, 5 * self.network(self.before(self, x, noise)), noise)
        return logits


def subject(defense: Defense, n: int = 16, threat: ThreatModel | None = None) -> Subject:
    ids = data.board_ids("digits")[:n]
    x, y = data.load("digits", ids)
    noise = Noise.from_seed(0, ids).child("preflight")
    return Subject(defense, x, y, ids, noise, threat or ThreatModel("linf", Fraction(1, 10)))


def check(name: str, defense: Defense, n: int = 16, threat: ThreatModel | None = None) -> Finding:
    made = subject(defense, n, threat)
    found: Finding = CHECKS[name].check(made)
    assert found.check == name
    assert set(found.samples) <= set(made.ids)
    Finding.model_validate_json(found.model_dump_json())
    return found


# Gradients that are not those of the forward pass.


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(-1)


def hooked(change: Callable[[Tensor], Tensor]) -> Change:
    def hook(self: Any, value: Tensor, noise: Noise) -> Tensor:
        alias = value.view_as(value)
        if alias.requires_grad:
            alias.register_hook(change)
        return alias

    return hook


def randomise(gradient: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return gradient + gradient.abs().mean() * torch.randn(gradient.shape, generator=generator)


def in_single_precision(gradient: Tensor) -> Tensor:
    return gradient / 2 if gradient.dtype == torch.float32 else gradient


def half_detached(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return torch.cat([x[..., :4].detach(), x[..., 4:]], -1)


def other_schedule(self: Any, logits: Tensor, noise: Noise) -> Tensor:
    """The logits, with the gradient of others."""
    return logits.detach() + logits.tanh() - logits.tanh().detach()


def levels(highest: int) -> Change:
    def rounded(self: Any, x: Tensor, noise: Noise) -> Tensor:
        return x + (torch.round(x * highest) / highest - x).detach()

    return rounded


def stepwise(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return torch.round(x * 3) / 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (hooked(lambda gradient: gradient.clamp(-1e-3, 1e-3)), same),
        (hooked(lambda gradient: gradient * 0.8), same),
        (hooked(lambda gradient: gradient * 0), same),
        (hooked(lambda gradient: gradient.sign()), same),
        (hooked(lambda gradient: gradient * torch.nan), same),
        (hooked(in_single_precision), same),
        (hooked(randomise), same),
        (hooked(lambda gradient: gradient * (torch.arange(len(gradient)) % 2)[:, None, None, None]), same),
        (lambda self, x, noise: Wrong.apply(x), same),
        (lambda self, x, noise: x.detach(), same),
        (half_detached, same),
        (levels(3), same),
        (same, other_schedule),
        (same, hooked(lambda gradient: gradient.clamp(-0.1, 0.1))),
        (same, hooked(lambda gradient: torch.where(gradient > 0, gradient, 0.0))),
    ],
)
def test_gradients_of_something_else_are_caught(before: Change, after: Change) -> None:
    found = check("finite_difference", Toy(before, after))
    assert found.status == "fail", found
    declared = check("finite_difference", Toy(before, after, Traits(non_differentiable=True)))
    assert (declared.status, declared.value) == ("pass", found.value)


def noisy_clip(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return (x + 0.3 * noise.normal("noise", shape=x.shape[1:], like=x)).clamp(0, 1)


def single(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("float32 alone")
    return x


def cast(self: Any, x: Tensor, noise: Noise) -> Tensor:
    """Answers in the dtype that it was asked in, but computes the image in single precision."""
    return (x.float() * 1.1).float().to(x.dtype)


HONEST: list[tuple[str, Change, Change, Traits]] = [
    ("network", same, same, Traits()),
    ("clip", lambda self, x, noise: (1.2 * x - 0.1).clamp(0, 1), same, Traits()),
    ("noise and clip", noisy_clip, same, Traits(stochastic=True)),
    ("four levels, no gradient", stepwise, same, Traits()),
    (
        "median",
        lambda self, x, noise: torch.median(torch.stack([x, x.roll(1, 2), x.roll(1, 3)]), 0).values,
        same,
        Traits(),
    ),
    ("never outside the box", lambda self, x, noise: torch.where((x < 0) | (x > 1), torch.nan, x), same, Traits()),
    ("single precision alone", single, same, Traits()),
    ("single precision inside", cast, same, Traits()),
    ("probabilities", same, lambda self, z, noise: (8 * z).softmax(1), Traits()),
    ("log-probabilities", same, lambda self, z, noise: (8 * z).log_softmax(1), Traits()),
    ("large logits", same, lambda self, z, noise: 1e4 * z, Traits()),
    ("tiny logits", same, lambda self, z, noise: 1e-4 * z, Traits()),
    ("constant", same, lambda self, z, noise: torch.ones_like(z), Traits()),
]


@pytest.mark.parametrize(("name", "before", "after", "traits"), HONEST, ids=[row[0] for row in HONEST])
def test_honest_gradients_pass(name: str, before: Change, after: Change, traits: Traits) -> None:
    found = check("finite_difference", Toy(before, after, traits))
    assert found.status == "pass", found
    assert check("step_count", Toy(before, after, traits)).status == "pass"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (levels(255), same),
        (lambda self, x, noise: x.bfloat16().to(x.dtype), same),
        (same, lambda self, z, noise: z.bfloat16().to(z.dtype)),
    ],
)
def test_fine_rounding_is_at_most_flagged(before: Change, after: Change) -> None:
    assert check("finite_difference", Toy(before, after)).status != "fail"


def halved(dtype: torch.dtype) -> Change:
    """The whole network in half precision."""

    def answer(self: Any, logits: Tensor, noise: Noise) -> Tensor:
        found: Tensor = 5 * copy.deepcopy(self.network).to(dtype)(self.image.to(dtype)).to(logits)
        return found

    return answer


def remembered(self: Any, x: Tensor, noise: Noise) -> Tensor:
    self.image = x
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_failed_for_its_resolution(dtype: torch.dtype) -> None:
    """It is flat over small steps, with a gradient that is right all the same."""
    assert check("finite_difference", Toy(remembered, halved(dtype))).status != "fail"


def test_half_precision_excuses_no_wrong_gradient() -> None:
    def wrong(self: Any, x: Tensor, noise: Noise) -> Tensor:
        self.image = Wrong.apply(x)
        return x

    assert check("finite_difference", Toy(wrong, halved(torch.bfloat16))).status == "fail"


def test_a_gradient_that_is_right_at_the_images_alone_is_caught() -> None:
    """Where the two largest logits nearly tie it is turned."""

    def turned(self: Any, logits: Tensor, noise: Noise) -> Tensor:
        top = logits.detach().topk(2, 1).values
        near = top[:, :1] - top[:, 1:] < 0.1 * top.abs().amax()
        return torch.where(near, 2 * logits.detach() - logits, logits)

    found = check("finite_difference", Toy(after=turned))
    assert found.status == "fail"
    assert "boundary" in found.message
    assert isinstance(found.data["wrong"], dict)
    assert found.data["wrong"]["boundary"] > found.data["wrong"]["image"]


def test_logits_that_no_loss_of_the_largest_two_sees_are_compared() -> None:
    def largest(self: Any, logits: Tensor, noise: Noise) -> Tensor:
        return torch.where(logits >= logits.topk(2, 1).values[:, 1:], logits, logits.detach())

    assert check("finite_difference", Toy(after=largest)).status == "fail"


def test_a_copy_is_not_needed() -> None:
    class Rooted(Toy):
        def __deepcopy__(self, memo: object) -> Rooted:
            raise TypeError("not this one")

    assert check("finite_difference", Rooted()).data["double_precision"] is False
    assert check("finite_difference", Rooted()).status == "pass"
    assert check("finite_difference", Rooted(hooked(lambda gradient: gradient / 2))).status == "fail"
    assert check("finite_difference", Toy()).data["double_precision"] is True


def test_a_foreign_module_with_dropout_is_measured_on_its_own_noise() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Toy().network

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(dropout(x, 0.5, training=True))
            return logits

    card = Card(name="toy", title="Toy", summary="", traits=Traits(stochastic=True), network_calls=1)
    for name in CHECKS:
        if name != "saturation":
            assert check(name, ForeignModule(Dropping(), card, 10)).status == "pass", name


def test_a_linear_model_is_exact(zoo: ModuleType) -> None:
    for name in CHECKS:
        found = check(name, zoo.LINEAR)
        assert found.status == "pass", found
    assert check("finite_difference", zoo.LINEAR).data["largest_error"] < 1e-3
    assert check("zero_gradients", zoo.LINEAR).value == 0


@pytest.mark.parametrize("name", CHECKS)
def test_one_image_is_enough_and_the_finding_is_repeated(name: str) -> None:
    l2 = ThreatModel("l2", Fraction(1, 2))
    assert check(name, Toy(), n=1, threat=l2) == check(name, Toy(), n=1, threat=l2)
    assert check(name, Toy(), n=1, threat=l2).status == "pass"


# Chains.


class Walk(Defense):
    """A few steps of a small network over the image, then a linear map; `step` is what a test changes."""

    handles: tuple[Handle, ...] = ("chain", "surrogate")

    def __init__(self, change: Change | None = None, steps: int = 4, traits: Traits | None = None) -> None:
        super().__init__()
        self.steps, self.change = steps, change
        self.n_classes = 10
        self.card = Card(
            name="walk",
            title="Walk",
            summary="",
            traits=traits or Traits(stochastic=True, iterative=True),
            handles=self.handles,
            network_calls=steps + 1,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.cell = nn.Conv2d(1, 1, 3, padding=1)
            self.head = nn.Linear(64, 10)
        self.kept: dict[str, Any] = {"calls": 0}
        self.eval().requires_grad_(False)

    def step(self, state: State, x: Tensor, noise: Noise) -> State:
        image, count = state
        moved = image + 0.3 * self.cell(image).tanh() + 0.1 * noise.normal("z", shape=x.shape[1:], like=x)
        return (moved if self.change is None else self.change(self, moved, image, x, noise)), count + 1

    def walk(self, steps: int) -> Chain:
        return Chain(
            lambda x, noise: (x, torch.zeros(len(x), dtype=torch.int64)),
            [self.step] * steps,
            lambda state, x, noise: self.head(state[0].flatten(1)),
            network_calls=steps + 1,
        )

    def chain(self) -> Chain:
        return self.walk(self.steps)

    def surrogate(self, steps: int) -> Chain:
        return self.walk(min(steps, self.steps))

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", CHECKS)
def test_an_honest_chain_passes(name: str, steps: int) -> None:
    found = check(name, Walk(steps=steps))
    assert found.status == "pass", found


def lent(self: Any, moved: Tensor, image: Tensor, x: Tensor, noise: Noise) -> Tensor:
    """Adds what the first step made, which no later state holds."""
    first = torch.equal(image, x)
    if first:
        self.kept["first"] = moved
    return moved if first else moved + 0.5 * self.kept["first"]


def count(self: Any, moved: Tensor, image: Tensor, x: Tensor, noise: Noise) -> Tensor:
    self.kept["calls"] += 1
    return moved + 0.01 * (self.kept["calls"] % 2)


def own_noise(self: Any, moved: Tensor, image: Tensor, x: Tensor, noise: Noise) -> Tensor:
    return moved + 0.01 * torch.randn_like(moved)


def by_grad_mode(self: Any, moved: Tensor, image: Tensor, x: Tensor, noise: Noise) -> Tensor:
    return moved * 1.1 if image.requires_grad else moved


def in_place(self: Any, moved: Tensor, image: Tensor, x: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad():
        image.mul_(0.9)
    return moved


def previous(self: Any, moved: Tensor, image: Tensor, x: Tensor, noise: Noise) -> Tensor:
    """Repeats bit for bit at once, but not in the order of the backward pass."""
    last, self.kept["last"] = self.kept.get("last", image), moved.detach()
    return moved + 0.01 * last if last.shape == moved.shape else moved


@pytest.mark.parametrize("change", [count, own_noise, by_grad_mode, in_place, previous])
def test_steps_that_do_not_replay_are_caught(change: Change) -> None:
    with torch.random.fork_rng():
        found = check("replay", Walk(change))
    assert found.status == "fail"
    assert "run again" in found.message


def test_a_step_that_borrows_a_tensor_is_caught() -> None:
    class Borrowing(Walk):
        """Closes over its start: the full graph knows the way, a replayed step does not."""

        def chain(self) -> Chain:
            held: list[Tensor] = []

            def start(x: Tensor, noise: Noise) -> State:
                held[:] = [x * x]
                return x

            return Chain(
                start,
                [lambda state, x, noise: state + held[0]],  # type: ignore[operator]
                lambda state, x, noise: self.head(state.flatten(1)),  # type: ignore[union-attr]
            )

    assert check("chain_exact", Borrowing()).status == "fail"
    assert "full graph" in check("chain_exact", Borrowing()).message


def test_a_chain_that_is_not_the_draw_is_caught() -> None:
    class Shorter(Walk):
        def chain(self) -> Chain:
            return self.walk(2)

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return self.walk(4)(x, noise)

    class Cut(Walk):
        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return self.walk(4)((x.detach() + x) / 2, noise)

    assert "not those of draw" in check("chain_exact", Shorter()).message
    assert "gradients of chain and draw differ" in check("chain_exact", Cut()).message
    assert check("chain_exact", Cut(traits=Traits(stochastic=True, non_differentiable=True))).status == "pass"
    assert check("step_count", Shorter()).status == "fail"


def test_a_chain_in_single_precision_alone_is_compared_in_it() -> None:
    def single_step(self: Any, moved: Tensor, image: Tensor, x: Tensor, noise: Noise) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 alone")
        return moved

    for name in CHECKS:
        found = check(name, Walk(single_step))
        assert found.status == "pass", found
    assert check("chain_exact", Walk(single_step)).data["double_precision"] is False


# Costs.


class Attacked(Walk):
    """Takes another number of steps in one of the ways that it is run."""

    def __init__(self, way: str, steps: int = 2) -> None:
        super().__init__(traits=Traits(stochastic=True))
        self.way, self.fewer = way, steps

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        watched = {"grad": torch.is_grad_enabled(), "leaf": x.requires_grad, "draw": True}
        return self.walk(self.fewer if watched.get(self.way) else self.steps)(x, noise)

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        return self.walk(self.steps)(x, noise) if self.way == "draw" else super().forward(x, noise)


@pytest.mark.parametrize("way", ["grad", "leaf", "draw"])
@pytest.mark.parametrize("steps", [2, 6])
def test_another_process_when_attacked_is_caught(way: str, steps: int) -> None:
    assert check("step_count", Attacked(way, steps)).status == "fail"
    assert check("step_count", Attacked("never", steps)).status == "pass"


def test_functional_networks_are_counted() -> None:
    class Functional(Attacked):
        def step(self, state: State, x: Tensor, noise: Noise) -> State:
            image, taken = state
            return conv2d(image, self.cell.weight, padding=1), taken + 1

    assert check("step_count", Functional("grad")).status == "fail"
    assert check("step_count", Functional("never")).status == "pass"


def carded(defense: Defense, **changes: Any) -> Defense:
    defense.card = defense.card.model_copy(update=changes)
    return defense


def test_the_card_is_held_against_the_counts() -> None:
    assert check("step_count", carded(Walk(), handles=(), network_calls=None)).status == "pass"
    for claimed, status in ((3, "flag"), (4, "pass"), (5, "pass"), (6, "flag"), (100, "flag")):
        found = check("step_count", carded(Walk(), handles=(), network_calls=claimed))
        assert found.status == status, claimed
        assert found.threshold == claimed
    assert check("step_count", carded(Toy(), network_calls=2)).status == "flag"
    assert check("step_count", carded(Toy(), network_calls=0)).status == "flag"


def test_a_wrapped_process_is_read_as_one_network_or_as_its_parts() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.walk = Walk()

        def forward(self, x: Tensor) -> Tensor:
            return self.walk.draw(x, Noise.from_seed(0, len(x)))

    for claimed, status in ((1, "pass"), (5, "pass"), (7, "flag")):
        card = Card(name="toy", title="Toy", summary="", network_calls=claimed)
        assert check("step_count", ForeignModule(Inside(), card, 10)).status == status


class Voting(Toy):
    """Votes over draws; `shared` does the first half of the work once for all of them."""

    def __init__(self, shared: bool, extra: int = 0) -> None:
        super().__init__(noisy_clip, traits=Traits(stochastic=True))
        self.card = self.card.model_copy(update={"votes": Votes(draws=4), "network_calls": 2})
        self.select = nn.Linear(64, 64).eval().requires_grad_(False)
        self.shared, self.extra = shared, extra

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return super().draw(self.select(x.flatten(1)).view_as(x), noise)

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        if not self.shared:
            return super().forward(x, noise)
        chosen = self.select(x.flatten(1)).view_as(x).repeat_interleave(4, 0)
        for _ in range(self.extra):
            super().draw(chosen, noise.draws(4))
        return super().draw(chosen, noise.draws(4)).unflatten(0, (len(x), 4)).mean(1)


def test_votes_may_share_work() -> None:
    with torch.random.fork_rng():
        assert check("step_count", Voting(shared=False)).status == "pass"
        assert check("step_count", Voting(shared=True)).status == "pass"
        assert check("step_count", Voting(shared=True, extra=1)).status == "fail"


def test_a_surrogate_that_is_no_shorter_is_flagged() -> None:
    class Long(Walk):
        def surrogate(self, steps: int) -> Chain:
            return self.chain()

    assert check("step_count", Long()).status == "flag"
    assert "surrogate" in check("step_count", Long()).message


class Backward(Walk):
    """Its backward pass runs the cell so many times, by hand, where the forward pass runs it four times."""

    def __init__(self, times: int, **card: Any) -> None:
        super().__init__(traits=Traits(stochastic=True, non_differentiable=card.pop("declared", False)))
        self.times = times
        self.card = self.card.model_copy(update={"handles": ()})

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        image = x
        defense = self

        class Again(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                for _ in range(defense.times):
                    defense.cell(gradient)
                return gradient

        for _ in range(4):
            image = image + 0.3 * self.cell(image).tanh()
        logits: Tensor = self.head(Again.apply(image).flatten(1))
        return logits


def test_a_backward_pass_of_fewer_calls_is_caught() -> None:
    assert check("step_count", Backward(1)).status == "fail"
    assert check("step_count", Backward(1, declared=True)).status == "pass"
    for times in (0, 3, 4, 8):  # none, checkpoints that spare the last call, each call once, each twice
        assert check("step_count", Backward(times)).status == "pass", times


class Shortened(Walk):
    """Answers by one step; the surrogate handle has as many as are asked for."""

    def chain(self) -> Chain:
        return self.walk(1)

    def surrogate(self, steps: int) -> Chain:
        return self.walk(steps)


def test_a_surrogate_in_the_declared_process_s_place_is_caught() -> None:
    assert check("step_count", Shortened()).status == "fail"
    assert check("step_count", carded(Shortened(), network_calls=2)).status == "pass"
    # Without a longer process a wrong number is a wrong number.
    assert check("step_count", carded(Walk(), network_calls=50)).status == "flag"


class Handled(Walk):
    """A surrogate, a relaxed process and components of a test's making."""

    handles = ("chain", "surrogate", "relaxed", "components")

    def __init__(self, **made: Any) -> None:
        super().__init__()
        self.made = made
        # A fixed map of blocks of pixels to classes: a random one answers nearly all images alike.
        self.head.weight.data = 8 * torch.eye(64).unflatten(0, (16, 4))[:10].sum(1)
        self.head.bias.data.zero_()

    def surrogate(self, steps: int) -> Chain:
        return self.made.get("surrogate") or super().surrogate(steps)

    def relaxed(self) -> Chain:
        return self.made.get("relaxed") or self.walk(self.steps)

    def components(self) -> dict[str, Any]:
        return {"one": self.made.get("components") or self.walk(self.steps)}


@pytest.mark.parametrize("handle", ["surrogate", "relaxed", "components"])
def test_handles_that_stand_in_for_the_defense_are_related_to_it(handle: str) -> None:
    assert check("chain_exact", Handled()).status == "pass"
    whole = Handled().walk(4)
    exchanged = whole.then(lambda logits, noise: logits.roll(1, 1))
    found = check("chain_exact", Handled(**{handle: exchanged}))
    assert found.status == "flag"
    assert handle in found.message
    dead = whole.then(lambda logits, noise: logits.detach())
    assert "no gradient" in check("chain_exact", Handled(**{handle: dead})).message


def test_a_surrogate_that_skips_a_network_is_flagged() -> None:
    class Skipping(Walk):
        def surrogate(self, steps: int) -> Chain:
            return Chain(
                lambda x, noise: x, [lambda state, x, noise: state], lambda s, x, noise: self.head(x.flatten(1))
            )

    assert "never runs cell" in check("step_count", Skipping()).message


def test_stages_of_another_process_are_flagged() -> None:
    class Staged(Walk):
        handles = ("stages",)

        def __init__(self, steps: int) -> None:
            super().__init__()
            self.staged = steps

        def stages(self) -> Stages:
            whole = self.walk(self.staged)

            def purify(x: Tensor, noise: Noise) -> Tensor:
                state: State = (x, torch.zeros(len(x), dtype=torch.int64))
                for step in whole.steps:
                    state = step(state, x, noise)
                return state[0]

            return Stages(purify, lambda x, noise: self.head(x.flatten(1)))

    assert check("step_count", Staged(4)).status == "pass"
    assert check("step_count", Staged(1)).status == "flag"


def test_fused_attention_is_no_other_process() -> None:
    class Attending(Defense):
        card = Card(name="toy", title="Toy", summary="", network_calls=1)
        n_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.eval().requires_grad_(False)

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            return torch.cat([self.body(x[:, 0]).mean(1), x[:, 0, :2, 0]], 1)

    with torch.random.fork_rng():
        before = torch.backends.mha.get_fastpath_enabled()
        assert check("step_count", Attending()).status == "pass"
        assert torch.backends.mha.get_fastpath_enabled() == before


# Gradients that are not there.


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (stepwise, same, "BPDA"),
        (lambda self, x, noise: x.detach(), same, "BPDA"),
        (same, lambda self, z, noise: 1e6 * z, "margin or DLR"),
        (same, lambda self, z, noise: torch.round(z * 10) / 10, "BPDA"),
        (hooked(lambda gradient: gradient * torch.nan), same, "BPDA"),
        (hooked(lambda gradient: gradient * 1e-35), same, "BPDA"),
        (hooked(lambda gradient: gradient * 1e-4), same, "BPDA"),
        (lambda self, x, noise: stepwise(self, x, noise) + 1e-4 * x, same, "BPDA"),
    ],
)
def test_dead_gradients_are_flagged(before: Change, after: Change, says: str) -> None:
    found = check("zero_gradients", Toy(before, after))
    assert found.status == "flag", found
    assert says in found.message
    assert found.value is not None
    assert found.value > 0.1
    declared = check("zero_gradients", Toy(before, after, Traits(non_differentiable=True)))
    assert (declared.status, declared.value) == ("pass", found.value)


@pytest.mark.parametrize("name", ["zero_gradients", "saturation"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_living_gradients_pass(name: str, scale: float) -> None:
    found = check(name, Toy(after=lambda self, z, noise: scale * z))
    assert found.status == "pass", found


class Clipping(Toy):
    """Shifts pixels, clips them, and offers the clipped image as its purified one."""

    def __init__(self, shift: float, traits: Traits | None = None, stages: bool = True) -> None:
        super().__init__(lambda self, x, noise: self.purify(x, noise), traits=traits)
        self.shift = shift
        self.card = self.card.model_copy(update={"handles": ("stages",) if stages else ()})

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        return (x - self.shift).clamp(0, 1)

    def stages(self) -> Stages:
        return Stages(self.purify, lambda x, noise: 5 * self.network(x))


@pytest.mark.parametrize("stages", [True, False])
def test_pixels_that_die_at_a_clip_are_flagged(stages: bool) -> None:
    found = check("saturation", Clipping(0.05, stages=stages))
    assert found.status == "flag"
    assert found.value is not None
    assert found.value > 0.4
    assert check("saturation", Clipping(0.05, Traits(non_differentiable=True), stages)).status == "pass"
    assert check("saturation", Clipping(0.0, stages=stages)).value == 0.0
    # What lies beyond the ball is no loss to an attack at the image; the purified one is clipped all the same.
    assert check("saturation", Clipping(0.3, stages=False)).value == 0.0
    assert check("saturation", Clipping(0.3)).status == "flag"


def test_mixing_before_a_clip_hides_it_from_the_image_alone() -> None:
    class Blurred(Clipping):
        def purify(self, x: Tensor, noise: Noise) -> Tensor:
            return (conv2d(x, torch.full((1, 1, 3, 3), 1 / 9), padding=1) - 0.2).clamp(0, 1)

    found = check("saturation", Blurred(0.0))
    assert found.status == "flag"
    assert found.data["shares"]["purified"] > 0.2


REGISTERED: Sequence[str] = sorted(DEFENSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTERED)
def test_no_registered_defense_fails(name: str) -> None:
    if "digits" not in DEFENSES[name].card.datasets:
        pytest.skip("no weights for digits")
    defense = DEFENSES[name].build("digits")
    found = {each: check(each, defense) for each in CHECKS}
    assert not [each for each in found.values() if each.status == "fail"]
    assert found["finite_difference"].value == 0
    flagged = {each for each in found if found[each].status == "flag"}
    # The two ADPs clip the image after each of their steps, as published.
    expected = {"adp": {"saturation"}, "adp_energy": {"saturation"}, "saturated_logits": {"zero_gradients"}}
    assert flagged == expected.get(name, set())
