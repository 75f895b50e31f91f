"""The preflight checks of range, modes of calling, memory and memorisation, against rogues and honest odd defenses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay import data
from assay.card import Card, Handle, Traits, Votes
from assay.chain import Chain
from assay.checks import (
    attack_awareness,
    batch_independence,
    honest_randomness,
    input_mutation,
    memorised_inputs,
    modes,
)
from assay.checks import range as range_check
from assay.checks.subject import Subject
from assay.defense import Defense, ForeignModule, Stages
from assay.finding import Finding
from assay.noise import Noise
from assay.registry import DEFENSES

STOCHASTIC = Traits(stochastic=True)
CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "range": range_check.check,
    "input_mutation": input_mutation.check,
    "memorised_inputs": memorised_inputs.check,
    "attack_awareness": attack_awareness.check,
}
N = 12
IDS = data.board_ids("digits")[:N]
X, Y = data.load("digits", IDS)

Change = Callable[..., Any]


class Toy(Defense):
    """A small network under some noise where it is stochastic; `change(self, x, logits, noise)` is a test's."""

    def __init__(
        self,
        change: Change | None = None,
        traits: Traits | None = None,
        votes: Votes | None = None,
        handles: tuple[Handle, ...] = (),
        shape: tuple[int, int, int] = (1, 8, 8),
    ) -> None:
        super().__init__()
        traits = traits or Traits()
        self.card = Card(name="toy", title="Toy", summary="", traits=traits, votes=votes or Votes(), handles=handles)
        self.n_classes = 10
        channels, height, width = shape
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
            self.head = nn.Linear(4 * (height - 2) * (width - 2), 10)
        self.change = change
        self.memory: Any = None
        self.calls = 0
        self.eval().requires_grad_(False)

    def network(self, x: Tensor, noise: Noise) -> Tensor:
        if self.card.traits.stochastic:
            x = x + 0.2 * noise.normal("z", shape=x.shape[1:], like=x)
        logits: Tensor = 4 * self.head(self.body(x))
        return logits

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logits = self.network(x, noise)
        return logits if self.change is None else self.change(self, x, logits, noise)


def subject(defense: Defense, n: int = N, x: Tensor | None = None) -> Subject:
    return Subject(defense, (X if x is None else x)[:n].clone(), Y[:n], IDS[:n], Noise.from_seed(3, IDS[:n]))


def run(name: str, defense: Defense, n: int = N) -> Finding:
    found = CHECKS[name](subject(defense, n))
    assert found.check == name
    assert found.message
    assert set(found.samples) <= set(IDS)
    return found


# range


def scaled(function: Callable[[Tensor], Tensor]) -> Toy:
    return Toy(lambda self, x, logits, noise: function(logits))


def test_scaled_logits_and_probabilities_are_flagged() -> None:
    for saturated in (scaled(lambda logits: 1e4 * logits), scaled(lambda logits: 1e6 * logits)):
        found = run("range", saturated)
        assert (found.status, found.data["dead"]) == ("flag", 1.0)
        assert "margin losses" in found.message
    for probabilities in (scaled(lambda logits: logits.softmax(1)), scaled(lambda logits: 100 * logits.softmax(1))):
        found = run("range", probabilities)
        assert found.status == "flag"
        assert "log-probabilities" in found.message
    assert run("range", Toy(lambda self, x, logits, noise: logits.softmax(1)), 1).status == "flag"
    assert run("range", Toy(lambda self, x, logits, noise: logits.softmax(1).half()), 5).status == "flag"
    assert (
        run("range", Toy(lambda self, x, logits, noise: nn.functional.one_hot(logits.argmax(1), 10) * 1.0)).value == 1
    )


def test_a_softmax_in_double_precision_dies_later() -> None:
    def margin(size: float, dtype: torch.dtype) -> Defense:
        # Less 1: labels times a number are probabilities times a number.
        return Toy(
            lambda self, x, logits, noise: ((size + torch.arange(N)[:, None] / 10) * torch.eye(10)[Y] - 1).to(dtype)
        )

    assert run("range", margin(60, torch.float32)).status == "flag"
    assert run("range", margin(60, torch.float64)).data["dead"] == 0
    assert run("range", margin(1000, torch.float64)).status == "flag"
    # A loss of 0 with a gradient: all rows are too many, some are what confident networks have.
    assert run("range", margin(25, torch.float32)).status == "flag"
    assert run("range", margin(14, torch.float32)).status == "pass"


