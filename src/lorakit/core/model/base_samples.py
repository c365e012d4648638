"""Sample a base's tensors for its fingerprint, and compare samples.

Tensors have the same names, shapes and values as in the plain base (without adapters, merges or trained biases). The
sampled positions depend only on a tensor's name and shape: the tensor is divided into equal ranges, and a hash chooses
one position in each range. Changes to a large contiguous block or in a regular pattern are therefore unlikely to be
missed. Values are stored bit for bit in their dtype.

Two samples can belong to the same base if rounding one of them gives the other, or if both can be obtained by rounding
the same values. The only roundings considered are those to dtypes in which models are loaded, either directly or via a
third dtype. It is not enough for a difference to be as small as a rounding error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.choices import CONV1D
from lorakit.core.model.base_view import QuantizedWeight, base_tensors, quantized_weights
from lorakit.core.model.index import AdapterIndex
from lorakit.core.shards import is_shard

_FP16, _BF16 = torch.float16, torch.bfloat16
ROUNDINGS: tuple[tuple[torch.dtype, ...], ...] = ((_BF16,), (_FP16,), (torch.float32,), (_FP16, _BF16), (_BF16, _FP16))
"""Sequences of dtypes to which a base may have been rounded between two fingerprints."""

_SMALLEST, _LARGEST = -14, 65520.0
"""Exponent of the smallest normal fp16 number, and the smallest value that overflows when rounded to fp16."""


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors (n,) are equal, treating NaN as equal to NaN and -0 as equal to 0."""
    return one.shape == other.shape and bool(_same(one, other).all())


