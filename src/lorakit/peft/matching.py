"""PEFT's functions and messages about the modules that configs name, over `lorakit.targets`.

They also cover the targets of a state dict's names, PEFT's rules for several adapters, and warnings before a merge
unties shared weights.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lorakit.config import LoraConfig, TaskType
from lorakit.core.attachment.attaching import AttachReport, model_type_of, with_targets
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.merging.merging import tied_sites
from lorakit.core.model.index import AdapterIndex, layers
from lorakit.core.model.target_weights import bare_parameters
from lorakit.errors import ConfigError, ConfigTypeError, NoTargetError, RouteError, TargetError, warn_caller
from lorakit.peft import model_adapters
from lorakit.targets import ALL_LINEAR, Candidate, key_fits, match_path, names_path, resolve, targeted_parameters

SEQ_CLS_HEADS = ("score", "classifier")


class ExcludedModule:
    """Result for a module that is excluded explicitly; it is false."""

    def __bool__(self) -> bool:
        return False


def check_target_module_exists(config: Any, key: str) -> Any:
    """Check whether a config targets a module.

    Args:
        config: A config with `target_modules` and similar fields.
        key: Dotted path of the module.

    Returns:
        A true value if it does; an `ExcludedModule` if the module is excluded explicitly.

    Raises:
        ConfigError: A pattern is not a regular expression.
    """
    if _excluded(config, key):
        return ExcludedModule()
    if config.target_modules is None:
        return False
    plain = LoraConfig(
        target_modules=config.target_modules,
        layers_to_transform=getattr(config, "layers_to_transform", None),
        layers_pattern=getattr(config, "layers_pattern", None) or None,
    )
    try:
        return bool(resolve([Candidate(key, "Linear", dense=True)], plain, allow_partial=True).matches)
    except TargetError:
        return False


def _excluded(config: Any, key: str) -> bool:
    excluded = getattr(config, "exclude_modules", None)
    if isinstance(excluded, str):
        if re.fullmatch(excluded, key):
            return True
    elif any(names_path(entry, key) for entry in excluded or ()):
        return True
    heads = SEQ_CLS_HEADS if getattr(config, "task_type", None) in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else ()
    saved = (*(getattr(config, "modules_to_save", None) or ()), *heads)
    return any(names_path(entry, ".".join(key.split(".")[:end])) for entry in saved for end in _ends(key))


def _ends(key: str) -> range:
    return range(1, key.count(".") + 2)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """List the modules that an adapter's config targets, and the others.

    Args:
        tuner: A `PeftModel.base_model`.
        adapter_name: The adapter.
    """
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in tuner.model.named_modules():
        found["matched" if check_target_module_exists(config, key) else "unmatched"].append(key)
    return found


def maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Replace "all-linear" in a config by the modules that it matches, in place, as PEFT does.

    Args:
        peft_config: The config; it is changed and returned.
        model: The model.
    """
    targets = getattr(peft_config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return peft_config
    heads = {id(head) for head in _heads(model, getattr(peft_config, "task_type", None))}
    site_map = AdapterIndex.of(model)
    peft_config.target_modules = {
        candidate.path
        for candidate in site_map.candidates
        if candidate.dense and id(site_map.base(candidate.path)) not in heads
    }
    return peft_config


def _heads(model: nn.Module, task: Any) -> list[nn.Module]:
    """Return the classifier of a classification model; the output head is never a candidate."""
    if task != TaskType.SEQ_CLS or not hasattr(model, "get_output_embeddings"):
        return []
    found = (getattr(model, name, None) for name in SEQ_CLS_HEADS)
    return [head for head in found if head is not None][:1]


def find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """Return the fewest dotted suffixes that match these modules and none of the others.

    Args:
        target_modules: Paths to match.
        other_module_names: Paths not to match.

    Raises:
        ConfigError: `target_modules` is empty, a path is empty, or a path is in both.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError("target_modules should be a list or set of strings.")
    if "" in target_modules:
        raise ConfigError("target_modules should not contain an empty string.")
    if set(target_modules) & set(other_module_names):
        raise ConfigError("target_modules and other_module_names contain common elements, this should not happen.")
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
"""Field -> PEFT's message if none of its entries matches."""

ALL_EXCLUDED = (
    "All modules were excluded. This is likely unintended. Look at `target_modules`, `exclude_modules` and "
    "`modules_to_save`."
)
NONE_LEFT = (
    "No modules were targeted for adaptation. This might be caused by a combination of `target_modules` that match "
    "nothing and modules that are excluded (`exclude_modules`) or saved whole (`modules_to_save`)."
)


@contextlib.contextmanager
def no_target_in_peft_words(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Put PEFT's message before the error of a context that finds no target because modules are excluded.

    Args:
        model: The model.
        config: The adapter's config.

    Yields:
        Nothing.

    Raises:
        NoTargetError: The context's error, which names the entries and the nearest modules.
    """
    try:
        yield
    except NoTargetError as error:
        paths = [path for path, _ in model.named_modules() if path]
        excluded = [path for path in paths if _excluded(config, path)]
        if not excluded:
            raise
        message = ALL_EXCLUDED if len(excluded) == len(paths) else NONE_LEFT
        raise NoTargetError(f"{message} {error}", **error.fields) from None


def with_own_targets(model: nn.Module, config: LoraConfig, table: Mapping[str, str | Collection[str]]) -> LoraConfig:
    """Return a config with the default targets of PEFT's table, which programs extend, if it names none.

    Args:
        model: The model.
        config: Its config.
        table: Architecture -> targets.
    """
    targets = table.get(model_type_of(model))
    if targets is None or config.target_modules is not None or config.target_parameters:
        return config
    return config.with_fields(target_modules=targets if isinstance(targets, str) else set(targets))


def messages_of_missing(config: LoraConfig, report: AttachReport) -> list[str]:
    """Return the warnings about entries that match nothing, which PEFT ignores; its messages come first.

    Args:
        config: The config.
        report: The report of attaching it.
    """
    entries = [unmatched for unmatched in report.missing if unmatched.field not in PATTERNS]
    messages = [unmatched.text for unmatched in entries]
    for field, message in NOTHING_MATCHED.items():
        value = getattr(config, field)
        own = [index for index, unmatched in enumerate(entries) if unmatched.field == field]
        if own and len(own) == (1 if isinstance(value, str) else len(value)):
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
    """Return PEFT's warnings about layers whose B has a bias while the base has none that a merge could change.

    Args:
        model: A model with adapters in it.
        adapter: The adapter.
    """
    found: dict[str, list[str]] = {}
    for path, layer in layers(model):
        if layer.bias_of(adapter) is not None and layer.original_bias() is None:
            found.setdefault(type(layer.owner).__name__, []).append(path)
    return [
        f"`lora_bias=True` was passed but the targeted layer of type {kind} has no bias: {adapter!r} acts at "
        f"{', '.join(paths[:8])}{' and others' if len(paths) > 8 else ''}, but cannot be merged there."
        for kind, paths in found.items()
    ]


COMPILED = "_orig_mod."


def config_for_keys(model: nn.Module, config: LoraConfig, keys: Iterable[str]) -> LoraConfig:
    """Return a config that targets exactly the modules of an adapter's tensors.

    Args:
        model: The base.
        config: The config that came with them; a difference from its targets is warned about.
        keys: Names of tensors, such as "layers.0.q_proj.lora_A.weight".

    Raises:
        ConfigError: The config targets bare parameters, which names of tensors do not identify.
    """
    if config.target_parameters:
        raise ConfigError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This is "
            "not supported: inject it without the state_dict."
        )
    paths = {key.removeprefix(COMPILED).rsplit(".lora_", 1)[0] for key in keys}
    candidates = AdapterIndex.of(model).candidates
    here = {candidate.path for candidate in candidates} & paths
    try:
        named = {match.path for match in resolve(candidates, with_targets(config, model), allow_partial=True).matches}
    except (TargetError, ConfigError):
        named = set()
    extra = []
    if named - here:
        extra.append(f"The PEFT config contained these additional target modules: {sorted(named - here)}. ")
    if here - named:
        extra.append(f"The state_dict contained these additional target modules: {sorted(here - named)}. ")
    if extra:
        warn_caller(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            f"{''.join(extra)}",
            RuntimeWarning,
        )
    exact = "|".join(re.escape(path) for path in sorted(here))
    return config.with_fields(
        target_modules=exact or None, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def check_parameters(model: nn.Module, configs: Mapping[str, LoraConfig], config: LoraConfig) -> None:
    """Reject an adapter that targets other parameters of a module than an existing one.

    Names of tensors identify modules and not parameters, and names in memory match those on disk, as in PEFT.
    `lorakit.core.attach` supports both adapters.

    Args:
        model: The user's model.
        configs: The adapters on it.
        config: The new one.

    Raises:
        ConfigError: They differ; the message names both sets.
    """
    mine = set(config.target_parameters or ())
    others = {name: set(other.target_parameters or ()) for name, other in configs.items()}
    others = {name: theirs for name, theirs in others.items() if theirs and theirs != mine}
    if not mine or not others:
        return
    found = _by_module(model, config)
    for name, theirs in others.items():
        there = _by_module(model, configs[name])
        if any(found[module] != there[module] for module in found.keys() & there.keys()):
            raise ConfigError(
                "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                f"parameters, but got {sorted(mine)} for the new adapter and {sorted(theirs)} for adapter '{name}'."
            )


def _by_module(model: nn.Module, config: LoraConfig) -> dict[str, set[str]]:
    named: dict[str, set[str]] = {}
    for match in targeted_parameters(bare_parameters(AdapterIndex.of(model)), config):
        named.setdefault(match.path, set()).add(match.parameter)
    return named


ALONE = "Only one adapter can be set at a time for {wrapper}, got {names}: {why}"


def check_together(modules: Iterable[AdapterModule], names: Sequence[str]) -> None:
    """Reject adapters that replace the same module or rows; nothing is changed.

    Args:
        modules: The adapted modules of a model.
        names: The adapters to activate together.

    Raises:
        ConfigError: Two of them save the same module, or train the same token.
    """
    for module in modules:
        if isinstance(module, ModulesToSave) and len(set(names) & set(module.available_adapters())) > 1:
            why = "each has its own copy of the module."
            raise ConfigError(ALONE.format(wrapper="ModulesToSaveWrapper", names=list(names), why=why))
        if isinstance(module, TrainableTokens):
            try:
                module.token_adapter.replacements(names)
            except RouteError as error:
                text = ALONE.format(wrapper="TrainableTokensWrapper", names=list(names), why=error)
                raise ConfigError(text) from error


def warn_of_ties(model: nn.Module, names: Sequence[str]) -> tuple[bool, bool]:
    """Warn about weights that a merge must untie.

    Args:
        model: An adapted model.
        names: The adapters that are merged.

    Returns:
        Whether a weight must be untied, and whether that ends `tie_word_embeddings`.
    """
    stacked: list[tuple[str, str]] = []
    tied: list[tuple[str, str]] = []
    for path, other in tied_sites(model, names):
        copies = _without_numbers(path) == _without_numbers(other.rpartition(".")[0])
        (stacked if copies else tied).append((path, other))
    for pairs, why in (
        (tied, "so the model is no longer tied (tie_word_embeddings is False from now on)."),
        (stacked, "as every layer that layer_replication made gets one: the model needs the memory of all its layers."),
    ):
        if pairs:
            path, other = pairs[0]
            warn_caller(f"{path} shares its weight with {other}; merging gives it a weight of its own, {why}")
    return bool(tied or stacked), bool(tied)


def _without_numbers(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """Return the adapters of a layer to merge that are not merged yet.

    Args:
        module: An adapted layer.
        adapter_names: Adapters; None means the active ones.

    Raises:
        ConfigTypeError: The names are one string.
    """
    asked = module.active_adapters if adapter_names is None else adapter_names
    return not_yet_merged(asked, model_adapters.merged_at(module))


def not_yet_merged(names: Sequence[str], merged: Sequence[str], quiet: bool = False) -> list[str]:
    """Return the adapters that are not merged yet; warns about merged ones, as PEFT does.

    Args:
        names: The adapters to merge.
        merged: The adapters that are merged.
        quiet: Do not warn.

    Raises:
        ConfigTypeError: The names are one string.
    """
    if isinstance(names, str):
        raise ConfigTypeError(f"adapter_names should be a list of strings, got {names!r}.")
    new = [name for name in names if name not in merged]
    if merged and not quiet:
        warn_caller(
            f"Already following adapters were merged {','.join(merged)}. You are now additionally merging "
            f"{','.join(new)}."
            if new
            else "All adapters are already merged, nothing to do."
        )
    return new


def filter_state_dict(state_dict: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    """Return the entries whose names are one of these prefixes, or continue one after a dot."""
    under = tuple(f"{prefix}." for prefix in prefixes)
    return {key: value for key, value in state_dict.items() if key in prefixes or key.startswith(under)}


def adapter_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Return the prefixes of adapters' parameters in a model's state dict: of one adapter, or of all."""
    held = {
        f"{path}.{attribute}".lstrip("."): holder
        for path, layer in layers(model)
        for attribute, holder in layer._modules.items()
        if attribute != "base_layer" and holder is not None
    }
    if adapter_name is None:
        return set(held)
    return {f"{path}.{adapter_name}" for path, holder in held.items() if adapter_name in holder}  # type: ignore[operator]


def in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """Return the widths of a module's input and output, or None if it has none."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, module.out_channels
    return getattr(module, "in_features", None), getattr(module, "out_features", None)
