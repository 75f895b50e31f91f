"""Which tensors a U-Net of `song_unet` has, told from a few of a file's: then the rest can be held against them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from assay.errors import InputError

FILTER = "resample_filter"
LAYER = re.compile(r"(enc|dec)\.((\d+)x\d+_(\w+))\.(.+)")
LAYERS = {
    "enc": ("conv", "down", "aux_residual", "block"),
    "dec": ("in", "up", "block", "aux_norm", "aux_conv"),
}
"""The kinds of layers at one size, in the order of use."""


def skeleton(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The names and shapes of all tensors of the network that a state is of, without values.

    Args:
        state: tensors under EDM's keys. Read are the sizes and kinds of layers, the first block of each size, the
            embedding, and whether there are Fourier times, classes, augmentation labels, and residuals of the image.
        origin: what errors call the file.

    Raises:
        InputError: for layers of another architecture, or where one of these is missing.
    """
    _check_layers(state, origin)
    sizes = sorted({int(found[3]) for key in state if (found := LAYER.fullmatch(key)) and found[1] == "enc"})[::-1]
    shapes = dict(_shapes(state, sizes, origin)) if sizes else {}
    if not shapes:
        raise InputError(f"{origin} has no encoder (enc.32x32_conv.weight, …), so that its network can't be told.")
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _check_layers(state: Mapping[str, Tensor], origin: str) -> None:
    """Refuses layers that this U-Net doesn't have."""
    for key in state:
        found = LAYER.fullmatch(key)
        if found is not None and kind_of(found[4]) not in LAYERS[found[1]]:
            raise InputError(
                f"{origin} has a layer {found[1]}.{found[2]}; those of DDPM++ and NCSN++ as trained on CIFAR-10 are "
                f"{', '.join(LAYERS[found[1]])}. It is another architecture (encoder or decoder 'skip'), which is not "
                f"read."
            )
    if "out_norm.weight" in state:
        raise InputError(f"{origin} is EDM's version of ADM (it has out_norm); DDPM++ and NCSN++ are read.")


def kind_of(layer: str) -> str:
    """`block` of `block12`."""
    return re.sub(r"\d+$", "", layer)


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int, origin: str) -> tuple[int, ...]:
    if key not in state:
        raise InputError(f"{origin} has no {key}, so that its network can't be told. Is the file complete?")
    shape = tuple(state[key].shape)
    if len(shape) != dimensions:
        raise InputError(f"{origin} has {key} of shape {shape}, expected {dimensions} dimensions.")
    return shape


_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _shapes(state: Mapping[str, Tensor], sizes: list[int], origin: str) -> _Shapes:
    """What the network of these sizes, falling, has."""
    names = [f"{size}x{size}" for size in sizes]
    width, channels = _shape(state, f"enc.{names[0]}_conv.weight", 4, origin)[:2]
    widths = [_shape(state, f"enc.{name}_block0.conv0.weight", 4, origin)[0] for name in names]
    attends = [f"enc.{name}_block0.qkv.weight" in state for name in names]
    blocks = sum(bool(re.fullmatch(rf"enc\.{names[0]}_block\d+\.conv0\.weight", key)) for key in state)
    taps = next((tuple(value.shape) for key, value in state.items() if key.endswith(FILTER)), (1, 1, 2, 2))
    residual = any("_aux_residual." in key for key in state)
    plain = any(re.fullmatch(r"enc\.\w+_down\.weight", key) for key in state)
    embedding, times = _shape(state, "map_layer0.weight", 2, origin)

    def block(name: str, inputs: int, outputs: int, resized: bool = False, attend: bool = False) -> _Shapes:
        if resized and plain:
            yield from _convolution(name, inputs, outputs, 3)
            return
        yield from _vectors(f"{name}.norm0", inputs)
        yield from _convolution(f"{name}.conv0", inputs, outputs, 3)
        yield from _linear(f"{name}.affine", embedding, outputs)
        yield from _vectors(f"{name}.norm1", outputs)
        yield from _convolution(f"{name}.conv1", outputs, outputs, 3)
        if resized or inputs != outputs:
            yield from _convolution(f"{name}.skip", inputs, outputs, 1)
        if resized:
            yield from ((f"{name}.{part}.{FILTER}", taps) for part in ("conv0", "skip"))
        if attend:
            yield from _vectors(f"{name}.norm2", outputs)
            yield from _convolution(f"{name}.qkv", outputs, 3 * outputs, 1)
            yield from _convolution(f"{name}.proj", outputs, outputs, 1)

    yield from _linear("map_layer0", times, embedding)
    yield from _linear("map_layer1", embedding, embedding)
    if "map_noise.freqs" in state:
        yield "map_noise.freqs", (times // 2,)
    for key in ("map_label", "map_augment"):
        if f"{key}.weight" in state:
            inputs = _shape(state, f"{key}.weight", 2, origin)[1]
            yield from list(_linear(key, inputs, times))[: 2 if key == "map_label" else 1]
    yield from _convolution(f"enc.{names[0]}_conv", channels, width, 3)
    given = [width]
    image = channels
    for level, name in enumerate(names):
        if level:
            yield from block(f"enc.{name}_down", width, width, resized=True)
            if residual:
                yield from _convolution(f"enc.{name}_aux_residual", image, width, 3)
                yield f"enc.{name}_aux_residual.{FILTER}", taps
                image = width
            given.append(width)
        for index in range(blocks):
            yield from block(f"enc.{name}_block{index}", width, widths[level], attend=attends[level])
            width = widths[level]
            given.append(width)
    for index in range(2):
        yield from block(f"dec.{names[-1]}_in{index}", width, width, attend=not index)
    for level, name in reversed(list(enumerate(names))):
        if level < len(names) - 1:
            yield from block(f"dec.{name}_up", width, width, resized=True)
        for index in range(blocks + 1):
            attend = attends[level] and index == blocks
            yield from block(f"dec.{name}_block{index}", width + given.pop(), widths[level], attend=attend)
            width = widths[level]
    yield from _vectors(f"dec.{names[0]}_aux_norm", width)
    yield from _convolution(f"dec.{names[0]}_aux_conv", width, channels, 3)


def _vectors(name: str, width: int) -> _Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _convolution(name: str, inputs: int, outputs: int, kernel: int) -> _Shapes:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _linear(name: str, inputs: int, outputs: int) -> _Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
