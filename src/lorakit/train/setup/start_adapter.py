"""The adapter that a run starts from (`from_adapter`): find it, check the settings against it, and record its origin.

The structure of the adapter comes from its config: a given setting must be equal to it. A resumed run reads the
structure from its newest checkpoint instead, so that the original adapter is not needed anymore.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import core, plan
from lorakit.choices import PARAMETER
from lorakit.config import CONFIG_FILE, LoraConfig, adapter_directory
from lorakit.errors import AdapterFileError, ConfigError, LorakitError, RunError, TargetError, UsageError
from lorakit.hub_cache import adapter_from_hub, is_on_hub
from lorakit.session.remembered import recorded_base
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.settings.defaults import DEFAULTS
from lorakit.train.settings.settings import TrainSettings, names_in_config
from lorakit.train.spec import StartAdapter

if TYPE_CHECKING:
    from lorakit.durable import JsonObject, JsonValue


def start_adapter(settings: TrainSettings, name: str, record: Mapping[str, Any] | None) -> StartAdapter:
    """Read the adapter that a run starts from, with this value of `from_adapter`.

    `record` has the contents of `run.json` if the run is resumed.

    Raises:
        AdapterFileError: The adapter is missing, damaged or not supported.
        ModelError: The adapter is on the Hub and cannot be downloaded.
        UsageError: `overwrite` would remove the adapter.
        RunError: The optimizer state cannot be used; or the run is resumed without a valid checkpoint, and the adapter
            has changed.
    """
    folder = Path(settings.output_dir)
    saved = checkpoint.newest_valid(folder) if record is not None else None
    if record is not None and saved is not None:
        return StartAdapter(core.read_for_training(saved), dict(record.get("from_adapter") or {}))
    adapter = core.read_for_training(find_adapter(name))
    if settings.overwrite and folder.resolve() in adapter.folder.resolve().parents:
        raise UsageError(
            f"{name} is in {folder}, and --overwrite would remove it; use another --output-dir.",
            what=name,
            where=folder,
            field="overwrite",
        )
    origin = _origin(name, adapter)
    before = None if record is None else record.get("from_adapter") or {}
    if before is not None and {**before, "rows": None} != {**origin, "rows": None}:
        raise RunError(
            f"cannot resume {folder}: it has no valid checkpoint, and {name} is not the adapter that "
            "the run started from; restore that adapter, or use another --output-dir.",
            what=name,
            where=folder,
            field="from_adapter",
        )
    optimizer = _optimizer(adapter, settings) if settings.from_optimizer else None
    return StartAdapter(adapter, origin if before is None else before, optimizer)


def completed(start: StartAdapter, settings: TrainSettings) -> TrainSettings:
    """Return the settings with the structure of the adapter and, if it is missing, the base that the adapter names.

    Explicitly given settings are compared with the adapter.

    Raises:
        UsageError: A given setting differs from the adapter, or applies only to a new adapter; or the adapter does
            not name its base.
    """
    given = settings.model_fields_set
    folder, structure = start.adapter.folder, _structure(start.adapter.config)
    wanted = _structure(settings.lora_config())
    for name, entry in DEFAULTS.items():
        if entry.is_for_new and name in given and getattr(settings, name) != entry.value:
            raise UsageError(
                f"{name} is {getattr(settings, name)!r}, but {folder} is an existing adapter, and this setting "
                "applies only to a new one; omit it, or omit --from-adapter.",
                what=getattr(settings, name),
                where=folder,
                field=name,
            )
    wrong = [n for n in structure if n in given and n != "target_modules" and wanted[n] != structure[n]]
    if wrong:
        raise _different(folder, {name: (wanted[name], structure[name]) for name in wrong})
    values = {**settings.as_dict(), **structure}
    if settings.model is None:
        values["model"] = base = recorded_base(start.adapter.folder, start.adapter.config, start.adapter.facts)
        if settings.revision is None and is_on_hub(base):
            values["revision"] = start.adapter.config.revision
    return TrainSettings(**values)


def check_targets(start: StartAdapter, settings: TrainSettings, shape: plan.ModelShape) -> None:
    """Raise UsageError if the given `target_modules` select other sites than those of the adapter."""
    wanted = settings.lora_config()
    given, own = (_structure(config)["target_modules"] for config in (wanted, start.adapter.config))
    if "target_modules" not in settings.model_fields_set or given == own:
        return
    try:
        found = plan.count(shape, wanted.with_fields(rank_pattern={}, trainable_token_indices=None)).sites
    except (TargetError, ConfigError):
        found = ()
    if {site.path for site in found if site.kind != PARAMETER} != set(start.adapter.sites):
        raise _different(start.adapter.folder, {"target_modules": (given, own)})


def find_adapter(given: str) -> Path:
    """Return the directory of an adapter, a run, a checkpoint or a Hub id ("owner/name@revision"), which is downloaded.

    Raises:
        AdapterFileError: No adapter has this name.
        ModelError: The adapter is on the Hub and cannot be downloaded.
    """
    path = adapter_directory(Path(given).expanduser())
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return path
        steps = [*run_folder.checkpoints(path), *run_folder.adapters_only(path)]
        hint = f" Pass one of its checkpoints: {', '.join(str(step) for step in steps)}." if steps else ""
        raise AdapterFileError(
            f"{given}: no {CONFIG_FILE}, so this is not an adapter directory.{hint}", where=given, field="from_adapter"
        )
    if not is_on_hub(given):
        raise AdapterFileError(
            f"{given}: adapter directory not found; pass a directory with {CONFIG_FILE}, a run directory or a Hub id "
            "(owner/name).",
            where=given,
            field="from_adapter",
        )
    return adapter_from_hub(given, has_tokenizer=True)


def _origin(given: str, found: core.TrainedAdapter) -> JsonObject:
    training = found.facts.get("training")
    steps = _steps(training)
    if steps is not None and isinstance(training, dict) and isinstance(training.get("from_adapter"), dict):
        before = training["from_adapter"].get("steps")
        steps = steps + before if isinstance(before, int) else None
    base = found.facts.get("base_name") or found.config.base_model_name_or_path
    rows = {name: training.get(name) for name in ("shape", "columns")} if isinstance(training, dict) else None
    return {"name": given, "sha256": found.weights_sha256, "base_name": base, "steps": steps, "rows": rows}


def _steps(training: JsonValue) -> int | None:
    """Return the step of an adapter within its own run, from its training metadata."""
    step = training.get("step") if isinstance(training, dict) else None
    return step if isinstance(step, int) else None


def _optimizer(found: core.TrainedAdapter, settings: TrainSettings) -> Path:
    """Return the checkpoint with the optimizer state at the adapter's step, after verifying it."""
    folder, step = found.folder, _steps(found.facts.get("training"))
    path = folder if (folder / checkpoint.MANIFEST).is_file() else folder.parent / f"checkpoint-{step}"
    try:
        checkpoint.verify(path)
        same = core.read_for_training(path).weights_sha256 == found.weights_sha256
        record = run_folder.read_record(path.parent)
    except LorakitError as cause:
        raise _no_optimizer(folder, f"{path} is not a valid checkpoint ({cause})") from cause
    if not same:
        raise _no_optimizer(folder, f"{path} contains another adapter")
    before = (record or {}).get("settings", {}).get("optimizer")
    if before != settings.optimizer:
        raise _no_optimizer(folder, f"optimizer is {settings.optimizer!r}, but its run used {before!r}")
    return path


