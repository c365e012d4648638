"""Samples of a base's tensors, by which a fingerprint identifies it.

Tensors have the names, shapes and values that the plain base gives them: adapters, merges and trained biases do not
show. Positions follow from a tensor's name and shape alone: one in each of equal stretches, at a place drawn by a
hash, so that neither a block nor a regular pattern can avoid them. Values keep the bits of their own dtype.

Two samples can be of one base if one is the other rounded to the dtypes that models are loaded in, once or by way of a
third dtype, or if some list rounds to both. So noise of the size of a rounding is not taken for one.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit.core.model.base_view import QuantisedWeight, base_tensors, quantised_weights
from lorakit.core.model.index import AdapterIndex
from lorakit.targets.layer_types import CONV1D

_HALF, _BRAIN = torch.float16, torch.bfloat16
WAYS: tuple[tuple[torch.dtype, ...], ...] = (
    (_BRAIN,),
    (_HALF,),
    (torch.float32,),
    (_HALF, _BRAIN),
    (_BRAIN, _HALF),
)
"""Dtypes to which a base is rounded, one after the other, on the way from one of the two to the other."""

_SMALLEST, _LARGEST = -14, 65520.0
"""Exponent of the smallest normal number in fp16; smallest number that becomes infinite in it."""


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether all values are the same, (n,) each; NaN is NaN, and zeros of either sign are the same."""
    return one.shape == other.shape and bool(_same(one, other).all())


