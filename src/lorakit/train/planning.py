"""The plan of a run, made from its settings, its data and the machine's measured speed, and put into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.train.forecast import Precision
from lorakit.train.loop import Pace
from lorakit.train.request import Request


@dataclass(frozen=True)
class Planned:
    """A plan and how it is printed.

    Attributes:
        values: The plan as plain JSON values.
        lines: Sentences for a person.
    """

    values: Mapping[str, Any]
    lines: tuple[str, ...]


def planned_run(request: Request, pace: Pace, precision: Precision) -> Planned:
    """Plan a run."""
    return Planned({}, ())
