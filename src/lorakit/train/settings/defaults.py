"""The training settings: one entry with the name, type, range, default, help and conflicts of each.

The flags of `lorakit train`, `TrainSettings`, which checks values, the keys of YAML files and of `run.json`, and the
fields that `LoraConfig` receives are made from these entries. `LoraConfig` keeps PEFT's defaults, which suit code
written for PEFT. This module imports neither pydantic nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lorakit.choices import STORED, TRACKERS, BaseMatmul, Optimizer, Recompute, Stored
from lorakit.train.settings import types
from lorakit.train.settings.data_and_adapter import DataAndAdapter, in_group
from lorakit.train.settings.types import Conflict, Setting

WARMUP_RATIO = 0.05
"""Value of `warmup_ratio` if neither it nor `warmup_steps` is given; both settings are None unless they are given."""

DECAY_RATIO = 0.2
"""Value of `decay_ratio` if it is not given, as in Hägele et al. 2024, arXiv:2405.18392."""


def _freezes_a_factor(optimizer: Optimizer) -> bool:
    from lorakit.plan.optimizer_state import OPTIMIZERS  # only if the ratio is given: 0.1 s

    return OPTIMIZERS[optimizer].freezes_factor


_optimizer = in_group("Optimizer")
_length = in_group("Length")
_machine = in_group("Precision and machine")
_evaluation = in_group("Evaluation and checkpoints")


class SettingFields(DataAndAdapter):
    """The settings, in the order of `--help-all`; `TrainSettings` has them as checked fields."""

    optimizer: Optimizer = _optimizer(
        "Select the optimizer: adamw; adamw8bit, with 8-bit state (bitsandbytes); lorafa, which freezes A and "
        "corrects B's gradient accordingly (LoRA-FA); or muon, which orthogonalizes the updates of A and B",
        "adamw",
        "lorafa saves memory, because only A's gradient needs the layer input, but learns slightly less",
    )
    learning_rate: float = _optimizer(
        "Peak learning rate",
        3e-4,
        "ten times that of full fine-tuning, as is typical for LoRA with alpha = 2r",
        "3e-4",
        brief="Peak learning rate",
        alias="lr",
        gt=0,
    )
    loraplus_lr_ratio: float | None = _optimizer(
        "Ratio of B's learning rate to A's (LoRA+)",
        None,
        "A and B share one rate; LoRA+ uses 4 to 16",
        "1",
        gt=0,
        conflict=Conflict(
            "optimizer",
            _freezes_a_factor,
            "cannot be combined with optimizer {value}, which freezes A, so there is no ratio of learning rates; omit "
            "one of them.",
        ),
    )
    loraplus_lr_embedding: float | None = _optimizer(
        "Learning rate for embedding factors", None, "same as for other modules; PEFT's LoRA+ uses 1e-6", gt=0
    )
    learning_rate_pattern: types.Rates = _optimizer(
        "Learning rates for individual modules as PATTERN=RATE, such as down_proj=1e-4; patterns work as in "
        "rank_pattern, and the first match applies",
        {},
        "one rate suits most modules",
    )
    lr_scheduler_type: types.Scheduler = _optimizer(
        "Learning rate schedule after the warm-up: cosine, linear, constant, or wsd (constant, then a decay)",
        "cosine",
        "the rate ends near zero",
    )
    warmup_ratio: float | None = _optimizer(
        "Fraction of the steps over which the learning rate rises",
        None,
        "Adam's early moment estimates are inaccurate",
        str(WARMUP_RATIO),
        ge=0,
        le=1,
    )
    warmup_steps: int | None = _optimizer(
        "Number of steps over which the learning rate rises, instead of --warmup-ratio",
        None,
        "a fraction suits runs of any length",
        ge=0,
        conflict=Conflict(
            "warmup_ratio",
            lambda value: value is not None,
            "and warmup_ratio both set the length of the warm-up; omit one of them.",
        ),
    )
    decay_ratio: float | None = _optimizer(
        "Fraction of the steps over which wsd decays",
        None,
        "with a decay of 20%, wsd reaches about the loss of cosine",
        str(DECAY_RATIO),
        gt=0,
        le=1,
        conflict=Conflict(
            "lr_scheduler_type",
            lambda value: value != "wsd",
            "applies only to lr_scheduler_type wsd, but lr_scheduler_type is {value}; omit decay_ratio, or use wsd.",
        ),
    )
    weight_decay: float = _optimizer(
        "AdamW weight decay for A and B", 0.0, "the low rank already limits the delta", ge=0
    )
    max_grad_norm: float = _optimizer(
        "Clip the gradient to this norm; 0 disables clipping",
        1.0,
        "keeps a single unusual batch from ruining a run",
        ge=0,
    )

    max_steps: int | None = _length(
        "Stop after N optimizer steps",
        None,
        "--num-train-epochs sets the length",
        brief="Stop after N optimizer steps",
        is_changeable=True,
        ge=1,
    )
    num_train_epochs: float = _length(
        "Passes over the data",
        3.0,
        "the step with the lowest evaluation loss is kept, so an extra pass costs only time",
        brief="Passes over the data",
        alias="epochs",
        gt=0,
    )
    per_device_train_batch_size: int = _length(
        "Rows per batch",
        4,
        "fits on a small machine at 512 tokens per row",
        brief="Rows per batch",
        alias="batch_size",
        ge=1,
    )
    gradient_accumulation_steps: int = _length(
        "Batches per optimizer step",
        1,
        "with little data, many small steps learn faster than a few large ones",
        brief="Batches per optimizer step",
        ge=1,
    )
    max_length: int | None = _length(
        "Maximum sequence length in tokens (documents are split; chats and completions are truncated)",
        None,
        "99% of the rows fit, within the model's context and the memory; documents are split at 512",
        "by the data",
        brief="Maximum sequence length in tokens",
        ge=2,
    )

    dtype: types.Precision = _machine(
        "Precision of the base: auto, bfloat16, float16 or float32; adapter and optimizer are always float32",
        "auto",
        "selected by the 16-bit units of the device and, on a CPU with bf16 units, a two-second measurement",
    )
    quantization: Stored | None = _machine(
        f"Quantize linear layers: {', '.join(STORED)}; --dtype sets the compute dtype",
        None,
        "an unquantized base is exact; nf4 takes about a quarter of the memory of bf16 (QLoRA)",
        brief="Quantize the base: nf4, int8, ...",
    )
    double_quantization: bool = _machine(
        "Also quantize the scales of nf4 and fp4", True, "saves 0.37 bits per parameter and adds almost no error"
    )
    base_matmul: BaseMatmul = _machine(
        "Select how the frozen linear layers are multiplied: dtype (in --dtype), or int8 (W8A8: weights and inputs in "
        "int8, in both directions, which changes results slightly)",
        "dtype",
        "int8 is an approximation; on a CPU with VNNI or AMX it multiplies about twice as fast and halves the base",
        conflict=Conflict(
            "quantization",
            lambda value: value is not None,
            "int8 cannot be combined with quantization {value}, because both store the base's weights; omit one of "
            "them.",
        ),
    )
    int8_loss_bound: float = _machine(
        "With --base-matmul int8, stop before the first step if the rise of the loss on the calibration rows exceeds "
        "this bound, in nats per token, by two standard errors; a larger bound overrides the check",
        0.005,
        "differences between runs with other seeds are larger",
        ge=0,
    )
    keep_bf16_base: bool = _machine(
        "With --base-matmul int8, keep the base's original weights in memory too, and also evaluate the adapter on "
        "them after training",
        False,
        "the memory of the base is then one and a half times that of a bf16 base",
        conflict=Conflict(
            "base_matmul",
            lambda value: value == "dtype",
            "applies only to base_matmul int8; omit it, or pass --base-matmul int8.",
        ),
    )
    seed: int = _machine(
        "Seed for all randomness: initial A, dropout, data order and split",
        0,
        "makes runs reproducible",
        brief="Seed for all randomness",
        ge=0,
        lt=2**63,
    )
    device: types.Device = _machine(
        "Select the device: cpu, cuda, cuda:N, mps or auto", "auto", "an accelerator if available"
    )
    recompute: Recompute = _machine(
        "Recompute activations in the backward pass: none, feed-forward (the outputs of the gate and up projections) "
        "or layers (everything except the layers' inputs)",
        "none",
        "a step is fastest without recomputation; feed-forward saves about half of the activation memory; layers saves "
        "nearly all of it, but makes a step about a third longer",
    )
    gradient_checkpointing: bool = _machine(
        "Same as --recompute layers", False, "saves memory, but makes a step about a third longer"
    )
    parallel: types.Parallel = _machine(
        "How several processes share a run: ddp (each has the whole base), fsdp (the frozen base is sharded over all), "
        "hsdp (over those of each machine), or auto (sharded only on a GPU, if it does not fit otherwise)",
        "auto",
        "gathering sharded weights takes time",
        is_changeable=True,
    )
    memory_budget: types.Size | None = _machine(
        "Memory limit for the planned peak, such as 4GiB; selects the fastest --recompute that should fit (--fit also "
        "selects the batch size, and measures)",
        None,
        "a step is fastest without recomputation",
    )
    fit: types.Size | None = _machine(
        "Memory limit for the run, such as 8GB; selects the fastest --per-device-train-batch-size, "
        "--gradient-accumulation-steps and --recompute that fit, with the same number of rows per step",
        None,
        "the given batch size is used",
    )
    accelerate: bool = _machine(
        "Use fused forward passes for supported layers, and pack sequences",
        True,
        "same results in less time and memory",
    )
    tuning: bool = _machine(
        "Measure, once per machine, which kernels are fastest for the shapes in this run, and use those",
        True,
        "on some processors, splitting some matmuls doubles their speed; results agree within rounding error",
    )

    eval_steps: int | None = _evaluation(
        "Evaluate every N steps",
        None,
        "ten evaluations show how the loss changes",
        "10% of the run",
        brief="Evaluate every N steps",
        ge=1,
        is_changeable=True,
    )
    save_steps: int | None = _evaluation(
        "Save a checkpoint every N steps",
        None,
        "limits how much work is lost in a crash",
        "same as --eval-steps",
        ge=1,
        is_changeable=True,
    )
    save_total_limit: int = _evaluation(
        "Keep at most N checkpoints; the best and the newest are always kept",
        2,
        "these two are enough",
        ge=1,
        is_changeable=True,
    )
    early_stopping_patience: int | None = _evaluation(
        "Stop after N evaluations without improvement",
        None,
        "the best step is kept in either case",
        "off",
        ge=1,
        is_changeable=True,
    )
    report_to: types.TrackerNames = _evaluation(
        f"Report the settings and metrics to trackers too: {', '.join(TRACKERS)}",
        [],
        "metrics.jsonl has all metrics, and a tracker is another package",
        is_changeable=True,
    )
    resume: bool = _evaluation(
        "Resume from the newest valid checkpoint in --output-dir, with the settings of that run",
        False,
        "a new run starts in a new directory",
        brief="Resume the run in --output-dir",
        conflict=Conflict("overwrite", bool, "and overwrite cannot be combined; omit one of them."),
        is_changeable=True,
    )
    overwrite: bool = _evaluation(
        "Replace the run in --output-dir", False, "no run is deleted by accident", is_changeable=True
    )


DEFAULTS: dict[str, Setting] = {
    name: entry
    for part in (DataAndAdapter, SettingFields)
    for name, entry in vars(part).items()
    if isinstance(entry, Setting)
}
"""Name of a setting -> its entry, in the order of `--help-all`."""

ALIASES = {entry.alias: name for name, entry in DEFAULTS.items() if entry.alias}
"""Short name -> name of the setting; both are flags and settings."""


@cache
def types_of_settings() -> Mapping[str, Any]:
    """Return a dict from the name of each setting to its type."""
    return get_type_hints(SettingFields, include_extras=True)


def choices_of(name: str) -> tuple[str, ...]:
    """Return the allowed values of a setting, or an empty tuple if the setting has no fixed set of values."""
    parts = [types_of_settings()[name]] if name in DEFAULTS else []
    while parts:  # a `Literal` can be inside a union
        part = parts.pop()
        if get_origin(part) is Literal:
            return get_args(part)
        parts += get_args(part)
    return ()


def flag_type(annotation: Any) -> Any:
    """Return the type of the flag of a setting: lists stand for tables too, and text for names and JSON objects."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return flag_type(parts[0])
    if origin is Literal or annotation == dict[str, Any]:
        return str
    if origin in (list, dict):
        return list[int] if parts == (int,) else list[str]
    kinds = [flag_type(part) for part in parts if part is not NoneType]  # of a union
    return next((kind for kind in kinds if get_origin(kind) is list), kinds[0]) if kinds else annotation
