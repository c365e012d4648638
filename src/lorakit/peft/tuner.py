"""`LoraModel`, the `base_model` of a `PeftModel`: operations on the adapters in the user's model."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.architectures.families import DEFAULT_TARGETS
from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind, kind_named, kind_of
from lorakit.core.layers.lora_layer import LoraLayer, not_yet_merged
from lorakit.core.layers.named_layers import LAYERS
from lorakit.core.model.activation import parameters_by_adapter
from lorakit.core.model.checks import ALLOWANCES
from lorakit.core.model.index import AdapterIndex, find_state
from lorakit.core.model.ties import LEFT_ALONE, NOTHING_TIED
from lorakit.core.variants import moving_variant
from lorakit.errors import AdapterError, ConfigError, MergeError, NotYetSupported, warn_caller
from lorakit.peft import matching, mixed_batches, model_adapters, weighted
from lorakit.peft.data_inits import for_attaching
from lorakit.peft.layer_methods import answer_as_peft
from lorakit.peft.mixed_batches import Offsets
from lorakit.peft.paths import PENALTY_METHODS
from lorakit.peft.placeholders import PartialTargetsWarning, PeftWarning
from lorakit.peft.utilities import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, names_tied_with_embedding
from lorakit.targets.experts import LEFT_OUT


def kinds_of(config: LoraConfig | None) -> list[Kind]:
    """Return a `Kind` for each of a config's custom modules, and warn about module types that are not supported.

    Raises:
        NotYetSupported: A custom layer class is not a subclass of one of lorakit's layers.
    """
    found = []
    for module_type, layer in (config.custom_modules or {}).items() if config is not None else ():
        like = next((name for name, made in LAYERS.items() if issubclass(layer, made)), None)
        if like is None:
            text = f"{layer.__name__}: a custom layer must be a subclass of a lorakit layer; or pass kinds to attach."
            raise NotYetSupported(text, what=layer.__name__)
        if kind_of(module_type) is None:
            warn_caller(f"Unsupported layer type '{module_type}' encountered, proceed at your own risk.", UserWarning)
        name = f"{layer.__name__} on {module_type.__name__}"
        found.append(dataclasses.replace(kind_named(like), name=name, types=(module_type,), layer=layer))
    return found


class OverModel(nn.Module):
    """Base class of the tuner and the wrapper, with methods that query and select a model's adapters. `model` is the
    user's model, adapted in place; unknown attributes are those of the module named `inner`.
    """

    model: nn.Module
    inner: ClassVar[str] = "model"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inner:
                raise
            return getattr(getattr(self, self.inner), name)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Dict from adapter name to config."""
        return model_adapters.configs_of(self.model)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are active by default; the list does not change while adapters are disabled."""
        return model_adapters.active_adapters(self.model)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter if there is exactly one; otherwise, a list of names."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or freeze them, whether or not they are active."""
        model_adapters.set_requires_grad(self.model, adapter_names, requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether an adapter can be converted to plain LoRA: it needs no positions and changes no base."""
        config = self.peft_config.get(adapter_name)
        return config is not None and config.alora_invocation_tokens is None and moving_variant(config) is None

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters, make them trainable, and freeze all others; two of them must not save the same module."""
        model_adapters.set_adapter(self.model, adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the alphabetically first other one becomes active."""
        model_adapters.remove_adapter(self.model, adapter_name)


class BaseTuner(OverModel):
    """Container for the user's model, with operations on its adapters and PEFT's class attributes."""

    prefix: ClassVar[str] = "lora_"
    tuner_layer_cls: ClassVar[type[nn.Module]] = LoraLayer
    target_module_mapping: ClassVar[Mapping[str, str | Collection[str]]] = DEFAULT_TARGETS
    uses_shared_state: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | Mapping[str, LoraConfig] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        if peft_config is not None:
            if model_adapters.configs_of(model):
                warn_caller("Already found a `peft_config` attribute in the model, which will have multiple adapters.")
            config = peft_config if isinstance(peft_config, LoraConfig) else peft_config[adapter_name]
            self.inject(adapter_name, config, on_meta=low_cpu_mem_usage, state_dict=state_dict)

    def __getattr__(self, name: str) -> Any:
        field = PENALTY_METHODS.get(name)
        return super().__getattr__(name) if field is None else partial(self._penalty, field)

    def _penalty(self, field: str, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """Return the penalty, a scalar, of adapters with the variant of a config field; 0.0 if there are none."""
        with contextlib.ExitStack() as stack:
            if adapter_names is not None:
                stack.enter_context(core.use(self.model, *model_adapters.as_names(adapter_names)))
            found = core.penalties(self.model, field)
        return 0.0 if found is None else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the user's model."""
        return self.model(*args, **kwargs)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the adapted modules: those of the first adapter in the model's order, then those added later."""
        added = {name: order for order, name in enumerate(self.peft_config)}
        found = [site for site in core.sites(self.model) if site.kind != "Parameter"]
        found.sort(key=lambda site: min(added.get(name, len(added)) for name in site.layer.r))
        return [site.path for site in found]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the parameters that are targeted directly rather than through their module."""
        sites = [site for site in core.sites(self.model) if site.kind == "Parameter"]
        return [f"{site.path.partition('.base_layer')[0]}.{site.layer.spec.parameter}" for site in sites]

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return the model's config as a dictionary, or {"model_type": "custom"} if the model has none."""
        config = getattr(model, "config", None)
        as_table = getattr(config, "to_dict", None)
        table = as_table() if callable(as_table) else config
        if dataclasses.is_dataclass(table) and not isinstance(table, type):
            table = dataclasses.asdict(table)
        return dict(table) if isinstance(table, Mapping) else {"model_type": "custom"}

    def inject(
        self,
        name: str,
        config: LoraConfig,
        *,
        autocast_adapter_dtype: bool = True,
        on_meta: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Attach a new adapter with a copy of a config, and warn about config entries that match nothing.

        If `autocast_adapter_dtype` is false, the factors are cast to the dtype of their base weight; with `on_meta`,
        they stay on the meta device until `set_peft_model_state_dict` fills them. The names of the tensors (any shape)
        in `state_dict`, if given, determine the targets.
        """
        self._check_new_adapter_config(config)
        matching.check_name(name, config)
        active, config = self.active_adapters, matching.with_own_targets(self.model, config, self.target_module_mapping)
        asked = config if state_dict is None else matching.config_for_keys(self.model, config, state_dict)
        asked, found = for_attaching(self.model, asked)
        with garbage_collector_paused(), matching.with_no_target_message(self.model, config):
            report = core.attach(self.model, asked, name, allow=ALLOWANCES, kinds=kinds_of(config), statistics=found)
        answer_as_peft(self.model)
        self.peft_config[name].init_lora_weights = config.init_lora_weights
        self.peft_config[name].eva_config = config.eva_config
        for message in matching.messages_of_missing(config, report):
            warn_caller(message, PartialTargetsWarning)
        for message in matching.messages_of_own_biases(self.model, name):
            warn_caller(message, PeftWarning)
        for note in report.notes:
            if note.kind in {LEFT_ALONE, LEFT_OUT, NOTHING_TIED}:
                warn_caller(note.text)
        if state_dict is not None:
            self.peft_config[name].target_modules = config.target_modules
        setattr(self.model, model_adapters.CONFIGS, self.peft_config)
        core.set_trained(self.model, {name: not active and not config.inference_mode})
        if not autocast_adapter_dtype:
            model_adapters.cast_to_base(self.model, name)
        if on_meta:
            model_adapters.empty(self.model, name)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        if config.bias != "none" and any(other.bias != "none" for other in self.peft_config.values()):
            text = "supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all."
            raise ConfigError(f"{type(self).__name__} {text}", field="bias")
        matching.check_parameters(self.model, self.peft_config, config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Attach the adapter whose config has been put into `peft_config`.

        Raises:
            AdapterError: `peft_config` has no config of this name, the name is not valid, or the model has such an
                adapter already.
            TargetError: Nothing in the model matches the targets.
            ConfigError: The config is not valid for the model or conflicts with an existing adapter.
        """
        configs, tuner = model_adapters.configs_of(model), BaseTuner(model)
        model_adapters.check_exist(configs, adapter_name)
        if any(adapter_name in module.available_adapters() for module in model_adapters.adapted(model)):
            raise AdapterError(f"Adapter {adapter_name!r} is on the model already. Delete it first.", what=adapter_name)
        config = configs.pop(adapter_name)
        try:
            tuner.inject(
                adapter_name,
                config,
                autocast_adapter_dtype=autocast_adapter_dtype,
                on_meta=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except BaseException:
            configs[adapter_name] = config
            raise

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """Return the result of `names_tied_with_embedding` for the user's model, as in PEFT's tuner."""
        return names_tied_with_embedding(self.model)

    def is_partly_disabled(self) -> bool:
        """Return whether adapters are disabled in some layers and enabled in others."""
        state = find_state(self.model)
        return state is not None and len({bool(module.aside) for module in state.members()}) > 1

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        state = find_state(self.model)
        if state is not None:
            state.restore_default()
            for module in state.members():
                module.enable_adapters(True)
            for parameter in self.__dict__.pop("_paused", ()):
                parameter.requires_grad_(True)

    def disable_adapter_layers(self) -> None:
        """Disable and freeze all adapters until `enable_adapter_layers` is called; prefer `disable_adapter`."""
        state = find_state(self.model)
        if state is not None and state.aside is None:
            self.__dict__["_paused"] = model_adapters.pause(self.model)
            state.suspend_default()

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(
        self, *_: Any, adapter_names: Sequence[str] | None = None, alora_offsets: Offsets | None = None, **__: Any
    ) -> Iterator[None]:
        """Assign an adapter to each batch row within a context, for programs that use a tuner without a wrapper."""
        starts = contextlib.nullcontext() if alora_offsets is None else core.invoked(self.model, offsets=alora_offsets)
        with mixed_batches.rows(self, adapter_names), starts:
            yield

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, by default the active ones; `unmerge_adapter` restores the original weights exactly. A merge
        with a non-finite result always raises a MergeError.
        """
        fresh = self._unmerged(adapter_names)
        if fresh:
            self._warn_of_training(fresh)
            try:
                core.merge(self.model, *fresh)
                return
            except MergeError as refusal:  # nothing has been changed yet
                if refusal.override != "untie":
                    raise
                untie = matching.warn_of_ties(self.model, fresh)[0]
            core.merge(self.model, *fresh, untie=untie)

    def _warn_of_training(self, names: Sequence[str]) -> None:
        """Warn, unlike PEFT, that merged adapters are not trained, because merged layers use only the base weight."""
        if not (self.training and torch.is_grad_enabled()):
            return
        owned = parameters_by_adapter(self.model, names)
        trained = [name for name in names if any(parameter.requires_grad for parameter in owned[name])]
        if trained:
            listed = ", ".join(trained)
            warn_caller(f"Merging in training mode: {listed} will not be trained until unmerge_adapter() is called.")

    def unmerge_adapter(self) -> None:
        """Unmerge all merged adapters and restore the base weights bit for bit."""
        if not AdapterIndex.of(self.model).merged_adapters():
            warn_caller("Already unmerged. Nothing to do.")
            return
        core.unmerge(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge adapters, by default the active ones, permanently, and return the model without adapter layers."""
        fresh = self._unmerged(adapter_names, quiet=True)
        untie, tied = matching.warn_of_ties(self.model, fresh) if fresh else (False, False)
        config = getattr(self.model, "config", None)
        if tied and config is not None:
            config.tie_word_embeddings = False
        if fresh:
            core.merge_and_unload(self.model, *fresh, untie=untie)
        elif self.peft_config:
            core.detach(self.model)
        self.model.__dict__.pop(model_adapters.CONFIGS, None)
        return self.model

    def unload(self) -> nn.Module:
        """Remove all adapters without merging them, and return the base model."""
        return self.merge_and_unload(adapter_names=())

    def _unmerged(self, adapter_names: Sequence[str] | None, quiet: bool = False) -> list[str]:
        """Return the requested adapters that are not merged yet, and warn about those that are, as PEFT does."""
        asked = self.active_adapters if adapter_names is None else adapter_names
        return not_yet_merged(asked, AdapterIndex.of(self.model).merged_adapters(), quiet)


class LoraModel(BaseTuner):
    """Container for the user's model, with operations on its LoRA adapters."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    add_weighted_adapter = weighted.add_weighted_adapter


@contextlib.contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Return a context manager that pauses Python's garbage collector while thousands of objects are created."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
