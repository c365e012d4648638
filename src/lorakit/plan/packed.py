"""Sizes of models whose files are quantized, and sizes and FLOPs of a base multiplied in int8 (`--base-matmul int8`).
int8`).

`lorakit.hub` keeps the linear layers of files in some formats packed, and dequantizes other weights while they are
loaded. The sizes follow from the quantization config of the files and the model's shape. Expressions in a config are
not evaluated: names with the wildcard `.*` are compared, and any other pattern is reported in a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lorakit.architectures.layouts import block_of
from lorakit.architectures.shapes import ModelShape, SiteShape
from lorakit.choices import DENSE, KEPT_CHANNELS, LINEAR
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import ConfigError
from lorakit.plan.accelerated import family_of
from lorakit.plan.job import Job
from lorakit.plan.quantized import Storage, StoredBase, quantized_sites, stored

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element of unquantized weights in files, by dtype; 4 for other dtypes."""

_WORD, _WORD_BYTES, _HALF, _FP32, _FP8_BLOCK = 32, 4, 2, 4, (128, 128)
_MXFP4_GROUP = 32

Size = Callable[[int, int], int]
"""(rows, columns) -> size of a packed weight in bytes."""


@dataclass(frozen=True)
class PackedFormat:
    """The way in which the files of one quantization method store weights.

    Attributes:
        size: (quantization config, bytes per element of unquantized weights) -> function that returns a weight's size.
        decode_bytes: Largest number of bytes per element that exist at once while a weight is dequantized in fp32, with
            its scales.
        left_out: Key of the config that lists the modules that are not quantized.
        bits: Bits per element, without scales, or None if the config gives them.
        is_kept: Whether the weights of linear layers stay packed in memory.
        has_experts: Whether fused experts are quantized too; a model with them is dequantized while it is loaded.
        spanning_bytes: Like `decode_bytes`, for codes that can span two words.
    """

    size: Callable[[JsonObject, int], Size]
    decode_bytes: int
    left_out: str
    bits: int | None = None
    is_kept: bool = True
    has_experts: bool = False
    has_linears: bool = True
    spanning_bytes: int = 0