def test_logits_that_leave_no_loss_a_slope_are_flagged() -> None:
    assert "temperature" in run("range", scaled(lambda logits: 1e-7 * logits)).message
    assert run("range", scaled(lambda logits: 1e-2 * logits)).status == "pass"
    below = scaled(lambda logits: torch.where(logits == logits.amin(1, True), logits.amax(1, True) - 1e-3, logits))
    assert "margin losses stall" in run("range", below).message


@pytest.mark.parametrize("how", ["logits", "probabilities", "majority"])
def test_logits_log_probabilities_and_vote_shares_are_fine(how: Any) -> None:
    assert run("range", Toy(traits=STOCHASTIC, votes=Votes(draws=8, how=how))).status == "pass"
    assert run("range", Toy(lambda self, x, logits, noise: logits.log_softmax(1))).status == "pass"
    assert run("range", Toy(lambda self, x, logits, noise: logits - logits.mean(1, keepdim=True))).status == "pass"


def test_probabilities_that_are_averaged_are_seen_in_the_answer() -> None:
    class Averaged(Toy):
        def forward(self, x: Tensor, noise: Noise) -> Tensor:
            return super().forward(x, noise).exp()

    found = run("range", Averaged(traits=STOCHASTIC, votes=Votes(draws=4, how="probabilities")))
    assert found.data["probabilities"] == ["answers"]


