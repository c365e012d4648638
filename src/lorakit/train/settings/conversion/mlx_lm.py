"""Rules for the settings of mlx-lm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.train.settings.conversion.rules import (
    HUB_ID,
    Draft,
    Tool,
    checkpointing,
    hub_name,
    interval,
    no_counterpart,
    nothing,
    number,
    only,
    optimizer,
    scheduler,
    to,
    tracker,
    trackers,
    warmup_steps,
)
from lorakit.train.settings.defaults import DEFAULTS

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

_FULL = "lorakit trains adapters, not all weights"
_PREFERENCES = "lorakit trains on texts, prompts and chats, not on preferences or rewards"
_ADAM = "Adam's other parameters are fixed"


def _mlx_method(draft: Draft, key: str, value: JsonValue) -> None:
    variant = f"use_{value}"  # the methods are LoRA and a variant of it, which has its own setting
    if variant in DEFAULTS:
        draft.set(key, variant, True)
    elif value != "lora":
        raise draft.reject(key, _FULL)


def _mlx_adapter(draft: Draft, key: str, value: JsonValue) -> None:
    facts = value if isinstance(value, dict) else {}
    rank = facts.get("rank", 8)
    scale = facts.get("scale", facts.get("alpha", 20.0))
    draft.set(f"{key}.rank", "r", rank)
    if isinstance(scale, int | float) and isinstance(rank, int):
        draft.set(f"{key}.scale", "lora_alpha", float(scale * rank))
        draft.change(f"{key}.scale", "mlx-lm multiplies by scale; lora_alpha is scale times rank")
    draft.set(f"{key}.dropout", "lora_dropout", float(facts.get("dropout", 0.0)))
    draft.set(f"{key}.keys", "target_modules", facts.get("keys") or "all-linear")


def _mlx_layers(draft: Draft, key: str, value: JsonValue) -> None:
    if value != -1:
        draft.change(
            key,
            f"mlx-lm adapts the last {value} layers, lorakit all; layers_to_transform selects layers by number",
        )


def _mlx_data(draft: Draft, key: str, value: JsonValue) -> None:
    folder = str(value).rstrip("/")
    draft.set(key, "data", [f"{folder}/train.jsonl"])
    draft.set(key, "eval_data", [f"{folder}/valid.jsonl"])
    draft.change(key, "mlx-lm names a directory; its train.jsonl and valid.jsonl are listed")


def _mlx_hub_data(draft: Draft, key: str, value: JsonValue) -> None:
    entry = value if isinstance(value, dict) else {}
    path = entry.get("path") or entry.get("name")
    if isinstance(path, str) and HUB_ID.fullmatch(path):
        draft.settings["data"] = [hub_name(path, str(entry.get("train_split") or "train"), None, None)]
        draft.settings.pop("eval_data", None)
        if entry.get("valid_split"):
            draft.settings["eval_data"] = [hub_name(path, str(entry["valid_split"]), None, None)]
    else:
        draft.drop(key, "write hf:owner/name as data")


def _mlx_schedule(draft: Draft, key: str, value: JsonValue) -> None:
    facts = value if isinstance(value, dict) else {}
    if isinstance(facts.get("name"), str):
        draft.settings.pop("lr_scheduler_type", None)
        scheduler(draft, f"{key}.name", facts["name"])
    if facts.get("warmup"):
        warmup_steps(draft, f"{key}.warmup", facts["warmup"])
    if facts.get("arguments"):
        draft.drop(f"{key}.arguments", "learning_rate is the peak, and the rate ends near zero")


def _mlx_finish(draft: Draft) -> None:
    draft.settings.setdefault("lr_scheduler_type", "constant")
    if "warmup_ratio" not in draft.settings and "warmup_steps" not in draft.settings:
        draft.settings["warmup_ratio"] = 0.0


MLX = Tool(
    "mlx-lm",
    frozenset(
        {"lora_parameters", "fine_tune_type", "iters", "adapter_path", "lora_layers", "num_layers", "steps_per_eval"}
        | {"save_every", "steps_per_report", "val_batches", "grad_checkpoint"}
    ),
    {
        "fine_tune_type": _mlx_method,
        "train_type": _mlx_method,
        "training_mode": only("normal", reason=_PREFERENCES),
        "train_mode": only("sft", "normal", reason=_PREFERENCES),
        "lora_parameters": _mlx_adapter,
        "num_layers": _mlx_layers,
        "lora_layers": _mlx_layers,
        "data": _mlx_data,
        "hf_dataset": _mlx_hub_data,
        "lr_schedule": _mlx_schedule,
        "learning_rate": number("learning_rate"),
        "optimizer": optimizer,
        "optimizer_config": no_counterpart(_ADAM),
        "grad_checkpoint": checkpointing,
        "grad_accumulation_steps": to("gradient_accumulation_steps"),
        "save_every": interval("save_steps"),
        "steps_per_eval": interval("eval_steps"),
        "mask_prompt": nothing,
        "resume_adapter_file": to("from_adapter"),
        "report_to": trackers,
        "wandb": tracker("wandb"),
        "train": nothing,
        "test": nothing,
        "test_batches": nothing,
        "val_batches": no_counterpart("all evaluation rows are used"),
        "steps_per_report": nothing,
        "project_name": nothing,
        "config": nothing,
    },
    {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
        "num_layers": 16,
        "batch_size": 4,
        "iters": 1000,
        "learning_rate": 1e-5,
        "max_seq_length": 2048,
    },
    _mlx_finish,
)
