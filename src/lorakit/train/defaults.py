"""The train defaults: one table of what each setting means, its default, and why that default.

`--help` prints it, `settings.py` takes its values from it, and nothing else holds a train default
(`LoraConfig` keeps PEFT's own: they suit code written for PEFT, not a person who gives no flag at all).
Knows nothing about how settings are checked or read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakit.plan.quantized import STORAGES


@dataclass(frozen=True)
class Default:
    """One row of the table.

    Attributes:
        meaning: What the setting does, as `--help` says it.
        value: Its default; `...` where one must be given, None where it is worked out from the rest.
        reason: Why that default, as `--help` says it; empty where a value must be given.
        shown: How the default is written in `--help`, where `str(value)` does not say it.
    """

    meaning: str
    value: Any
    reason: str = ""
    shown: str | None = None

    def help(self) -> str:
        """The line of `--help`: meaning, default and reason."""
        if self.value is ...:
            return f"{self.meaning}."
        plain = "off" if self.value is False else str(self.value)
        shown = self.shown if self.shown is not None else plain
        return f"{self.meaning}. Default {shown}: {self.reason}."


DEFAULTS: dict[str, Default] = {
    # what and where
    "model": Default("Model directory, hub id, or smollm2 (the packaged model)", ...),
    "data": Default("Training files: .txt, .md (documents) or .jsonl (text, prompt + completion, messages)", ...),
    "output_dir": Default("Folder of the run: run.json, metrics.jsonl, checkpoints, adapter", ...),
    "eval_data": Default("Files to evaluate on", None, "a share of the training documents is held out", "none"),
    "eval_fraction": Default(
        "Share of documents held out when no --eval-data is given", 0.05, "enough to see overfitting, little to lose"
    ),
    # the adapter
    "r": Default("Rank of the adapter", 16, "room for a new task in a file of a few MB; beyond 32 seldom helps"),
    "lora_alpha": Default("Scale numerator: the delta is alpha / r times B A", 32, "2 r, the usual scale of 2"),
    "lora_dropout": Default(
        "Dropout on the adapter's input",
        0.0,
        "dropout costs time and memory at every site, and the best step by held-out loss is kept anyway; "
        "try 0.05 for many epochs over few documents",
    ),
    "target_modules": Default(
        "Which modules get an adapter: names, a regular expression, or all-linear",
        "all-linear",
        "attention and MLP together learn more than attention alone at the same number of parameters",
    ),
    "new_tokens": Default(
        "Tokens to add to the vocabulary, such as '<think>,</think>': their rows of the embedding and the head are "
        "trained, and no others; the tokenizer is saved with the adapter",
        [],
        "the base's vocabulary is enough for most tasks",
        "none",
    ),
    "use_dora": Default("Train a magnitude per output as well (DoRA)", False, "slower, and seldom better at r 16"),
    "use_rslora": Default("Scale by alpha / sqrt(r)", False, "it matters for ranks above 64"),
    "allow_partial_targets": Default(
        "Go on when a name in --target-modules matches nothing", False, "a name that matches nothing is mostly a typo"
    ),
    "init_lora_weights": Default(
        "How the adapter begins: default, gaussian, pissa, olora, orthogonal, mica, or, from the first training rows, "
        "eva, corda, lora_ga",
        "default",
        "A random and B zero, as the field does it; pissa, olora, corda and lora_ga keep a second copy of each adapted "
        "weight in memory, and are saved as plain LoRA of twice the rank",
    ),
    "allocate_ranks": Default(
        "Give each module a rank of its own, by gradients (GoRA) or by inputs (EVA) of the first training rows, within "
        "as many trained numbers as --r everywhere would have: none, gradients or inputs",
        "none",
        "the same rank everywhere is the adapter that others can reckon with",
    ),
    # the optimizer
    "optimizer": Default(
        "adamw, or lorafa: A is frozen and B's gradient corrected for it (LoRA-FA)",
        "adamw",
        "lorafa keeps no input for A's gradient, which saves memory, and learns a little less",
    ),
    "learning_rate": Default(
        "Peak learning rate",
        3e-4,
        "about ten times what full fine-tuning takes, as the field uses it at alpha = 2 r",
        "3e-4",
    ),
    "loraplus_lr_ratio": Default(
        "Learning rate of B over that of A (LoRA+)", None, "1: A and B learn at one rate; LoRA+ takes 4 to 16", "none"
    ),
    "loraplus_lr_embedding": Default(
        "Learning rate of the factors of embeddings", None, "the same as elsewhere; PEFT's LoRA+ takes 1e-6", "none"
    ),
    "learning_rate_pattern": Default(
        "Learning rates of single modules as PATTERN=RATE, such as down_proj=1e-4; a pattern is read as in "
        "rank_pattern, the first that fits wins",
        {},
        "one rate suits all modules mostly",
        "none",
    ),
    "lr_scheduler_type": Default(
        "Course of the learning rate after the warm-up: cosine, linear or constant",
        "cosine",
        "ends near zero, so that the last steps settle",
    ),
    "warmup_ratio": Default(
        "Share of the steps over which the rate rises from zero", 0.05, "Adam's first estimates are rough"
    ),
    "weight_decay": Default("AdamW weight decay of A and B", 0.0, "the low rank already limits the delta"),
    "max_grad_norm": Default("Clip the gradient to this norm; 0 clips nothing", 1.0, "one odd batch cannot undo a run"),
    # how long
    "max_steps": Default("Stop after so many optimizer steps", None, "--num-train-epochs decides", "none"),
    "num_train_epochs": Default(
        "Passes over the data", 3.0, "the best step by held-out loss is kept: a pass too many costs time, not quality"
    ),
    "per_device_train_batch_size": Default("Rows of a batch", 4, "fits a small machine at 512 tokens a row"),
    "gradient_accumulation_steps": Default(
        "Batches of one optimizer step", 1, "more steps learn faster from little data than larger ones"
    ),
    "max_length": Default(
        "Longest row in tokens; longer text is cut into consecutive windows, none lost",
        512,
        "a page of text; memory and the cost of attention grow with it",
    ),
    # numbers and machine
    "dtype": Default(
        "Precision of the base: auto, bfloat16 or float32; adapter and optimizer are always float32",
        "auto",
        "a calibration of two seconds picks the faster one on this machine",
    ),
    "quantization": Default(
        f"Store the base's linear layers in fewer bits: {', '.join(storage.name for storage in STORAGES)}; --dtype is "
        "then that of the products and of all that is not stored so",
        None,
        "the base stays as exact as it is; nf4 takes about a quarter of the memory of bf16 (QLoRA)",
        "none",
    ),
    "double_quantization": Default(
        "Quantise the scales of nf4 and fp4 as well",
        True,
        "0.37 bits a number less for next to no error",
        "on",
    ),
    "seed": Default("Seed of everything random: A, dropout, order of the data, split", 0, "the same run twice"),
    "device": Default("cpu, cuda, cuda:N, mps or auto", "auto", "the accelerator where there is one"),
    "recompute": Default(
        "What the backward pass computes again instead of keeping it: none, feed-forward (what gate and up gave) or "
        "layers (all but their inputs)",
        "none",
        "feed-forward saves about half of what layers keep, layers nearly all of it, for about a third more time",
    ),
    "gradient_checkpointing": Default(
        "The same as --recompute layers", False, "it saves memory for about a third more time"
    ),
    "memory_budget": Default(
        "Memory that a step may take, weights and all, such as 4GiB: --recompute is then the cheapest that is planned "
        "to fit, and said",
        None,
        "what is kept costs no time",
        "none",
    ),
    "accelerate": Default(
        "Run the parts of the model that are known by faster forwards with the same numbers, rows without padding",
        True,
        "the same result sooner and in less memory; what is not known runs as it is",
        "on",
    ),
    "tuning": Default(
        "Measure which way is faster for the shapes of this run, once on a machine, and go that way",
        True,
        "some processors multiply some shapes at half speed with all rows at once; the numbers agree within roundings",
        "on",
    ),
    # evaluating and keeping
    "eval_steps": Default("Evaluate every so many steps", None, "ten evaluations show the curve", "a tenth of the run"),
    "save_steps": Default(
        "Save a checkpoint every so many steps", None, "a crash then costs at most that much", "as --eval-steps"
    ),
    "save_total_limit": Default(
        "Keep so many checkpoints; the best and the newest are always kept", 2, "the best and the newest"
    ),
    "early_stopping_patience": Default(
        "Stop after so many evaluations without a better one", None, "the best is kept either way", "off"
    ),
    "resume": Default(
        "Go on from the newest good checkpoint of --output-dir, with the settings of that run",
        False,
        "a new run is a new folder",
    ),
    "overwrite": Default("Replace the run that --output-dir holds", False, "nothing is lost by accident"),
}

CHANGEABLE_ON_RESUME = frozenset(
    {"eval_steps", "save_steps", "save_total_limit", "early_stopping_patience", "max_steps", "resume", "overwrite"}
)
"""What may differ when a run goes on; anything else would make it another run, and is refused by name."""
