"""What a check is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.defense import Defense
from assay.noise import Noise


@dataclass(frozen=True)
class Subject:
    """A defense under examination, and a few of the board's images.

    Attributes:
        defense: in evaluation mode.
        x: `(n, c, h, w)` in [0, 1], `y`: `(n,)` labels, `ids`: their sample ids.
        noise: n rows, a stream that nothing else uses.
    """

    defense: Defense
    x: Tensor
    y: Tensor
    ids: Sequence[int]
    noise: Noise

    def answer(self, rows: Tensor | slice = slice(None), noise: Noise | None = None) -> Tensor:
        """Logits for some of the images, no gradient, under the subject's noise or another."""
        streams = self.noise if noise is None else noise
        with torch.no_grad():
            logits: Tensor = self.defense(self.x[rows], streams[rows])
        return logits

    def ids_of(self, mask: Tensor) -> tuple[int, ...]:
        """The sample ids where a boolean mask over the rows holds."""
        return tuple(self.ids[i] for i in mask.nonzero().flatten().tolist())


def gap(a: Tensor, b: Tensor) -> Tensor:
    """`(n,)`: the largest difference of two batches of probabilities, which no scale of logits hides.

    1, the most there can be, where either is not finite.
    """
    return (a.double().softmax(1) - b.double().softmax(1)).abs().amax(1).nan_to_num(nan=1.0)
