"""Preparation of a request before its rows are submitted: encoded prompts, rows, answers, and the form of the reply.

This takes time, for tokenizers, chat templates and JSON schemas, so it is done in a thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from lorakit.errors import ConfigError, ModelError
from lorakit.generate import Continuation
from lorakit.generate.grammar import Constraint, FastTokenizer, GrammarCompiler
from lorakit.serve.choices import Choice, Options, Prompt
from lorakit.serve.faults import HttpFault
from lorakit.serve.replies import ChatReply, CompletionReply, Reply, Usage
from lorakit.serve.requests import MOST_CHOICES, ChatRequest, CompletionRequest, GenerationRequest
from lorakit.serve.served import Served
from lorakit.serve.service import Service

MOST_TOKENS = 4096
"""Number of new tokens in a chat without `max_tokens`, if the model has no maximum context."""


@dataclass
class Job:
    """A request: its answers, the rows that make them, and the form of the reply."""

    served: Served
    reply: Reply
    usage: Usage
    choices: Sequence[Choice]
    rows: Sequence[Continuation]


class Jobs:
    """Makes jobs from requests; used by several threads.

    Args:
        service: The service whose models answer.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._grammars: weakref.WeakKeyDictionary[Served, dict[bool, GrammarCompiler]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # of the grammars

    def completion(self, served: Served, given: CompletionRequest, owner: str) -> Job:
        """Encode the prompts of a request for completions.

        Raises:
            HttpFault: A prompt is too long, or there are too many.
            ConfigError: A value is out of range, or the JSON schema is not supported.
        """
        prompts = list[Prompt]()
        for one in given.prompts:
            ids = tuple(served.encode_text(one) if isinstance(one, str) else one)
            echo = None
            if given.echo:
                echo = one if isinstance(one, str) else served.tokenizer.decode([*ids], skip_special_tokens=False)
            prompts.append(Prompt(ids, echo))
        fingerprint, seed = self._service.fingerprint, given.chosen_seed
        reply = CompletionReply(served, fingerprint, seed, given.return_token_ids, given.has_usage_part)
        return self._job(reply, given, prompts, owner)

    def chat(self, served: Served, given: ChatRequest, owner: str) -> Job:
        """Encode the conversation of a request for a chat.

        Raises:
            HttpFault: The adapter has no chat template, or the conversation is too long.
            LorakitError: The chat template rejects the conversation; or see `completion`.
        """
        if not served.has_chat_template:
            text = f"{served.id} has no chat template; use /v1/completions."
            raise HttpFault(400, text, "no_chat_template", "model")
        messages = [message.as_dict() for message in given.messages]
        prompt = Prompt(tuple(served.encode_chat(messages, given.offered)))
        fingerprint, seed = self._service.fingerprint, given.chosen_seed
        reply = ChatReply(served, fingerprint, seed, given.return_token_ids, given.has_usage_part)
        return self._job(reply, given, [prompt], owner)

    def _job(self, reply: Reply, given: GenerationRequest, prompts: Sequence[Prompt], owner: str) -> Job:
        context, is_chat = self._service.context, isinstance(given, ChatRequest)
        _check_prompts(prompts, given.n, context, "messages" if is_chat else "prompt")
        ends = frozenset() if given.ignore_eos else reply.served.end_ids(chat=is_chat)
        wanted = given.new_tokens
        options = Options(
            tuple(given.stops), given.min_tokens, bool(given.offered), given.called, given.most_calls, wanted == 0
        )
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
                    constraint=self._constraint(reply.served, given, is_chat),
                )
            )
        return Job(reply.served, reply, Usage(sum(len(prompt.ids) for prompt in prompts)), choices, rows)

    def _constraint(self, served: Served, given: GenerationRequest, is_chat: bool) -> Constraint | None:
        """Return what a row must follow; a compiler of schemas is made for each model that needs one."""
        if given.constraint is None:
            return None
        with self._lock:
            compilers = self._grammars.setdefault(served, {})
            if is_chat not in compilers:
                vocabulary, ends = self._service.session.base_rows, served.end_ids(chat=is_chat)
                try:
                    compilers[is_chat] = GrammarCompiler(cast(FastTokenizer, served.tokenizer), vocabulary, ends)
                except ModelError as error:
                    raise HttpFault(400, str(error), "invalid_value", "response_format") from error
        try:
            return compilers[is_chat].start(given.constraint)
        except ConfigError as error:
            if given.called is None:
                raise
            raise HttpFault(400, f"parameters of {given.called}: {error}", "invalid_value", "tools") from error


def _check_prompts(prompts: Sequence[Prompt], count: int, context: int | None, field: str) -> None:
    """Check the number of answers, and the lengths of prompts."""
    if not 0 < len(prompts) * count <= MOST_CHOICES:
        text = f"{len(prompts)} prompts with n {count} are not between 1 and {MOST_CHOICES} answers."
        raise HttpFault(400, text, "invalid_value", field)
    longest = max(len(prompt.ids) for prompt in prompts)
    if context is not None and longest >= context:
        # langchain-openai recognizes the first words, not the code
        text = f"The prompt is too long: it has {longest:,} tokens, but the context has {context:,}; shorten it."
        raise HttpFault(400, text, "context_length_exceeded", field)