def test_an_abstention_that_is_sure_leaves_draws_to_climb_by() -> None:
    def abstaining(share: float) -> Defense:
        def change(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
            silent = noise.uniform("silent", shape=(1,), like=x) < share
            return logits + silent * 1e3 * torch.eye(10)[0]

        return Toy(change, STOCHASTIC)

    assert run("range", abstaining(0.2)).status == "pass"
    assert run("range", abstaining(0.9)).status == "flag"


# input_mutation


def in_place(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    x.data.mul_(0.5)
    return logits


def one_pixel(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    x.data[:, :, 3, 3] += 1e-6
    return logits


def through_numpy(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    x.detach().numpy()[2:4] = 0
    return logits


def later(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    if self.memory is not None:
        self.memory.zero_()
    self.memory = x.detach()
    return logits


def one_buffer(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    if self.memory is None or len(self.memory) != len(x):
        self.memory = torch.empty(len(x), 10)
    self.memory.copy_(logits.detach())
    return self.memory  # type: ignore[no-any-return]


def view_of_x(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return x.flatten(1)[:, 20:30]


def noise_keys(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    noise.keys.add_(1)
    return logits


def noise_slots(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    noise.slots = noise.slots.clone()
    return logits


def leave_a_gradient(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    if x.requires_grad:
        logits.sum().backward(retain_graph=True)
    return logits


def requires_grad(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    x.requires_grad_()
    return logits


@pytest.mark.parametrize(
    "change",
    [
        in_place, one_pixel, through_numpy, later, one_buffer, view_of_x,
        noise_keys, noise_slots, leave_a_gradient, requires_grad,
    ],
)  # fmt: skip
def test_what_a_call_changes_is_seen(change: Change) -> None:
    assert run("input_mutation", Toy(change)).status == "fail"


def test_the_rows_behind_a_mutation_and_the_handles_are_seen() -> None:
    assert run("input_mutation", Toy(through_numpy)).samples == tuple(IDS[2:4])

    class Purifying(Toy):
        def stages(self) -> Stages:
            def purify(x: Tensor, noise: Noise) -> Tensor:
                return x.mul_(0.9)

            return Stages(purify, self.network)

    found = run("input_mutation", Purifying(handles=("stages",)))
    assert found.status == "fail"
    assert "purifier" in found.message


# memorised_inputs


def moved(x: Tensor, tolerance: float) -> Tensor:
    """The row of `X` within a tolerance in every pixel, or -1."""
    near = (x.detach().float()[:, None] - X[None]).flatten(2).abs().amax(2) <= tolerance
    return torch.where(near.any(1), near.double().argmax(1), -1)


def lookup(tolerance: float, rows: int = N) -> Change:
    def change(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        row = moved(x, tolerance)
        known = (row >= 0) & (row < rows)
        return torch.where(known[:, None], 9 * torch.eye(10)[Y[row]].to(logits), logits)

    return change


def rounded(levels: float) -> Change:
    """A lookup of the image rounded to so many levels."""
    keys = [(image * levels).round() for image in X]

    def change(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        same = torch.stack([((x * levels).round() == key).flatten(1).all(1) for key in keys], 1)
        return torch.where(same.any(1, keepdim=True), 9 * torch.eye(10)[Y[same.double().argmax(1)]].to(logits), logits)

    return change


def sixteenths(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    """Another answer wherever a pixel is no multiple of 1/16: a digit's are."""
    off = (x * 16 != (x * 16).round()).flatten(1).any(1)
    return torch.where(off[:, None], logits.roll(1, 1), logits)


@pytest.mark.parametrize(
    "change", [lookup(0.0), lookup(1e-5), lookup(1e-3), lookup(0.02), rounded(255.0), rounded(16.0), sixteenths]
)
@pytest.mark.parametrize("votes", [Votes(), Votes(draws=4, how="probabilities")])
def test_a_lookup_is_flagged(change: Change, votes: Votes) -> None:
    traits = STOCHASTIC if votes.draws > 1 else Traits()
    found = run("memorised_inputs", Toy(change, traits, votes))
    assert found.status == "flag"
    assert found.value is not None
    assert found.value >= N // 2
    assert sum(found.data["alone_nearby"]) == 0


def test_a_single_memorised_image_is_enough_and_so_is_a_lookup_in_front_of_the_votes() -> None:
    assert run("memorised_inputs", Toy(lookup(0.0, rows=1))).samples == tuple(IDS[:1])

    class InFront(Toy):
        def forward(self, x: Tensor, noise: Noise) -> Tensor:
            return lookup(0.0)(self, x, super().forward(x, noise), noise)  # type: ignore[no-any-return]

    votes = Votes(draws=8, how="probabilities")
    assert run("memorised_inputs", InFront(traits=STOCHASTIC, votes=votes)).status == "flag"


class Quantised(Toy):
    """A network behind a function of pixels alone."""

    def __init__(self, quantise: Callable[[Tensor], Tensor], gain: float = 1.0) -> None:
        super().__init__()
        self.quantise, self.gain = quantise, gain

    def network(self, x: Tensor, noise: Noise) -> Tensor:
        return self.gain * super().network(self.quantise(x), noise)


@pytest.mark.parametrize("gain", [1.0, 20.0])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 8, 15, 16, 32, 255])
@pytest.mark.parametrize("rounding", [torch.round, torch.floor, torch.ceil])
def test_quantisers_whose_edges_are_the_pixels_are_no_lookups(
    rounding: Callable[[Tensor], Tensor], levels: int, gain: float
) -> None:
    assert run("memorised_inputs", Quantised(lambda x: rounding(x * levels) / levels, gain)).status == "pass"


@pytest.mark.parametrize(
    "quantise",
    [
        lambda x: (x > 0).to(x),  # a mask of the background, which is exactly 0
        lambda x: (x >= 0.5).to(x),
        lambda x: x + 0.3 * (x - x.roll(1, 3)).sign(),  # ties, broken by any move
        lambda x: nn.functional.one_hot(x.flatten(1).argmax(1), 64).reshape(x.shape).to(x),
        lambda x: nn.functional.max_pool2d(x, 3, 1, 1),
        lambda x: x.flatten(1).sort(1).values.reshape(x.shape),
        lambda x: x - x.flatten(1).median(1).values[:, None, None, None],
        lambda x: (x.double() * 1e3).sin().to(x),  # rough everywhere
    ],
)
def test_odd_functions_of_pixels_are_no_lookups(quantise: Callable[[Tensor], Tensor]) -> None:
    for gain in (1.0, 20.0):
        assert run("memorised_inputs", Quantised(quantise, gain)).status == "pass"
        assert run("attack_awareness", Quantised(quantise, gain)).status == "pass"


# attack_awareness: each of these answers something else where it takes a call for an attack's.


def graph_behind(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits.roll(1, 1) if x.requires_grad and not x.is_leaf else logits


def leaf_only(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return 3 * logits if x.requires_grad and x.is_leaf else logits


def grad_enabled(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits + torch.is_grad_enabled() * torch.arange(10) / 50


def scale_where_saturated(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    sure = logits + 200 * torch.eye(10)[logits.argmax(1)]
    return 100 * sure if torch.is_grad_enabled() else sure


def inference_only(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return -logits if torch.is_inference_mode_enabled() else logits


def hooked(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return -logits if any(m._forward_hooks or m._backward_hooks for m in self.modules()) else logits


def counter(every: int) -> Change:
    def change(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        self.calls += 1
        return -logits if self.calls > every else logits

    return change


def stateful_detection(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    """Queries that are close to, but not, an earlier one are taken for an attack from then on."""
    seen = self.memory if self.memory is not None else []
    here = x.detach().double().flatten(1)
    close = [len(s) == len(here) and 0 < float((s - here).norm(dim=1).max()) < 0.5 for s in seen]
    self.calls += any(close)
    self.memory = [*seen[-20:], here]
    return logits.flip(1) if self.calls else logits


def cache_by_address(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.memory = self.memory or {}
    return self.memory.setdefault((x.data_ptr(), len(x)), logits.detach())  # type: ignore[no-any-return]


def cache_by_object(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.memory = self.memory or []
    self.memory.append((x, logits.detach()))
    return next(answer for image, answer in self.memory if image is x)  # type: ignore[no-any-return]


def strided(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits if x.is_contiguous() else -logits


def single(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return -logits if len(x) == 1 else logits


def repeated(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    """Rows that occur twice are the draws of an attack."""
    twin = (x.detach().flatten(1)[:, None] == x.detach().flatten(1)[None]).all(2).sum(1) > 1
    return torch.where(twin[:, None], -logits, logits)


def large(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return -logits if len(x) > 100 else logits


def one_noise(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    """Every draw of a sample in one call has the first one's noise."""
    first = (noise.slots[:, None] == noise.slots[None]).int().argmax(1)
    z: Tensor = noise.normal("own", shape=(10,), like=x)[first]
    return logits + z


def near_memory(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    """A near image seen earlier lends its answer."""
    here, rows = x.detach().float().flatten(1), []
    self.memory = self.memory or []
    for image, answer in zip(here, logits, strict=True):
        known = [a for i, a in self.memory if 1e-6 < float((i - image).abs().max()) < 0.1]
        rows.append(known[0] if known else answer)
        self.memory.append((image, answer.detach()))
    return torch.stack(rows) if rows else logits


def first_row(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    self.memory = self.memory or {}
    return self.memory.setdefault((len(x), x[:1].detach().numpy().tobytes()), logits.detach())  # type: ignore[no-any-return]


def few_gradients(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    def hook(slope: Tensor) -> Tensor:
        self.calls += 1
        return slope * float(self.calls <= 4)

    if logits.requires_grad:
        logits.register_hook(hook)
    return logits


def caller(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    """Looks up the stack for who asks."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "assay.target":
            return -logits
    return logits


def by_slot(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    return logits * (1 + noise.slots[:, None] % 2)


def after_backward(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
    def hook(slope: Tensor) -> None:
        self.calls += 1

    if logits.requires_grad:
        logits.register_hook(hook)
    return -logits if self.calls > 1 else logits


AWARE: list[tuple[Change, str]] = [
    (graph_behind, "a graph behind the image"),
    (leaf_only, "a leaf"),
    (grad_enabled, "gradients enabled"),
    (scale_where_saturated, "gradients enabled"),
    (inference_only, "inference mode"),
    (hooked, "forward hooks"),
    (counter(1), "a gradient"),
    (counter(20), "first"),
    (counter(60), "first"),
    (stateful_detection, "near copies seen before"),
    (cache_by_address, "first"),
    (cache_by_object, "memory that held another image"),
    (strided, "other strides"),
    (single, "a batch of one"),
    (repeated, "draws folded into one batch"),
    (large, "draws folded into one batch"),
    (one_noise, "draws folded into one batch"),
    (near_memory, "a near image seen just before"),
    (first_row, "a batch that begins as an earlier one"),
    (few_gradients, "a gradient asked again"),
    (caller, "the attacks' interface"),
    (by_slot, "other slots for the same streams"),
    (after_backward, "a backward pass before"),
]


@pytest.mark.parametrize(("change", "where"), AWARE)
def test_a_defense_that_knows_an_attack_is_caught(change: Change, where: str) -> None:
    found = run("attack_awareness", Toy(change))
    assert found.status == "fail"
    assert where == "first" or found.data["changes"][where] > attack_awareness.REPLAY
    stochastic = run("attack_awareness", Toy(change, STOCHASTIC, Votes(draws=4, how="probabilities")))
    assert stochastic.status == "fail"


def test_double_precision_is_compared_where_it_is_offered() -> None:
    class Either(Toy):
        def __init__(self, bonus: float) -> None:
            super().__init__()
            self.bonus = bonus

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            logits = self.network(x.float(), noise)
            return logits + self.bonus * float(x.dtype == torch.float64) * torch.eye(10)[0]

    assert run("attack_awareness", Either(0.0)).status == "pass"
    found = run("attack_awareness", Either(5.0))
    assert (found.status, found.data["refused"]) == ("fail", ["backward hooks"])
    assert "double precision" in run("attack_awareness", Toy()).data["refused"]

    class Grid(Either):
        def network(self, x: Tensor, noise: Noise) -> Tensor:
            return super().network(x, noise)

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            # k/255 in float32 times 255 is below k as often as not in float64.
            return self.network((torch.floor(x * 255) / 255).float(), noise)

    grid = (X * 255).round() / 255
    assert attack_awareness.check(subject(Grid(0.0), x=grid)).status == "pass"


class TwoPaths(Toy):
    """A chain, stages and a forward of its own, of which a test may replace one by another model."""

    def __init__(self, rogue: str = "", traits: Traits = STOCHASTIC, draws: int = 1, shift: float = 1.0) -> None:
        votes = Votes(draws=draws, how="probabilities")
        super().__init__(traits=traits, votes=votes, handles=("chain", "stages"))
        self.rogue, self.shift = rogue, shift

    def other(self, name: str, logits: Tensor) -> Tensor:
        return logits + self.shift * torch.arange(10) if self.rogue == name else logits

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        # Honest, but with its noise laid out otherwise than folded draws have it.
        own = super().forward(x, noise.child("mine") if self.card.votes.draws > 1 else noise)
        return self.other("answer", own)

    def chain(self) -> Chain:
        def start(x: Tensor, noise: Noise) -> Tensor:
            return self.other("chain", self.network(x, noise))

        return Chain(start, [])

    def stages(self) -> Stages:
        def classify(x: Tensor, noise: Noise) -> Tensor:
            return self.other("stages", 4 * self.head(self.body(x)))

        def purify(x: Tensor, noise: Noise) -> Tensor:
            stochastic = self.card.traits.stochastic
            return x + 0.2 * noise.normal("z", shape=x.shape[1:], like=x) if stochastic else x.clone()

        return Stages(purify, classify)


@pytest.mark.parametrize("traits", [STOCHASTIC, Traits()])
@pytest.mark.parametrize("draws", [1, 4])
def test_another_path_than_the_answers_is_caught(traits: Traits, draws: int) -> None:
    assert run("attack_awareness", TwoPaths("", traits, draws)).status == "pass"
    for rogue, says in [("answer", "the answer"), ("chain", "the chain"), ("stages", "purifier and classifier")]:
        found = run("attack_awareness", TwoPaths(rogue, traits, draws))
        assert found.status == "fail"
        assert says in found.message


def test_an_answer_that_differs_only_off_the_data_is_caught() -> None:
    class OnlyAttacked(Toy):
        def forward(self, x: Tensor, noise: Noise) -> Tensor:
            return sixteenths(self, x, super().forward(x, noise), noise)

    assert run("attack_awareness", OnlyAttacked()).status == "fail"


# Honest oddities.


class Lazy(Toy):
    """Builds what it needs in its first call, and keeps answers by content."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        if self.memory is None:
            self.memory = {"scale": torch.full((), 1.5), "seen": {}}
        key = (x.detach().numpy().tobytes(), noise.keys.numpy().tobytes())
        kept: dict[Any, Tensor] = self.memory["seen"]
        if x.requires_grad:
            return self.network(x, noise) * 1.5
        if key not in kept:
            kept[key] = self.memory["scale"] * self.network(x, noise)
        return kept[key].clone()


class Flicker(Toy):
    """Sums in another order every time."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        self.calls += 1
        return self.network(x, noise) * (1 + 3e-7 * (self.calls % 3))


class Half(Toy):
    """Computes in bfloat16."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.network(x.bfloat16().float(), noise).bfloat16().float()


class Views(Toy):
    """Refuses strides."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.network(x.view(len(x), -1).view(x.shape), noise)


class Severed(Toy):
    """Has no gradient at all."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.network(x.detach(), noise)


HONEST: list[Callable[[], Defense]] = [
    Toy,
    lambda: Toy(traits=STOCHASTIC),
    lambda: Toy(traits=STOCHASTIC, votes=Votes(draws=8, how="majority")),
    lambda: Toy(traits=STOCHASTIC, votes=Votes(draws=8, how="logits")),
    Lazy, Flicker, Half, Views, Severed,
]  # fmt: skip


@pytest.mark.parametrize("make", HONEST)
@pytest.mark.parametrize("name", CHECKS)
def test_honest_defenses_pass(name: str, make: Callable[[], Defense]) -> None:
    for n in (N, 3, 1):
        found = run(name, make(), n)
        assert found.status == "pass", found


@pytest.mark.parametrize("name", CHECKS)
def test_colour_images_and_unknown_modules_pass(name: str) -> None:
    x = X.repeat(1, 3, 4, 4)
    assert CHECKS[name](subject(Toy(shape=(3, 32, 32)), x=x)).status == "pass"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    assert run(name, ForeignModule(module, Card(name="toy", title="Toy", summary=""), 10)).status == "pass"


@pytest.mark.parametrize("name", CHECKS)
def test_findings_are_repeatable_and_leave_the_generator_and_the_images(name: str) -> None:
    state = torch.random.get_rng_state()
    images = subject(Toy(traits=STOCHASTIC))
    first, again = CHECKS[name](images), run(name, Toy(traits=STOCHASTIC))
    assert first == again
    assert torch.equal(images.x, X)
    assert torch.equal(state, torch.random.get_rng_state())
    assert images.calls[0] > 0


# The earlier four, where they look further.


def test_a_gradient_that_changes_state_is_seen() -> None:
    def learn(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        if torch.is_grad_enabled():
            self.head.bias.data.add_(1e-3)
        return logits

    def train(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        self.body[0].train(torch.is_grad_enabled())
        return logits

    assert "head.bias" in modes.check(subject(Toy(learn))).message
    assert "body.0" in modes.check(subject(Toy(train))).message
    quiet = Toy()
    quiet.register_buffer("empty", torch.tensor([torch.nan]))
    assert modes.check(subject(quiet)).status == "pass"


def test_strange_neighbours_are_seen() -> None:
    def bright(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        return logits / (1 + (x.flatten(1).mean(1).max() > 0.6))

    assert batch_independence.check(subject(Toy(bright))).status == "fail"


def test_other_global_generators_are_watched() -> None:
    import random

    import numpy as np

    def python(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        random.random()
        return logits

    def numpy(self: Any, x: Tensor, logits: Tensor, noise: Noise) -> Tensor:
        np.random.rand()  # noqa: NPY002 - the fault itself
        return logits

    for change, name in ((python, "Python"), (numpy, "NumPy")):
        assert name in honest_randomness.check(subject(Toy(change))).message


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("defense", [name for name in DEFENSES if "digits" in DEFENSES[name].card.datasets])
def test_registered_defenses_pass(defense: str, name: str) -> None:
    found = run(name, DEFENSES[defense].build("digits"), 8)
    expected = "flag" if (defense, name) == ("saturated_logits", "range") else "pass"
    assert found.status == expected, found
