"""The collector rests in the block, and is what it was afterwards."""

from __future__ import annotations

import gc

import pytest

from lorakit.peft.tuner import collector_at_rest


def test_it_rests_and_is_what_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collector_at_rest():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
