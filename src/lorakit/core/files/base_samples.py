"""Samples of a base's tensors: which positions, how they are read, and whether two samples can be of one base.

Positions follow from a tensor's name and shape alone: one in each of equal stretches, at a place drawn by a hash, so
that neither a block nor a regular pattern can avoid them. Values keep the bits of their own dtype.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lorakit.core.files.base_parts import Part, part_of
from lorakit.core.files.rounding import equal, may_be_one

NUMBERS = 64
"""Sampled values per tensor; of a smaller one all."""

LEAST, BUDGET, MOST_TENSORS = 4, 1 << 18, 1 << 16
"""With more than 4,096 tensors they share `BUDGET` samples, at least `LEAST` each; above `MOST_TENSORS` evenly chosen
ones are sampled."""

MOST_SLICES = 512
"""A tensor of three axes has a sample in each slice of its first axis (its experts), if it has no more than these."""

EXACT, ROUNDED, QUANTIZED, APART = "exact", "rounded", "quantized", "apart"
"""Degrees of agreement of two samples: bit for bit, up to rounding, within the error of quantizing, or none."""

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})

Name = TypeVar("Name")


@dataclass(frozen=True)
class Sample:
    """Values of one tensor.

    Attributes:
        dtype: Name of the tensor's dtype, or the way a quantized weight is stored.
        bits: The values in that dtype, in fp32 for a quantized weight, little-endian, in order of their positions.
        bound: How far each value may be from the one that was quantized, in bf16; empty if nothing was quantized.
    """

    dtype: str
    bits: bytes
    bound: bytes = b""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of `bits`."""
        return getattr(torch, self.dtype) if self.dtype in _FLOATS else torch.float32

    def values(self) -> Tensor:
        """Return the values in fp64, (n,)."""
        return _decoded(self.bits, self.torch_dtype)

    def slack(self) -> Tensor:
        """Return how far each value may be off, (n,) or (), in fp64."""
        return _decoded(self.bound, torch.bfloat16) if self.bound else torch.zeros((), dtype=torch.float64)

    def is_sound(self) -> bool:
        """Return whether the lengths fit the dtype and each other."""
        width = self.torch_dtype.itemsize
        count = len(self.bits) // width
        return len(self.bits) == width * count and len(self.bound) in (0, 2 * count)

    def without(self, places: Iterable[int]) -> Sample:
        """Return the sample with zeros at some places."""
        bits, bound, width = bytearray(self.bits), bytearray(self.bound), self.torch_dtype.itemsize
        for place in places:
            bits[width * place : width * (place + 1)] = bytes(width)
            if bound:
                bound[2 * place : 2 * place + 2] = bytes(2)
        return Sample(self.dtype, bytes(bits), bytes(bound))


def agreement(one: Sample, other: Sample) -> str:
    """Return how far two samples at the same positions agree: `EXACT`, `ROUNDED`, `QUANTIZED` or `APART`.

    Args:
        one: A sample.
        other: Another, perhaps in another dtype.
    """
    if one == other:
        return EXACT
    first, second = one.values(), other.values()
    if first.shape != second.shape:
        return APART
    if one.bound or other.bound:
        slack = (one.slack() + other.slack()) * (1 + 2**-6)  # the bounds are rounded, too
        step = torch.maximum(first.abs(), second.abs()) * 2**-8  # one rounding to bf16 before quantizing
        return QUANTIZED if bool(((first - second).abs() <= slack + step).all()) else APART
    if equal(first, second):
        return EXACT if one.dtype == other.dtype else ROUNDED
    return ROUNDED if may_be_one(first, second) else APART


def positions(tensors: Sequence[tuple[str, tuple[int, ...]]], count: int) -> Tensor:
    """Return which values of each flattened tensor are sampled, (tensors, count), rising; the first and last always.

    Args:
        tensors: Name and shape of each; none has fewer than `count` values.
        count: How many of each, at least 1.
    """
    seeds = [f"{name} {'x'.join(map(str, shape))}".encode() for name, shape in tensors]
    drawn = b"".join(hashlib.shake_128(seed).digest(4 * count) for seed in seeds)
    steps = (torch.frombuffer(bytearray(drawn), dtype=torch.int32).long() & 0xFFFFFFFF).view(-1, count)
    sizes = torch.tensor([math.prod(shape) for _, shape in tensors]).unsqueeze(1)
    edges = torch.arange(count + 1) * sizes // count
    found = edges[:, :-1] + steps % (edges[:, 1:] - edges[:, :-1])
    found[:, -1] = sizes[:, 0] - 1
    found[:, 0] = 0
    return found


def sample_count(shape: tuple[int, ...], tensors: int) -> int:
    """Return how many values of a tensor are sampled.

    Args:
        shape: Its shape.
        tensors: How many tensors are sampled in all.
    """
    wanted = max(LEAST, min(NUMBERS, BUDGET // max(1, tensors)))
    if len(shape) == 3 and wanted == NUMBERS and 0 < shape[0] <= MOST_SLICES:
        wanted = shape[0] * -(-NUMBERS // shape[0])  # a multiple, so that every slice holds whole stretches
    return min(math.prod(shape), wanted)


def take_samples(parts: Mapping[str, Part], read: Callable[[str], Tensor] | None) -> dict[str, Sample]:
    """Sample tensors, with one copy from each device for each width of dtype.

    Args:
        parts: Name -> readable part.
        read: Name -> tensor (…), for parts on the meta device whose values are elsewhere.
    """
    names = sorted(parts)
    names = names[:: max(1, -(-len(names) // MOST_TENSORS))]
    groups: dict[tuple[int, torch.device], list[str]] = {}
    for name in names:
        count = sample_count(parts[name].shape, len(names))
        device = parts[name].device if read is None else torch.device("cpu")
        groups.setdefault((count, device), []).append(name)
    dtypes, bits, bounds = {}, {}, {}
    for (count, device), members in groups.items():
        if not count:
            continue
        places = positions([(name, parts[name].shape) for name in members], count).to(device)
        for name, here in zip(members, places.unbind(), strict=True):
            part = parts[name] if read is None else part_of(read(name), {})
            dtypes[name] = part.dtype
            bits[name], bound = part.bits(here)
            if bound is not None:
                bounds[name] = bound.to(torch.bfloat16).view(torch.int16)
    found, slack = _gathered(bits), _gathered(bounds)
    return {name: Sample(dtypes[name], found[name], slack.get(name, b"")) for name in sorted(found)}


def _gathered(tensors: Mapping[Name, Tensor]) -> dict[Name, bytes]:
    """Return the bytes of small tensors (n,), with one copy for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Name]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    found: dict[Name, bytes] = {}
    for (_, dtype), names in groups.items():
        whole = torch.cat([tensors[name] for name in names]).cpu()
        data, start = ctypes.string_at(whole.data_ptr(), whole.numel() * dtype.itemsize), 0
        for name in names:
            end = start + tensors[name].numel() * dtype.itemsize
            found[name], start = data[start:end], end
    return found


def _decoded(data: bytes, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.zeros(0, dtype=torch.float64)
    values = torch.frombuffer(bytearray(data), dtype=dtype)
    return values.to(torch.float32 if dtype.itemsize < 4 else dtype).double()
