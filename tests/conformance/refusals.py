"""Every cell of the product that is not compared, by rule, each with its reason and with what that library says.

A cell that a library refuses and that no rule of its names fails its test, and so does one that it no longer refuses.
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
QUANTISED = tuple(base.name for base in WEIGHT_FORMATS if base.quantized)
BITSANDBYTES = ("bitsandbytes 4-bit", "bitsandbytes 8-bit")
DECOMPOSING = ("pissa", "olora", "orthogonal", "corda", "loftq", "mica")
"""Inits that look at the base weight itself."""


@dataclass(frozen=True)
class Refusal:
    """Cells that one library does not make as asked.

    Attributes:
        reason: Why.
        holds: Whether a cell is one of them.
        text: A regular expression for what is said.
        how: "raises", when the adapter is made or used for the first time; "warns" and goes on; or "ignores": goes on
            as if the init were True, without a word.
    """

    reason: str
    holds: Callable[[Cell], bool]
    text: str = ""
    how: Literal["raises", "warns", "ignores"] = "raises"


def _kinds(cell: Cell) -> set[str]:
    """The kinds of the sites that naming its targets adapts."""
    return {cell.kind, "InnerLinear"} if cell.kind == "MultiheadAttention" else {cell.kind}


def _moves(cell: Cell) -> bool:
    """Whether the init or the variant moves the base."""
    return cell.rules.changes_base or variant_named(cell.variant).move is not None


BY_LORAKIT: tuple[Refusal, ...] = (
    Refusal(
        "the row of INITS does not name the kind",
        lambda cell: (
            not all(cell.rules.fits(kind_named(kind)) for kind in _kinds(cell))
            and (cell.init != "eva" or cell.kind == "Parameter")
        ),
        "does not support a|No supported layers found for",
    ),
    Refusal(
        "PEFT's two steps look at Linear and Conv1D alone; lorakit.core.collect_for takes every kind of the row",
        lambda cell: cell.init in ("corda", "lora_ga") and cell.kind not in DENSE,
        "No supported layers found for",
    ),
    Refusal(
        "likewise, and as in PEFT what was not looked at begins as usual; here with a word",
        lambda cell: cell.init == "eva" and cell.kind not in (*DENSE, "Parameter"),
        "were initialized with init_lora_weights=True because they were not found in the eva state_dict",
        how="warns",
    ),
    Refusal(
        "the row of VARIANTS does not name the kind",
        lambda cell: not all(variant_named(cell.variant).fits(kind_named(kind)) for kind in _kinds(cell)),
        r"(use_dora|alora_invocation_tokens|kasa_config|use_bdlora) at .*: (DoRA|aLoRA|KaSA|BD-LoRA) cannot act on a",
    ),
    Refusal(
        "before its invocation aLoRA is the base, which the init moved; peft answers with the moved base there",
        lambda cell: cell.rules.changes_base and not variant_named(cell.variant).is_mergeable,
        "changes the base weight, and aLoRA needs it unchanged before its start",
    ),
    Refusal(
        "BD-LoRA's blocks have other shapes than A and B that are made of the base or the data",
        lambda cell: cell.variant == "bdlora" and not cell.rules.takes_any_shape,
        "needs A and B in their usual shapes, and BD-LoRA has others",
    ),
    Refusal(
        "KaSA moves the base itself",
        lambda cell: cell.rules.changes_base and variant_named(cell.variant).move is not None,
        "changes the base weight, and KaSA changes it too",
    ),
    Refusal(
        "what a variant leaves of a weight in few bits would be rounded a second time",
        lambda cell: variant_named(cell.variant).move is not None and cell.base in QUANTISED,
        "KaSA changes the base weight, and this one is quantized",
    ),
    Refusal(
        "what is left of a weight in few bits would be rounded a second time",
        lambda cell: cell.rules.changes_base and not cell.rules.requantizes and cell.base in QUANTISED,
        "and this one is quantized|does not support quantized models",
    ),
    Refusal(
        "nothing can be written to a weight that is computed; peft's writing changes the parametrization's own numbers",
        lambda cell: _moves(cell) and cell.base.startswith("computed"),
        r"computed by torch\.nn\.utils\.parametrize, so nothing can be written into it",
    ),
    Refusal(
        "outside causal models peft has no offsets for aLoRA and never lets it act",
        lambda cell: cell.variant == "alora" and not cell.place.is_causal,
        "aLoRA is currently only supported for CAUSAL_LM",
        how="warns",
    ),
)


def _is_packed(cell: Cell) -> bool:
    """Whether peft has a layer of its own for the storage, without the variants of its plain one."""
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
        "DoRA unpacks a weight in 8 bits in each forward, and the second one finds it without its scales",
        lambda cell: cell.variant == "dora" and cell.base == "bitsandbytes 8-bit",
        "'NoneType' object has no attribute 'dtype'",
    ),
    Refusal(
        "OPT lays all rows one behind the other before fc1, and aLoRA's offsets are of rows",
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
        lambda cell: cell.init == "mica" and cell.variant in ("dora", "kasa", "bdlora"),
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
        "BD-LoRA is there for Linear alone",
        lambda cell: cell.variant == "bdlora" and cell.kind != "Linear",
        "has no attribute 'in_features'|variant combination: .*use_bdlora",
    ),
    Refusal(
        "beside a weight in few bits BD-LoRA is plain LoRA there, without a word",
        lambda cell: cell.variant == "bdlora" and _is_packed(cell),
        how="ignores",
    ),
    Refusal(
        "EVA writes directions of the whole input into BD-LoRA's blocks",
        lambda cell: cell.variant == "bdlora" and cell.init == "eva" and cell.kind == "Linear" and not _is_packed(cell),
        "must match the size of tensor",
    ),
    Refusal(
        "KaSA decomposes the packed weight of torchao",
        lambda cell: cell.variant == "kasa" and cell.base == "torchao",
        "unimplemented operator",
    ),
    Refusal(
        "DoRA is not there for bare parameters and attention",
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
        "LoRA-GA looks at Linear and Conv1D alone",
        lambda cell: cell.init == "lora_ga" and (cell.kind not in DENSE or cell.base == "HQQ"),
        "No supported layers found for LoRA-GA",
    ),
    Refusal(
        "a weight in few bits, or a computed one, takes no gradient",
        lambda cell: cell.init == "lora_ga" and (cell.base in QUANTISED or cell.base.startswith("computed")),
        "does not support quantized models|floating point and complex dtype|does not require grad",
    ),
    Refusal(
        "convolutions know True, False and gaussian alone",
        lambda cell: cell.kind in CONVOLUTIONS and cell.init in ("pissa", "olora", "orthogonal", "eva", "corda"),
        "Unknown initialization",
    ),
    Refusal(
        "inits that look at a weight look for one of that name",
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
        "EVA looks for layers with an input of their own",
        lambda cell: cell.init == "eva" and cell.kind in ("MultiheadAttention", "Parameter"),
        "list index out of range|must match the size of tensor",
    ),
    Refusal(
        "OLoRA takes the weight of a Conv1D as if it lay the other way round",
        lambda cell: cell.init == "olora" and cell.kind == "Conv1D",
        "must match the size of tensor|shapes cannot be multiplied",
    ),
    Refusal(
        "an Embedding takes any word and begins as with True",
        lambda cell: cell.kind == "Embedding" and cell.init in ("pissa", "olora", "orthogonal", "corda"),
        how="ignores",
    ),
)


def _is_unpacked(cell: Cell) -> bool:
    """Whether peft unpacks the weight first, or looks at its dtype alone."""
    return (cell.init == "olora" and cell.base in BITSANDBYTES) or (
        cell.init == "orthogonal" and cell.base == "torchao"
    )


def refusals(cell: Cell, table: tuple[Refusal, ...]) -> list[Refusal]:
    """The rules of one library that name a cell; where one raises, the others are never reached."""
    found = [refusal for refusal in table if refusal.holds(cell)]
    return [refusal for refusal in found if refusal.how == "raises"] or found


def is_compared(cell: Cell) -> bool:
    """Whether both libraries make it as asked."""
    return not refusals(cell, BY_LORAKIT) and not refusals(cell, BY_PEFT)
