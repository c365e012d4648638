"""Stop strings: end an answer when its text contains one of them, also across pieces of the text.

The text comes from `TextStream`, whose pieces have only whole characters. This module does not depend on tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.errors import ConfigError


class StopStrings:
    """A search for stop strings in one answer's text, which holds back text that may be the beginning of one.

    The answer ends at the first character that completes a stop string; if it completes several, the longest counts. So
    the result does not depend on how the text is divided into pieces. Each character takes constant time on average.

    Args:
        stops: The stop strings.
        include: Whether the returned text includes the stop string.

    Attributes:
        found: The stop string that ended the answer, or None.

    Raises:
        ConfigError: A stop string is empty or not a string.

    Source:
        Knuth, Morris, Pratt 1977, "Fast Pattern Matching in Strings", SIAM J. Comput. 6(2).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ConfigError.of("stop", stops, "a list of strings that are not empty")
        self.found: str | None = None
        self._include = include
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # for each stop, the length of its longest beginning that ends the text
        self._held = ""

    def push(self, piece: str) -> str:
        """Add a piece of text, and return the text that is now final; nothing is returned after a stop string."""
        if self.found is not None:
            return ""
        text, before = self._held + piece, len(self._held)
        for at in range(before, len(text)):
            if complete := self._advance(text[at]):
                self.found, self._held = max(complete, key=len), ""
                return text[: at + 1 if self._include else at + 1 - len(self.found)]
        final = len(text) - max(self._matched, default=0)
        self._held = text[final:]
        return text[:final]

    def finish(self) -> str:
        """Return the text that was held back, at the end of an answer without a stop string."""
        text, self._held = self._held, ""
        return text

    def _advance(self, character: str) -> list[str]:
        """Add a character, and return the stop strings that it completes."""
        complete = []
        for number, (stop, borders) in enumerate(self._stops):
            matched = self._matched[number]
            while matched and stop[matched] != character:
                matched = borders[matched]
            matched += stop[matched] == character
            if matched == len(stop):
                complete.append(stop)
            else:
                self._matched[number] = matched
        return complete


def _borders(stop: str) -> list[int]:
    """Return, for each length, the longest shorter beginning of the stop string that also ends that beginning of it."""
    borders, border = [0, 0], 0
    for end in range(1, len(stop)):
        while border and stop[border] != stop[end]:
            border = borders[border]
        border += stop[border] == stop[end]
        borders.append(border)
    return borders
