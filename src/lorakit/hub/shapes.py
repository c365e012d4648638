"""Read the module names and sizes of any transformers model for `lorakit.plan`, using the meta device.

The shapes of known models come from the catalog, without importing torch. The modules that a model's files lack, such
as a new head, are found in the headers of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lorakit.architectures.families import TUPLE_ROUTERS
from lorakit.architectures.shapes import ModelShape, PlainShape, SiteShape, config_value
from lorakit.choices import CONV1D, EMBEDDING, LINEAR
from lorakit.config import HEADS_BY_TASK, TaskType
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import ModelError
from lorakit.hub.model_config import TASKS, config_of, stored_tensors, weight_files
from lorakit.hub.packaged import quiet_transformers
from lorakit.hub.sources import ModelSource, call_loader, resolve
from lorakit.hub_cache import offline
from lorakit.plan import catalogue
from lorakit.targets.patterns import names_path

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_PACKAGED_AS = {"smollm2": "SmolLM2-135M-Instruct"}
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")

_SIZES = {
    "hidden": ("hidden_size", "d_model"),
    "layers": ("num_hidden_layers", "num_layers"),
    "heads": ("num_attention_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "intermediate": (
        *("moe_intermediate_size", "intermediate_size", "d_ff", "n_inner", "ffn_dim", "decoder_ffn_dim"),
        "hidden_dim",
    ),
    "experts_per_token": ("num_experts_per_tok", "moe_topk"),
    "positions": ("max_position_embeddings",),
}
"""Size -> the fields of configs with it, in order; configs of transformers have most under the first name, too."""

_DROPOUTS = {
    "embedding": ("embd_pdrop", "embedding_dropout", "hidden_dropout_prob", "dropout_rate", "dropout"),
    "residual": ("resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout_rate", "dropout"),
    "attention": ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob", "dropout_rate"),
}


def shape_of(model: str | os.PathLike[str] | ModelSource) -> ModelShape:
    """Return the names and sizes of a model's modules, looked up by path, then in the catalog, then on the Hub.

    Raises:
        ModelError: The model was not found, or no model can be built from its config.
    """
    if not isinstance(model, ModelSource):
        name = os.fspath(model)
        if not Path(name).expanduser().exists():
            known = catalogue.published(_PACKAGED_AS.get(name, name))
            if known is not None:
                return dataclasses.replace(known, name=name) if name in _PACKAGED_AS else known
        model = resolve(name)
    return shape_of_module(skeleton(model), _short_name(model), model.given)


def shape_of_module(module: PreTrainedModel, name: str, source: str) -> ModelShape:
    """Return the names and sizes of the modules in an existing transformers model on any device."""
    config = module.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    sites, others, containers, unused = _parts(module)
    numbers = {name: _numbers(text, fields) for name, fields in (_SIZES | _DROPOUTS).items()}
    sizes = {name: next((n for n in numbers[name] if isinstance(n, int) and n > 0), 0) for name in _SIZES}
    dropouts = {cause: float(next(iter(numbers[cause]), 0.0)) for cause in _DROPOUTS}
    hidden, heads = sizes["hidden"], sizes["heads"] or 1
    return ModelShape(
        name=name,
        source=source,
        architecture=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        hidden=hidden,
        layers=sizes["layers"],
        heads=heads,
        kv_heads=sizes["kv_heads"] or heads,
        head_dim=sizes["head_dim"] or hidden // heads,
        intermediate=sizes["intermediate"] or 4 * hidden,
        vocab=getattr(text, "vocab_size", None)
        or max((site.in_features for site in sites if site.kind == EMBEDDING), default=0),
        positions=sizes["positions"] - unused,
        tied=any(site.tied_to for site in sites if not site.dense),
        gated=any("gate" in site.path.rsplit(".", 1)[-1] or site.path.endswith(".wi_1") for site in sites)
        or any(name == "gate_up_proj" for other in others for name, _ in other.matrices),
        sites=tuple(sites),
        others=tuple(others),
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        causal=_is_causal(module, config),
        dropouts={cause: p for cause, p in dropouts.items() if p},
        containers=tuple(containers),
        experts_per_token=sizes["experts_per_token"],
        model_type=str(getattr(config, "model_type", "")),
        quantization=quantization_values(config),
    )


def quantization_values(config: PreTrainedConfig) -> JsonObject:
    """Return the quantization config of a model's files as JSON values; empty if they are not quantized."""
    facts = getattr(config, "quantization_config", None)
    facts = facts if isinstance(facts, dict) else facts.to_dict() if facts is not None else {}
    in_bits = facts.get("load_in_4bit") or facts.get("load_in_8bit")  # read before quant_method, which older files lack
    method = "bitsandbytes" if in_bits else facts.get("quant_method")
    return {**facts, "quant_method": str(getattr(method, "value", method))} if facts else {}


