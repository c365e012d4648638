"""Rules that turn settings of another tool into settings of `lorakit train`, and the draft that they fill.

A rule is a function of the draft, a key and the key's value. The other modules of this package are tables of rules;
names that only differ are in `NAMES_ELSEWHERE`. Values are compared and copied, but never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from lorakit.errors import ConfigError
from lorakit.train.settings.defaults import choices_of

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

Rule: TypeAlias = "Callable[[Draft, str, JsonValue], None]"

Value = TypeVar("Value")

PREFERENCES = "lorakit trains on texts, prompts and chats, not on preferences or rewards"
OTHER_METHOD = "lorakit trains LoRA adapters"
FULL = "lorakit trains adapters, not all weights"
PROMPTS = "prompts never contribute to the loss; for that, use text rows"
UPLOAD = "nothing is uploaded during training"
ADAM = "Adam's other parameters are fixed"
PROCESSES = "start several processes with --nproc or torchrun; `parallel: fsdp` shards the base over them"
"""Reasons why files are rejected or keys have no counterpart."""

_OFF = (False, "", "no", "none")


@dataclass(frozen=True)
class Note:
    """A remark about one key of the converted file: what was changed, or why there is no counterpart."""

    key: str
    text: str


@dataclass
class Draft:
    """Settings under construction.

    Attributes:
        given: The file's entries, with the tool's defaults for missing keys.
        settings: Name of a setting -> value.
        changed: Keys whose meaning differs.
        dropped: Keys without a counterpart.
    """

    source: Path
    tool: str
    given: Mapping[str, JsonValue]
    settings: dict[str, JsonValue] = field(default_factory=dict)
    changed: list[Note] = field(default_factory=list)
    dropped: list[Note] = field(default_factory=list)

    def set(self, key: str, name: str, value: JsonValue) -> None:
        """Set a setting; if another key has set another value, that value stays and the key is dropped."""
        if self.settings.setdefault(name, value) != value:
            self.drop(key, f"{name} is already {self.settings[name]!r}")

    def change(self, key: str, text: str) -> None:
        """Note that a key was converted with another meaning."""
        self.changed.append(Note(key, text))

    def drop(self, key: str, reason: str) -> None:
        """Note that a key has no counterpart."""
        self.dropped.append(Note(key, reason))

    def reject(self, key: str, reason: str) -> ConfigError:
        """Return an error about a file that cannot be converted."""
        value = self.given.get(key)
        shown = f"{key} is {value!r}" if value is not None else f"{key} is not set"
        text = f"{self.source}: this {self.tool} file cannot be converted: {shown}; {reason}."
        return ConfigError(text, what=value, where=self.source, field=key)


@dataclass(frozen=True)
class Tool:
    """A tool whose settings can be converted.

    Attributes:
        marks: Keys that identify a file of the tool.
        rules: Key -> rule; a key that ends in `*` stands for all keys with that beginning.
        defaults: Default of the tool -> value, for keys that a file does not contain.
        finish: Function that completes the draft after all keys were converted.
    """

    name: str
    marks: frozenset[str]
    rules: Mapping[str, Rule]
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)
    finish: Callable[[Draft], None] = lambda draft: None


def each(keys: str, value: Value) -> dict[str, Value]:
    """Return entries of a table with one value for several keys, which are separated by spaces."""
    return dict.fromkeys(keys.split(), value)


def nothing(draft: Draft, key: str, value: JsonValue) -> None:
    """Ignore a key that does not influence the result, or that another rule reads."""


def to(name: str, convert: Callable[[Any], JsonValue] = lambda value: value) -> Rule:
    """Return a rule that sets a setting to the converted value, unless that is None.

    `convert` raises ValueError with the reason if a value has no counterpart.
    """

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        try:
            converted = convert(value)
        except ValueError as cause:
            draft.drop(key, str(cause))
            return
        if converted is not None:
            draft.set(key, name, converted)

    return rule


def by_value(name: str, table: Mapping[JsonValue, JsonValue]) -> Rule:
    """Return a rule that sets a setting to the entry of a table; values that are not in the table are ignored."""
    return to(name, lambda value: None if isinstance(value, (list, dict)) else table.get(value))


def no_counterpart(reason: str, *unset: JsonValue) -> Rule:
    """Return a rule that lists a key with a reason, unless its value switches it off or is one of `unset`."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if value not in (*_OFF, [], {}, 0, *unset):
            draft.drop(key, reason)

    return rule


