"""Rogues: defenses of real digits that are wrong in exactly one way each, with cards that lie or stay silent.

Each names the checks of which at least one has to object. Most are the undefended network with a trick around it, so
that whatever they seem to withstand is the trick's doing. `gallery_honest.py` has odd ones that must be let through.
"""

from __future__ import annotations

import math
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay import data
from assay.card import Card, Handle, Traits, Votes
from assay.certificate import Smoothed
from assay.chain import Chain
from assay.defense import Defense, Stages, aggregate
from assay.defenses.adversarial_training import load as load_trained
from assay.defenses.denoiser import Denoiser
from assay.defenses.diffpure import load as load_diffpure
from assay.defenses.purified import PurifiedClassifier
from assay.defenses.purifier import Purifier
from assay.defenses.smoothing import Smoothing
from assay.defenses.smoothing import load as load_smoothing
from assay.defenses.undefended import load_network
from assay.noise import Noise

STEPS = 3
"""Of the diffusion purifiers here: enough to be iterated, few enough for a test."""
STOCHASTIC, PURIFIES = Traits(stochastic=True), Traits(purifies=True)
DIFFUSES = Traits(stochastic=True, purifies=True, iterative=True)


@dataclass(frozen=True)
class Rogue:
    """A cheat, or a bad mistake.

    Attributes:
        wrong: what it does, in a few words.
        caught_by: the checks of which at least one has to flag or fail it.
        health: only what an attack does can show it, so that checks before the attacks need not.
        raises: it raises where it should answer, so that an exception is what catches it.
    """

    name: str
    wrong: str
    caught_by: frozenset[str]
    build: Callable[[], Defense]
    health: bool = False
    raises: bool = False


ROGUES: list[Rogue] = []
Draw = Callable[[Any, Tensor, Noise], Any]


