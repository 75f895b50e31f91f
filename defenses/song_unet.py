"""The U-Nets of Song et al. 2021 (arXiv 2011.13456: DDPM, DDPM++, NCSN++), built as a file's shapes say.

EDM (Karras et al. 2022) publishes the same networks. The keys are EDM's: `enc.32x32_conv.weight`,
`enc.32x32_block0.norm0.weight`, …, `map_layer0.weight`. diffusers' U-Net can't hold them: they attend once at the end
of a decoder level, rescale sums, and take a residual of the downsampled image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.defenses.song_shapes import FILTER, LAYER, LAYERS, kind_of, skeleton


class Conv(nn.Module):
    """A convolution, after the image was made half or twice as large with a filter, if there is one.

    Args:
        state: its `weight`, `bias` and `resample_filter`, as far as it has them.
        resample: `up`, `down`, `fused down` (convolves first), or nothing.
    """

    def __init__(self, state: Mapping[str, Tensor], resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.weight = _parameter(state, "weight")
        self.bias = _parameter(state, "bias")
        taps = state[FILTER].shape if FILTER in state else (1, 1, 2, 2)
        self.register_buffer(FILTER, torch.zeros(taps) if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)`."""
        weight, bias = self.weight, self.bias
        taps = self.resample_filter
        if not isinstance(taps, Tensor):
            return functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        before = (taps.shape[-1] - 1) // 2
        if self.resample == "fused down":
            x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2 + before)
            x = functional.conv2d(x, taps.expand(len(weight), -1, -1, -1), stride=2, groups=len(weight))
            return x + bias[:, None, None]
        each = taps.expand(x.shape[1], -1, -1, -1)
        if self.resample == "up":
            x = functional.conv_transpose2d(x, 4 * each, stride=2, padding=before, groups=x.shape[1])
        else:
            x = functional.conv2d(x, each, stride=2, padding=before, groups=x.shape[1])
        return functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


class Resize(nn.Module):
    """How DDPM itself resizes: a convolution of stride 2, padded below and right, or of the enlarged image."""

    def __init__(self, state: Mapping[str, Tensor], up: bool) -> None:
        super().__init__()
        self.up = up
        self.weight = _parameter(state, "weight")
        self.bias = _parameter(state, "bias")

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`x (n, c, h, w)`; the level is not used."""
        if self.up:
            return functional.conv2d(functional.interpolate(x, scale_factor=2.0), self.weight, self.bias, padding=1)
        return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, stride=2)


class Block(nn.Module):
    """A residual block, with attention behind it where the state has `qkv`.

    Args:
        state: its tensors.
        resample: `up`, `down` or nothing.
        scale: of each sum.
        least: see `SongUNet`.
    """

    def __init__(self, state: Mapping[str, Tensor], resample: str, scale: float, least: int) -> None:
        super().__init__()
        self.scale = scale
        self.norm0, self.norm1 = _norm(state, "norm0.", least), _norm(state, "norm1.", least)
        self.conv0 = Conv(_part(state, "conv0"), resample)
        self.conv1 = Conv(_part(state, "conv1"))
        self.affine = _linear(state, "affine")
        self.skip = Conv(_part(state, "skip"), resample) if "skip.weight" in state else None
        self.attends = "qkv.weight" in state
        if self.attends:
            self.norm2 = _norm(state, "norm2.", least)
            self.qkv, self.proj = Conv(_part(state, "qkv")), Conv(_part(state, "proj"))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`x (n, c, h, w)`, `emb (n, e)`."""
        inner = self.conv0(functional.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        inner = self.conv1(functional.silu(self.norm1(inner)))
        x = self.scale * (inner + (x if self.skip is None else self.skip(x)))
        if not self.attends:
            return x
        # Rows of qkv: three of every channel, one after the other.
        q, k, v = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3).permute(2, 0, 3, 1)[:, :, None]
        attended = functional.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        summed: Tensor = self.scale * (x + self.proj(attended))
        return summed


