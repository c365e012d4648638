"""`TrainSettings`: all settings of a run, with strict checks of names, types and ranges.

`defaults.py` defines the defaults and gives the reasons for them; `settings_sources.py` reads flags and files. This
module accesses neither models nor data: checks that need them (such as whether a target matches or a file exists) run
later. `lorakit.config` and `lorakit.plan` are imported only when needed, because most errors in settings are found
without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lorakit.errors import ConfigError, did_you_mean
from lorakit.hub_cache import with_revision
from lorakit.train.settings.conflicts import check_base_matmul, check_rates
from lorakit.train.settings.defaults import CONVERT_ADVICE, DEFAULTS, NAMES_ELSEWHERE, Stored
from lorakit.train.settings.types import (
    Allocation,
    BaseMatmul,
    Bias,
    Dtype,
    Given,
    LabelType,
    Names,
    OnBadRow,
    Optimizer,
    Parallel,
    Part,
    Paths,
    Recompute,
    Scheduler,
    Streaming,
    TagScheme,
    TaskName,
    Text,
    TooLong,
    columns_of,
    device_word,
    dtype_word,
    format_of,
    init_word,
    label_map_of,
    numbers_of,
    ranges_of,
    rates_of,
    size_of,
    targets_of,
    tokens_of,
    trackers_of,
    weights_of,
)

if TYPE_CHECKING:
    from lorakit.config import LoraConfig, TaskType
    from lorakit.data import Request
    from lorakit.plan.quantized import Quantization
    from lorakit.tasks import LabelOptions


def _setting(name: str, **limits: Any) -> Any:
    row = DEFAULTS[name]
    return Field(default=row.value, description=row.help(), **limits)


class TrainSettings(BaseModel):
    """Settings of a run; each field is also a flag of `lorakit train`.

    The field descriptions come from `defaults.DEFAULTS`; they give each setting's meaning and default, and the reason
    for the default.

    Raises:
        ConfigError: Fields are unknown, missing, of the wrong type or out of range; the message names all of them.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model: Text | None = _setting("model")
    revision: Text | None = _setting("revision")
    data: Paths = _setting("data")
    output_dir: Text = _setting("output_dir")
    eval_data: Paths | None = _setting("eval_data")
    eval_fraction: float | None = _setting("eval_fraction", ge=0, lt=1)
    group: Text | None = _setting("group")
    data_weights: Annotated[dict[str, float], BeforeValidator(weights_of)] = _setting("data_weights")
    streaming: Streaming = _setting("streaming")
    token_cache: bool = _setting("token_cache")
    format: Annotated[str, AfterValidator(format_of)] | None = _setting("format")
    columns: Annotated[dict[str, str], BeforeValidator(columns_of)] = _setting("columns")
    on_bad_row: OnBadRow = _setting("on_bad_row")
    overlong: TooLong = _setting("overlong")
    allow_missing_end: bool = _setting("allow_missing_end")
    chat_template: Text | None = _setting("chat_template")
    task: TaskName | None = _setting("task")
    label_type: LabelType = _setting("label_type")
    label_map: Annotated[dict[str, str], BeforeValidator(label_map_of)] = _setting("label_map")
    tag_scheme: TagScheme = _setting("tag_scheme")
    from_adapter: Text | None = _setting("from_adapter")
    from_optimizer: bool = _setting("from_optimizer")
    r: int = _setting("r", ge=1)
    lora_alpha: float = _setting("lora_alpha", gt=0)
    lora_dropout: float = _setting("lora_dropout", ge=0, lt=1)
    target_modules: Annotated[str | list[str], BeforeValidator(targets_of), Field(min_length=1)] | None = _setting(
        "target_modules"
    )
    new_tokens: Annotated[list[str], BeforeValidator(tokens_of)] = _setting("new_tokens")
    use_dora: bool = _setting("use_dora")
    use_rslora: bool = _setting("use_rslora")
    allow_partial_targets: bool = _setting("allow_partial_targets")
    init_lora_weights: Annotated[str, AfterValidator(init_word)] = _setting("init_lora_weights")
    target_parameters: Names | None = _setting("target_parameters")
    exclude_modules: Annotated[str | list[str], BeforeValidator(targets_of)] | None = _setting("exclude_modules")
    modules_to_save: Names | None = _setting("modules_to_save")
    layers_to_transform: list[int] | None = _setting("layers_to_transform")
    layers_pattern: Names | None = _setting("layers_pattern")
    rank_pattern: Annotated[dict[str, int], BeforeValidator(numbers_of)] = _setting("rank_pattern")
    alpha_pattern: Annotated[dict[str, float], BeforeValidator(numbers_of)] = _setting("alpha_pattern")
    bias: Bias = _setting("bias")
    lora_bias: bool = _setting("lora_bias")
    layer_replication: Annotated[list[list[int]], BeforeValidator(ranges_of)] | None = _setting("layer_replication")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _setting("trainable_token_indices")
    ensure_weight_tying: bool = _setting("ensure_weight_tying")
    alora_invocation_tokens: list[int] | None = _setting("alora_invocation_tokens")
    use_bdlora: Part = _setting("use_bdlora")
    kasa_config: Part = _setting("kasa_config")
    use_qalora: bool = _setting("use_qalora")
    qalora_group_size: int = _setting("qalora_group_size", ge=1)
    velora_config: Part = _setting("velora_config")
    monteclora_config: Part = _setting("monteclora_config")
    eva_config: Part = _setting("eva_config")
    corda_config: Part = _setting("corda_config")
    lora_ga_config: Part = _setting("lora_ga_config")
    allocate_ranks: Allocation = _setting("allocate_ranks")
    optimizer: Optimizer = _setting("optimizer")
    learning_rate: float = _setting("learning_rate", gt=0)
    loraplus_lr_ratio: float | None = _setting("loraplus_lr_ratio", gt=0)
    loraplus_lr_embedding: float | None = _setting("loraplus_lr_embedding", gt=0)
    learning_rate_pattern: Annotated[dict[str, float], BeforeValidator(rates_of)] = _setting("learning_rate_pattern")
    lr_scheduler_type: Scheduler = _setting("lr_scheduler_type")
    warmup_ratio: float | None = _setting("warmup_ratio", ge=0, le=1)
    warmup_steps: int | None = _setting("warmup_steps", ge=0)
    decay_ratio: float | None = _setting("decay_ratio", gt=0, le=1)
    weight_decay: float = _setting("weight_decay", ge=0)
    max_grad_norm: float = _setting("max_grad_norm", ge=0)
    max_steps: int | None = _setting("max_steps", ge=1)
    num_train_epochs: float = _setting("num_train_epochs", gt=0)
    per_device_train_batch_size: int = _setting("per_device_train_batch_size", ge=1)
    gradient_accumulation_steps: int = _setting("gradient_accumulation_steps", ge=1)
    max_length: int | None = _setting("max_length", ge=2)
    dtype: Annotated[Dtype, BeforeValidator(dtype_word)] = _setting("dtype")
    quantization: Stored | None = _setting("quantization")
    double_quantization: bool = _setting("double_quantization")
    base_matmul: BaseMatmul = _setting("base_matmul")
    int8_loss_bound: float = _setting("int8_loss_bound", ge=0)
    keep_bf16_base: bool = _setting("keep_bf16_base")
    seed: int = _setting("seed", ge=0, lt=2**63)
    device: Annotated[str, AfterValidator(device_word)] = _setting("device")
    recompute: Recompute = _setting("recompute")
    gradient_checkpointing: bool = _setting("gradient_checkpointing")
    parallel: Parallel = _setting("parallel")
    memory_budget: Annotated[str, AfterValidator(size_of)] | None = _setting("memory_budget")
    fit: Annotated[str, AfterValidator(size_of)] | None = _setting("fit")
    accelerate: bool = _setting("accelerate")
    tuning: bool = _setting("tuning")
    eval_steps: int | None = _setting("eval_steps", ge=1)
    save_steps: int | None = _setting("save_steps", ge=1)
    save_total_limit: int = _setting("save_total_limit", ge=1)
    early_stopping_patience: int | None = _setting("early_stopping_patience", ge=1)
    report_to: Annotated[list[str], BeforeValidator(trackers_of)] = _setting("report_to")
    resume: bool = _setting("resume")
    overwrite: bool = _setting("overwrite")

    def __init__(self, **values: Given) -> None:
        if values.get("target_parameters"):
            values.setdefault("target_modules", None)  # only the parameters are adapted
        if values.get("from_adapter"):
            values.setdefault("model", None)  # the adapter may name its base
        try:
            super().__init__(**values)
        except ValidationError as cause:
            raise _error(cause) from None
        if self.from_adapter is None:
            _ = self.base  # raises if there is no model
            if self.from_optimizer:
                raise ConfigError(
                    "from_optimizer requires from_adapter; pass --from-adapter, or omit --from-optimizer.",
                    field="from_optimizer",
                )
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite cannot be combined; omit one of them.", field="resume")
        if self.group is not None and self.eval_data is not None:
            raise ConfigError(
                "group cannot be combined with eval_data, because no rows are held out; omit one of them.",
                field="group",
            )
        if self.init_lora_weights == "eva" and self.allocate_ranks != "none":
            raise ConfigError(
                "allocate_ranks cannot be combined with init_lora_weights eva, which allocates ranks itself; omit one "
                "of them.",
                field="allocate_ranks",
            )
        if self.recompute != "none" or self.gradient_checkpointing or self.fit is not None:
            _ = self.recomputed  # raises if the options conflict with each other or with the memory budget
        check_rates(self)
        check_base_matmul(self)

    @property
    def base(self) -> str:
        """The base model, with its revision if one is given.

        Raises:
            ConfigError: `model` is None, because only the adapter to continue from may name the base; or a revision is
                given for a path.
        """
        if self.model is None:
            raise ConfigError(_missing("model"), field="model")
        return with_revision(self.model, self.revision)

    @property
    def recomputed(self) -> str:
        """The selected recomputation option; with a memory limit, the plan chooses the option later."""
        from lorakit.plan.job import recomputed

        return recomputed(self.recompute, self.gradient_checkpointing, self.memory_budget, self.accelerate, self.fit)

    def row_request(self) -> Request:
        """Return the choices about how the rows of the data are read."""
        from lorakit.data import Request
        from lorakit.tasks import TASKS

        allowed = TASKS[self.task].formats if self.task is not None else ()
        return Request(self.format, self.columns, self.on_bad_row == "skip", self.group, allowed)

    def label_options(self) -> LabelOptions:
        """Return the choices about how labels are read."""
        from lorakit.tasks import LabelOptions

        return LabelOptions(
            self.label_type,
            is_evaluation_given=self.eval_data is not None,
            label_map=self.label_map,
            tag_scheme=self.tag_scheme,
        )

    def stored_as(self) -> Quantization | None:
        """Return the requested quantization of the base, or None."""
        from lorakit.plan.quantized import stored_as

        return stored_as(self.quantization, self.double_quantization)

    def lora_config(self, task_type: TaskType | None = None) -> LoraConfig:
        """Build the adapter's config.

        Args:
            task_type: The kind of model; None selects causal language models.

        Returns:
            A new config.

        Raises:
            ConfigError: `LoraConfig` rejects a value.
        """
        from lorakit.config import CordaConfig, EvaConfig, LoraConfig, LoraGAConfig, TaskType

        usual = {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}
        parts = {name: getattr(self, name) for name in _SAME_NAME}
        for name, make in usual.items():
            if parts[name] is None and self.init_lora_weights == name.removesuffix("_config"):
                parts[name] = make()
        return LoraConfig(
            task_type=task_type or TaskType.CAUSAL_LM,
            r=self.r,
            lora_alpha=self.lora_alpha if self.lora_alpha % 1 else int(self.lora_alpha),  # 32 and 32.0 are one config
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
            **parts,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return a dict from field name to value, with all settings as plain JSON values."""
        return self.model_dump(mode="json")


_SAME_NAME = (
    *("target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "bias", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("ensure_weight_tying", "alora_invocation_tokens", "use_bdlora", "kasa_config", "use_qalora"),
    *("qalora_group_size", "velora_config", "monteclora_config", "eva_config", "corda_config"),
    "lora_ga_config",
)
"""Settings that are passed to `LoraConfig` unchanged."""


def check_names(values: dict[str, Any], where: str = "") -> None:
    """Check that every key is the name of a setting.

    Args:
        values: Settings, keyed by name.
        where: Prefix for each message, such as the path of the settings file.

    Raises:
        ConfigError: A name is not a setting; the message suggests the setting with the most similar name.
    """
    unknown = [name for name in values if name not in TrainSettings.model_fields]
    if unknown:
        advice = f" {CONVERT_ADVICE}" if any(name in NAMES_ELSEWHERE for name in unknown) else ""
        raise ConfigError(
            " ".join(f"{where}{_unknown(name)}" for name in unknown) + advice,
            what=unknown[0],
            field=unknown[0],
            allowed=TrainSettings.model_fields,
        )


def _unknown(name: str) -> str:
    here = NAMES_ELSEWHERE.get(name)
    hint = did_you_mean(name, TrainSettings.model_fields) if here is None else f" The corresponding setting is {here}."
    return f"{name} is not a setting; see `lorakit train --help-all`.{hint}"


def _error(cause: ValidationError) -> ConfigError:
    """Return an error that describes every invalid setting; the error's fields describe the first one.

    For a setting that accepts several types, only the first mismatch is described.
    """
    errors: dict[str, Mapping[str, Any]] = {}
    for error in cause.errors(include_url=False):
        errors.setdefault(str(error["loc"][0]) if error["loc"] else "settings", error)
    field, first = next(iter(errors.items()))
    unknown, missing = first["type"] == "extra_forbidden", first["type"] == "missing" or first["input"] is ...
    return ConfigError(
        " ".join(_message(name, error) for name, error in errors.items()),
        what=field if unknown else None if missing else first["input"],
        field=field,
        allowed=TrainSettings.model_fields if unknown else choices_of(field),
    )


def choices_of(name: str) -> tuple[str, ...]:
    """Return the allowed values of a setting, or an empty tuple if the setting has no fixed set of values."""
    parts = [field.annotation for known, field in TrainSettings.model_fields.items() if known == name]
    while parts:  # a `Literal` can be inside a union
        part = parts.pop()
        if get_origin(part) is Literal:
            return get_args(part)
        parts += get_args(part)
    return ()


_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
}


MOST_SHOWN = 200
"""Maximum number of characters of a value in an error message."""


def _message(name: str, error: Mapping[str, Any]) -> str:
    kind, value = error["type"], error["input"]
    shown = repr(value) if len(repr(value)) <= MOST_SHOWN else f"{repr(value)[:MOST_SHOWN]}..."
    if kind == "extra_forbidden":
        return _unknown(name)
    if value is ... or kind == "missing":
        return _missing(name)
    if kind == "literal_error":
        hint = did_you_mean(str(value), choices_of(name))
        return f"{name} is {shown}; it must be {error['ctx']['expected']}.{hint}"
    if kind == "value_error":
        return f"{name} is {shown}; {error['ctx']['error']}."
    if kind in ("too_short", "string_too_short"):
        return f"{name} is {shown}; it must not be empty."
    if "than" in kind:
        return f"{name} is {shown}; it must be {_range(name)}."
    return f"{name} is {shown}; it must be {_EXPECTED.get(kind.split('_')[0], error['msg'])}."


def _missing(name: str) -> str:
    meaning = DEFAULTS[name].meaning
    return f"{name} is missing; pass --{name.replace('_', '-')} ({meaning[0].lower()}{meaning[1:]})."


def _range(name: str) -> str:
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    bounds = {
        word: getattr(limit, word)
        for limit in TrainSettings.model_fields[name].metadata
        for word in words
        if getattr(limit, word, None) is not None
    }
    return " and ".join(f"{words[word]} {bounds[word]}" for word in words if word in bounds)
