"""Sources of settings: flags, a YAML file, and the record of a resumed run.

Flags override the file; if a run is resumed, settings given in neither are taken from that run. This module uses only
the names of settings, not their meanings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.durable import MOST_LEVELS, parse_json, problem_in, read_bytes
from lorakit.errors import AdapterFileError, ConfigError, RunError
from lorakit.report import RUN_FILE
from lorakit.train.files.run_folder import raise_run_exists, read_record
from lorakit.train.settings.defaults import ALIASES, DEFAULTS
from lorakit.train.settings.settings import TrainSettings, check_names

if TYPE_CHECKING:
    import yaml

MAX_FILE_BYTES = 1 << 20
"""Maximum size of a settings file."""

MOST_NODES = 100_000
"""Maximum number of values in a YAML file, where an alias counts as many as the value that it repeats."""

MOST_KEYS = 1000
"""Maximum number of settings in a file; each unknown one is compared with all known names."""

MOST_SECONDS = 20.0
"""Maximum time to parse a YAML file; `MOST_NODES` values take about 5 s."""

MOST_NUMBER = 100
"""Maximum number of characters of a YAML number or date; PyYAML's time for base 60 grows with the square."""


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """Read unchecked settings by name from a YAML file; `-` and `_` in names are equivalent.

    Raises:
        ConfigError: The file is missing, too large or not a YAML mapping, or contains an unknown or repeated setting.
    """
    path = Path(path)
    content = read_mapping(path)
    values = {key.replace("-", "_"): value for key, value in content.items()}
    if len(values) < len(content):
        raise ConfigError(f"{path}: a setting is given twice, once with - and once with _ in its name.", where=path)
    values = _without_aliases(values, f"{path}: ")
    check_names(values, f"{path}: ")
    return values


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file, or JSON if its name ends in `.json`, that is empty or contains a mapping; nothing is evaluated.

    Raises:
        ConfigError: The file is missing, not a regular file or not a mapping, exceeds a limit, or contains a repeated
            key or text that cannot be encoded.
    """
    import yaml

    try:
        text = read_bytes(path, MAX_FILE_BYTES).decode("utf-8-sig")
        content = parse_json(text) if path.suffix.lower() == ".json" else yaml.load(text, Loader=_loader())
    except AdapterFileError as cause:
        raise ConfigError(str(cause), **cause.fields) from None
    except (yaml.YAMLError, ValueError, RecursionError) as cause:
        reason = " ".join(str(cause).split())[:500]
        raise ConfigError(f"{path}: not valid YAML or JSON ({reason}).", where=path) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: no settings found; expected lines such as `learning_rate: 3e-4`.", where=path)
    if len(content) > MOST_KEYS:
        raise ConfigError(f"{path}: {len(content):,} settings; at most {MOST_KEYS:,} are read.", where=path)
    problem = problem_in(content, is_json=False)
    if problem is not None:
        raise ConfigError(f"{path}: {problem[0].removeprefix('.')} {problem[1]}.", where=path)
    return content


def settings_text(values: Mapping[str, Any]) -> str:
    """Return settings as the text of a YAML file, in the given order, which `read_mapping` reads as the same values."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quote the strings that the loader would read as numbers."""

    Dumper.add_implicit_resolver(*_NUMBER)
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


_NUMBER = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
"""Tag, form and first characters of numbers in YAML 1.2 that YAML 1.1 reads as strings, such as `1e-4`."""


def _loader() -> type[yaml.SafeLoader]:
    """Return a safe loader with limits that parses `1e-4` as a number, as YAML 1.2 does, and rejects duplicate keys."""
    import yaml

    deadline = time.monotonic() + MOST_SECONDS

    class Loader(yaml.SafeLoader):
        level = count = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            event, before = self.peek_event(), self.count
            self.sizes: dict[str, int] = getattr(self, "sizes", {})
            is_alias = isinstance(event, yaml.AliasEvent)
            self.count += self.sizes.get(event.anchor, 1) if is_alias else 1
            self.level += 1
            if self.level > MOST_LEVELS or self.count > MOST_NODES or time.monotonic() > deadline:
                limits = f"{MOST_LEVELS} levels, {MOST_NODES:,} values with aliases, or {MOST_SECONDS:.0f} s"
                raise yaml.composer.ComposerError(None, None, f"more than {limits}", event.start_mark)
            node = super().compose_node(parent, index)
            self.level -= 1
            if isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_NUMBER:
                node.tag = "tag:yaml.org,2002:str"
            if event.anchor is not None and not is_alias:
                self.sizes[event.anchor] = self.count - before
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
                seen.add(key if isinstance(key, str) else id(key_node))
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(*_NUMBER)
    return Loader


def gather(given: Mapping[str, Any], file: str | Path | None = None) -> TrainSettings:
    """Combine settings: flags override the file, and both override the defaults or the settings of a resumed run.

    Values of `given` that are None are ignored.

    Raises:
        ConfigError: The file cannot be read, or a setting is missing, unknown or invalid.
        UsageError: `model` or `data` is missing, and `output_dir` already contains a run.
        RunError: The run cannot be resumed with these settings; see `resumed`.
    """
    values = read_settings_file(file) if file is not None else {}
    values.update({name: value for name, value in given.items() if value is not None})
    if values.get("resume") is True and isinstance(values.get("output_dir"), (str, Path)):
        record = read_record(Path(values["output_dir"]))
        return TrainSettings(**values) if record is None else resumed(values, record)
    missing = values.get("data") is None or (values.get("model") is None and values.get("from_adapter") is None)
    if missing and not values.get("overwrite") and isinstance(values.get("output_dir"), (str, Path)):
        folder = Path(values["output_dir"])
        if (folder / RUN_FILE).exists():  # the user probably forgot --resume, not --model
            raise_run_exists(folder)
    return TrainSettings(**values)


def _without_aliases(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings with the full name in place of each alias."""
    named = {ALIASES.get(name, name): value for name, value in values.items()}
    twice = [name for name in values if name in ALIASES and ALIASES[name] in values]
    if twice:
        text = f"{where}{twice[0]} and {ALIASES[twice[0]]} are the same setting; omit one of them."
        raise ConfigError(text, what=twice[0], field=ALIASES[twice[0]])
    return named


def resumed(values: Mapping[str, Any], record: Mapping[str, Any]) -> TrainSettings:
    """Return the settings in the record of the run in `output_dir`, with the given values where a change is allowed.

    Raises:
        ConfigError: A given value is not allowed.
        RunError: A setting that must not change has a different value in the run; the message names each such setting
            with both values.
    """
    check_names(dict(values))
    saved = {**record["settings"], "output_dir": str(values["output_dir"]), "overwrite": False}
    settings = TrainSettings(**{**saved, **values})
    before = TrainSettings(**{**saved, "resume": True}).as_dict()
    now = settings.as_dict()
    changed = [n for n in now if now[n] != before[n] and not DEFAULTS[n].is_changeable]
    if changed:
        listed = "; ".join(f"{name} is {now[name]!r} and was {before[name]!r}" for name in changed)
        text = (
            f"cannot resume {values['output_dir']} with different settings: {listed}; omit them, or use another "
            "--output-dir."
        )
        raise RunError(text, what=changed[0], where=values["output_dir"], field=changed[0])
    return settings
