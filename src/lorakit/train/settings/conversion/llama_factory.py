"""Rules for the settings of LLaMA-Factory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.train.settings.conversion.rules import (
    PROCESSES,
    Draft,
    Rule,
    Tool,
    checkpointing,
    float16,
    fraction_held_out,
    half_precision,
    interval,
    is_data_file,
    no_counterpart,
    nothing,
    number,
    only,
    optimizer,
    positive,
    rejected,
    scheduler,
    template,
    to,
    trackers,
    warmup_steps,
    words,
)

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

_OTHER_METHOD = "lorakit trains LoRA adapters"
_PREFERENCES = "lorakit trains on texts, prompts and chats, not on preferences or rewards"
_CODE = "code from a model's repository is never run"
_PROMPTS = "prompts never contribute to the loss; for that, use text rows"
_UPLOAD = "nothing is uploaded during training"
_ADAM = "Adam's other parameters are fixed"


def _factory_data(name: str) -> Rule:
    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        names = [str(one).strip() for one in (value if isinstance(value, list) else str(value).split(","))]
        folder = str(draft.given.get("dataset_dir") or "data")
        files = [name if is_data_file(name) else f"{folder}/{name}.json" for name in names if name]
        if files:
            draft.set(key, name, files)
            draft.change(
                key,
                f"data sets are names in {folder}/dataset_info.json, which is not read; check the paths, and write "
                "hf:owner/name for data on the Hub",
            )

    return rule


def _factory_targets(draft: Draft, key: str, value: JsonValue) -> None:
    if value == "all":
        draft.set(key, "target_modules", "all-linear")
    else:
        words("target_modules")(draft, key, value)


def _factory_bits(draft: Draft, key: str, value: JsonValue) -> None:
    method, kind = draft.given.get("quantization_method", "bitsandbytes"), draft.given.get("quantization_type", "nf4")
    hqq = str(method) == "hqq"
    found = {"4": "hqq4" if hqq else str(kind), "8": "hqq8" if hqq else "int8"}.get(str(value))
    if found is None or str(method) not in ("bitsandbytes", "bnb", "hqq"):
        draft.drop(key, f"{value} bits with {method} are not available; see quantization in `lorakit train --help-all`")
    else:
        draft.set(key, "quantization", found)


def _factory_pissa(draft: Draft, key: str, value: JsonValue) -> None:
    if value is True:
        rounds = draft.given.get("pissa_iter", 16)
        draft.set(key, "init_lora_weights", "pissa" if rounds == -1 else f"pissa_niter_{rounds}")


def _factory_loraplus_embedding(draft: Draft, key: str, value: JsonValue) -> None:
    if draft.given.get("loraplus_lr_ratio") is not None:
        draft.set(key, "loraplus_lr_embedding", value)


def _factory_finish(draft: Draft) -> None:
    rank = draft.settings.get("r")
    if "lora_alpha" not in draft.settings and isinstance(rank, int):
        draft.settings["lora_alpha"] = 2 * rank
    if "warmup_steps" not in draft.settings:
        draft.settings.setdefault("warmup_ratio", 0.0)


def _factory_checkpointing(draft: Draft, key: str, value: JsonValue) -> None:
    if value is not True:
        draft.set(key, "recompute", "layers")


LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    frozenset(
        {"finetuning_type", "stage", "cutoff_len", "lora_target", "lora_rank", "template", "dataset_dir", "do_train"}
        | {"model_name_or_path", "plot_loss", "quantization_bit"}
    ),
    {
        "stage": only("sft", "pt", reason=_PREFERENCES),
        "finetuning_type": only("lora", reason=f"{_OTHER_METHOD}; full and freeze are not available"),
        "do_train": only(True, reason="the file does not train"),
        "do_predict": nothing,
        "dataset": _factory_data("data"),
        "eval_dataset": _factory_data("eval_data"),
        "dataset_dir": nothing,
        "template": template,
        "lora_target": _factory_targets,
        "additional_target": words("modules_to_save"),
        "add_tokens": words("new_tokens"),
        "add_special_tokens": words("new_tokens"),
        "quantization_bit": _factory_bits,
        "quantization_method": nothing,
        "quantization_type": nothing,
        "pissa_init": _factory_pissa,
        "pissa_iter": nothing,
        "pissa_convert": nothing,
        "loraplus_lr_embedding": _factory_loraplus_embedding,
        "adapter_name_or_path": to("from_adapter"),
        "resume_from_checkpoint": no_counterpart("pass --resume to continue the run in output_dir"),
        "overwrite_output_dir": no_counterpart("pass --overwrite to replace the run in output_dir"),
        "learning_rate": number("learning_rate"),
        "optim": optimizer,
        "lr_scheduler_type": scheduler,
        "warmup_steps": warmup_steps,
        "val_size": fraction_held_out,
        "max_steps": positive("max_steps"),
        "eval_steps": interval("eval_steps"),
        "save_steps": interval("save_steps"),
        "eval_strategy": no_counterpart("without eval_steps, lorakit evaluates after every 10% of the run"),
        "evaluation_strategy": no_counterpart("without eval_steps, lorakit evaluates after every 10% of the run"),
        "save_strategy": no_counterpart("without save_steps, lorakit saves after every 10% of the run"),
        "load_best_model_at_end": nothing,
        "bf16": half_precision,
        "pure_bf16": half_precision,
        "fp16": float16,
        "gradient_checkpointing": checkpointing,
        "disable_gradient_checkpointing": _factory_checkpointing,
        "quantization_device_map": nothing,
        "max_samples": no_counterpart("all rows are used; for a Hub data set, write a slice such as :train[:1000]"),
        "train_on_prompt": no_counterpart(_PROMPTS),
        "mask_history": no_counterpart("all assistant turns are trained; set weight 0 in the data to exclude turns"),
        "packing": nothing,
        "neat_packing": nothing,
        "flash_attn": nothing,
        "enable_liger_kernel": nothing,
        "use_unsloth": nothing,
        "use_unsloth_gc": nothing,
        "overwrite_cache": nothing,
        "preprocessing_num_workers": nothing,
        "preprocessing_batch_size": nothing,
        "dataloader_num_workers": nothing,
        "per_device_eval_batch_size": nothing,
        "logging_steps": nothing,
        "plot_loss": nothing,
        "report_to": trackers,
        "run_name": nothing,
        "ddp_*": no_counterpart(PROCESSES),
        "deepspeed": no_counterpart(PROCESSES),
        "fsdp*": no_counterpart(PROCESSES),
        "ray_*": no_counterpart("call lorakit.train.run in Ray's workers, as examples/ray_train.py does"),
        "trust_remote_code": no_counterpart(_CODE),
        "push_to_hub": no_counterpart(_UPLOAD),
        "use_swanlab": no_counterpart("lorakit does not support SwanLab"),
        "swanlab_*": no_counterpart("lorakit does not support SwanLab"),
        "adam_*": no_counterpart(_ADAM),
        "neftune_noise_alpha": no_counterpart("NEFTune is not available"),
        "use_galore": rejected(_OTHER_METHOD),
        "use_apollo": rejected(_OTHER_METHOD),
        "use_badam": rejected(_OTHER_METHOD),
        "use_llama_pro": rejected(_OTHER_METHOD),
        "save_only_model": nothing,
        "cache_dir": no_counterpart("set the environment variable HF_HOME"),
        "rope_scaling": no_counterpart("the model's own rotary embedding is used"),
        "streaming": no_counterpart("rows are read from files on demand"),
        "enable_thinking": no_counterpart("set chat_template_kwargs in the rows"),
    },
    {
        "lora_rank": 8,
        "lora_target": "all",
        "cutoff_len": 2048,
        "val_size": 0.0,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "disable_gradient_checkpointing": False,
    },
    _factory_finish,
)