class Network(Protocol):
    """A classifier of digits, as far as a trick sees it."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def features(self, x: Tensor) -> Tensor: ...
    def head(self, features: Tensor) -> Tensor: ...


class Digits(Defense):
    """The undefended network with `trick(self, x, noise)` in place of its answer.

    Attributes:
        network, other: trained plainly, and trained against attacks.
        memory: whatever a trick keeps.
    """

    def __init__(self, trick: Draw | None, n_classes: int = 10, **card: Any) -> None:
        super().__init__()
        name = card.pop("name", trick.__name__.replace("_", "-") if trick else "digits")
        fields = {"title": name, "summary": "A network.", "network_calls": 1, "gradient_calls": 1, **card}
        self.card = Card(name=name, **fields)
        self.n_classes = n_classes
        self.network = cast(Network, load_network("digits"))
        self.other = cast(Network, load_trained("digits").network)
        self.trick = trick
        self.memory: dict[Any, Any] = {}
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Any:
        return self.network(x) if self.trick is None else self.trick(self, x, noise)


def rogue(
    wrong: str, *caught_by: str, health: bool = False, raises: bool = False, **options: Any
) -> Callable[[Draw], Draw]:
    """Enters `Digits(trick, **options)` in the gallery."""

    def enter(trick: Draw) -> Draw:
        name = trick.__name__.replace("_", "-")
        ROGUES.append(Rogue(name, wrong, frozenset(caught_by), lambda: Digits(trick, **options), health, raises))
        return trick

    return enter


def enter(
    name: str, wrong: str, caught_by: Iterable[str], build: Callable[[], Defense], *, health: bool = False
) -> None:
    """Enters a defense that needs a class of its own."""

    def made() -> Defense:
        defense = build().eval().requires_grad_(False)
        defense.card = defense.card.model_copy(update={"name": name, "title": name})
        return defense

    ROGUES.append(Rogue(name, wrong, frozenset(caught_by), made, health))


def off_the_data(x: Tensor) -> Tensor:
    """`(n,)`: images that are no digits of the data set, whose pixels are multiples of 1/16."""
    return (x.detach() * 16 != (x.detach() * 16).round()).flatten(1).any(1)


# It is another defense while it is attacked.


@rogue("another network answers while gradients are enabled", "attack_awareness")
def switches_with_gradients(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return (self.other if torch.is_grad_enabled() else self.network)(x)


@rogue("another network answers where x.requires_grad", "attack_awareness")
def switches_with_requires_grad(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return (self.other if x.requires_grad else self.network)(x)


@rogue("another network answers where x is a result of other operations, as in an attack's loop", "attack_awareness")
def switches_with_a_graph(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return (self.other if x.grad_fn is not None else self.network)(x)


@rogue(
    "the first 4 calls are honest, then another network answers", "attack_awareness", "honest_randomness", "constancy"
)
def honest_at_first(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    self.memory["calls"] = self.memory.get("calls", 0) + 1
    return (self.network if self.memory["calls"] <= 4 else self.other)(x)


@rogue("another network answers after 100 calls", "attack_awareness")
def tires_after_100_calls(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    self.memory["calls"] = self.memory.get("calls", 0) + 1
    return (self.network if self.memory["calls"] <= 100 else self.other)(x)


@rogue("another network answers after 100,000 images, long after every check", "attack_awareness", health=True)
def tires_after_100000_images(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    self.memory["images"] = self.memory.get("images", 0) + len(x)
    return (self.network if self.memory["images"] <= 100_000 else self.other)(x)


@rogue("every third call is answered by another network", "attack_awareness", "honest_randomness")
def every_third_call(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    self.memory["calls"] = self.memory.get("calls", 0) + 1
    return (self.network if self.memory["calls"] % 3 else self.other)(x)


@rogue("another network answers where the call comes through the attacks' own interface", "attack_awareness",
       "step_count")  # fmt: skip
def reads_the_stack(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    frame: Any = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("target.py"):
        frame = frame.f_back
    return (self.network if frame is None else self.other)(x)


@rogue("batches of more than 64 are answered by another network", "attack_awareness", "batch_independence", "eot")
def switches_with_the_batch_size(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return (self.network if len(x) <= 64 else self.other)(x)


@rogue("noise on the answer while gradients are enabled alone", "attack_awareness")
def noisy_under_attack(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return logits + 3 * noise.normal("z", shape=(10,), like=logits) if torch.is_grad_enabled() else logits


@rogue("the same tensor object gets its first answer again, whatever it holds by now", "attack_awareness", "modes")
def cached_by_object(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    kept: tuple[Tensor, Tensor] = self.memory.setdefault(id(x), (x, self.network(x)))
    return kept[1]


@rogue(
    "an image near an earlier one gets that one's answer",
    "attack_awareness", "zero_gradients", "finite_difference", "declared_traits",
)  # fmt: skip
def cached_coarsely(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    keys = [tuple(row) for row in (x.detach().flatten(1) * 4).round().int().tolist()]
    kept = [self.memory.setdefault(key, row.detach()) for key, row in zip(keys, logits, strict=True)]
    return torch.stack(kept) if kept else logits


@rogue("a batch that begins with a known image gets an earlier batch's answers", "batch_independence",
       "attack_awareness")  # fmt: skip
def cached_by_first_row(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    key = (x.shape, x[:1].detach().numpy().tobytes(), x.requires_grad)
    return self.network(x) if torch.is_grad_enabled() else self.memory.setdefault(key, self.network(x))


# Its randomness is not the noise's.


@rogue("reseeds torch's global generator in every call", "honest_randomness", traits=STOCHASTIC)
def reseeds(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    torch.manual_seed(0)
    return self.network(x + 0.1 * torch.randn_like(x))


@rogue("draws from torch's global generator", "honest_randomness", traits=STOCHASTIC)
def global_generator(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.1 * torch.randn_like(x))


@rogue("draws from a generator of its own", "honest_randomness", traits=STOCHASTIC)
def own_generator(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    generator = self.memory.setdefault("generator", torch.Generator().manual_seed(0))
    return self.network(x + 0.1 * torch.randn(x.shape, generator=generator).to(x))


@rogue("draws from Python's random module", "honest_randomness", traits=STOCHASTIC)
def python_generator(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + random.Random().uniform(-0.3, 0.3))


@rogue("draws from NumPy's global generator", "honest_randomness", traits=STOCHASTIC)
def numpy_generator(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + float(np.random.uniform(-0.3, 0.3)))  # noqa: NPY002 - what it does wrong


@rogue("follows the clock", "honest_randomness", traits=STOCHASTIC)
def clock(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.3 * math.sin(time.perf_counter_ns()))


@rogue("a hidden generator, and logits so small that no probability shows it", "honest_randomness", "declared_traits")
def hidden_noise_in_tiny_logits(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    generator = self.memory.setdefault("generator", torch.Generator().manual_seed(0))
    return 1e-7 * self.network(x + 0.1 * torch.randn(x.shape, generator=generator).to(x))


@rogue("seeds noise by the place in the batch, and says it has none", "batch_independence")
def noise_by_place(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return self.network(x + 0.3 * z.to(x))


@rogue(
    "noise by the sample's number, and says it has none", "batch_independence", "honest_randomness", "attack_awareness"
)
def noise_by_slot(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.3 * Noise.from_seed(0, noise.slots.tolist()).normal("z", shape=x.shape[1:], like=x))


@rogue("all images of a batch get the first one's noise", "batch_independence", traits=STOCHASTIC)
def one_noise_for_all(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.3 * noise[:1].normal("z", shape=x.shape[1:], like=x))


@rogue(
    "all draws of an image within one call share their noise, so that averaging gradients averages nothing",
    "batch_independence", "honest_randomness", "eot", "attack_awareness", traits=STOCHASTIC,
)  # fmt: skip
def draws_share_noise(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    slots = noise.slots.tolist()
    shared = noise[torch.tensor([slots.index(slot) for slot in slots], dtype=torch.int64)]
    return self.network(x + 0.3 * shared.normal("z", shape=x.shape[1:], like=x))


@rogue("noise frozen by a hash of the pixels", "finite_difference", "memorised_inputs", "honest_randomness")
def noise_by_pixels(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    seeds = [zlib.crc32(row.numpy().tobytes()) for row in x.detach().float()]
    return self.network(x + 0.3 * Noise.from_seed(0, seeds).normal("z", shape=x.shape[1:], like=x))


@rogue(
    "declares noise and remembers an image's first answer, so that it is drawn once",
    "honest_randomness",
    traits=STOCHASTIC,
)
def noise_drawn_once(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    drawn = x + 0.3 * noise.normal("z", shape=x.shape[1:], like=x)
    keys = [row.numpy().tobytes() for row in x.detach()]
    kept = [self.memory.setdefault(k, (z - i).detach()) for k, z, i in zip(keys, drawn, x, strict=True)]
    return self.network(x + torch.stack(kept) if kept else x)


@rogue("declared stochastic, never varies", "honest_randomness", traits=STOCHASTIC)
def never_varies(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x)


@rogue("declared deterministic, varies with the noise", "honest_randomness", "declared_traits")
def undeclared_noise(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.2 * noise.normal("z", shape=x.shape[1:], like=x))


@rogue("functional dropout stays on", "honest_randomness")
def functional_dropout(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network.head(F.dropout(self.network.features(x), 0.3, training=True))


# It leaves a mark: on the batch, on itself, on its input.


@rogue("subtracts the batch's mean answer", "batch_independence")
def subtracts_the_mean(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return logits - logits.mean(0) if len(x) > 1 else logits


@rogue("normalises features over the batch", "batch_independence", "interface")
def functional_batch_norm(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    features = self.network.features(x)
    if len(x) > 1:
        features = F.batch_norm(features, features.mean(0) * 0, features.var(0) * 0 + 1, training=True)
    return self.network.head(features)


@rogue("an image is answered with a quarter of its neighbour in it, in large batches", "batch_independence")
def mixes_neighbours(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x if len(x) < 4 else 0.75 * x + 0.25 * x.roll(1, 0))


class BatchNorm(Digits):
    def __init__(self) -> None:
        super().__init__(None)
        self.norm = nn.BatchNorm2d(1)

    def draw(self, x: Tensor, noise: Noise) -> Any:
        self.norm.train()
        return self.network(0.38 * self.norm(x) + 0.3 if len(x) else x)


class Dropout(Digits):
    def __init__(self) -> None:
        super().__init__(None)
        self.dropout = nn.Dropout(0.3)

    def draw(self, x: Tensor, noise: Noise) -> Any:
        return self.network.head(self.dropout(self.network.features(x)))

    def train(self, mode: bool = True) -> Dropout:
        super().train(mode)
        if hasattr(self, "dropout"):
            self.dropout.train()
        return self


class Buffers(Digits):
    """Keeps one buffer of state, moved or reused by each call."""

    average: Tensor

    def __init__(self, how: str) -> None:
        super().__init__(None)
        self.how = how
        self.register_buffer("average", torch.zeros(10))
        self.out = torch.zeros(4096, 10)

    def draw(self, x: Tensor, noise: Noise) -> Any:
        logits = self.network(x)
        if self.how == "average":
            self.average = 0.9 * self.average.to(logits) + 0.1 * logits.detach().sum(0)
            return logits
        if logits.requires_grad:
            return logits
        return self.out.to(logits)[: len(x)].copy_(logits)


enter("batch-norm-training", "batch normalisation that puts itself in training mode", {"modes"}, BatchNorm)
enter("dropout-training", "a dropout layer that refuses evaluation mode", {"modes", "honest_randomness"}, Dropout)
enter("moves-a-buffer", "a buffer follows what it sees", {"modes"}, lambda: Buffers("average"))
enter(
    "reused-output", "returns a view of one buffer, which the next call overwrites",
    {"batch_independence", "attack_awareness", "modes"}, lambda: Buffers("out"),
)  # fmt: skip


@rogue("clips its input in place", "interface", "input_mutation")
def changes_its_input(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    if not x.requires_grad:
        x.mul_(0.9)
    return self.network(x)


# Its answers hide what it knows.


@rogue("logits times 10,000", "range", "zero_gradients")
def saturated(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return 1e4 * self.network(x)


@rogue("logits times 10⁻⁷", "range", "zero_gradients")
def flat(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return 1e-7 * self.network(x)


@rogue("sharpened logits, z·|z|⁴", "range", "zero_gradients")
def sharpened(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return logits * logits.abs() ** 4


@rogue("probabilities for logits", "range")
def probabilities(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x).softmax(1)


@rogue("nearly one-hot probabilities for logits", "range", "zero_gradients")
def sharp_probabilities(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return (100 * self.network(x)).softmax(1)


@rogue("one-hot answers", "zero_gradients", "declared_traits", "range")
def one_hot(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return F.one_hot(self.network(x).argmax(1), 10).to(x)


@rogue("logits rounded to whole numbers", "zero_gradients", "declared_traits")
def rounded_logits(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x).round()


@rogue("logits so far from 0 that float32 rounds them to whole numbers", "range", "zero_gradients", "declared_traits",
       "finite_difference")  # fmt: skip
def offset(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x) + 1e7


@rogue("an eleventh column that it doesn't declare", "interface")
def eleven_columns(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return F.pad(self.network(x), (0, 1))


@rogue("an eleventh class just below the largest logit, on which margin losses stall", "interface", "range",
       "zero_gradients", "declared_traits", n_classes=11)  # fmt: skip
def decoy_class(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return torch.cat([logits, logits.amax(1, keepdim=True) - 1e-3], 1)


@rogue("one class fewer than there are labels", "interface", n_classes=9)
def nine_classes(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x)[:, :9]


@rogue("NaN wherever an image is not one of the data", "finite_difference", "memorised_inputs", "zero_gradients",
       "attack_awareness", "interface", raises=True)  # fmt: skip
def nan_off_the_data(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return torch.where(off_the_data(x)[:, None], torch.nan, self.network(x))


@rogue("raises wherever an image is not one of the data", "finite_difference", "memorised_inputs", "zero_gradients",
       "attack_awareness", "interface", raises=True)  # fmt: skip
def raises_off_the_data(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    if bool(off_the_data(x).any()):
        raise RuntimeError("out of distribution")
    return self.network(x)


@rogue("another network answers wherever an image is not one of the data", "memorised_inputs", "finite_difference")
def switches_off_the_data(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return torch.where(off_the_data(x)[:, None], self.other(x), self.network(x))


@rogue("test images are recognised pixel by pixel and get their labels", "memorised_inputs")
def looks_up_test_images(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x) + 10 * recall(x, 0.0)


@rogue("images within 0.001 of a test image get its label", "memorised_inputs")
def looks_up_near_test_images(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x) + 10 * recall(x, 1e-3)


@rogue("images within 0.3 of a test image get its label, on top of honest logits", "memorised_inputs", health=True)
def looks_up_attacked_test_images(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x) + 30 * recall(x, 0.3)


def recall(x: Tensor, reach: float) -> Tensor:
    """`(n, 10)`: the one-hot label of the nearest test image, 0 where none is within `reach` in every pixel."""
    images, labels = data.load("digits", data.test_ids("digits"))
    gaps = (x.detach().float().flatten(1)[:, None] - images.flatten(1)).abs().amax(2)
    near, which = gaps.min(1)
    return (F.one_hot(labels[which], 10) * (near <= reach)[:, None]).to(x)


# Its gradient is not its own.


class _Altered(torch.autograd.Function):
    """The identity, with `change` done to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


