"""Sizes and FLOPs of a base whose linear layers are multiplied in int8 (W8A8, `--base-matmul int8`)."""

from __future__ import annotations

from lorakit.architectures.layouts import block_of
from lorakit.architectures.shapes import ModelShape, SiteShape
from lorakit.choices import DENSE, KEPT_CHANNELS
from lorakit.errors import ConfigError
from lorakit.plan.accelerated import family_of
from lorakit.plan.job import Job
from lorakit.plan.quantized import Storage, StoredBase, quantized_sites

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
    elements = sum(site.weight_parameters for site in sites)
    return StoredBase(W8A8, sites, elements, size, shape.parameters - elements)


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
