"""Convert settings files of other tools (Axolotl, LLaMA-Factory, mlx-lm, PEFT), and their names of settings."""

_NAMES = {
    "data": "dataset dataset_name datasets train_file",
    "dtype": "bf16 fp16",
    "eval_data": "eval_dataset test_datasets",
    "eval_fraction": "val_set_size val_size",
    "eval_steps": "steps_per_eval",
    "gradient_accumulation_steps": "grad_accum grad_accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "init_lora_weights": "peft_init_lora_weights",
    "layer_replication": "peft_layer_replication",
    "layers_to_transform": "peft_layers_to_transform",
    "lr_scheduler_type": "learning_rate_scheduler lr_scheduler",
    "max_length": "cutoff_len max_seq_length sequence_len",
    "max_steps": "iters max_steps_per_epoch",
    "model": "base_model base_model_name_or_path model_name model_name_or_path",
    "modules_to_save": "additional_target lora_modules_to_save",
    "num_train_epochs": "num_epochs",
    "optimizer": "optim",
    "output_dir": "adapter_name_or_path adapter_path output",
    "per_device_train_batch_size": "micro_batch_size per_device_batch_size",
    "quantization": "load_in_4bit load_in_8bit quantization_bit",
    "r": "lora_r lora_rank rank",
    "revision": "model_revision revision_of_model",
    "save_steps": "save_every",
    "target_modules": "lora_target lora_target_modules",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
}

NAMES_ELSEWHERE = {other: here for here, others in _NAMES.items() for other in others.split()}
"""Name of a setting in another tool (Axolotl, LLaMA-Factory, TRL, mlx-lm) -> name of the corresponding setting here."""

CONVERT_ADVICE = "`lorakit convert-config FILE` converts a settings file of Axolotl, LLaMA-Factory, mlx-lm or PEFT."
"""Advice for a name that another tool uses."""
