"""What is known of a session before weights are loaded: the base, what its adapters record, their task and options."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lorakit import core, hub
from lorakit.choices import BASE_MATMULS, MATMUL_IN_INT8
from lorakit.config import LoraConfig
from lorakit.core import AdapterFiles
from lorakit.data import Request
from lorakit.durable import JsonObject, as_object, read_json
from lorakit.errors import ConfigError, ModelError, UsageError
from lorakit.hub_cache import adapter_from_hub, is_on_hub, with_revision
from lorakit.plan.quantized import Quantization
from lorakit.session.base_matmul import unsupported
from lorakit.session.prompts import Remark
from lorakit.session.tokenizers import SavedTokenizer, tokenizer_for
from lorakit.tasks import TaskOnData, load_model_for, named_as, task_of_adapter, task_of_model


def recorded_base(folder: Path, config: LoraConfig, facts: Mapping[str, Any]) -> str:
    """Return the name of the base that an adapter was trained on, from its config or its `lorakit.json`.

    Raises:
        UsageError: The adapter does not name its base.
    """
    base = hub.base_named(config.base_model_name_or_path, facts.get("base_name"), folder)
    if base is None:
        text = f"{folder}: the adapter does not name its base (base_model_name_or_path); pass --model."
        raise UsageError(text, where=folder, field="model")
    return base


def resolve_base(base: str, given: str | None, adapter: object, say: Callable[[str], None]) -> hub.ModelSource:
    """Resolve the base of an adapter; if only the adapter names it (`given` is None), an error says so.

    Raises:
        ModelError: The base was not found.
    """
    try:
        return hub.resolve(base, say)
    except ModelError as cause:
        if given is not None:
            raise
        text = f"{cause} The adapter {adapter} names this base; pass --model if it is somewhere else."
        raise ModelError(text, **{**cause.fields, "field": "model"}) from cause


def task_of(adapters: Sequence[AdapterFiles]) -> TaskOnData:
    """Return the task that adapters, at least one, were trained for.

    Raises:
        UsageError: The adapters have different tasks or classes, or rename labels differently, or the task is unknown.
    """
    first, *others = [
        task_of_adapter(files.config, files.sidecar.facts.get("training"), files.head_outputs) for files in adapters
    ]
    for files, other in zip(adapters[1:], others, strict=True):
        if (other.task, other.target) != (first.task, first.target):
            text = (
                f"{files.folder}: trained for {_described(other)}, but {adapters[0].folder} for {_described(first)}; "
                "pass adapters for the same task, with the same classes in the same order."
            )
            raise UsageError(text, where=files.folder, field="adapter")
    return replace(first, target=replace(first.target, label_map=_label_map(adapters, [first, *others])))


def _label_map(adapters: Sequence[AdapterFiles], tasks: Sequence[TaskOnData]) -> dict[str, str]:
    """Return the label maps of adapters as one; a label that they rename differently is an error."""
    names = dict[str, str]()
    for files, task in zip(adapters, tasks, strict=True):
        for name, known in task.target.label_map.items():
            if names.setdefault(name, known) != known:
                text = (
                    f"{files.folder}: reads the label {name!r} as {known!r}, but another adapter as {names[name]!r}; "
                    "measure them in separate calls."
                )
                raise UsageError(text, what=name, where=files.folder, field="adapter")
    return names


def _described(task: TaskOnData) -> str:
    names = ", ".join(task.target.names[:10])
    return f"{task.task.name} ({names})" if names else task.task.name


MERGED_FILE = "lorakit_merged.json"
"""Name of the file that records the origin of a merged model."""

MOST_MERGED_BYTES = 16 << 20


@dataclass(frozen=True)
class SessionOptions:
    """How the base of a session is loaded, and which checks of its adapters are overridden.

    Attributes:
        dtype: "auto" (as in its files), "bfloat16", "float16", "float32", or a torch dtype.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        quantization: How the base is quantized: a `Quantization`, its name, or None.
        base_matmul: "dtype", or "int8" to multiply the frozen linear layers in int8.
        allow: Names of the checks of `lorakit.load_adapter` to override.
        revision: Revision of a base on the Hub.
        accelerated: Whether rows are measured and predicted with fused forward methods, and generated with a kernel for
            linear layers with few rows, for which a row has the same bits among any rows.
    """

    dtype: str | torch.dtype = "auto"
    device: str = "auto"
    quantization: Quantization | str | None = None
    base_matmul: str = "dtype"
    allow: Collection[str] = ()
    revision: str | None = None
    accelerated: bool = True

    def __post_init__(self) -> None:
        """Check the name that no other code checks."""
        if self.base_matmul not in BASE_MATMULS:
            raise ConfigError.of("base_matmul", self.base_matmul, allowed=BASE_MATMULS)

    @cached_property
    def stored(self) -> Quantization | None:
        """The quantization of the base."""
        return Quantization(self.quantization) if isinstance(self.quantization, str) else self.quantization


@dataclass(frozen=True)
class SessionSpec:
    """What is known of a session before weights are loaded: a base or merged model, and its adapters by name.

    `facts` has the contents of each adapter's `lorakit.json`, or of the merged model's `lorakit_merged.json`; it is
    empty if nothing is recorded.
    """

    source: hub.ModelSource
    adapters: Mapping[str, AdapterFiles]
    facts: Sequence[Mapping[str, Any]]
    task: TaskOnData
    options: SessionOptions = field(default_factory=SessionOptions)

    @cached_property
    def device(self) -> torch.device:
        """Where the model runs."""
        return hub.pick_device(self.options.device)

    @property
    def files(self) -> list[AdapterFiles]:
        """The files of the adapters, in order."""
        return [*self.adapters.values()]

    @property
    def largest_first(self) -> list[tuple[str, AdapterFiles]]:
        """The adapters in the order of loading: only a base without adapters can grow for new tokens."""
        return sorted(self.adapters.items(), key=lambda item: -item[1].vocabulary)

    @property
    def trainings(self) -> list[JsonObject]:
        """The metadata of each training."""
        recorded = [one.get("training") for one in self.facts]
        return [one for one in recorded if isinstance(one, dict)]

    @property
    def rows(self) -> JsonObject | None:
        """The shape and the columns of the training data, or None if they are unknown or differ."""
        recorded = [{name: one.get(name) for name in ("shape", "columns")} for one in self.trainings]
        return recorded[0] if recorded and all(one == recorded[0] for one in recorded) else None

    def max_length(self, given: int | None) -> int | None:
        """Return the maximum sequence length: the given one, else the longest of the trainings, else None."""
        lengths = [length for one in self.trainings if isinstance(length := one.get("max_length"), int) and length > 1]
        return given if given is not None else max(lengths, default=None)

    @cached_property
    def _tokenizer(self) -> tuple[SavedTokenizer, str]:
        return tokenizer_for(self.source, self.files)

    @property
    def tokenizer(self) -> SavedTokenizer:
        """The tokenizer of all rows; see `tokenizer_for`."""
        return self._tokenizer[0]

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What the user should know before the session is used; reads the tokenizer."""
        wanted = self.options.stored
        now = "not quantized" if wanted is None else f"quantized as {wanted.name}"
        remarks = list[Remark]()
        with contextlib.suppress(ModelError):  # whoever needs the tokenizer gets the error
            remarks += [Remark(self._tokenizer[1], is_warning=True)] if self._tokenizer[1] else []
        for files in self.files:
            method = as_object(as_object(files.sidecar.facts.get("training")).get("quantization")).get("method")
            if method is not None and (wanted is None or method != wanted.name):
                text = f"{files.folder}: trained on a base quantized as {method}, but this base is {now}; "
                remarks.append(Remark(f"{text}pass --quantization {method} to use the same weights as in training."))
        return tuple(remarks)

    def on_machine(self, say: Callable[[str], None] = lambda text: None) -> SessionSpec:
        """Return the spec with the machine's dtype in place of "auto", as in training; `say` receives the reason."""
        if isinstance(self.options.dtype, torch.dtype):
            return self
        choice = hub.choose_dtype(self.options.dtype, self.device)
        say(f"precision: {choice.reason}")
        return replace(self, options=replace(self.options, dtype=choice.dtype))

    def check_generates(self) -> None:
        """Raise UsageError if the task does not continue text."""
        if not self.task.task.generates:
            where = self.files[0].folder if self.files else self.source.given
            text = f"{where}: trained for {self.task.task.name}, which does not continue text; use `lorakit predict`."
            raise UsageError(text, what=self.task.task.name, where=where, field="adapter")

    def check_predicts(self) -> None:
        """Raise UsageError if the task does not predict rows."""
        if self.task.task.predict is None:
            raise UsageError(f"the task {self.task.task.name} generates text; use `lorakit generate`.", field="task")

    def check_adapter(self, files: AdapterFiles) -> None:
        """Raise UsageError if an adapter was trained for another task or other classes than the spec's."""
        if self.adapters:
            task_of([*self.files, files])
            return
        own, names = task_of([files]), self.task.target.names
        if own.target.names:
            own = named_as(own, hub.ModelFacts.of(self.source))
        is_other = own.task is not self.task.task and files.config.task_type is not None
        if is_other or (names and own.target.names and own.target.names != names):
            text = (
                f"{files.folder}: trained for {_described(own)}, but the session is for {_described(self.task)}; "
                "open a session with this adapter."
            )
            raise UsageError(text, where=files.folder, field="adapter")

    def request(self, *, needs_label: bool = True) -> Request:
        """Return how rows of the task, with or without labels and tags, are read; as in training, if a file fits."""
        task = self.task.task
        allowed = task.formats if needs_label else task.inputs or task.formats
        return Request(allowed=allowed, needs_label=needs_label).with_usual(self.rows)

    def load_base(self, tokenizer: SavedTokenizer | None = None) -> hub.LoadedModel:
        """Load the base with the head that the task needs; a new head has random weights until an adapter is loaded.

        The model must agree with the tokenizer about padding, if rows are padded.

        Raises:
            LorakitError: The base cannot be loaded, or an adapter lacks the weights of a new head.
        """
        in_files = self.options.base_matmul == MATMUL_IN_INT8 and not unsupported(self.device)
        how = hub.LoadOptions(self.options.dtype, self.device, self.options.stored, in_files)
        return load_model_for(self.task, self.source, how, tokenizer, [files.folder for files in self.files])


