"""Randomness as an argument: replayable streams that never touch the global generator.

A value is a function of (seed, path of tags, row, position) alone, computed with the SplitMix64
hash (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") used as a
counter-based generator. So a subset of a batch's rows sees the values that those rows saw in the
whole batch, a stream can be replayed in any order, and k draws of one sample are k more rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Tag = str | int

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value`: torch has no arithmetic on uint64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 tensors read as 64 bits."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_MIX1)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_MIX2)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=65536)
def _tag_key(tag: tuple[Tag, ...]) -> int:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in tag)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


class Noise:
    """Independent random streams for the rows of a batch. Immutable.

    Attributes:
        keys: `(n,)` int64, one stream a row.
        slots: `(n,)` int64, the position in the original batch that a row belongs to; it survives
            subsetting and folding, so that costs can be charged to samples.

    >>> noise, like = Noise.from_seed(0, rows=4), torch.zeros(())
    >>> step = noise.child("step", 7)
    >>> first = step.normal(shape=(3,), like=like)
    >>> torch.equal(first, step.normal(shape=(3,), like=like))
    True
    >>> torch.equal(first[2:], step[2:].normal(shape=(3,), like=like))
    True
    """

    __slots__ = ("keys", "slots")

    def __init__(self, keys: Tensor, slots: Tensor) -> None:
        self.keys = keys
        self.slots = slots

    @classmethod
    def from_seed(cls, seed: int, rows: Sequence[int] | int) -> Noise:
        """Streams for a run seed and a row identity each (sample ids, or a count for 0, 1, …)."""
        identities = torch.arange(rows) if isinstance(rows, int) else torch.tensor(list(rows), dtype=torch.int64)
        keys = _mix(identities * _signed(_GOLDEN) + _tag_key(("seed", seed)))
        return cls(keys, torch.arange(len(identities)))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Tensor | slice) -> Noise:
        """The same streams for a subset of the rows (a slice, a boolean mask or an index)."""
        if isinstance(rows, Tensor):
            rows = rows.cpu()
        return Noise(self.keys[rows], self.slots[rows])

    def child(self, *tag: Tag) -> Noise:
        """Streams independent of this one's and of every child's with another tag."""
        return Noise(_mix(self.keys + _tag_key(tag)), self.slots)

    def draws(self, k: int) -> Noise:
        """`n·k` rows: row `i·k + j` is draw j of row i. Pair with `x.repeat_interleave(k, 0)`.

        The first draws of `draws(8)` are the draws of `draws(4)`.
        """
        numbers = torch.arange(k) * _signed(_GOLDEN) + _tag_key(("draw",))
        keys = _mix(self.keys[:, None] + _mix(numbers)[None, :]).reshape(-1)
        return Noise(keys, self.slots.repeat_interleave(k))

    def _bits(self, tag: tuple[Tag, ...], size: int, device: torch.device) -> Tensor:
        keys = _mix(self.keys + _tag_key(("value", *tag))).to(device)
        counters = torch.arange(1, size + 1, device=device) * _signed(_GOLDEN)
        return _mix(keys[:, None] + counters[None, :])

    def uniform(self, *tag: Tag, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uniform values in [0, 1), `(n, *shape)` in `like`'s dtype and device."""
        size = math.prod(shape)
        bits = self._bits(("uniform", *tag), size, like.device)
        # 24 bits fill a float32's mantissa exactly, so that rounding never produces a 1.
        width = 53 if like.dtype == torch.float64 else 24
        values = ((bits >> (64 - width)) & ((1 << width) - 1)).to(like.dtype) * 2.0**-width
        return values.reshape(len(self), *shape)

    def normal(self, *tag: Tag, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal values (Box–Muller), `(n, *shape)` in `like`'s dtype and device.

        Same tag, same values, up to `like`'s precision.
        """
        size = math.prod(shape)
        bits = self._bits(("normal", *tag), (size + 1) // 2, like.device)
        precise = torch.float64 if like.dtype == torch.float64 else torch.float32
        # The radius takes 32 bits and the angle 32: the largest value is 6.7, a tail of 2e-11.
        first = ((bits >> 32) & 0xFFFFFFFF).to(precise)
        second = (bits & 0xFFFFFFFF).to(precise)
        radius = torch.sqrt(-2 * torch.log((first + 0.5) * 2.0**-32).clamp_max(0))
        angle = second * (2 * math.pi * 2.0**-32)
        values = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
        return values.flatten(1)[:, :size].reshape(len(self), *shape).to(like.dtype)

    def integers(self, *tag: Tag, shape: Sequence[int], high: int, like: Tensor) -> Tensor:
        """Integers in [0, high), `(n, *shape)` int64 on `like`'s device."""
        if not 0 < high < 1 << 31:
            raise ValueError(f"high must lie in [1, 2^31), got {high}.")
        bits = self._bits(("integer", *tag), math.prod(shape), like.device)
        return ((((bits >> 32) & 0x7FFFFFFF) * high) >> 31).reshape(len(self), *shape)

    def seed(self) -> int:
        """One number for foreign code that must be seeded; it depends on every row's stream."""
        positions = torch.arange(len(self)) * _signed(_GOLDEN)
        return int(_mix(self.keys + positions).sum()) & ((1 << 63) - 1)