def agree_after_rounding(one: Tensor, other: Tensor) -> bool:
    """Return whether rounding explains every difference between two tensors of fp64 values, both (n,)."""
    if one.shape != other.shape:
        return False
    for dtypes in ROUNDINGS:
        if equal(_rounded(one, dtypes), other) or equal(_rounded(other, dtypes), one):
            return True
    return _have_one_source(one, other) or _have_one_source(other, one)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _rounded(values: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in dtypes:
        values = values.to(dtype)
    return values.double()


def _have_one_source(half: Tensor, brain: Tensor) -> bool:
    """Return whether some original values could round to both `half` in fp16 and `brain` in bf16."""
    if not (equal(_rounded(half, (_FP16,)), half) and equal(_rounded(brain, (_BF16,)), brain)):
        return False
    reach = _half_step(half, 10, _SMALLEST) + _half_step(brain, 7, -126)
    overflown = half.isinf() & (brain.sign() == half.sign()) & (brain.abs() + _half_step(brain, 7, -126) >= _LARGEST)
    return bool((_same(half, brain) | ((half - brain).abs() <= reach) | overflown).all())


def _half_step(values: Tensor, digits: int, smallest: int) -> Tensor:
    """Return half the gap between adjacent representable numbers at each value, given `digits` mantissa bits."""
    exponent = torch.frexp(values.nan_to_num(0.0, 0.0, 0.0)).exponent.double() - 1
    return torch.exp2(exponent.clamp(min=smallest) - digits - 1)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class BaseTensor:
    """A parameter or buffer of the plain base.

    Attributes:
        dtype: Name of the dtype, or of the weight format if the tensor is quantized.
        key: Identifier of the tensor; a shared tensor has the same key under each of its names.
        source: The tensor (…), or the quantized weight.
    """

    shape: tuple[int, ...]
    dtype: str
    key: int
    source: Tensor | QuantizedWeight
    is_buffer: bool = False

    def is_readable(self, elsewhere: bool) -> bool:
        """Return whether the values can be read, perhaps `elsewhere`, for plain tensors on the meta device."""
        if isinstance(self.source, Tensor):
            is_here = elsewhere or not (self.source.is_meta or is_shard(self.source))
            return self.source.is_floating_point() and is_here
        return not any(tensor.is_meta for tensor in self.source.base.tensors(self.source.stored))

    @property
    def device(self) -> torch.device:
        """The device on which `bits` expects the positions."""
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    def bits(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read the values at the given positions (n,) of the flattened tensor, which are on `device`.

        Returns:
            Bit patterns (n,) as integers of the dtype's width (fp32 for a quantized weight); and the largest possible
            quantization error of each value (n,), or None if the tensor is not quantized.
        """
        if not isinstance(self.source, Tensor):
            rows, columns = self.source.shape
            if self.shape != (rows, columns):  # the plain base stores this weight as (in, out)
                positions = positions % rows * columns + positions // rows
            values, bound = self.source.base.values(self.source.stored, positions)
            return values.float().view(torch.int32), bound
        tensor = self.source.detach()
        if type(tensor) is Tensor and tensor.is_contiguous():
            return tensor.view(-1).view(_BITS[tensor.element_size()])[positions], None
        values = tensor[torch.unravel_index(positions, tensor.shape)].contiguous()
        return values.view(_BITS[values.element_size()]), None


def plain_tensor(tensor: Tensor, cut: Mapping[int, int], is_buffer: bool = False) -> BaseTensor:
    """Return an unquantized tensor of the base (any shape) as a `BaseTensor`.

    `cut` is the id of a tensor -> number of leading rows to use; all rows are used if the tensor is not listed.
    """
    used = tensor[: cut[id(tensor)]] if id(tensor) in cut else tensor
    return BaseTensor(tuple(used.shape), str(tensor.dtype).removeprefix("torch."), id(tensor), used, is_buffer)


def tensors_of_base(index: AdapterIndex, cut: Mapping[int, int]) -> dict[str, BaseTensor]:
    """Return a base's parameters and persistent buffers by name in the plain base, cut as in `plain_tensor`."""
    quantized = {weight.packed: weight for weight in quantized_weights(index, stacked=False)}
    companions = {name for weight in quantized.values() for name in weight.companions}
    tensors = {}
    for name, tensor, module in base_tensors(index, stacked=False):
        if name in companions:
            continue
        weight = quantized.get(name)
        if weight is None:
            tensors[name] = plain_tensor(tensor, cut, is_buffer=name.rpartition(".")[2] not in module._parameters)
            continue
        transposed = getattr(weight.module, "source_cls", nn.Linear).__name__ == CONV1D
        shape = weight.shape[::-1] if transposed else weight.shape
        tensors[weight.name] = BaseTensor(shape, weight.base.name, id(weight.module), weight)
        if weight.plain_bias is not None:
            tensors[weight.name.removesuffix("weight") + "bias"] = plain_tensor(weight.plain_bias, {})
    return tensors


NUMBERS = 64
"""Number of values sampled per tensor; smaller tensors are sampled in full."""

LEAST, BUDGET, MOST_TENSORS = 4, 1 << 18, 1 << 16
"""Limits for large models: if there are more than 4,096 tensors, `BUDGET` samples are divided among them, with at least
`LEAST` for each; if there are more than `MOST_TENSORS`, only an evenly spaced selection of tensors is sampled."""

MOST_SLICES = 512
"""A three-axis tensor with at most this many slices (experts) along its first axis has every slice sampled."""

EXACT, ROUNDED, QUANTIZED, APART = "exact", "rounded", "quantized", "apart"
"""Degrees of agreement between two samples: exact, after rounding, within the quantization errors, or none."""

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})


@dataclass(frozen=True)
class Sample:
    """The sampled values of one tensor.

    Attributes:
        dtype: Name of the tensor's dtype, or of its weight format.
        bits: The values in that dtype (fp32 for a quantized weight), in little-endian format, ordered by position.
        bound: Maximum quantization error of each value, in bf16; empty if the tensor is not quantized.
    """

    dtype: str
    bits: bytes
    bound: bytes = b""

    @classmethod
    def of(cls, values: Tensor) -> Sample:
        """Return the sample of floating-point values (n,)."""
        data = values.contiguous().view(torch.uint8).numpy().tobytes()
        return cls(str(values.dtype).removeprefix("torch."), data)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of `bits`."""
        return getattr(torch, self.dtype) if self.dtype in _FLOATS else torch.float32

    def values(self) -> Tensor:
        """Return the sampled values (n,) in fp64."""
        return _decoded(self.bits, self.torch_dtype)

    def slack(self) -> Tensor:
        """Return each value's maximum quantization error (n,) in fp64, or a scalar 0 if the tensor is not quantized."""
        return _decoded(self.bound, torch.bfloat16) if self.bound else torch.zeros((), dtype=torch.float64)

    def is_sound(self) -> bool:
        """Return whether the lengths of `bits` and `bound` match the dtype and each other."""
        width = self.torch_dtype.itemsize
        count = len(self.bits) // width
        return len(self.bits) == width * count and len(self.bound) in (0, 2 * count)

    def without(self, indices: Iterable[int]) -> Sample:
        """Return a copy of the sample with the values at the given indices set to zero."""
        bits, bound, width = bytearray(self.bits), bytearray(self.bound), self.torch_dtype.itemsize
        for index in indices:
            bits[width * index : width * (index + 1)] = bytes(width)
            if bound:
                bound[2 * index : 2 * index + 2] = bytes(2)
        return Sample(self.dtype, bytes(bits), bytes(bound))