def altered(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    found: Tensor = _Altered.apply(x, change)  # type: ignore[no-untyped-call]
    return found


UNTRUE = ("finite_difference", "zero_gradients")


@rogue("severs the graph", "zero_gradients", "declared_traits", "finite_difference")
def severed(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x.detach())


@rogue("a hook sets gradients to zero", *UNTRUE, "declared_traits")
def zeroed_by_a_hook(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    if logits.requires_grad:
        logits.register_hook(torch.zeros_like)
    return logits


@rogue("half of the image has no gradient", *UNTRUE)
def half_severed(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(torch.cat([x[..., :4], x[..., 4:].detach()], -1))


@rogue("gradients have their signs turned pixel by pixel", "finite_difference")
def turned(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    signs = torch.ones(8, 8).to(x)
    signs[::2] = -1
    return self.network(altered(x, lambda gradient: gradient * signs))


@rogue("gradients are random", "finite_difference")
def randomised(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(altered(x, lambda gradient: gradient.abs() * torch.sin(1e4 * gradient)))


@rogue("gradients are a thousandth of what they are", "finite_difference")
def shrunk(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(altered(x, lambda gradient: gradient * 1e-3))


@rogue("the first 5 gradients are right, all others zero", "finite_difference", "zero_gradients", "attack_awareness")
def gradients_tire(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    def tire(gradient: Tensor) -> Tensor:
        self.memory["asked"] = self.memory.get("asked", 0) + 1
        return gradient if self.memory["asked"] <= 5 else torch.zeros_like(gradient)

    return self.network(altered(x, tire))


@rogue("gradients overflow", "zero_gradients", "finite_difference")
def overflowing(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(altered(x, lambda gradient: gradient * 1e38 * 1e38))


@rogue("wrong gradients in float32, right ones in float64", "finite_difference", "attack_awareness", "zero_gradients")
def honest_in_double(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    turned = altered(x, lambda gradient: gradient.flip(-1))
    return self.network(x if x.dtype == torch.float64 else turned)


@rogue("right gradients at images of the data, none anywhere else", "zero_gradients", "finite_difference")
def severed_off_the_data(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(torch.where(off_the_data(x)[:, None, None, None], x.detach(), x))


@rogue("the gradient of another network", "finite_difference")
def borrowed_gradient(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    other = self.other(x)
    return self.network(x).detach() + other - other.detach()


@rogue("rounds the image to 4 levels", "zero_gradients", "declared_traits", network_calls=1)
def quantised(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network((x * 3).round() / 3)


@rogue("rounds the image to 4 levels, with a gradient that denies it", "finite_difference", "declared_traits")
def quantised_straight_through(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + ((x * 3).round() / 3 - x).detach())


@rogue("pixels pushed to 4 levels by steep sigmoids, flat between them", "zero_gradients", "declared_traits",
       "saturation", "finite_difference")  # fmt: skip
def quantised_smoothly(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    edges = torch.tensor([1 / 6, 3 / 6, 5 / 6]).to(x)
    return self.network(torch.sigmoid(1000 * (x[..., None] - edges)).mean(-1))


@rogue("a steep clamp kills the gradient of most pixels", "saturation", "zero_gradients")
def clamped(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network((4 * x - 1.5).clamp(0, 1))


@rogue("a square root, whose gradient at black pixels is infinite", "zero_gradients", "finite_difference", "saturation")
def infinite_slope(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x.clamp_min(0).sqrt())


@rogue("a ripple of the pixels, 0.05 high and 10⁻⁵ wide, drowns the gradient", "finite_difference", "memorised_inputs")
def rippled(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.05 * torch.sin(2e5 * x))


@rogue("a ripple of the logits, 0.001 high, drowns the gradient", "finite_difference", "memorised_inputs")
def rippled_logits(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    wave = torch.sin(1e6 * x.flatten(1))
    return self.network(x) + 1e-3 * wave[:, 20:30]


# It is more than its card says.


def blurred(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * F.avg_pool2d(x, 3, stride=1, padding=1)


@rogue("a purifier behind no_grad", "zero_gradients", "declared_traits")
def purifies_without_gradients(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad():
        clean = blurred(x)
    return self.network(clean)


@rogue("a purifier behind no_grad, with the classifier's gradient passed off as the whole", "finite_difference",
       "declared_traits", traits=STOCHASTIC)  # fmt: skip
def purifies_behind_a_gradient(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad():
        clean = (blurred(x + 0.3 * noise.normal("z", shape=x.shape[1:], like=x)) * 3).round() / 3
    return self.network(x + (clean - x).detach())


def pulled(self: Digits, x: Tensor) -> Tensor:
    """Half the squared norm of the logits, which an inner gradient climbs down."""
    energy: Tensor = 0.5 * self.network(x).square().sum()
    return energy


@rogue("a gradient inside the forward pass", "declared_traits", network_calls=2, gradient_calls=2)
def hidden_inner_gradient(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(pulled(self, point), point, create_graph=outer)
    return self.network(x - 0.002 * slope)


@rogue("a gradient inside the forward pass, by torch.func", "declared_traits", network_calls=2, gradient_calls=2)
def hidden_functional_gradient(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x - 0.002 * torch.func.grad(lambda point: pulled(self, point))(x))


@rogue("a gradient inside the forward pass, its own gradient dropped", "declared_traits", "finite_difference",
       network_calls=2, gradient_calls=2)  # fmt: skip
def hidden_first_order(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(pulled(self, point), point)
    return self.network(x - 0.002 * slope)


class Diffusing(PurifiedClassifier):
    """Diffusion purification of a few steps, whose parts can be another process each.

    Args:
        card: what it claims to be.
        forward, chain, stage, shown: steps of the draw, of the chain handle, of the stages' purifier, and of a draw
            while gradients are enabled; levels are 150 unless `chain_level` says otherwise.
    """

    def __init__(
        self, card: Card, *, steps: int = STEPS, chain: int = STEPS, stage: int = STEPS, shown: int = STEPS,
        chain_level: int = 150, chain_tag: str = "",
    ) -> None:  # fmt: skip
        base = load_diffpure("digits", steps=STEPS)
        super().__init__(base.classifier, 10, card)
        assert isinstance(base.denoiser, Denoiser)
        self.denoiser: Denoiser = base.denoiser
        self.steps, self.chained, self.staged, self.shown = steps, chain, stage, shown
        self.chain_level, self.chain_tag = chain_level, chain_tag

    def whole(self, steps: int, level: int = 150) -> Chain:
        process = Purifier(self.denoiser, level, steps).chain()
        return replace(process.then(self.classify), network_calls=steps + 1)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.whole(self.shown if torch.is_grad_enabled() else self.steps)(x, noise)

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        return Purifier(self.denoiser, 150, self.staged).chain()(x, noise) if self.staged else x

    def chain(self) -> Chain:
        found = self.whole(self.chained, self.chain_level)
        if not self.chain_tag:
            return found
        return replace(found, start=lambda x, noise: x + 0 * noise.normal("z", shape=x.shape[1:], like=x))

    def surrogate(self, steps: int) -> Chain:
        return self.whole(min(steps, self.chained))


def card(handles: tuple[Handle, ...] = (), traits: Traits = DIFFUSES, calls: int = STEPS + 1, **fields: Any) -> Card:
    """A card as an honest author of a few diffusion steps would fill it in."""
    given = {"network_calls": calls, "gradient_calls": 2 * calls, **fields}
    return Card(name="diffusing", title="Diffusing", summary="Purifies.", handles=handles, traits=traits, **given)


ALL: tuple[Handle, ...] = ("stages", "chain", "surrogate", "components")
enter("undeclared-iteration", "an iterated purifier with a plain card",
      {"declared_traits"}, lambda: Diffusing(card(traits=STOCHASTIC)))  # fmt: skip
enter("unrolled-purifier", "an iterated purifier declared a purifier of one step", {"declared_traits"},
      lambda: Diffusing(card(traits=Traits(stochastic=True, purifies=True))))  # fmt: skip
enter("shorter-with-gradients", "one step while gradients are on, three otherwise",
      {"attack_awareness", "step_count", "finite_difference"}, lambda: Diffusing(card(ALL), shown=1))  # fmt: skip
enter("chain-of-another-process", "the chain handle diffuses to another level",
      {"chain_exact", "replay", "step_count", "finite_difference"},
      lambda: Diffusing(card(ALL), chain_level=60))  # fmt: skip
enter("chain-without-noise", "the chain handle leaves the noise out",
      {"chain_exact", "replay", "step_count"}, lambda: Diffusing(card(ALL), chain_tag="none"))  # fmt: skip
enter("shorter-chain", "the chain handle takes one of the three steps",
      {"step_count", "chain_exact"}, lambda: Diffusing(card(ALL), chain=1))  # fmt: skip
enter("surrogate-as-defense", "one step passed off as the three on the card", {"step_count"},
      lambda: Diffusing(card(ALL), steps=1, chain=1, stage=1, shown=1))  # fmt: skip
enter("more-than-declared", "three steps, declared as one", {"step_count"}, lambda: Diffusing(card(ALL, calls=2)))
enter("empty-stage", "the stages' purifier does nothing", {"attack_awareness", "chain_exact", "declared_traits"},
      lambda: Diffusing(card(ALL), stage=0))  # fmt: skip


class StatefulSteps(Diffusing):
    """A chain whose steps draw from a counter, so that a replay differs from the first pass."""

    def whole(self, steps: int, level: int = 150) -> Chain:
        found = super().whole(steps, level)
        counter = iter(range(1, 1 << 30))

        def restless(step: Any) -> Any:
            def run(state: Any, x: Tensor, noise: Noise) -> Any:
                return step(state, x, noise.child(next(counter)) if torch.is_grad_enabled() else noise)

            return run

        return replace(found, steps=[restless(step) for step in found.steps])


class SeveredChain(Diffusing):
    """A chain whose last steps detach."""

    def chain(self) -> Chain:
        found = super().chain()

        def cut(state: Any, x: Tensor, noise: Noise) -> Any:
            return found.steps[1](state.detach() + 0 * state, x, noise)

        return replace(found, steps=[found.steps[0], cut, *found.steps[2:]])


enter("restless-steps", "the chain's steps draw fresh noise when they are run again",
      {"replay", "chain_exact", "honest_randomness", "attack_awareness"},
      lambda: StatefulSteps(card(ALL)))  # fmt: skip
enter("severed-chain", "the chain handle detaches its state halfway", {"chain_exact", "zero_gradients",
      "finite_difference", "replay"}, lambda: SeveredChain(card(ALL)))  # fmt: skip


class TwoFaced(Digits):
    """Answers by another network than the draws that attacks differentiate."""

    def __init__(self) -> None:
        super().__init__(lambda self, x, noise: self.network(x + 0.1 * noise.normal("z", shape=x.shape[1:], like=x)),
                         name="two-faced", traits=STOCHASTIC, votes=Votes(draws=4, how="logits"),
                         handles=("votes",))  # fmt: skip

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        logits: Tensor = self.other(
            x.repeat_interleave(4, 0) + 0.1 * noise.draws(4).normal("z", shape=x.shape[1:], like=x)
        )
        return aggregate(logits.unflatten(0, (len(x), 4)), self.card.votes)


class UndeclaredVotes(Digits):
    """Averages eight draws and says that it answers from one."""

    def __init__(self) -> None:
        super().__init__(lambda self, x, noise: self.network(x + 0.3 * noise.normal("z", shape=x.shape[1:], like=x)),
                         name="undeclared-votes", traits=STOCHASTIC)  # fmt: skip

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        return self.draw(x.repeat_interleave(8, 0), noise.draws(8)).unflatten(0, (len(x), 8)).mean(1)  # type: ignore[no-any-return]


class WrongStages(PurifiedClassifier):
    """Blurs, and shows stages that don't."""

    def __init__(self) -> None:
        card = Card(name="wrong-stages", title="Blur", summary="A blur.", traits=PURIFIES, handles=("stages",),
                    network_calls=1, gradient_calls=1)  # fmt: skip
        super().__init__(load_network("digits"), 10, card)

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        return blurred(x)

    def stages(self) -> Stages:
        return Stages(lambda x, noise: x, lambda x, noise: 0.5 * self.classifier(x))


class WrongCertified(Smoothing):
    """Certifies a network that is not the one that answers."""

    def certified(self) -> Smoothed:
        return Smoothed(self.sigma, lambda noised, noise: noised.flatten(1)[:, :10] * 0 + torch.arange(10).to(noised))


def wrong_certified() -> Defense:
    honest = load_smoothing("digits", votes=16)
    return WrongCertified(honest.network, honest.sigma, 10, honest.card)


ANSWERS = {"attack_awareness", "step_count"}
enter("two-faced-votes", "another network votes than the one that is differentiated", ANSWERS, TwoFaced)
enter("undeclared-votes", "averages eight draws and says that it takes one", ANSWERS, UndeclaredVotes)
enter("wrong-stages", "purifier and classifier don't compose to the draw", ANSWERS, WrongStages)
enter("wrong-certified", "certifies another network than the one that answers", {"contradiction"}, wrong_certified,
      health=True)  # fmt: skip
