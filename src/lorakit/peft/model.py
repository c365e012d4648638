"""`PeftModel`: the wrapper that programs of the field hold; it adapts the model it is given in place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit import core
from lorakit.config import CONFIG_FILE, LoraConfig, TaskType, read_config
from lorakit.core.checks import ALLOWANCES
from lorakit.core.sitemap import find_state
from lorakit.errors import AdapterError, ConfigError
from lorakit.peft.options import check_options
from lorakit.peft.tuner import LoraModel

BASE_NAME = "__base__"
"""In `adapter_names`: a row that runs on the base alone."""


class PeftModel(nn.Module):
    """A model with adapters, as PEFT shows it.

    Attributes:
        base_model: The `LoraModel` around the user's model.
        task: What the wrapper is for, or None.
    """

    task: ClassVar[TaskType | None] = None

    def __init__(
        self, model: nn.Module, peft_config: LoraConfig | None = None, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__()
        check_options(type(self).__name__, kwargs)
        self.base_model = LoraModel(model)
        self.training = model.training
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter -> config; the live table."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The adapters of the route in force."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list where several are active."""
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load a saved adapter onto a model.

        Args:
            model: The base, adapted in place.
            model_id: A folder, or a hub id.
            adapter_name: The adapter's name here.
            is_trainable: Go on training it; otherwise it is frozen and the model is put in eval mode.
            config: Only its task_type is used: it picks the class that is returned.
            kwargs: `subfolder`, `revision`; for others see `options.py`.

        Returns:
            A wrapper of the class for the adapter's task.

        Raises:
            AdapterFileError: Files are missing or damaged, or tensors do not fit.
            NotYetSupported: The adapter, or an option, needs what is not built yet.
        """
        folder = adapter_folder(model_id, kwargs.pop("subfolder", None), kwargs.pop("revision", None))
        task = (config or read_config(folder)[0]).task_type
        wrapper = cls.for_task(task)(model)
        wrapper.load_adapter(folder, adapter_name, is_trainable=is_trainable, **kwargs)
        return wrapper

    @classmethod
    def for_task(cls, task: TaskType | str | None) -> type[PeftModel]:
        """The class of wrapper for a task: this class's own subclass where it has one, otherwise this class."""
        return next((kind for kind in cls.__subclasses__() if task is not None and kind.task == task), cls)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> core.LoadReport:
        """Load one more adapter; it does not become active unless it is the first.

        Args:
            model_id: A folder, or a hub id.
            adapter_name: The adapter's name here.
            is_trainable: Go on training it; otherwise it is frozen and the model is put in eval mode.
            kwargs: `subfolder`, `revision`; for others see `options.py`.

        Returns:
            What was loaded; mismatches that PEFT would pass over are in its warnings, and warned about.

        Raises:
            AdapterFileError: Files are missing or damaged, or shapes do not fit.
            AdapterError: The name is taken or cannot be used.
            NotYetSupported: The adapter, or an option, needs what is not built yet.
        """
        folder = adapter_folder(model_id, kwargs.pop("subfolder", None), kwargs.pop("revision", None))
        check_options("load_adapter", kwargs)
        report = core.load_adapter(
            self.get_base_model(), folder, adapter_name, trainable=is_trainable, allow=ALLOWANCES
        )
        if not is_trainable:
            self.eval()
        return report

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, **kwargs: Any) -> None:
        """Attach a fresh adapter; the first becomes active, later ones wait for `set_adapter`.

        Args:
            adapter_name: Its name.
            peft_config: Its config; it is copied, and the copy learns the base's name.
            kwargs: See `options.py`.

        Raises:
            AdapterError: The name is taken or cannot be used.
            TargetError: Nothing matches.
            ConfigError: The config does not fit.
            NotYetSupported: The config, or an option, asks for what is not built yet.
        """
        check_options("add_adapter", kwargs)
        active = self.active_adapters
        self.base_model.inject(adapter_name, peft_config)
        own = self.peft_config[adapter_name]
        own.base_model_name_or_path = (
            getattr(self.get_base_model(), "name_or_path", None) or own.base_model_name_or_path
        )
        self.base_model.set_adapter(active or adapter_name, inference_mode=own.inference_mode and not active)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; they alone are trained.

        Args:
            adapter_name: One name or several.
            inference_mode: Activate them frozen.

        Raises:
            AdapterError: There is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name in names:
            if name not in self.peft_config:
                raise AdapterError(f"Adapter {name} not found. Adapters here: {', '.join(self.peft_config) or 'none'}.")
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off.

        Raises:
            AdapterError: There is no such adapter.
        """
        self.base_model.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A block in which the model is its original base, in this thread alone, whatever is merged.

        Yields:
            Nothing.
        """
        with contextlib.nullcontext() if not self.peft_config else core.disable(self.get_base_model()):
            yield

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters in it."""
        return self.base_model.model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT does: "default" into the folder itself, others into a folder of their name.

        Args:
            save_directory: Where.
            safe_serialization: Must be true: pickles are not written.
            selected_adapters: Which; None means all.
            save_embedding_layers: Must not be true: the base's own matrices are not part of an adapter.
            is_main_process: Other processes write nothing.
            kwargs: See `options.py`.

        Raises:
            ConfigError: safe_serialization is false.
            NotYetSupported: An option asks for what is not built yet.
            AdapterError: There is no such adapter, or its numbers are not finite.
            DiskError: The disk refuses; files that stood there are whole.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False asks for a pickle, which is not written; leave it at True.")
        check_options("save_pretrained", {"save_embedding_layers": save_embedding_layers, **kwargs})
        if Path(save_directory).is_file():
            raise ConfigError(f"{save_directory} is a file; a folder is needed.")
        for name in (selected_adapters or self.peft_config) if is_main_process else ():
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            core.save_adapter(self.get_base_model(), folder, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable numbers, and all numbers of the model with its adapters."""
        numbers = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in numbers if trained), sum(n for n, _ in numbers)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line: the share is of all parameters, adapters included."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own forward.

        Args:
            args: What the model takes.
            adapter_names: One adapter per row of the batch, "__base__" for the base alone.
            kwargs: What the model takes.

        Returns:
            What the model returns.

        Raises:
            RouteError: There is no such adapter, or the rows do not fit the batch.
        """
        with self.rows(adapter_names):
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`; the route travels with the call, so it may run in a thread of its own.

        Args:
            args: What the model takes.
            adapter_names: One adapter per row of the batch, "__base__" for the base alone.
            kwargs: What the model takes.

        Returns:
            What the model returns.

        Raises:
            RouteError: There is no such adapter, or the rows do not fit the batch.
        """
        model: Any = self.get_base_model()
        with self.rows(adapter_names, _rows_per_prompt(kwargs, model)):
            return model.generate(*args, **kwargs)

    def rows(self, adapter_names: Sequence[str] | None, copies: int = 1) -> contextlib.AbstractContextManager[None]:
        """A block with one adapter per row; none where `adapter_names` is None.

        Args:
            adapter_names: One adapter per row of the batch, "__base__" for the base alone.
            copies: A batch may also hold each row so many times running (beams).

        Raises:
            RouteError: There is no such adapter.
            ConfigError: The model is in training mode, where PEFT refuses mixed batches too.
        """
        if adapter_names is None:
            return contextlib.nullcontext()
        if self.training:
            raise ConfigError("Cannot pass `adapter_names` when the model is in training mode.")
        rows = [None if name == BASE_NAME else name for name in adapter_names]
        return core.route(self.get_base_model(), rows, copies=copies)

    @property
    def has_adapters(self) -> bool:
        """Whether any adapter sits on the model."""
        return find_state(self.get_base_model()) is not None

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lives."""
        return next(self.parameters()).device


def adapter_folder(model_id: str | os.PathLike[str], subfolder: str | None, revision: str | None) -> Path:
    """The folder of an adapter: a local one as it is, a hub id through the hub's cache.

    Args:
        model_id: A folder, or a hub id.
        subfolder: A folder inside it.
        revision: Revision on the hub.

    Raises:
        AdapterFileError: There is neither.
    """
    folder = Path(model_id)
    if folder.exists() or not _looks_like_a_hub_id(str(model_id)):
        return folder / subfolder if subfolder else folder
    from lorakit.hub import adapter_from_hub

    fetched = adapter_from_hub(str(model_id), revision=revision, subfolder=subfolder)
    return fetched / subfolder if subfolder else fetched


def _looks_like_a_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and CONFIG_FILE not in name


def _rows_per_prompt(kwargs: dict[str, Any], model: nn.Module) -> int:
    """How many rows `generate` makes of each prompt: beams, or sequences to return."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    found = [kwargs.get(word) or getattr(config, word, None) or 1 for word in ("num_beams", "num_return_sequences")]
    return max(int(number) for number in found)
