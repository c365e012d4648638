"""The service: one thread owns the session and the engine; other threads submit requests and publish versions.

Work for the engine's thread is put in a queue and done between two steps. A version is read and checked in the caller's
thread, and added between two steps; requests that have begun keep the version with which they began.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from lorakit import __version__, core, hub
from lorakit.core import AdapterBank
from lorakit.errors import (
    AdapterError,
    AdapterFileError,
    BusyError,
    DiskError,
    LorakitError,
    RunError,
    UnknownModelError,
    UsageError,
)
from lorakit.generate import Continuation, Engine, Failure, NewToken, context_tokens, rows_are_independent
from lorakit.generate.rows import Event
from lorakit.registry import Lease, Version, content_hash
from lorakit.serve.served import Served, check_servable
from lorakit.serve.sources import Sources
from lorakit.serve.templates import TemplateProcesses
from lorakit.session import Session
from lorakit.session.tokenizers import SavedTokenizer

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Sink = Callable[[Event], None]
"""Function that gets the events of one request, in the engine's thread."""


@dataclass(frozen=True)
class Limits:
    """What a service uses at most.

    Attributes:
        rows: Requests that are read or continued at the same time.
        tokens: Tokens whose keys and values are stored for them.
        prefix_tokens: Tokens of earlier prompts that are kept for prompts that begin alike.
        waiting: Requests that wait.
        versions: Versions in memory, besides the current ones.
        poll_seconds: Time between two looks at the registries.
        failures: Steps that may fail within a minute; after one more, the service ends.
    """

    rows: int = 32
    tokens: int | None = None
    prefix_tokens: int = 8192
    waiting: int = 256
    versions: int = 8
    poll_seconds: float = 1.0
    failures: int = 2


def unknown_model(model: str) -> UnknownModelError:
    """Return the error for a model that does not exist, or not for the caller."""
    text = f"The model {model!r} does not exist; GET /v1/models lists those that do."
    return UnknownModelError(text, what=model, field="model")


