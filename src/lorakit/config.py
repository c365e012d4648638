"""`LoraConfig` and its words: the only home of the field's defaults and of the scale rule.

The field names, defaults and the file `adapter_config.json` are PEFT's, so that configs travel both ways.
The constructor is strict; reading a file from elsewhere is tolerant and says what it ignored. This module
knows nothing about models, matching or tensors.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.durable import read_json, write_json
from lorakit.errors import AdapterFileError, ConfigError, NotYetSupported, nearest

API_LEVEL = "0.22.0"
"""The level of PEFT's interface and files that is followed here."""

CONFIG_FILE = "adapter_config.json"
BIAS_CHOICES = ("none", "all", "lora_only")


class TaskType(str, enum.Enum):
    """What the adapted model is for; the names are PEFT's."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """The one method that lorakit has."""

    LORA = "LORA"


HEADS_BY_TASK: Mapping[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Heads that start untrained and so are copied and trained whole; a model has at least one of them."""

NEUTRAL: Mapping[str, Any] = {
    "megatron_config": None,
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}
"""Fields that are known but not built yet, each with the value that asks for nothing."""

_WITHOUT_MEANING = frozenset({"megatron_core", "qalora_group_size", "runtime_config"})


def scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """The factor before B·A: alpha / r, or alpha / √r for rsLoRA.   [docs/math.md (3), (4)]

    Args:
        r: Rank of the factor, at least 1.
        lora_alpha: The config's alpha at this site.
        use_rslora: Divide by the root of the rank.

    Returns:
        The scale, without unit.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732, eq. (4).
    """
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


@dataclass
class LoraConfig:
    """How an adapter looks: where it sits, its rank and scale, how it begins.

    Attributes:
        task_type: What the model is for; picks heads that are trained whole (`HEADS_BY_TASK`).
        peft_type: Always LORA.
        auto_mapping: Class and library of the base, as PEFT writes it; kept, never imported.
        peft_version: Level of PEFT's files that is followed.
        base_model_name_or_path: What the user gave as the base.
        revision: Revision of the base on a hub.
        inference_mode: The adapter is loaded frozen.
        r: Rank, at least 1.
        target_modules: Names or dotted suffixes, one regular expression, or "all-linear".
        exclude_modules: The same, for what is left out; wins over `target_modules`.
        lora_alpha: Numerator of the scale (`scale`).
        lora_dropout: Probability in [0, 1) with which an input element of A is dropped in training.
        fan_in_fan_out: Written for other readers; here the base itself says how its weight lies.
        bias: "none", "all" or "lora_only": which biases of the base are trained too.
        use_rslora: Scale by 1/√r instead of 1/r.
        modules_to_save: Names of modules that are copied and trained whole.
        init_lora_weights: True (A Kaiming, B zero), "gaussian", or False (both random).
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the list of layers that these indices count.
        rank_pattern: Name pattern -> rank, over `r`.
        alpha_pattern: Name pattern -> alpha, over `lora_alpha`.
        use_dora: Weight-decomposed variant (arXiv:2402.09353).

    The remaining fields are PEFT's for what is not built yet; a value that asks for it raises.

    Raises:
        ConfigError: A field holds what is not allowed; the message names field, value and what is allowed.
        NotYetSupported: A field asks for what is not built yet.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
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
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.task_type = _task(self.task_type)
        self.peft_type = _lora(self.peft_type)
        self.peft_version = self.peft_version or API_LEVEL
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        self.modules_to_save = _plain_list("modules_to_save", self.modules_to_save)
        self.rank_pattern = _table("rank_pattern", self.rank_pattern)
        self.alpha_pattern = _table("alpha_pattern", self.alpha_pattern)
        _check_numbers(self)
        _check_layers(self)
        if self.bias not in BIAS_CHOICES:
            raise ConfigError(f"bias is {self.bias!r}; it must be one of {', '.join(map(repr, BIAS_CHOICES))}.")
        if not isinstance(self.init_lora_weights, (bool, str)):
            raise ConfigError(f"init_lora_weights is {self.init_lora_weights!r}; it must be True, False or a name.")
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value != neutral:
                raise NotYetSupported(f"{name} is {value!r}: this is not built yet. Leave it at {neutral!r}.")

    @property
    def is_prompt_learning(self) -> bool:
        """Always False: programs that hold adapters of several methods ask for it."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False, as `is_prompt_learning`."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value, as `dataclasses.asdict`."""
        return dataclasses.asdict(self)

    def as_json(self) -> dict[str, Any]:
        """What `adapter_config.json` holds: plain values, sets as sorted lists."""
        return {name: _plain(value) for name, value in self.to_dict().items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a folder, with inference_mode true, as a finished adapter has it.

        Args:
            save_directory: The folder; it is made when it is missing.

        Raises:
            DiskError: The file cannot be written.
        """
        write_json(Path(save_directory) / CONFIG_FILE, {**self.as_json(), "inference_mode": True})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> LoraConfig:
        """Read `adapter_config.json` from a folder, tolerantly (`read_config`).

        Raises:
            AdapterFileError: The file is missing, damaged, or holds what cannot be used.
            NotYetSupported: The file asks for what is not built yet.
        """
        return read_config(folder)[0]


