"""`TrainSettings`: all settings of a run, with strict checks of names, types and ranges.

`defaults.py` has the settings; `sources.py` reads flags and files. This module accesses neither models nor data: checks
that need them (such as whether a target matches or a file exists) run later. `lorakit.config` and `lorakit.plan` are
imported only when needed, because most errors in settings are found without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lorakit.durable import problem_in
from lorakit.errors import ConfigError, did_you_mean
from lorakit.hub_cache import with_revision
from lorakit.train.settings.conversion import CONVERT_ADVICE, NAMES_ELSEWHERE
from lorakit.train.settings.data_and_adapter import OF_CONFIG
from lorakit.train.settings.defaults import DEFAULTS, SettingFields, choices_of, types_of_settings

if TYPE_CHECKING:
    from lorakit.config import LoraConfig, TaskType
    from lorakit.data import Request
    from lorakit.plan.quantized import Quantization
    from lorakit.tasks import LabelOptions
    from lorakit.train.settings.types import Given


if TYPE_CHECKING:

    class _Checked(SettingFields, BaseModel):
        pass

else:
    _Checked = create_model(
        "_Checked",
        __config__=ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False),
        **{
            name: (types_of_settings()[name], Field(default=entry.value, description=entry.help(), **entry.bounds))
            for name, entry in DEFAULTS.items()
        },
    )


class TrainSettings(_Checked):
    """Settings of a run; each field is also a flag of `lorakit train`.

    The field descriptions come from `defaults.DEFAULTS`; they give each setting's meaning and default, and the reason
    for the default.

    Raises:
        ConfigError: Fields are unknown, missing, of the wrong type or out of range; the message names all of them.
    """

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
        given = dict(self)
        for name, entry in DEFAULTS.items():
            if (problem := problem_in(given[name])) is not None:  # such as bytes of a flag that are not UTF-8
                raise ConfigError(f"{name}{problem[0]} {problem[1]}.", field=name)
            entry.check_conflict(name, given)
        if self.recompute != "none" or self.gradient_checkpointing or self.fit is not None:
            from lorakit.plan.job import recomputed

            limits = self.memory_budget, self.accelerate, self.fit
            recomputed(self.recompute, self.gradient_checkpointing, *limits)  # raises if they conflict

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
    def explicit(self) -> dict[str, Any]:
        """The settings that were given, by name; without `model` if the adapter is to name it."""
        return {name: getattr(self, name) for name in self.model_fields_set if (name, self.model) != ("model", None)}

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
        """Build the adapter's config; without `task_type`, for a causal language model; see `LoraConfig` for errors."""
        from lorakit.config import LoraConfig, TaskType
        from lorakit.config.nested import CordaConfig, EvaConfig, LoraGAConfig

        usual = {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}
        parts = {name: getattr(self, name) for name in names_in_config(LoraConfig)}
        for name, make in usual.items():
            if parts[name] is None and self.init_lora_weights == name.removesuffix("_config"):
                parts[name] = make()
        if self.init_lora_weights == "default":
            parts["init_lora_weights"] = True
        if not self.lora_alpha % 1:
            parts["lora_alpha"] = int(self.lora_alpha)  # 32 and 32.0 are one config
        return LoraConfig(task_type=task_type or TaskType.CAUSAL_LM, **parts)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict from field name to value, with all settings as plain JSON values."""
        return self.model_dump(mode="json")


def names_in_config(config: LoraConfig | type[LoraConfig]) -> list[str]:
    """Return the names of the settings that are passed to the fields of `LoraConfig` with the same names."""
    known = {field.name for field in fields(config)}
    return [name for name, entry in DEFAULTS.items() if entry.group in OF_CONFIG and name in known]


def check_names(values: dict[str, Any], where: str = "") -> None:
    """Raise ConfigError if a key is not a setting, with the most similar name; `where` is a prefix for each message."""
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
    return " and ".join(f"{words[word]} {bound}" for word, bound in DEFAULTS[name].bounds.items())
