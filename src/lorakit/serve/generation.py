"""The rows of one request in the engine: they end with the reply, at a deadline, or when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from lorakit.errors import BusyError
from lorakit.generate import Failure
from lorakit.generate.rows import Event
from lorakit.serve.choices import Choice, Piece
from lorakit.serve.jobs import Job
from lorakit.serve.service import Service

Result = TypeVar("Result")


class Deadline:
    """The time at which a request ends."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    async def wait(self, awaited: Awaitable[Result]) -> Result:
        """Wait for a result until the deadline.

        Raises:
            BusyError: The time is over.
        """
        try:
            return await asyncio.wait_for(awaited, max(0.0, self._end - time.monotonic()))
        except asyncio.TimeoutError:
            text = f"The answer was not complete after {self.seconds:g} s."
            raise BusyError(text, what="timeout") from None


class Generation:
    """The rows of a request in the engine.

    Args:
        service: The service.
        job: The request.
        deadline: When it ends.
    """

    def __init__(self, service: Service, job: Job, deadline: Deadline) -> None:
        self._service, self._job, self._deadline = service, job, deadline
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._numbers: dict[int, int] = {}
        self._answered, self._is_over = 0, False
        self._error: BaseException | None = None
        self._all_answered = asyncio.Event()

    async def start(self) -> None:
        """Submit the rows, and wait until the engine has checked them.

        Raises:
            LorakitError: The engine rejects a row, has too many, or did not answer in time.
        """
        for index, row in enumerate(self._job.rows):
            future = self._service.submit(self._job.served, row, partial(self._post, self._add, index))
            future.add_done_callback(partial(self._post, self._submitted, index))
        await self._deadline.wait(self._all_answered.wait())
        if self._error is not None:
            raise self._error

    def _post(self, call: Callable[[int, Any], None], index: int, value: object) -> None:
        """Call a method in the event loop; from another thread, and perhaps after the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, index, value)

    def _add(self, index: int, event: Event) -> None:
        self._events.put_nowait((index, event))

    def _submitted(self, index: int, future: Future[int]) -> None:
        self._answered += 1
        error = future.exception()
        if error is not None:
            self._error = self._error or error
        else:
            self._numbers[index] = future.result()
            if self._is_over:
                self._service.cancel(future.result())
        if self._answered == len(self._job.rows):
            self._all_answered.set()

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """Yield the pieces of all answers in the order in which they are made.

        Raises:
            LorakitError: A row failed, or the answers were not complete in time.
        """
        left = len(self._job.choices)
        while left:
            index, event = await self._deadline.wait(self._events.get())
            if isinstance(event, Failure):
                raise event.error
            choice = self._job.choices[index]
            piece = choice.add(event)
            if piece is None:
                continue
            if choice.finish_reason is not None:
                left -= 1
                self._job.usage.completion += choice.made
                self._service.cancel(self._numbers[index])  # after a stop string; otherwise it has ended
            yield choice, piece

    def cancel(self) -> None:
        """End the rows that have not ended."""
        self._is_over = True
        for number in self._numbers.values():
            self._service.cancel(number)
