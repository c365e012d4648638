"""`AutoPeftModel…`: a saved adapter with the base that its config names."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from lorakit.config import LoraConfig, TaskType, read_config
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.peft.locating import adapter_folder
from lorakit.peft.model import PeftModel
from lorakit.peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

ALLOWED_LIBRARIES = ("transformers", "diffusers", "lerobot", "megatron-core")
"""Packages that a config from a file may name as the home of its base."""


class _BaseAutoPeftModel:
    """Makes wrappers, and is none itself."""

    task: ClassVar[TaskType | None] = None

    def __init__(self, *_: Any, **__: Any) -> None:
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
        **kwargs: Any,
    ) -> Any:
        """Load the base that an adapter's config names, then the adapter.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or its hub id.
            adapter_name: The adapter's name here.
            is_trainable: Go on training it.
            config: As for `PeftModel.from_pretrained`.
            revision: Revision of the adapter.
            import_allowlist: Packages that the config may name as the home of its base.
            kwargs: `subfolder` is the adapter's; the others go to the base.

        Returns:
            The wrapper for the adapter's task.

        Raises:
            ConfigError: The class does not fit the adapter's task, or its base lives in a package that is not allowed.
            AdapterFileError: The adapter does not say its base.
        """
        folder = adapter_folder(pretrained_model_name_or_path, kwargs.pop("subfolder", None), revision)
        found = read_config(folder)[0]
        if not found.base_model_name_or_path:
            raise AdapterFileError(f"{folder}: the config does not say its base (base_model_name_or_path is null).")
        mapping = found.auto_mapping or {}
        if found.task_type is None:
            _check_library(mapping, import_allowlist or ALLOWED_LIBRARIES)
        elif cls.task != found.task_type:
            raise ConfigError(_other_class(cls.task, found.task_type))
        from lorakit.hub.bases_of_adapters import load_base

        model = load_base(
            found.base_model_name_or_path,
            task=found.task_type.value if isinstance(found.task_type, TaskType) else None,
            written_class=(str(mapping.get("parent_library")), str(mapping.get("base_model_class"))),
            tokenizer_folder=folder,
            options={"revision": found.revision, **kwargs},
        )
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable, config)


def _other_class(asked: TaskType | None, task: Any) -> str:
    if asked is None:
        return (
            "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. (e.g. "
            f"`AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`; this adapter's is {task.value!r})"
        )
    wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__ if task else "PeftModel"
    return (
        f"Expected target PEFT class: {wanted}, but you have asked for: "
        f"{MODEL_TYPE_TO_PEFT_MODEL_MAPPING[asked].__name__} make sure that you are loading the correct model for your "
        "task type."
    )


def _check_library(mapping: Mapping[str, Any], allowed: Collection[str]) -> None:
    library = str(mapping.get("parent_library", ""))
    if not mapping:
        raise ConfigError(
            "Cannot infer the auto class from the config, please make sure that you are loading the correct model for "
            "your task type."
        )
    if library not in allowed and not any(library.startswith(f"{name}.") for name in allowed):
        raise ConfigError(
            f"The auto mapping wants to import '{library}' which is not in the import allowlist. If importing it is "
            f"safe, specify `import_allowlist=['{library}']` in `from_pretrained()`."
        )


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task: the config names the base's class."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For decoder-only language models."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For encoder-decoder language models."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For classifiers of whole texts."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For classifiers of tokens."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For extractive question answering."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For models whose hidden states are used."""

    task = TaskType.FEATURE_EXTRACTION
