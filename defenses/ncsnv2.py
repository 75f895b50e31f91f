"""The score network of NCSNv2 (Song and Ermon 2020, arXiv 2006.09011) for 32×32 images, as ADP uses it.

A RefineNet: four stages of residual blocks, the last two dilated instead of smaller, then four of refinement. The
network itself is not told its level; its output over σ is the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.defenses.checkpoints import load_state
from assay.defenses.denoiser import ScoreDenoiser
from assay.errors import InputError


def _conv(inputs: int, outputs: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=bias)


class InstanceNormPlus(nn.Module):
    """Instance normalisation that gives each channel's mean, normalised over channels, back (section A.1 there)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha, self.gamma, self.beta = (nn.Parameter(torch.zeros(width)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)`."""
        means = x.mean((2, 3))
        means = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + 1e-5).sqrt()
        normal = functional.instance_norm(x) + (self.alpha * means)[..., None, None]
        return self.gamma[:, None, None] * normal + self.beta[:, None, None]


class Pooled(nn.Module):
    """A convolution, then the mean of each 2×2 pixels."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, c, h, w)` to half of the size."""
        return functional.avg_pool2d(self.conv(x), 2)


class Residual(nn.Module):
    """A residual block.

    Args:
        inputs, outputs: channels.
        dilation: of its convolutions.
        starts: whether it starts a stage: with a shortcut of its own, and half the size where nothing is dilated.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int, starts: bool) -> None:
        super().__init__()
        pools = starts and dilation == 1
        self.normalize1, self.normalize2 = InstanceNormPlus(inputs), InstanceNormPlus(inputs)
        self.conv1 = _conv(inputs, inputs, dilation)
        self.conv2 = Pooled(inputs, outputs, 3) if pools else _conv(inputs, outputs, dilation)
        if starts:
            self.shortcut: nn.Module | None = Pooled(inputs, outputs, 1) if pools else _conv(inputs, outputs, dilation)
        else:
            self.shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)`."""
        inner = self.conv1(functional.elu(self.normalize1(x)))
        inner = self.conv2(functional.elu(self.normalize2(inner)))
        summed: Tensor = inner + (x if self.shortcut is None else self.shortcut(x))
        return summed


class Units(nn.ModuleDict):
    """Residual units of two convolutions each, `1_1_conv`, `1_2_conv`, `2_1_conv`, …"""

    def __init__(self, width: int, units: int) -> None:
        convolutions = {
            f"{unit}_{part}_conv": _conv(width, width, bias=False) for unit in range(1, units + 1) for part in (1, 2)
        }
        super().__init__(convolutions)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)`."""
        layers = list(self.values())
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            x = x + second(functional.elu(first(functional.elu(x))))
        return x


class Fusion(nn.Module):
    """Convolutions of images of several sizes, added up at the size of the first."""

    def __init__(self, inputs: Sequence[int], width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(each, width) for each in inputs)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Images `(n, c, h, w)`."""
        shape = images[0].shape[2:]
        return torch.stack(
            [
                functional.interpolate(layer(image), size=shape, mode="bilinear", align_corners=True)
                for layer, image in zip(self.convs, images, strict=True)
            ]
        ).sum(0)


class Pooling(nn.Module):
    """Two stages of pooling and convolution, each added to the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)`."""
        x = path = functional.elu(x)
        for layer in self.convs:
            path = layer(functional.max_pool2d(path, 5, stride=1, padding=2))
            x = x + path
        return x


class Refine(nn.Module):
    """A stage of refinement of images with `inputs` channels."""

    def __init__(self, inputs: Sequence[int], width: int, units: int) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(Units(each, 2) for each in inputs)
        if len(inputs) > 1:
            self.msf = Fusion(inputs, width)
        self.crp = Pooling(width)
        self.output_convs = Units(width, units)

    def forward(self, *images: Tensor) -> Tensor:
        """Images `(n, c, h, w)`."""
        adapted = [units(image) for units, image in zip(self.adapt_convs, images, strict=True)]
        fused = self.msf(adapted) if len(adapted) > 1 else adapted[0]
        refined: Tensor = self.output_convs(self.crp(fused))
        return refined


class NCSNv2(nn.Module):
    """The network; images in [−1, 1] to σ times the score in the units that it was trained in.

    Args:
        channels: of an image.
        width: of its first stage.
        levels: how many σ its table has.
    """

    sigmas: Tensor

    def __init__(self, channels: int, width: int, levels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("sigmas", torch.zeros(levels))
        self.begin_conv = _conv(channels, width)
        inputs = width
        for stage, (outputs, dilation) in enumerate([(width, 1), (2 * width, 1), (2 * width, 2), (2 * width, 4)]):
            blocks = [Residual(inputs, outputs, dilation, stage > 0), Residual(outputs, outputs, dilation, False)]
            self.add_module(f"res{stage + 1}", nn.ModuleList(blocks))
            inputs = outputs
        self.refine1 = Refine([2 * width], 2 * width, 1)
        self.refine2 = Refine([2 * width, 2 * width], 2 * width, 1)
        self.refine3 = Refine([2 * width, 2 * width], width, 1)
        self.refine4 = Refine([width, width], width, 3)
        self.normalizer = InstanceNormPlus(width)
        self.end_conv = _conv(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, c, h, w)`."""
        stages: list[Tensor] = []
        x = self.begin_conv(x)
        for stage in range(1, 5):
            for block in self.get_submodule(f"res{stage}").children():
                x = block(x)
            stages.append(x)
        x = self.refine2(stages[2], self.refine1(stages[3]))
        x = self.refine4(stages[0], self.refine3(stages[1], x))
        output: Tensor = self.end_conv(functional.elu(self.normalizer(x)))
        return output


def is_ncsnv2(state: Mapping[str, Any]) -> bool:
    """Whether a state has the keys of NCSNv2."""
    return {"begin_conv.weight", "end_conv.weight", "sigmas"} <= state.keys()


def ncsnv2(state: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> ScoreDenoiser:
    """The denoiser in the weights of an NCSNv2.

    Args:
        state: the file's tensors.
        config: `data.rescaled`, whether its σ are in units of [−1, 1]; by default they are of [0, 1], as for CIFAR-10.
        origin: what errors call the file.

    Raises:
        InputError: for its deeper versions, or keys and shapes that don't fit.
    """
    if deeper := sorted({key.partition(".")[0] for key in state if key.startswith(("res5", "refine5"))}):
        raise InputError(
            f"{origin} is a deeper NCSNv2, for larger images (it has {', '.join(deeper)}); expected that of 32×32."
        )
    shape, sigmas = state["begin_conv.weight"].shape, state["sigmas"]
    if len(shape) != 4:
        raise InputError(f"{origin} has begin_conv.weight of shape {tuple(shape)}, expected that of a convolution.")
    width, channels = shape[:2]
    network = NCSNv2(channels, width, sigmas.numel())
    load_state(network, state, origin)
    unit = 1.0 if config.get("data", {}).get("rescaled", False) else 2.0
    return ScoreDenoiser(network, (unit * float(sigmas.min()), unit * float(sigmas.max())))
