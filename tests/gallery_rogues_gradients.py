"""More rogues, whose gradients or hidden traits are wrong in one way each, and honest defenses odd in the same places.

In the format of `gallery_rogues.py` and `gallery_honest.py`, which load apart from this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from assay import data
from assay.card import Card, Handle, Traits, Votes
from assay.certificate import Smoothed
from assay.chain import Chain
from assay.defense import Defense, Stages
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
STOCHASTIC, PURIFIES = Traits(stochastic=True), Traits(purifies=True)
DIFFUSES = Traits(stochastic=True, purifies=True, iterative=True)


@dataclass(frozen=True)
class Rogue:
    """As in `gallery_rogues.py`."""

    name: str
    wrong: str
    caught_by: frozenset[str]
    build: Callable[[], Defense]
    health: bool = False
    raises: bool = False


@dataclass(frozen=True)
class Honest:
    """As in `gallery_honest.py`."""

    name: str
    odd: str
    build: Callable[[], Defense]


ROGUES: list[Rogue] = []
HONEST: list[Honest] = []
Draw = Callable[[Any, Tensor, Noise], Tensor]
Change = Callable[[Tensor], Tensor]


class Network(Protocol):
    """A classifier of digits, as far as a trick sees it."""

    head: nn.Linear

    def __call__(self, x: Tensor) -> Tensor: ...
    def features(self, x: Tensor) -> Tensor: ...


class Digits(Defense):
    """The undefended network, or another, with `trick(self, x, noise)` in place of its answer."""

    def __init__(self, trick: Draw, name: str, network: nn.Module | None = None, **card: Any) -> None:
        super().__init__()
        fields = {"title": name, "summary": "A network.", "network_calls": 1, "gradient_calls": 1, **card}
        self.card = Card(name=name, **fields)
        self.n_classes = 10
        self.network = cast(Network, network or load_network("digits"))
        self.other = cast(Network, load_trained("digits").network)
        self.trick = trick
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.trick(self, x, noise)


def rogue(wrong: str, *caught_by: str, health: bool = False, **card: Any) -> Callable[[Draw], Draw]:
    """Enters `Digits(trick, **card)` among the rogues."""

    def entered(trick: Draw) -> Draw:
        name = trick.__name__.replace("_", "-")
        ROGUES.append(Rogue(name, wrong, frozenset(caught_by), lambda: Digits(trick, name, **card), health))
        return trick

    return entered


def honest(odd: str, network: Callable[[], nn.Module] | None = None, **card: Any) -> Callable[[Draw], Draw]:
    """Enters `Digits(draw, **card)` among the honest."""

    def entered(draw: Draw) -> Draw:
        name = draw.__name__.replace("_", "-")
        HONEST.append(Honest(name, odd, lambda: Digits(draw, name, network() if network else None, **card)))
        return draw

    return entered


def enter(
    name: str, wrong: str, caught_by: Iterable[str], build: Callable[[], Defense], *, health: bool = False
) -> None:
    """Enters a rogue that needs a class of its own."""

    def made() -> Defense:
        defense = build().eval().requires_grad_(False)
        defense.card = defense.card.model_copy(update={"name": name, "title": name})
        return defense

    ROGUES.append(Rogue(name, wrong, frozenset(caught_by), made, health))


class _Own(torch.autograd.Function):
    """`forward(x)`, with `backward(x, gradient)` for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Change, backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.back = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(ctx.saved_tensors[0], gradients[0]), None, None


def own(x: Tensor, forward: Change, backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`forward(x)` with a backward pass of its author's making."""
    found: Tensor = _Own.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return found


def same(x: Tensor) -> Tensor:
    return x.clone()


def blurred(x: Tensor) -> Tensor:
    return 0.4 * x + 0.6 * F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def curved(x: Tensor) -> Tensor:
    """A purifier without weights: pixels are drawn to their neighbours' mean, the more the nearer they are to it."""
    mean = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return x + (mean - x) * torch.exp(-4 * (mean - x).square())


def median(x: Tensor) -> Tensor:
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3).unflatten(1, (x.shape[1], 9))
    found: Tensor = patches.median(2).values.reshape(x.shape)
    return found


