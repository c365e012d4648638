"""Records of requests: a line of JSON in the log, without prompts or answers, and metrics.

Labels of metrics have a bounded number of values: at most `MOST_MODELS` names of models are distinguished.
"""

from __future__ import annotations

import datetime
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorakit.terminal import json_line, write_line

MOST_MODELS = 100
OTHER = "other"
"""Label of the models after the first `MOST_MODELS`."""

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass
class Trace:
    """One request.

    Attributes:
        id: Identifier, which the reply has as `X-Request-Id`.
        route: The path of the route, or "unknown".
        status: HTTP status of the reply; 499 if the client disconnected before.
        key: Name of the API key.
        model: `NAME@HASH12` or the base's name.
        name: Name of the adapter or the base.
        first_token_seconds: Time from the beginning to the first token.
        error: Code of the fault, or class of an unexpected error.
    """

    id: str
    method: str
    route: str = "unknown"
    status: int = 499
    key: str | None = None
    model: str | None = None
    name: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None
    error: str | None = None
    seconds: float = 0.0
    _started: float = field(default_factory=time.monotonic, repr=False)

    def token(self) -> None:
        """Note that the first token was made, if it is the first one."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self._started

    def end(self) -> None:
        """Note the end of the request."""
        self.seconds = time.monotonic() - self._started


def log(event: str, level: str = "info", **values: object) -> None:
    """Write a line of the log to stderr; values that are None are left out."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    line = {"time": now, "level": level, "event": event, **{k: v for k, v in values.items() if v is not None}}
    write_line(json_line(line), sys.stderr, wraps=False)


def log_error(event: str, error: BaseException, **values: object) -> None:
    """Write a line about an unexpected error: its class and where it was raised, but not its text."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    log(event, "error", error=type(error).__name__, where=where, **values)


class LogHandler(logging.Handler):
    """Writes warnings and errors of the packages that use `logging` as lines of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if record.exc_info is not None and record.exc_info[1] is not None:
            log_error(record.name, record.exc_info[1])
        else:
            log(record.name, record.levelname.lower(), message=record.getMessage())


class _Gauges(Collector):
    """The state of the engine when metrics are read."""

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        counts = self._counts()
        rows = GaugeMetricFamily("lorakit_rows", "Rows of requests by state.", labels=["state"])
        for state in ("waiting", "reading", "open"):
            rows.add_metric([state], counts[state])
        yield rows
        yield GaugeMetricFamily("lorakit_cache_tokens", "Tokens with memory for keys and values.", counts["tokens"])
        yield GaugeMetricFamily("lorakit_cache_bytes", "Bytes of keys and values.", counts["bytes"])


class Metrics:
    """The metrics of a server.

    Args:
        counts: Returns what the engine holds, see `Engine.counts`.
    """

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._registry = registry = CollectorRegistry()
        self._names: set[str] = set()
        registry.register(_Gauges(counts))
        ProcessCollector(registry=registry)
        by_model = ["route", "model", "status"]
        self._requests = Counter("lorakit_requests", "Requests.", by_model, registry=registry)
        self._prompt = Counter("lorakit_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self._made = Counter("lorakit_completion_tokens", "New tokens.", ["model"], registry=registry)
        text = "Time to the first token."
        self._first = Histogram("lorakit_first_token_seconds", text, buckets=_SECONDS, registry=registry)
        self._seconds = Histogram("lorakit_request_seconds", "Time.", ["route"], buckets=_SECONDS, registry=registry)

    def add(self, trace: Trace) -> None:
        """Count a request."""
        model = self._label(trace.name)
        self._requests.labels(trace.route, model, str(trace.status)).inc()
        self._seconds.labels(trace.route).observe(trace.seconds)
        if trace.name is not None:
            self._prompt.labels(model).inc(trace.prompt_tokens)
            self._made.labels(model).inc(trace.completion_tokens)
        if trace.first_token_seconds is not None:
            self._first.observe(trace.first_token_seconds)

    def _label(self, name: str | None) -> str:
        if name is None:
            return ""
        if name not in self._names and len(self._names) < MOST_MODELS:
            self._names.add(name)
        return name if name in self._names else OTHER

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def observe(metrics: Metrics, trace: Trace) -> None:
    """Record a request that has ended."""
    trace.end()
    metrics.add(trace)
    values = {name: value for name, value in asdict(trace).items() if not name.startswith("_") and name != "name"}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
    log("request", "info", **rounded)
