"""`LoraConfig` and its base `PeftConfig`: PEFT's fields and methods; the only module that defines field defaults.

The constructor is strict. Known but unimplemented options are accepted here and rejected on use (`reading.py`). This
module does not depend on models, matching or tensors.
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

from lorakit.config import checks
from lorakit.config.file import config_file, read_values
from lorakit.config.nested import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
    restored,
)
from lorakit.config.types import API_LEVEL, CONFIG_FILE, PeftType, TaskType, check_types, plain
from lorakit.durable import write_json
from lorakit.errors import ConfigError, ConfigTypeError, warn_caller

Config = TypeVar("Config", bound="PeftConfigMixin")

PARTS: Mapping[str, type] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
}
"""Fields that hold a nested config."""

CHECKED_BY_VALUE = frozenset(
    {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "loftq_config"}
)
"""Fields with their own value checks and messages."""

NUMBERS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
)
"""Numeric fields; NumPy numbers and ranges in them are converted so that a file can store them."""


@dataclass
class PeftConfigMixin:
    """Conversion of a config to a dict or a file, and back.

    Attributes:
        task_type: Task of the model; selects heads that are trained in full (`HEADS_BY_TASK`).
        peft_type: The method.
        auto_mapping: Class and library of the base, as PEFT writes it; stored, never imported.
        peft_version: PEFT version whose file format is followed.
        unknown: Unknown keys of a file with their values; they are written back on save.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        self.task_type = checks.task(self.task_type)
        self.peft_version = self.peft_version or API_LEVEL
        self.unknown: dict[str, Any] = {}

    @property
    def is_prompt_learning(self) -> bool:
        """Return False; programs that use adapters of several methods query it."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Return False, like `is_prompt_learning`."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, nested configs as dicts; process-local settings are omitted."""
        values = dataclasses.asdict(self)
        values.pop("runtime_config", None)
        return values

    def as_json(self) -> dict[str, Any]:
        """Return the contents of `adapter_config.json`: plain values, sets as sorted lists, unknown keys."""
        return {**self.unknown, **{name: _plain(value) for name, value in self.to_dict().items()}}

    def with_fields(self: Config, **fields: Any) -> Config:
        """Return an independent copy with some fields changed, without repeating checks and warnings.

        Args:
            fields: Field name -> value.
        """
        twin = copy.deepcopy(self)
        for name, value in fields.items():
            setattr(twin, name, value)
        return twin

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into a directory.

        Args:
            save_directory: The directory; created if missing.
            kwargs: `auto_mapping_dict` is written as `auto_mapping`; PEFT's other options have no effect.

        Raises:
            ConfigError: The path is a file.
            DiskError: The file cannot be written.
        """
        if Path(save_directory).is_file():
            raise ConfigError(f"Provided path ({save_directory}) should be a directory, not a file.")
        values = self.as_json()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_json(Path(save_directory) / CONFIG_FILE, values)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read `adapter_config.json` from a directory or the Hub.

        Args:
            pretrained_model_name_or_path: A directory or a Hub id.
            subfolder: A directory inside it.
            kwargs: `revision`; other Hub options have no effect, and fields are not overridden.

        Returns:
            The config, as the class for its `peft_type`.

        Raises:
            AdapterFileError: The file is missing or damaged.
            ConfigError: A value is not allowed, or the method is not LORA.
            ConfigTypeError: The file has unknown keys and no `peft_type`, so it is not a config.
        """
        path = config_file(pretrained_model_name_or_path, subfolder, kwargs.get("revision"))
        values = cls.from_json_file(path)
        return cls.from_peft_type(**cls.check_kwargs(**values))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Return the contents of a config file without process-local settings.

        Args:
            path_json_file: The file.
            kwargs: PEFT's options; no effect.

        Raises:
            AdapterFileError: The file is missing or not a JSON object.
        """
        values = read_values(Path(path_json_file))
        if values.pop("runtime_config", None) is not None:
            warn_caller(f"{path_json_file} contains a `runtime_config` key. This is ignored: it is process-local.")
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """Create a config of the class for its `peft_type`; unknown fields are reported and preserved.

        Args:
            kwargs: Field name -> value.

        Raises:
            ConfigError: A value is not allowed, or the method is not LORA.
            ConfigTypeError: There are unknown names, and no `peft_type`.
        """
        checks.lora(kwargs.get("peft_type"))
        kind: type[PeftConfigMixin] = LoraConfig if "peft_type" in kwargs else cls
        known = {f.name for f in dataclasses.fields(kind)}
        unknown = {key: value for key, value in kwargs.items() if key not in known}
        if unknown and "peft_type" not in kwargs:
            raise ConfigTypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        config = kind(**{key: value for key, value in kwargs.items() if key in known})
        if unknown:
            config.unknown = unknown
            warn_caller(
                f"Unexpected keyword arguments {sorted(unknown)} for class {kind.__name__}, these are ignored. They "
                "come from another version of PEFT, and are written back when the config is saved."
            )
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Return the fields; subclasses may check or change them first."""
        return kwargs


