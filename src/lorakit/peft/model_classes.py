"""A dict from task to wrapper class, the `AutoPeftModel` classes, and `PeftMixedModel`.

An `AutoPeftModel` class loads an adapter and the base model named in its config. A `PeftMixedModel` can have several
active adapters; in lorakit, all of them are LoRA adapters.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from torch import nn

from lorakit.config import LoraConfig, TaskType, read_config
from lorakit.config.types import Value
from lorakit.errors import AdapterError, AdapterFileError, ConfigError, ConfigTypeError, NotYetSupported
from lorakit.hub_cache import HubOptions, local_adapter, tokenizer_folder
from lorakit.peft.model import PeftModel
from lorakit.peft.model_adapters import as_names, check_is_lora

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = {
    kind.task.value: kind for kind in PeftModel.__subclasses__() if kind.task is not None
}
"""Wrapper class for each task; PEFT uses the same name for this dict."""


def get_default_import_allowlist() -> list[str]:
    """Return the packages from which the base model's class, as named in a saved config, may be imported."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Collection[str], parent_name: str) -> bool:
    """Return whether a module may be imported: it is one of the given packages or a module inside one of them."""
    return parent_name in allowlist or parent_name.startswith(tuple(f"{allowed}." for allowed in allowlist))


class _BaseAutoPeftModel:
    """Base class of the loaders for wrapped models; it cannot be instantiated."""

    task: ClassVar[TaskType | None] = None

    def __init__(self, *_: nn.Module | Value, **__: nn.Module | Value) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the "
            f"`{name}.from_pretrained(pretrained_model_name_or_path)` or `{name}.from_config(config)` methods."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        import_allowlist: Collection[str] | None = None,
        **kwargs: Value,
    ) -> PeftModel:
        """Load the base model named in the config of an adapter (directory or Hub id), and then the adapter itself.

        `import_allowlist` has packages from which the base model's class may be imported. `kwargs` are other arguments
        of `HubOptions`, and options for the base model: `subfolder` and `revision` are those of the adapter; `token`,
        `cache_dir`, `local_files_only` and `force_download` apply to the base too.

        Raises:
            ConfigError: The class does not match the adapter's task, or the base's package is not on the allowlist.
            AdapterFileError: The config does not name the base model.
        """
        options = {"revision": revision, **kwargs}
        of_hub = HubOptions.taken_from(options)
        folder = local_adapter(pretrained_model_name_or_path, of_hub, has_tokenizer=True)
        found = read_config(folder)[0]
        if not found.base_model_name_or_path:
            text = f"{folder}: the config does not name its base model (base_model_name_or_path is null)."
            raise AdapterFileError(text, where=folder, field="base_model_name_or_path")
        mapping = found.auto_mapping or {}
        if found.task_type is None:
            allowed = get_default_import_allowlist() if import_allowlist is None else import_allowlist
            _check_library(mapping, allowed)
        elif cls.task != found.task_type:
            raise ConfigError(_other_class(cls.task, found.task_type), what=found.task_type, field="task_type")
        from lorakit.hub.models import load_base

        model = load_base(
            found.base_model_name_or_path,
            task=found.task_type.value if isinstance(found.task_type, TaskType) else None,
            written_class=(str(mapping.get("parent_library")), str(mapping.get("base_model_class"))),
            tokenizer_folder=tokenizer_folder(folder, of_hub),
            options={**of_hub.for_base(found.revision), **options},
        )
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable, config)


def _other_class(asked: TaskType | None, task: TaskType | str) -> str:
    if asked is None:
        return (
            "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type, which is "
            f"{TaskType(task).value!r}."
        )
    wanted, given = (MODEL_TYPE_TO_PEFT_MODEL_MAPPING[one].__name__ for one in (task, asked))
    return f"Expected target PEFT class: {wanted}, but you have asked for: {given}. Use the class of the task."


def _check_library(mapping: Mapping[str, Any], allowed: Collection[str]) -> None:
    library = str(mapping.get("parent_library", ""))
    if not mapping:
        text = "Cannot infer the auto class from the config; use the class for the task of the adapter."
        raise ConfigError(text, field="auto_mapping")
    if not check_import_allowlist(allowed, library):
        text = f"The auto mapping wants to import '{library}' which is not in the import allowlist; add it if safe."
        raise ConfigError(text, what=library, field="import_allowlist", allowed=allowed)


class AutoPeftModel(_BaseAutoPeftModel):
    """Loader for adapters without a task; the adapter's config specifies the base model's class."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """Loader for decoder-only language models."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """Loader for encoder-decoder language models."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """Loader for sequence classifiers."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """Loader for token classifiers."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """Loader for extractive question answering models."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """Loader for models whose hidden states are used as features."""

    task = TaskType.FEATURE_EXTRACTION


class PeftMixedModel(PeftModel):
    """Wrapper that can have several active adapters; as in PEFT, it cannot be saved."""

    def __init__(self, model: nn.Module, peft_config: LoraConfig | None = None, adapter_name: str = "default") -> None:
        if peft_config is not None:
            text = "The provided `peft_type` '{method}' is not compatible with the `PeftMixedModel`, which is for LORA."
            check_is_lora(peft_config, text)
        super().__init__(model, peft_config, adapter_name)

    @classmethod
    def for_task(cls, task: TaskType | str | None) -> type[PeftModel]:
        """Return this class for every task."""
        return cls

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove adapters, which must exist."""
        self._check_exist(adapter_name)
        for name in as_names(adapter_name):
            super().delete_adapter(name)

    def _check_exist(self, adapter_name: str | Sequence[str]) -> None:
        missing = sorted(set(as_names(adapter_name)) - set(self.peft_config))
        if missing:
            text = f"Adapter(s) {missing} not found, available adapters: {sorted(self.peft_config)}"
            raise AdapterError(text, what=missing[0], allowed=self.peft_config)

    def get_layer_status(self) -> NoReturn:
        """Raise an error, since PEFT does not support this method for this class.

        Raises:
            ConfigTypeError: Always.
        """
        raise ConfigTypeError(f"get_layer_status is not supported for {type(self).__name__}.", what=type(self).__name__)

    def get_model_status(self) -> NoReturn:
        """Raise an error, since PEFT does not support this method for this class.

        Raises:
            ConfigTypeError: Always.
        """
        raise ConfigTypeError(f"get_model_status is not supported for {type(self).__name__}.", what=type(self).__name__)

    def save_pretrained(self, *_: Value, **__: Value) -> NoReturn:
        """Raise an error, since PEFT cannot save instances of this class; save from a `PeftModel` instead.

        Raises:
            NotYetSupported: Always.
        """
        name = type(self).__name__
        raise NotYetSupported(f"Saving is not supported for {name} (yet); save from a PeftModel.", what=name)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> NoReturn:
        """Raise an error, since PEFT does not support this method for this class.

        Raises:
            NotYetSupported: Always.
        """
        name = type(self).__name__
        raise NotYetSupported(f"Model card creation is not supported for {name} (yet).", what=name)