def known() -> Tensor:
    """`(200, 64)`: training images."""
    images, _ = data.load("digits", data.train_split("digits")[:200])
    return images.flatten(1)


# A purifier whose gradient is another's.


@rogue("a blur behind detach, with the identity's gradient passed through", "finite_difference")
def blur_passed_through(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + (blurred(x) - x).detach())


@rogue("a curved purifier whose own backward pass is zero", "zero_gradients", "declared_traits", "finite_difference")
def own_backward_zero(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, curved, lambda x, g: torch.zeros_like(g)))


@rogue("a curved purifier whose own backward pass is 10⁻⁴ of the gradient", "finite_difference", "zero_gradients")
def own_backward_tiny(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, curved, lambda x, g: 1e-4 * g))


@rogue("signs of half of the gradient's pixels turned, at random places", "finite_difference")
def half_turned(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    signs = torch.sin(1e3 * torch.arange(64.0)).sign().reshape(8, 8).to(x)
    return self.network(own(x, same, lambda x, g: g * signs))


@rogue("half of the gradient is noise made from itself", "finite_difference")
def noise_in_the_gradient(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: g + g.abs().mean() * torch.sin(1e5 * g).sign()))


@rogue("the gradient's rows and columns are exchanged", "finite_difference")
def transposed_gradient(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: g.transpose(2, 3)))


@rogue("the gradient is made of signs", "finite_difference")
def signs_for_a_gradient(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: g.sign()))


@rogue("the gradient of half of the features is scaled by a hook", "finite_difference")
def hook_on_features(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    features = self.network.features(x)
    if features.requires_grad:
        scale = (torch.arange(features.shape[1]) % 2).to(features)
        features.register_hook(lambda g: g * scale)
    return self.network.head(features)


@rogue("no gradient in float32, the right one in float64", "zero_gradients", "declared_traits", "finite_difference")
def severed_in_single(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x if x.dtype == torch.float64 else x.detach())


@rogue("every third image of a batch has its gradient turned", "finite_difference", "batch_independence")
def a_third_turned(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    turned = (torch.arange(len(x)) % 3 == 0)[:, None, None, None]
    return self.network(own(x, same, lambda x, g: torch.where(turned, -g, g)))


# A gradient that is right where checks are likely to look.


def nearest(x: Tensor) -> Tensor:
    """`(n, 1, 1, 1)`: how far each image is from the test images, in its furthest pixel."""
    images, _ = data.load("digits", data.test_ids("digits"))
    gaps = (x.detach().float().flatten(1)[:, None] - images.flatten(1)).abs().amax(2)
    return gaps.amin(1)[:, None, None, None]


@rogue("the gradient is right within 0.03 of a test image, turned further off", "finite_difference")
def right_at_test_images(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: torch.where(nearest(x) > 0.03, -g, g)))


@rogue("the gradient is right within 0.075 of a test image, turned further off", "finite_difference")
def right_near_test_images(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: torch.where(nearest(x) > 0.075, -g, g)))


@rogue("the gradient fades within the ball, and is zero at its edge", "finite_difference", "zero_gradients")
def fades_within_the_ball(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: g * (nearest(x) < 0.09)))


def close(logits: Tensor) -> Tensor:
    """`(n, 1)`: answers whose margin is small, as an attack makes them."""
    top = logits.detach().topk(2, 1).values
    return (top[:, :1] - top[:, 1:]) < 0.25 * logits.detach().abs().amax(1, keepdim=True)