@dataclass
class PeftConfig(PeftConfigMixin):
    """Fields that every method's config has.

    Attributes:
        base_model_name_or_path: Name of the base, as given by the user.
        revision: Revision of the base on the Hub.
        inference_mode: Whether the adapter is loaded frozen.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


PEFT_TABLES_OF_VARIANTS = ("use_dora",)
"""Tables by adapter on layers of PEFT, of this version or older ones, that say that an adapter is of a variant."""


@dataclass
class LoraConfig(PeftConfig):
    """Configuration of an adapter: target modules, rank, scale, initialization and variant.

    Attributes:
        r: Rank, at least 1.
        target_modules: Names or dotted suffixes, one regular expression, or "all-linear".
        exclude_modules: The same, for modules to leave out; wins over `target_modules`.
        lora_alpha: Numerator of the scale (`scale`).
        lora_dropout: Probability in [0, 1) with which an input element of A is dropped in training.
        fan_in_fan_out: Written for other readers; lorakit derives it from the base module.
        bias: "none", "all" or "lora_only": which biases of the base are trained too.
        use_rslora: Scale by 1/√r instead of 1/r.
        modules_to_save: Names of modules to train and save in full.
        init_lora_weights: True (A Kaiming, B zero), False (both random), or the name of an init.
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the list of layers that these indices count.
        rank_pattern: Name pattern -> rank, over `r`.
        alpha_pattern: Name pattern -> alpha, over `lora_alpha`.
        megatron_config: Megatron's parallel layers; not supported.
        megatron_core: Module path of Megatron; never imported.
        trainable_token_indices: Token ids whose embeddings are trained, or a dict from embedding to token ids.
        loftq_config: Settings of the init "loftq".
        eva_config: Settings of the init "eva".
        corda_config: Settings of the init "corda".
        lora_ga_config: Settings of the init "lora_ga".
        use_dora: Weight-decomposed variant (arXiv:2402.09353).
        velora_config: VeLoRA; not supported.
        alora_invocation_tokens: Token sequence from which the adapter is active (aLoRA, arXiv:2504.12397).
        use_qalora: QALoRA; not supported.
        qalora_group_size: Group size of QALoRA.
        monteclora_config: MonteCLoRA; not supported.
        layer_replication: Ranges of layers to stack, sharing their weights.
        runtime_config: Process-local settings; never written.
        lora_bias: Whether B has a bias.
        target_parameters: Names of parameters to adapt, such as fused experts.
        use_bdlora: Settings of the variant BD-LoRA, in which A or B is block-diagonal; None leaves it off.
        arrow_config: Arrow routing; not supported.
        kasa_config: Settings of the variant KaSA (arXiv:2412.06071), which truncates the base; None leaves it off.
        ensure_weight_tying: Whether an adapter on one of two tied weights applies to both.

    Raises:
        ConfigError: A value is not allowed; the message names the field, the value and what is allowed.
        ConfigTypeError: A field has a wrong type.
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
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = checks.lora(self.peft_type)
        for name in NUMBERS:
            setattr(self, name, plain(getattr(self, name)))
        self.target_modules = checks.names("target_modules", self.target_modules)
        self.exclude_modules = checks.names("exclude_modules", self.exclude_modules)
        self.modules_to_save = checks.plain_list("modules_to_save", self.modules_to_save)
        self.target_parameters = checks.parameters(self.target_parameters)
        self.rank_pattern = checks.table("rank_pattern", self.rank_pattern)
        self.alpha_pattern = checks.table("alpha_pattern", self.alpha_pattern)
        for name, part in PARTS.items():
            setattr(self, name, restored(name, getattr(self, name), part))
        self.runtime_config = restored("runtime_config", self.runtime_config, LoraRuntimeConfig) or LoraRuntimeConfig()
        check_types(self, CHECKED_BY_VALUE)
        checks.check_numbers(self)
        checks.check_words(self)
        checks.check_layers(self)
        checks.check_inits(self)
        checks.check_together(self)
        self.custom_modules: dict[type, type] | None = None

    def own_numbers(self, path: str, rank: int, out_features: int, in_features: int) -> int:
        """Return the number of values that the variant trains at a dense site or table, beside A and B.

        It is negative where the variant's A and B are smaller than LoRA's.

        Args:
            path: The site.
            rank: The rank there.
            out_features: Rows of the weight.
            in_features: Columns of the weight.
        """
        if self.use_bdlora is not None:
            return self.use_bdlora.numbers_saved(path, rank, out_features, in_features)
        return (out_features if self.use_dora else 0) + (rank if self.kasa_config is not None else 0)

    @property
    def reads_weight(self) -> bool:
        """Whether the variant reads the base weight in each forward, for one value per output."""
        return self.use_dora

    def notes_on_own_numbers(self, total: int) -> list[str]:
        """Return a plan's messages about the values that the variant trains in addition to A and B.

        Args:
            total: Their number over all sites.
        """
        if self.use_bdlora is not None:
            return [f"BD-LoRA's block-diagonal factors hold {-total:,} values fewer than LoRA's."]
        if self.kasa_config is not None:
            return [f"KaSA adds r singular values per site: {total:,} in total."]
        return [f"DoRA adds a magnitude per output of a site: {total:,} in total."] if self.use_dora else []

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Register custom layer classes for module types (a private method of PEFT); used by `core`.

        Args:
            mapping: Module type -> class of the layer.
        """
        self.custom_modules = {**(self.custom_modules or {}), **mapping}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value
