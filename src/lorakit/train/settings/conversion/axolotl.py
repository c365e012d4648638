"""Rules for the settings of Axolotl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.train.settings.conversion import rules
from lorakit.train.settings.conversion.rules import Draft, Rule, Tool, by_value, each, no_counterpart, nothing, rejected

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

_SPEED = "lorakit accelerates supported layers automatically (--accelerate)"
_SPLIT = "processes share the rows of a step; sequences and layers are not split over processes"

_AXOLOTL_TYPES = {
    "alpaca": "alpaca",
    "completion": "text",
    "pretrain": "text",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "alpaca_chat.load_qa": "question-answer",
}


def _axolotl_data(name: str) -> Rule:
    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        entries = value if isinstance(value, list) else [value]
        names: list[str] = []
        formats: set[str | None] = set()
        for position, entry in enumerate(entries):
            where = f"{key}[{position}]" if len(entries) > 1 else key
            if isinstance(entry, str):
                entry = {"path": entry}
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                draft.drop(where, "it has no path")
                continue
            names += _axolotl_names(draft, where, entry)
            formats.add(_axolotl_format(draft, where, entry))
        if names:
            draft.set(key, name, names)
        if name == "data" and len(formats) == 1 and None not in formats:
            draft.set(key, "format", formats.pop())
        elif len(formats) > 1:
            draft.change(key, "the data sets have several formats, which are recognized by their columns")

    return rule


_FILE_KINDS = ("json", "csv", "parquet", "arrow", "text")
"""Values of `path` that stand for local files in `data_files`."""

_HANDLED = frozenset(
    {"path", "type", "split", "name", "revision", "ds_type", "data_files", "field_messages", "field", "conversation"}
    | {"message_property_mappings", "chat_template", "trust_remote_code", "message_field_role", "message_field_content"}
)
"""Keys of a data set that are converted or have no effect here."""


def _axolotl_names(draft: Draft, where: str, entry: dict[str, JsonValue]) -> list[str]:
    path, split = str(entry["path"]), entry.get("split") or "train"
    files = entry.get("data_files")
    for key in sorted(set(entry) - _HANDLED):
        if entry[key] is not None:
            draft.drop(f"{where}.{key}", "data sets are read unchanged")
    if files and path in _FILE_KINDS:
        return [str(file) for file in (files if isinstance(files, list) else [files])]
    if files:
        draft.drop(f"{where}.data_files", "files of a Hub data set cannot be selected")
    if rules.is_data_file(path) or path.startswith((".", "/", "~")) or Path(path).exists():
        return [path]
    return [rules.hub_name(path, str(split), entry.get("revision"), entry.get("name"))]


def _axolotl_format(draft: Draft, where: str, entry: dict[str, JsonValue]) -> str | None:
    """Return the format of a data set, or None if it is to be recognized by the columns."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        return _axolotl_columns(draft, where, kind)
    if kind is None:
        return None
    shape = _AXOLOTL_TYPES.get(str(kind).split(":")[0])
    mapping = entry.get("message_property_mappings")
    role = mapping.get("role") if isinstance(mapping, dict) else entry.get("message_field_role")
    messages = entry.get("field_messages")
    if shape == "messages" and (role == "from" or messages == "conversations"):
        shape = "sharegpt"
    column = {"messages": "messages", "sharegpt": "conversations"}.get(shape or "")
    if column is not None and isinstance(messages, str) and messages != column:
        draft.set(f"{where}.field_messages", "columns", {column: messages})
    if shape == "text" and isinstance(entry.get("field"), str) and entry["field"] != "text":
        draft.set(f"{where}.field", "columns", {"text": entry["field"]})
    if shape is None:
        draft.change(f"{where}.type", f"{kind} has no counterpart; the format is recognized by the columns")
    return shape


def _axolotl_columns(draft: Draft, where: str, kind: dict[str, JsonValue]) -> str:
    fields = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    fields |= {"field_system": "system"}
    columns = {here: kind[there] for there, here in fields.items() if isinstance(kind.get(there), str)}
    columns = {here: column for here, column in columns.items() if here != column}
    if columns:
        draft.set(f"{where}.type", "columns", columns)
    for key in sorted(set(kind) - set(fields)):
        if kind[key]:
            draft.drop(f"{where}.type.{key}", "prompts are rendered with the model's chat template")
    return "alpaca"


def _axolotl_adapter(draft: Draft, key: str, value: JsonValue) -> None:
    if value not in ("lora", "qlora"):
        raise draft.reject(key, rules.OTHER_METHOD)
    if value == "qlora":
        _axolotl_4bit(draft, key, True)


def _axolotl_4bit(draft: Draft, key: str, value: JsonValue) -> None:
    options = draft.given.get("bnb_config_kwargs")
    kind = options.get("bnb_4bit_quant_type") if isinstance(options, dict) else None
    if value is True:
        draft.set(key, "quantization", kind or "nf4")


