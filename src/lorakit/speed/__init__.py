"""Faster forwards for the parts of a model that are known, with the same numbers, reversibly: `accelerate`.

`choose` measures which way is faster on this machine where there are several.
"""

from __future__ import annotations

from lorakit.speed.accelerating import Acceleration, accelerate
from lorakit.speed.choosing import Chosen, choose
from lorakit.speed.packing import end_to_end

__all__ = ["Acceleration", "Chosen", "accelerate", "choose", "end_to_end"]
