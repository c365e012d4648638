"""Faster forwards for the parts of a model that are known, with the same numbers, reversibly: `accelerate`.

`choose` measures which way is faster on this machine where there are several.
"""

from __future__ import annotations

from lorakit.speed.acceleration import Acceleration, accelerate, end_to_end
from lorakit.speed.tuning import Chosen, choose

__all__ = ["Acceleration", "Chosen", "accelerate", "choose", "end_to_end"]
