"""`LoraConfig` and its base classes, with PEFT's fields and methods. Field defaults are defined only here.

The constructor rejects unknown fields; `read_config` keeps them, so it can read files from any PEFT version.
`check_built` rejects known options that lorakit does not support when the config is used.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lorakit.config import checks, nested
from lorakit.config.types import API_LEVEL, PeftType, TaskType, Value, check_types, plain
from lorakit.config.variants import VARIANT_COSTS, check_method, costs_of
from lorakit.durable import JsonObject, read_json, write_json
from lorakit.errors import AdapterFileError, ConfigError, ConfigTypeError, NotYetSupported, warn_caller
from lorakit.hub_cache import (
    CONFIG_FILE,
    NO_OPTIONS,
    HubOptions,
    adapter_directory,
    adapter_from_hub,
    looks_like_a_hub_id,
)

Config = TypeVar("Config", bound="PeftConfigMixin")

PARTS: Mapping[str, type] = {
    "runtime_config": nested.LoraRuntimeConfig,
    "eva_config": nested.EvaConfig,
    "corda_config": nested.CordaConfig,
    "lora_ga_config": nested.LoraGAConfig,
    "velora_config": nested.VeloraConfig,
    "monteclora_config": nested.MontecloraConfig,
    "use_bdlora": nested.BdLoraConfig,
    "arrow_config": nested.ArrowConfig,
    "kasa_config": nested.KasaConfig,
}
"""Dict from the names of fields that hold nested configs to the classes of those configs."""

CHECKED_BY_VALUE = frozenset(
    {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "loftq_config"}
)
"""Fields that `check_types` skips, because `lorakit.config.checks` has specific checks and messages for them."""

NOT_IN_PEFT = frozenset({"use_lora_xs"})
"""Fields that PEFT's config lacks. They are written only if they are set, because PEFT warns about unknown fields."""


def config_file(name: str | os.PathLike[str], options: HubOptions = NO_OPTIONS) -> Path:
    """Return the path of an adapter's config file, in a directory or on the Hub, or raise an AdapterFileError."""
    folder = Path(name) / (options.subfolder or "")
    if looks_like_a_hub_id(name) and not Path(name).exists():
        try:
            folder = adapter_from_hub(str(name), options, files=[CONFIG_FILE])
        except ValueError as cause:
            raise AdapterFileError(f"Can't find '{CONFIG_FILE}' at '{name}': {cause}", where=name) from cause
    if not (folder / CONFIG_FILE).is_file():
        text = f"Can't find '{CONFIG_FILE}' at '{folder}': an adapter is a directory that contains this file."
        raise AdapterFileError(text, where=folder)
    return folder / CONFIG_FILE


def _values(path: Path) -> JsonObject:
    """Return the contents of a config file."""
    values = read_json(path)
    if not isinstance(values, dict):
        text = f"{path}: contains a {type(values).__name__}; expected a JSON object with the config's fields."
        raise AdapterFileError(text, where=path)
    return values


@dataclass
class PeftConfigMixin:
    """Base class that converts configs to and from dicts and files.

    Attributes:
        task_type: Task of the model; selects the heads that are trained in full (`HEADS_BY_TASK`).
        auto_mapping: Class and library of the base model, in PEFT's format; lorakit stores them but never imports them.
        unknown: Unknown keys from a file, with their values; written back when the config is saved.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        self.task_type = checks.task(self.task_type)
        self.peft_version = self.peft_version or API_LEVEL
        self.unknown: dict[str, Any] = {}

    is_prompt_learning = is_adaption_prompt = False  # not fields; programs ask for them

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, converting nested configs to dicts and omitting process-local settings."""
        values = dataclasses.asdict(self)
        values.pop("runtime_config", None)
        return values

    def as_json(self) -> dict[str, Any]:
        """Return the config as saved in `adapter_config.json`, including unknown keys; sets become sorted lists."""
        values = dict(self.unknown)
        for name, value in self.to_dict().items():
            if name in NOT_IN_PEFT and not value:
                continue
            stored = value.value if isinstance(value, enum.Enum) else value
            values[name] = sorted(stored) if isinstance(stored, (set, frozenset)) else stored
        return values

    def with_fields(self: Config, **fields: Value) -> Config:
        """Return an independent copy with some fields changed; checks and warnings are not repeated."""
        twin = copy.deepcopy(self)
        for name, value in fields.items():
            setattr(twin, name, value)
        return twin

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Value) -> None:
        """Write `adapter_config.json` to a directory; a ConfigError if it is a file.

        Of PEFT's options, only `auto_mapping_dict` has an effect: it is written as `auto_mapping`.
        """
        if Path(save_directory).is_file():
            text = f"Provided path ({save_directory}) should be a directory, not a file."
            raise ConfigError(text, where=save_directory)
        values = self.as_json()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_json(Path(save_directory) / CONFIG_FILE, values)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Value
    ) -> PeftConfigMixin:
        """Read `adapter_config.json` from a directory or the Hub, as an instance of the class that matches its
        `peft_type`.

        The options are those of `HubOptions`; fields cannot be overridden.
        """
        path = config_file(pretrained_model_name_or_path, HubOptions.taken_from({**kwargs, "subfolder": subfolder}))
        return cls.from_peft_type(**cls.check_kwargs(**cls.from_json_file(path)))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Value) -> JsonObject:
        """Return the contents of a config file, except for process-local settings; options are ignored, as in PEFT."""
        values = _values(Path(path_json_file))
        if values.pop("runtime_config", None) is not None:
            text = "contains a `runtime_config` key. This is ignored, because it is process-local."
            warn_caller(f"{path_json_file} {text}")
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Value) -> PeftConfigMixin:
        """Create a config of the class that `peft_type` selects; keep unknown fields, but warn about them.

        A ConfigTypeError if some fields are unknown, and `peft_type` is missing.
        """
        checks.lora(kwargs.get("peft_type"))
        kind: type[PeftConfigMixin] = LoraConfig if "peft_type" in kwargs else cls
        names = {f.name for f in dataclasses.fields(kind)}
        known: dict[str, Any] = {key: value for key, value in kwargs.items() if key in names}
        unknown = {key: value for key, value in kwargs.items() if key not in names}
        if unknown and "peft_type" not in kwargs:
            text = f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            raise ConfigTypeError(text, what="peft_type", field="peft_type")
        config = kind(**known)
        if unknown:
            config.unknown = unknown
            text = f"Unexpected keyword arguments {sorted(unknown)} for class {kind.__name__}, these are ignored."
            warn_caller(f"{text} They are written back when the config is saved.")
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Value) -> dict[str, Any]:
        """Return the fields unchanged; subclasses may override this to check or change them."""
        return kwargs


