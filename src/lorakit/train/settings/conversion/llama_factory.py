"""Rules for the settings of LLaMA-Factory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.train.settings.conversion import rules
from lorakit.train.settings.conversion.rules import Draft, Rule, Tool, each, no_counterpart, nothing, only

if TYPE_CHECKING:
    from lorakit.durable import JsonValue


def _factory_data(name: str) -> Rule:
    def rule(draft: Draft, key: str, value: JsonValue) -> None:
        names = [str(one).strip() for one in (value if isinstance(value, list) else str(value).split(","))]
        folder = str(draft.given.get("dataset_dir") or "data")
        files = [name if rules.is_data_file(name) else f"{folder}/{name}.json" for name in names if name]
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
        rules.words("target_modules")(draft, key, value)


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


LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    frozenset(
        {"finetuning_type", "stage", "cutoff_len", "lora_target", "lora_rank", "template", "dataset_dir", "do_train"}
        | {"model_name_or_path", "plot_loss", "quantization_bit"}
    ),
    {
        **rules.OF_TRAINER,
        "stage": only("sft", "pt", reason=rules.PREFERENCES),
        "finetuning_type": only("lora", reason=f"{rules.OTHER_METHOD}; full and freeze are not available"),
        "do_train": only(True, reason="the file does not train"),
        "dataset": _factory_data("data"),
        "eval_dataset": _factory_data("eval_data"),
        "template": rules.template,
        "lora_target": _factory_targets,
        "additional_target": rules.words("modules_to_save"),
        **each("add_tokens add_special_tokens", rules.words("new_tokens")),
        "quantization_bit": _factory_bits,
        "pissa_init": _factory_pissa,
        "loraplus_lr_embedding": _factory_loraplus_embedding,
        "adapter_name_or_path": rules.to("from_adapter"),
        "overwrite_output_dir": no_counterpart("pass --overwrite to replace the run in output_dir"),
        "optim": rules.optimizer,
        "lr_scheduler_type": rules.scheduler,
        "val_size": rules.fraction_held_out,
        "disable_gradient_checkpointing": rules.by_value("recompute", {False: "layers"}),
        "max_samples": no_counterpart("all rows are used; for a Hub data set, write a slice such as :train[:1000]"),
        "train_on_prompt": no_counterpart(rules.PROMPTS),
        "mask_history": no_counterpart("all assistant turns are trained; set weight 0 in the data to exclude turns"),
        "report_to": rules.trackers,
        "ray_*": no_counterpart("call lorakit.train.run in Ray's workers, as examples/ray_train.py does"),
        "push_to_hub": no_counterpart(rules.UPLOAD),
        **each("use_swanlab swanlab_*", no_counterpart("lorakit does not support SwanLab")),
        "neftune_noise_alpha": no_counterpart("NEFTune is not available"),
        **each("use_galore use_apollo use_badam use_llama_pro", rules.rejected(rules.OTHER_METHOD)),
        "cache_dir": no_counterpart("set the environment variable HF_HOME"),
        "rope_scaling": no_counterpart("the model's own rotary embedding is used"),
        "streaming": no_counterpart("rows are read from files on demand"),
        "enable_thinking": no_counterpart("set chat_template_kwargs in the rows"),
        **each(
            "do_predict dataset_dir quantization_method quantization_type quantization_device_map pissa_iter "
            "pissa_convert load_best_model_at_end packing neat_packing flash_attn enable_liger_kernel use_unsloth "
            "use_unsloth_gc overwrite_cache preprocessing_num_workers preprocessing_batch_size dataloader_num_workers "
            "per_device_eval_batch_size plot_loss run_name save_only_model",
            nothing,
        ),
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
