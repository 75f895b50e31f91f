"""`declared_traits`: hidden traits that must be found, honest oddities that must be let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assay import data
from assay.card import Card, Traits, Votes
from assay.chain import Chain
from assay.checks import Subject
from assay.checks.declared_traits import check
from assay.defense import Defense
from assay.finding import Finding
from assay.noise import Noise
from assay.registry import DEFENSES

IDS = data.board_ids("digits")[:16]
NETWORK = DEFENSES["undefended"].build("digits")
SMOOTHER = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).reshape(1, 1, 3, 3) / 16


class Toy(Defense):
    """The undefended digits network with `way(self, x, noise) -> logits` around it."""

    def __init__(self, way: Callable[..., Tensor], traits: Traits | None = None, votes: Votes | None = None) -> None:
        super().__init__()
        self.card = Card(name="toy", title="Toy", summary="", traits=traits or Traits(), votes=votes or Votes())
        self.n_classes = 10
        self.network = NETWORK
        self.way = way
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lift = nn.Conv2d(1, 1, 3, padding=1)
            self.block = nn.Conv2d(8, 8, 3, padding=1)
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
            self.wide = nn.Linear(64, 64)
            self.heads = nn.ModuleList(nn.Linear(64, 10) for _ in range(3))
            self.enter = nn.Conv2d(1, 8, 3, padding=1)
            self.tail = nn.Linear(512, 10)
        self.register_buffer("kernel", SMOOTHER.clone())
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.way(self, x, noise)

    def classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.draw(x, Noise.from_seed(0, len(x)))
        return logits


def examine(defense: Defense, n: int = 16) -> Finding:
    x, y = data.load("digits", IDS[:n])
    subject = Subject(defense, x, y, IDS[:n], Noise.from_seed(0, IDS[:n]).child("preflight"))
    found = check(subject)
    assert found.check == "declared_traits"
    assert all(not module.training for module in defense.modules())
    return found


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(3 * x) / 3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class HiddenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, self: Any) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.classify(point).logsumexp(1).sum(), point)
        return x + 1e-3 * slope

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def smooth(self: Any, x: Tensor) -> Tensor:
    """A step of a purifier with a weight: pixels are drawn to their neighbours' mean where the two are close."""
    mean = F.conv2d(x, self.kernel, padding=1)
    return x + 0.1 * torch.tanh(3 * (mean - x))


