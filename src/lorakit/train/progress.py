"""Progress of a run: a live bar on a terminal, plain lines elsewhere.

The only module of `train` that imports rich. Knows the rows of metrics, not the loop.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol, TextIO

from lorakit.errors import printable
from lorakit.tables import fit, format_bytes, format_percent, format_rate, format_seconds, is_animated

PLAIN_SECONDS = 10.0
"""Minimum time between two plain lines; the first and last step and evaluations are always printed."""

LIVE_BYTES = 1_000_000
"""Minimum size of data that gets a bar."""


class Progress(Protocol):
    """Receiver of what a run reports."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def reading(self, what: str, done: int, total: int) -> None:
        """Report tokenized bytes and all bytes of the data; called often."""

    def begin(self, step: int, total_steps: int) -> None:
        """Report that the loop starts at a step."""

    def train_row(self, row: dict[str, Any]) -> None:
        """Report a step."""

    def eval_row(self, row: dict[str, Any]) -> None:
        """Report an evaluation."""

    def busy(self, what: str) -> None:
        """Report that something slow begins, such as an evaluation."""

    def say(self, text: str) -> None:
        """Print a line."""

    def detail(self, text: str) -> None:
        """Print a line if details were requested."""


class PlainProgress:
    """Lines of text, for pipes, files and notebooks.

    Args:
        stream: Where to write; None is stdout.
        verbose: Print details.
    """

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        self._stream, self._verbose = stream, verbose
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
        """Print the fraction done, if the last line is old enough."""
        now = time.monotonic()
        if self._read is None or done == total:
            self._read = None if done == total else now
        elif now - self._read >= PLAIN_SECONDS:
            self._read = now
            self.say(
                f"tokenizing {what}: {format_bytes(done)} of {format_bytes(total)} ({format_percent(done / total, 0)})"
            )

    def begin(self, step: int, total_steps: int) -> None:
        """Store where the loop starts, for the time left."""
        self._first, self._total, self._started = step, total_steps, time.monotonic()

    def train_row(self, row: dict[str, Any]) -> None:
        """Print the step, if the last line is old enough."""
        now = time.monotonic()
        if row["step"] not in (self._first + 1, self._total) and now - self._shown < PLAIN_SECONDS:
            return
        self._shown = now
        left = (now - self._started) / (row["step"] - self._first) * (self._total - row["step"])
        self.say(f"step {row['step']}/{self._total}  {_facts(row)}  {format_seconds(max(0, round(left)))} left")

    def eval_row(self, row: dict[str, Any]) -> None:
        """Print the evaluation."""
        self.say(_evaluation(row))

    def busy(self, what: str) -> None:
        """Do nothing: the result is printed as a line."""

    def say(self, text: str) -> None:
        """Print a line and flush, also into a pipe."""
        stream = self._stream or sys.stdout
        print(fit(printable(text), stream), file=stream, flush=True)

    def detail(self, text: str) -> None:
        """Print a line if details were requested."""
        if self._verbose:
            self.say(text)


class LiveProgress:
    """A bar with loss, tokens per second, memory and time left, in the last line of a terminal.

    Args:
        stream: The terminal; None is stdout.
        verbose: Print details above the bar.
    """

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._stream, self._verbose = stream or sys.stdout, verbose
        self._console = Console(file=self._stream, highlight=False)
        self._bar = Bar(  # at most 80 columns
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=8),
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
        """Show a bar of bytes while data is read; small data gets none."""
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
        self._bar.update(self._task, description="training", completed=row["step"], facts=_facts(row, "tok/s"))

    def eval_row(self, row: dict[str, Any]) -> None:
        """Print a line above the bar."""
        self.say(_evaluation(row))

    def busy(self, what: str) -> None:
        """Describe in front of the bar what is being done."""
        if self._task is not None:
            self._bar.update(self._task, description=what)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(fit(printable(text), self._stream), markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Print a line above the bar if details were requested."""
        if self._verbose:
            self.say(text)


class NullProgress:
    """Progress that prints nothing; the default of `run`."""

    def __enter__(self) -> NullProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def reading(self, what: str, done: int, total: int) -> None:
        """Do nothing."""

    def begin(self, step: int, total_steps: int) -> None:
        """Do nothing."""

    def train_row(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def eval_row(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def busy(self, what: str) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def detail(self, text: str) -> None:
        """Do nothing."""


def progress_for(stream: TextIO, *, verbose: bool = False) -> Progress:
    """Return a live bar for a terminal that can show one, else plain lines.

    Args:
        stream: Where to write.
        verbose: Print details.
    """
    return LiveProgress(stream, verbose=verbose) if is_animated(stream) else PlainProgress(stream, verbose=verbose)


def _facts(row: dict[str, Any], tokens: str = "tokens/s") -> str:
    speed, memory = format_rate(row["tokens_per_second"], tokens), format_bytes(row["peak_rss_bytes"])
    return f"loss {row['loss']:.4f}  {speed}  peak {memory}"


def _evaluation(row: dict[str, Any]) -> str:
    return (
        f"evaluation at step {row['step']}: loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:.2f} "
        f"over {row['eval_tokens']:,} tokens"
    )