def _gptq(values: JsonObject, _: int) -> Size:
    """Return the size of codes, zero points, fp16 scales, and the group of each input feature."""
    bits, group = _number(values, "bits", 4), _number(values, "group_size", 128)

    def size(rows: int, columns: int) -> int:
        groups = -(-columns // group) if group > 0 else 1
        codes, zeros = _words(columns * bits) * rows, groups * _words(rows * bits)
        return _WORD_BYTES * (codes + zeros + columns) + _HALF * groups * rows

    return size


def _awq(values: JsonObject, _: int) -> Size:
    """Return the size of codes, zero points and fp16 scales."""
    bits = _number(values, "bits", _number(values, "w_bit", 4))
    group = _number(values, "group_size", _number(values, "q_group_size", 128))

    def size(rows: int, columns: int) -> int:
        groups = -(-columns // group) if group > 0 else 1
        return _WORD_BYTES * (columns + groups) * _words(rows * bits) + _HALF * groups * rows

    return size


def _compressed(values: JsonObject, itemsize: int) -> Size:
    """Return the size of one byte per value, scales in the dtype of the files, and zero points of one byte."""
    weights = _weights_of_group(values)
    strategy, group = weights.get("strategy"), _number(weights, "group_size", 128)
    block = _pair(weights.get("block_structure"))
    each = itemsize + (0 if weights.get("symmetric", True) else 1)

    def size(rows: int, columns: int) -> int:
        counts = {
            "tensor": 1,
            "group": rows * -(-columns // max(group, 1)),
            "block": -(-rows // block[0]) * -(-columns // block[1]),
        }
        return rows * columns + each * counts.get(str(strategy), rows)

    return size


def _fp8(values: JsonObject, _: int) -> Size:
    """Return the size of one byte per value and fp32 scales."""
    has_blocks = values.get("weight_block_size") is not None or "weight_block_size" not in values
    block = _pair(values.get("weight_block_size"))

    def size(rows: int, columns: int) -> int:
        scales = -(-rows // block[0]) * -(-columns // block[1]) if has_blocks else 1
        return rows * columns + _FP32 * scales

    return size


def _mxfp4(_: JsonObject, __: int) -> Size:
    """Return the size of half a byte per value and one byte per 32 values."""
    return lambda rows, columns: rows * columns // 2 + rows * columns // _MXFP4_GROUP


FORMATS: Mapping[str, PackedFormat] = {
    "gptq": PackedFormat(_gptq, 12, "modules_not_quantized", spanning_bytes=25),
    "awq": PackedFormat(_awq, 12, "modules_to_not_convert", bits=4),
    "compressed-tensors": PackedFormat(_compressed, 12, "ignore", bits=8),
    "fp8": PackedFormat(_fp8, 12, "modules_to_not_convert", bits=8, has_experts=True),
    "mxfp4": PackedFormat(_mxfp4, 0, "modules_to_not_convert", 4, is_kept=False, has_experts=True, has_linears=False),
}
"""Quantization method of the files (`quant_method`) -> how they store weights."""


@dataclass(frozen=True)
class PackedFiles:
    """The quantized files of a model.

    Attributes:
        base: Sizes of the linear layers that stay quantized in memory, or None if they are dequantized while loaded.
        unread: Patterns of the config that were not evaluated.
    """

    base: StoredBase | None
    file_bytes: int
    method: str
    unread: tuple[str, ...] = ()

    def notes(self) -> Iterator[str]:
        """Yield messages for the user about assumptions of the sizes."""
        if self.base is None:
            yield f"The files are in {self.method}, and their weights are dequantized while they are loaded."
        if self.unread:
            yield (
                f"The quantization config leaves out modules by patterns that the plan does not evaluate "
                f"({', '.join(self.unread)}); it counts these modules as packed."
            )


def stored_base(shape: ModelShape, name: str | None, itemsize: int, double: bool) -> StoredBase | None:
    """Return the size of a base quantized while it is loaded, by `name` in `STORAGES`, or in its files; None if dense.

    Raises:
        ConfigError: The name is unknown, no module of this model can be stored in this format, or the files are already
            packed.
    """
    files = packed_files(shape)
    if name is not None and files is not None:
        text = f"{shape.name}: the files are already quantized ({files.method}); omit quantization {name!r}."
        raise ConfigError(text, what=name, where=shape.name, field="quantization")
    if name is not None:
        return stored(shape, name, itemsize, double)
    return None if files is None else files.base


def packed_files(shape: ModelShape) -> PackedFiles | None:
    """Return the sizes of a model's quantized files, or None if `FORMATS` lacks their method. [docs/math.md (28)]"""
    values = dict(shape.quantization)
    method = str(values.get("quant_method"))
    if method not in FORMATS:
        return None
    kind = FORMATS[method]
    itemsize = ITEM_BYTES.get(shape.dtype, _FP32)
    size = kind.size(values, itemsize)
    bits = kind.bits or _number(values, "bits", 4)
    storage = Storage(
        name=method,
        package="lorakit",
        meaning="packed in the files",
        bits=bits,
        kinds=(LINEAR,),
        doubles=False,
        keeps="nothing",
        size=lambda rows, columns, _, __: size(rows, columns),
        decode_bytes=kind.spanning_bytes if kind.spanning_bytes and _WORD % bits else kind.decode_bytes,
    )
    left_out, unread = _left_out(values, kind)
    linears = quantized_sites(shape, storage) if kind.has_linears else ()
    sites = tuple(s for s in linears if not any(fnmatchcase(f".{s.path}.", pattern) for pattern in left_out))
    experts = shape.expert_matrices if kind.has_experts else ()
    linear_bytes = sum(size(site.out_features, site.in_features) for site in sites)
    base = StoredBase(storage, sites, linear_bytes, shape.parameters)
    in_experts = sum(count * rows * columns for count, rows, columns in experts)
    packed = linear_bytes + sum(count * size(rows, columns) for count, rows, columns in experts)
    file_bytes = packed + itemsize * (base.rest - in_experts)
    is_kept = kind.is_kept and not experts and not values.get("dequantize") and bool(sites)
    return PackedFiles(base if is_kept else None, file_bytes, method, tuple(unread))


def _left_out(values: JsonObject, kind: PackedFormat) -> tuple[list[str], list[str]]:
    """Return patterns for `fnmatch` of the modules that a config leaves out, and patterns that were not evaluated.

    A name matches whole components of a path; the parts of a name around wildcards match in this order.
    """
    read, unread = list[str](), list[str]()
    names = values.get(kind.left_out)
    for name in names if isinstance(names, list) else ():
        text = str(name).removeprefix("re:").removeprefix("^").removesuffix("$").replace("\\.", ".")
        parts = text.split(".*")
        if re.fullmatch(r"[\w.-]*", "".join(parts)):
            read.append(f"*.{text}.*" if len(parts) == 1 else f"*{'*'.join(parts)}*")
        else:
            unread.append(str(name))
    return read, unread


def _weights_of_group(values: JsonObject) -> JsonObject:
    """Return the settings of the weights in the first group of a compressed-tensors config."""
    groups = values.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            return weights
    return {}


def _number(values: JsonObject, name: str, default: int) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else default


def _pair(value: JsonValue) -> tuple[int, int]:
    """Return the rows and columns of a block; those of DeepSeek's files if the value is not a pair of integers."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return int(value[0]), int(value[1])
    return _FP8_BLOCK


def _words(bits: int) -> int:
    return -(-bits // _WORD)


_FP32, _INT64 = 4, 8


def _values_scales_columns(rows: int, columns: int, itemsize: int, _: bool) -> int:
    """Return the size in bytes of int8 values, one fp32 scale per row, and the columns that keep their dtype."""
    return rows * columns + _FP32 * rows + itemsize * rows * min(KEPT_CHANNELS, columns)


W8A8 = Storage(
    name="int8 matmul (W8A8)",
    package="lorakit",
    meaning="8 bits, one scale per row and per column",
    bits=8,
    kinds=DENSE,
    doubles=False,
    keeps="nothing",
    size=_values_scales_columns,
)
"""Storage of a weight that is multiplied in int8, without what weights that read the same input share."""


def int8_sites(shape: ModelShape) -> tuple[SiteShape, ...]:
    """Return the modules that are multiplied in int8: the linear layers of the model's blocks, except for experts.

    Raises:
        ConfigError: The model has none.
    """
    in_blocks = (site for site in quantized_sites(shape, W8A8) if block_of(site.path) is not None)
    sites = tuple(site for site in in_blocks if ".experts." not in site.path)
    if not sites:
        text = (
            f"{shape.name}: base_matmul int8 supports {' and '.join(DENSE)} modules, and the blocks of this "
            f"{shape.architecture} have none; omit it."
        )
        raise ConfigError(text, what="int8", where=shape.name, field="base_matmul")
    return sites


def int8_base(shape: ModelShape, itemsize: int) -> StoredBase:
    """Return the size of a base whose linear layers are stored for int8 matmuls. [docs/math.md (108)]

    `itemsize` is that of the other weights and of the columns that are not quantized.

    Raises:
        ConfigError: The model has no layer that can be multiplied in int8.
    """
    sites, family = int8_sites(shape), family_of(shape)
    size = sum(W8A8.size(site.out_features, site.in_features, itemsize, False) for site in sites)
    widths = {family.group_of(site.path): site.in_features for site in sites}
    size += sum(_FP32 * width + _INT64 * min(KEPT_CHANNELS, width) for width in widths.values())
    return StoredBase(W8A8, sites, size, shape.parameters)


def int8_flops(shape: ModelShape, job: Job) -> float:
    """Return the FLOPs per token that a training step computes in int8. [docs/math.md (109)]

    These are the matmuls of the base's linear layers in the forward pass, for the gradient of their inputs, and in
    recomputed layers. What `recompute=feed-forward` recomputes is not included.
    """
    if job.base_matmul != "int8":
        return 0.0
    passes = 3 if job.gradient_checkpointing else 2
    return passes * 2.0 * sum(site.weight_parameters for site in int8_sites(shape))


def product_bytes(base: StoredBase, job: Job) -> int:
    """Return the size in bytes of an int8 matmul's quantized input and int32 product, in the widest layer."""
    return job.batch_tokens * max(site.in_features + _FP32 * site.out_features for site in base.sites)
