"""PEFT's functions and messages for target modules, by `lorakit.targets`, and its rules for combining adapters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from lorakit.architectures.families import DEFAULT_TARGETS
from lorakit.config import LoraConfig, TaskType
from lorakit.core.attachment.attaching import AttachReport, with_targets
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.lora_layer import not_yet_merged
from lorakit.core.merging import tied_sites
from lorakit.core.model.index import AdapterIndex, layers, walk, without_wrappers
from lorakit.core.model.target_weights import bare_parameters, model_type_of
from lorakit.errors import ConfigError, NoTargetError, TargetError, warn_caller
from lorakit.peft.model_adapters import configs_of, user_model
from lorakit.targets.patterns import key_fits, names_path
from lorakit.targets.resolving import ALL_LINEAR, Candidate, match_path, resolve, targeted_parameters

SEQ_CLS_HEADS = ("score", "classifier")


class ExcludedModule:
    """Falsy result returned for an explicitly excluded module."""

    def __bool__(self) -> bool:
        return False


def check_target_module_exists(config: LoraConfig, key: str) -> bool | ExcludedModule:
    """Return whether a config targets a module, with a falsy `ExcludedModule` for one that it excludes."""
    if _excluded(config, key):
        return ExcludedModule()
    if config.target_modules is None:
        return False
    plain = config.with_fields(exclude_modules=None, modules_to_save=None, target_parameters=None)
    try:
        return bool(resolve([Candidate(key, "Linear", dense=True)], plain, allow_partial=True).matches)
    except TargetError:
        return False


def _excluded(config: LoraConfig, key: str) -> bool:
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):
        excluded = [key] if re.fullmatch(excluded, key) else []
    heads = SEQ_CLS_HEADS if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else ()
    saved, words = (*(config.modules_to_save or ()), *heads), key.split(".")
    parents = [".".join(words[:end]) for end in range(1, len(words) + 1)]
    return any(names_path(entry, key) for entry in excluded) or any(
        names_path(entry, parent) for entry in saved for parent in parents
    )


def inspect_matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return a dict that lists the modules targeted by an adapter's config ("matched") and all others ("unmatched")."""
    model = user_model(tuner)
    config = configs_of(model)[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in model.named_modules():
        found["matched" if check_target_module_exists(config, key) else "unmatched"].append(key)
    return found


def maybe_include_all_linear_layers(peft_config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Replace "all-linear" in a config with the matching modules; as in PEFT, the config is changed in place."""
    targets = peft_config.target_modules
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return peft_config
    head = None  # the head of a sequence classifier; a language-model head is never a candidate
    if peft_config.task_type == TaskType.SEQ_CLS and hasattr(model, "get_output_embeddings"):
        heads = (getattr(model, name, None) for name in SEQ_CLS_HEADS)
        head = next((head for head in heads if head is not None), None)
    index = AdapterIndex.of(model)
    dense = (candidate.path for candidate in index.candidates if candidate.dense)
    peft_config.target_modules = {path for path in dense if index.base(path) is not head}
    return peft_config


def find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """Return the smallest set of dotted suffixes that match the target modules and no other modules.

    Raises:
        ConfigError: `target_modules` is empty or contains an empty path, or a path is in both collections.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError("target_modules should be a list or set of strings.", field="target_modules")
    if "" in target_modules:
        raise ConfigError("target_modules should not contain an empty string.", field="target_modules")
    shared = sorted(set(target_modules) & set(other_module_names))
    if shared:
        raise ConfigError(
            "target_modules and other_module_names contain common elements, this should not happen, please open a "
            "GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce this issue if it "
            f"also occurs with peft. Common: {', '.join(shared[:8])}.",
            what=shared[0],
            field="target_modules",
        )
    taken = {end for name in other_module_names for end in _suffixes(name)}
    chosen: set[str] = set()
    for name in sorted(target_modules, key=_suffixes):
        if any(names_path(end, name) for end in chosen):
            continue
        chosen.add(next((end for end in _suffixes(name) if end not in taken), name))
    return chosen


def _suffixes(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[-count:]) for count in range(1, len(words) + 1)]


PATTERNS = ("rank_pattern", "alpha_pattern")

NOTHING_MATCHED = {
    "target_modules": "target_modules={value} were set but no module was matched.",
    "target_parameters": "target_parameters={value} were set but no parameter was matched.",
    "exclude_modules": "You have passed exclude_modules={value} but no modules were excluded.",
}
"""Dict from config field to the message that PEFT shows if no entry in the field matches."""

ALL_EXCLUDED = "All modules were excluded. Check `target_modules`, `exclude_modules` and `modules_to_save`."
NONE_LEFT = "No modules were targeted for adaptation: what `target_modules` names is excluded or saved in full."


@contextlib.contextmanager
def with_no_target_message(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Prepend PEFT's message to a `NoTargetError` within a context, if any modules are excluded.

    Raises:
        NoTargetError: Nothing matches the targets; the message lists the config entries and the most similar modules.
    """
    try:
        yield
    except NoTargetError as error:
        paths = [path for path, _ in walk(model) if path]
        excluded = [path for path in paths if _excluded(config, path)]
        if not excluded:
            raise
        message = ALL_EXCLUDED if len(excluded) == len(paths) else NONE_LEFT
        raise NoTargetError(f"{message} {error}", **error.fields) from None


def with_own_targets(model: nn.Module, config: LoraConfig, table: Mapping[str, str | Collection[str]]) -> LoraConfig:
    """Return the config, with default targets filled in if it specifies none."""
    targets = table.get(model_type_of(model))
    if targets is None or config.target_modules is not None or config.target_parameters:
        return config
    if targets == DEFAULT_TARGETS.get(model_type_of(model)):
        return config  # the core adds them, and reports what they leave out
    return config.with_fields(target_modules=targets if isinstance(targets, str) else set(targets))


INSIDE = r"^\^?base_model\\?\.model\\?\."
"""Prefix of the paths in a `PeftModel`, as a name or at the beginning of a pattern."""


def with_paths_inside(config: LoraConfig) -> LoraConfig:
    """Return a config whose target modules are named as in the user's model, without the prefix of a `PeftModel`."""
    targets = config.target_modules
    if targets is None:
        return config
    plain = re.sub(INSIDE, "", targets) if isinstance(targets, str) else {re.sub(INSIDE, "", path) for path in targets}
    return config.with_fields(target_modules=plain)


def messages_of_missing(config: LoraConfig, report: AttachReport) -> list[str]:
    """Return warnings about config entries that match nothing; a warning starts with PEFT's message if PEFT has one."""
    entries = [unmatched for unmatched in report.missing if unmatched.field not in PATTERNS]
    messages = [unmatched.text for unmatched in entries]
    for field, message in NOTHING_MATCHED.items():
        value = getattr(config, field)
        own = [index for index, unmatched in enumerate(entries) if unmatched.field == field]
        if own and value is not None and len(own) == (1 if isinstance(value, str) else len(value)):
            messages[own[0]] = f"{message.format(value=value)} {messages[own[0]]}"
    paths = [match_path(match) for match in report.matches]
    for field in PATTERNS:
        keys = sorted(key for key in getattr(config, field) if not any(key_fits(key, path) for path in paths))
        why = " ".join(unmatched.text for unmatched in report.missing if unmatched.field == field)
        if keys:
            messages.append(
                f"The following {field} keys did not match any targeted module and were ignored: {keys}. {why}"
            )
    return messages


def messages_of_own_biases(model: nn.Module, adapter: str) -> list[str]:
    """Return PEFT's warnings about layers where B's bias cannot be merged because the base layer has no bias."""
    found: dict[str, list[str]] = {}
    for path, layer in layers(model):
        if layer.bias_of(adapter) is not None and layer.original_bias() is None:
            found.setdefault(type(layer.owner).__name__, []).append(path)
    return [
        f"`lora_bias=True` was passed but the targeted layer of type {kind} has no bias: {adapter!r} is applied to "
        f"{', '.join(paths[:8])}{' and others' if len(paths) > 8 else ''}, but cannot be merged there."
        for kind, paths in found.items()
    ]


def config_for_keys(model: nn.Module, config: LoraConfig, keys: Iterable[str]) -> LoraConfig:
    """Return a config that targets exactly the modules named in a state dict, and warn if the targets change.

    Raises:
        ConfigError: The config uses `target_parameters`, but tensor names do not identify individual parameters.
    """
    if with_targets(config, model).target_parameters:
        text = "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`."
        raise ConfigError(f"{text} Inject it without the state_dict.", field="target_parameters")
    paths = {without_wrappers(key).rsplit(".lora_", 1)[0] for key in keys}
    candidates = AdapterIndex.of(model).candidates
    here = {candidate.path for candidate in candidates} & paths
    try:
        named = {match.path for match in resolve(candidates, with_targets(config, model), allow_partial=True).matches}
    except (TargetError, ConfigError):
        named = set()
    if named != here:
        text = (
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
        )
        for source, extra in (("PEFT config", named - here), ("state_dict", here - named)):
            text += f"The {source} contained these additional target modules: {sorted(extra)}. " if extra else ""
        warn_caller(text, RuntimeWarning)
    exact = "|".join(re.escape(path) for path in sorted(here))
    return config.with_fields(
        target_modules=exact or None, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def check_parameters(model: nn.Module, configs: Mapping[str, LoraConfig], config: LoraConfig) -> None:
    """Check that new and existing adapters target the same parameters of a module.

    PEFT's tensor names identify modules but not parameters. `lorakit.core.attach` does not have this restriction.

    Raises:
        ConfigError: The adapters target different parameters of a module; the message lists both sets of parameters.
    """
    mine = set(config.target_parameters or ())
    others = {name: set(other.target_parameters or ()) for name, other in configs.items()}
    others = {name: theirs for name, theirs in others.items() if mine and theirs and theirs != mine}
    if not others:
        return
    bare = bare_parameters(AdapterIndex.of(model))
    found = {(one.path, one.parameter) for one in targeted_parameters(bare, config)}
    for name, theirs in others.items():
        there = {(one.path, one.parameter) for one in targeted_parameters(bare, configs[name])}
        shared = {path for path, _ in found} & {path for path, _ in there}
        if any(path in shared for path, _ in found ^ there):
            text = f"{sorted(mine)} and, in {name!r}, {sorted(theirs)}"
            text = f"target_parameters: all adapters must target the same set of parameters, but got {text}."
            raise ConfigError(text, what=name, field="target_parameters")


def check_name(name: str, config: LoraConfig) -> None:
    """Check that a new adapter has not the name of a module that it saves in full or whose rows it trains.

    In the paths of the adapter's own modules, such as `lora_A.head`, PEFT would take the adapter for the module.

    Raises:
        ConfigError: The name is in `modules_to_save` or `trainable_token_indices`.
    """
    rows = config.trainable_token_indices if isinstance(config.trainable_token_indices, dict) else ()
    fields = {"modules_to_save": config.modules_to_save or (), "trainable_token_indices": rows}
    field = next((key for key, names in fields.items() if name in names), None)
    if field is None:
        return
    text = f"The adapter's name, {name!r}, is also the name of a module in {field}. Choose another name."
    raise ConfigError(text, what=name, field=field)


def warn_of_ties(model: nn.Module, names: Sequence[str]) -> tuple[bool, bool]:
    """Warn about weights that a merge must untie."""
    found = tied_sites(model, names)
    stacked = [pair for pair in found if _without_numbers(pair[0]) == _without_numbers(pair[1].rpartition(".")[0])]
    tied = [pair for pair in found if pair not in stacked]
    for pairs, why in (
        (tied, "so the two weights are no longer tied (tie_word_embeddings is now False)."),
        (stacked, "as for every layer added by layer_replication, so the model will need memory for all its layers."),
    ):
        if pairs:
            path, other = pairs[0]
            warn_caller(f"{path} shares its weight with {other}; merging gives the former a separate weight, {why}")
    return bool(found), bool(tied)


def _without_numbers(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def check_adapters_to_merge(module: AdapterModule, adapter_names: list[str] | None = None) -> list[str]:
    """Return the requested adapters that are not merged into a layer yet.

    Raises:
        ConfigTypeError: `adapter_names` is a string.
    """
    asked = module.active_adapters if adapter_names is None else adapter_names
    return not_yet_merged(asked, module.merged_adapters)


def filter_state_dict(state_dict: Mapping[str, Tensor], prefixes: Collection[str]) -> dict[str, Tensor]:
    """Return the entries whose names equal a prefix or begin with a prefix followed by a dot."""
    under = tuple(f"{prefix}." for prefix in prefixes)
    return {key: value for key, value in state_dict.items() if key in prefixes or key.startswith(under)}


def adapter_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Return the state-dict prefixes of an adapter's parameters, or those of all adapters if `adapter_name` is None."""
    held = {
        f"{path}.{attribute}".lstrip("."): holder
        for path, layer in layers(model)
        for attribute, holder in layer._modules.items()
        if isinstance(holder, (nn.ModuleDict, nn.ParameterDict))
    }
    if adapter_name is None:
        return set(held)
    return {f"{path}.{adapter_name}" for path, holder in held.items() if adapter_name in holder}
