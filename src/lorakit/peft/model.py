"""`PeftModel`, PEFT's wrapper class, which adapts the given model in place.

Options that only affect PEFT's memory use or device placement have no effect. An unsupported option raises an error if
it would change the result; an unknown option causes a warning.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig, PeftConfig, PeftType, TaskType, read_config
from lorakit.config.checks import checked_class
from lorakit.config.types import Value
from lorakit.errors import AdapterError, ConfigError, warn_caller
from lorakit.hub_cache import HubOptions
from lorakit.peft import model_adapters, saving, status
from lorakit.peft.loaded import adapter_folder, check_options, load_whole, put_by_names, read_by_names
from lorakit.peft.mixed_batches import options_of_call
from lorakit.peft.state_dicts import IncompatibleKeys
from lorakit.peft.tuner import LoraModel, OverModel
from lorakit.peft.utilities import checkpoints, take_gradients_at_the_input
from lorakit.terminal import write_line


class PeftModel(OverModel):
    """PEFT-compatible wrapper around a model with adapters, which is inside `base_model`, for a task or any."""

    task: ClassVar[TaskType | None] = None
    special_peft_forward_args: ClassVar[frozenset[str]] = frozenset({"adapter_names", "alora_offsets"})

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        checkpointing = checkpoints(model)  # checked before layers are added, since the check walks the model
        self.base_model = LoraModel(model)
        self.training = model.training
        self.peft_type = PeftType.LORA
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        if checkpointing:
            self.prepare_model_for_gradient_checkpointing(model)

    inner = "base_model"

    @property
    def __class__(self) -> type:
        """The class; the constructor of a TRL trainer that uses another peft gets an error."""
        return checked_class(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        vars(object)["__class__"].__set__(self, kind)  # FSDP2 and parametrizations replace the class of a module

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if adapters are enabled in at least one layer."""
        return any(not layer.disable_adapters for layer in model_adapters.adapted(self))

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that any adapter saves in full, or None if there are none."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """Dtype of the base model, or None if the model does not report one."""
        return getattr(self.base_model, "dtype", None)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Wrap a model and load a saved adapter.

        Args:
            model: The base model, adapted in place.
            model_id: Directory or Hub id of the adapter.
            adapter_name: Name to give the adapter.
            is_trainable: Whether to train the adapter; if false, it is frozen and the model is set to eval mode.
            config: Config to use instead of the saved one; its `inference_mode` is set to match `is_trainable`.
            autocast_adapter_dtype: If false, the factors are cast to the dtype of their base weight.
            kwargs: `key_mapping` and the arguments of `HubOptions`, such as `subfolder`, `revision` and `token`; for
                other options, see `loaded.WITHOUT_EFFECT`.

        Raises:
            ConfigError: `config` is not a PeftConfig.
            AdapterFileError: Files are missing or damaged, or tensors do not match the model.
        """
        if config is not None and not isinstance(config, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}", field="config")
        folder = adapter_folder(model_id, kwargs)
        task = (config or read_config(folder)[0]).task_type
        wrapper = cls.for_task(task)(model)
        kwargs.setdefault("key_mapping", getattr(model, "_checkpoint_conversion_mapping", None))
        result = wrapper.load_adapter(
            folder, adapter_name, is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, config=config, **kwargs
        )
        if result.missing_keys:
            warn_caller(f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}.")
        return wrapper

    @classmethod
    def for_task(cls, task: TaskType | str | None) -> type[PeftModel]:
        """Return the wrapper class for a task: the matching subclass, or this class if no subclass matches."""
        return next((kind for kind in cls.__subclasses__() if task is not None and kind.task == task), cls)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> IncompatibleKeys:
        """Load a saved adapter as a new one, active only if it is the first, or its values into one of the same name.

        `key_mapping` (regular expression -> replacement) renames the tensors of an adapter that was saved from a base
        with a different layout; `kwargs` may have `ignore_mismatched_sizes`. The others are those of `from_pretrained`,
        or ignored. Returns names of missing and unexpected tensors, and warns of mismatches that PEFT would ignore.

        Raises:
            AdapterFileError: Files are missing or damaged, or shapes do not match the model.
            AdapterError: `adapter_name` is invalid.
        """
        folder, config = adapter_folder(model_id, kwargs), kwargs.pop("config", None)
        ignore_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        check_options("load_adapter", kwargs)
        if key_mapping or ignore_sizes or adapter_name in self.peft_config:
            files = read_by_names(self, folder, key_mapping, may_be_zero=is_trainable)
            if adapter_name not in self.peft_config:
                self.add_adapter(adapter_name, files.config.with_fields(inference_mode=not is_trainable))
                self.set_requires_grad(adapter_name, is_trainable)
            result = put_by_names(self, files, adapter_name, ignore_sizes)
        else:
            result = load_whole(self, folder, adapter_name, trainable=is_trainable, config=config)
        if not autocast_adapter_dtype:
            model_adapters.cast_to_base(self, adapter_name)
        if not is_trainable:
            self.eval()
        return result

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach a new adapter with a copy of a config; only the model's first becomes active.

        If `autocast_adapter_dtype` is false, the factors are cast to the dtype of their base weight.

        Raises:
            ConfigError: `peft_config` is not a LoraConfig or is not valid for the model.
            AdapterError: `adapter_name` is invalid or already taken.
            TargetError: Nothing in the model matches the targets.
        """
        text = "Cannot combine adapters with different peft types. Found LORA and {method}."
        model_adapters.check_is_lora(peft_config, text)
        if adapter_name in self.peft_config:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists.", what=adapter_name)
        self.base_model.inject(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        own, name = self.peft_config[adapter_name], getattr(self.get_base_model(), "name_or_path", None)
        own.base_model_name_or_path = name or own.base_model_name_or_path

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters, which must exist, make them trainable, and freeze all others."""
        self._check_exist(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def _check_exist(self, adapter_name: str | Sequence[str]) -> None:
        model_adapters.check_exist(self.peft_config, adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Return a context manager that disables the adapters in the current thread; see `model_adapters.paused`."""
        irregular = self.base_model.is_partly_disabled()
        if irregular:
            warn_caller(
                "The model contains some adapter layers that are enabled and others that are disabled. After exiting "
                "the disable_adapter context, all adapters will be enabled"
            )
        try:
            with model_adapters.paused(self.get_base_model()):
                yield
        finally:
            if irregular:
                self.base_model.enable_adapter_layers()

    def get_base_model(self) -> nn.Module:
        """Return the user's model, which contains the adapters."""
        return self.base_model.model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Value,
    ) -> None:
        """Save adapters in PEFT's layout: "default" in the directory itself, others in subdirectories named after them.

        If the model is distributed over processes (FSDP, DeepSpeed ZeRO-3), call this in all, or pass all tensors.

        Args:
            save_directory: Directory to write to.
            safe_serialization: Must be true, since lorakit does not write pickle files.
            selected_adapters: Adapters to save; None means all.
            save_embedding_layers: If True, also save the base's embedding matrices, as for a resized vocabulary.
            is_main_process: Whether this is the main process; all other processes write nothing.
            path_initial_model_for_weight_conversion: Directory of the adapter before training, if its init changed the
                base, as PiSSA does: it is saved as plain LoRA with twice the rank.
            state_dict: Tensors of any shape by name in the model, such as gathered shards, to save instead.
            kwargs: See `loaded.WITHOUT_EFFECT`.

        Raises:
            ConfigError: `safe_serialization` is false, `save_directory` is a file, or an adapter does not exist.
            AdapterError: An adapter contains non-finite values, the initial directory contains another, or a tensor is
                distributed over processes and cannot be completed.
            DiskError: The files cannot be written; existing files remain intact.
        """
        if not safe_serialization:
            raise ConfigError.of("safe_serialization", safe_serialization, "True: lorakit does not write pickle files")
        HubOptions.taken_from(kwargs)  # saving needs no download
        check_options("save_pretrained", kwargs)
        if Path(save_directory).is_file():
            raise ConfigError(f"{save_directory} is a file; pass a directory.", where=save_directory)
        if state_dict is None and "state_dict" in vars(self):  # programs replace the method of their model
            state_dict = self.state_dict()
        saving.save_selected(
            self,
            Path(save_directory),
            selected_adapters,
            state_dict,
            with_embeddings=save_embedding_layers is True,
            is_main_process=is_main_process,
            initial_folder=path_initial_model_for_weight_conversion,
        )
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    prepare_model_for_gradient_checkpointing = staticmethod(take_gradients_at_the_input)
    get_layer_status = status.get_layer_status
    get_model_status = status.get_model_status

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a model card (`README.md`), or add missing header fields to an existing one."""
        saving.write_card(self.get_base_model(), output_dir, self.task)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the model; `adapter_names` names an adapter for each row, or "__base__" for the base model alone.

        Raises:
            ConfigError: `adapter_names` contains an unknown adapter or is given while the model is in training mode.
            RouteError: The number of names differs from the batch size, or a module does not support mixed batches.
        """
        with options_of_call(self, adapter_names, args, kwargs):
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the model's `generate`, also from several threads; see `forward` for `adapter_names`."""
        with options_of_call(self, adapter_names, args, kwargs, generates=True):
            return self.base_model.generate(*args, **kwargs)

    @property
    def has_adapters(self) -> bool:
        """True if the model has adapters."""
        return bool(self.peft_config)

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next(self.parameters()).device

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters and the total number of parameters; both include adapters."""
        return model_adapters.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's summary line; the percentage is relative to all parameters, including those of adapters."""
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total if total else 0.0
        line = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}"
        write_line(line, wraps=False)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Save the adapters with `kwargs` for `save_pretrained`, and upload them to "owner/name" on the Hub."""
        from lorakit.hub.sources import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return push_folder(
                Path(folder),
                repo_id,
                message=commit_message or "Upload adapter",
                private=private,
                token=token,
                revision=revision,
                as_pull_request=create_pr,
            )


_WANTED_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")


def _forward_of(columns: str) -> Callable[..., Any]:
    """Create a `forward` method whose parameters are token ids, a mask, the given dataset columns and PEFT's options.

    Arguments that are None are not passed to the model, since some models do not accept all of them.
    """
    names = ("input_ids", "attention_mask", *columns.split(), *_WANTED_OUTPUTS)

    def forward(self: PeftModel, *args: Tensor | bool | None, **kwargs: Any) -> Any:
        """Call the model; see `PeftModel.forward` for `adapter_names`."""
        named: dict[str, Any] = dict(zip(names, args, strict=False))
        if len(args) > len(named) or named.keys() & kwargs.keys():
            signature.bind(self, *args, **kwargs)  # raises Python's TypeError for too many or repeated arguments
        named.update(kwargs)
        named.pop("task_ids", None)  # used only by other PEFT methods
        return PeftModel.forward(self, **{name: value for name, value in named.items() if value is not None})

    options = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    first, rest = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), Parameter("kwargs", Parameter.VAR_KEYWORD)
    signature = Signature([first, *options, rest])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class PeftModelForCausalLM(PeftModel):
    """Wrapper for decoder-only language models."""

    task = TaskType.CAUSAL_LM
    forward = _forward_of("inputs_embeds labels")


class PeftModelForSeq2SeqLM(PeftModel):
    """Wrapper for encoder-decoder language models."""

    task = TaskType.SEQ_2_SEQ_LM
    forward = _forward_of("inputs_embeds decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels")


class PeftModelForSequenceClassification(PeftModel):
    """Wrapper for sequence classifiers; the head is trained and saved in full."""

    task = TaskType.SEQ_CLS
    forward = _forward_of("inputs_embeds labels")


class PeftModelForTokenClassification(PeftModel):
    """Wrapper for token classifiers; the head is trained and saved in full."""

    task = TaskType.TOKEN_CLS
    forward = _forward_of("inputs_embeds labels")


class PeftModelForQuestionAnswering(PeftModel):
    """Wrapper for extractive question answering; the head is trained and saved in full."""

    task = TaskType.QUESTION_ANS
    forward = _forward_of("token_type_ids position_ids inputs_embeds start_positions end_positions")


class PeftModelForFeatureExtraction(PeftModel):
    """Wrapper for models whose hidden states are used as features."""

    task = TaskType.FEATURE_EXTRACTION
    forward = _forward_of("inputs_embeds")
