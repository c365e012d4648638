"""Options of PEFT's calls beyond those that every program uses: which have no effect here, and which are not built yet.

An option that only says how PEFT shall save memory or where it shall put things is accepted in silence; one that would
change a result is refused by name; one that nobody knows is warned about.

`push_to_hub` of a wrapper: its adapters as they are saved, with their card.

What a wrapper says of itself: how much is trained, the status of its layers, its card.

`PeftModel`: the wrapper that programs of the field hold; it adapts the model it is given in place.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.config import LoraConfig, PeftConfig, PeftType, TaskType, read_config
from lorakit.errors import AdapterError, ConfigError, NotYetSupported, nearest, warn_caller
from lorakit.peft import adapter_queries, casting, saving, status
from lorakit.peft.loaded import LoadResult, adapter_folder, load_by_names, load_whole
from lorakit.peft.mixed_batches import in_peft_words, options_of_forward, options_of_generation
from lorakit.peft.preparing import checkpoints, take_gradients_at_the_input
from lorakit.peft.saving import write_card
from lorakit.peft.state_dicts import get_peft_model_state_dict
from lorakit.peft.tuner import LoraModel

WITHOUT_EFFECT: Mapping[str, str] = {
    "low_cpu_mem_usage": "factors are made once, where their site is",
    "ephemeral_gpu_offload": "nothing is moved to compute an init",
    "torch_device": "factors go to their site's device",
    "device_map": "factors go to their site's device",
    "max_memory": "factors go to their site's device",
    "offload_folder": "factors go to their site's device",
    "offload_dir": "factors go to their site's device",
    "torch_dtype": "factors are fp32 or wider beside any base",
    "dtype": "factors are fp32 or wider beside any base",
    "token": "the hub's client reads HF_TOKEN",
    "use_auth_token": "the hub's client reads HF_TOKEN",
    "cache_dir": "the hub's client reads HF_HOME",
    "local_files_only": "the network is only used for a hub id, and HF_HUB_OFFLINE keeps it off",
    "force_download": "the hub's client knows what is new",
    "proxies": "the hub's client reads HTTPS_PROXY",
}
"""Option -> why nothing has to be done for it."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
}
"""Option that is not built yet -> the values that ask for nothing that is not done anyway."""


def check_options(call: str, options: Mapping[str, Any]) -> None:
    """Look at the options that a call does not use.

    Args:
        call: Name of the call, for messages.
        options: What was given beyond its own arguments.

    Raises:
        NotYetSupported: One of them would change the result and is not built.
    """
    for name, value in options.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise NotYetSupported(
                    f"{call}: {name}={value!r} is not built yet. Leave it at {NEUTRAL[name][0]!r}, its default."
                )
        elif name not in WITHOUT_EFFECT:
            hint = nearest(name, [*WITHOUT_EFFECT, *NEUTRAL], 1)
            meant = f" Did you mean {hint[0]}?" if hint else ""
            warn_caller(f"{call}: {name} is not known here and has no effect.{meant}")


class Pushed(nn.Module):
    """A wrapper that can be put onto a model hub."""

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
        """Save the adapters and upload them.

        Args:
            repo_id: The repository, "owner/name"; it is made where it is missing.
            commit_message: Of the commit.
            private: A new repository is not public.
            token: Of the hub; None takes the stored one.
            revision: Branch to commit to.
            create_pr: Ask for a review instead.
            kwargs: What `save_pretrained` takes.

        Returns:
            Where the commit can be seen.

        Raises:
            ModelError: The hub refuses, or cannot be reached.
        """
        from lorakit.hub.sources import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)  # type: ignore[operator]
            return push_folder(
                Path(folder),
                repo_id,
                message=commit_message or "Upload adapter",
                private=private,
                token=token,
                revision=revision,
                as_pull_request=create_pr,
            )


