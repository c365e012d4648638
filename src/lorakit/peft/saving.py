"""PEFT-style saving, including model cards (`README.md`), whose text by users is kept. An adapter whose init modified
the base is either saved for the modified base or converted to plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from lorakit import core
from lorakit.config import API_LEVEL, TaskType
from lorakit.core.attachment.saving import converted_form, save_form, saved_form
from lorakit.core.files.adapter_folder import read_adapter
from lorakit.core.model.index import layers
from lorakit.core.shards import is_shard, is_sharded
from lorakit.core.variants import moving_variant
from lorakit.durable import write_text
from lorakit.errors import AdapterError, ConfigError, warn_caller
from lorakit.peft.model_adapters import configs_of, user_model
from lorakit.peft.placeholders import PeftWarning
from lorakit.peft.state_dicts import flat_factors, get_peft_model_state_dict, tensors_of

FENCE = "---"

BODY = "model_card.md"
"""File with the body of a new model card, which remains valid if the adapter is trained further."""


def write_card(base: nn.Module, output_dir: str | PathLike[str], task: TaskType | None) -> None:
    """Write an adapter's model card, or add missing header fields to an existing one."""
    path = Path(output_dir) / "README.md"
    header, text = _parts(path.read_text("utf-8") if path.is_file() else "")
    given = {line.partition(":")[0] for line in header}
    for field, lines in _metadata(base, task):
        if field not in given:
            header += lines
    if not text.strip():
        body = Path(__file__).with_name(BODY).read_text("utf-8")
        text = body.format(base=getattr(base, "name_or_path", None) or "its base model")
    if f"- PEFT {API_LEVEL}" not in text.splitlines():
        text = f"{text.rstrip()}\n\n### Framework versions\n\n- PEFT {API_LEVEL}\n".lstrip()
    write_text(path, "\n".join([FENCE, *header, FENCE, "", text]))


def _metadata(base: nn.Module, task: TaskType | None) -> Iterator[tuple[str, list[str]]]:
    """Iterate over the card's header fields, yielding each field's name and lines."""
    name = getattr(base, "name_or_path", None)
    if name:
        yield "base_model", [f"base_model: {_quoted(name)}"]
    yield "library_name", ["library_name: peft"]
    if task == TaskType.CAUSAL_LM:
        yield "pipeline_tag", ["pipeline_tag: text-generation"]
    tags = {"lora", *(getattr(base, "model_tags", None) or ())}
    if hasattr(base, "get_output_embeddings"):
        tags.add("transformers")
    if name:
        tags.add(f"base_model:adapter:{name}")
    yield "tags", ["tags:", *(f"- {_quoted(tag)}" for tag in sorted(tags))]


def _quoted(value: str) -> str:
    """Return a header value, quoted unless YAML would read it as a plain string."""
    plain = all(char.isalnum() or char in "-_./" for char in value)
    return value if plain and value else "'" + value.replace("'", "''") + "'"


