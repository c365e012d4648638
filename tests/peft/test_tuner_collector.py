"""The collector rests in the block, and is what it was afterwards."""

from __future__ import annotations

import gc

import pytest

from lorakit.peft.tuner import garbage_collector_paused


def test_it_rests_and_is_what_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), garbage_collector_paused():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage_collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
