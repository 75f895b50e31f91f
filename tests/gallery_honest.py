"""Honest defenses of real digits, odd but fair: no check may fail them, however strange they look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from assay import data
from assay.card import Card, Traits, Votes
from assay.chain import inner_gradient
from assay.defense import Defense, Stages
from assay.defenses.diffpure import load as load_diffpure
from assay.defenses.purified import PurifiedClassifier
from assay.defenses.undefended import load_network
from assay.noise import Noise
from assay.registry import DEFENSES

STOCHASTIC = Traits(stochastic=True)


@dataclass(frozen=True)
class Honest:
    """An odd defense, and what is odd about it."""

    name: str
    odd: str
    build: Callable[[], Defense]


HONEST: list[Honest] = []
Draw = Callable[[Any, Tensor, Noise], Tensor]


class Odd(Defense):
    """`draw(self, x, noise)` around the undefended network, or around a network of its own."""

    def __init__(self, draw: Draw, n_classes: int = 10, network: nn.Module | None = None, **fields: Any) -> None:
        super().__init__()
        given = {"network_calls": 1, "gradient_calls": 1, **fields}
        self.card = Card(title=given["name"], summary="A network.", **given)
        self.n_classes = n_classes
        self.network = network or load_network("digits")
        self.drawing = draw
        self.kept: Tensor | None = None
        self.eval().requires_grad_(False)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.drawing(self, x, noise)


def honest(odd: str, network: Callable[[], nn.Module] | None = None, **fields: Any) -> Callable[[Draw], Draw]:
    """Enters `Odd(draw, **fields)` in the gallery."""

    def enter(draw: Draw) -> Draw:
        name = draw.__name__.replace("_", "-")
        made = (lambda: None) if network is None else network
        HONEST.append(Honest(name, odd, lambda: Odd(draw, network=made(), name=name, **fields)))
        return draw

    return enter


def fitted(features: nn.Module) -> nn.Module:
    """Seeded random features with a linear readout, fit by ridge regression on the training split."""
    x, y = data.load("digits", data.train_split("digits"))
    features.eval()
    with torch.no_grad():
        rows = torch.cat([features(x).flatten(1), torch.ones(len(x), 1)], 1).double()
        wanted = 10 * (F.one_hot(y, 10).double() - 0.1)
        solution = torch.linalg.solve(rows.T @ rows + torch.eye(rows.shape[1]).double(), rows.T @ wanted).T.float()
    head = nn.Linear(rows.shape[1] - 1, 10)
    head.weight.data, head.bias.data = solution[:, :-1].contiguous(), solution[:, -1].contiguous()
    return nn.Sequential(features, nn.Flatten(), head).eval()


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`fitted(build())`, whatever the global generator's state, which is left alone."""

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return fitted(build())

    return made


def convolution(*after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *after)


class Tied(nn.Module):
    """One convolution, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = self.enter(x)
        for _ in range(3):
            state = torch.tanh(self.conv(state))
        return state


class Attention(nn.Module):
    """Rows of pixels that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attend = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.enter(x[:, 0])
        return rows + self.attend(rows, rows, rows, need_weights=False)[0]  # type: ignore[no-any-return]


class Kernel(nn.Module):
    """Similarity to 200 training images, by their classes: it remembers, but only what it was trained on."""

    known: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        x, y = data.load("digits", data.train_split("digits")[:200])
        self.register_buffer("known", x.flatten(1))
        self.register_buffer("labels", F.one_hot(y, 10).float())

    def forward(self, x: Tensor) -> Tensor:
        known, labels = self.known.to(x), self.labels.to(x)
        far = (x.flatten(1)[:, None] - known).square().sum(2)
        return ((-2 * far).softmax(1) @ labels + 1e-6).log()


def plain(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x)  # type: ignore[no-any-return]


def network(name: str, odd: str, build: Callable[[], nn.Module]) -> None:
    """Enters a plain classifier with a network of its own."""
    HONEST.append(Honest(name, odd, lambda: Odd(plain, network=build(), name=name)))


