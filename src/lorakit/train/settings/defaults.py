"""Training defaults: one table with the meaning of each setting, its default, and the reason for the default.

`--help` prints its most used rows and `--help-all` all of them, and `settings.py` takes its defaults from it; no other
module defines training defaults.
`LoraConfig` keeps PEFT's defaults, which suit code written for PEFT. This module neither checks nor reads settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Stored = Literal["nf4", "fp4", "int8", "int8-torchao", "hqq4", "hqq8"]
"""Names in `lorakit.plan.quantized.STORAGES`, repeated here because reading settings must not import that module."""

FORMATS = (
    *("text", "prompt-completion", "messages", "alpaca", "sharegpt", "question-answer"),
    *("classification", "text-pair", "token-classification", "source-target"),
)
"""Names of the shapes in `lorakit.data.shapes` that training supports, repeated here for the same reason."""

WARMUP_RATIO = 0.05
"""Value of `warmup_ratio` if neither it nor `warmup_steps` is given; both settings are None unless they are given."""

DECAY_RATIO = 0.2
"""Value of `decay_ratio` if it is not given, as in Hägele et al. 2024, arXiv:2405.18392."""

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
"""Names of the trackers in `lorakit.train.files.trackers`, repeated here because that module imports torch."""


TASK_NAMES = ("causal-lm", "classification", "token-classification", "seq2seq", "embedding")
"""Names of the tasks in `lorakit.tasks.TASKS`, repeated here for the same reason."""

TAG_SCHEMES = ("BIO", "IOB1", "IOE", "BIOES", "BILOU", "BMES", "IO", "none")
"""Names of the tag schemes, the keys of `lorakit.tasks.spans.SCHEMES`, for the same reason."""


@dataclass(frozen=True)
class Default:
    """A training setting: its meaning, its default, and the reason for the default.

    Attributes:
        meaning: What the setting does, as shown in `--help-all`.
        value: The default; `...` if the setting is required, None if it is off or depends on other settings.
        reason: Reason for the default, as shown in `--help-all`; empty if the setting is required.
        shown: Text that stands for the default; None means `str(value)`, or "off" for False.
        flag: Type of the flag, if it differs from the type of `value`.
        brief: The meaning in a few words, for the settings that people change most; `--help` shows only these.
        group: Title of the group that the setting belongs to.
    """

    meaning: str
    value: Any
    reason: str = ""
    shown: str | None = None
    flag: type | None = None
    brief: str = ""
    group: str = ""

    @property
    def default(self) -> str:
        """The text that stands for the default."""
        return self.shown if self.shown is not None else "off" if self.value is False else str(self.value)

    def help(self) -> str:
        """Return the help text of the setting: its meaning, its default and the reason for the default."""
        if self.value is ...:
            return f"{self.meaning}."
        return f"{self.meaning}. Default {self.default}: {self.reason}."


_INPUTS: dict[str, Default] = {
    "model": Default(
        "Model directory, GGUF file, Hub id, or smollm2 (the packaged model); may be omitted if --from-adapter names "
        "its base",
        ...,
        flag=str,
        brief="Model directory, GGUF file, Hub id, or smollm2",
    ),
    "revision": Default(
        "Branch, tag or commit of the base model, if it is on the Hub",
        None,
        "the usual default branch on the Hub",
        "main",
        str,
    ),
    "data": Default(
        "Training data: files (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .arrow), directories, glob patterns, or "
        "Hub data sets such as hf:owner/name:train",
        ...,
        flag=list[str],
        brief="Files, directories, patterns or Hub data sets",
    ),
    "output_dir": Default(
        "Run directory: run.json, metrics.jsonl, checkpoints, adapter",
        ...,
        flag=str,
        brief="Run directory: records, checkpoints, adapter",
    ),
    "eval_data": Default(
        "Evaluation files",
        None,
        "a fraction of the training data is held out",
        "none",
        list[str],
        brief="Evaluation files",
    ),
    "eval_fraction": Default(
        "Fraction of rows (or of the end of a single document) to hold out if --eval-data is not given; rows are "
        "stratified by label",
        None,
        "enough to compare adapters; streamed data holds out 0.05",
        "0.05, or up to 0.2 of small data for 20 rows",
        float,
    ),
    "group": Default(
        "Hold out whole groups of rows that have the same value in this column, such as a document or user id",
        None,
        "rows are independent; only rows with equal content stay together",
        "none",
        str,
    ),
    "data_weights": Default(
        "Set how often the sequences of a source occur per epoch as NAME=WEIGHT, such as a.jsonl=2 b.jsonl=0.5; the "
        "names are those in --data",
        {},
        "every sequence occurs once",
        "1 for each source",
        list[str],
    ),
    "streaming": Default(
        "Select whether training data is read while training: on (needs --max-steps), off, or auto (on for files of "
        "more than 1 GiB if --max-steps is given)",
        "auto",
        "smaller data is checked, counted and shuffled as a whole",
    ),
    "token_cache": Default(
        "Keep tokenized data of more than 1 MiB, and the evaluation before training, in lorakit's cache directory for "
        "later runs",
        True,
        "tokenizing and evaluating take much longer than reading; at most 20 GiB are kept",
        "on",
    ),
    "format": Default(
        f"Select the shape of the rows: {', '.join(FORMATS)}",
        None,
        "the shape is recognized by the columns",
        "auto",
        str,
    ),
    "columns": Default(
        "Map fields to columns as FIELD=COLUMN, such as prompt=question completion=answer",
        {},
        "columns with the usual names are recognized",
        "none",
        list[str],
        brief="Columns of the data as FIELD=COLUMN",
    ),
    "overlong": Default(
        "Select what happens to rows with more than --max-length tokens: truncate, drop, split (into windows) or error",
        "truncate",
        "the beginning of a long answer is still worth learning; truncated rows are counted",
    ),
    "allow_missing_end": Default(
        "Train even if no end marker contributes to the loss", False, "the model would not learn where to stop"
    ),
    "chat_template": Default(
        "Chat template to use instead of the model's: chatml, gemma, llama3, plain or a Jinja file; it is saved with "
        "the adapter",
        None,
        "the model was trained with its own template",
        "none",
        str,
    ),
    "on_bad_row": Default(
        "Select what happens if a row does not fit: stop, or skip (skipped rows are counted)",
        "stop",
        "an invalid row usually means that the file is damaged or was misread",
    ),
}

_TASK: dict[str, Default] = {
    "task": Default(
        f"Select the task: {', '.join(TASK_NAMES)}",
        None,
        "the shape of the data and the model determine it",
        "auto",
        str,
        brief="causal-lm, classification, embedding, ...",
    ),
    "label_type": Default(
        "Select what a label is: class, classes (any number per row), score (a number) or auto",
        "auto",
        "lists are classes, numbers with fractions are scores, everything else is a class",
    ),
    "label_map": Default(
        "Rename labels of the data as NAME=NAME, such as Spam=spam 0=ham: the label in the data, and its name in the "
        "model; saved with the adapter",
        {},
        "labels must have the names that the model has",
        "none",
        list[str],
    ),
    "tag_scheme": Default(
        f"Select how tags mark the words of an entity: {', '.join(TAG_SCHEMES)} or auto; none compares single words",
        "auto",
        "the letters of the tags show the scheme",
    ),
}

_ADAPTER: dict[str, Default] = {
    "from_adapter": Default(
        "Train an existing adapter further: an adapter directory, a run directory, a checkpoint or a Hub id; the "
        "settings of the adapter, such as --r and --target-modules, are taken from it",
        None,
        "a run trains a new adapter",
        "none",
        str,
        brief="Adapter to train further",
    ),
    "from_optimizer": Default(
        "Also continue with the optimizer state of the run that trained --from-adapter",
        False,
        "moments from other data would steer the first steps; needs the checkpoint at the adapter's step",
    ),
    "r": Default(
        "Rank of the adapter",
        16,
        "enough to learn a new task from a few MB of data; above 32 rarely helps",
        brief="Rank of the adapter",
    ),
    "lora_alpha": Default(
        "Numerator of the scale: the delta is (alpha / r) B A",
        32,
        "twice the default r, for the usual scale of 2",
        flag=float,
        brief="Numerator of the scale alpha / r",
    ),
    "lora_dropout": Default(
        "Dropout rate applied to the adapter's input",
        0.0,
        "dropout costs time and memory; try 0.05 for many epochs on little data",
    ),
    "target_modules": Default(
        "Select modules to adapt: names, a regular expression, or all-linear",
        "all-linear",
        "adapting attention and MLP works better than adapting attention alone with the same number of parameters",
        flag=list[str],
        brief="Modules to adapt",
    ),
    "new_tokens": Default(
        "Add tokens to the vocabulary, such as '<think>,</think>', and train only their rows in the embedding and the "
        "head; the tokenizer is saved with the adapter",
        [],
        "the base's vocabulary is sufficient for most tasks",
        "none",
        list[str],
    ),
    "use_dora": Default("Also train one magnitude per output (DoRA)", False, "slower, and rarely better at r = 16"),
    "use_rslora": Default("Scale by alpha / sqrt(r) (rsLoRA)", False, "matters only for ranks above 64"),
    "allow_partial_targets": Default(
        "Continue if a name in --target-modules matches nothing", False, "such a name is usually a typo"
    ),
    "init_lora_weights": Default(
        "Select how A and B are initialized: default, gaussian, pissa, olora, orthogonal or mica; or eva, corda or "
        "lora_ga, which use the first training rows",
        "default",
        "A is random and B is zero, as in PEFT; pissa, olora, corda and lora_ga keep a second copy of each adapted "
        "weight in memory, and their adapters are saved as LoRA with twice the rank",
    ),
    "allocate_ranks": Default(
        "Select how ranks are allocated to modules within the parameter budget set by --r: none, gradients (GoRA) or "
        "inputs (EVA); the last two use the first training rows",
        "none",
        "with the same rank everywhere, the size of the adapter is predictable",
    ),
}

_FIELDS: dict[str, Default] = {
    "target_parameters": Default(
        "Adapt parameters that are not the weight of a layer, such as mlp.experts.down_proj; without --target-modules, "
        "only these",
        None,
        "most models have none",
        "none",
        list[str],
    ),
    "exclude_modules": Default(
        "Exclude modules from --target-modules: names or a regular expression",
        None,
        "the targets say it",
        "none",
        list[str],
    ),
    "modules_to_save": Default(
        "Train these modules in full and save them with the adapter",
        None,
        "needed only for new heads",
        "none",
        list[str],
    ),
    "layers_to_transform": Default(
        "Adapt only the layers with these numbers", None, "all layers are adapted", "none", list[int]
    ),
    "layers_pattern": Default(
        "Name of the layer list that --layers-to-transform counts",
        None,
        "the usual names are recognized",
        "auto",
        list[str],
    ),
    "rank_pattern": Default(
        "Ranks of individual modules as PATTERN=RANK, such as down_proj=32", {}, "--r applies", "none", list[str]
    ),
    "alpha_pattern": Default(
        "Alphas of individual modules as PATTERN=ALPHA", {}, "--lora-alpha applies", "none", list[str]
    ),
    "bias": Default(
        "Train biases of the base too: none, all or lora_only",
        "none",
        "they change the base's output without the adapter",
    ),
    "lora_bias": Default("Train a bias in each B", False, "rarely useful; some programs cannot load it"),
    "layer_replication": Default(
        "Stack ranges of layers as FIRST:END, such as 0:16 8:24; replicas share the base weights",
        None,
        "the model keeps its depth",
        "none",
        list[str],
    ),
    "trainable_token_indices": Default(
        "Train the embedding rows of existing tokens with these ids",
        None,
        "the embeddings are frozen",
        "none",
        list[int],
    ),
    "ensure_weight_tying": Default(
        "Apply an adapter on one of two tied weights to both", False, "the output head is not adapted by default"
    ),
    "alora_invocation_tokens": Default(
        "Ids of the tokens after which the adapter becomes active (aLoRA)",
        None,
        "LoRA is always active",
        "none",
        list[int],
    ),
    "use_bdlora": Default("Settings of BD-LoRA as a JSON object", None, "A and B are dense", "none", str),
    "kasa_config": Default("Settings of KaSA as a JSON object", None, "the base keeps its weights", "none", str),
    "use_qalora": Default("Let A read means of groups of inputs (QA-LoRA)", False, "A reads each input"),
    "qalora_group_size": Default("Number of inputs per group in QA-LoRA", 16, "PEFT's value"),
    "velora_config": Default(
        "Settings of VeLoRA as a JSON object", None, "A's gradient is computed from the whole input", "none", str
    ),
    "monteclora_config": Default("Settings of MonteCLoRA as a JSON object", None, "A is not sampled", "none", str),
    "eva_config": Default("Settings of the init eva as a JSON object", None, "PEFT's values", "none", str),
    "corda_config": Default("Settings of the init corda as a JSON object", None, "PEFT's values", "none", str),
    "lora_ga_config": Default("Settings of the init lora_ga as a JSON object", None, "PEFT's values", "none", str),
}

_OPTIMIZER: dict[str, Default] = {
    "optimizer": Default(
        "Select the optimizer: adamw; adamw8bit, with 8-bit state (bitsandbytes); lorafa, which freezes A and "
        "corrects B's gradient accordingly (LoRA-FA); or muon, which orthogonalizes the updates of A and B",
        "adamw",
        "lorafa saves memory, because only A's gradient needs the layer input, but learns slightly less",
    ),
    "learning_rate": Default(
        "Peak learning rate",
        3e-4,
        "ten times that of full fine-tuning, as is typical for LoRA with alpha = 2r",
        "3e-4",
        brief="Peak learning rate",
    ),
    "loraplus_lr_ratio": Default(
        "Ratio of B's learning rate to A's (LoRA+)", None, "A and B share one rate; LoRA+ uses 4 to 16", "1", float
    ),
    "loraplus_lr_embedding": Default(
        "Learning rate for embedding factors", None, "same as for other modules; PEFT's LoRA+ uses 1e-6", "none", float
    ),
    "learning_rate_pattern": Default(
        "Learning rates for individual modules as PATTERN=RATE, such as down_proj=1e-4; patterns work as in "
        "rank_pattern, and the first match applies",
        {},
        "one rate suits most modules",
        "none",
        list[str],
    ),
    "lr_scheduler_type": Default(
        "Learning rate schedule after the warm-up: cosine, linear, constant, or wsd (constant, then a decay)",
        "cosine",
        "the rate ends near zero",
    ),
    "warmup_ratio": Default(
        "Fraction of the steps over which the learning rate rises",
        None,
        "Adam's early moment estimates are inaccurate",
        str(WARMUP_RATIO),
        float,
    ),
    "warmup_steps": Default(
        "Number of steps over which the learning rate rises, instead of --warmup-ratio",
        None,
        "a fraction suits runs of any length",
        "none",
        int,
    ),
    "decay_ratio": Default(
        "Fraction of the steps over which wsd decays",
        None,
        "with a decay of 20%, wsd reaches about the loss of cosine",
        str(DECAY_RATIO),
        float,
    ),
    "weight_decay": Default("AdamW weight decay for A and B", 0.0, "the low rank already limits the delta"),
    "max_grad_norm": Default(
        "Clip the gradient to this norm; 0 disables clipping", 1.0, "keeps a single unusual batch from ruining a run"
    ),
}

_LENGTH: dict[str, Default] = {
    "max_steps": Default(
        "Stop after N optimizer steps",
        None,
        "--num-train-epochs sets the length",
        "none",
        int,
        brief="Stop after N optimizer steps",
    ),
    "num_train_epochs": Default(
        "Passes over the data",
        3.0,
        "the step with the lowest evaluation loss is kept, so an extra pass costs only time",
        brief="Passes over the data",
    ),
    "per_device_train_batch_size": Default(
        "Rows per batch",
        4,
        "fits on a small machine at 512 tokens per row",
        brief="Rows per batch",
    ),
    "gradient_accumulation_steps": Default(
        "Batches per optimizer step",
        1,
        "with little data, many small steps learn faster than a few large ones",
        brief="Batches per optimizer step",
    ),
    "max_length": Default(
        "Maximum sequence length in tokens (documents are split; chats and completions are truncated)",
        None,
        "99% of the rows fit, within the model's context and the memory; documents are split at 512",
        "by the data",
        int,
        brief="Maximum sequence length in tokens",
    ),
}

_MACHINE: dict[str, Default] = {
    "dtype": Default(
        "Precision of the base: auto, bfloat16, float16 or float32; adapter and optimizer are always float32",
        "auto",
        "selected by the 16-bit units of the device and, on a CPU with bf16 units, a two-second measurement",
    ),
    "quantization": Default(
        f"Quantize linear layers: {', '.join(get_args(Stored))}; --dtype sets the compute dtype",
        None,
        "an unquantized base is exact; nf4 takes about a quarter of the memory of bf16 (QLoRA)",
        "none",
        str,
        brief="Quantize the base: nf4, int8, ...",
    ),
    "double_quantization": Default(
        "Also quantize the scales of nf4 and fp4", True, "saves 0.37 bits per parameter and adds almost no error", "on"
    ),
    "base_matmul": Default(
        "Select how the frozen linear layers are multiplied: dtype (in --dtype), or int8 (W8A8: weights and inputs in "
        "int8, in both directions, which changes results slightly)",
        "dtype",
        "int8 is an approximation; on a CPU with VNNI or AMX it multiplies about twice as fast and halves the base",
    ),
    "int8_loss_bound": Default(
        "With --base-matmul int8, stop before the first step if the rise of the loss on the calibration rows exceeds "
        "this bound, in nats per token, by two standard errors; a larger bound overrides the check",
        0.005,
        "differences between runs with other seeds are larger",
    ),
    "keep_bf16_base": Default(
        "With --base-matmul int8, keep the base's original weights in memory too, and also evaluate the adapter on "
        "them after training",
        False,
        "the memory of the base is then one and a half times that of a bf16 base",
    ),
    "seed": Default(
        "Seed for all randomness: initial A, dropout, data order and split",
        0,
        "makes runs reproducible",
        brief="Seed for all randomness",
    ),
    "device": Default("Select the device: cpu, cuda, cuda:N, mps or auto", "auto", "an accelerator if available"),
    "recompute": Default(
        "Recompute activations in the backward pass: none, feed-forward (the outputs of the gate and up projections) "
        "or layers (everything except the layers' inputs)",
        "none",
        "a step is fastest without recomputation; feed-forward saves about half of the activation memory; layers saves "
        "nearly all of it, but makes a step about a third longer",
    ),
    "gradient_checkpointing": Default(
        "Same as --recompute layers", False, "saves memory, but makes a step about a third longer"
    ),
    "parallel": Default(
        "How several processes share a run: ddp (each has the whole base), fsdp (the frozen base is sharded over all), "
        "hsdp (over those of each machine), or auto (sharded only on a GPU, if it does not fit otherwise)",
        "auto",
        "gathering sharded weights takes time",
    ),
    "memory_budget": Default(
        "Memory limit for the planned peak, such as 4GiB; selects the fastest --recompute that should fit (--fit also "
        "selects the batch size, and measures)",
        None,
        "a step is fastest without recomputation",
        "none",
        str,
    ),
    "fit": Default(
        "Memory limit for the run, such as 8GB; selects the fastest --per-device-train-batch-size, "
        "--gradient-accumulation-steps and --recompute that fit, with the same number of rows per step",
        None,
        "the given batch size is used",
        "none",
        str,
    ),
    "accelerate": Default(
        "Use fused forward passes for supported layers, and pack sequences",
        True,
        "same results in less time and memory",
        "on",
    ),
    "tuning": Default(
        "Measure, once per machine, which kernels are fastest for the shapes in this run, and use those",
        True,
        "on some processors, splitting some matmuls doubles their speed; results agree within rounding error",
        "on",
    ),
}

_EVALUATION: dict[str, Default] = {
    "eval_steps": Default(
        "Evaluate every N steps",
        None,
        "ten evaluations show how the loss changes",
        "10% of the run",
        int,
        brief="Evaluate every N steps",
    ),
    "save_steps": Default(
        "Save a checkpoint every N steps", None, "limits how much work is lost in a crash", "same as --eval-steps", int
    ),
    "save_total_limit": Default(
        "Keep at most N checkpoints; the best and the newest are always kept", 2, "these two are enough"
    ),
    "early_stopping_patience": Default(
        "Stop after N evaluations without improvement", None, "the best step is kept in either case", "off", int
    ),
    "report_to": Default(
        f"Report the settings and metrics to trackers too: {', '.join(TRACKERS)}",
        [],
        "metrics.jsonl has all metrics, and a tracker is another package",
        "none",
        list[str],
    ),
    "resume": Default(
        "Resume from the newest valid checkpoint in --output-dir, with the settings of that run",
        False,
        "a new run starts in a new directory",
        brief="Resume the run in --output-dir",
    ),
    "overwrite": Default("Replace the run in --output-dir", False, "no run is deleted by accident"),
}

_GROUPS: dict[str, dict[str, Default]] = {
    "Inputs and outputs": _INPUTS,
    "Task": _TASK,
    "Adapter": _ADAPTER,
    "Other fields of LoraConfig": _FIELDS,
    "Optimizer": _OPTIMIZER,
    "Length": _LENGTH,
    "Precision and machine": _MACHINE,
    "Evaluation and checkpoints": _EVALUATION,
}

DEFAULTS: dict[str, Default] = {
    name: replace(row, group=group) for group, rows in _GROUPS.items() for name, row in rows.items()
}
"""Name of a setting -> its row, in the order of `--help-all`."""

CHANGEABLE_ON_RESUME = frozenset(
    {
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "early_stopping_patience",
        "max_steps",
        "on_bad_row",
        "parallel",
        "report_to",
        "resume",
        "overwrite",
        "token_cache",
    }
)
"""Settings that may change when a run is resumed; changing any other setting raises an error that names it."""

ALIASES = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
"""Short name -> name of the setting; both are flags and settings."""

NAMES_ELSEWHERE = {
    "adapter_name_or_path": "output_dir",
    "adapter_path": "output_dir",
    "additional_target": "modules_to_save",
    "base_model": "model",
    "base_model_name_or_path": "model",
    "bf16": "dtype",
    "cutoff_len": "max_length",
    "dataset": "data",
    "dataset_name": "data",
    "datasets": "data",
    "eval_dataset": "eval_data",
    "fp16": "dtype",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "grad_checkpoint": "gradient_checkpointing",
    "iters": "max_steps",
    "learning_rate_scheduler": "lr_scheduler_type",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "lora_modules_to_save": "modules_to_save",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lr_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "max_steps_per_epoch": "max_steps",
    "micro_batch_size": "per_device_train_batch_size",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_revision": "revision",
    "num_epochs": "num_train_epochs",
    "optim": "optimizer",
    "output": "output_dir",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_layer_replication": "layer_replication",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "per_device_batch_size": "per_device_train_batch_size",
    "quantization_bit": "quantization",
    "rank": "r",
    "save_every": "save_steps",
    "revision_of_model": "revision",
    "sequence_len": "max_length",
    "steps_per_eval": "eval_steps",
    "test_datasets": "eval_data",
    "train_file": "data",
    "val_set_size": "eval_fraction",
    "val_size": "eval_fraction",
}
"""Name of a setting in another tool (Axolotl, LLaMA-Factory, TRL, mlx-lm) -> name of the corresponding setting here."""

CONVERT_ADVICE = "`lorakit convert-config FILE` converts a settings file of Axolotl, LLaMA-Factory, mlx-lm or PEFT."
"""Advice for a name that another tool uses."""