@rogue("no gradient where the answer is nearly undecided, as an attack makes it", "finite_difference", "zero_gradients")
def severed_at_the_boundary(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return torch.where(close(logits), logits.detach(), logits)


@rogue("the gradient points back where the answer is nearly undecided", "finite_difference")
def turned_at_the_boundary(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return torch.where(close(logits), 2 * logits.detach() - logits, logits)


@rogue("only the largest logit has a gradient", "finite_difference")
def only_the_largest_logit(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    kept = F.one_hot(logits.argmax(1), 10).bool()
    return torch.where(kept, logits, logits.detach())


@rogue("only the two largest logits have a gradient, so that targeted losses stall", "finite_difference")
def only_the_two_largest_logits(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    kept = logits >= logits.topk(2, 1).values[:, 1:]
    return torch.where(kept, logits, logits.detach())


@rogue("the gradient is right where it is that of one image alone, turned in larger batches", "batch_independence",
       "attack_awareness", "finite_difference", "eot")  # fmt: skip
def right_for_single_images(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: g if len(g) == 1 else -g))


@rogue("the gradient is turned in batches of more than 32, as a long attack's are", "batch_independence",
       "attack_awareness", "finite_difference", "eot", health=True)  # fmt: skip
def turned_in_large_batches(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(own(x, same, lambda x, g: g if len(g) <= 32 else -g))


# A function that gradients can't follow.


@rogue("a ripple on the logits, too small to see and too steep to climb over; its gradient is right", "zero_gradients",
       "finite_difference", health=True)  # fmt: skip
def steep_ripple(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    waves = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).to(x)
    return self.network(x) + 0.02 * (2000 * (x.flatten(1) @ waves)).sin()


@rogue("pixels lose 0.05, and what is below is dead", "saturation", "zero_gradients")
def dead_zone(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network((x - 0.05).clamp_min(0) / 0.95)


@rogue("probabilities at a temperature of 10⁻⁴, with a floor under their logarithms", "range", "zero_gradients")
def frozen_with_a_floor(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return ((1e4 * self.network(x)).softmax(1) + 1e-6).log()


@rogue("logits rounded to whole numbers, and a millionth of what was rounded off", "declared_traits", "zero_gradients")
def rounded_with_a_rest(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return logits.detach().round() + 1e-6 * logits


@rogue("features become their signs, with a gradient of tanh", "declared_traits", "finite_difference")
def signs_of_features(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    features = self.network.features(x)
    soft = (features - 0.2).tanh()
    return self.network.head(soft + ((features - 0.2).sign() - soft).detach())


@rogue("features become steps of 0.5, with a slope of 10⁻³ between them", "declared_traits", "zero_gradients",
       "finite_difference")  # fmt: skip
def steps_of_features(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    features = self.network.features(x)
    return self.network.head((2 * features).round() / 2 + 1e-3 * features)


@rogue("a chaotic map, iterated 12 times, shakes each pixel before the network", "zero_gradients", "declared_traits",
       "finite_difference")  # fmt: skip
def chaotic(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    state = 0.1 + 0.8 * x
    for _ in range(12):
        state = 3.99 * state * (1 - state)
    return self.network(x + 0.1 * (state - 0.5))


@rogue("a smooth wave, 0.05 high and 0.002 wide, on each pixel", "zero_gradients", "declared_traits",
       "finite_difference")  # fmt: skip
def waves(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.05 * torch.sin(3e3 * x))


@rogue("a wave of the image's sum on the logits, far steeper than they", "zero_gradients", "declared_traits",
       "finite_difference")  # fmt: skip
def waves_on_logits(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    places = torch.arange(1.0, 65.0).to(x)
    phase = torch.arange(10.0).to(x)
    return self.network(x) + 0.5 * torch.sin(300 * (x.flatten(1) @ places)[:, None] + phase)


@rogue("noise made from a hash of the image's coarse pixels", "declared_traits", "finite_difference",
       "memorised_inputs", "honest_randomness")  # fmt: skip
def noise_by_a_coarse_hash(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    coarse = (x.detach() * 64).round().flatten(1)
    key = torch.sin(coarse @ torch.arange(1.0, 65.0).to(x))[:, None]
    wobble = torch.sin(1e4 * key * torch.arange(1.0, 65.0).to(x)).reshape(x.shape)
    return self.network(x + 0.2 * wobble)


@rogue("noise made from a smooth function of the image, so steep that it never repeats", "declared_traits",
       "finite_difference", "memorised_inputs", "zero_gradients")  # fmt: skip
def noise_by_a_steep_function(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    key = 200 * x.flatten(1).sum(1, keepdim=True)
    wobble = torch.sin(key * torch.arange(1.0, 65.0).to(x)).reshape(x.shape)
    return self.network(x + 0.2 * wobble)


# It hides what it does.


def energy(self: Digits, x: Tensor) -> Tensor:
    """`(n,)`: half the squared norm of the logits, which inner optimisations climb down."""
    return 0.5 * self.network(x).square().sum(1)


@rogue("climbs down an energy by finite differences", "declared_traits", network_calls=17, gradient_calls=17)
def inner_finite_differences(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    slope = torch.zeros_like(x)
    for i in range(8):
        way = torch.sin(1e3 * (i + 1) * torch.arange(64.0)).sign().reshape(8, 8).to(x)
        up, down = energy(self, x + 0.01 * way), energy(self, x - 0.01 * way)
        slope = slope + ((up - down) / 0.02)[:, None, None, None] * way / 64
    return self.network(x - 0.0005 * slope)


@rogue("climbs down an energy by forward-mode differentiation", "declared_traits", network_calls=5, gradient_calls=5)
def inner_forward_mode(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    slope = torch.zeros_like(x)
    for i in range(4):
        way = torch.sin(1e3 * (i + 1) * torch.arange(64.0)).sign().reshape(8, 8).to(x).expand_as(x)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(energy(self, forward_ad.make_dual(x, way))).tangent
        assert tangent is not None
        slope = slope + tangent[:, None, None, None] * way / 64
    return self.network(x - 0.0005 * slope)


@rogue("climbs down an energy by a gradient in closed form, five steps", "declared_traits")
def inner_closed_form(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    frame = known().to(x)
    for _ in range(5):
        far = (x.flatten(1)[:, None] - frame).square().sum(2)
        x = x + 0.1 * ((-far).softmax(1) @ frame - x.flatten(1)).reshape(x.shape)
    return self.network(x)


@rogue("walks to the mean of training images until it stands still", "declared_traits")
def until_it_stands(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    frame, turns = known().to(x), 0
    walking = torch.ones(len(x), 1, 1, 1, dtype=torch.bool)
    while bool(walking.any()) and turns < 30:
        far = (x.flatten(1)[:, None] - frame).square().sum(2)
        step = 0.2 * ((-far).softmax(1) @ frame - x.flatten(1)).reshape(x.shape)
        x, turns = torch.where(walking, x + step, x), turns + 1
        walking = walking & (step.detach().abs().amax((1, 2, 3), keepdim=True) > 0.02)
    return self.network(x)


def cosines() -> Tensor:
    """The orthonormal cosine transform of 8 values, `(8, 8)`."""
    i = torch.arange(8.0)
    rows = torch.cos(math.pi * (i + 0.5) * i[:, None] / 8) * math.sqrt(2 / 8)
    rows[0] /= math.sqrt(2)
    return rows


@rogue("a compression: rounded cosine coefficients", "declared_traits", "zero_gradients")
def compressed(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    matrix = cosines().to(x)
    levels = ((matrix @ x @ matrix.T) * 4).round() / 4
    return self.network(matrix.T @ levels @ matrix)


@rogue("a compression, straight through", "declared_traits", "finite_difference")
def compressed_straight_through(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    matrix = cosines().to(x)
    kept = matrix @ x @ matrix.T
    kept = kept + ((kept * 4).round() / 4 - kept).detach()
    return self.network(matrix.T @ kept @ matrix)


@rogue("an undeclared median filter", "declared_traits")
def hidden_median(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(0.5 * x + 0.5 * median(x))


@rogue("an image is replaced by the nearest training image, half of it", "declared_traits", "finite_difference")
def nearest_neighbour(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    frame = known().to(x)
    far = (x.detach().flatten(1)[:, None] - frame).square().sum(2)
    return self.network(0.5 * x + 0.5 * frame[far.argmin(1)].reshape(x.shape))


@rogue("an undeclared purifier, with the image itself on a second way to the answer", "declared_traits")
def purifier_beside_the_image(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(curved(curved(x))) + 1e-3 * x.flatten(1)[:, 20:30]


class Diffusing(PurifiedClassifier):
    """Diffusion purification of a few steps; subclasses get one thing wrong."""

    def __init__(self, card: Card) -> None:
        base = load_diffpure("digits", steps=STEPS)
        super().__init__(base.classifier, 10, card)
        assert isinstance(base.denoiser, Denoiser)
        self.denoiser: Denoiser = base.denoiser

    def whole(self, steps: int = STEPS) -> Chain:
        process = Purifier(self.denoiser, 150, steps).chain()
        return replace(process.then(self.classify), network_calls=steps + 1)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise)

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        return Purifier(self.denoiser, 150, STEPS).chain()(x, noise)

    def chain(self) -> Chain:
        return self.whole()

    def surrogate(self, steps: int) -> Chain:
        return self.whole(min(steps, STEPS))


ALL: tuple[Handle, ...] = ("stages", "chain", "surrogate", "components")


def card(handles: tuple[Handle, ...] = ALL, traits: Traits = DIFFUSES, calls: int = STEPS + 1) -> Card:
    """As an honest author of a few diffusion steps would fill it in."""
    return Card(name="diffusing", title="Diffusing", summary="Purifies.", handles=handles, traits=traits,
                network_calls=calls, gradient_calls=2 * calls)  # fmt: skip


class StoppedState(Diffusing):
    """Draw and chain detach the state halfway."""

    def chain(self) -> Chain:
        found = self.whole()

        def cut(state: Any, x: Tensor, noise: Noise) -> Any:
            return found.steps[1](state.detach() + 0.05 * (state - state.detach()), x, noise)

        return replace(found, steps=[found.steps[0], cut, *found.steps[2:]])


class OtherStream(Diffusing):
    """The chain handle runs the right process on other noise."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.whole()(x, noise.child("draw"))


class ScaledChain(Diffusing):
    """The chain handle's gradient is a tenth of the draw's."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.whole()(x, noise)

    def chain(self) -> Chain:
        found = self.whole()
        return replace(found, start=lambda x, noise: found.start(own(x, same, lambda x, g: 0.1 * g), noise))


class ShorterStage(Diffusing):
    """The stages' purifier takes one step."""

    def stages(self) -> Stages:
        return Stages(lambda x, noise: Purifier(self.denoiser, 150, 1).chain()(x, noise), self.classify)


class EmptySurrogate(Diffusing):
    """The surrogate purifies nothing."""

    def surrogate(self, steps: int) -> Chain:
        empty: Chain = Chain(lambda x, noise: x, [lambda state, x, noise: state] * steps)
        return replace(empty.then(self.classify), network_calls=1)


class BorrowedSurrogate(Diffusing):
    """The surrogate's answers have nothing to do with the draw's."""

    def surrogate(self, steps: int) -> Chain:
        found = self.whole(min(steps, STEPS))
        return found.then(lambda logits, noise: logits.roll(3, 1))


class SeveredSurrogate(Diffusing):
    """The surrogate has no gradient."""

    def surrogate(self, steps: int) -> Chain:
        found = self.whole(min(steps, STEPS))
        return replace(found, start=lambda x, noise: found.start(x.detach(), noise))


class ShortenedAnswer(Diffusing):
    """The draw is a surrogate of one step; three are declared, and can be had."""

    def chain(self) -> Chain:
        return self.whole(1)

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        return Purifier(self.denoiser, 150, 1).chain()(x, noise)

    def surrogate(self, steps: int) -> Chain:
        return self.whole(steps)


class Relaxing(Diffusing):
    """A relaxed handle that answers by a fixed random map."""

    def relaxed(self) -> Chain:
        weights = torch.sin(1e3 * torch.arange(640.0)).reshape(64, 10)
        return Chain(lambda x, noise: x.flatten(1) @ weights.to(x), [lambda state, x, noise: state])


class OtherComponents(Diffusing):
    """Components that are no part of it."""

    def components(self) -> Mapping[str, Callable[[Tensor, Noise], Tensor]]:
        weights = torch.sin(1e3 * torch.arange(640.0)).reshape(64, 10)
        return {"classifier": lambda x, noise: x.flatten(1) @ weights.to(x)}


class ShorterBackward(Diffusing):
    """The backward pass runs one step again, where the forward pass took three."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        def back(x: Tensor, gradient: Tensor) -> Tensor:
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.whole(1)(point, noise), point, gradient)
            return slope

        return own(x, lambda x: self.whole()(x, noise), back)


class AdaptiveSteps(Diffusing):
    """As many steps as the image is bright, said to be one."""

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        steps = 1 + (x.detach().mean((1, 2, 3)) * 8).long() % 3
        logits = x.new_zeros(len(x), 10) + 0 * x.sum()
        for count in (1, 2, 3):
            rows = (steps == count).nonzero().flatten()
            if len(rows):
                logits = logits.index_add(0, rows, self.whole(count)(x[rows], noise[rows.cpu()]))
        return logits


class WideCertificate(Smoothing):
    """Certifies what it answers, at twice its noise level."""

    def certified(self) -> Smoothed:
        return replace(super().certified(), sigma=2 * self.sigma)


def wide_certificate() -> Defense:
    made = load_smoothing("digits", votes=16)
    return WideCertificate(made.network, made.sigma, 10, made.card)


enter("stopped-state", "draw and chain let a twentieth of the gradient through halfway", {"finite_difference"},
      lambda: StoppedState(card()))  # fmt: skip
enter("chain-on-other-noise", "the chain handle draws other noise than the answer", {"chain_exact", "attack_awareness"},
      lambda: OtherStream(card()))  # fmt: skip
enter("scaled-chain", "the chain handle's gradient is a tenth of the draw's", {"chain_exact"},
      lambda: ScaledChain(card()))  # fmt: skip
enter("shorter-stage", "the stages' purifier takes one of the three steps", {"attack_awareness", "step_count"},
      lambda: ShorterStage(card()))  # fmt: skip
enter("empty-surrogate", "the surrogate handle purifies nothing", {"step_count", "chain_exact"},
      lambda: EmptySurrogate(card()))  # fmt: skip
enter("borrowed-surrogate", "the surrogate handle's classes are exchanged", {"step_count", "chain_exact"},
      lambda: BorrowedSurrogate(card()))  # fmt: skip
enter("severed-surrogate", "the surrogate handle has no gradient", {"step_count", "chain_exact"},
      lambda: SeveredSurrogate(card()))  # fmt: skip
enter("shortened-answer", "answers by its surrogate of one step; the declared three can be had", {"step_count"},
      lambda: ShortenedAnswer(card()))  # fmt: skip
enter("unrelated-relaxation", "the relaxed handle is a random map", {"chain_exact", "step_count"},
      lambda: Relaxing(card((*ALL, "relaxed"))))  # fmt: skip
enter("unrelated-components", "the components are a random map", {"chain_exact", "step_count"},
      lambda: OtherComponents(card()))  # fmt: skip
enter("shorter-backward", "the backward pass runs one step again instead of three", {"finite_difference", "step_count"},
      lambda: ShorterBackward(card(("stages", "components"))))  # fmt: skip
enter("adaptive-steps", "one to three steps, as the image is bright, said to be none", {"declared_traits"},
      lambda: AdaptiveSteps(card(("components",), Traits(stochastic=True, purifies=True), calls=2)))  # fmt: skip
enter("wide-certificate", "certifies at twice its noise level", {"contradiction"}, wide_certificate,
      health=True)  # fmt: skip


# Honest, however odd.


def trained(features: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Seeded random features with a linear readout, fit by ridge regression on the training split."""

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            front = features().eval()
        x, y = data.load("digits", data.train_split("digits"))
        with torch.no_grad():
            rows = torch.cat([front(x).flatten(1), torch.ones(len(x), 1)], 1).double()
            wanted = 10 * (F.one_hot(y, 10).double() - 0.1)
            solution = torch.linalg.solve(rows.T @ rows + torch.eye(rows.shape[1]).double(), rows.T @ wanted)
        head = nn.Linear(rows.shape[1] - 1, 10)
        head.weight.data, head.bias.data = solution[:-1].T.float().contiguous(), solution[-1].float().contiguous()
        return nn.Sequential(front, nn.Flatten(), head).eval()

    return made


class Shifted(nn.Module):
    """ReLU so far down that most units are dead."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - 0.6)


@honest("ReLU, nine of ten units dead", trained(lambda: nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), Shifted())))
def dead_units(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x)


@honest("two layers of max-pooling", trained(lambda: nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2, 1),
    nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(3, 2))))  # fmt: skip
def max_pooled_twice(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x)


@honest("clips to [0, 1] first, where images are anyway")
def clipped_to_the_box(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x.clamp(0, 1))


@honest("normalises each image by its quantiles")
def normalised_by_quantiles(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    if not len(x):
        return self.network(x)
    low, high = x.flatten(1).quantile(torch.tensor([0.1, 0.95]).to(x), dim=1)[..., None, None, None]
    return self.network((x - low) / (high - low).clamp_min(0.05))


@honest("averages the log-probabilities of two temperatures", network_calls=1)
def two_temperatures(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return 0.5 * logits.log_softmax(1) + 0.5 * (logits / 3).log_softmax(1)


@honest("half of its layers are computed again in the backward pass", trained(lambda: nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU())))  # fmt: skip
def checkpointed_in_part(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    front = cast(nn.Sequential, cast(nn.Sequential, self.network)[0])
    features = checkpoint_sequential(front, 2, x, use_reentrant=False)
    return cast(Tensor, cast(nn.Sequential, self.network)[1:](features))


@honest("its logits alone are computed again in the backward pass, in float64 throughout")
def checkpointed_in_double(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    twice = cast(nn.Module, self.network).double()
    return cast(Tensor, checkpoint(twice, x.double(), use_reentrant=False)).to(x)


@honest("rounds its image to 16 levels straight through, and declares it",
        traits=Traits(purifies=True, non_differentiable=True))  # fmt: skip
def straight_through_declared(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + ((x * 15).round() / 15 - x).detach())


@honest("arithmetic in bfloat16, log-probabilities in float32")
def half_then_single(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return cast(nn.Module, self.network).bfloat16()(x.bfloat16()).to(x).log_softmax(1)  # type: ignore[no-any-return]


@honest("a trained network, in bfloat16")
def trained_in_half(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return cast(nn.Module, self.other).bfloat16()(x.bfloat16()).to(x)  # type: ignore[no-any-return]


@honest("arithmetic in float16")
def float16_inside(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    return cast(nn.Module, self.network).half()(x.half()).to(x)  # type: ignore[no-any-return]


@honest("noise in bfloat16, and a vote", traits=STOCHASTIC, votes=Votes(draws=4, how="logits"), handles=("votes",))
def noisy_in_half(self: Digits, x: Tensor, noise: Noise) -> Tensor:
    noised = x + 0.2 * noise.normal("z", shape=x.shape[1:], like=x)
    return cast(nn.Module, self.network).bfloat16()(noised.bfloat16()).to(x)  # type: ignore[no-any-return]
