"""Rules for the settings of mlx-lm."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorakit.train.settings.conversion import rules
from lorakit.train.settings.conversion.rules import Draft, Tool, each, no_counterpart, nothing, only
from lorakit.train.settings.defaults import DEFAULTS

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _mlx_method(draft: Draft, key: str, value: JsonValue) -> None:
    variant = f"use_{value}"  # the methods are LoRA and a variant of it, which has its own setting
    if variant in DEFAULTS:
        draft.set(key, variant, True)
    elif value != "lora":
        raise draft.reject(key, rules.FULL)


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
            key, f"mlx-lm adapts the last {value} layers, lorakit all; layers_to_transform selects layers by number"
        )


def _mlx_data(draft: Draft, key: str, value: JsonValue) -> None:
    folder = str(value).rstrip("/")
    draft.set(key, "data", [f"{folder}/train.jsonl"])
    draft.set(key, "eval_data", [f"{folder}/valid.jsonl"])
    draft.change(key, "mlx-lm names a directory; its train.jsonl and valid.jsonl are listed")


def _mlx_hub_data(draft: Draft, key: str, value: JsonValue) -> None:
    entry = value if isinstance(value, dict) else {}
    path = entry.get("path") or entry.get("name")
    if isinstance(path, str) and _HUB_ID.fullmatch(path):
        draft.settings["data"] = [rules.hub_name(path, str(entry.get("train_split") or "train"), None, None)]
        draft.settings.pop("eval_data", None)
        if entry.get("valid_split"):
            draft.settings["eval_data"] = [rules.hub_name(path, str(entry["valid_split"]), None, None)]
    else:
        draft.drop(key, "write hf:owner/name as data")


def _mlx_schedule(draft: Draft, key: str, value: JsonValue) -> None:
    facts = value if isinstance(value, dict) else {}
    if isinstance(facts.get("name"), str):
        draft.settings.pop("lr_scheduler_type", None)
        rules.scheduler(draft, f"{key}.name", facts["name"])
    if facts.get("warmup"):
        rules.warmup_steps(draft, f"{key}.warmup", facts["warmup"])
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
        **each("fine_tune_type train_type", _mlx_method),
        "training_mode": only("normal", reason=rules.PREFERENCES),
        "train_mode": only("sft", "normal", reason=rules.PREFERENCES),
        "lora_parameters": _mlx_adapter,
        **each("num_layers lora_layers", _mlx_layers),
        "data": _mlx_data,
        "hf_dataset": _mlx_hub_data,
        "lr_schedule": _mlx_schedule,
        "learning_rate": rules.number("learning_rate"),
        "optimizer": rules.optimizer,
        "optimizer_config": no_counterpart(rules.ADAM),
        "grad_checkpoint": rules.checkpointing,
        "grad_accumulation_steps": rules.to("gradient_accumulation_steps"),
        "save_every": rules.interval("save_steps"),
        "steps_per_eval": rules.interval("eval_steps"),
        "resume_adapter_file": rules.to("from_adapter"),
        "report_to": rules.trackers,
        "wandb": rules.tracker("wandb"),
        "val_batches": no_counterpart("all evaluation rows are used"),
        **each("mask_prompt train test test_batches steps_per_report project_name config", nothing),
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