@dataclass
class PeftConfig(PeftConfigMixin):
    """Fields common to the configs of all methods."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


PEFT_TABLES_OF_VARIANTS = ("use_dora",)
"""Layer attributes in some PEFT versions. Each attribute is a dict that shows which adapters use a given variant."""


@dataclass
class LoraConfig(PeftConfig):
    """Configuration of an adapter: target modules, rank, scale, initialization and variant.

    Attributes:
        r: Rank, at least 1.
        target_modules: Module names or dotted suffixes, a single regular expression, or "all-linear".
        exclude_modules: Modules to leave out, in the same format as `target_modules`; exclusions take precedence.
        lora_alpha: Numerator of the scale; see `scale`.
        lora_dropout: Probability, in [0, 1), that an element of A's input is dropped during training.
        fan_in_fan_out: Whether base weights are stored as (in, out). lorakit determines this from the module and writes
            the field only for other programs.
        bias: Which biases of the base model are also trained: "none", "all" or "lora_only".
        use_rslora: Whether to divide alpha by √r instead of r.
        modules_to_save: Names of modules to train and save in full.
        init_lora_weights: True (Kaiming-uniform A, zero B), False or None (random A and B), or the name of an init.
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the layer list that `layers_to_transform` indexes, or several names; each is a regular
            expression.
        rank_pattern: Dict from name patterns to ranks that override `r`.
        alpha_pattern: Dict from name patterns to alphas that override `lora_alpha`.
        megatron_config: Settings for Megatron's parallel layers; not supported.
        megatron_core: Import path of Megatron Core; never imported.
        trainable_token_indices: Ids of the tokens whose embeddings are trained, or a dict from the names of embedding
            modules to token ids.
        loftq_config: Settings for the "loftq" init.
        eva_config: Settings for the "eva" init.
        corda_config: Settings for the "corda" init.
        lora_ga_config: Settings for the "lora_ga" init.
        use_dora: Whether to use the weight-decomposed variant DoRA (arXiv:2402.09353).
        velora_config: Settings for the VeLoRA variant (arXiv:2405.17991), which keeps a compressed input for A's
            gradient; None turns the variant off.
        alora_invocation_tokens: Ids of the tokens that invoke an aLoRA adapter (arXiv:2504.12397). The adapter is
            active from the last occurrence of this token sequence onward.
        use_qalora: Whether to use the QA-LoRA variant (arXiv:2309.14717), in which A reads means of groups of inputs.
        qalora_group_size: Number of inputs per group in QA-LoRA; must divide the input size of each site.
        monteclora_config: Settings for the MonteCLoRA variant (arXiv:2411.04358), in which A is sampled during
            training; None turns the variant off.
        layer_replication: Ranges of layers to stack; replicas share the weights of the original layers.
        runtime_config: Process-local settings; never saved.
        lora_bias: Whether B has a bias.
        target_parameters: Names of parameters to adapt, such as fused expert weights.
        use_bdlora: Settings for the BD-LoRA variant, in which A or B is block-diagonal; None turns the variant off.
        arrow_config: Settings for the Arrow variant (arXiv:2405.11157), a router over the other adapters; None turns
            the variant off.
        kasa_config: Settings for the KaSA variant (arXiv:2412.06071), which truncates the base weights; None turns the
            variant off.
        ensure_weight_tying: Whether an adapter on one of two tied weights applies to both.
        use_lora_xs: Whether to use the LoRA-XS variant (arXiv:2405.17604), in which A and B are frozen and an r × r
            matrix between them is trained. PEFT does not have it.

    Raises:
        ConfigError: A value is not allowed; the message names the field, the value and what is allowed.
        ConfigTypeError: A field has the wrong type.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: nested.LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: nested.EvaConfig | None = None
    corda_config: nested.CordaConfig | None = None
    lora_ga_config: nested.LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: nested.VeloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: nested.MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: nested.LoraRuntimeConfig = field(default_factory=nested.LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: nested.BdLoraConfig | None = None
    arrow_config: nested.ArrowConfig | None = None
    kasa_config: nested.KasaConfig | None = None
    ensure_weight_tying: bool = False
    use_lora_xs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self, self.peft_type)
        self.peft_type = checks.lora(self.peft_type)
        for each in dataclasses.fields(LoraConfig):
            setattr(self, each.name, plain(getattr(self, each.name)))
        if self.target_modules == "" and self.target_parameters:
            self.target_modules = []  # as in PEFT, only parameters are targeted
        self.target_modules = checks.names("target_modules", self.target_modules)
        self.exclude_modules = checks.names("exclude_modules", self.exclude_modules)
        self.modules_to_save = checks.plain_list("modules_to_save", self.modules_to_save)
        self.target_parameters = checks.parameters(self.target_parameters)
        self.init_lora_weights = checks.init(self.init_lora_weights)
        self.rank_pattern = checks.table("rank_pattern", self.rank_pattern)
        self.alpha_pattern = checks.table("alpha_pattern", self.alpha_pattern)
        for name, part in PARTS.items():
            setattr(self, name, nested.restored(name, getattr(self, name), part))
        self.runtime_config = self.runtime_config or nested.LoraRuntimeConfig()
        check_types(self, CHECKED_BY_VALUE)
        checks.check_values(self)
        checks.check_inits(self)
        checks.check_together(self)
        self.custom_modules: dict[type, type] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the config as saved in `adapter_config.json`; a variant that PEFT lacks has its own `peft_type`."""
        costs = costs_of(self)
        return super().as_json() | ({"peft_type": costs.peft_type} if costs is not None and costs.peft_type else {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class; the constructor of a TRL trainer that uses another peft gets an error."""
        return checks.checked_class(self)

    @property
    def is_plain_lora(self) -> bool:
        """Return whether the adapter is plain LoRA without a bias on B, as fused forward passes require."""
        return not self.lora_bias and costs_of(self) is None

    @property
    def trains_only_a(self) -> bool:
        """Return whether only A is trained while B keeps its initial value (MiCA)."""
        return str(self.init_lora_weights).lower() == "mica"

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Register the layer classes that `core` uses for custom module types; PEFT has the same private method.

        Args:
            mapping: Dict from module types to layer classes.
        """
        self.custom_modules = {**(self.custom_modules or {}), **mapping}


_WITHOUT_MEANING = frozenset({"megatron_core", "runtime_config"})


def read_config(folder: str | os.PathLike[str]) -> tuple[LoraConfig, list[str]]:
    """Read a config written by lorakit or by any version of PEFT, and return it with the unknown keys in the file.

    An AdapterFileError if the file is missing or damaged, is for a method other than LoRA, or contains an invalid
    value.
    """
    directory = adapter_directory(folder)
    path = directory / CONFIG_FILE if directory.is_dir() else directory
    if not path.exists():
        lack = f"no {CONFIG_FILE}, so this is not an adapter" if directory.is_dir() else "directory not found"
        text = f"{directory}: {lack}; an adapter is a directory with {CONFIG_FILE}."
        raise AdapterFileError(text, where=directory)
    values = _values(path)
    method = values.get("peft_type", PeftType.LORA.value)
    if method not in (PeftType.LORA.value, *(costs.peft_type for costs in VARIANT_COSTS if costs.peft_type)):
        text = f"{path}: peft_type is {method!r}; only LORA adapters are supported."
        raise AdapterFileError(text, what=method, where=path, field="peft_type", allowed=(PeftType.LORA.value,))
    known = {f.name for f in dataclasses.fields(LoraConfig)} - _WITHOUT_MEANING
    unknown = {key: value for key, value in values.items() if key not in known | _WITHOUT_MEANING}
    try:
        config = LoraConfig(**{key: value for key, value in values.items() if key in known})
        config.unknown = unknown
        checks.check_built(config)
    except (ConfigError, NotYetSupported) as cause:
        kind = AdapterFileError if isinstance(cause, ConfigError) else NotYetSupported
        raise kind(f"{path}: {cause}", **{**cause.fields, "where": path}) from None
    return config, sorted(unknown)