def shape_for_task(
    model: str | os.PathLike[str] | ModelSource, task: str, config_values: Mapping[str, JsonValue]
) -> ModelShape:
    """Return the names and sizes of the modules of a model as it is loaded for a task, including its head.

    For a task other than "causal", a catalog name is looked up on the Hub.

    Raises:
        ModelError: The model was not found, or no model for this task can be built from the config.
    """
    if task == "causal":
        return shape_of(model)
    source = resolve(model)
    module = skeleton(source, task, config_values)
    full = full_modules(module, source, task)  # may remove a pooler, so it comes first
    shape = dataclasses.replace(shape_of_module(module, _short_name(source), source.given), full_modules=full)
    if task != "encoder":
        return shape
    unused = unused_modules(module)
    return dataclasses.replace(shape, unused_modules=tuple(s.path for s in shape.sites if s.dense and s.path in unused))


def skeleton(
    source: ModelSource, task: str = "causal", config_values: Mapping[str, JsonValue] | None = None
) -> PreTrainedModel:
    """Build a model on the meta device from its config, without weights.

    For the task "causal", it has the class that the config names. `config_values` replace values such as `id2label`.

    Raises:
        ModelError: No model can be built from the config.
    """
    import torch
    import transformers

    with quiet_transformers():
        config = config_of(source, config_values)
        make = _model_class(config) if task == "causal" else getattr(transformers, TASKS[task]).from_config

        def build(path_or_id: str, **options: Any) -> PreTrainedModel:
            with torch.device("meta"):
                return make(config)

        return call_loader(source, build)


