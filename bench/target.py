"""A defense as an attack sees it: counted, chunked and guarded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.card import Handle
from assay.defense import Defense
from assay.errors import AssayError, DefenseError, ThreatViolation
from assay.noise import Noise

Loss = Callable[..., Tensor]
"""`loss(logits (n, k), *labels (n, …)) -> (n,)`, to be increased."""
Forward = Callable[[Tensor, Noise], Tensor | tuple[Tensor, Tensor]]
"""One differentiable draw: `(x, noise) -> logits (n, k)`, or those and a bonus `(n,)` for the loss of each row."""
Image = Callable[[Tensor, Noise], Tensor]
"""A part of a defense from images to images: `(x, noise) -> (n, c, h, w)`."""


@dataclass(frozen=True)
class Evaluation:
    """A loss, its gradient and the logits that gave them.

    Attributes:
        loss: `(n,)`, the mean over draws (or the loss of the mean answer where the defense votes).
        gradient: `(n, c, h, w)` of `loss`.
        logits: `(n, draws, k)`, detached.
        unclipped: beside a clipped gradient, the gradient without that.
    """

    loss: Tensor
    gradient: Tensor
    logits: Tensor
    unclipped: Tensor | None = None


def shortened(parts: Tensor) -> Tensor:
    """Gradients `(n, draws, …)` cut to the lower median length of their sample's that don't vanish; 0 if not finite."""
    flat = parts.flatten(2)
    flat = torch.where(flat.isfinite().all(2, keepdim=True), flat, torch.zeros_like(flat))
    norms = torch.linalg.vector_norm(flat, dim=2, dtype=torch.float64)  # float32's squares over- and underflow
    ranked = norms.where(norms > 0, torch.inf).sort(1).values
    median = ranked.gather(1, ((norms > 0).sum(1, keepdim=True) - 1).clamp_min(0) // 2)
    scale = torch.where(norms > median, median / norms, 1.0)
    return (flat * scale[:, :, None].to(flat.dtype)).view_as(parts)


def _slope(output: Tensor, leaf: Tensor, cotangent: Tensor | None = None) -> Tensor:
    """The gradient at `leaf`: 0 where the defense severs the graph."""
    slope = None
    if output.requires_grad:
        (slope,) = torch.autograd.grad(output, leaf, cotangent, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope.detach()


@dataclass
class Calls:
    """Samples passed forward and backward, per slot of the batch: `(slots,)` int64 each."""

    forward: Tensor
    backward: Tensor


class Target:
    """A defense as an attack sees it: logits, gradients, handles; counted, chunked, guarded.

    Args:
        defense: in evaluation mode, parameters frozen.
        slots: the number of samples in the batch that the noise's slots refer to.
        white_box: False refuses gradients and handles.
        rows: the most rows in one network call; by default set from the image's size. A call that
            does not fit in memory is halved, and the smaller size is kept.
        on_calls: told the number of sample-forwards after each call, for progress bars.
    """

    def __init__(
        self,
        defense: Defense,
        slots: int,
        *,
        white_box: bool = True,
        rows: int | None = None,
        on_calls: Callable[[int], None] | None = None,
    ) -> None:
        self.defense = defense
        self.card = defense.card
        self.n_classes = defense.n_classes
        self.white_box = white_box
        self.calls = Calls(torch.zeros(slots, dtype=torch.int64), torch.zeros(slots, dtype=torch.int64))
        self._rows = rows
        self._on_calls = on_calls
        self._turn = 0

    @property
    def stochastic(self) -> bool:
        """Whether answers depend on the noise, as the card declares."""
        return self.card.traits.stochastic

    def handle(self, name: Handle) -> Any:
        """The defense's method for a handle, such as `chain`.

        Raises:
            ThreatViolation: in a black box, or for a handle that the card does not list.
        """
        if not self.white_box:
            raise ThreatViolation(f"a black-box attack may not use the {name!r} handle.")
        if name not in self.card.handles:
            raise ThreatViolation(f"{self.card.name} offers no {name!r} handle; its card lists {self.card.handles}.")
        return getattr(self.defense, name)

    def answer(self, x: Tensor, noise: Noise, *, repeats: int = 1) -> Tensor:
        """The defense's full answers (votes included), no gradient: logits `(n, repeats, k)`."""
        return self._draws(self.defense, x, noise, repeats, self.card.votes.draws)

    def draws(self, x: Tensor, noise: Noise, draws: int = 1, *, forward: Forward | None = None) -> Tensor:
        """Single draws, no gradient: logits `(n, draws, k)`."""
        return self._draws(forward or self.defense.draw, x, noise, draws, 1)

    @torch.no_grad()
    def _draws(self, forward: Forward, x: Tensor, noise: Noise, draws: int, cost: int) -> Tensor:
        folded = noise.draws(draws) if draws > 1 else noise
        # Images are repeated chunk by chunk: 10,000 draws of all of them at once would fill the memory.
        rows = torch.arange(len(x), device=x.device).repeat_interleave(draws)
        parts: list[Tensor] = []
        self._chunk(folded, x, cost, lambda c: parts.append(self._call(forward, x[rows[c]], folded[c])[0]))
        if not parts:
            return x.new_zeros(0, draws, self.n_classes)
        return torch.cat(parts).reshape(len(x), draws, self.n_classes)

    def gradient(
        self,
        x: Tensor,
        labels: tuple[Tensor, ...],
        loss: Loss,
        noise: Noise,
        *,
        draws: int = 1,
        forward: Forward | None = None,
        clip: bool = False,
    ) -> Evaluation:
        """Loss and gradient at `x`, averaged over `draws` draws folded into the batch.

        Where the defense itself averages draws the loss is taken of the mean probability, as an
        attack on a smoothed classifier should (Salman et al. 2019, eq. 6); elsewhere it is the
        mean of the draws' losses. A forward's bonus, averaged over the draws, is added to either.

        The gradient is Σ_j g_j, g_j the loss's derivative by draw j's own copy of `x`. `clip` makes it
        Σ_j g_j · min(1, m / ‖g_j‖), m the median of ‖g_j‖ (see `shortened`), at no further call: behind
        diffusion a few draws are so steep that they rule the sum, and it takes many more draws to settle.

        Raises:
            ThreatViolation: in a black box.
        """
        self._white_box_only()
        smoothed, clip = self.card.votes.draws > 1 and draws > 1, clip and draws > 1
        found: list[tuple[Tensor, ...]] = []

        def run(chunk: slice) -> None:
            part = x[chunk].detach()
            leaf = (part.repeat_interleave(draws, 0) if clip else part).requires_grad_()
            with torch.enable_grad():
                folded = noise[chunk].draws(draws) if draws > 1 else noise[chunk]
                # Repeating once copies: a defense that writes into its input may not write into the leaf.
                copies = leaf.repeat_interleave(1 if clip else draws, 0) if draws > 1 else leaf
                answers, bonus = self._call(forward or self.defense.draw, copies, folded)
                grouped = answers.unflatten(0, (len(part), draws))
                given = tuple(label[chunk] for label in labels)
                if smoothed:
                    mean = grouped.log_softmax(-1).logsumexp(1)
                    values = loss(mean - mean.logsumexp(-1, keepdim=True), *given)
                else:
                    repeated = tuple(label.repeat_interleave(draws, 0) for label in given)
                    values = loss(answers, *repeated).unflatten(0, (len(part), draws)).mean(1)
                if bonus is not None:
                    values = values + bonus.unflatten(0, (len(part), draws)).mean(1)
                slope = _slope(values.sum(), leaf)
            if clip:
                each = slope.unflatten(0, (len(part), draws))
                found.append((values.detach(), shortened(each).sum(1), grouped.detach(), each.sum(1)))
            else:
                found.append((values.detach(), slope, grouped.detach()))

        self._chunk(noise, x, draws, run, backward=True)
        if not found:
            return Evaluation(x.new_zeros(0), torch.zeros_like(x), x.new_zeros(0, draws, self.n_classes))
        return Evaluation(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def push(self, x: Tensor, noise: Noise, image: Image) -> Tensor:
        """The images `(n, …)` that a part of the defense makes of `x`, no gradient.

        Raises:
            ThreatViolation: in a black box.
        """
        self._white_box_only()
        parts: list[Tensor] = []

        def run(chunk: slice) -> None:
            with torch.no_grad(), self._blamed(noise[chunk]):
                parts.append(image(x[chunk].detach(), noise[chunk]))

        self._chunk(noise, x, 1, run)
        return torch.cat(parts) if parts else x

    def pull_back(self, x: Tensor, noise: Noise, image: Image, cotangent: Tensor) -> Tensor:
        """The gradient at `x` of `(image(x, noise) · cotangent).sum()`, shaped like both, `(n, c, h, w)`.

        Raises:
            ThreatViolation: in a black box.
        """
        self._white_box_only()
        parts: list[Tensor] = []

        def run(chunk: slice) -> None:
            part = x[chunk].detach().requires_grad_()
            with torch.enable_grad(), self._blamed(noise[chunk]):
                parts.append(_slope(image(part, noise[chunk]), part, cotangent[chunk]))

        self._chunk(noise, x, 1, run, backward=True)
        return torch.cat(parts) if parts else torch.zeros_like(x)

    def _white_box_only(self) -> None:
        if not self.white_box:
            raise ThreatViolation("a black-box attack may not ask for gradients.")

    def forward_graph(self, x: Tensor, noise: Noise) -> Tensor:
        """One draw with its graph, logits `(n, k)`, for foreign attacks that differentiate for themselves.

        Not chunked, never of no image. Such code drops rows without a word, so calls are spread evenly over the slots,
        not charged to the samples that caused them; `noise` is n rows of any slots.

        Raises:
            ThreatViolation: in a black box.
        """
        self._white_box_only()
        logits = self._call(self.defense.draw, x, noise)[0] if len(x) else x.new_zeros(0, self.n_classes) + x.sum()
        self.calls.forward += self._spread(len(x))
        if self._on_calls is not None:
            self._on_calls(len(x))

        def tally(slope: Tensor) -> None:
            self.calls.backward += self._spread(len(slope))

        if logits.requires_grad:
            logits.register_hook(tally)
        return logits

    def _spread(self, calls: int) -> Tensor:
        """`calls` dealt out to the slots in turn, beginning where the last deal ended."""
        slots = len(self.calls.forward)
        dealt = (torch.arange(calls) + self._turn) % slots
        self._turn = (self._turn + calls) % slots
        return torch.bincount(dealt, minlength=slots)

    def _chunk(self, noise: Noise, x: Tensor, cost: int, run: Callable[[slice], None], backward: bool = False) -> None:
        """Runs `run` over slices of `noise`'s rows that fit, and counts `cost` calls a row of each."""
        if self._rows is None and len(noise):
            budget = 1 << (21 if x.device.type == "cuda" else 15)
            self._rows = max(16, budget // max(1, x[0].numel()))
        start = 0
        while start < len(noise):
            chunk = slice(start, min(len(noise), start + max(1, (self._rows or 1) // cost)))
            try:
                run(chunk)
            except (torch.OutOfMemoryError, MemoryError):
                size = chunk.stop - chunk.start
                if size == 1:
                    raise
                self._rows = size // 2 * cost
                continue
            self._count(noise[chunk], cost, backward=backward)
            start = chunk.stop

    def _call(self, forward: Forward, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        with self._blamed(noise):
            answer = forward(x, noise)
        logits, bonus = answer if isinstance(answer, tuple) else (answer, None)
        expected = (len(noise), self.n_classes)
        if tuple(logits.shape) != expected:
            raise DefenseError(
                f"{self.card.name} returned logits of shape {tuple(logits.shape)}, expected {expected}: "
                f"one row a sample, one column a class.",
                noise.slots.unique().tolist(),
            )
        finite = logits.detach().isfinite().all(1)
        if not bool(finite.all()):
            raise DefenseError(
                f"{self.card.name} returned logits that are not finite for {int((~finite).sum())} of "
                f"{len(noise)} inputs; logits must be finite everywhere in [0, 1].",
                noise.slots[~finite.cpu()].unique().tolist(),
            )
        return logits, bonus

    @contextlib.contextmanager
    def _blamed(self, noise: Noise) -> Iterator[None]:
        """Whatever the defense raises becomes a `DefenseError` that names the samples."""
        try:
            yield
        except (AssayError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            slots = noise.slots.unique().tolist()
            raise DefenseError(f"{self.card.name} raised {type(error).__name__}: {error}", slots) from error

    def charge(self, noise: Noise) -> None:
        """Counts one forward call a row of `noise`, for what a `forward` computes beside its own answer."""
        self._count(noise, 1)

    def _count(self, noise: Noise, cost: int, *, backward: bool = False) -> None:
        charged = torch.bincount(noise.slots, minlength=len(self.calls.forward)) * cost
        self.calls.forward += charged
        if backward:
            self.calls.backward += charged
        if self._on_calls is not None:
            self._on_calls(len(noise) * cost)
