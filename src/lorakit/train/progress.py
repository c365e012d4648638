"""Progress output of a run: a live bar on a terminal, plain lines elsewhere. In `train`, only this imports rich."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

from lorakit.errors import printable
from lorakit.tables import fit, format_bytes, format_percent, format_rate, format_seconds, is_animated
from lorakit.terminal import drawing_console, write_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, TaskID

PLAIN_SECONDS = 4.0
"""Minimum time between two plain lines, in seconds; evaluations and the first and last steps are always printed."""

LIVE_BYTES = 1_000_000
"""Minimum data size, in bytes, for which a tokenization progress bar is shown."""


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Reports a run's progress; this base class prints nothing. `verbose` says whether to print details."""

    def __init__(self, *, verbose: bool = False) -> None:
        self._verbose = verbose

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def reading(self, what: str, done: int, total: int) -> None:
        """Report the number of bytes tokenized so far and the total number of bytes; called often."""

    def begin(self, step: int, total_steps: int) -> None:
        """Report the start of the loop after `step` steps."""

    def train_row(self, row: Mapping[str, Any]) -> None:
        """Report the metrics of a step."""

    def eval_row(self, row: Mapping[str, Any], what: str = "") -> None:
        """Print the metrics of an evaluation, and what was evaluated unless it is the adapter in training."""
        of = f" ({what})" if what else ""
        if "eval_perplexity" in row:
            more = f", perplexity {row['eval_perplexity']:.2f} over {row['eval_tokens']:,} tokens"
        else:
            named = [key.removeprefix("eval_") for key in row if key.startswith("eval_") and "/" not in key]
            reasons = row.get("eval_undefined", {})
            more = "".join(
                f", {name} undefined ({reasons[name]})" if name in reasons else f", {name} {row[f'eval_{name}']:.4f}"
                for name in named
                if name not in ("loss", "tokens", "undefined")
            )
        self.say(f"evaluation at step {row['step']}{of}: loss {row['eval_loss']:.4f}{more}")

    def busy(self, what: str) -> None:
        """Report the start of a slow operation, such as an evaluation."""

    def say(self, text: str) -> None:
        """Print a line."""

    def detail(self, text: str) -> None:
        """Print a line if details were requested."""
        if self._verbose:
            self.say(text)


class PlainProgress(Progress):
    """Progress as lines of text, for pipes, files and notebooks; the stream is stdout by default."""

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        super().__init__(verbose=verbose)
        self._stream = stream
        self._total = self._first = 0
        self._shown = self._started = float("-inf")
        self._read: float | None = None

    def reading(self, what: str, done: int, total: int) -> None:
        """Print the fraction of the data tokenized so far, at most once every `PLAIN_SECONDS` seconds."""
        now = time.monotonic()
        if self._read is None or done == total:
            self._read = None if done == total else now
        elif now - self._read >= PLAIN_SECONDS:
            self._read = now
            self.say(
                f"tokenizing {what}: {format_bytes(done)} of {format_bytes(total)} ({format_percent(done / total, 0)})"
            )

    def begin(self, step: int, total_steps: int) -> None:
        """Store the start, from which the time left is estimated."""
        self._first, self._total, self._started = step, total_steps, time.monotonic()

    def train_row(self, row: Mapping[str, Any]) -> None:
        """Print the metrics of the first and last steps, and others at most once every `PLAIN_SECONDS` seconds."""
        now = time.monotonic()
        if row["step"] not in (self._first + 1, self._total) and now - self._shown < PLAIN_SECONDS:
            return
        self._shown = now
        left = (now - self._started) / (row["step"] - self._first) * (self._total - row["step"])
        self.say(f"step {row['step']}/{self._total}  {_facts(row)}  {format_seconds(max(0, round(left)))} left")

    def say(self, text: str) -> None:
        """Print a line and flush the stream, so that the line passes through a pipe immediately."""
        write_line(text, self._stream)


class LiveProgress(Progress):
    """A progress bar on the last line of a terminal, showing the loss, tokens per second, memory use and time left.

    The terminal is stdout by default.
    """

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

        super().__init__(verbose=verbose)
        self._console = drawing_console(stream)
        self._bar = self._bar_of(  # at most 80 columns
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self._task: TaskID | None = None
        self._reading: Bar | None = None

    def _bar_of(self, *columns: ProgressColumn, transient: bool = False) -> Bar:
        """Return a progress bar with the given columns, followed by the time left."""
        from rich.progress import Progress as Bar
        from rich.progress import TextColumn, TimeRemainingColumn

        left = TimeRemainingColumn(compact=True), TextColumn("left")
        return Bar(*columns, *left, console=self._console, refresh_per_second=4, transient=transient)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_reading()
        if self._task is not None:
            self._bar.update(self._task, description="done" if kind is None else "stopped")
            self._bar.stop()

    def reading(self, what: str, done: int, total: int) -> None:
        """Show a bar for the fraction of the data tokenized so far, unless the data is smaller than `LIVE_BYTES`."""
        if self._reading is None and LIVE_BYTES <= total != done:
            from rich.progress import BarColumn, DownloadColumn, TextColumn

            text = TextColumn("{task.description}", markup=False)
            self._reading = self._bar_of(text, BarColumn(bar_width=24), DownloadColumn(), transient=True)
            self._reading.add_task(f"tokenizing {what}", total=total)
            self._reading.start()
        if self._reading is not None:
            self._reading.update(self._reading.task_ids[0], completed=done)
            if done == total:
                self._end_reading()

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading.stop()
            self._reading = None

    def begin(self, step: int, total_steps: int) -> None:
        """Show the bar."""
        self._task = self._bar.add_task("training", total=total_steps, completed=step, facts="")
        self._bar.start()

    def train_row(self, row: Mapping[str, Any]) -> None:
        """Advance the bar to a step and show its metrics."""
        if self._task is None:
            return
        self._bar.update(self._task, description="training", completed=row["step"], facts=_facts(row, "tok/s"))

    def busy(self, what: str) -> None:
        """Show the current operation to the left of the bar."""
        if self._task is not None:
            self._bar.update(self._task, description=printable(what, one_line=True))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(fit(printable(text), cast("TextIO", self._console.file)), soft_wrap=True)


def progress_for(stream: TextIO, *, verbose: bool = False) -> Progress:
    """Return a live progress bar if the stream is a terminal that supports one, or else plain-text progress."""
    return LiveProgress(stream, verbose=verbose) if is_animated(stream) else PlainProgress(stream, verbose=verbose)


def _facts(row: Mapping[str, Any], tokens: str = "tokens/s") -> str:
    speed, memory = format_rate(row["tokens_per_second"], tokens), format_bytes(row["peak_rss_bytes"])
    return f"loss {row['loss']:.4f}  {speed}  peak {memory}"
