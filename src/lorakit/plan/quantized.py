"""Storage formats of a quantized base, and the exact size of each weight; `STORAGES` defines `--quantization`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorakit.architectures.layouts import is_inside
from lorakit.architectures.shapes import ModelShape, SiteShape
from lorakit.choices import DENSE, LINEAR
from lorakit.errors import ConfigError

BLOCK, DOUBLE_BLOCK = 64, 256
"""Elements per scale in 4-bit and HQQ weights, and scales per second-level scale in double quantization."""

_FP32, _CODE, _DOUBLE_CODE = 4, 16, 256


@dataclass(frozen=True)
class Storage:
    """A storage format of quantized weights.

    Attributes:
        package: Package that implements the format.
        bits: Bits per element, without scales.
        kinds: Kinds of modules that the format supports.
        doubles: Whether the scales can be quantized too (double quantization).
        keeps: What the matmul saves for the backward pass: "nothing", its "input", or the "weight" in the compute
            dtype.
        size: (rows, columns, bytes per element in the compute dtype, double quantization) -> size in bytes.
        decode_bytes: Bytes per element that exist at once while a weight is dequantized; 0 if directly to the compute
            dtype.
    """

    name: str
    package: str
    meaning: str
    bits: int
    kinds: tuple[str, ...]
    doubles: bool
    keeps: Literal["nothing", "input", "weight"]
    size: Callable[[int, int, int, bool], int]
    decode_bytes: int = 0


def _four_bit(rows: int, columns: int, _: int, double: bool) -> int:
    """Return the size in bytes of packed elements (two per byte), 16 code values, and one scale per 64 elements.

    Scales are fp32 or, with double quantization, 8-bit with one fp32 scale per 256 scales.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    elements = rows * columns
    blocks = -(-elements // BLOCK)
    packed = -(-elements // 2) + _FP32 * _CODE
    if not double:
        return packed + _FP32 * blocks
    return packed + blocks + _FP32 * -(-blocks // DOUBLE_BLOCK) + _FP32 + _FP32 * _DOUBLE_CODE


def _rows_of_int8(rows: int, columns: int, _: int, __: bool) -> int:
    """Return the size in bytes of int8 elements and one fp32 scale per row.

    Source:
        Dettmers et al. 2022, arXiv:2208.07339, section 2.1.
    """
    return rows * columns + _FP32 * rows


def _torchao_int8(rows: int, columns: int, _: int, __: bool) -> int:
    return rows * columns + (_FP32 + 1) * rows  # an fp32 scale and a one-byte zero point per row


def _hqq(bits: int) -> Callable[[int, int, int, bool], int]:
    """Return a function that computes the size of packed elements, with a scale and a zero point per 64 elements.

    Scales and zero points are stored in the compute dtype.

    Source:
        Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models.
    """

    def size(rows: int, columns: int, number: int, _: bool) -> int:
        return rows * columns * bits // 8 + 2 * number * (rows * columns // BLOCK)

    return size


_LINEAR = (LINEAR,)

STORAGES: tuple[Storage, ...] = (
    Storage("nf4", "bitsandbytes", "4 bits, quantiles of a normal distribution", 4, DENSE, True, "nothing", _four_bit),
    Storage("fp4", "bitsandbytes", "4 bits, floating point", 4, DENSE, True, "nothing", _four_bit),
    Storage("int8", "bitsandbytes", "8 bits, one scale per row", 8, DENSE, False, "input", _rows_of_int8),
    Storage("int8-torchao", "torchao", "8 bits, one scale per row", 8, _LINEAR, False, "weight", _torchao_int8),
    Storage("hqq4", "hqq", "4 bits, scale and zero point per 64 values", 4, _LINEAR, False, "input", _hqq(4)),
    Storage("hqq8", "hqq", "8 bits, scale and zero point per 64 values", 8, _LINEAR, False, "input", _hqq(8)),
)

_NAMED = {storage.name: storage for storage in STORAGES}


def storage_named(name: str) -> Storage:
    """Return the storage format with this name; the ConfigError for another one suggests the closest."""
    if name not in _NAMED:
        raise ConfigError.of("quantization", name, allowed=_NAMED)
    return _NAMED[name]


@dataclass(frozen=True)
class Quantization:
    """Quantization of a base by a name in `STORAGES` (a ConfigError otherwise); `double` only where supported."""

    name: str
    double: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "double", self.double and self.storage.doubles)

    @property
    def storage(self) -> Storage:
        """Return the storage format called `name`."""
        return storage_named(self.name)

    def description(self) -> str:
        """Return the format as text, such as "nf4 with double quantization"."""
        return f"{self.name} with double quantization" if self.double else self.name


def stored_as(name: str | None, double: bool = True) -> Quantization | None:
    """Return the quantization specified by two settings, or None for an unquantized base."""
    return None if name is None else Quantization(name, double)


def quantized_sites(shape: ModelShape, storage: Storage) -> tuple[SiteShape, ...]:
    """Return the modules that are quantized: those that "all-linear" selects and that the format supports.

    Modules that the model's task trains in full are not quantized.
    """
    possible = (s for s in shape.sites if s.dense and s.kind in storage.kinds and s.tied_to is None)
    return tuple(site for site in possible if not is_inside(site.path, shape.full_modules))


@dataclass(frozen=True)
class StoredBase:
    """Size of a quantized base: its quantized sites, their bytes, and the number of all parameters of the model."""

    storage: Storage
    sites: tuple[SiteShape, ...]
    size_bytes: int
    parameters: int

    @property
    def elements(self) -> int:
        """Return the number of elements in the quantized weights."""
        return sum(site.weight_parameters for site in self.sites)

    @property
    def rest(self) -> int:
        """Return the number of parameters that are not quantized."""
        return self.parameters - self.elements

    @property
    def largest(self) -> int:
        """Return the number of elements in the largest quantized weight."""
        return max(site.weight_parameters for site in self.sites)


def stored(shape: ModelShape, name: str, itemsize: int, double: bool) -> StoredBase:
    """Return the size of a base in a format; the other weights have `itemsize` bytes per element. [docs/math.md (28)]

    Raises:
        ConfigError: The name is unknown, or no module of this model can be stored in this format.
    """
    storage = storage_named(name)
    sites = quantized_sites(shape, storage)
    if not sites:
        possible = [other.name for other in STORAGES if quantized_sites(shape, other)]
        remedy = (
            f"Omit it, or use a format that supports this model: {', '.join(possible)}." if possible else "Omit it."
        )
        text = (
            f"{shape.name}: quantization {name!r} supports {' and '.join(storage.kinds)} modules, and this "
            f"{shape.architecture} has none apart from its output head. {remedy}"
        )
        raise ConfigError(text, what=name, where=shape.name, field="quantization", allowed=possible)
    sizes = [storage.size(s.out_features, s.in_features, itemsize, double and storage.doubles) for s in sites]
    return StoredBase(storage, sites, sum(sizes), shape.parameters)