def _within_bounds(one: Sample, other: Sample, tolerance: Tensor | float = 0.0) -> Tensor:
    """Return a mask (n,) that is true where samples differ by at most their quantization errors plus a tolerance."""
    slack = (one.slack() + other.slack()) * (1 + 2**-6)  # the bounds were also rounded
    return (one.values() - other.values()).abs() <= slack + tolerance


def agreement(one: Sample, other: Sample) -> str:
    """Return how closely two samples at the same positions agree: `EXACT`, `ROUNDED`, `QUANTIZED` or `APART`."""
    if one == other:
        return EXACT
    first, second = one.values(), other.values()
    if first.shape != second.shape:
        return APART
    if one.bound or other.bound:
        step = torch.maximum(first.abs(), second.abs()) * 2**-8  # allows for one rounding to bf16 before quantization
        return QUANTIZED if bool(_within_bounds(one, other, step).all()) else APART
    if equal(first, second):
        return EXACT if one.dtype == other.dtype else ROUNDED
    return ROUNDED if agree_after_rounding(first, second) else APART


def positions(tensors: Sequence[tuple[str, tuple[int, ...]]], count: int) -> Tensor:
    """Return the positions (tensors, count) to sample in each named, flattened tensor, in ascending order.

    The first and last positions are included; each tensor has at least `count` values, which is at least 1.
    """
    seeds = [f"{name} {'x'.join(map(str, shape))}".encode() for name, shape in tensors]
    drawn = b"".join(hashlib.shake_128(seed).digest(4 * count) for seed in seeds)
    steps = (torch.frombuffer(bytearray(drawn), dtype=torch.int32).long() & 0xFFFFFFFF).view(-1, count)
    sizes = torch.tensor([math.prod(shape) for _, shape in tensors]).unsqueeze(1)
    edges = torch.arange(count + 1) * sizes // count
    sampled = edges[:, :-1] + steps % (edges[:, 1:] - edges[:, :-1])
    sampled[:, -1] = sizes[:, 0] - 1
    sampled[:, 0] = 0
    return sampled