def read_config(folder: str | os.PathLike[str]) -> tuple[LoraConfig, list[str]]:
    """Read a config that any version of PEFT, or lorakit, wrote.

    Args:
        folder: A folder with `adapter_config.json`, or that file.

    Returns:
        The config, and the names of keys in the file that are not known here and were left out.

    Raises:
        AdapterFileError: The file is missing, not JSON, of another method, or a value is not allowed.
        NotYetSupported: The file asks for what is not built yet, so its weights would be misread.
    """
    path = Path(folder)
    if not path.exists():
        raise AdapterFileError(f"{path}: there is no such folder; an adapter is a folder with {CONFIG_FILE}.")
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.exists():
        raise AdapterFileError(f"{path.parent}: there is no {CONFIG_FILE}, so this is not an adapter.")
    values = read_json(path)
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{path}: holds a {type(values).__name__}; an object with the config's fields was expected."
        )
    method = values.get("peft_type", PeftType.LORA.value)
    if method != PeftType.LORA.value:
        raise AdapterFileError(f"{path}: peft_type is {method!r}; only LORA adapters can be used here.")
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = sorted(set(values) - known - _WITHOUT_MEANING)
    try:
        config = LoraConfig(**{key: value for key, value in values.items() if key in known})
    except (ConfigError, NotYetSupported) as cause:
        kind = AdapterFileError if isinstance(cause, ConfigError) else NotYetSupported
        raise kind(f"{path}: {cause}") from None
    return config, unknown


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value


def _task(value: TaskType | str | None) -> TaskType | None:
    if value is None:
        return None
    try:
        return TaskType(value)
    except ValueError:
        allowed = [task.value for task in TaskType]
        hint = nearest(str(value), allowed, 1)
        raise ConfigError(
            f"task_type is {value!r}; it must be one of {', '.join(allowed)}"
            + (f". Did you mean {hint[0]}?" if hint else ".")
        ) from None


def _lora(value: PeftType | str | None) -> PeftType:
    if value is not None and value != PeftType.LORA.value:
        raise ConfigError(f"peft_type is {value!r}; this library knows LORA only.")
    return PeftType.LORA


def _names(name: str, value: Any) -> set[str] | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{name} is {value!r}; it must be a list of names or one non-empty pattern.")
    entries = list(value)
    bad = [entry for entry in entries if not isinstance(entry, str) or not entry]
    if bad:
        raise ConfigError(f"{name} holds {bad[0]!r}; each entry must be a non-empty name.")
    return set(entries)


def _plain_list(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}; it must be a list of names, such as [{value!r}].")
    _names(name, value)
    return list(value)


def _table(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; it must be a table from name patterns to numbers.")
    bad = [key for key in value or {} if not isinstance(key, str) or not key]
    if bad:
        raise ConfigError(f"{name} holds the key {bad[0]!r}; each key must be a non-empty pattern.")
    return dict(value or {})


def _check_numbers(config: LoraConfig) -> None:
    _whole("r", config.r)
    _finite("lora_alpha", config.lora_alpha)
    _finite("lora_dropout", config.lora_dropout)
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout is {config.lora_dropout!r}; it must lie in [0, 1).")
    for key, rank in config.rank_pattern.items():
        _whole(f"rank_pattern[{key!r}]", rank)
    for key, alpha in config.alpha_pattern.items():
        _finite(f"alpha_pattern[{key!r}]", alpha)


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number.")


def _check_layers(config: LoraConfig) -> None:
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError("layers_pattern is given without layers_to_transform; say which layers, or leave both out.")
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ConfigError(
            "layers_to_transform cannot be combined with target_modules as one string; give target_modules as a list."
        )
