"""Where settings come from: flags, a YAML file, and the run that is being resumed.

Flags win over the file; on `--resume`, what is not given is taken from the run. Knows the settings' names, nothing of
what they do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import ConfigError, RunError
from lorakit.report import RUN_FILE
from lorakit.train.defaults import CHANGEABLE_ON_RESUME
from lorakit.train.run_folder import read_record, refuse_second_run
from lorakit.train.settings import TrainSettings, check_names

MAX_FILE_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number, as in YAML 1.2, and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file; `-` and `_` in names are alike.

    Args:
        path: The file; paths in it are as the process would read them.

    Returns:
        Settings by field name, as far as the file gives them; values are not yet checked.

    Raises:
        ConfigError: The file is missing, too large, no YAML mapping, or names an unknown setting (with its nearest).
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes, so not a settings file.", where=path)
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as cause:
        raise ConfigError(f"{path}: the settings file cannot be read ({cause.strerror}).", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as cause:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(cause).split())}).", where=path) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: holds no settings; lines such as `learning_rate: 3e-4` were expected.", where=path)
    values = {key.replace("-", "_"): value for key, value in content.items()}
    if len(values) < len(content):
        raise ConfigError(f"{path}: a setting stands twice, once with - and once with _ in its name.", where=path)
    check_names(values, f"{path}: ")
    return values


def gather(given: Mapping[str, Any], file: str | Path | None = None) -> TrainSettings:
    """Settings from flags over a file over the defaults; with `resume`, over the settings of the run.

    Args:
        given: What flags or a program gave, by field name; None counts as not given.
        file: A YAML file of settings, or None.

    Returns:
        Checked settings.

    Raises:
        ConfigError: As `TrainSettings` and `read_settings_file`.
        UsageError: Model or data are missing, and a run is already there.
        RunError: As `resumed`.
    """
    values = dict(read_settings_file(file)) if file is not None else {}
    values.update({name: value for name, value in given.items() if value is not None})
    if values.get("resume") is True and isinstance(values.get("output_dir"), (str, Path)):
        return resumed(values)
    missing = values.get("model") is None or values.get("data") is None
    if missing and not values.get("overwrite") and isinstance(values.get("output_dir"), (str, Path)):
        folder = Path(values["output_dir"])
        if (folder / RUN_FILE).exists():  # what is missing is --resume, not --model
            refuse_second_run(folder)
    return TrainSettings(**values)


def resumed(values: Mapping[str, Any]) -> TrainSettings:
    """The settings of the run in `output_dir`, with what may change replaced by what was given.

    Args:
        values: Settings that were given, `output_dir` among them.

    Returns:
        The settings to go on with; those given, where the folder holds no run yet.

    Raises:
        ConfigError: A given value is not allowed.
        RunError: A given value differs from the run's and may not change; each is named with both values. Or the
            run's record cannot be read.
    """
    record = read_record(Path(values["output_dir"]))
    if record is None:
        return TrainSettings(**values)
    check_names(dict(values))
    saved = {**record["settings"], "output_dir": str(values["output_dir"]), "overwrite": False}
    settings = TrainSettings(**{**saved, **values})
    before = TrainSettings(**{**saved, "resume": True}).as_dict()
    now = settings.as_dict()
    changed = [n for n in now if now[n] != before[n] and n not in CHANGEABLE_ON_RESUME]
    if changed:
        listed = "; ".join(f"{name} is {now[name]!r} and was {before[name]!r}" for name in changed)
        raise RunError(
            f"{values['output_dir']}: this run cannot go on with other settings: {listed}. "
            "Leave them out to resume, or train into a new --output-dir.",
            what=changed[0],
            where=values["output_dir"],
            field=changed[0],
        )
    return settings
