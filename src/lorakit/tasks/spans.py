"""Entities in the tags of words: the tag schemes, which of them the names of tags follow, and the spans that tags form.

A scheme marks the words of an entity by a letter, which has one meaning in all schemes, so one rule reads them all:
that of the evaluation script of CoNLL-2000, which also says what tags out of order mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lorakit.errors import ConfigError

OUTSIDE = "O"
"""The tag of words that belong to no entity."""

PLAIN, UNMARKED = "IO", "none"

SCHEMES: Mapping[str, str] = {
    "BIO": "BI",
    "IOB1": "BI",
    "IOE": "IE",
    "BIOES": "BIES",
    "BILOU": "BILU",
    "BMES": "BMESW",
    PLAIN: "",
    UNMARKED: "",
}
"""Name of a tag scheme -> its letters; tags of IO are types without a letter, "none" compares single words only."""

_MEANING = {"M": "I", "L": "E", "U": "S", "W": "S"}
"""Letter -> the letter of BIOES with the same meaning, if it is another one."""

_UNTYPED = "_"
"""Type of the entities of tags that are only a letter, as in seqeval."""

_FORMS = (
    re.compile(r"(?P<letter>[A-Z])[^A-Za-z0-9](?P<type>.*)", re.DOTALL),
    re.compile(r"(?P<type>.+)[^A-Za-z0-9](?P<letter>[A-Z])", re.DOTALL),
    re.compile(r"(?P<letter>[A-Z])(?P<type>)"),
)
"""Forms of tags with a letter: "B-PER", "PER-B" and "B"; all tags of a scheme have the same form."""


class Span(NamedTuple):
    """A group of adjacent words, from `begin` up to `end`, with the same entity type, such as "PER"."""

    kind: str
    begin: int
    end: int


def scheme_of(names: Sequence[str]) -> tuple[str, str]:
    """Return the scheme that all tags of the data or the model follow, and a message if it is "none"."""
    for scheme, letters in SCHEMES.items():
        parts = _parts(names, letters) if letters else None
        if parts and {"B", "I"} & {letter for letter, _ in parts.values()}:
            return scheme, ""
    tags = [name for name in names if name != OUTSIDE]
    if all(re.fullmatch(r"[+-]?\d+", name) for name in names):
        return UNMARKED, (
            "The tags are numbers without names, so the metric is the accuracy per word, not the F1 of spans; name "
            "them, such as --label-map 0=O 1=B-PER."
        )
    marked = [match for form in _FORMS for tag in tags if (match := form.fullmatch(tag)) and match["letter"] in "BI"]
    if len(tags) < len(names) and not marked:
        return PLAIN, ""
    return UNMARKED, (
        f"The tags ({', '.join(list(names)[:4])} ...) follow no known scheme, so the metric is the accuracy per word, "
        f"not the F1 of spans; see --tag-scheme ({', '.join(SCHEMES)})."
    )


def check_scheme(scheme: str, names: Sequence[str]) -> None:
    """Check that all tags can be read in a scheme.

    Raises:
        ConfigError: The scheme is not a key of `SCHEMES`, or a tag does not have one of its letters.
    """
    if scheme not in SCHEMES:
        raise ConfigError.of("tag_scheme", scheme, allowed=SCHEMES)
    letters = SCHEMES[scheme]
    if letters and _parts(names, letters) is None:
        wrong = next((name for name in names if name != OUTSIDE and _parts([name], letters) is None), names[0])
        raise ConfigError(
            f"tag_scheme is {scheme}, whose tags have one of the letters {', '.join(letters)} such as "
            f"{letters[0]}-PER, or are O; the tag {wrong!r} has none. Pass another --tag-scheme, or rename the tag "
            f"with --label-map {wrong}=NAME.",
            what=wrong,
            field="tag_scheme",
            allowed=tuple(SCHEMES),
        )


def _parts(names: Iterable[str], letters: str) -> dict[str, tuple[str, str]] | None:
    """Return a dict from each tag to its letter in BIOES and its type; None if a tag has none of the letters."""
    tags = [name for name in names if name != OUTSIDE]
    for form in _FORMS:
        matches = [form.fullmatch(tag) for tag in tags]
        if all(match is not None and match["letter"] in letters for match in matches):
            return {
                tag: (_MEANING.get(match["letter"], match["letter"]), match["type"] or _UNTYPED)
                for tag, match in zip(tags, matches, strict=True)
                if match is not None
            }
    return None


class SpanReader:
    """Reads the entities in tags, in one scheme in which all tags can be read.

    A span begins at B or S, after E or S, when the type changes, and at the first I or E after O.
    """

    def __init__(self, names: Sequence[str], scheme: str) -> None:
        letters = SCHEMES[scheme]
        plain = {name: ("I", name) for name in names if name != OUTSIDE}
        self.has_spans = scheme != UNMARKED
        self._parts = ((_parts(names, letters) if letters else None) or plain) if self.has_spans else {}

    def spans(self, tags: Iterable[str | None]) -> list[Span]:
        """Return the entities in the tags of a sentence; a word whose tag is None belongs to no entity."""
        entities, begin, before = list[Span](), 0, (OUTSIDE, "")
        for at, tag in enumerate([*tags, None]):
            letter, kind = self._parts.get(tag or OUTSIDE, (OUTSIDE, ""))
            if before[0] != OUTSIDE and (letter in "OBS" or before[0] in "ES" or kind != before[1]):
                entities.append(Span(before[1], begin, at))
                before = (OUTSIDE, "")
            if letter != OUTSIDE and before[0] == OUTSIDE:
                begin = at
            before = (letter, kind)
        return entities