class SongUNet(nn.Module):
    """The network of a state.

    Args:
        state: tensors by key; only their names and shapes are read.
        scale: of each sum of a residual block: √½ for DDPM++ and NCSN++, 1 for DDPM.
        least: how many channels a group that is normalised has at least; there are 32 groups at most.
        origin: what errors call the file.

    Attributes:
        channels: of an image.
        n_classes: k, or 0.

    Raises:
        InputError: for a state of another architecture, or without the tensors that say which.
    """

    def __init__(
        self, state: Mapping[str, Tensor], scale: float = math.sqrt(0.5), least: int = 4, origin: str = "the file"
    ) -> None:
        super().__init__()
        self.scale, self.least = scale, least
        self._build(skeleton(state, origin))

    def _build(self, state: Mapping[str, Tensor]) -> None:
        self.map_layer0, self.map_layer1 = _linear(state, "map_layer0"), _linear(state, "map_layer1")
        width = self.map_layer0.in_features
        self.fourier = "map_noise.freqs" in state
        self.map_noise = nn.Module()
        if self.fourier:
            self.map_noise.register_buffer("freqs", torch.zeros(width // 2))
        self.map_label = _linear(state, "map_label") if "map_label.weight" in state else None
        self.n_classes = self.map_label.in_features if self.map_label is not None else 0
        # Which augmentation an image had; none has, when it is used. There is no bias, so it is loaded and left out.
        self.map_augment = _linear(state, "map_augment") if "map_augment.weight" in state else None
        parts = {side: _ordered(state, side) for side in ("enc", "dec")}
        self.enc = nn.ModuleDict({name: self._layer(_part(state, f"enc.{name}"), name) for name in parts["enc"]})
        self.dec = nn.ModuleDict({name: self._layer(_part(state, f"dec.{name}"), name) for name in parts["dec"]})
        self.channels = int(state[f"enc.{parts['enc'][0]}.weight"].shape[1])

    def _layer(self, state: Mapping[str, Tensor], name: str) -> nn.Module:
        kind = name.partition("_")[2]
        if kind in ("conv", "aux_conv"):
            return Conv(state)
        if kind == "aux_residual":
            return Conv(state, "fused down")
        if kind == "aux_norm":
            return _norm(state, "", self.least)
        resample = kind if kind in ("up", "down") else ""
        if resample and "conv0.weight" not in state:
            return Resize(state, kind == "up")
        return Block(state, resample, self.scale, self.least)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        """The output `(n, c, h, w)` for `x`, times `(n,)` and, where it knows classes, labels `(n,)` int64."""
        emb = self._embed(times)
        if self.map_label is not None and labels is not None:
            hot = functional.one_hot(labels, self.n_classes).to(x.dtype)
            emb = emb + self.map_label(hot * math.sqrt(self.n_classes))
        emb = functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb))))
        skips: list[Tensor] = []
        image = x
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = skips[-1] = image = self.scale * (x + layer(image))
            else:
                x = layer(x) if name.endswith("conv") else layer(x, emb)
                skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = functional.silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        return x

    def _embed(self, times: Tensor) -> Tensor:
        """Sines, then cosines, of the times."""
        half = self.map_layer0.in_features // 2
        if self.fourier:
            frequencies = 2 * math.pi * self.map_noise.get_buffer("freqs")
        else:
            exponents = torch.arange(half, dtype=times.dtype, device=times.device) / (half - 1)
            frequencies = 10000**-exponents
        angles = times[:, None] * frequencies.to(times.dtype)
        return torch.cat([angles.sin(), angles.cos()], 1)


def _ordered(state: Mapping[str, Tensor], side: str) -> list[str]:
    """The layers of the encoder or decoder, in the order of use."""
    layers: dict[str, tuple[int, int, int]] = {}
    for key in state:
        found = LAYER.fullmatch(key)
        if found is not None and found[1] == side:
            number = re.search(r"\d+$", found[4])
            size = -int(found[3]) if side == "enc" else int(found[3])
            layers[found[2]] = (size, LAYERS[side].index(kind_of(found[4])), int(number[0]) if number else 0)
    return sorted(layers, key=lambda name: layers[name])


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _parameter(state: Mapping[str, Tensor], name: str) -> nn.Parameter:
    return nn.Parameter(torch.zeros(state[name].shape))


def _norm(state: Mapping[str, Tensor], prefix: str, least: int) -> nn.GroupNorm:
    channels = len(state[f"{prefix}weight"])
    return nn.GroupNorm(min(32, channels // least), channels, eps=1e-6)


def _linear(state: Mapping[str, Tensor], name: str) -> nn.Linear:
    rows, columns = state[f"{name}.weight"].shape
    return nn.Linear(columns, rows, bias=f"{name}.bias" in state)