def only(*allowed: JsonValue, reason: str) -> Rule:
    """Return a rule that rejects the file if the value is not one of the allowed values."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if value not in allowed:
            raise draft.reject(key, reason)

    return rule


def rejected(reason: str) -> Rule:
    """Return a rule that rejects the file, unless the value switches the key off."""
    return only(*_OFF, reason=reason)


def number(name: str) -> Rule:
    """Return a rule that copies a number, which may be given as text such as "2e-4"."""

    def parsed(value: Any) -> Any:
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError(f"{value!r} is not a number") from None

    return to(name, parsed)


def positive(name: str) -> Rule:
    """Return a rule that copies a number above 0; other numbers are the default."""
    return to(name, lambda value: None if isinstance(value, int) and value <= 0 else value)


def words(name: str) -> Rule:
    """Return a rule that copies a list of names, which may be given as text separated by commas."""

    def names(value: Any) -> Any:
        given = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
        return [word for word in given if word] if isinstance(given, list) else given

    return to(name, lambda value: names(value) or None)


def one_of(name: str, same: Mapping[str, str], nearest: Mapping[str, str], fallback: str) -> Rule:
    """Return a rule that copies a choice.

    It selects the choice of `lorakit train` with the `same` meaning, else the `nearest` one, or else the `fallback`.
    """

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        wanted = str(value)
        here = same.get(wanted, wanted)
        if here not in choices_of(name):
            here = nearest.get(wanted, fallback)
            draft.change(key, f"{wanted} became {here}, the nearest choice of {name}")
        draft.set(key, name, here)

    return rule


optimizer = one_of(
    "optimizer",
    {
        **each("adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adam", "adamw"),
        **each("adamw_bnb_8bit adamw_8bit", "adamw8bit"),
    },
    each("paged_adamw_8bit ao_adamw_8bit adamw_torch_8bit", "adamw8bit"),
    "adamw",
)
"""Rule for the name of an optimizer."""

scheduler = one_of(
    "lr_scheduler_type",
    {
        "cosine_decay": "cosine",
        "linear_schedule": "linear",
        "constant_with_warmup": "constant",
        "warmup_stable_decay": "wsd",
    },
    {"polynomial": "linear"},
    "cosine",
)
"""Rule for the name of a learning rate schedule."""


def warmup_steps(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert a number of warm-up steps, of which 0 stands for no warm-up, not for the default."""
    if isinstance(value, int) and value > 0:
        draft.set(key, "warmup_steps", value)
    elif value == 0:
        draft.set(key, "warmup_ratio", 0.0)
    else:
        draft.drop(key, "warmup_steps is a number of steps; set warmup_ratio for a fraction of the run")


def interval(name: str) -> Rule:
    """Return a rule for the number of steps, or the fraction of all steps, between evaluations or checkpoints."""

    def steps(value: Any) -> int:
        if isinstance(value, int | float) and value >= 1 and value % 1 == 0:
            return value if isinstance(value, int) else int(value)
        raise ValueError(f"{name} counts steps; by default, 10% of the run")

    return to(name, steps)


def fraction_held_out(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert the size of the evaluation data: a fraction, or a number of rows, which has no counterpart."""
    if isinstance(value, int | float) and 0 <= value < 1:
        if value or "eval_data" not in draft.settings:
            draft.set(key, "eval_fraction", float(value))
    else:
        draft.drop(key, "eval_fraction is a fraction of the rows, not a number of rows")


def checkpointing(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert a switch for gradient checkpointing."""
    if value in (False, "", "false"):
        return
    draft.set(key, "recompute", "layers")
    if value is not True:
        draft.change(key, f"{value!r} became recompute: layers, without offloading")


def initialization(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert PEFT's `init_lora_weights`."""
    if value is True:
        return
    if value is False or value == "loftq":
        draft.drop(key, f"init_lora_weights {value!r} is not available for training; the default is used")
    else:
        draft.set(key, "init_lora_weights", value)


def trackers(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert the names of experiment trackers."""
    names = [str(name) for name in (value if isinstance(value, list) else [value]) if name not in (False, "", "none")]
    if names:
        draft.set(key, "report_to", names)


def tracker(name: str) -> Rule:
    """Return a rule that selects one experiment tracker."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if value not in (False, "", [], "none"):
            trackers(draft, key, name)

    return rule


OF_TRAINER: Mapping[str, Rule] = {
    "learning_rate": number("learning_rate"),
    "warmup_steps": warmup_steps,
    "max_steps": positive("max_steps"),
    "eval_steps": interval("eval_steps"),
    "save_steps": interval("save_steps"),
    **each(
        "eval_strategy evaluation_strategy save_strategy",
        no_counterpart(
            "lorakit counts steps, not times per epoch; by default, it evaluates and saves after every 10% of the run"
        ),
    ),
    **each(
        "bf16 bfloat16 pure_bf16",
        by_value("dtype", {True: "bfloat16", "true": "bfloat16", "full": "bfloat16", "auto": "auto"}),
    ),
    **each("fp16 float16", by_value("dtype", {True: "float16"})),
    "gradient_checkpointing": checkpointing,
    "resume_from_checkpoint": no_counterpart("pass --resume to continue the run in output_dir"),
    "trust_remote_code": no_counterpart("code from a model's repository is never run"),
    **each("deepspeed fsdp* ddp*", no_counterpart(PROCESSES)),
    "adam_*": no_counterpart(ADAM),
    "logging_steps": nothing,
}
"""Rules for the settings that tools have from transformers' Trainer."""

template = no_counterpart(
    "the model's own chat template is used; for another, set chat_template to its name or a Jinja file",
    "tokenizer_default",
    "default",
    "empty",
)
"""Rule for the name of a chat template."""

_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|txt|md)$", re.IGNORECASE)


def is_data_file(name: str) -> bool:
    """Return whether a name is that of a data file."""
    return _FILE.search(name) is not None


def hub_name(path: str, split: str, revision: JsonValue, config: JsonValue) -> str:
    """Return the name of a Hub data set, with its split, revision and configuration if they are not the default."""
    name = f"hf:{path}" + (f":{split}" if split != "train" else "")
    return name + (f"@{revision}" if revision else "") + (f"#{config}" if config else "")