class Service:
    """Serve the base and the adapters of a session, which nothing else uses until the service is closed.

    Args:
        session: A session without adapters.
        sources: Where adapters come from.
        base_name: Name of the base in requests and replies.
        limits: What the service uses at most.

    Attributes:
        fingerprint: The base, its dtype and the version of lorakit.
        faults: Name -> why its current version is not served.
        rows_are_independent: Whether a reply has the bits that it would have without other requests.
        ended: Set when the engine's thread ends.
        error: Why it ended, or None.
    """

    def __init__(self, session: Session, sources: Sources, base_name: str, limits: Limits | None = None) -> None:
        session.spec.check_generates()
        dtype = str(session.model.dtype).removeprefix("torch.")
        self.fingerprint = f"{base_name}-{dtype}-lorakit-{__version__}"
        self.session, self.base_name, self.limits = session, base_name, limits or Limits()
        self._sources = sources
        bank = AdapterBank(slots=8, by_row=True, is_constant=True)
        rows, tokens, prefix_tokens = self.limits.rows, self.limits.tokens, self.limits.prefix_tokens
        self._engine = Engine(session.model, rows=rows, tokens=tokens, prefix_tokens=prefix_tokens, bank=bank)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the dicts below
        self._templates = TemplateProcesses()
        self._base = Served.of(session, self._templates, base_name, session.spec.tokenizer)
        self._loaded: dict[str, Served] = {}
        self._current: dict[str, str] = {}
        self._hidden: set[str] = set()  # names that were unloaded
        self._rejected: dict[str, LorakitError] = {}  # versions that cannot be served
        self._leases: dict[str, Lease | None] = {}
        self._sinks: dict[int, tuple[Sink, Served]] = {}
        self._uses: Counter[str] = Counter()
        self._submitted = 0  # requests that are waiting, being read or open
        self._failed_at: list[float] = []
        self._publishing = threading.Lock()
        self._finishing = threading.RLock()  # of commands after the end of the engine's thread
        self._numbers = itertools.count()
        self._is_draining = self._is_closed = False
        self.faults: dict[str, LorakitError] = {}
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.rows_are_independent = rows_are_independent(session.model, rows=rows)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run, self._poll)]

    def start(self) -> None:
        """Load the current versions, and begin to serve.

        Raises:
            LorakitError: A current version cannot be served.
        """
        self._threads[0].start()
        self.publish()
        if self.faults:
            name, error = next(iter(self.faults.items()))
            self.close()
            raise type(error)(f"{name}: {error}", **error.fields)
        self._threads[1].start()

    def drain(self) -> None:
        """Accept no more requests; `ended` is set when the last one has ended."""
        self._is_draining = True
        self._commands.put(lambda: None)

    def close(self) -> None:
        """End all requests and the threads."""
        self._is_closed = True
        self._commands.put(lambda: None)
        self._threads[0].join()
        if self._threads[1].is_alive():
            self._threads[1].join()
        for lease in filter(None, self._leases.values()):
            lease.release()
        self._templates.close()

    @property
    def is_draining(self) -> bool:
        """Whether no more requests are accepted."""
        return self._is_draining or self._is_closed

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._threads[1].is_alive() and not self.is_draining and not self.ended.is_set()

    @property
    def context(self) -> int | None:
        """Number of tokens of a prompt and its answer, or None if there is no limit."""
        return context_tokens(self.session.model)

    # adapters

    def models(self) -> list[Served]:
        """Return the base, the current versions, and other versions in memory."""
        with self._lock:
            return [self._base, *self._loaded.values()]

    def find(self, model: str) -> Served:
        """Return what a request names: the base, `NAME` or `NAME@HASH12`, also after "base:" or the base's name.

        Raises:
            UnknownModelError: It is not in memory.
        """
        if model == self.base_name:
            return self._base
        prefix, colon, name = model.partition(":")
        given = name if colon and prefix in ("base", self.base_name) else model
        with self._lock:
            found = self._loaded.get(self._current.get(given, given))
        if found is None:
            raise unknown_model(model)
        return found

    def load(self, given: str) -> Served:
        """Serve `NAME` again after `unload`, or also the version `NAME@HASH12` or `NAME@TAG`.

        Raises:
            UnknownModelError: The sources do not have it.
            LorakitError: It cannot be served; what was served before still is.
        """
        with self._publishing:
            try:
                version = self._sources.resolve(given)
            except (AdapterError, UsageError) as error:
                raise UnknownModelError(error.message, **error.fields) from error
            self._rejected.pop(version.id, None)
            served = self._load(version)
            if given == version.name:
                self._hidden.discard(given)
                self._switch(given, version.id)
            others = [id for id in self._loaded if id not in self._current.values()]
            for id in others[: max(0, len(others) - self.limits.versions)]:
                self._remove(id)
        return served

    def unload(self, given: str) -> None:
        """Stop to serve a name or a version; requests that have begun end with it. An unknown one changes nothing."""
        with self._publishing:
            self._hidden.update(self._remove(given))

    def _remove(self, given: str) -> list[str]:
        """Remove a name's current version, or a version; return the names that stood for it."""
        with self._lock:
            id = self._current.get(given, given)
            names = [name for name, current in self._current.items() if current == id]
            for name in names:
                del self._current[name]
            gone = self._loaded.pop(id, None)
        if gone is not None:
            self._do(lambda: self._retire(gone)).result()
        return names

    def publish(self) -> None:
        """Serve the current versions of the sources, and stop to serve names that they no longer have.

        A version that cannot be served is recorded in `faults`, and the one before it stays.
        """
        with self._publishing:
            try:
                current = self._sources.current()
            except Exception as error:  # noqa: BLE001 - the registries are looked at again
                self.faults = {"": _fault(error)}
                return
            faults: dict[str, LorakitError] = dict(self._sources.faults)
            self._hidden.intersection_update((*current, *faults))
            for name, version in current.items():
                if name in self._hidden:
                    continue
                try:
                    self._load(version)
                    self._switch(name, version.id)
                except Exception as error:  # noqa: BLE001 - the other names are published
                    faults[name] = _fault(error)
            for name, fault in faults.items():
                if name not in self.faults or self.faults[name].message != fault.message:
                    log.warning("%s is not published: %s", name, fault)
            self.faults = faults
            for name in [name for name in self._current if name not in current and name not in faults]:
                self._remove(name)

    def _load(self, version: Version) -> Served:
        """Read and check a version here, then add it between two steps."""
        with self._lock:
            known = self._loaded.get(version.id)
        if known is not None:
            return known
        if version.name == self.base_name:
            text = f"the adapter {version.name!r} has the name of the base, which requests would get; rename it."
            raise UsageError(text, what=version.name, where=version.folder, field="adapters")
        lease = self._sources.lease(version)
        try:
            files, tokenizer = self._read(version)
            name = f"version-{next(self._numbers)}"
            served = Served.of(self.session, self._templates, version.id, tokenizer, name, files)
            self._do(lambda: self._add(served, files, lease)).result()
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return served

    def _read(self, version: Version) -> tuple[core.AdapterFiles, SavedTokenizer]:
        """Read and check a version; one that was rejected is not read again, since its files do not change."""
        if version.id in self._rejected:
            raise self._rejected[version.id].with_traceback(None)
        try:
            files = core.read_adapter(version.folder)
            check_servable(self.session, files)
            tokenizer = hub.adapter_tokenizer(version.folder) or self.session.spec.tokenizer
            if content_hash(version.folder) != version.hash:
                text = f"{version.folder}: its files are no longer those of {version.id}; restore or publish them."
                raise AdapterFileError(text, what=version.id, where=version.folder)
            return files, tokenizer
        except LorakitError as error:
            if not isinstance(error, DiskError):
                self._rejected[version.id] = error
            raise

    def _add(self, served: Served, files: core.AdapterFiles, lease: Lease | None) -> None:
        assert served.adapter is not None
        self.session.load_adapter(served.adapter, files)
        self._leases[served.adapter] = lease
        with self._lock:
            self._loaded[served.id] = served

    def _switch(self, name: str, id: str) -> None:
        with self._lock:
            before = self._current.get(name)
            self._current[name] = id
        if before not in (None, id):
            self._remove(before)

    def _retire(self, served: Served) -> None:
        """Remove a version from the session now, or when its last request ends."""
        assert served.adapter is not None
        if not self._uses[served.adapter] and served.adapter in self._leases:
            del self._uses[served.adapter]
            self._engine.forget(served.adapter)
            self.session.unload_adapter(served.adapter)
            lease = self._leases.pop(served.adapter)
            if lease is not None:
                lease.release()

    # requests

    def submit(self, served: Served, given: Continuation, sink: Sink) -> Future[int]:
        """Add a request for the base or an adapter; `sink` gets its events.

        Returns:
            A future with the request's number, or with the UsageError of an invalid one.

        Raises:
            BusyError: Too many requests are waiting, or the service ends.
        """
        with self._lock:
            if self.is_draining or self.ended.is_set():
                raise BusyError("The server is ending and accepts no more requests.", what="draining")
            if self._submitted >= self.limits.rows + self.limits.waiting:
                raise BusyError(f"{self._submitted:,} requests are waiting or running; try again.", what="full")
            self._submitted += 1
        number = self._do(lambda: self._submit(served, replace(given, adapter=served.adapter), sink))
        number.add_done_callback(lambda done: self._release() if done.cancelled() or done.exception() else None)
        return number

    def _submit(self, served: Served, given: Continuation, sink: Sink) -> int:
        if self.ended.is_set():
            raise BusyError("The server has ended.", what="draining")
        if served.adapter is not None and served.adapter not in self.session.adapters:
            raise UnknownModelError(f"{served.id} was removed meanwhile.", what=served.id, field="model")
        number = self._engine.submit(given)
        self._sinks[number] = sink, served
        self._uses[served.adapter or ""] += 1
        return number

    def _release(self) -> None:
        with self._lock:
            self._submitted -= 1

    def cancel(self, number: int) -> None:
        """End a request between two steps, if it has not ended."""

        def end() -> None:
            if number in self._sinks:
                self._engine.cancel(number)
                self._end(number)

        self._commands.put(end)

    def counts(self) -> dict[str, int]:
        """Number of requests that are waiting, being read and open, of tokens in use, and their bytes."""
        return self._engine.counts

    # the engine's thread

    def _do(self, work: Callable[[], Result]) -> Future[Result]:
        """Do something between two steps of the engine."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - the thread that waits gets it
                future.set_exception(error)

        self._commands.put(run)
        if self.ended.is_set():  # nobody else runs it
            with self._finishing:
                self._work(wait=False)
        return future

    def _run(self) -> None:
        try:
            while not self._is_closed and not (self._is_draining and self._engine.is_idle and not self._sinks):
                self._work()
                if not self._engine.is_idle:
                    self._step()
        except BaseException as error:  # noqa: BLE001 - the main thread reports it
            self.error = error
        finally:
            try:
                self._fail_all(BusyError("The server has ended.", what="draining"))
            finally:
                self.ended.set()  # from now on, other threads run commands
                with self._finishing:
                    self._work(wait=False)

    def _work(self, *, wait: bool = True) -> None:
        """Run the commands in the queue; wait for one if there is nothing else to do."""
        try:
            while True:
                self._commands.get(block=wait and self._engine.is_idle)()
                wait = False
        except queue.Empty:
            pass

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:
            now = time.monotonic()
            self._failed_at = [at for at in self._failed_at if now - at < 60] + [now]
            self._engine.reset()
            self._fail_all(RunError(f"A step failed: {error}", what=type(error).__name__))
            if len(self._failed_at) > self.limits.failures:
                raise
            return
        for event in events:
            sink, _ = self._sinks[event.row]
            if isinstance(event, Failure) or (isinstance(event, NewToken) and event.ended is not None):
                self._end(event.row)
            self._give(event.row, sink, event)

    def _give(self, number: int, sink: Sink, event: Event) -> None:
        """Give an event to a request, which ends if it cannot take it."""
        try:
            sink(event)
        except Exception:
            log.exception("request %d ended, because its reader failed", number)
            self.cancel(number)

    def _fail_all(self, error: LorakitError) -> None:
        for number, (sink, _) in [*self._sinks.items()]:
            self._end(number)
            self._give(number, sink, Failure(number, error))

    def _end(self, number: int) -> None:
        """Forget a request that has ended, and remove its version if it was the last one of a retired version."""
        _, served = self._sinks.pop(number)
        self._release()
        self._uses[served.adapter or ""] -= 1
        if served.adapter is not None and self._loaded.get(served.id) is not served:
            self._retire(served)

    def _poll(self) -> None:
        while not self.ended.wait(self.limits.poll_seconds):
            self.publish()


def _fault(error: Exception) -> LorakitError:
    """Return an error, or one about it if it is not lorakit's, such as that of a full memory."""
    return error if isinstance(error, LorakitError) else RunError(f"{type(error).__name__}: {error}", what="publish")
