"""The ways in which a frozen base can be stored in fewer bits, and what each weight then takes: exact, by formula.

The words of `--quantization` are the names of this table. Knows nothing of the packages that do it, beyond their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorakit.architectures.shapes import ModelShape, SiteShape
from lorakit.errors import ConfigError, nearest
from lorakit.targets.layer_types import DENSE, LINEAR

BLOCK, DOUBLE_BLOCK = 64, 256
"""Numbers that share one scale in 4-bit and HQQ weights; scales that share one in double quantisation."""

_FP32, _CODE, _DOUBLE_CODE = 4, 16, 256


@dataclass(frozen=True)
class Storage:
    """One way to store a weight in fewer bits.

    Attributes:
        name: What `--quantization` takes.
        package: Package that does it.
        meaning: In a few words.
        bits: Bits of one number, scales apart.
        kinds: Kinds of modules that it takes.
        doubles: Whether the scales can be quantised too (double quantisation).
        keeps: What its product keeps of a site for the backward: "nothing" more, its "input", or the "weight" in the
            dtype of the products.
        size: Rows, columns, bytes of a number of the products, and whether the scales are quantised -> bytes.
    """

    name: str
    package: str
    meaning: str
    bits: int
    kinds: tuple[str, ...]
    doubles: bool
    keeps: Literal["nothing", "input", "weight"]
    size: Callable[[int, int, int, bool], int]


def _four_bit(rows: int, columns: int, _: int, double: bool) -> int:
    """Two numbers a byte, the 16 values, and a scale per 64: fp32, or one byte with an fp32 scale per 256 of them.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    numbers = rows * columns
    blocks = -(-numbers // BLOCK)
    packed = -(-numbers // 2) + _FP32 * _CODE
    if not double:
        return packed + _FP32 * blocks
    return packed + blocks + _FP32 * -(-blocks // DOUBLE_BLOCK) + _FP32 + _FP32 * _DOUBLE_CODE


def _rows_of_int8(rows: int, columns: int, _: int, __: bool) -> int:
    """One byte a number and an fp32 scale per row. Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.1."""
    return rows * columns + _FP32 * rows


def _torchao_int8(rows: int, columns: int, _: int, __: bool) -> int:
    return rows * columns + (_FP32 + 1) * rows  # a scale in fp32 and a zero point of one byte per row


def _hqq(bits: int) -> Callable[[int, int, int, bool], int]:
    """Packed numbers, and per 64 of them a scale and a zero point in the dtype of the products.

    Source:
        Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models.
    """

    def size(rows: int, columns: int, number: int, _: bool) -> int:
        return rows * columns * bits // 8 + 2 * number * (rows * columns // BLOCK)

    return size


_LINEAR = (LINEAR,)

STORAGES: tuple[Storage, ...] = (
    Storage("nf4", "bitsandbytes", "4 bits, values of a normal distribution", 4, DENSE, True, "nothing", _four_bit),
    Storage("fp4", "bitsandbytes", "4 bits, floating point", 4, DENSE, True, "nothing", _four_bit),
    Storage("int8", "bitsandbytes", "8 bits, a scale per row", 8, DENSE, False, "input", _rows_of_int8),
    Storage("int8-torchao", "torchao", "8 bits, a scale per row", 8, _LINEAR, False, "weight", _torchao_int8),
    Storage("hqq4", "hqq", "4 bits, scale and zero point per 64", 4, _LINEAR, False, "input", _hqq(4)),
    Storage("hqq8", "hqq", "8 bits, scale and zero point per 64", 8, _LINEAR, False, "input", _hqq(8)),
)

_NAMED = {storage.name: storage for storage in STORAGES}


def storage_named(name: str) -> Storage:
    """The way of storage with that name.

    Raises:
        ConfigError: There is none; the message gives the nearest.
    """
    if name not in _NAMED:
        hint = nearest(name, list(_NAMED), 1)
        raise ConfigError(
            f"quantization is {name!r}; it must be one of {', '.join(_NAMED)}"
            + (f". Did you mean {hint[0]}?" if hint else ".")
        )
    return _NAMED[name]


@dataclass(frozen=True)
class Quantization:
    """How a base shall be stored.

    Attributes:
        name: A name of `STORAGES`.
        double: Quantise the scales too; false where the storage cannot.

    Raises:
        ConfigError: There is no such storage.
    """

    name: str
    double: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "double", self.double and self.storage.doubles)

    @property
    def storage(self) -> Storage:
        """The row of `STORAGES`."""
        return storage_named(self.name)

    def words(self) -> str:
        """Such as "nf4 with double quantisation"."""
        return f"{self.name} with double quantisation" if self.double else self.name


def stored_as(name: str | None, double: bool = True) -> Quantization | None:
    """How a base shall be stored, from two settings.

    Args:
        name: A name of `STORAGES`, or None for as it is.
        double: Quantise the scales too, where the storage can.

    Raises:
        ConfigError: There is no such storage.
    """
    return None if name is None else Quantization(name, double)


def quantised_sites(shape: ModelShape, storage: Storage) -> tuple[SiteShape, ...]:
    """The modules of a model that are stored so: those that "all-linear" takes, which are not the output head.

    Args:
        shape: The model.
        storage: The way of storage.
    """
    return tuple(s for s in shape.sites if s.dense and s.kind in storage.kinds and s.tied_to is None)


@dataclass(frozen=True)
class StoredBase:
    """What a quantised base takes.

    Attributes:
        storage: The way of storage.
        sites: Weights that are stored so.
        numbers: Numbers in them.
        size_bytes: What they take.
        rest: Numbers of the base that stay as they are.
    """

    storage: Storage
    sites: tuple[SiteShape, ...]
    numbers: int
    size_bytes: int
    rest: int

    @property
    def paths(self) -> frozenset[str]:
        """Paths of the quantised weights' modules."""
        return frozenset(site.path for site in self.sites)

    @property
    def largest(self) -> int:
        """Numbers of the largest of these weights: what is multiplied out at once."""
        return max(site.weight_parameters for site in self.sites)


def stored(shape: ModelShape, name: str, number_bytes: int, double: bool) -> StoredBase:
    """The bytes of a base that is stored in fewer bits.   [docs/math.md (28)]

    Args:
        shape: The base.
        name: A name of `STORAGES`.
        number_bytes: Bytes of one number of what is not quantised, and of the products.
        double: Quantise the scales too, where the storage can.

    Raises:
        ConfigError: No such storage, or no module of this model can be stored so.
    """
    storage = storage_named(name)
    sites = quantised_sites(shape, storage)
    if not sites:
        raise ConfigError(
            f"{shape.name}: quantization {name!r} takes {' and '.join(storage.kinds)} modules, and this "
            f"{shape.architecture} has none beside its output head. Leave it out, or take one of "
            f"{', '.join(s.name for s in STORAGES if quantised_sites(shape, s)) or 'no other'}.",
            where=shape.name,
        )
    sizes = [storage.size(s.out_features, s.in_features, number_bytes, double and storage.doubles) for s in sites]
    numbers = sum(site.weight_parameters for site in sites)
    return StoredBase(storage, sites, numbers, sum(sizes), shape.parameters - numbers)