network("tied", "one convolution's weights used three times", seeded(Tied))
network("max-pool", "max-pooling and ReLU", seeded(lambda: convolution(nn.ReLU(), nn.MaxPool2d(2))))
network(
    "batch-norm", "batch normalisation in evaluation mode", seeded(lambda: convolution(nn.BatchNorm2d(16), nn.SiLU()))
)
network("instance-norm", "statistics of each image alone", seeded(lambda: convolution(nn.GroupNorm(4, 16), nn.SiLU())))
network("dropout", "dropout layers in evaluation mode", seeded(lambda: convolution(nn.SiLU(), nn.Dropout(0.5))))
network("hard-sigmoid", "hard sigmoids, flat at both ends", seeded(lambda: convolution(nn.Hardsigmoid())))
network("relu6", "ReLU6, flat above 6", seeded(lambda: convolution(nn.ReLU6(), nn.AvgPool2d(2))))
network("linear", "a linear classifier: its gradient is the same everywhere", seeded(nn.Flatten))
network("attention", "rows of pixels that attend to each other", seeded(Attention))
network("kernel", "similarity to training images that it remembers", Kernel)


@honest("a layer that normalises pixels first")
def normalised_input(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(((x - 0.3) / 0.4) * 0.4 + 0.3)  # type: ignore[no-any-return]


@honest("a clamp at the edges that leaks a little")
def leaky_clamp(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(0.01 * x + 0.99 * x.clamp(0.1, 0.9))  # type: ignore[no-any-return]


@honest("a constant that the first call computes and keeps")
def lazy_constant(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    if self.kept is None:
        self.kept = torch.linspace(0.9, 1.0, 8)
    return self.network(x * self.kept.to(x))  # type: ignore[no-any-return]


@honest("log-probabilities for logits")
def log_probabilities(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x).log_softmax(1)  # type: ignore[no-any-return]


@honest("logits times 10")
def cold(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return 10 * self.network(x)  # type: ignore[no-any-return]


@honest("logits divided by 10")
def warm(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x) / 10  # type: ignore[no-any-return]


@honest("the mean probability of three shifted views, folded into the batch", network_calls=3, gradient_calls=3)
def augmented(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    views = torch.stack([x, x.roll(1, -1), x.roll(-1, -1)], 1)
    logits = self.network(views.flatten(0, 1)).unflatten(0, (len(x), 3))
    return logits.log_softmax(2).logsumexp(1)  # type: ignore[no-any-return]


@honest("its arithmetic is in float64 whatever it is given")
def double_inside(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network.double()(x.double()).to(x)  # type: ignore[no-any-return]


@honest("its arithmetic is in bfloat16, which rounds to three digits")
def half_inside(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network.bfloat16()(x.bfloat16()).to(x)  # type: ignore[no-any-return]


@honest("leaves the highest frequencies out")
def low_pass(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    spectrum = torch.fft.rfft2(x)
    kept = torch.ones(8, 5).to(x)
    kept[4], kept[:, 4] = 0, 0
    return self.network(torch.fft.irfft2(spectrum * kept, s=(8, 8)))  # type: ignore[no-any-return]


@honest("flattens as much code does, and so refuses an empty batch")
def features_left_open(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x.reshape(x.size(0), -1).reshape(x.shape))  # type: ignore[no-any-return]


@honest("refuses float64")
def single_only(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError(f"expected float32, got {x.dtype}")
    return self.network(x)  # type: ignore[no-any-return]


@honest("answers its batch in chunks of five")
def in_chunks(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return torch.cat([self.network(part) for part in x.split(5)])


@honest("keeps no activations, and computes them again in the backward pass", gradient_calls=2)
def checkpointed(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return checkpoint(self.network, x, use_reentrant=False)  # type: ignore[no-any-return]


@honest("an eleventh answer, a constant that stands for none of them", n_classes=11)
def abstains(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return F.pad(self.network(x), (0, 1), value=-2.0)


@honest("scales features by their norm")
def cosine(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return 10 * logits / (logits.square().sum(1, keepdim=True) + 1e-6).sqrt()  # type: ignore[no-any-return]


@honest("very little noise", traits=STOCHASTIC)
def faint_noise(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.003 * noise.normal("z", shape=x.shape[1:], like=x))  # type: ignore[no-any-return]


@honest("very much noise, and a vote", traits=STOCHASTIC, votes=Votes(draws=8, how="probabilities"), handles=("votes",))
def loud_noise(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.5 * noise.normal("z", shape=x.shape[1:], like=x))  # type: ignore[no-any-return]


@honest("one of two shifts at random, by the noise", traits=STOCHASTIC)
def random_shift(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    left = noise.uniform("side", shape=(), like=x) < 0.5
    return self.network(torch.where(left[:, None, None, None], x, x.roll(1, -1)))  # type: ignore[no-any-return]


@honest(
    "an inner gradient, declared",
    traits=Traits(inner_gradient=True, purifies=True), network_calls=2, gradient_calls=2,
)  # fmt: skip
def declared_inner_gradient(self: Odd, x: Tensor, noise: Noise) -> Tensor:
    slope = inner_gradient(lambda point: 0.5 * self.network(point).square().sum(1), x)
    return self.network(x - 0.002 * slope)  # type: ignore[no-any-return]


class Ensemble(Defense):
    """The mean probability of a plain and a trained network."""

    def __init__(self) -> None:
        super().__init__()
        self.card = Card(name="ensemble", title="Ensemble", summary="Two.", network_calls=2, gradient_calls=2)
        self.n_classes = 10
        self.one, self.two = load_network("digits"), DEFENSES["adversarial_training"].build("digits").network

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        both = torch.stack([self.one(x), self.two(x)], 1)  # type: ignore[operator]
        return both.log_softmax(2).logsumexp(1)


class MedianFilter(PurifiedClassifier):
    """A median of 2×2 pixels, declared."""

    def __init__(self) -> None:
        card = Card(
            name="median", title="Median", summary="A median filter.", traits=Traits(purifies=True),
            handles=("stages", "components"), network_calls=1, gradient_calls=1,
        )  # fmt: skip
        super().__init__(load_network("digits"), 10, card)

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        patches = F.unfold(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2).unflatten(1, (x.shape[1], 4))
        median: Tensor = patches.median(2).values.reshape(x.shape)
        return 0.5 * x + 0.5 * median

    def stages(self) -> Stages:
        return Stages(self.purify, self.classify)


def without_handles() -> Defense:
    defense = load_diffpure("digits", steps=3)
    defense.card = defense.card.model_copy(update={"name": "no-handles", "handles": ()})
    return defense.eval().requires_grad_(False)


HONEST.append(Honest("no-handles", "an iterated purifier, declared, whose author wrote no handles", without_handles))
HONEST.append(
    Honest("ensemble", "the mean probability of two networks", lambda: Ensemble().eval().requires_grad_(False))
)
HONEST.append(Honest("median", "a median filter with its stages", lambda: MedianFilter().eval().requires_grad_(False)))
HONEST.append(Honest("view-only", "answers contiguous images alone", lambda: Odd(
    lambda self, x, noise: self.network(x.view(len(x), 1, 8, 8)), name="view-only")))  # fmt: skip
REGISTERED = {
    "smoothing": "votes of a network under Gaussian noise",
    "diffpure": "diffusion purification",
    "gdmp": "guided diffusion purification",
    "bit_depth": "quantises, and says so",
    "random_resize": "resizes at random, and says so",
    "lipschitz": "a network with a Lipschitz bound",
    "adversarial_training": "a trained network",
}
HONEST += [
    Honest(name, odd, partial(lambda known: DEFENSES[known].build("digits"), name)) for name, odd in REGISTERED.items()
]
