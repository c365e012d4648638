"""Faster forwards for the parts of a model that are known, with the same numbers, reversibly: `accelerate`."""

from __future__ import annotations

from lorakit.speed.accelerating import Acceleration, accelerate
from lorakit.speed.packing import end_to_end

__all__ = ["Acceleration", "accelerate", "end_to_end"]
