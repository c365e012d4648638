"""lorakit.generate.stop_strings: equal to a search over the whole text, however the text is divided."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import ConfigError
from lorakit.generate import StopStrings, TextStream


def searched(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Return the text before the first position at which a stop string is complete, and that stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def held_back(text: str, stops: list[str]) -> int:
    beginnings = {stop[:size] for stop in stops for size in range(len(stop))}
    return max((size for size in range(len(text) + 1) if text[len(text) - size :] in beginnings), default=0)


def letters(least: int, most: int) -> st.SearchStrategy[str]:
    return st.text("ab€", min_size=least, max_size=most)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    pieces=st.lists(letters(0, 6), max_size=12), stops=st.lists(letters(1, 6), max_size=4, unique=True), include=st.booleans()
)  # fmt: skip
def test_pieces_give_what_a_search_over_the_whole_text_gives(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    scanner = StopStrings(stops, include=include)
    expected, found = searched("".join(pieces), stops, include)
    given_back = ""
    for number, piece in enumerate(pieces, start=1):
        given_back += scanner.push(piece)
        so_far = "".join(pieces[:number])
        if scanner.found is None:
            assert given_back == so_far[: len(so_far) - held_back(so_far, stops)]  # no more is held back than needed
        assert (scanner.found is not None) == (searched(so_far, stops, include)[1] is not None)
    given_back += scanner.finish()
    assert (given_back, scanner.found) == (expected, found)


TEXT = "Größe: 3 €, 日本語 and 👩‍👩‍👧 😀 한국어 end\n\nUser: bye"


@pytest.mark.parametrize(
    "stops",
    [
        ["\n\nUser:"],
        ["€, 日"],
        ["본", "한국어 en"],
        ["👩‍👧"],
        ["😀", "👧 😀 한"],
        ["Größe"],
        ["bye"],
        ["absent", "\n\n\n"],
    ],
    ids=ascii,
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_stop_strings_across_tokens_and_characters(tiny_tokenizer: Any, stops: list[str], bytewise: bool) -> None:
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if bytewise:
        vocabulary = tiny_tokenizer.get_vocab()
        units = tiny_tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
        ids = [vocabulary[unit] for character in TEXT for token in units(character) for unit in token[0]]
    stream = TextStream(tiny_tokenizer)
    for include in (False, True):
        stream, scanner = TextStream(tiny_tokenizer), StopStrings(stops, include=include)
        given_back = []
        for token in ids:
            given_back.append(scanner.push(stream.push(token)))
            if scanner.found:
                break
        given_back += [scanner.push(stream.finish()), scanner.finish()]
        assert ("".join(given_back), scanner.found) == searched(TEXT, stops, include)
        assert not any("\ufffd" in piece for piece in given_back)


def test_the_stop_that_is_complete_first_ends_the_text_even_inside_a_longer_one() -> None:
    for pieces in (["xabcd"], list("xabcd"), ["xabc", "d"]):
        scanner = StopStrings(["abcd", "bc"])
        assert "".join(map(scanner.push, pieces)) == "xa"
        assert scanner.found == "bc"


def test_nothing_follows_a_stop() -> None:
    scanner = StopStrings(["."], include=True)
    assert scanner.push("one. two") == "one."
    assert scanner.push(" three") + scanner.finish() == ""


def test_without_stops_all_text_is_returned_at_once() -> None:
    scanner = StopStrings([])
    assert scanner.push("one") == "one" and scanner.found is None


def test_long_stops_take_linear_time() -> None:
    size = 20_000  # a search that starts again at each character would take minutes
    scanner = StopStrings(["a" * size + "b", "a" * size + "c"])
    returned = sum(len(scanner.push("a")) for _ in range(3 * size))
    assert returned == 2 * size and len(scanner.finish()) == size


@pytest.mark.parametrize("stops", [[""], ["a", ""], [1], "word"])
def test_an_invalid_stop_is_rejected(stops: Any) -> None:
    with pytest.raises(ConfigError, match="stop") as caught:
        StopStrings(stops)
    assert caught.value.field == "stop"


def test_every_division_of_a_text_gives_the_same() -> None:
    text, stops = "aabaabaaab", ["aabaaa", "abb"]
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        pieces, start = [], 0
        for at, cut in enumerate(cuts, start=1):
            if cut:
                pieces.append(text[start:at])
                start = at
        scanner = StopStrings(stops)
        found = "".join(map(scanner.push, [*pieces, text[start:]])) + scanner.finish()
        assert (found, scanner.found) == searched(text, stops, False) == ("aab", "aabaaa")
