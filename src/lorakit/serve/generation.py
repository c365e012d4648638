"""The rows of one request: prompts are encoded, submitted and read; a deadline or a disconnect ends them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from lorakit.errors import BusyError
from lorakit.generate import Continuation, Failure
from lorakit.generate.rows import Event
from lorakit.serve.choices import Choice, Options, Piece, Prompt
from lorakit.serve.faults import HttpFault
from lorakit.serve.replies import ChatReply, CompletionReply, Reply, Usage
from lorakit.serve.requests import MOST_CHOICES, ChatRequest, CompletionRequest, GenerationRequest
from lorakit.serve.served import Served
from lorakit.serve.service import Service

MOST_TOKENS = 4096
"""Number of new tokens in a chat without `max_tokens`, if the model has no maximum context."""

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


@dataclass
class Job:
    """A request: its answers, the rows that make them, and the form of the reply."""

    served: Served
    reply: Reply
    usage: Usage
    choices: Sequence[Choice]
    rows: Sequence[Continuation]


def completion_job(service: Service, served: Served, given: CompletionRequest, owner: str) -> Job:
    """Encode the prompts of a request for completions.

    Raises:
        HttpFault: A prompt is too long, or there are too many.
    """
    prompts = list[Prompt]()
    for one in given.prompts:
        ids = tuple(served.encode_text(one) if isinstance(one, str) else one)
        echo = None
        if given.echo:
            echo = one if isinstance(one, str) else served.tokenizer.decode([*ids], skip_special_tokens=False)
        prompts.append(Prompt(ids, echo))
    seed = given.chosen_seed
    reply = CompletionReply(served, service.fingerprint, seed, given.return_token_ids, _has_usage(given))
    return _job(service, reply, given, prompts, owner, "prompt")


def chat_job(service: Service, served: Served, given: ChatRequest, owner: str) -> Job:
    """Encode the conversation of a request for a chat.

    Raises:
        HttpFault: The adapter has no chat template, or the conversation is too long.
        LorakitError: The chat template rejects the conversation.
    """
    if not served.has_chat_template:
        text = f"{served.id} has no chat template; use /v1/completions."
        raise HttpFault(400, text, "no_chat_template", "model")
    messages = [message.as_dict() for message in given.messages]
    prompt = Prompt(tuple(served.encode_chat(messages, given.offered)))
    reply = ChatReply(served, service.fingerprint, given.chosen_seed, given.return_token_ids, _has_usage(given))
    return _job(service, reply, given, [prompt], owner, "messages")


def _has_usage(given: GenerationRequest) -> bool:
    return given.stream_options is not None and given.stream_options.include_usage


def _job(
    service: Service,
    reply: Reply,
    given: CompletionRequest | ChatRequest,
    prompts: Sequence[Prompt],
    owner: str,
    field: str,
) -> Job:
    if not 0 < len(prompts) * given.n <= MOST_CHOICES:
        text = f"{len(prompts)} prompts with n {given.n} are not between 1 and {MOST_CHOICES} answers."
        raise HttpFault(400, text, "invalid_value", field)
    context = service.context
    longest = max(len(prompt.ids) for prompt in prompts)
    if context is not None and longest >= context:
        text = f"The maximum context length is {context:,} tokens, but the prompt has {longest:,}; shorten it."
        raise HttpFault(400, text, "context_length_exceeded", field)
    has_tools = isinstance(given, ChatRequest) and bool(given.offered)
    ends = frozenset() if given.ignore_eos else reply.served.end_ids(chat=isinstance(given, ChatRequest))
    wanted = given.new_tokens
    options = Options(tuple(given.stops), given.min_tokens, has_tools, drops_tokens=wanted == 0)
    choices, rows = list[Choice](), list[Continuation]()
    for prompt in (prompt for prompt in prompts for _ in range(given.n)):
        index = len(choices)
        room = MOST_TOKENS if context is None else context - len(prompt.ids)
        choices.append(Choice(index, reply.served, prompt, options))
        rows.append(
            Continuation(
                prompt.ids,
                max(1, room if wanted is None else min(wanted, room)),
                given.sampling(reply.seed + index),
                eos_ids=ends | frozenset(given.stop_token_ids),
                owner=owner,
                logprobs=given.top_count,
                prompt_logprobs=None if prompt.echo is None else given.top_count,
            )
        )
    return Job(reply.served, reply, Usage(sum(len(prompt.ids) for prompt in prompts)), choices, rows)


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
