"""Classifiers that people bring: weight files, normalisation, and whether what came of them recognises images.

Files are read as data only: safetensors, or torch files with `weights_only`. Keys have to agree
exactly. What no key can show, a wrong range or normalisation or another order of classes, shows on
images: `check_classifier`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from assay import data
from assay.defenses.checkpoints import load_state
from assay.defenses.resize import Resize
from assay.errors import InputError
from assay.statistics import clopper_pearson

PRESETS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of the training images, in [0, 1], under the names that `mean` takes."""
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What training wrappers put before every key."""
_NO_MODEL = ("optim", "sched", "scaler", "amp")
"""Entries of a training checkpoint whose names contain one of these hold tensors, but no network."""
_LOOKS = (16, 32, 64, 128, 256)
_CONFIDENCE = 0.99


class Preprocessed(nn.Module):
    """A network behind its own preprocessing, which is so part of the model that is attacked.

    Args:
        network: prepared images to logits.
        source: the side of the square images that come.
        mean, std: a number a channel; nothing is normalised without them.
        side: of the images that the network takes; 0 for those that come.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, source: int, mean: Sequence[float] = (), std: Sequence[float] = (), side: int = 0
    ) -> None:
        super().__init__()
        self.network = network
        self.resize = Resize(source, side or source)
        self.register_buffer("mean", torch.tensor(list(mean) or [0.0], dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(list(std) or [1.0], dtype=torch.float32)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)` in [0, 1] to logits `(n, k)`."""
        logits: Tensor = self.network((self.resize(x) - self.mean) / self.std)
        return logits


def read_normalisation(mean: str, std: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation from their text: comma-separated numbers, or a name of `PRESETS`; empty for none.

    Raises:
        InputError: for one without the other, a wrong number of values, or a std that isn't positive.
    """
    if not mean and not std:
        return (), ()
    if mean in PRESETS and std in ("", mean):
        return PRESETS[mean]
    if not mean or not std:
        raise InputError(f"mean and std go together, got mean={mean!r} and std={std!r}.")
    means, stds = (_numbers(name, text, channels) for name, text in (("mean", mean), ("std", std)))
    if min(stds) <= 0:
        raise InputError(f"std must be positive, got {std!r}.")
    if max(map(abs, means)) > 1:
        raise InputError(f"images are in [0, 1] here, and so is their mean; got {mean!r}. Divide it and std by 255?")
    return means, stds


def _numbers(name: str, text: str, channels: int) -> tuple[float, ...]:
    if text in PRESETS:
        return PRESETS[text][name == "std"]
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, channels):
        known = ", ".join(PRESETS)
        raise InputError(
            f"{name} takes {channels} numbers with commas between them, one for all, or a preset ({known}); "
            f"got {text!r}."
        )
    return values


def load_file(network: nn.Module, path: Path, key: str = "") -> None:
    """Loads a weight file into a network, strictly.

    Args:
        path: a safetensors file, or a torch file whose tensors may lie in mappings and lists.
        key: where in them the network lies, such as `state_dict` or `state_dict.0`; empty for the only place.

    Raises:
        InputError: for a file that can't be read, a key that isn't in it, several places to choose from, or tensors
            that aren't the network's (the differences are listed).
    """
    state = _strip(find_state(read_file(path), key, path.name), network)
    load_state(network, state, path.name)


def read_file(path: Path) -> Any:
    """What a weight file holds, read as data only.

    Raises:
        InputError: for a file that is missing, in another format, or would run code.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"no weights at {path}: {error.strerror}.") from error
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}.") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is not a torch file of plain tensors: {str(error).splitlines()[0]} A file that holds a whole "
            f"module or other objects would run code when it is read: save the network's state_dict() instead."
        ) from error


def find_state(content: Any, key: str, origin: str) -> Mapping[str, Tensor]:
    """The tensors by name at a place inside of what a file holds, or at the only place that has some.

    Raises:
        InputError: for a key that isn't there, and where no or several places hold tensors by name.
    """
    for part in key.split(".") if key else ():
        inside = _entries(content)
        if part not in inside:
            known = ", ".join(list(inside)[:8]) or "nothing"
            raise InputError(f"{origin} has no {part!r} of key {key!r}; there is {known}.")
        content = inside[part]
    found = dict(_states(content, key))
    if not found:
        raise InputError(f"{origin} holds no tensors by name{f' at key {key!r}' if key else ''}.")
    if len(found) > 1:
        raise InputError(
            f"{origin} holds tensors by name in several places; choose with option key=PLACE: {', '.join(found)}."
        )
    return next(iter(found.values()))


def _entries(content: Any) -> dict[str, Any]:
    if isinstance(content, Mapping):
        return {str(name): value for name, value in content.items()}
    return {str(i): value for i, value in enumerate(content)} if isinstance(content, list | tuple) else {}


def _states(content: Any, place: str) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every mapping whose values are all tensors, with its place."""
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        yield place, {str(name): value for name, value in content.items()}
        return
    for name, value in _entries(content).items():
        if not any(word in name.lower() for word in _NO_MODEL):
            yield from _states(value, f"{place}.{name}" if place else name)


def _strip(state: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """The state without the prefixes that all of its keys share and not all of the network's."""
    own = network.state_dict()
    again = True
    while again:
        again = False
        for prefix in PREFIXES:
            shared = all(name.startswith(prefix) for name in state)
            if shared and not all(name.startswith(prefix) for name in own):
                state, again = {name.removeprefix(prefix): value for name, value in state.items()}, True
    return state


@torch.no_grad()
def check_shape(network: nn.Module, dataset: str, origin: str) -> None:
    """Checks that a network turns an image of a data set into one logit a class.

    Raises:
        InputError: where it can't take the image, or answers with another shape.
    """
    described = data.describe(dataset)
    expected = f"(1, {described.n_classes}), one logit for each class of {dataset}"
    try:
        answer = network(torch.full((1, *described.shape), 0.5))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(
            f"{origin} can't take an image of {dataset}, {described.shape}: {str(error).splitlines()[0]} "
            f"If it is made for larger images, give --option resize=SIDE."
        ) from error
    if not isinstance(answer, Tensor):
        raise InputError(f"{origin} answers with a {type(answer).__name__}; expected a tensor of {expected}.")
    if tuple(answer.shape) != (1, described.n_classes):
        raise InputError(f"{origin} answers with a tensor of {tuple(answer.shape)}; expected {expected}.")


def smoke_ids(dataset: str) -> tuple[int, ...]:
    """Up to 256 test images that no board uses, spread evenly; of all test images where every one is on a board."""
    boards = set(data.board_ids(dataset))
    ids = data.test_ids(dataset)
    ids = tuple(i for i in ids if i not in boards) or ids
    n = min(_LOOKS[-1], len(ids))
    # Every prefix of what is looked at has to be spread too: classes may lie one after the other.
    order = sorted(range(n), key=lambda j: (j * 0.6180339887498949) % 1)
    return tuple(ids[j * len(ids) // n] for j in order)


@torch.no_grad()
def check_classifier(network: nn.Module, dataset: str, origin: str) -> None:
    """Checks that a classifier recognises images: its clean accuracy beats chance clearly.

    Looks at 16 images, then twice as many and so on up to 256, and is content as soon as the lower
    bound, which holds at 99 % over all looks together, is above twice chance.

    Raises:
        InputError: where it doesn't, with what usually causes that.
    """
    k = data.describe(dataset).n_classes
    # Of two classes twice chance would be certainty.
    least = min(2 / k, (1 + 1 / k) / 2)
    ids = smoke_ids(dataset)
    x, y = data.load(dataset, ids)
    right = seen = 0
    low = 0.0
    for look in _LOOKS:
        if look > len(ids) and seen == len(ids):
            break
        part = slice(seen, min(look, len(ids)))
        right += int((network(x[part]).argmax(1) == y[part]).sum())
        seen = min(look, len(ids))
        # Two-sided at 1 − 2·(1 − .99)/looks: each look's lower bound fails with a fifth of the hundredth.
        low, _ = clopper_pearson(right, seen, confidence=1 - 2 * (1 - _CONFIDENCE) / len(_LOOKS))
        if low > least:
            return
    raise InputError(
        f"{origin} recognises {right} of {seen} images of {dataset}, at least {100 * low:.1f} % of all with 99 % "
        f"confidence; expected more than {100 * least:.3g} %, twice chance. Usual causes: another range than [0, 1] or "
        f"a missing or wrong normalisation (options mean and std), another order of classes than {dataset}'s, weights "
        f"of another network, or none. If it is meant to be so, --option smoke=false goes on."
    )