def read_adapter(adapter: str | Path) -> AdapterFiles:
    """Read an adapter, given its directory, that of its run, or its Hub id ("owner/name[@revision]")."""
    return core.read_adapter(adapter_from_hub(str(adapter), has_tokenizer=True) if is_on_hub(adapter) else adapter)


def session_spec(
    model: str | hub.ModelSource | None,
    adapters: Mapping[str, AdapterFiles],
    options: SessionOptions | None = None,
    task: TaskOnData | str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> SessionSpec:
    """Resolve the base, which adapters name if the user does not, and collect what its adapters record.

    Args:
        model: Model directory, GGUF file, Hub id, packaged model, or resolved source; None for the base that the
            adapters name.
        adapters: Name -> files of an adapter.
        options: How the base is loaded.
        task: The task of a model without adapters, or its name; None selects that of the model's own head.
        say: Receives a message before a slow step, such as a download.

    Raises:
        UsageError: The adapters name different bases, or none, or have different tasks or classes.
        ModelError: The base was not found.
    """
    options, files = options or SessionOptions(), [*adapters.values()]
    if options.stored is not None:
        hub.require_quantizer(options.stored)
    if isinstance(model, hub.ModelSource):
        source = model
    else:
        given = None if model is None else with_revision(model, options.revision)
        names = ", ".join(str(one.folder) for one in files)
        source = resolve_base(given or _base_of(files, options.revision), given, names, say)
    if files:
        return SessionSpec(source, adapters, [one.sidecar.facts for one in files], task_of(files), options)
    own = task if isinstance(task, TaskOnData) else task_of_model(task, source)
    record = Path(source.path_or_id) / MERGED_FILE
    merged = read_json(record, MOST_MERGED_BYTES) if source.kind == "directory" and record.is_file() else None
    return SessionSpec(source, {}, [merged] if isinstance(merged, dict) else [], own, options)


def _base_of(adapters: Sequence[AdapterFiles], revision: str | None) -> str:
    """Return the base that all adapters name, with the given revision, or else the one that they record."""
    folders = {}
    for files in adapters:
        base = recorded_base(files.folder, files.config, files.sidecar.facts)
        recorded = files.config.revision if is_on_hub(base) else None
        folders[with_revision(base, revision or recorded)] = files.folder
    if len(folders) > 1:
        named = " and ".join(f"{base} ({folder})" for base, folder in folders.items())
        raise UsageError(f"the adapters name different bases: {named}; pass --model.", field="model")
    if not folders:
        raise UsageError("model is missing; pass a model, or adapters, which name their base.", field="model")
    return next(iter(folders))