def _model_class(config: PreTrainedConfig) -> Callable[[PreTrainedConfig], PreTrainedModel]:
    """Return the class that the config names, else the first auto class that accepts the config."""
    import transformers

    for architecture in config.architectures or ():
        named = getattr(transformers, str(architecture), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    for auto in _AUTO_CLASSES:
        auto_class = getattr(transformers, auto)
        if type(config) in auto_class._model_mapping:
            return auto_class.from_config
    text = f"transformers has no model class for the config {type(config).__name__}"
    raise ModelError(text, what=type(config).__name__)


def _parts(module: nn.Module) -> tuple[list[SiteShape], list[PlainShape], list[str], int]:
    """Return sites, other modules with parameters, containers, and the number of unused position embeddings."""
    sites: list[SiteShape] = []
    others: list[PlainShape] = []
    containers: list[str] = []
    unused = 0
    head = getattr(module, "get_output_embeddings", lambda: None)()  # "all-linear" excludes the head
    owners: dict[int, str] = {}
    for path, part in module.named_modules():
        parameters = dict(part.named_parameters(recurse=False))
        unused += _unused_positions(path, part)
        if not parameters:
            if path and next(part.children(), None) is not None:
                containers.append(path)
            continue
        site = _site(path, part, owners, head)
        if site is not None:
            sites.append(site)
        else:
            fresh = {name: p for name, p in parameters.items() if owners.setdefault(id(p), path) == path}
            biases = sum(p.numel() for name, p in fresh.items() if "bias" in name)
            matrices = tuple((name, tuple(p.shape)) for name, p in parameters.items() if p.ndim in {2, 3})
            numbers = sum(p.numel() for p in fresh.values())
            marks = int(getattr(part, "num_experts", 0)), bool(getattr(part, "is_transposed", False))
            others.append(PlainShape(path, numbers, biases, matrices, *marks))
    return sites, others, sorted(containers), unused


def _unused_positions(path: str, part: nn.Module) -> int:
    """Return how many embeddings of a module no token uses: RoBERTa counts from after the padding position."""
    padding = getattr(part, "padding_idx", None) if path.endswith("position_embeddings") else None
    return 0 if padding is None else padding + 1


def _site(path: str, part: nn.Module, owners: dict[int, str], head: nn.Module | None) -> SiteShape | None:
    """Return the site for a dense layer or an embedding, or None for any other module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if not isinstance(part, (nn.Linear, nn.Embedding, Conv1D)) or _dotted(part) in TUPLE_ROUTERS:
        return None
    kind = LINEAR if isinstance(part, nn.Linear) else EMBEDDING if isinstance(part, nn.Embedding) else CONV1D
    first, second = (int(size) for size in part.weight.shape)
    # nn.Linear stores (out, in), Conv1D (in, out), and Embedding (rows, width), where width is the output size
    out_features, in_features = (first, second) if kind == LINEAR else (second, first)
    dense, biased = kind != EMBEDDING and part is not head, getattr(part, "bias", None) is not None
    owner = owners.setdefault(id(part.weight), path)
    return SiteShape(path, kind, out_features, in_features, dense, biased, None if owner == path else owner)


def _dotted(part: nn.Module) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _numbers(config: PreTrainedConfig, fields: Iterable[str]) -> list[int | float]:
    """Return the numeric values among the given config fields, in the order of the fields."""
    values = (config_value(config, field) for field in fields)
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]


def _is_causal(module: nn.Module, config: PreTrainedConfig) -> bool:
    named = type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return not getattr(config, "is_encoder_decoder", False) and (named or bool(getattr(config, "is_decoder", False)))


def _short_name(source: ModelSource) -> str:
    path = Path(source.given)
    if source.kind == "config":
        return path.resolve().parent.name or source.given
    if source.kind == "gguf":
        return path.stem
    return path.resolve().name if source.kind == "directory" else source.given


Sizes: TypeAlias = "dict[str, tuple[int, ...]]"
"""Name of a tensor -> its shape."""

_HEADS: Mapping[str, tuple[str, ...]] = {
    "classification": HEADS_BY_TASK[TaskType.SEQ_CLS],
    "token-classification": HEADS_BY_TASK[TaskType.TOKEN_CLS],
}
"""Task, as in `lorakit.hub.model_config.TASKS` -> possible names of its head."""


def full_modules(model: PreTrainedModel, source: ModelSource, task: str) -> tuple[str, ...]:
    """Return the paths of the modules that a task trains in full: its head, and modules that the files lack.

    The pooler of a model that computes embeddings is set to None if the files lack it, as when the model is loaded.
    """
    missing = missing_names(model, source)
    if is_unused_pooler(task, missing):
        model.pooler = None
        return ()
    heads = _HEADS.get(task)
    if heads is None:
        return ()
    paths = {path for name, _ in model.named_parameters() for path in _above(name)}
    full = {path for path in paths if any(names_path(head, path) for head in heads)} | set(modules_with(model, missing))
    return tuple(sorted(path for path in full if not full.intersection(_above(path))))


def _above(path: str) -> list[str]:
    """Return the paths of the modules that contain a module or parameter, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def is_unused_pooler(task: str, missing: Collection[str]) -> bool:
    """Return whether only the pooler is missing, as in files of masked language models; embeddings do not use it."""
    return task == "encoder" and bool(missing) and all(name.startswith("pooler.") for name in missing)


def unused_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of layers on whose output the last hidden states do not depend.

    They are found by a backward pass on the meta device, which sets the gradients of the model's parameters.
    """
    import torch

    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with contextlib.suppress(Exception):  # some models read values, which meta tensors do not have
        model.eval()(input_ids=ids).last_hidden_state.sum().backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        return tuple(name.removesuffix(".weight") for name in without if name.endswith(".weight"))
    return ()


def modules_with(model: PreTrainedModel, missing: Collection[str]) -> tuple[str, ...]:
    """Return the paths of the largest modules all of whose parameters are missing."""
    present = {name for name, _ in model.named_parameters()} - set(missing)
    paths = set()
    for name in missing:
        path = name.rpartition(".")[0]
        while path and not any(other.startswith(f"{path.rpartition('.')[0]}.") for other in present):
            above = path.rpartition(".")[0]
            if not above:
                break
            path = above
        paths.add(path)
    return tuple(sorted(paths))


def missing_names(model: PreTrainedModel, source: ModelSource) -> frozenset[str]:
    """Return the names of parameters that a model's files lack, or have with another shape.

    The result is empty if the files would have to be downloaded, or if all weights are missing, so that the files are
    not those of this model.
    """
    stored = _stored(source)
    if stored is None:
        return frozenset()
    aliases: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    sizes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    present = {name for name, size in _renamed(model, stored).items() if size in (None, sizes.get(name))}
    missing = [names[0] for names in aliases.values() if present.isdisjoint(names)]
    return frozenset(missing if len(missing) < len(aliases) else ())


def _renamed(model: PreTrainedModel, stored: Sizes) -> dict[str, tuple[int, ...] | None]:
    """Return the names of stored tensors in the model -> their shapes; None for tensors that are converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    renamed_sizes: dict[str, tuple[int, ...] | None] = {}
    for name, size in stored.items():
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is None:
            renamed_sizes[renamed] = size
        else:
            first, *_ = targets = by_pattern[pattern].target_patterns
            renamed_sizes |= {renamed.replace(first, target): None for target in targets}
    return renamed_sizes


def _stored(source: ModelSource) -> Sizes | None:
    """Return the tensors in a model's safetensors files, or None if they are unknown."""
    files = None if source.kind in ("config", "gguf") else weight_files(source)
    if files is None:
        return _on_hub(source) if source.kind == "hub" else None
    return {name: shape for name, (_, shape) in stored_tensors(files).items()}


def _on_hub(source: ModelSource) -> Sizes | None:
    """Return the tensors of a model on the Hub, read from the headers of its files, or None if it is unreachable."""
    import huggingface_hub

    if offline():
        return None
    try:
        metadata = huggingface_hub.get_safetensors_metadata(source.path_or_id, revision=source.revision)
    except Exception:  # noqa: BLE001 - depends on the client's transport; the loader reports what prevents loading
        return None
    return {name: tuple(info.shape) for part in metadata.files_metadata.values() for name, info in part.tensors.items()}
