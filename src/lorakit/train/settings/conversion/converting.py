"""Recognize a settings file of another tool, and convert it to settings of `lorakit train`.

The rules are in one module per tool, apart from those for PEFT, which has few. The result lists what was changed, what
has no counterpart, and which required settings are missing; nothing is invented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.choices import TASK_NAMES
from lorakit.errors import ConfigError, did_you_mean, printable
from lorakit.train.settings.conversion import NAMES_ELSEWHERE, rules
from lorakit.train.settings.conversion.axolotl import AXOLOTL
from lorakit.train.settings.conversion.llama_factory import LLAMA_FACTORY
from lorakit.train.settings.conversion.mlx_lm import MLX
from lorakit.train.settings.conversion.rules import Draft, Note, Rule, Tool
from lorakit.train.settings.defaults import ALIASES, DEFAULTS
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.settings.sources import read_mapping, settings_text

if TYPE_CHECKING:
    from lorakit.durable import JsonObject, JsonValue


_PEFT_TASKS: Mapping[JsonValue, str | None] = {
    "CAUSAL_LM": None,  # the default for text
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token-classification",
    "SEQ_2_SEQ_LM": "seq2seq",
    "FEATURE_EXTRACTION": "embedding",
    None: None,
}
"""`task_type` in a config of PEFT -> task of lorakit, or None if it is left to the data and the model."""


def _peft_task(draft: Draft, key: str, value: JsonValue) -> None:
    if isinstance(value, (list, dict)) or value not in _PEFT_TASKS:
        raise draft.reject(key, f"lorakit has no task for it; it has {', '.join(TASK_NAMES)}")
    name = _PEFT_TASKS[value]
    if name is not None:
        draft.set(key, "task", name)


PEFT = Tool(
    "PEFT",
    frozenset({"peft_type"}),
    {
        "peft_type": rules.only("LORA", reason=rules.OTHER_METHOD),
        "task_type": _peft_task,
        "init_lora_weights": rules.initialization,
        **rules.each(
            "inference_mode auto_mapping peft_version fan_in_fan_out runtime_config megatron_core", rules.nothing
        ),
        "loftq_config": rules.no_counterpart("LoftQ is not available for training"),
    },
)


FOREIGN = (AXOLOTL, LLAMA_FACTORY, MLX, PEFT)
"""All tools whose settings can be converted."""

_REQUIRED = tuple(name for name, row in DEFAULTS.items() if row.value is ...)


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        settings: Name of a setting -> value, in the order of `lorakit train --help-all`.
        changed: Keys whose meaning differs.
        dropped: Keys without a counterpart.
        written_out: Keys of the tool's defaults that are written out, because lorakit's defaults differ.
        missing: Required settings that the file does not contain.
    """

    source: Path
    tool: str
    settings: Mapping[str, JsonValue]
    changed: tuple[Note, ...]
    dropped: tuple[Note, ...]
    written_out: tuple[str, ...]
    missing: tuple[str, ...]

    def text(self) -> str:
        """Return the settings as a YAML file, with the report as comments."""
        comments = [f"Converted from the {self.tool} file {self.source} by `lorakit convert-config`.", *self.lines()]
        commented = "".join(f"# {printable(line, one_line=True)}\n" for line in comments)
        return commented + settings_text(dict(self.settings))

    def lines(self) -> list[str]:
        """Return the report: changed keys, keys without a counterpart, written-out defaults and missing settings."""
        lines = [f"changed: {note.key}: {note.text}" for note in self.changed]
        lines += [f"no counterpart: {note.key}: {note.text}" for note in self.dropped]
        if self.written_out:
            lines.append(f"defaults of {self.tool}, written out: {', '.join(self.written_out)}")
        lines += [
            f"missing: {name}; add it, or pass --{name.replace('_', '-')} to lorakit train" for name in self.missing
        ]
        return lines


def convert_file(path: str | Path) -> Conversion:
    """Convert a YAML or JSON settings file of another tool; the result is valid, apart from missing settings.

    Raises:
        ConfigError: The file cannot be read, is not a settings file of a known tool, describes a training that lorakit
            does not do, or contains a value that is not allowed.
    """
    path = Path(path)
    values = read_mapping(path)
    tool = recognize(path, values)
    given = {key: value for key, value in values.items() if value is not None}
    defaults = {key: value for key, value in tool.defaults.items() if key not in given}
    draft = Draft(path, tool.name, {**given, **defaults})
    for key, value in draft.given.items():
        rule = _rule(tool, key)
        if rule is not None:
            rule(draft, key, value)
        else:
            _by_name(draft, key, value)
    tool.finish(draft)
    settings = {name: draft.settings[name] for name in DEFAULTS if name in draft.settings}
    _check(path, settings)
    missing = tuple(name for name in _REQUIRED if name not in settings)
    changed, dropped = tuple(draft.changed), tuple(draft.dropped)
    return Conversion(path, tool.name, settings, changed, dropped, tuple(defaults), missing)


def recognize(path: Path, values: JsonObject) -> Tool:
    """Return the tool that a file with these entries was written for.

    Raises:
        ConfigError: No tool or several tools fit; the message lists the tools and their keys.
    """
    counts = {tool.name: len(tool.marks & values.keys()) for tool in FOREIGN}
    tools = [tool for tool in FOREIGN if counts[tool.name] == max(counts.values()) > 0]
    if PEFT.marks & values.keys():
        return PEFT
    if len(tools) == 1:
        return tools[0]
    own = values and all(key.replace("-", "_") in DEFAULTS for key in values)
    reason = "it is already a settings file of lorakit train" if own else "its keys do not identify a tool"
    known = "; ".join(f"{tool.name} ({', '.join(sorted(tool.marks)[:4])})" for tool in FOREIGN)
    text = (
        f"{path}: the file cannot be converted: {reason}. Files of these tools, with keys such as these, can be "
        f"converted: {known}."
    )
    raise ConfigError(text, where=path, allowed=[tool.name for tool in FOREIGN])


def _rule(tool: Tool, key: str) -> Rule | None:
    """Return the rule for a key, or the rule of the longest pattern that the key begins with, or None."""
    if key in tool.rules:
        return tool.rules[key]
    patterns = [name for name in tool.rules if name.endswith("*") and key.startswith(name[:-1])]
    return tool.rules[max(patterns, key=len)] if patterns else None


def _by_name(draft: Draft, key: str, value: JsonValue) -> None:
    """Convert a key without a rule: by its name in another tool, or by its own name if it is a setting."""
    name = ALIASES.get(key) or NAMES_ELSEWHERE.get(key) or key
    if name not in DEFAULTS:
        draft.drop(key, f"unknown key.{did_you_mean(key, [*NAMES_ELSEWHERE, *DEFAULTS])}")
    elif value not in ("", [], {}):  # empty values are defaults
        draft.set(key, name, value)


def _check(path: Path, settings: Mapping[str, JsonValue]) -> None:
    """Check the settings, with placeholders for those that are missing."""
    placeholders = {"model": "model", "data": ["data"], "output_dir": "output"}
    try:
        TrainSettings(**{**placeholders, **settings}).lora_config()
    except ConfigError as cause:
        text = f"{path}: the converted settings are not valid: {cause} Correct the file, and convert it again."
        raise ConfigError(text, **{**cause.fields, "where": path}) from None
