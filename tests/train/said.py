"""A receiver of a run's messages that keeps them."""

from __future__ import annotations

from lorakit.train.progress import Progress


class Said(Progress):
    """Keeps all lines, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def detail(self, line: str) -> None:
        self.lines.append(line)