def _parts(text: str) -> tuple[list[str], str]:
    """Return a card's header lines and its body."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != FENCE or FENCE not in (line.strip() for line in lines[1:]):
        return [], text
    end = next(number for number, line in enumerate(lines[1:], 1) if line.strip() == FENCE)
    return lines[1:end], "\n".join(lines[end + 1 :]).strip() + "\n"


def save_selected(
    model: nn.Module,
    directory: Path,
    selected: Sequence[str] | None,
    state_dict: Mapping[str, Tensor] | None,
    *,
    with_embeddings: bool,
    is_main_process: bool,
    initial_folder: str | PathLike[str] | None,
) -> None:
    """Save the selected adapters, by default all, with tensors (…) of `state_dict`; see `PeftModel.save_pretrained`.

    Raises:
        ConfigError: An adapter does not exist.
    """
    configs = configs_of(model)
    chosen = list(configs if selected is None else selected)
    if any(name not in configs for name in chosen):
        text = f"You passed an invalid `selected_adapters` arguments: the model has {list(configs)}, got {selected}."
        raise ConfigError(text, field="selected_adapters", allowed=configs)
    gathers = state_dict is None and is_sharded(model)
    for name in chosen if is_main_process or gathers else ():
        tensors = None
        if state_dict is not None or with_embeddings or gathers:
            tensors = get_peft_model_state_dict(model, state_dict, name, save_embedding_layers=with_embeddings)
        if is_main_process:
            save(model, directory if name == "default" else directory / name, name, tensors, initial_folder)


MOVE_THE_BASE = ("pissa", "corda", "olora", "lora_ga")


def save(
    model: nn.Module,
    folder: Path,
    name: str,
    tensors: Mapping[str, Tensor] | None = None,
    initial_folder: str | PathLike[str] | None = None,
) -> core.SavedAdapter:
    """Save one adapter as PEFT does, with `tensors` (…), keyed by name on disk, instead of its own if they are given.

    With `initial_folder`, that of the adapter before training, it becomes plain LoRA, of twice the rank.

    Raises:
        ConfigError: The conversion would not preserve the scale that PEFT uses.
    """
    user = user_model(model)
    config = configs_of(user)[name]
    flat = flat_factors(model, name, tensors)
    own = {on_disk: tensor for on_disk, _, tensor in tensors_of(model, name)}
    if any(map(is_shard, own.values())):
        _check_complete(name, own, own if tensors is None else tensors, flat)
    if flat:
        warn_caller(
            f"{', '.join(flat[:8])} {'is' if len(flat) == 1 else 'are'} flat, like DeepSpeed ZeRO-3 / FSDP shards "
            "that were not gathered; no program can load the saved file. Pass the gathered tensors as `state_dict`.",
            PeftWarning,
        )
    moved = moving_variant(config) is None and any(name in layer.moved_by for _, layer in layers(user))
    if initial_folder is not None:
        if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
            raise ConfigError(
                "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
                "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`. `lorakit.core.save_adapter` "
                "can also write such an adapter as plain LoRA.",
                what=name,
                field="path_initial_model_for_weight_conversion",
            )
        if not str(config.init_lora_weights).lower().startswith((*MOVE_THE_BASE, "true")):
            warn_caller("`path_initial_model_for_weight_conversion` only works for PiSSA, CorDA, OLoRA and LoRA-GA.")
        initial = read_adapter(initial_folder).file.tensors
        return save_form(user, folder, converted_form(user, name, initial, tensors))
    if not moved:
        return core.save_adapter(user, folder, name, tensors=tensors)
    if config.init_lora_weights is True:  # the value with which PEFT saves the initial adapter
        return save_form(user, folder, saved_form(user, name, "raw", tensors))
    warn_caller(
        f"Adapter {name!r} applies to a base that init_lora_weights={config.init_lora_weights!r} changed. As in PEFT, "
        "the adapter is saved for the changed base. To save it for the original base, pass "
        "`path_initial_model_for_weight_conversion` or use `lorakit.core.save_adapter`."
    )
    return core.save_as_trained(user, folder, name, tensors=tensors)


def _check_complete(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], flat: Sequence[str]) -> None:
    """Check that whole tensors were given for an adapter whose tensors are distributed over processes.

    Raises:
        AdapterError: A tensor is missing or incomplete.
    """
    missing = [key for key in own if key not in given]
    parts = [key for key, tensor in given.items() if is_shard(tensor)]
    for key in [*missing, *flat, *parts][:1]:
        text = (
            f"{key} is incomplete, since adapter {name!r} is distributed over processes; nothing was written. Call "
            "save_pretrained in every process without `state_dict`, or pass the complete state dict; with DeepSpeed, "
            "set stage3_gather_16bit_weights_on_model_save."
        )
        raise AdapterError(text, what=name, where=key, field="state_dict")