def _axolotl_targets(draft: Draft, key: str, value: JsonValue) -> None:
    if draft.given.get("lora_target_linear") is True:
        draft.change(key, "lora_target_linear already selects all linear layers")
    elif value:
        draft.set(key, "target_modules", value)


def _axolotl_tokens(draft: Draft, key: str, value: JsonValue) -> None:
    if isinstance(value, dict):
        for name in sorted(value):
            draft.drop(f"{key}.{name}", "the model's own special tokens are used")
    elif value:
        draft.set(key, "new_tokens", value)


def _axolotl_quantization(draft: Draft, key: str, value: JsonValue) -> None:
    if isinstance(value, dict) and isinstance(value.get("bnb_4bit_use_double_quant"), bool):
        draft.set(key, "double_quantization", value["bnb_4bit_use_double_quant"])


def _axolotl_finish(draft: Draft) -> None:
    if draft.given.get("adapter") is None:
        raise draft.reject("adapter", rules.FULL)


AXOLOTL = Tool(
    "Axolotl",
    frozenset(
        {"base_model", "datasets", "sequence_len", "micro_batch_size", "lora_target_linear", "adapter", "val_set_size"}
        | {"sample_packing", "lora_r", "pretraining_dataset"}
    ),
    {
        **rules.OF_TRAINER,
        "bnb_config_kwargs": _axolotl_quantization,
        "load_in_4bit": _axolotl_4bit,
        "load_in_8bit": by_value("quantization", {True: "int8"}),
        "adapter": _axolotl_adapter,
        **each("rl reward_model process_reward_model", rejected(rules.PREFERENCES)),
        "relora_steps": rejected(rules.OTHER_METHOD),
        **each("datasets pretraining_dataset", _axolotl_data("data")),
        "test_datasets": _axolotl_data("eval_data"),
        "lora_target_linear": by_value("target_modules", {True: "all-linear"}),
        "lora_target_modules": _axolotl_targets,
        "lora_model_dir": rules.to("from_adapter"),
        "peft_init_lora_weights": rules.initialization,
        "optimizer": rules.optimizer,
        "lr_scheduler": rules.scheduler,
        "val_set_size": rules.fraction_held_out,
        **each("evals_per_epoch saves_per_epoch", rules.OF_TRAINER["eval_strategy"]),
        **each("special_tokens tokens", _axolotl_tokens),
        "chat_template": rules.template,
        "chat_template_jinja": no_counterpart("write the template to a file and set chat_template to its path"),
        "batch_size": no_counterpart("the total batch size is the micro batch size times the accumulation steps"),
        "quantization": no_counterpart("quantization after training is not part of training"),
        "gptq": no_counterpart("files that are already quantized are recognized by their config"),
        "train_on_inputs": no_counterpart(rules.PROMPTS),
        "sample_packing_*": no_counterpart("lorakit packs sequences automatically"),
        "group_by_length": no_counterpart("rows are shuffled, and packing leaves no padding"),
        **each("torch_compile* plugins", no_counterpart(_SPEED)),
        "tf32": no_counterpart("chosen automatically for this machine"),
        "device_map": no_counterpart(rules.PROCESSES),
        **each("sequence_parallel_degree context_parallel_size tensor_parallel_size", no_counterpart(_SPLIT)),
        "wandb_project": rules.tracker("wandb"),
        "wandb_*": no_counterpart("wandb reads its environment variables, such as WANDB_NAME"),
        "mlflow_tracking_uri": rules.tracker("mlflow"),
        "mlflow_*": no_counterpart("mlflow reads its environment variables"),
        "use_tensorboard": rules.tracker("tensorboard"),
        **each("use_comet comet_*", no_counterpart("lorakit does not support Comet")),
        **each("hub_model_id hub_strategy push_dataset_to_hub", no_counterpart(rules.UPLOAD)),
        "auto_resume_from_checkpoints": rules.OF_TRAINER["resume_from_checkpoint"],
        "optim_args": no_counterpart(rules.ADAM),
        "lr_scheduler_kwargs": no_counterpart("the schedules have no other parameters"),
        "cosine_min_lr_ratio": no_counterpart("the rate ends near zero"),
        "loss_watchdog_*": no_counterpart("a loss that is not finite stops the run"),
        **each(
            "eval_batch_size sample_packing eval_sample_packing pad_to_sequence_len flash_attention xformers_attention "
            "sdp_attention eager_attention attn_implementation flash_attn_* flash_optimum lora_mlp_kernel "
            "lora_qkv_kernel lora_o_kernel liger_* cut_cross_entropy local_rank dataset_prepared_path "
            "dataset_processes dataset_keep_in_memory base_model_config tokenizer_type tokenizer_use_fast "
            "tokenizer_legacy model_type is_* lora_fan_in_fan_out lora_on_cpu debug strict save_safetensors eot_tokens "
            "gradient_checkpointing_kwargs save_first_step shuffle_merged_datasets",
            nothing,
        ),
    },
    {"val_set_size": 0.0, "num_epochs": 1.0, "micro_batch_size": 1, "lora_dropout": 0.0},
    _axolotl_finish,
)
