"""Every cell of the product that is not compared, by rule, each with its reason and with what that library says.

A test fails for a cell that a library rejects without a rule, and for a rule whose cell is no longer rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from lorakit.core.kinds import kind_named
from lorakit.core.quantization import WEIGHT_FORMATS
from lorakit.core.variants import variant_named

from .cells import Cell

DENSE = ("Linear", "Conv1D")
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
NOT_LOFTQ = (*CONVOLUTIONS, "Embedding")
QUANTIZED = tuple(base.name for base in WEIGHT_FORMATS if base.quantized)
BITSANDBYTES = ("bitsandbytes 4-bit", "bitsandbytes 8-bit")
DECOMPOSING = ("pissa", "olora", "orthogonal", "corda", "loftq", "mica")
"""Inits that read the base weight."""


@dataclass(frozen=True)
class Refusal:
    """Cells that one library rejects or creates differently.

    Attributes:
        reason: Why.
        holds: Whether a cell is one of them.
        text: A regular expression for the message.
        how: "raises" when the adapter is created or first used; "warns" and continues; or "ignores": silently uses
            init True.
    """

    reason: str
    holds: Callable[[Cell], bool]
    text: str = ""
    how: Literal["raises", "warns", "ignores"] = "raises"


def _kinds(cell: Cell) -> set[str]:
    """Return the kinds of the sites that its targets adapt."""
    return {cell.kind, "InnerLinear"} if cell.kind == "MultiheadAttention" else {cell.kind}


def _moves(cell: Cell) -> bool:
    """Return whether the init or the variant changes the base."""
    return cell.rules.changes_base or variant_named(cell.variant).move is not None


BY_LORAKIT: tuple[Refusal, ...] = (
    Refusal(
        "the entry of INITS does not support the kind",
        lambda cell: (
            not all(cell.rules.fits(kind_named(kind)) for kind in _kinds(cell))
            and (cell.init != "eva" or cell.kind == "Parameter")
        ),
        "does not support init_lora_weights|No supported layers found for",
    ),
    Refusal(
        "PEFT's two steps support only Linear and Conv1D; lorakit.core.collect_for takes every kind of the entry",
        lambda cell: cell.init in ("corda", "lora_ga") and cell.kind not in DENSE,
        "No supported layers found for",
    ),
    Refusal(
        "likewise; as in PEFT other sites use the default init, here with a warning",
        lambda cell: cell.init == "eva" and cell.kind not in (*DENSE, "Parameter"),
        "were initialized with init_lora_weights=True because they were not found in the eva state_dict",
        how="warns",
    ),
    Refusal(
        "the entry of VARIANTS does not support the kind",
        lambda cell: not all(variant_named(cell.variant).fits(kind_named(kind)) for kind in _kinds(cell)),
        r"does not support (DoRA|aLoRA|KaSA|BD-LoRA|VeLoRA|QA-LoRA|MonteCLoRA);",
    ),
    Refusal(
        "before its invocation aLoRA is the base, which the init changed; peft uses the changed base there",
        lambda cell: cell.rules.changes_base and not variant_named(cell.variant).is_mergeable,
        "changes the base weight, and aLoRA needs it unchanged wherever the adapter is inactive",
    ),
    Refusal(
        "BD-LoRA's blocks and QA-LoRA's A have other shapes than A and B that are made of the base or the data",
        lambda cell: variant_named(cell.variant).parts.shapes is not None and not cell.rules.takes_any_shape,
        "needs A and B in their standard shapes, (and|unlike) (BD-LoRA|QA-LoRA)",
    ),
    Refusal(
        "KaSA changes the base itself",
        lambda cell: cell.rules.changes_base and variant_named(cell.variant).move is not None,
        "changes the base weight, and KaSA changes it too",
    ),
    Refusal(
        "saving as plain LoRA doubles the rank, and MonteCLoRA's tensors depend on it",
        lambda cell: cell.variant == "monteclora" and cell.rules.changes_base,
        "MonteCLoRA has tensors whose shape depends on the rank",
    ),
    Refusal(
        "a variant's residual of a quantized weight would have to be requantized",
        lambda cell: variant_named(cell.variant).move is not None and cell.base in QUANTIZED,
        "KaSA changes the base weight, but the weight is quantized",
    ),
    Refusal(
        "an init's residual of a quantized weight would have to be requantized",
        lambda cell: cell.rules.changes_base and not cell.rules.requantizes and cell.base in QUANTIZED,
        "but the weight is quantized|does not support quantized modules",
    ),
    Refusal(
        "a computed weight cannot be written; peft changes the tensors of its parametrization",
        lambda cell: _moves(cell) and cell.base.startswith("computed"),
        r"computed by torch\.nn\.utils\.parametrize or prune, so it cannot be written",
    ),
    Refusal(
        "outside causal models peft has no offsets for aLoRA and never lets it act",
        lambda cell: cell.variant == "alora" and not cell.place.is_causal,
        "aLoRA is currently only supported for CAUSAL_LM",
        how="warns",
    ),
)


def _is_packed(cell: Cell) -> bool:
    """Return whether peft has a separate layer for the format, without the variants of its plain one."""
    return cell.base in (*BITSANDBYTES, "HQQ")


def _reads_a_weight(cell: Cell) -> bool:
    return cell.init in DECOMPOSING and (
        cell.kind == "Parameter" or (cell.kind == "MultiheadAttention" and cell.init != "loftq")
    )


BY_PEFT: tuple[Refusal, ...] = (
    Refusal(
        "aLoRA is there for Linear and Conv1D alone, and not together with MiCA, which is a variant there",
        lambda cell: cell.variant == "alora" and (cell.kind not in DENSE or cell.init == "mica"),
        "Invalid or unsupported variant combination: .*alora_invocation_tokens",
    ),
    Refusal(
        "aLoRA adds in place to what a kernel returned, or hands its offsets to one that takes none",
        lambda cell: cell.variant == "alora" and cell.base in ("bitsandbytes 8-bit", "HQQ"),
        "is being modified inplace|unexpected keyword argument 'alora_offsets'",
    ),
    Refusal(
        "DoRA dequantizes an 8-bit weight in each forward, and the second forward does not find its scales",
        lambda cell: cell.variant == "dora" and cell.base == "bitsandbytes 8-bit",
        "'NoneType' object has no attribute 'dtype'",
    ),
    Refusal(
        "OPT flattens all rows before fc1, and aLoRA's offsets are per row",
        lambda cell: cell.variant == "alora" and cell.place.model == "opt-words",
        "does not match the shape of the indexed tensor",
    ),
    Refusal(
        "Whisper asks its convolutions for their stride, which peft's layer does not have",
        lambda cell: cell.kind == "Conv1d" and cell.place.model == "whisper-speech",
        "has no attribute 'stride'",
    ),
    Refusal(
        "MiCA is a variant there, so it excludes other variants",
        lambda cell: cell.init == "mica" and cell.variant in ("dora", "kasa", "bdlora", "velora", "monteclora"),
        "Invalid or unsupported variant combination: .*mica",
    ),
    Refusal(
        "MiCA is there for Linear, Conv1D and Embedding",
        lambda cell: cell.init == "mica" and cell.kind not in (*DENSE, "Embedding"),
        "Invalid or unsupported variant combination: .*mica",
    ),
    Refusal(
        "KaSA is there for Linear alone",
        lambda cell: cell.variant == "kasa" and cell.kind != "Linear",
        "does not support KaSA|`kasa_config` is set|KaSA does not support|variant combination: .*kasa_config",
    ),
    Refusal(
        "VeLoRA is there for Linear and Conv1D alone, and not for most packed weights",
        lambda cell: cell.variant == "velora" and (cell.kind not in DENSE or _is_packed(cell)),
        "does not support VeLoRA|VeLoRA does not support|`velora_config` is set|variant combination: .*velora_config",
    ),
    Refusal(
        "MonteCLoRA is there for Linear and Conv1D alone",
        lambda cell: cell.variant == "monteclora" and cell.kind not in DENSE,
        "variant combination: .*monteclora_config",
    ),
    Refusal(
        "on a quantized weight MonteCLoRA is silently plain LoRA in peft",
        lambda cell: cell.variant == "monteclora" and _is_packed(cell),
        how="ignores",
    ),
    Refusal(
        "QA-LoRA is silently plain LoRA, except on nn.Linear, which `Cell.configured` gives peft's GPTQ layer",
        lambda cell: cell.variant == "qalora" and (cell.kind != "Linear" or cell.base == "HQQ"),
        how="ignores",
    ),
    Refusal(
        "these inits ask for an attribute that peft's GPTQ layer does not have",
        lambda cell: (
            cell.variant == "qalora" and cell.kind == "Linear" and cell.init in ("pissa", "corda", "lora_ga", "mica")
        ),
        "'GPTQLoraLinear' object has no attribute 'fan_in_fan_out'",
    ),
    Refusal(
        "BD-LoRA is there for Linear alone",
        lambda cell: cell.variant == "bdlora" and cell.kind != "Linear",
        "has no attribute 'in_features'|variant combination: .*use_bdlora",
    ),
    Refusal(
        "on a quantized weight BD-LoRA is silently plain LoRA in peft",
        lambda cell: cell.variant == "bdlora" and _is_packed(cell),
        how="ignores",
    ),
    Refusal(
        "EVA writes directions of the whole input into BD-LoRA's blocks and QA-LoRA's A",
        lambda cell: (
            cell.init == "eva"
            and cell.kind == "Linear"
            and (
                (cell.variant == "bdlora" and not _is_packed(cell)) or (cell.variant == "qalora" and cell.base != "HQQ")
            )
        ),
        "must match the size of tensor",
    ),
    Refusal(
        "KaSA decomposes the packed weight of torchao",
        lambda cell: cell.variant == "kasa" and cell.base == "torchao",
        "unimplemented operator",
    ),
    Refusal(
        "DoRA does not support bare parameters and attention",
        lambda cell: cell.variant == "dora" and cell.kind in ("Parameter", "MultiheadAttention"),
        "does not work with use_dora|does not support DoRA",
    ),
    Refusal(
        "LoftQ is computed on a CUDA device",
        lambda cell: cell.init == "loftq" and cell.kind not in NOT_LOFTQ and not torch.cuda.is_available(),
        "not compiled with CUDA|NVIDIA driver|CUDA",
    ),
    Refusal(
        "LoftQ of these kinds is called without an argument that it needs",
        lambda cell: cell.init == "loftq" and cell.kind in NOT_LOFTQ,
        "loftq_init.* missing 1 required positional argument",
    ),
    Refusal(
        "LoRA-GA supports only Linear and Conv1D",
        lambda cell: cell.init == "lora_ga" and (cell.kind not in DENSE or cell.base == "HQQ"),
        "No supported layers found for LoRA-GA",
    ),
    Refusal(
        "a quantized or computed weight has no gradient",
        lambda cell: cell.init == "lora_ga" and (cell.base in QUANTIZED or cell.base.startswith("computed")),
        "does not support quantized models|floating point and complex dtype|does not require grad",
    ),
    Refusal(
        "convolutions know True, False and gaussian alone",
        lambda cell: cell.kind in CONVOLUTIONS and cell.init in ("pissa", "olora", "orthogonal", "eva", "corda"),
        "Unknown initialization",
    ),
    Refusal(
        "inits that read a weight need one of that name",
        _reads_a_weight,
        "has no attribute 'weight'|`eigens` attribute not found",
    ),
    Refusal(
        "HQQ's layer has no weight of that name",
        lambda cell: cell.base == "HQQ" and cell.init in DECOMPOSING,
        "'HQQLinear' object has no attribute 'weight'",
    ),
    Refusal(
        "a packed weight is decomposed as if it were a plain one",
        lambda cell: cell.base in (*BITSANDBYTES, "torchao") and cell.init in DECOMPOSING and not _is_unpacked(cell),
        "under float32, float16, or bfloat16|loating point and complex dtype|unimplemented operator|shape",
    ),
    Refusal(
        "EVA needs layers with a separate input",
        lambda cell: cell.init == "eva" and cell.kind in ("MultiheadAttention", "Parameter"),
        "list index out of range|must match the size of tensor",
    ),
    Refusal(
        "OLoRA reads the weight of a Conv1D as if it were stored as (out, in)",
        lambda cell: cell.init == "olora" and cell.kind == "Conv1D",
        "must match the size of tensor|shapes cannot be multiplied",
    ),
    Refusal(
        "an Embedding accepts any value and uses the default init",
        lambda cell: cell.kind == "Embedding" and cell.init in ("pissa", "olora", "orthogonal", "corda"),
        how="ignores",
    ),
)


def _is_unpacked(cell: Cell) -> bool:
    """Return whether peft dequantizes the weight first, or only reads its dtype."""
    return (cell.init == "olora" and cell.base in BITSANDBYTES) or (
        cell.init == "orthogonal" and cell.base == "torchao"
    )


def refusals(cell: Cell, table: tuple[Refusal, ...]) -> list[Refusal]:
    """The rules of one library that name a cell; where one raises, the others are never reached."""
    found = [refusal for refusal in table if refusal.holds(cell)]
    return [refusal for refusal in found if refusal.how == "raises"] or found


def is_compared(cell: Cell) -> bool:
    """Return whether both libraries create it as specified."""
    return not refusals(cell, BY_LORAKIT) and not refusals(cell, BY_PEFT)
