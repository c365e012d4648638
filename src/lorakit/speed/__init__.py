"""Model acceleration: `accelerate` replaces the forward passes of supported modules with equivalent fused ones.

The replacement can be undone. `choose` measures which kernels are fastest on this machine. `multiply_few_rows` makes
decoding faster, and each of its rows independent of the others; `fuse_decoding` makes generation with a cache faster.
"""

from __future__ import annotations

from lorakit.speed.acceleration import Acceleration, accelerate
from lorakit.speed.decoding import fuse_decoding, undo_fused_decoding
from lorakit.speed.few_rows import multiply_few_rows, undo_few_rows
from lorakit.speed.probe import pack_rows
from lorakit.speed.tuning import TuningResult, choose

__all__ = [
    "Acceleration",
    "TuningResult",
    "accelerate",
    "choose",
    "fuse_decoding",
    "multiply_few_rows",
    "pack_rows",
    "undo_few_rows",
    "undo_fused_decoding",
]
