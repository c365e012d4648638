"""The first signal is recorded, the second stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorakit.train.loop import interrupts as signals
from lorakit.train.loop.interrupts import recording, stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_is_remembered_twice_raises(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), recording() as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), number)
        assert interrupts.requested
        assert "finishing this step and saving a checkpoint" in capfd.readouterr().err
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


CLOSED = """
import os, signal, sys
from lorakit.train.loop.interrupts import recording, stoppable
with stoppable(), recording() as interrupts:
    print("ready", flush=True)
    while not interrupts.requested:
        signal.pause()
    os.kill(os.getpid(), signal.SIGHUP)  # shells send it again
    print("the step is finished", flush=True)
    print("so is the checkpoint", file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as file:
    file.write("saved")
"""


@pytest.mark.skipif(os.name != "posix", reason="terminals")
def test_a_closed_terminal_lets_the_step_finish(tmp_path: Path) -> None:
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CLOSED, str(tmp_path / "saved")])
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_program_ignores_stays_ignored(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stoppable(), recording() as interrupts:
            os.kill(os.getpid(), number)
            assert not interrupts.requested
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_in_another_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def work() -> None:
        with recording() as interrupts:
            seen.append(interrupts.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) is before


FROM_C = """
import ctypes, os, signal, sys
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
libc, seen = ctypes.CDLL(None), []
handler = HANDLER(seen.append)
libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, HANDLER), ctypes.c_void_p
libc.signal(signal.SIGTERM, handler)
if "before" in sys.argv:  # as in a program that sets a handler and then starts Python: getsignal gives None
    del sys.modules["_signal"]
    import _signal
    assert signal.getsignal(signal.SIGTERM) is None

from lorakit.train.loop.interrupts import recording, stoppable
for _ in range(2):
    with recording() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested and not seen, "ours acts in the block"
    os.kill(os.getpid(), signal.SIGTERM)
    assert seen.pop() == signal.SIGTERM, "the one of before acts after it"
"""


@pytest.mark.skipif(os.name != "posix", reason="sigaction")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_set_from_c_is_restored(when: str) -> None:
    """Python has no value for a handler set before it starts, and does not know of one set later."""
    done = subprocess.run([sys.executable, "-c", FROM_C, when], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_handler_that_can_be_neither_read_nor_restored_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_sigaction", lambda *_: False)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("replaced"))
    with recording() as found:
        assert not found.requested


def test_sigterm_stops_a_block_and_acts_as_before_after_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), stoppable():
            with recording() as found:
                os.kill(os.getpid(), signal.SIGTERM)
                assert found.requested
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_program_that_handles_sigterm_goes_on_doing_so() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
