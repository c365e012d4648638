"""The bodies of requests: strict JSON, then fields with types and ranges; an unknown field is an error that names it.

A field that is null counts as absent, as in OpenAI's API.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorakit.durable import JsonObject, parse_json, problem_in
from lorakit.generate import Sampling
from lorakit.generate.grammar import JSON_OBJECT
from lorakit.serve.faults import HttpFault

MOST_CHOICES = 256
"""Maximum number of answers to one request: prompts times `n`."""

MOST_STOPS = 16
"""Maximum number of stop strings."""

MOST_SEED = 2**53 - 1
"""Largest seed that the server picks: every JSON parser keeps it."""

_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        return {name: one for name, one in given.items() if one is not None} if isinstance(given, dict) else given


class StreamOptions(_Body):
    """Options of a reply in parts."""

    include_usage: bool = False


class JsonSchema(_Body):
    """A JSON schema that an answer follows, whether `strict` or not."""

    name: str = Field(min_length=1, max_length=64)
    description: str = ""
    definition: JsonObject = Field(alias="schema")
    strict: bool = True


class ResponseFormat(_Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(_Body):
    """A function that the model may call; `strict` has no effect, as `tool_choice` decides what is constrained."""

    name: str = Field(min_length=1, max_length=64)
    description: str = ""
    parameters: JsonObject = Field(default_factory=dict)
    strict: bool = False


class Tool(_Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    """The name of a function."""

    name: str


class ToolChoice(_Body):
    """The function that an answer calls."""

    type: Literal["function"]
    function: FunctionName


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(_Body):
    """A function with the arguments with which it was called, as JSON text."""

    name: str
    arguments: str


class ToolCall(_Body):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    type: Literal["text"] = "text"  # lm-eval sends it

    def as_dict(self) -> JsonObject:
        """Return the message as chat templates take it."""
        found = self.model_dump(exclude_unset=True, exclude={"type"})
        if isinstance(self.content, list):
            found["content"] = "".join(part.text for part in self.content)
        return {**found, "role": "system" if self.role == "developer" else self.role}


class GenerationRequest(_Body):
    """The fields that completions and chats have in common.

    `user`, `metadata` and `store` have no effect.
    """

    model: str = Field(min_length=1, max_length=512)
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = Field(default_factory=list)
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, ge=-1)
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise HttpFault(400, "stream_options needs stream: true.", "invalid_value", "stream_options")
        if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in self.logit_bias):
            raise HttpFault(400, "The names in logit_bias must be token ids.", "invalid_value", "logit_bias")
        if len(self.stops) > MOST_STOPS or not all(self.stops):
            text = f"stop must have at most {MOST_STOPS} strings, which are not empty."
            raise HttpFault(400, text, "invalid_value", "stop")
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            text = "response_format has json_schema if, and only if, its type is json_schema."
            raise HttpFault(400, text, "invalid_value", "response_format.json_schema")
        if self.offered and self.schema_of_answer is not None:
            text = "response_format json_schema and json_object exclude tools, whose calls have another form."
            raise HttpFault(400, text, "invalid_value", "response_format")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def has_usage_part(self) -> bool:
        """Return whether a reply in parts has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The JSON schema that answers follow, or None."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema
        return JSON_OBJECT if schema is None else schema.definition

    @property
    def constraint(self) -> Mapping[str, Any] | None:
        """The JSON schema that tokens follow, or None."""
        return self.schema_of_answer

    @property
    def called(self) -> str | None:
        """The name of the function whose arguments are the answer, or None."""
        return None

    @property
    def most_calls(self) -> int | None:
        """Maximum number of calls in an answer, or None for any number."""
        return None

    @property
    def top_count(self) -> int | None:
        """Number of most likely tokens with log-probabilities for each token, or None for no log-probabilities."""
        return None

    @property
    def new_tokens(self) -> int | None:
        """Maximum number of new tokens, or None for the rest of the context."""
        return None

    @property
    def offered(self) -> list[JsonObject]:
        """The tools that the model may use."""
        return []

    @property
    def chosen_seed(self) -> int:
        """The seed of the first answer, at random if the request has none."""
        return secrets.randbelow(MOST_SEED) if self.seed is None else self.seed

    def sampling(self, seed: int) -> Sampling:
        """Return how the tokens of one answer are chosen.

        Raises:
            ConfigError: A value is out of range.
        """
        return Sampling(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            seed=seed % 2**63,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): value for token, value in self.logit_bias.items()},
            min_tokens=self.min_tokens,
        )


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top_count(self) -> int | None:
        """See `GenerationRequest`."""
        return self.logprobs

    @property
    def new_tokens(self) -> int | None:
        """See `GenerationRequest`."""
        return self.max_tokens

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """The prompts, each a text or token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["auto", "none"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _agreeing(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            text = "max_tokens is the old name of max_completion_tokens; pass one of them."
            raise HttpFault(400, text, "invalid_value", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise HttpFault(400, "top_logprobs needs logprobs: true.", "invalid_value", "top_logprobs")
        if self.called is not None and self._schemas.keys().isdisjoint([self.called]):
            text = f"tools has no function {self.called!r}, which tool_choice names."
            raise HttpFault(400, text, "invalid_value", "tool_choice")
        return self

    @property
    def called(self) -> str | None:
        """See `GenerationRequest`."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None

    @property
    def most_calls(self) -> int | None:
        """See `GenerationRequest`."""
        return None if self.parallel_tool_calls else 1

    @property
    def constraint(self) -> Mapping[str, Any] | None:
        """See `GenerationRequest`; a function that is called has a schema, that of its arguments."""
        return self.schema_of_answer if self.called is None else {**JSON_OBJECT, **self._schemas[self.called]}

    @property
    def _schemas(self) -> Mapping[str, JsonObject]:
        return {tool.function.name: tool.function.parameters for tool in self.tools}

    @property
    def top_count(self) -> int | None:
        """See `GenerationRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new_tokens(self) -> int | None:
        """See `GenerationRequest`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def offered(self) -> list[JsonObject]:
        """See `GenerationRequest`."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in self.tools]


class AdapterRequest(_Body):
    """The body of `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: a name, never a path."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], data: bytes) -> Body:
    """Return the body of a request.

    Raises:
        HttpFault: It is not JSON in UTF-8, has NaN, infinity, a repeated key, deep nesting or text that cannot be
            encoded, or a field is unknown, missing or wrong.
    """
    try:
        given = parse_json(data)
    except (ValueError, RecursionError) as cause:
        reason = "it is nested too deeply" if isinstance(cause, RecursionError) else f"{cause}"
        raise HttpFault(400, f"The body is not valid JSON: {reason}.", "invalid_json") from None
    problem = problem_in(given)
    if problem is not None:
        where, what = problem
        raise HttpFault(400, f"The body{where} {what}.", "invalid_json", where.lstrip(".") or None)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _fault(error, given) from None


def _fault(error: ValidationError, body: Any) -> HttpFault:
    """Return the fault for the problem that is deepest in the body: in a union, that of the alternative that fits."""
    found = [(_path(one["loc"], body), one) for one in error.errors(include_url=False, include_context=False)]
    path, problem = max(found, key=lambda one: (one[0].count(".") + one[0].count("["), bool(one[0])))
    message = "this field is not supported" if problem["type"] == "extra_forbidden" else problem["msg"]
    text = f"{path}: {message}." if path else f"{message}."
    return HttpFault(400, text, _CODES.get(problem["type"], "invalid_value"), path or None)


def _path(location: Sequence[int | str], body: Any) -> str:
    """Return the path of a field, such as "messages[0].content"; a location also names alternatives of unions."""
    path, value = "", body
    for at, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list):
            path, value = f"{path}[{part}]", value[part] if part < len(value) else None
        elif isinstance(part, str) and isinstance(value, dict) and (part in value or at == len(location) - 1):
            path, value = f"{path}.{part}", value.get(part)
    return path.lstrip(".")
