"""The classes by task, `AutoPeftModel…` and `PeftMixedModel`.

`PeftModel` for each task: the forward states its signature, since programs read from it which columns to keep.

`AutoPeftModel…`: a saved adapter with the base that its config names.

`PeftMixedModel`: PEFT's wrapper for several active adapters at once; all of them are LoRA here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, ClassVar, NoReturn

from torch import nn

from lorakit.config import LoraConfig, TaskType, read_config
from lorakit.errors import AdapterError, AdapterFileError, ConfigError, ConfigTypeError, NotYetSupported
from lorakit.peft.loaded import adapter_folder
from lorakit.peft.model import PeftModel

_WANTED_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")


def _forward_of(*columns: str) -> Callable[..., Any]:
    """A forward that takes these columns, by place or by name, and PEFT's options after them.

    What is None is not passed on: models differ in which names they take.
    """
    names = (*columns, *_WANTED_OUTPUTS)

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; see `PeftModel.forward` for `adapter_names`."""
        named = dict(zip(names, args, strict=False))
        if len(args) > len(named) or named.keys() & kwargs.keys():
            signature.bind(self, *args, **kwargs)  # raises as Python does: too many, or given twice
        named.update(kwargs)
        named.pop("task_ids", None)  # PEFT passes it to other methods' models only
        return PeftModel.forward(self, **{name: value for name, value in named.items() if value is not None})

    options = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    first, rest = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), Parameter("kwargs", Parameter.VAR_KEYWORD)
    signature = Signature([first, *options, rest])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class PeftModelForCausalLM(PeftModel):
    """For decoder-only language models."""

    task = TaskType.CAUSAL_LM
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForSeq2SeqLM(PeftModel):
    """For encoder-decoder language models."""

    task = TaskType.SEQ_2_SEQ_LM
    forward = _forward_of(
        *("input_ids", "attention_mask", "inputs_embeds"),
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels"),
    )


class PeftModelForSequenceClassification(PeftModel):
    """For classifiers of whole texts; the head is copied and trained whole."""

    task = TaskType.SEQ_CLS
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForTokenClassification(PeftModel):
    """For classifiers of tokens; the head is copied and trained whole."""

    task = TaskType.TOKEN_CLS
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForQuestionAnswering(PeftModel):
    """For extractive question answering; the head is copied and trained whole."""

    task = TaskType.QUESTION_ANS
    forward = _forward_of(
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("start_positions", "end_positions"),
    )


class PeftModelForFeatureExtraction(PeftModel):
    """For models whose hidden states are used."""

    task = TaskType.FEATURE_EXTRACTION
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds")


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = {
    kind.task.value: kind for kind in PeftModel.__subclasses__() if kind.task is not None
}
"""Task -> wrapper class, under PEFT's own name."""

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
            raise AdapterFileError(
                f"{folder}: the config does not say its base (base_model_name_or_path is null).", where=folder
            )
        mapping = found.auto_mapping or {}
        if found.task_type is None:
            _check_library(mapping, import_allowlist or ALLOWED_LIBRARIES)
        elif cls.task != found.task_type:
            raise ConfigError(_other_class(cls.task, found.task_type))
        from lorakit.hub.models import load_base

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


class PeftMixedModel(PeftModel):
    """A wrapper whose active adapters may be several; it is not saved, as PEFT's is not."""

    def __init__(self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> None:
        if not isinstance(peft_config, LoraConfig):
            raise ConfigError(
                f"The provided `peft_type` '{getattr(peft_config, 'peft_type', None)}' is not compatible with the "
                "`PeftMixedModel`: it holds LORA adapters."
            )
        super().__init__(model, peft_config, adapter_name)

    @classmethod
    def for_task(cls, task: Any) -> type[PeftModel]:
        """Always this class."""
        return cls

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; they alone are trained.

        Args:
            adapter_name: One name or several.
            inference_mode: Activate them frozen.

        Raises:
            AdapterError: There is no such adapter.
        """
        self._check_there(adapter_name)
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take adapters off.

        Args:
            adapter_name: One name or several.

        Raises:
            AdapterError: There is no such adapter.
        """
        self._check_there(adapter_name)
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self.base_model.delete_adapter(name)

    def _check_there(self, adapter_name: str | Sequence[str]) -> None:
        names = {adapter_name} if isinstance(adapter_name, str) else set(adapter_name)
        if names - set(self.peft_config):
            raise AdapterError(
                f"Adapter(s) {sorted(names - set(self.peft_config))} not found, available adapters: "
                f"{sorted(self.peft_config)}",
                what=min(names - set(self.peft_config)),
                allowed=self.peft_config,
            )

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter onto a model; see `PeftModel.from_pretrained`."""
        wrapper = PeftModel.from_pretrained(model, model_id, *args, **kwargs)
        mixed = cls.__new__(cls)
        mixed.__dict__ = dict(wrapper.__dict__)
        return mixed

    def get_layer_status(self) -> NoReturn:
        """PEFT does not have it here.

        Raises:
            ConfigTypeError: Always.
        """
        raise ConfigTypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self) -> NoReturn:
        """PEFT does not have it here.

        Raises:
            ConfigTypeError: Always.
        """
        raise ConfigTypeError(f"get_model_status is not supported for {type(self).__name__}.")

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """PEFT does not have it here; `PeftModel` saves.

        Raises:
            NotYetSupported: Always.
        """
        raise NotYetSupported(f"Saving is not supported for {type(self).__name__} (yet); save from a PeftModel.")

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> NoReturn:
        """PEFT does not have it here.

        Raises:
            NotYetSupported: Always.
        """
        raise NotYetSupported(f"Model card creation is not supported for {type(self).__name__} (yet).")