def sample_count(shape: tuple[int, ...], tensors: int) -> int:
    """Return the number of values to sample from a tensor of this shape, if this number of tensors is sampled."""
    wanted = max(LEAST, min(NUMBERS, BUDGET // max(1, tensors)))
    if len(shape) == 3 and wanted == NUMBERS and 0 < shape[0] <= MOST_SLICES:
        wanted = shape[0] * -(-NUMBERS // shape[0])  # a multiple of shape[0], so no range spans two slices
    return min(math.prod(shape), wanted)


def take_samples(tensors: Mapping[str, BaseTensor], read: Callable[[str], Tensor] | None) -> dict[str, Sample]:
    """Sample tensors, using one copy to the CPU per device and dtype width.

    `read` maps a name to a tensor (…), for tensors on the meta device; None if the tensors have values.
    """
    names = sorted(tensors)
    names = names[:: max(1, -(-len(names) // MOST_TENSORS))]
    groups: dict[tuple[int, torch.device], list[str]] = {}
    for name in names:
        device = tensors[name].device if read is None else torch.device("cpu")
        groups.setdefault((sample_count(tensors[name].shape, len(names)), device), []).append(name)
    dtypes, bits, bounds = {}, {}, {}
    for (count, device), members in groups.items():
        if not count:
            continue
        sampled = positions([(name, tensors[name].shape) for name in members], count).to(device)
        for name, here in zip(members, sampled.unbind(), strict=True):
            tensor = tensors[name] if read is None else plain_tensor(read(name), {})
            dtypes[name] = tensor.dtype
            bits[name], bound = tensor.bits(here)
            if bound is not None:
                bounds[name] = bound.to(torch.bfloat16).view(torch.int16)
    data, bound_data = _copied(bits), _copied(bounds)
    return {name: Sample(dtypes[name], data[name], bound_data.get(name, b"")) for name in sorted(data)}


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the raw bytes of small integer tensors (n,), using one copy to the CPU per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    copies: dict[str, bytes] = {}
    for (_, dtype), names in groups.items():
        data, start = torch.cat([tensors[name] for name in names]).cpu().numpy().tobytes(), 0
        for name in names:
            end = start + tensors[name].numel() * dtype.itemsize
            copies[name], start = data[start:end], end
    return copies


def _decoded(data: bytes, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.zeros(0, dtype=torch.float64)
    values = torch.frombuffer(bytearray(data), dtype=dtype)
    return values.to(torch.float32 if dtype.itemsize < 4 else dtype).double()


FIRST_TENSORS, FIRST_NUMBERS = 16, 16
"""Number of sampled tensors, and number of values (rounded to bf16) in each sample, for fingerprints in format 1.

Fingerprints in format 1 can still be compared, but with a weaker guarantee: changes to tensors that are not sampled
(including all norm weights and biases) and changes within one bf16 step are missed."""


def first_positions(shape: tuple[int, ...]) -> Tensor:
    """Return the positions (n,) at which format 1 samples a flattened tensor of this shape."""
    size = math.prod(shape)
    return torch.linspace(0, size - 1, min(FIRST_NUMBERS, size), dtype=torch.float64).long()


def take_first_samples(tensors: Mapping[str, BaseTensor], read: Callable[[str], Tensor] | None) -> dict[str, Sample]:
    """Sample matrices as specified by format 1; `read` is as in `take_samples`."""
    large = sorted(name for name, tensor in tensors.items() if len(tensor.shape) >= 2 and not tensor.is_buffer)
    samples = {}
    for name in large[:: max(1, len(large) // FIRST_TENSORS)][:FIRST_TENSORS]:
        tensor = tensors[name] if read is None else plain_tensor(read(name), {})
        bits, bound = tensor.bits(first_positions(tensor.shape).to(tensor.device))
        values = bits.view(tensor.source.dtype if isinstance(tensor.source, Tensor) else torch.float32)
        samples[name] = Sample("bfloat16", _as_bf16(values), b"" if bound is None else _as_bf16(bound))
    return samples


def first_agreement(one: Sample, other: Sample) -> str:
    """Return how closely two samples in format 1 agree: `EXACT`, `QUANTIZED` or `APART`.

    Values that differ by at most one bf16 step count as equal.
    """
    if len(one.bits) != len(other.bits) or not (one.is_sound() and other.is_sound()):
        return APART
    near = (_order(one) - _order(other)).abs() <= 1
    if bool(near.all()):
        return EXACT
    return QUANTIZED if bool((near | _within_bounds(one, other)).all()) else APART


def as_hex(bits: bytes) -> str:
    """Encode bf16 bit patterns as hexadecimal text, with four digits per value."""
    return _swapped(bits).hex()


def from_hex(text: str) -> bytes:
    """Decode the output of `as_hex`; raise a ValueError unless it consists of four-digit hexadecimal patterns."""
    if len(text) % 4:
        raise ValueError("the length is not a multiple of 4")
    return _swapped(bytes.fromhex(text))


def _swapped(bits: bytes) -> bytes:
    swapped = bytearray(bits)
    swapped[::2], swapped[1::2] = bits[1::2], bits[::2]
    return bytes(swapped)


def _as_bf16(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()


def _order(sample: Sample) -> Tensor:
    """Map bf16 values to integers (n,) in the same order, with adjacent bf16 numbers mapped to adjacent integers."""
    if not sample.bits:
        return torch.zeros(0, dtype=torch.int64)
    patterns = torch.frombuffer(bytearray(sample.bits), dtype=torch.int16).long()
    return torch.where(patterns < 0, -(patterns & 0x7FFF), patterns)
