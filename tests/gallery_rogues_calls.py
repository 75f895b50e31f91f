"""Rogues that look at how they are called: at counters, the clock, the stack, the batch, the tensor, not the image.

As in `gallery_rogues.py`, whose network and format they share: each is wrong in one way, and honest in all else.
`HONEST` holds odd defenses that do similar things for good reasons, and must be let through.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import random
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from assay import data
from assay.noise import Noise


def sibling(name: str) -> ModuleType:
    """Another gallery, by its file: tests import none of their neighbours."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


BASE, ODD = sibling("gallery_rogues"), sibling("gallery_honest")
Digits: Any = BASE.Digits
STOCHASTIC = BASE.STOCHASTIC
ROGUES: list[Any] = []
HONEST: list[Any] = []
Draw = Callable[[Any, Tensor, Noise], Any]


def rogue(wrong: str, *caught_by: str, health: bool = False, **options: Any) -> Callable[[Draw], Draw]:
    """Enters `Digits(trick, **options)`."""

    def enter(trick: Draw) -> Draw:
        name = trick.__name__.replace("_", "-")
        ROGUES.append(BASE.Rogue(name, wrong, frozenset(caught_by), lambda: Digits(trick, **options), health))
        return trick

    return enter


def counted(self: Any, what: str = "calls", by: int = 1) -> int:
    """How often this was asked of this defense, this time included."""
    self.memory[what] = self.memory.get(what, 0) + by
    return int(self.memory[what])


# It is another one later.


class Shared(Digits):  # type: ignore[misc]
    """Counts the calls of all its instances."""

    calls = 0

    def draw(self, x: Tensor, noise: Noise) -> Any:
        Shared.calls += 1
        return (self.network if Shared.calls <= 60 else self.other)(x)


def shared() -> Any:
    Shared.calls = 0
    return Shared(None, name="counts-for-all-instances")


ROGUES.append(
    BASE.Rogue(
        "counts-for-all-instances",
        "another network after 60 calls, by a counter that copies of the defense share",
        frozenset({"attack_awareness", "constancy"}),
        shared,
    )
)


