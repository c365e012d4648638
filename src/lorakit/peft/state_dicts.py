"""Functions that get or set the state dict of an adapter or of a base model.

In memory, the names of an adapter's tensors contain the adapter's name; on disk, they do not. Names in a wrapped model
begin with `base_model.model.`; names in an unwrapped model do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.attachment.old_experts import tensors_with_fused_experts
from lorakit.core.files.inspecting import Site, implausible, judge, largest_values
from lorakit.core.files.tensors import parse
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.base_view import base_tensors
from lorakit.core.model.index import COMPILED, layers, walk, without_wrappers
from lorakit.core.shards import FSDP_1, completed, inside, is_flat, is_shard, shape_of, write
from lorakit.errors import AdapterFileError, warn_caller
from lorakit.peft import model_adapters

WRAPPED = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
DATA_PARALLEL = "module."


class IncompatibleKeys(NamedTuple):
    """Missing and unexpected keys, as returned by `load_state_dict`."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class StateDictError(AdapterFileError, RuntimeError):
    """Tensor names or shapes do not match the model. Subclasses RuntimeError, because that is what torch raises."""


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors, keyed by their names on disk.

    Those that are distributed over processes (FSDP, DeepSpeed ZeRO-3) are completed; every process must call this, for
    FSDP 1 with the outermost FSDP module. `state_dict` has tensors of any shape by name in the model, used instead of
    its own; `save_embedding_layers=True` includes the base's embedding matrices, as needed for a resized vocabulary.
    """
    model = getattr(model, COMPILED, model) if unwrap_compiled else model
    model_adapters.check_exist(model_adapters.configs_of(model), adapter_name)
    own = _own_tensors(model, adapter_name) if state_dict is None else _given_tensors(model, adapter_name, state_dict)
    if save_embedding_layers is not True:
        return own
    return {**completed(_embeddings(model, model.state_dict() if state_dict is None else state_dict)), **own}


def _given_tensors(model: nn.Module, adapter: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors (…) of an adapter in a state dict, keyed by name on disk; warn about missing ones."""
    plain = {_without_wrappers(key): key for key in values}
    found, missing = {}, []
    for on_disk, in_memory in names_of(model, adapter):
        key = next((key for key in (in_memory, on_disk) if key in values), plain.get(_without_wrappers(in_memory)))
        if key is None:
            missing.append(on_disk)
        else:
            found[on_disk] = values[key]
    if missing:
        lacks = f"lacks {len(missing)} of the {len(found) + len(missing)} tensors of adapter {adapter!r}"
        text = f"`state_dict` {lacks}: {', '.join(missing[:4])}."
        warn_caller(f"{text} Pass the model's complete state dict with unchanged names.")
    return found


def _own_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the whole tensors (…) of an adapter, keyed by name on disk; tensors in units of FSDP 1 are copies."""
    own = partial(tensors_of, model, adapter)
    flat = flat_names(own)
    gathered = read_units(model, own) if flat else {}
    held = {name: gathered.get(name, tensor) for name, _, tensor in own()}
    held = {name: tensor.detach() if is_flat(tensor) and name not in flat else tensor for name, tensor in held.items()}
    return {name: tensor.detach() for name, tensor in completed(held).items()}


def _without_wrappers(key: str) -> str:
    return without_wrappers(key).removeprefix(DATA_PARALLEL)


def names_of(model: nn.Module, adapter: str) -> Iterator[tuple[str, str]]:
    """Yield the names of an adapter's tensors on disk, and in the model's state dict."""
    yield from ((on_disk, in_memory) for on_disk, in_memory, _ in tensors_of(model, adapter))


def tensors_of(model: nn.Module, adapter: str) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the tensors (any shape) of an adapter, after their names on disk and in the model's state dict."""
    for on_disk, in_memory, tensor in _tensors_of(model, adapter):
        yield without_wrappers(on_disk), in_memory, tensor


