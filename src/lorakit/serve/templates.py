"""Chat templates in processes of their own: a template is code of an adapter's author.

A sandbox cannot limit what one operation takes: `9**9**9` and `'a' * 10**10` run in C, and hold Python's lock. So a
template gets a process with limits of processor time and memory, which ends when a limit is reached.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorakit.errors import UsageError

SECONDS = 5
"""Processor time that a template may take."""

MEMORY_BYTES = 256 << 20
"""Address space of a template's process."""

MOST_CHARACTERS = 8 << 20
"""Length of the text that a template may return."""

MOST_ERROR = 1000
"""Length of the message with which a template may reject a conversation."""

_TAKES_TOO_MUCH = (
    f"it takes more than {SECONDS} s of processor time or {MEMORY_BYTES >> 20} MiB of memory; publish a version with "
    "another template"
)


class TemplateProcesses:
    """Processes that render chat templates; used by several threads, each with a process of its own."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Return the text that a template renders from JSON values.

        Raises:
            UsageError: The template has an error, rejects the values, or takes too much time or memory.
        """
        try:
            process = self._idle.pop()
        except IndexError:
            process = _started()
        assert process.stdin is not None and process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([template, values]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line.endswith(b"\n"):
            process.kill()
            process.communicate()
            raise UsageError(_TAKES_TOO_MUCH, what="template", field="chat")
        self._idle.append(process)
        text, error = json.loads(line)
        if error is not None:
            raise UsageError(error, what="template", field="chat")
        return str(text)

    def close(self) -> None:
        """End the processes that have no work."""
        while self._idle:
            self._idle.pop().communicate()


class LimitedTokenizer:
    """A tokenizer whose chat template is rendered in another process; marks of the template are not used.

    Args:
        tokenizer: A transformers tokenizer.
        processes: The processes.
    """

    is_fast = False

    def __init__(self, tokenizer: Any, processes: TemplateProcesses) -> None:
        self._tokenizer, self._processes = tokenizer, processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        """Return the tokenizer's result for a text."""
        return self._tokenizer(text, **options)

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool = True, return_dict: bool = True, **options: Any
    ) -> Any:
        """Render a conversation and return its text, or a dict with its token ids.

        Raises:
            UsageError: See `TemplateProcesses.render`.
        """
        options = {"tools": None, "documents": None, "add_generation_prompt": False, **options}
        template = self._tokenizer.get_chat_template(None, options["tools"])
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in conversation]
        values = {**self._tokenizer.special_tokens_map, "messages": turns, **options}
        text = self._processes.render(template, values)
        return self._tokenizer(text, add_special_tokens=False) if tokenize else text


def _started() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", f"from {__name__} import serve; serve({SECONDS})"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def serve(seconds: int) -> None:
    """Render templates, for this processor time each, that come as lines of JSON; reply in lines of JSON."""
    replies, compiled = sys.stdout.buffer, lru_cache(64)(_environment().from_string)
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        _limit_time(seconds)
        reply: list[str | None]
        try:
            template, values = json.loads(line)
            text = compiled(template).render(**values)
            is_long = len(text) > MOST_CHARACTERS
            reply = [None, f"its text has more than {MOST_CHARACTERS:,} characters"] if is_long else [text, None]
        except (MemoryError, RecursionError):
            reply = [None, _TAKES_TOO_MUCH]
        except Exception as error:  # noqa: BLE001 - a template is untrusted code and may raise anything
            reply = [None, f"{error}"[:MOST_ERROR]]
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _limit_time(seconds: int) -> None:
    """Let the kernel end this process when it has used more processor time."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        end = int(used.ru_utime + used.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))


class _Marks(jinja2.ext.Extension):
    """The tag with which templates mark the assistant's text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Return the text between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *values: Any, **named: Any) -> Any:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> Any:
        """See `dict.fromkeys`."""
        return dict.fromkeys(*values)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*values: Any, **named: Any) -> None:
        for name in dict(*values[1:], **named):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*values, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace: {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return an environment like that of transformers, whose import takes more time and memory than a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