def _no_optimizer(folder: Path, reason: str) -> RunError:
    return RunError(
        f"{folder}: the optimizer state cannot be restored: {reason}; omit --from-optimizer to start with a new "
        "optimizer, or pass a checkpoint of the run as --from-adapter.",
        what=reason,
        where=folder,
        field="from_optimizer",
    )


def _different(folder: Path, pairs: Mapping[str, tuple[JsonValue, JsonValue]]) -> UsageError:
    name, (given, _) = next(iter(pairs.items()))
    listed = "; ".join(f"{name} is {given!r}, but the adapter has {own!r}" for name, (given, own) in pairs.items())
    return UsageError(
        f"{folder} cannot be trained further with other settings: {listed}; omit them to keep those of the adapter.",
        what=given,
        where=folder,
        field=name,
    )


def _structure(config: LoraConfig) -> JsonObject:
    """Return the fields that an existing adapter determines, as values of settings in a form that can be compared."""
    names = [name for name in names_in_config(config) if not DEFAULTS[name].is_for_new]
    return {name: _plain(name, getattr(config, name)) for name in names}


def _plain(name: str, value: Any) -> JsonValue:
    if isinstance(DEFAULTS[name].value, bool):
        return bool(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if name in ("layers_to_transform", "layers_pattern") and isinstance(value, (int, str)):
        return [value]
    return None if value == [] else value
