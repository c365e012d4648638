"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere.

The one place in training that knows rich. Knows the rows of metrics, nothing of the loop.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol, TextIO

from lorakit.errors import printable

PLAIN_SECONDS = 10.0
"""Plain lines come at most so often, but for the first, the last and evaluations."""


LIVE_BYTES = 1_000_000
"""Data of fewer bytes gets no bar of its own."""


class Progress(Protocol):
    """Where a run reports to."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def reading(self, what: str, done: int, total: int) -> None:
        """Data is being tokenized: bytes done and bytes in all; called often."""

    def begin(self, step: int, total_steps: int) -> None:
        """The loop starts at a step."""

    def train_row(self, row: dict[str, Any]) -> None:
        """A step is done."""

    def eval_row(self, row: dict[str, Any]) -> None:
        """An evaluation is done."""

    def busy(self, what: str) -> None:
        """Something that takes a while begins, such as an evaluation."""

    def say(self, text: str) -> None:
        """A line for the person."""


class PlainProgress:
    """Lines of text, for pipes, files and notebooks."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._total = self._first = self._last_step = 0
        self._shown = self._started = float("-inf")
        self._read: float | None = None

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def reading(self, what: str, done: int, total: int) -> None:
        """Print how far it is, if the last line is old enough."""
        now = time.monotonic()
        if self._read is None or done == total:
            self._read = None if done == total else now
        elif now - self._read >= PLAIN_SECONDS:
            self._read = now
            self.say(f"tokenizing {what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / total:.0%})")

    def begin(self, step: int, total_steps: int) -> None:
        """Remember where the loop starts, for the time left."""
        self._first, self._total, self._started = step, total_steps, time.monotonic()

    def train_row(self, row: dict[str, Any]) -> None:
        """Print the step, if the last line is old enough."""
        now = time.monotonic()
        if row["step"] not in (self._first + 1, self._total) and now - self._shown < PLAIN_SECONDS:
            return
        self._shown = now
        left = (now - self._started) / (row["step"] - self._first) * (self._total - row["step"])
        self.say(f"step {row['step']}/{self._total}  {_facts(row)}  {_clock(left)} left")

    def eval_row(self, row: dict[str, Any]) -> None:
        """Print the evaluation."""
        self.say(_evaluation(row))

    def busy(self, what: str) -> None:
        """Nothing: the result will be a line."""

    def say(self, text: str) -> None:
        """Print the line at once, also into a pipe."""
        print(printable(text), file=self._stream or sys.stdout, flush=True)


class LiveProgress:
    """A bar with loss, tokens a second, memory and time left, at the foot of a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(file=stream or sys.stdout, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            refresh_per_second=4,
        )
        self._task: Any = None
        self._reading: Any = None

    def __enter__(self) -> LiveProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_reading()
        if self._task is not None:
            self._bar.update(self._task, description="done" if kind is None else "stopped")
            self._bar.stop()

    def reading(self, what: str, done: int, total: int) -> None:
        """Show a bar of bytes while there is more to read; small data is read before it could be seen."""
        if self._reading is None and LIVE_BYTES <= total != done:
            self._reading = self._reading_bar(what, total)
        if self._reading is not None:
            self._reading.update(self._reading.task_ids[0], completed=done)
            if done == total:
                self._end_reading()

    def _reading_bar(self, what: str, total: int) -> Any:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        bar = Bar(*columns, console=self._console, refresh_per_second=4, transient=True)
        bar.add_task(f"tokenizing {what}", total=total)
        bar.start()
        return bar

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading.stop()
            self._reading = None

    def begin(self, step: int, total_steps: int) -> None:
        """Show the bar."""
        self._task = self._bar.add_task("training", total=total_steps, completed=step, facts="")
        self._bar.start()

    def train_row(self, row: dict[str, Any]) -> None:
        """Move the bar."""
        self._bar.update(self._task, description="training", completed=row["step"], facts=_facts(row))

    def eval_row(self, row: dict[str, Any]) -> None:
        """Leave a line above the bar."""
        self.say(_evaluation(row))

    def busy(self, what: str) -> None:
        """Say before the bar what is going on."""
        if self._task is not None:
            self._bar.update(self._task, description=what)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(printable(text), markup=False, soft_wrap=True)


class Silence:
    """Reports nothing; the default for programs."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def reading(self, what: str, done: int, total: int) -> None:
        """Nothing."""

    def begin(self, step: int, total_steps: int) -> None:
        """Nothing."""

    def train_row(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def eval_row(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def busy(self, what: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def progress_for(stream: TextIO) -> Progress:
    """A live bar where the stream is a terminal, plain lines otherwise."""
    return LiveProgress(stream) if stream.isatty() else PlainProgress(stream)


def _facts(row: dict[str, Any]) -> str:
    memory = row["peak_rss_bytes"] / 1e9
    return f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  peak {memory:.2f} GB"


def _evaluation(row: dict[str, Any]) -> str:
    return (
        f"evaluation at step {row['step']}: loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:.2f} "
        f"over {row['eval_tokens']:,} tokens"
    )


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
