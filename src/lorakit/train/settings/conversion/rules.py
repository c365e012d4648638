"""Rules that turn settings of another tool into settings of `lorakit train`, and the draft that they fill.

A rule is a function of the draft, a key and the key's value. The other modules of this package are tables of rules;
names that only differ are in `NAMES_ELSEWHERE`. Values are compared and copied, but never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lorakit.errors import ConfigError
from lorakit.train.settings.defaults import choices_of

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

Rule: TypeAlias = "Callable[[Draft, str, JsonValue], None]"

PROCESSES = "start several processes with --nproc or torchrun; `parallel: fsdp` shards the base over them"
"""Reason why settings of engines that train in several processes have no counterpart."""


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


def to(name: str) -> Rule:
    """Return a rule that copies the value."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        draft.set(key, name, value)

    return rule


def no_counterpart(reason: str) -> Rule:
    """Return a rule that lists a key with a reason, unless its value switches it off."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if value not in (False, "", "no", "none", [], {}, 0):
            draft.drop(key, reason)

    return rule


def nothing(draft: Draft, key: str, value: JsonValue) -> None:
    """Ignore a key that does not influence the result, or that another rule reads."""


def rejected(reason: str) -> Rule:
    """Return a rule that rejects the file, unless the value switches the key off."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if value not in (False, "", "no", "none"):
            raise draft.reject(key, reason)

    return rule


def only(*allowed: JsonValue, reason: str) -> Rule:
    """Return a rule that rejects the file if the value is not one of the allowed values."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if value not in allowed:
            raise draft.reject(key, reason)

    return rule


def number(name: str) -> Rule:
    """Return a rule that copies a number, which may be given as text such as "2e-4"."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                draft.drop(key, f"{value!r} is not a number")
                return
        draft.set(key, name, value)

    return rule


def positive(name: str) -> Rule:
    """Return a rule that copies a number above 0; other numbers are the default."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if not isinstance(value, int) or value > 0:
            draft.set(key, name, value)

    return rule


def words(name: str) -> Rule:
    """Return a rule that copies a list of names, which may be given as text separated by commas."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        found = [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value
        if found:
            draft.set(key, name, found)

    return rule


def one_of(name: str, nearest: Mapping[str, str], fallback: str) -> Rule:
    """Return a rule that copies a choice, or selects the `nearest` one of `lorakit train`, or else the `fallback`."""

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        wanted = str(value)
        here = nearest.get(wanted, wanted)
        exact = here == wanted or wanted in _SAME.get(here, ())
        if here not in choices_of(name):
            here, exact = fallback, False
        draft.set(key, name, here)
        if not exact:
            draft.change(key, f"{wanted} became {here}, the nearest choice of {name}")

    return rule


_SAME = {
    "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam", "adamw"),
    "adamw8bit": ("adamw_bnb_8bit", "adamw_8bit"),
    "cosine": ("cosine_decay",),
    "linear": ("linear_schedule",),
    "constant": ("constant_with_warmup",),
    "wsd": ("warmup_stable_decay",),
}
"""Choice -> names elsewhere of the same method."""

OPTIMIZERS: dict[str, str] = {
    **{other: here for here in ("adamw", "adamw8bit") for other in _SAME[here]},
    "paged_adamw_8bit": "adamw8bit",
    "ao_adamw_8bit": "adamw8bit",
    "adamw_torch_8bit": "adamw8bit",
}
"""Optimizer elsewhere -> nearest optimizer here."""

SCHEDULES: dict[str, str] = {
    **{other: here for here in ("cosine", "linear", "constant", "wsd") for other in _SAME[here]},
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "polynomial": "linear",
}
"""Learning rate schedule elsewhere -> nearest schedule here."""

optimizer = one_of("optimizer", OPTIMIZERS, "adamw")
"""Rule for the name of an optimizer."""

scheduler = one_of("lr_scheduler_type", SCHEDULES, "cosine")
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

    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        if isinstance(value, int) and value > 0:
            draft.set(key, name, value)
        elif isinstance(value, float) and value >= 1 and value.is_integer():
            draft.set(key, name, int(value))
        else:
            draft.drop(key, f"{name} counts steps; by default, 10% of the run")

    return rule


def fraction_held_out(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert the size of the evaluation data: a fraction, or a number of rows, which has no counterpart."""
    if isinstance(value, int | float) and 0 <= value < 1:
        if value or "eval_data" not in draft.settings:
            draft.set(key, "eval_fraction", float(value))
    else:
        draft.drop(key, "eval_fraction is a fraction of the rows, not a number of rows")


def half_precision(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert a switch for bf16."""
    if value in (True, "true", "full"):
        draft.set(key, "dtype", "bfloat16")
    elif value == "auto":
        draft.set(key, "dtype", "auto")


def float16(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert a switch for fp16."""
    if value is True:
        draft.set(key, "dtype", "float16")


def checkpointing(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert a switch for gradient checkpointing."""
    if value in (False, "", "false"):
        return
    draft.set(key, "recompute", "layers")
    if value is not True:
        draft.change(key, f"{value!r} became recompute: layers, without offloading")


def load_in_8bit(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert a switch for 8-bit weights."""
    if value is True:
        draft.set(key, "quantization", "int8")


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


def template(draft: Draft, key: str, value: JsonValue) -> None:
    """Note that a named chat template is not used."""
    if value not in ("tokenizer_default", "default", "", "empty"):
        draft.drop(
            key, "the model's own chat template is used; for another, set chat_template to its name or a Jinja file"
        )


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""Pattern of the id of a data set on the Hub."""

_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|txt|md)$", re.IGNORECASE)


def is_data_file(name: str) -> bool:
    """Return whether a name is that of a data file."""
    return _FILE.search(name) is not None


def hub_name(path: str, split: str, revision: JsonValue, config: JsonValue) -> str:
    """Return the name of a Hub data set, with its split, revision and configuration if they are not the default."""
    name = f"hf:{path}" + (f":{split}" if split != "train" else "")
    return name + (f"@{revision}" if revision else "") + (f"#{config}" if config else "")
