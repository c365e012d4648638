"""Model acceleration: `accelerate` replaces the forward passes of supported modules with equivalent fused ones.

The replacement can be undone. `choose` measures which kernels are fastest on this machine.
"""

from __future__ import annotations

from lorakit.speed.acceleration import Acceleration, accelerate
from lorakit.speed.probe import pack_rows
from lorakit.speed.tuning import TuningResult, choose

__all__ = ["Acceleration", "TuningResult", "accelerate", "choose", "pack_rows"]