class Shown(nn.Module):
    """A wrapper that says what stands on its model."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable numbers, and all numbers of the model with its adapters."""
        numbers = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in numbers if trained), sum(n for n, _ in numbers)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line: the share is of all parameters, adapters included."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The status of every adapted layer; see `status.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The status of the model; see `status.get_model_status`."""
        return status.get_model_status(self)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write `README.md` beside an adapter, or put into one that is there what it lacks.

        Args:
            output_dir: The folder.
        """
        write_card(self, Path(output_dir))


class PeftModel(Shown, Pushed):
    """A model with adapters, as PEFT shows it.

    Attributes:
        base_model: The `LoraModel` around the user's model.
        task: What the wrapper is for, or None.
    """

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
        checkpointing = checkpoints(model)  # asked before the layers are there, since the answer walks the model
        self.base_model = LoraModel(model)
        self.training = model.training
        self.peft_type = PeftType.LORA
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        if checkpointing:
            self.prepare_model_for_gradient_checkpointing(model)

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

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts now."""
        return any(not adapter_queries.is_disabled(layer) for layer in adapter_queries.adapted(self))

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter copies, or None."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base's dtype, where it says one."""
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
        """Load a saved adapter onto a model.

        Args:
            model: The base, adapted in place.
            model_id: A folder, or a hub id.
            adapter_name: The adapter's name here.
            is_trainable: Go on training it; otherwise it is frozen and the model is put in eval mode.
            config: Used instead of the one in the folder, with `inference_mode` set.
            autocast_adapter_dtype: False gives the factors the dtype of the weight they stand beside.
            kwargs: `subfolder`, `revision`, `key_mapping`; for others see `options.py`.

        Returns:
            A wrapper of the class for the adapter's task.

        Raises:
            ConfigError: `config` is no config.
            AdapterFileError: Files are missing or damaged, or tensors do not fit.
            NotYetSupported: The adapter, or an option, needs what is not built yet.
        """
        if config is not None and not isinstance(config, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}")
        folder = adapter_folder(model_id, kwargs.pop("subfolder", None), kwargs.pop("revision", None))
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
        """The class of wrapper for a task: this class's own subclass where it has one, otherwise this class."""
        import_module(
            "lorakit.peft.model_classes"
        )  # its own subclasses are there once their module is, which needs this one
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
    ) -> LoadResult:
        """Load one more adapter; it does not become active unless it is the first. One that is here gets its numbers.

        Args:
            model_id: A folder, or a hub id.
            adapter_name: The adapter's name here.
            is_trainable: Go on training it; otherwise it is frozen and the model is put in eval mode.
            torch_device: Accepted; factors go to their site's device.
            autocast_adapter_dtype: False gives the factors the dtype of the weight they stand beside.
            ephemeral_gpu_offload: Accepted.
            low_cpu_mem_usage: Accepted; factors are made once, where their site is.
            key_mapping: Regular expression -> what to write instead, for names of another layout of the base.
            kwargs: `subfolder`, `revision`, `ignore_mismatched_sizes`; for others see `options.py`.

        Returns:
            What was loaded; mismatches that PEFT would pass over are warned about.

        Raises:
            AdapterFileError: Files are missing or damaged, or shapes do not fit.
            AdapterError: The name cannot be used.
            NotYetSupported: The adapter, or an option, needs what is not built yet.
        """
        folder = adapter_folder(model_id, kwargs.pop("subfolder", None), kwargs.pop("revision", None))
        config = kwargs.pop("config", None)
        ignore_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        check_options("load_adapter", kwargs)
        if key_mapping or ignore_sizes or adapter_name in self.peft_config:
            result = load_by_names(
                self, folder, adapter_name, trainable=is_trainable, key_mapping=key_mapping, ignore_sizes=ignore_sizes
            )
        else:
            result = load_whole(self, folder, adapter_name, trainable=is_trainable, config=config)
        if not autocast_adapter_dtype:
            casting.cast_to_base(self, adapter_name)
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
        """Attach a fresh adapter; the first becomes active, later ones wait for `set_adapter`.

        Args:
            adapter_name: Its name.
            peft_config: Its config; it is copied, and the copy learns the base's name.
            low_cpu_mem_usage: Accepted; factors are made once, where their site is.
            autocast_adapter_dtype: False gives the factors the dtype of the weight they stand beside.

        Raises:
            ConfigError: It is no LoraConfig, or does not fit.
            AdapterError: The name is taken or cannot be used.
            TargetError: Nothing matches.
            NotYetSupported: The config asks for what is not built yet.
        """
        if not isinstance(peft_config, LoraConfig):
            raise ConfigError(
                "Cannot combine adapters with different peft types. Found LORA and "
                f"{getattr(peft_config, 'peft_type', type(peft_config).__name__)}."
            )
        if adapter_name in self.peft_config:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists.", what=adapter_name)
        self.base_model.inject(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        own = self.peft_config[adapter_name]
        own.base_model_name_or_path = (
            getattr(self.get_base_model(), "name_or_path", None) or own.base_model_name_or_path
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; they alone are trained.

        Args:
            adapter_name: One name or several.
            inference_mode: Activate them frozen.

        Raises:
            AdapterError: There is no such adapter.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if name not in self.peft_config:
                text = f"Adapter {name} not found. Adapters here: {', '.join(self.peft_config) or 'none'}."
                raise AdapterError(text, what=name, allowed=self.peft_config)
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off.

        Raises:
            AdapterError: There is no such adapter.
        """
        self.base_model.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A block in which the model is its original base, in this thread alone; see `flags.paused`.

        Yields:
            Nothing.
        """
        irregular = self.base_model.is_partly_disabled()
        if irregular:
            warn_caller(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled"
            )
        with casting.paused(self.get_base_model()):
            yield
        if irregular:
            self.base_model.enable_adapter_layers()

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
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        state_dict: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT does: "default" into the folder itself, others into a folder of their name.

        Args:
            save_directory: Where.
            safe_serialization: Must be true: pickles are not written.
            selected_adapters: Which; None means all.
            save_embedding_layers: True adds the base's embedding matrices, for a vocabulary that was resized;
                otherwise they are not part of an adapter.
            is_main_process: Other processes write nothing.
            path_initial_model_for_weight_conversion: Where the adapter was saved before training: what acts on a base
                that its init changed (PiSSA and its like) is written as plain LoRA of twice the rank.
            state_dict: Name in the model -> tensor (…) to write instead of the model's own, as gathered elsewhere.
            kwargs: See `options.py`.

        Raises:
            ConfigError: safe_serialization is false, or an adapter is not here.
            NotYetSupported: An option asks for what is not built yet.
            AdapterError: There is no such adapter, or its numbers are not finite.
            DiskError: The disk refuses; files that stood there are whole.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False asks for a pickle, which is not written; leave it at True.")
        check_options("save_pretrained", kwargs)
        if Path(save_directory).is_file():
            raise ConfigError(f"{save_directory} is a file; a folder is needed.")
        chosen = list(self.peft_config if selected_adapters is None else selected_adapters)
        if any(name not in self.peft_config for name in chosen):
            raise ConfigError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {selected_adapters}."
            )
        whole = save_embedding_layers is True
        for name in chosen if is_main_process else ():
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            tensors = None
            if state_dict is not None or whole:
                tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=whole)
            saving.save(self, folder, name, tensors, path_initial_model_for_weight_conversion)
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or freeze them, whatever is active.

        Args:
            adapter_names: One name or several.
            requires_grad: Train them.
        """
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter's update can be written as plain LoRA.

        Args:
            adapter_name: The adapter.
        """
        return self.base_model.supports_lora_conversion(adapter_name)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let what comes out of the input embedding require gradients.

        Args:
            model: The user's model.
        """
        take_gradients_at_the_input(model)

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
        with in_peft_words(adapter_names, args, kwargs), options_of_forward(self, adapter_names, args, kwargs):
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
        with in_peft_words(adapter_names), options_of_generation(self, adapter_names, args, kwargs):
            return model.generate(*args, **kwargs)

    @property
    def has_adapters(self) -> bool:
        """Whether any adapter sits on the model."""
        return bool(self.peft_config)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lives."""
        return next(self.parameters()).device