def may_be_one(one: Tensor, other: Tensor) -> bool:
    """Return whether rounding explains every difference.

    Args:
        one: Values in fp64, (n,).
        other: Likewise.
    """
    if one.shape != other.shape:
        return False
    for way in WAYS:
        if equal(_rounded(one, way), other) or equal(_rounded(other, way), one):
            return True
    return _one_source(one, other) or _one_source(other, one)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _rounded(values: Tensor, way: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in way:
        values = values.to(dtype)
    return values.double()


def _one_source(half: Tensor, brain: Tensor) -> bool:
    """Return whether some list rounds to the one in fp16 and to the other in bf16: one step apart only at a tie."""
    if not (equal(_rounded(half, (_HALF,)), half) and equal(_rounded(brain, (_BRAIN,)), brain)):
        return False
    reach = _half_step(half, 10, _SMALLEST) + _half_step(brain, 7, -126)
    overflown = half.isinf() & (brain.sign() == half.sign()) & (brain.abs() + _half_step(brain, 7, -126) >= _LARGEST)
    return bool((_same(half, brain) | ((half - brain).abs() <= reach) | overflown).all())


def _half_step(values: Tensor, digits: int, smallest: int) -> Tensor:
    """Return half the distance to the next larger number of a dtype with a number of binary digits after the point."""
    exponent = torch.frexp(values.nan_to_num(0.0, 0.0, 0.0)).exponent.double() - 1
    return torch.exp2(exponent.clamp(min=smallest) - digits - 1)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Part:
    """A parameter or buffer as the plain base has it.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype, or the way a quantized weight is stored.
        key: The same for every name of a shared tensor.
        tensor: The tensor (…), or None for a quantized weight.
        weight: The quantized weight, or None.
        is_buffer: Whether it is a buffer.
    """

    shape: tuple[int, ...]
    dtype: str
    key: int
    tensor: Tensor | None
    weight: QuantisedWeight | None = None
    is_buffer: bool = False

    def is_readable(self, elsewhere: bool) -> bool:
        """Return whether its values can be read: here, or, for a plain tensor on the meta device, elsewhere."""
        if self.weight is not None:
            return not any(tensor.is_meta for tensor in self.weight.base.tensors(self.weight.stored))
        return self.tensor is not None and self.tensor.is_floating_point() and (elsewhere or not self.tensor.is_meta)

    @property
    def device(self) -> torch.device:
        """Device on which `bits` takes its positions."""
        return self.tensor.device if self.tensor is not None else torch.device("cpu")

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype whose patterns `bits` gives."""
        return torch.float32 if self.tensor is None else self.tensor.dtype

    def bits(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read values at positions of the flattened tensor.

        Args:
            positions: Whole numbers (n,), on `device`.

        Returns:
            Bit patterns (n,) as integers of the dtype's width (quantized: of fp32); for a quantized weight also how far
            each value may be from the one that was quantized, (n,).
        """
        if self.weight is not None:
            rows, columns = _canonical(self.weight)
            if self.shape != (rows, columns):  # the plain base has it as (in, out)
                positions = positions % rows * columns + positions // rows
            values, bound = self.weight.base.values(self.weight.stored, positions)
            return values.float().view(torch.int32), bound
        tensor: Tensor = self.tensor.detach()  # type: ignore[union-attr]
        if type(tensor) is Tensor and tensor.is_contiguous():
            return tensor.view(-1).view(_BITS[tensor.element_size()])[positions], None
        values = tensor[torch.unravel_index(positions, tensor.shape)].contiguous()
        return values.view(_BITS[values.element_size()]), None


def part_of(tensor: Tensor, cut: Mapping[int, int], is_buffer: bool = False) -> Part:
    """Return a plain tensor as a part.

    Args:
        tensor: A tensor of any shape.
        cut: Id of a tensor -> how many of its rows count, if it has more.
        is_buffer: Whether it is a buffer.
    """
    meant = tensor[: cut[id(tensor)]] if id(tensor) in cut else tensor
    name = str(tensor.dtype).removeprefix("torch.")
    return Part(tuple(meant.shape), name, id(tensor), meant, is_buffer=is_buffer)


def parts_of(index: AdapterIndex, cut: Mapping[int, int]) -> dict[str, Part]:
    """Return a base's parameters and persistent buffers by the names of the plain base.

    Args:
        index: A model's index, with or without adapters.
        cut: As in `part_of`.
    """
    quantised = {weight.packed: weight for weight in quantised_weights(index, stacked=False)}
    parts = {}
    for name, tensor, module in base_tensors(index, stacked=False):
        weight = quantised.get(name)
        if weight is not None:
            rows, columns = _canonical(weight)
            before = getattr(weight.module, "source_cls", nn.Linear).__name__
            laid = (columns, rows) if before == CONV1D else (rows, columns)
            parts[weight.name] = Part(laid, weight.base.name, id(weight.module), None, weight)
            if weight.loose_bias is not None:
                parts[weight.name.removesuffix("weight") + "bias"] = part_of(weight.loose_bias, {})
        else:
            parts[name] = part_of(tensor, cut, is_buffer=name.rpartition(".")[2] not in module._parameters)
    return parts


def listing(parts: Mapping[str, Part]) -> str:
    """Return names and shapes of the parameters, one per line, sorted by name.

    Args:
        parts: What `parts_of` returned.
    """
    return "\n".join(f"{name} {part.shape}" for name, part in sorted(parts.items()) if not part.is_buffer)


def parameter_count(parts: Mapping[str, Part]) -> int:
    """Return the number of parameters; a tensor shared under several names counts once.

    Args:
        parts: What `parts_of` returned.
    """
    return sum({part.key: math.prod(part.shape) for part in parts.values() if not part.is_buffer}.values())


def _canonical(weight: QuantisedWeight) -> tuple[int, int]:
    module: Any = weight.module
    return int(module.out_features), int(module.in_features)


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


FIRST_TENSORS, FIRST_NUMBERS = 16, 16
"""Sampled tensors and values of each in fingerprints of the first form, written before form 2, rounded to bf16.

They are still compared, with the weaker guarantee that they had: other tensors, norms and biases may differ unseen,
and so may everything within one step of bf16."""


def first_positions(shape: tuple[int, ...]) -> Tensor:
    """Return which values of a flattened tensor were sampled, (n,).

    Args:
        shape: Its shape.
    """
    size = math.prod(shape)
    return torch.linspace(0, size - 1, min(FIRST_NUMBERS, size), dtype=torch.float64).long()


def take_first_samples(parts: Mapping[str, Part], read: Callable[[str], Tensor] | None) -> dict[str, Sample]:
    """Sample matrices as the first form did.

    Args:
        parts: Name -> part, readable.
        read: Name -> tensor (…), for parts on the meta device whose values are elsewhere.
    """
    large = sorted(name for name, part in parts.items() if len(part.shape) >= 2 and not part.is_buffer)
    found = {}
    for name in large[:: max(1, len(large) // FIRST_TENSORS)][:FIRST_TENSORS]:
        part = parts[name] if read is None else part_of(read(name), {})
        bits, bound = part.bits(first_positions(part.shape).to(part.device))
        values = bits.view(part.stored_dtype)
        found[name] = Sample("bfloat16", _brain(values), b"" if bound is None else _brain(bound))
    return found


def first_agreement(one: Sample, other: Sample, slack: bool = True) -> bool:
    """Return whether two samples agree within one step of bf16, or within their bounds.

    Args:
        one: A sample of the first form.
        other: Another.
        slack: Whether bounds count.
    """
    first, second = one.values(), other.values()
    if first.shape != second.shape or not (one.is_sound() and other.is_sound()):
        return False
    near = (_order(one) - _order(other)).abs() <= 1
    if slack:
        near |= (first - second).abs() <= (one.slack() + other.slack()) * (1 + 2**-6)  # the bounds are rounded, too
    return bool(near.all())


def as_hex(bits: bytes) -> str:
    """Return bf16 patterns in hexadecimal, four digits each."""
    return _swapped(bits).hex()


def from_hex(text: str) -> bytes:
    """Return what `as_hex` was given.

    Raises:
        ValueError: The text is not patterns in hexadecimal.
    """
    if len(text) % 4:
        raise ValueError("not whole patterns")
    return _swapped(bytes.fromhex(text))


def _swapped(bits: bytes) -> bytes:
    swapped = bytearray(bits)
    swapped[::2], swapped[1::2] = bits[1::2], bits[::2]
    return bytes(swapped)


def _brain(values: Tensor) -> bytes:
    patterns = values.to(torch.bfloat16).cpu().view(torch.int16).tolist()
    return b"".join((pattern & 0xFFFF).to_bytes(2, "little") for pattern in patterns)


def _order(sample: Sample) -> Tensor:
    """Return bf16 patterns as whole numbers that grow with their values, one per representable number, (n,)."""
    if not sample.bits:
        return torch.zeros(0, dtype=torch.int64)
    patterns = torch.frombuffer(bytearray(sample.bits), dtype=torch.int16).long()
    return torch.where(patterns < 0, -(patterns & 0x7FFF), patterns)