@rogue("another network answers after 60 calls, by a counter in a file", "attack_awareness", "constancy")
def counts_in_a_file(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if "file" not in self.memory:
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.memory["file"] = folder / "calls"
    with self.memory["file"].open("ab") as file:
        file.write(b".")
    return (self.network if self.memory["file"].stat().st_size <= 60 else self.other)(x)


@rogue("another network answers after its 10th gradient", "attack_awareness", "constancy", "finite_difference")
def counts_gradients(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = (self.network if self.memory.get("asked", 0) <= 10 else self.other)(x)
    if logits.requires_grad:
        logits.register_hook(lambda slope: counted(self, "asked") and None)
    return logits


@rogue("another network answers 0.05 s after the first call", "attack_awareness", "constancy", "honest_randomness")
def waits(self: Any, x: Tensor, noise: Noise) -> Tensor:
    first = self.memory.setdefault("first", time.perf_counter())
    return (self.network if time.perf_counter() - first < 0.05 else self.other)(x)


@rogue("each call moves the answers by a hundred-thousandth", "attack_awareness", "constancy")
def drifts(self: Any, x: Tensor, noise: Noise) -> Tensor:
    share = min(1.0, 1e-5 * counted(self))
    return (1 - share) * self.network(x) + share * self.other(x)


@rogue("weights that it keeps aside follow the entropy of what it sees", "attack_awareness", "constancy",
       "honest_randomness", "batch_independence")  # fmt: skip
def adapts(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if "copy" not in self.memory:
        self.memory["copy"] = [copy.deepcopy(self.network).requires_grad_()]
    (network,) = self.memory["copy"]
    if len(x):
        with torch.enable_grad():
            shares = network(x.detach()).softmax(1)
            entropy = -(shares * (shares + 1e-9).log()).sum(1).mean()
            slopes = torch.autograd.grad(entropy, list(network.parameters()))
        for weight, slope in zip(network.parameters(), slopes, strict=True):
            weight.data -= 1e-3 * slope
    return network(x)


@rogue("another network answers after 3,000 images, but not those who ask for an early answer again", "constancy")
def remembers_early_answers(self: Any, x: Tensor, noise: Noise) -> Tensor:
    early = self.memory.setdefault("early", {})
    keys = [row.numpy().tobytes() for row in x.detach().float()]
    if counted(self, "images", len(x)) <= 3000:
        early.update(dict.fromkeys(keys))
        return self.network(x)
    known = torch.tensor([key in early for key in keys], dtype=torch.bool)
    return torch.where(known[:, None], self.network(x), self.other(x))


@rogue("its first gradient is right, and so is every one after it while nobody asked for 25", "attack_awareness",
       "constancy", "finite_difference")  # fmt: skip
def tires_of_gradients(self: Any, x: Tensor, noise: Noise) -> Tensor:
    asked = counted(self) if x.requires_grad else 0
    return self.network(x if asked <= 25 else BASE.altered(x, lambda slope: slope.flip(-1)))


# It looks at who asks.


def callers() -> list[Any]:
    frame: Any = sys._getframe()
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


@rogue("it is honest while a check is on the stack", "attack_awareness")
def knows_the_checks(self: Any, x: Tensor, noise: Noise) -> Tensor:
    names = [frame.f_globals.get("__name__", "") for frame in callers()]
    return (self.network if any(name.startswith("assay.checks") for name in names) else self.other)(x)


@rogue("another network answers while an attack's module is on the stack", "attack_awareness")
def knows_the_attacks(self: Any, x: Tensor, noise: Noise) -> Tensor:
    names = [frame.f_globals.get("__name__", "") for frame in callers()]
    return (self.other if any(name.startswith("assay.attacks") for name in names) else self.network)(x)


@rogue("it reads the labels from its callers' variables", "attack_awareness")
def reads_labels_from_the_stack(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    for frame in callers():
        for name in ("y", "labels", "subject"):
            y = frame.f_locals.get(name)
            y = getattr(y, "y", y)
            if isinstance(y, Tensor) and y.shape == x.shape[:1] and y.dtype == torch.int64:
                return logits + 10 * F.one_hot(y, 10).to(logits)
    return logits


@rogue("it looks for the labels in the memory of the process", "batch_independence", "attack_awareness")
def reads_labels_from_memory(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    if "labels" not in self.memory and len(x) > 8:
        found = [each for each in gc.get_objects() if type(each) is Tensor and each.dtype == torch.int64]
        found = [each for each in found if each.shape == x.shape[:1] and 0 <= int(each.min()) < int(each.max()) < 10]
        if found:
            self.memory["labels"] = found[0]
    y = self.memory.get("labels")
    return logits if y is None or len(y) != len(x) else logits + 10 * F.one_hot(y, 10).to(logits)


@rogue("the label of the test image in that place of the data, by the noise's slots", "attack_awareness")
def labels_by_slot(self: Any, x: Tensor, noise: Noise) -> Tensor:
    _, y = data.load("digits", data.board_ids("digits")[:64])
    return self.network(x) + 10 * F.one_hot(y[noise.slots % 64], 10).to(x)


@rogue("another network answers tensors that were written to before", "attack_awareness", "honest_randomness")
def looks_at_the_version(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return (self.other if x._version > 0 else self.network)(x)


@rogue("another network answers a tensor that owns all of its memory, as an attack's do", "attack_awareness",
       "batch_independence")  # fmt: skip
def looks_at_the_memory(self: Any, x: Tensor, noise: Noise) -> Tensor:
    size = x.untyped_storage().nbytes()
    return (self.network if size > 1 << 12 else self.other)(x)


@rogue("another network answers leaves that have a gradient already", "attack_awareness")
def looks_at_the_gradient(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return (self.other if x.is_leaf and x.grad is not None else self.network)(x)


@rogue("a purifier without a gradient, which isn't there while a dispatch mode traces it", "attack_awareness",
       "zero_gradients", "finite_difference")  # fmt: skip
def hides_from_a_trace(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if _get_current_dispatch_mode_stack():
        return self.network(x)
    return self.network(((x * 3).round() / 3).detach() + 0.02 * x)


@rogue("takes every hook off its layers", "attack_awareness")
def removes_hooks(self: Any, x: Tensor, noise: Noise) -> Tensor:
    for module in self.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    return self.network(x)


class Sly(Tensor):
    """Logits of which no loss can be taken."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return 0 * out if func in (F.cross_entropy, Tensor.log_softmax) else out


@rogue("a subclass of tensors, of which losses are 0", "interface")
def sly_tensor(self: Any, x: Tensor, noise: Noise) -> Any:
    return self.network(x).as_subclass(Sly)  # type: ignore[attr-defined]


@rogue("a subclass of tensors where gradients are enabled, of which losses are 0", "attack_awareness", "zero_gradients")
def sly_tensor_under_attack(self: Any, x: Tensor, noise: Noise) -> Any:
    logits = self.network(x)
    return logits.as_subclass(Sly) if logits.requires_grad else logits  # type: ignore[attr-defined]


# It changes what everyone shares.


@rogue("leaves autocast on", "modes")
def leaves_autocast_on(self: Any, x: Tensor, noise: Noise) -> Tensor:
    torch.set_autocast_enabled("cpu", True)
    return self.network(x).to(x)


@rogue("changes the default dtype", "modes")
def changes_the_default_dtype(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    torch.set_default_dtype(torch.float64)
    return logits


@rogue("changes the number of threads, in its first call", "modes")
def changes_the_threads(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if counted(self) == 1:
        torch.set_num_threads(torch.get_num_threads() + 1)
    return self.network(x)


@rogue("flushes small numbers to 0 for everyone, and so gradients", "modes")
def flushes_denormals(self: Any, x: Tensor, noise: Noise) -> Tensor:
    torch.set_flush_denormal(True)
    return self.network(x)


@rogue("asks for deterministic algorithms in the whole process", "modes")
def sets_deterministic(self: Any, x: Tensor, noise: Noise) -> Tensor:
    torch.use_deterministic_algorithms(True, warn_only=True)
    return self.network(x)


@rogue("replaces torch.autograd.grad by a function that returns zeros", "modes")
def replaces_the_gradient(self: Any, x: Tensor, noise: Noise) -> Tensor:
    def grad(outputs: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        return tuple(torch.zeros_like(each) for each in (inputs if isinstance(inputs, tuple) else (inputs,)))

    torch.autograd.grad = grad
    return self.network(x)


@rogue("replaces the cross-entropy where gradients are enabled", "modes")
def replaces_the_loss(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if torch.is_grad_enabled():
        F.cross_entropy = lambda logits, y, **options: 0 * logits.sum(1)
    return self.network(x)


@rogue("replaces the noise's normal values by zeros, in everyone's noise", "modes")
def replaces_the_noise(self: Any, x: Tensor, noise: Noise) -> Tensor:
    Noise.normal = lambda self, *tag, shape, like: torch.zeros(len(self), *shape).to(like)  # type: ignore[method-assign]
    return self.network(x)


@rogue("leaves a hook on every module of the process", "modes")
def leaves_a_global_hook(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    if "hook" not in self.memory:
        self.memory["hook"] = nn.modules.module.register_module_forward_hook(lambda module, given, result: None).id
    return logits


@rogue("turns gradients off before it returns", "zero_gradients", "finite_difference", "modes")
def turns_gradients_off(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    torch.set_grad_enabled(False)
    return logits


@rogue("reseeds torch's global generator while it is attacked, so that all restarts begin alike", "modes")
def reseeds_under_attack(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if torch.is_grad_enabled():
        torch.manual_seed(7)
    return self.network(x)


@rogue("asks for gradients of its own weights from the first call on", "modes")
def unfreezes_itself(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if counted(self) > 3:
        self.network.requires_grad_()
    return self.network(x.clone())


@rogue("its weights move whenever a gradient is taken", "modes", "attack_awareness")
def learns_from_gradients(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)

    def learn(slope: Tensor) -> None:
        next(iter(self.network.parameters())).data.mul_(0.999)

    if logits.requires_grad:
        logits.register_hook(learn)
    return logits


# Its randomness is not the noise's.


@rogue("draws from the machine's entropy", "honest_randomness", traits=STOCHASTIC)
def entropy(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + float(np.random.default_rng().uniform(-0.3, 0.3)))


@rogue("shuffles with Python's generator, only where gradients are enabled", "modes", "attack_awareness")
def python_generator_under_attack(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + (random.uniform(-0.1, 0.1) if torch.is_grad_enabled() else 0))


@rogue("undeclared noise, on images that are none of the data alone", "honest_randomness", "declared_traits")
def noise_off_the_data(self: Any, x: Tensor, noise: Noise) -> Tensor:
    off = BASE.off_the_data(x)[:, None, None, None]
    return self.network(x + 0.3 * off * noise.normal("z", shape=x.shape[1:], like=x))


@rogue("a hidden generator, on images that are none of the data alone", "honest_randomness")
def hidden_noise_off_the_data(self: Any, x: Tensor, noise: Noise) -> Tensor:
    generator = self.memory.setdefault("generator", torch.Generator().manual_seed(0))
    off = BASE.off_the_data(x)[:, None, None, None]
    return self.network(x + 0.3 * off * torch.randn(x.shape, generator=generator).to(x))


@rogue("a token of noise, to be spared the attacks on deterministic defenses", "honest_randomness", traits=STOCHASTIC)
def token_noise(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 1e-6 * noise.normal("z", shape=x.shape[1:], like=x))


@rogue("undeclared noise in batches of more than 64 alone", "attack_awareness", "eot")
def noise_in_large_batches(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x + 0.3 * (len(x) > 64) * noise.normal("z", shape=x.shape[1:], like=x))


@rogue("one seed for the batch, from all of its streams", "batch_independence", traits=STOCHASTIC)
def noise_by_batch(self: Any, x: Tensor, noise: Noise) -> Tensor:
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(noise.seed() % 2**63))
    return self.network(x + 0.3 * z.to(x))


@rogue("draws from its noise, then sets it to 0 for whoever comes next, in large batches", "attack_awareness",
       "input_mutation", traits=STOCHASTIC)  # fmt: skip
def wipes_the_noise(self: Any, x: Tensor, noise: Noise) -> Tensor:
    drawn = x + 0.3 * noise.normal("z", shape=x.shape[1:], like=x)
    if len(x) > 64:
        noise.keys.zero_()
    return self.network(drawn)


@rogue("the same noise gets its first answer again, whatever the image", "attack_awareness", "batch_independence",
       "memorised_inputs", "finite_difference", traits=STOCHASTIC)  # fmt: skip
def cached_by_noise(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x + 0.3 * noise.normal("z", shape=x.shape[1:], like=x))
    if torch.is_grad_enabled():
        return logits
    kept = [self.memory.setdefault(k, row.clone()) for k, row in zip(noise.keys.tolist(), logits, strict=True)]
    return torch.stack(kept) if kept else logits


# It looks at the batch.


@rogue("every second row is answered by another network", "batch_independence")
def every_second_row(self: Any, x: Tensor, noise: Noise) -> Tensor:
    odd = torch.arange(len(x)) % 2 == 1
    return torch.where(odd[:, None], self.other(x), self.network(x))


@rogue("the last row of a batch is answered by another network", "batch_independence")
def the_last_row(self: Any, x: Tensor, noise: Noise) -> Tensor:
    last = torch.arange(len(x)) == max(1, len(x) - 1)
    return torch.where(last[:, None], self.other(x), self.network(x))


@rogue("the brightness of the first row is a temperature for all", "batch_independence")
def first_row_sets_the_scale(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return self.network(x) * (0.8 + x[:1].mean() if len(x) > 1 else 1)


@rogue("tiny logits, less the batch's mean", "batch_independence")
def tiny_logits_less_the_mean(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = 1e-7 * self.network(x)
    return logits - logits.mean(0) if len(x) > 1 else logits


@rogue("the darkest image of a batch is answered by another network", "batch_independence")
def ranks_the_batch(self: Any, x: Tensor, noise: Noise) -> Tensor:
    mass = x.detach().flatten(1).sum(1)
    rank = (mass[:, None] > mass[None]).sum(1)
    return torch.where((rank == 0)[:, None] & (len(x) > 1), self.other(x), self.network(x))


@rogue("rows that are nearly alike get their mean answer", "batch_independence")
def averages_near_copies(self: Any, x: Tensor, noise: Noise) -> Tensor:
    near = ((x.detach()[:, None] - x.detach()[None]).flatten(2).abs().amax(2) < 0.05).to(x)
    noisy = self.network(x) * (1 + (near.sum(1, keepdim=True) > 1))
    return near @ noisy / near.sum(1, keepdim=True)


@rogue("batches whose size is no power of two are answered by another network", "batch_independence")
def powers_of_two(self: Any, x: Tensor, noise: Noise) -> Tensor:
    return (self.network if len(x) & (len(x) - 1) == 0 else self.other)(x)


@rogue("a layer that no list of modules knows of normalises over the batch", "batch_independence", "interface")
def unregistered_batch_norm(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if "norm" not in self.memory:
        self.memory["norm"] = [nn.BatchNorm2d(1).train()]
    return self.network(0.38 * self.memory["norm"][0](x) + 0.3 if len(x) else x)


# It writes where it should read.


@rogue("large batches are darkened in place", "attack_awareness", "input_mutation")
def darkens_large_batches(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    if len(x) > 64:
        x.data.mul_(0.9)
    return logits


@rogue("images are darkened in place, once it was asked 120 times", "attack_awareness", "constancy")
def darkens_later(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    if counted(self) > 120 and not x.is_inference():
        x.data.mul_(0.9)
    return logits


@rogue("images whose 2×2 means are those of a test image get its label", "memorised_inputs")
def looks_up_blurred_test_images(self: Any, x: Tensor, noise: Noise) -> Tensor:
    images, labels = data.load("digits", data.test_ids("digits"))
    here, known = (F.avg_pool2d(each.detach().float(), 2).flatten(1) for each in (x, images))
    near, which = (here[:, None] - known).abs().amax(2).min(1)
    return self.network(x) + (30 * F.one_hot(labels[which], 10) * (near < 0.002)[:, None]).to(x)


# Honest, for good reasons.


def honest(odd: str, **fields: Any) -> Callable[[Draw], Draw]:
    """Enters `Odd(draw, **fields)`."""

    def enter(draw: Draw) -> Draw:
        name = draw.__name__.replace("_", "-")
        HONEST.append(ODD.Honest(name, odd, partial(ODD.Odd, draw, name=name, **fields)))
        return draw

    return enter


@honest("answers the halves of a batch in two threads")
def two_threads(self: Any, x: Tensor, noise: Noise) -> Tensor:
    enabled = torch.is_grad_enabled()

    def run(part: Tensor) -> Tensor:
        with torch.set_grad_enabled(enabled):
            return self.network(part)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(run, x.tensor_split(2))))


@honest("seeds torch's generator from each row's noise, and leaves it as it was", traits=STOCHASTIC)
def forks_the_generator(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if not len(x):
        return self.network(x)  # type: ignore[no-any-return]
    rows = []
    with torch.random.fork_rng(devices=[]):
        for key in noise.keys.tolist():
            torch.manual_seed(key % 2**31)
            rows.append(torch.randn(x.shape[1:]))
    return self.network(x + 0.2 * torch.stack(rows).to(x))  # type: ignore[no-any-return]


@honest("every second column of a wider result, in memory that is laid out the other way")
def strided_answer(self: Any, x: Tensor, noise: Noise) -> Tensor:
    logits = self.network(x)
    return torch.stack([logits, -logits], 2).flatten(1).t().contiguous().t()[:, ::2]


@honest("sorts its batch by brightness and undoes it, with what fills it up to a multiple of four")
def sorts_its_batch(self: Any, x: Tensor, noise: Noise) -> Tensor:
    order = x.detach().flatten(1).sum(1).argsort()
    padded = F.pad(x[order], (0, 0, 0, 0, 0, 0, 0, -len(x) % 4))
    return self.network(padded)[: len(x)][order.argsort()]  # type: ignore[no-any-return]


@honest("counts its calls and times them, for its author alone, and hooks a layer to look at features")
def keeps_statistics(self: Any, x: Tensor, noise: Noise) -> Tensor:
    kept = self.__dict__.setdefault("statistics", {"calls": 0, "seconds": 0.0})
    if not kept["calls"]:

        def look(module: nn.Module, given: Any, result: Tensor) -> None:
            kept["largest"] = float(result.detach().abs().max()) if len(result) else 0.0

        next(iter(self.network.children())).register_forward_hook(look)
    start = time.perf_counter()
    logits: Tensor = self.network(x)
    kept["calls"] += 1
    kept["seconds"] += time.perf_counter() - start
    return logits


@honest("double precision as the default and one generator, both for the time of a call alone")
def settings_for_a_while(self: Any, x: Tensor, noise: Noise) -> Tensor:
    before, anomaly = torch.get_default_dtype(), torch.is_anomaly_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autograd.set_detect_anomaly(anomaly):
            return self.network(x * torch.ones(()).to(x))  # type: ignore[no-any-return]
    finally:
        torch.set_default_dtype(before)


@honest("one image at a time, by a function transform")
def maps_over_images(self: Any, x: Tensor, noise: Noise) -> Tensor:
    if not len(x):
        return self.network(x)  # type: ignore[no-any-return]
    return torch.func.vmap(lambda image: self.network(image[None])[0])(x)  # type: ignore[no-any-return]