def quantised(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(torch.round(3 * x) / 3)  # type: ignore[no-any-return]


def finely_quantised(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(torch.round(255 * x) / 255)  # type: ignore[no-any-return]


def straight_through(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(StraightThrough.apply(x))  # type: ignore[no-any-return]


def detached(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(0.5 * x + 0.5 * x.detach())  # type: ignore[no-any-return]


def severed(self: Any, x: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad():
        x = smooth(self, x)
    return self.classify(x)  # type: ignore[no-any-return]


def outside_torch(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(torch.from_numpy(x.detach().cpu().numpy().round(1)))  # type: ignore[no-any-return]


def hidden_gradient(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(HiddenGradient.apply(x, self))  # type: ignore[no-any-return]


def transformed_gradient(self: Any, x: Tensor, noise: Noise) -> Tensor:
    slope = torch.func.grad(lambda z: self.classify(z).logsumexp(1).sum())(x)
    return self.classify(x + 1e-3 * slope)  # type: ignore[no-any-return]


def forward_mode(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits, tangent = torch.func.jvp(self.classify, (x,), (torch.ones_like(x),))
    return logits + 1e-3 * tangent  # type: ignore[no-any-return]


def iterated(self: Any, x: Tensor, noise: Noise) -> Tensor:
    for _ in range(5):
        x = smooth(self, x)
    return self.classify(x)  # type: ignore[no-any-return]


def iterated_by_copies(self: Any, x: Tensor, noise: Noise) -> Tensor:
    for _ in range(5):
        x = x + 0.1 * torch.tanh(3 * (F.conv2d(x, self.kernel.clone(), padding=1) - x))
    return self.classify(x)  # type: ignore[no-any-return]


def noisy(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(x + 0.1 * noise.normal("z", shape=x.shape[1:], like=x))  # type: ignore[no-any-return]


def noisy_off_the_data(self: Any, x: Tensor, noise: Noise) -> Tensor:
    off = (x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3
    z = noise.normal("z", shape=(10,), like=x)
    return self.classify(x) + off[:, None] * z  # type: ignore[no-any-return]


def purified_once(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(smooth(self, x))  # type: ignore[no-any-return]


def purified_twice_folded(self: Any, x: Tensor, noise: Noise) -> Tensor:
    rows = smooth(self, x.repeat_interleave(2, 0))
    return self.classify(rows).unflatten(0, (-1, 2)).mean(1)  # type: ignore[no-any-return]


ALL = Traits(purifies=True)
HIDDEN = [
    ("non_differentiable", quantised, ALL),
    ("non_differentiable", finely_quantised, ALL),
    ("non_differentiable", straight_through, ALL),
    ("non_differentiable", detached, Traits()),
    ("non_differentiable", severed, ALL),
    ("non_differentiable", outside_torch, ALL),
    ("inner_gradient", hidden_gradient, Traits(purifies=True, non_differentiable=True)),
    ("inner_gradient", transformed_gradient, ALL),
    pytest.param("inner_gradient", forward_mode, Traits(), marks=pytest.mark.filterwarnings("ignore:.*jit.script")),
    ("iterative", iterated, ALL),
    ("iterative", iterated_by_copies, ALL),
    ("stochastic", noisy, Traits()),
    ("stochastic", noisy_off_the_data, Traits()),
    ("purifies", purified_once, Traits()),
    ("purifies", purified_twice_folded, Traits()),
    ("purifies", quantised, Traits(non_differentiable=True)),
]


@pytest.mark.parametrize(("trait", "way", "traits"), HIDDEN)
def test_a_hidden_trait_fails_and_is_named(trait: str, way: Callable[..., Tensor], traits: Traits) -> None:
    found = examine(Toy(way, traits))
    assert found.status == "fail", found.data
    assert repr(trait) in found.message
    assert {name for name, each in found.data.items() if each["measured"] == "yes" and not each["declared"]} == {trait}
    declared = examine(Toy(way, traits.model_copy(update={trait: True})))
    assert declared.status != "fail", declared.message


def plain(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.body(x)  # type: ignore[no-any-return]


def normalised(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(((x - 0.3) / 0.25).mul(0.25).add(0.3).clamp(0, 1))  # type: ignore[no-any-return]


def standardised(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.body((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))  # type: ignore[no-any-return]


def gamma(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(x.clamp(0, 1).pow(1.2))  # type: ignore[no-any-return]


def first_layer_of_one_channel(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.body(F.relu(self.lift(x)))  # type: ignore[no-any-return]


def hidden_layer_as_wide_as_the_image(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.heads[0](F.relu(self.wide(x.flatten(1))))  # type: ignore[no-any-return]


def block_used_twice(self: Any, x: Tensor, noise: Noise) -> Tensor:
    features = F.relu(self.enter(x))
    for _ in range(2):
        features = features + F.relu(self.block(features))
    return self.tail(features.flatten(1))  # type: ignore[no-any-return]


def ensemble(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return torch.stack([head(x.flatten(1)) for head in self.heads]).mean(0) + self.body(x)  # type: ignore[no-any-return]


def augmented(self: Any, x: Tensor, noise: Noise) -> Tensor:
    views = torch.stack([x, x.roll(1, -1), x.roll(-1, -2), x.flip(-1)], 1).flatten(0, 1)
    return self.classify(views).unflatten(0, (-1, 4)).mean(1)  # type: ignore[no-any-return]


def augmented_one_by_one(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return sum(self.classify(view) for view in (x, x.roll(1, -1), x.roll(-1, -1))) / 3  # type: ignore[no-any-return]


def saturated(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return 1e4 * self.classify(x)  # type: ignore[no-any-return]


def log_probabilities(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return (10 * self.classify(x)).log_softmax(1)  # type: ignore[no-any-return]


def in_half_precision(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.body(x.bfloat16().float())  # type: ignore[no-any-return]


def constant(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.body(0 * x)  # type: ignore[no-any-return]


def noised_and_clipped(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify((x + 0.1 * noise.normal("z", shape=x.shape[1:], like=x)).clamp(0, 1))  # type: ignore[no-any-return]


STOCHASTIC = Traits(stochastic=True)
HONEST = [
    (plain, Traits()),
    (normalised, Traits()),
    (standardised, Traits()),
    (gamma, Traits()),
    (first_layer_of_one_channel, Traits()),
    (hidden_layer_as_wide_as_the_image, Traits()),
    (block_used_twice, Traits()),
    (ensemble, Traits()),
    (augmented, Traits()),
    (augmented_one_by_one, Traits()),
    (saturated, Traits()),
    (log_probabilities, Traits()),
    (in_half_precision, Traits()),
    (constant, Traits()),
    (noisy, STOCHASTIC),
    (noised_and_clipped, STOCHASTIC),
    (purified_once, Traits(purifies=True)),
    (iterated, Traits(purifies=True, iterative=True)),
]


@pytest.mark.parametrize(("way", "traits"), HONEST)
def test_an_honest_oddity_passes(way: Callable[..., Tensor], traits: Traits) -> None:
    found = examine(Toy(way, traits))
    assert found.status == "pass", found.message


def test_a_single_image_is_enough() -> None:
    assert examine(Toy(plain), n=1).status == "pass"
    assert "'non_differentiable'" in examine(Toy(quantised, ALL), n=1).message


@pytest.mark.parametrize("trait", ["stochastic", "purifies", "iterative", "inner_gradient", "non_differentiable"])
def test_a_trait_that_is_declared_and_never_seen_is_flagged(trait: str) -> None:
    found = examine(Toy(plain, Traits(**{trait: True})))
    assert found.status == "flag"
    assert repr(trait) in found.message


def test_votes_that_are_counted_have_no_gradient() -> None:
    votes = Votes(draws=8, how="majority")
    found = examine(Toy(noisy, STOCHASTIC, votes))
    assert found.status == "fail"
    assert "'non_differentiable'" in found.message
    assert examine(Toy(noisy, Traits(stochastic=True, non_differentiable=True), votes)).status == "pass"
    assert examine(Toy(noisy, STOCHASTIC, Votes(draws=8, how="probabilities"))).status == "pass"


def deep(self: Any, x: Tensor, noise: Noise) -> Tensor:
    features = F.relu(self.enter(x))
    for _ in range(6):
        features = features + F.relu(self.block(features))
    return self.tail(features.flatten(1))  # type: ignore[no-any-return]


def test_weights_used_over_and_over_without_images_are_flagged_at_most() -> None:
    found = examine(Toy(deep))
    assert found.status == "pass"  # the block holds few of the weights
    # A network of that block alone:
    found = examine(Toy(lambda self, x, noise: recurrent(self, x)))
    assert found.status == "flag"
    assert "'iterative'" in found.message


def recurrent(self: Any, x: Tensor) -> Tensor:
    features = x.expand(-1, 8, -1, -1)
    for _ in range(4):
        features = features + F.relu(self.block(features))
    return torch.cat([features.mean((2, 3)), features.amax((2, 3))[:, :2]], 1)


def blurred(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.classify(F.conv2d(x, self.kernel, padding=1))  # type: ignore[no-any-return]


def blurred_at_random(self: Any, x: Tensor, noise: Noise) -> Tensor:
    share = noise.uniform("share", shape=(1, 1, 1), like=x)
    return self.classify(x + share * (F.conv2d(x, self.kernel, padding=1) - x))  # type: ignore[no-any-return]


def test_a_fixed_blur_may_be_declared_and_a_random_one_should() -> None:
    assert examine(Toy(blurred)).status == "pass"
    assert examine(Toy(blurred, ALL)).status == "pass"
    found = examine(Toy(blurred_at_random, STOCHASTIC))
    assert found.status == "flag"
    assert "'purifies'" in found.message


def test_a_chain_of_several_steps_is_a_process() -> None:
    class Chained(Toy):
        def chain(self) -> Chain:
            steps = [lambda state, x, noise: state] * 3
            return Chain(lambda x, noise: x, steps, lambda state, x, noise: self.classify(state), network_calls=1)

    def classify(self: Any, x: Tensor, noise: Noise) -> Tensor:
        return self.classify(x)  # type: ignore[no-any-return]

    defense = Chained(classify)
    defense.card = defense.card.model_copy(update={"handles": ("chain",)})
    found = examine(defense)
    assert found.status == "fail"
    assert "3 steps" in found.message


def test_the_same_seed_gives_the_same_finding() -> None:
    assert examine(Toy(straight_through)) == examine(Toy(straight_through))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DEFENSES if "digits" in DEFENSES[name].card.datasets])
def test_registered_defenses_are_what_their_cards_say(name: str) -> None:
    found = examine(DEFENSES[name].build("digits"))
    assert found.status == "pass", found.message