def _tensors_of(model: nn.Module, adapter: str) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in walk(model):
        prefix = f"{path}." if path else ""
        if isinstance(module, LoraLayer):
            yield from _of_layer(module, prefix, adapter)
        elif isinstance(module, ModulesToSave):
            if adapter in module.modules_to_save:
                for leaf, tensor in _saved_in_full(module.modules_to_save[adapter]):
                    yield f"{prefix}{leaf}", f"{prefix}modules_to_save.{adapter}.{leaf}", tensor
        elif isinstance(module, TrainableTokens):
            if adapter in module.available_adapters() and not module.follows:
                rows = module.token_adapter.trainable_tokens_delta[adapter]
                yield f"{prefix}{ROWS}", f"{prefix}{ROWS}.{adapter}", rows
        elif module._forward_hooks:
            yield from _of_biases(module, prefix, adapter)


def _saved_in_full(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names in a state dict and the tensors (…) of a module; those in FSDP 1's units are not gathered."""
    inner = list(parts(module))
    if not any(FSDP_1 in part._modules for _, part in inner):
        yield from module.state_dict(keep_vars=True).items()
        return
    for path, part in inner:
        for leaf, tensor in _saved_tensors(part).items():
            yield without_wrappers(f"{path}.{leaf}" if path else leaf), tensor


def flat_factors(model: nn.Module, adapter: str, given: Mapping[str, Tensor] | None = None) -> list[str]:
    """Return the names of A and B tensors that have fewer than two dimensions, as ungathered shards do."""
    own = {on_disk: tensor for on_disk, _, tensor in tensors_of(model, adapter)} if given is None else given
    return [key for key, held in own.items() if key.endswith(MATRICES) and held.ndim < 2]


def _of_biases(module: nn.Module, prefix: str, adapter: str) -> Iterator[tuple[str, str, Tensor]]:
    for switch in BiasPatch.on(module):
        for leaf in switch.originals if switch.adapter == adapter else ():
            yield f"{prefix}{leaf}", f"{prefix}{leaf}", module._parameters[leaf]  # type: ignore[misc]


def _of_layer(layer: LoraLayer, prefix: str, adapter: str) -> Iterator[tuple[str, str, Tensor]]:
    for attribute, held in layer.named_children():
        if attribute in ("base_layer", "lora_dropout"):
            continue
        entry = held._modules.get(adapter)
        entry = entry if entry is None else inside(entry)
        if entry is None:
            raw = _saved_tensors(held).get(adapter)
            if raw is not None:
                yield f"{prefix}{attribute}", f"{prefix}{attribute}.{adapter}", raw
            continue
        for leaf, tensor in _saved_tensors(entry).items():
            ending = "" if attribute == "lora_magnitude_vector" else f".{leaf}"
            yield f"{prefix}{attribute}{ending}", f"{prefix}{attribute}.{adapter}.{leaf}", tensor


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and persistent buffers (…) by name; those in a flat buffer of FSDP 1 are it."""
    flat = module._parameters.get("_flat_param")
    views = {} if flat is None else {name: flat for name, value in vars(module).items() if isinstance(value, Tensor)}
    parameters = {name: value for name, value in module._parameters.items() if value is not None and value is not flat}
    lasting = module._buffers.keys() - module._non_persistent_buffers_set
    buffers = {name: value for name, value in module._buffers.items() if value is not None and name in lasting}
    return {**parameters, **views, **buffers}


def _embeddings(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    getters = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    if getters[0] is None:
        warn_caller("Could not identify embedding layer(s) because the model is not a 🤗 transformers model.")
        return {}
    wanted = {id(getter()) for getter in getters if getter is not None} - {id(None)}
    prefixes = tuple(f"{path}." for path, module in walk(model) if id(module) in wanted)
    own = {in_memory for name in model_adapters.configs_of(model) for _, in_memory in names_of(model, name)}
    return {key: value for key, value in values.items() if key.startswith(prefixes) and key not in own}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Copy tensors (any shape) into a model's adapter, and warn about implausible values, as when loading. Returns
    names in the model that have no tensor, and unexpected names, which also cause a warning; see `put_tensors`.
    """
    model_adapters.check_exist(model_adapters.configs_of(model), adapter_name)
    tensors = _with_fused_experts(model, peft_model_state_dict, adapter_name)
    _warn_of_values(model, tensors, adapter_name)
    return put_tensors(model, tensors, adapter_name, ignore_mismatched_sizes)


def _with_fused_experts(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> Mapping[str, Tensor]:
    """Return tensors (…), keyed by name on disk, with the separate experts of transformers 4 fused as in the model."""
    config, user = model_adapters.configs_of(model)[adapter], model_adapters.user_model(model)
    given = {WRAPPED + _bare(key): tensor for key, tensor in tensors.items()}
    found = tensors_with_fused_experts(given, config, user, f"state dict of adapter {adapter!r}")
    return tensors if found.keys() == given.keys() else found


def _warn_of_values(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> None:
    own = [layer for _, layer in layers(model_adapters.user_model(model)) if adapter in layer.r]
    trained = any(parameter.requires_grad for layer in own for parameter in layer.parameters_of(adapter))
    held = {WRAPPED + _bare(key): tensor for key, tensor in tensors.items() if not tensor.is_meta}
    paths = {key.path for key in map(parse, held) if key is not None}
    config = model_adapters.configs_of(model)[adapter]
    found = judge(config, [Site(path, None, None) for path in sorted(paths)], largest_values(held))
    for message in implausible(f"adapter {adapter!r}", found, may_be_zero=trained):
        warn_caller(message)


def put_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, ignore_mismatched_sizes: bool = False
) -> IncompatibleKeys:
    """Copy tensors into an existing adapter without checking their values; see `set_peft_model_state_dict`.

    Raises:
        StateDictError: A tensor's shape does not match the model.
    """
    own = partial(tensors_of, model, adapter_name)
    flat = flat_names(own)
    current = _whole_units(model, own) if flat else model.state_dict(keep_vars=True)
    others = {_bare(key): key for key in current}  # activation checkpointing removes its wrappers from these names
    targets = {_bare(on_disk): others[_bare(in_memory)] for on_disk, in_memory in names_of(model, adapter_name)}
    placed: dict[str, Tensor] = {}
    unexpected, wrong = [], []
    for key, tensor in tensors.items():
        target = targets.get(_bare(key)) or others.get(_bare(key))
        if target is None:
            unexpected.append(key)
        elif shape_of(current[target]) != tensor.shape:
            wrong.append(f"- {target}: {tensor.shape} in the checkpoint, {shape_of(current[target])} in the model")
        else:
            placed[target] = tensor
    if wrong and not ignore_mismatched_sizes:
        raise StateDictError(
            f"Error(s) in loading state_dict for {type(model).__name__}: size mismatch\n" + "\n".join(wrong)
        )
    if wrong:
        warn_caller(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being "
            "ignored because you passed `ignore_mismatched_sizes=True`: " + "\n".join(wrong)
        )
    if unexpected:
        warn_caller(f"Adapter {adapter_name!r} has no parameters for these tensors: {', '.join(unexpected[:8])}.")
    model_adapters.fill(model, {name: tensor for name, tensor in placed.items() if current[name].is_meta})
    if flat:
        on_disk = {in_memory: name for name, in_memory, _ in own()}
        write_units(model, own, {on_disk[name]: placed[name] for name in placed})
        return IncompatibleKeys([name for name in current if name not in placed], unexpected)
    distributed = {name: (current[name], placed[name]) for name in placed if is_shard(current[name])}
    write(distributed)
    result = model.load_state_dict({name: placed[name] for name in placed if name not in distributed}, strict=False)
    return IncompatibleKeys([key for key in result.missing_keys if key not in distributed], unexpected)


def _whole_units(model: nn.Module, own: Own) -> dict[str, Tensor]:
    """Return the whole tensors (…) of an adapter in a model with units of FSDP 1, keyed by name in memory."""
    gathered = read_units(model, own)
    return completed({in_memory: gathered.get(name, tensor) for name, in_memory, tensor in own()})


def _bare(key: str) -> str:
    return without_wrappers(key).removeprefix(WRAPPED)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the unmerged base model, keyed by their names in the model without adapters."""
    return {name: tensor.detach() for name, tensor, _ in base_tensors(model_adapters.user_model(model))}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Copy tensors into the base model, matching them by their names in the model without adapters.

    Raises:
        StateDictError: `strict` is true and a name is missing or unexpected, or a shape does not match.
    """
    own = {name: tensor for name, tensor, _ in base_tensors(model_adapters.user_model(model))}
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    if strict and (missing or unexpected):
        raise StateDictError(
            f"Error(s) in loading the base's state dict. Missing key(s): {missing}. Unexpected key(s): {unexpected}."
        )
    wrong = [name for name, tensor in state_dict.items() if name in own and own[name].shape != tensor.shape]
    if wrong:
        raise StateDictError(f"size mismatch in the base's state dict: {', '.join(wrong)}.")
    for name, tensor in state_dict.items():
        if name in own:
            own[name].data.copy_(tensor)
    return IncompatibleKeys(missing, unexpected)


# ---- adapters in models that FSDP 1 has wrapped
#
# A unit (`FullyShardedDataParallel`) keeps its parameters in one flat buffer, and each process has a part of it. Every
# process must call these functions. Only units that hold tensors of the adapter are gathered, one at a time. Before the
# first forward pass, the model must be the outermost unit, because FSDP takes the first unit that is gathered for it.

Own = Callable[[], Iterable[tuple[str, str, Tensor]]]
"""Function that yields an adapter's tensors (…) now, each after its names on disk and in memory."""

MATRICES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
"""Ends of the names on disk of tensors with at least two dimensions."""


def parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of each part of a module, with those that only hold factors, which can be units."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from parts(child, f"{path}.{name}" if path else name)


def flat_names(own: Own) -> set[str]:
    """Return the names on disk of tensors that this process holds only in part; empty within `summon_full_params`."""
    flat = {name: tensor for name, _, tensor in own() if is_flat(tensor)}
    # a vector looks the same when it is whole
    is_gathered = not any(name.endswith(MATRICES) or hasattr(tensor, "_is_flat_param") for name, tensor in flat.items())
    return set() if is_gathered else set(flat)


def read_units(model: nn.Module, own: Own) -> dict[str, Tensor]:
    """Return copies of the whole tensors (…) in the units of a model, keyed by name on disk."""
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> None:
        found[name] = tensor.detach().clone()

    _visit(model, own, note, writes=False)
    return found


def write_units(model: nn.Module, own: Own, values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors (…), keyed by name on disk and the same in every process, into the units of a model."""

    def copy(name: str, tensor: Tensor) -> None:
        if name in values:
            tensor.copy_(values[name])

    _visit(model, own, copy, writes=True)


def _visit(model: nn.Module, own: Own, use: Callable[[str, Tensor], None], *, writes: bool) -> None:
    """Call a function with the name on disk and the whole value (…) of each flat tensor, one unit after another."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    paths = {path: module for path, module in parts(model) if isinstance(module, FullyShardedDataParallel)}
    flat, held = flat_names(own), dict[str, set[str]]()
    for name, in_memory, _ in own():
        around = [path for path in paths if not path or in_memory.startswith(f"{path}.")]
        if name in flat and around:
            held.setdefault(max(around, key=len), set()).add(name)
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
            pass  # makes FSDP initialize the outermost unit first, as its other units need
    for path, names in held.items():
        whole = FullyShardedDataParallel.summon_full_params(paths[path], recurse=False, writeback=writes)
        with whole, torch.no_grad():
            for name, _, tensor in own():
                if name in names:
                    use(name, tensor)
