"""The networks that are trained on CIFAR-10; sizes are such that a file of 16-bit weights stays below 16 MB."""

from __future__ import annotations

from itertools import pairwise

from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from assay.defenses.networks import _Residual
from assay.defenses.selector import NoiseSelector


class NarrowResNet18(nn.Module):
    """`ResNet18` with fewer channels, which tells its penultimate features.

    Args:
        width: channels of the first stage; the last has eight times as many.
        n_classes: k.
    """

    def __init__(self, width: int = 48, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = (width, width, 2 * width, 4 * width, 8 * width)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Residual(before, after, 1 if before == after else 2), _Residual(after, after, 1))
                for before, after in pairwise(channels)
            )
        )
        self.head = nn.Linear(8 * width, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """`x (n, 3, 32, 32)` in [0, 1] to what the linear layer sees, `(n, 8 · width)`."""
        found: Tensor = self.stages(F.relu(self.bn1(self.conv1(x))))
        return F.adaptive_avg_pool2d(found, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """`x (n, 3, 32, 32)` in [0, 1] to logits `(n, k)`."""
        logits: Tensor = self.head(self.features(x))
        return logits


class SelectedNet(nn.Module):
    """A selector of noise levels and the classifier trained with it, kept in one file; `VariationalNet` of colours."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.selector = NoiseSelector(channels=3, width=width)
        self.classifier = NarrowResNet18(width)


def labelled_unet(channels: tuple[int, ...] = (96, 128, 128), layers: int = 2, groups: int = 16) -> UNet2DModel:
    """A U-Net for 3×32×32 images that takes labels 0 … 9, and 10 for none; attention in its second resolution."""
    attends = [i == 1 for i in range(len(channels))]
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=groups,
        attention_head_dim=groups,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        num_class_embeds=11,
    )
