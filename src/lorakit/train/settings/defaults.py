"""The training settings: one entry with the name, type, range, default, help and conflicts of each.

The flags of `lorakit train`, `TrainSettings`, which checks values, the keys of YAML files and of `run.json`, and the
fields that `LoraConfig` receives are made from these entries. `LoraConfig` keeps PEFT's defaults, which suit code
written for PEFT. This module imports neither pydantic nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lorakit.choices import (
    FORMATS,
    STORED,
    TAG_SCHEMES,
    TASK_NAMES,
    TRACKERS,
    BaseMatmul,
    Bias,
    Dtype,
    LabelType,
    Optimizer,
    Overlong,
    Recompute,
    Stored,
    TagScheme,
    TaskName,
)
from lorakit.train.settings.entry import Conflict, Setting
from lorakit.train.settings.types import (
    After,
    Allocation,
    Before,
    Names,
    NotEmpty,
    OnBadRow,
    Parallel,
    Part,
    Paths,
    Scheduler,
    Streaming,
    Text,
    columns_of,
    device_word,
    dtype_word,
    format_of,
    init_word,
    label_map_of,
    numbers_of,
    ranges_of,
    rates_of,
    size_of,
    targets_of,
    tokens_of,
    trackers_of,
    weights_of,
)

WARMUP_RATIO = 0.05
"""Value of `warmup_ratio` if neither it nor `warmup_steps` is given; both settings are None unless they are given."""

DECAY_RATIO = 0.2
"""Value of `decay_ratio` if it is not given, as in Hägele et al. 2024, arXiv:2405.18392."""


def _in_group(title: str) -> Callable[..., Any]:
    return partial(Setting, group=title)


OF_CONFIG = ("Adapter", "Other fields of LoraConfig")
"""Groups with fields of `LoraConfig`."""

_input = _in_group("Inputs and outputs")
_task = _in_group("Task")
_adapter, _field = map(_in_group, OF_CONFIG)
_optimizer = _in_group("Optimizer")
_length = _in_group("Length")
_machine = _in_group("Precision and machine")
_evaluation = _in_group("Evaluation and checkpoints")


class SettingFields:
    """The settings, in the order of `--help-all`; `TrainSettings` has them as checked fields."""

    model: Text | None = _input(
        "Model directory, GGUF file, Hub id, or smollm2 (the packaged model); may be omitted if --from-adapter names "
        "its base",
        ...,
        brief="Model directory, GGUF file, Hub id, or smollm2",
    )
    revision: Text | None = _input(
        "Branch, tag or commit of the base model, if it is on the Hub",
        None,
        "the usual default branch on the Hub",
        "main",
    )
    data: Paths = _input(
        "Training data: files (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .arrow), directories, glob patterns, or "
        "Hub data sets such as hf:owner/name:train",
        ...,
        brief="Files, directories, patterns or Hub data sets",
    )
    output_dir: Text = _input(
        "Run directory: run.json, metrics.jsonl, checkpoints, adapter",
        ...,
        brief="Run directory: records, checkpoints, adapter",
    )
    eval_data: Paths | None = _input(
        "Evaluation files", None, "a fraction of the training data is held out", "none", brief="Evaluation files"
    )
    eval_fraction: float | None = _input(
        "Fraction of rows (or of the end of a single document) to hold out if --eval-data is not given; rows are "
        "stratified by label",
        None,
        "enough to compare adapters; streamed data holds out 0.05",
        "0.05, or up to 0.2 of small data for 20 rows",
        ge=0,
        lt=1,
    )
    group: Text | None = _input(
        "Hold out whole groups of rows that have the same value in this column, such as a document or user id",
        None,
        "rows are independent; only rows with equal content stay together",
        "none",
        conflict=Conflict(
            "eval_data",
            lambda value: value is not None,
            "cannot be combined with eval_data, because no rows are held out; omit one of them.",
        ),
    )
    data_weights: Annotated[dict[str, float], Before(weights_of)] = _input(
        "Set how often the sequences of a source occur per epoch as NAME=WEIGHT, such as a.jsonl=2 b.jsonl=0.5; the "
        "names are those in --data",
        {},
        "every sequence occurs once",
        "1 for each source",
    )
    streaming: Streaming = _input(
        "Select whether training data is read while training: on (needs --max-steps), off, or auto (on for files of "
        "more than 1 GiB if --max-steps is given)",
        "auto",
        "smaller data is checked, counted and shuffled as a whole",
    )
    token_cache: bool = _input(
        "Keep tokenized data of more than 1 MiB, and the evaluation before training, in lorakit's cache directory for "
        "later runs",
        True,
        "tokenizing and evaluating take much longer than reading; at most 20 GiB are kept",
        "on",
        is_changeable=True,
    )
    format: Annotated[str, After(format_of)] | None = _input(
        f"Select the shape of the rows: {', '.join(FORMATS)}", None, "the shape is recognized by the columns", "auto"
    )
    columns: Annotated[dict[str, str], Before(columns_of)] = _input(
        "Map fields to columns as FIELD=COLUMN, such as prompt=question completion=answer",
        {},
        "columns with the usual names are recognized",
        "none",
        brief="Columns of the data as FIELD=COLUMN",
    )
    overlong: Overlong = _input(
        "Select what happens to rows with more than --max-length tokens: truncate, drop, split (into windows) or error",
        "truncate",
        "the beginning of a long answer is still worth learning; truncated rows are counted",
    )
    allow_missing_end: bool = _input(
        "Train even if no end marker contributes to the loss", False, "the model would not learn where to stop"
    )
    chat_template: Text | None = _input(
        "Chat template to use instead of the model's: chatml, gemma, llama3, plain or a Jinja file; it is saved with "
        "the adapter",
        None,
        "the model was trained with its own template",
        "none",
    )
    on_bad_row: OnBadRow = _input(
        "Select what happens if a row does not fit: stop, or skip (skipped rows are counted)",
        "stop",
        "an invalid row usually means that the file is damaged or was misread",
        is_changeable=True,
    )

    task: TaskName | None = _task(
        f"Select the task: {', '.join(TASK_NAMES)}",
        None,
        "the shape of the data and the model determine it",
        "auto",
        brief="causal-lm, classification, embedding, ...",
    )
    label_type: LabelType = _task(
        "Select what a label is: class, classes (any number per row), score (a number) or auto",
        "auto",
        "lists are classes, numbers with fractions are scores, everything else is a class",
    )
    label_map: Annotated[dict[str, str], Before(label_map_of)] = _task(
        "Rename labels of the data as NAME=NAME, such as Spam=spam 0=ham: the label in the data, and its name in the "
        "model; saved with the adapter",
        {},
        "labels must have the names that the model has",
        "none",
    )
    tag_scheme: TagScheme = _task(
        f"Select how tags mark the words of an entity: {', '.join(TAG_SCHEMES)} or auto; none compares single words",
        "auto",
        "the letters of the tags show the scheme",
    )

    from_adapter: Text | None = _adapter(
        "Train an existing adapter further: an adapter directory, a run directory, a checkpoint or a Hub id; the "
        "settings of the adapter, such as --r and --target-modules, are taken from it",
        None,
        "a run trains a new adapter",
        "none",
        brief="Adapter to train further",
    )
    from_optimizer: bool = _adapter(
        "Also continue with the optimizer state of the run that trained --from-adapter",
        False,
        "moments from other data would steer the first steps; needs the checkpoint at the adapter's step",
        conflict=Conflict(
            "from_adapter",
            lambda value: value is None,
            "requires from_adapter; pass --from-adapter, or omit --from-optimizer.",
        ),
    )
    r: int = _adapter(
        "Rank of the adapter",
        16,
        "enough to learn a new task from a few MB of data; above 32 rarely helps",
        brief="Rank of the adapter",
        ge=1,
    )
    lora_alpha: float = _adapter(
        "Numerator of the scale: the delta is (alpha / r) B A",
        32,
        "twice the default r, for the usual scale of 2",
        brief="Numerator of the scale alpha / r",
        gt=0,
    )
    lora_dropout: float = _adapter(
        "Dropout rate applied to the adapter's input",
        0.0,
        "dropout costs time and memory; try 0.05 for many epochs on little data",
        ge=0,
        lt=1,
    )
    target_modules: Annotated[str | list[str], NotEmpty(), Before(targets_of)] | None = _adapter(
        "Select modules to adapt: names, a regular expression, or all-linear",
        "all-linear",
        "adapting attention and MLP works better than adapting attention alone with the same number of parameters",
        brief="Modules to adapt",
    )
    new_tokens: Annotated[list[str], Before(tokens_of)] = _adapter(
        "Add tokens to the vocabulary, such as '<think>,</think>', and train only their rows in the embedding and the "
        "head; the tokenizer is saved with the adapter",
        [],
        "the base's vocabulary is sufficient for most tasks",
        "none",
        is_for_new=True,
    )
    use_dora: bool = _adapter(
        "Also train one magnitude per output (DoRA)", False, "slower, and rarely better at r = 16"
    )
    use_rslora: bool = _adapter("Scale by alpha / sqrt(r) (rsLoRA)", False, "matters only for ranks above 64")
    allow_partial_targets: bool = _adapter(
        "Continue if a name in --target-modules matches nothing", False, "such a name is usually a typo"
    )
    init_lora_weights: Annotated[str, After(init_word)] = _adapter(
        "Select how A and B are initialized: default, gaussian, pissa, olora, orthogonal or mica; or eva, corda or "
        "lora_ga, which use the first training rows",
        "default",
        "A is random and B is zero, as in PEFT; pissa, olora, corda and lora_ga keep a second copy of each adapted "
        "weight in memory, and their adapters are saved as LoRA with twice the rank",
        is_for_new=True,
    )
    allocate_ranks: Allocation = _adapter(
        "Select how ranks are allocated to modules within the parameter budget set by --r: none, gradients (GoRA) or "
        "inputs (EVA); the last two use the first training rows",
        "none",
        "with the same rank everywhere, the size of the adapter is predictable",
        conflict=Conflict(
            "init_lora_weights",
            lambda value: value == "eva",
            "cannot be combined with init_lora_weights eva, which allocates ranks itself; omit one of them.",
        ),
        is_for_new=True,
    )

    target_parameters: Names | None = _field(
        "Adapt parameters that are not the weight of a layer, such as mlp.experts.down_proj; without --target-modules, "
        "only these",
        None,
        "most models have none",
        "none",
    )
    exclude_modules: Annotated[str | list[str], Before(targets_of)] | None = _field(
        "Exclude modules from --target-modules: names or a regular expression", None, "the targets say it", "none"
    )
    modules_to_save: Names | None = _field(
        "Train these modules in full and save them with the adapter", None, "needed only for new heads", "none"
    )
    layers_to_transform: list[int] | None = _field(
        "Adapt only the layers with these numbers", None, "all layers are adapted", "none"
    )
    layers_pattern: Names | None = _field(
        "Name of the layer list that --layers-to-transform counts", None, "the usual names are recognized", "auto"
    )
    rank_pattern: Annotated[dict[str, int], Before(numbers_of)] = _field(
        "Ranks of individual modules as PATTERN=RANK, such as down_proj=32", {}, "--r applies", "none"
    )
    alpha_pattern: Annotated[dict[str, float], Before(numbers_of)] = _field(
        "Alphas of individual modules as PATTERN=ALPHA", {}, "--lora-alpha applies", "none"
    )
    bias: Bias = _field(
        "Train biases of the base too: none, all or lora_only",
        "none",
        "they change the base's output without the adapter",
    )
    lora_bias: bool = _field("Train a bias in each B", False, "rarely useful; some programs cannot load it")
    layer_replication: Annotated[list[list[int]], Before(ranges_of)] | None = _field(
        "Stack ranges of layers as FIRST:END, such as 0:16 8:24; replicas share the base weights",
        None,
        "the model keeps its depth",
        "none",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _field(
        "Train the embedding rows of existing tokens with these ids", None, "the embeddings are frozen", "none"
    )
    ensure_weight_tying: bool = _field(
        "Apply an adapter on one of two tied weights to both", False, "the output head is not adapted by default"
    )
    alora_invocation_tokens: list[int] | None = _field(
        "Ids of the tokens after which the adapter becomes active (aLoRA)", None, "LoRA is always active", "none"
    )
    use_bdlora: Part = _field("Settings of BD-LoRA as a JSON object", None, "A and B are dense", "none")
    kasa_config: Part = _field("Settings of KaSA as a JSON object", None, "the base keeps its weights", "none")
    use_qalora: bool = _field("Let A read means of groups of inputs (QA-LoRA)", False, "A reads each input")
    qalora_group_size: int = _field("Number of inputs per group in QA-LoRA", 16, "PEFT's value", ge=1)
    use_lora_xs: bool = _field(
        "Freeze A and B at singular directions of W, and train an r × r matrix between them (LoRA-XS)",
        False,
        "A and B are trained",
    )
    velora_config: Part = _field(
        "Settings of VeLoRA as a JSON object", None, "A's gradient is computed from the whole input", "none"
    )
    monteclora_config: Part = _field("Settings of MonteCLoRA as a JSON object", None, "A is not sampled", "none")
    eva_config: Part = _field(
        "Settings of the init eva as a JSON object", None, "PEFT's values", "none", is_for_new=True
    )
    corda_config: Part = _field(
        "Settings of the init corda as a JSON object", None, "PEFT's values", "none", is_for_new=True
    )
    lora_ga_config: Part = _field(
        "Settings of the init lora_ga as a JSON object", None, "PEFT's values", "none", is_for_new=True
    )

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
            lambda value: value == "lorafa",
            "cannot be combined with optimizer lorafa, which freezes A, so there is no ratio of learning rates; omit "
            "one of them.",
        ),
    )
    loraplus_lr_embedding: float | None = _optimizer(
        "Learning rate for embedding factors", None, "same as for other modules; PEFT's LoRA+ uses 1e-6", "none", gt=0
    )
    learning_rate_pattern: Annotated[dict[str, float], Before(rates_of)] = _optimizer(
        "Learning rates for individual modules as PATTERN=RATE, such as down_proj=1e-4; patterns work as in "
        "rank_pattern, and the first match applies",
        {},
        "one rate suits most modules",
        "none",
    )
    lr_scheduler_type: Scheduler = _optimizer(
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
        "none",
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
        "none",
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

    dtype: Annotated[Dtype, Before(dtype_word)] = _machine(
        "Precision of the base: auto, bfloat16, float16 or float32; adapter and optimizer are always float32",
        "auto",
        "selected by the 16-bit units of the device and, on a CPU with bf16 units, a two-second measurement",
    )
    quantization: Stored | None = _machine(
        f"Quantize linear layers: {', '.join(STORED)}; --dtype sets the compute dtype",
        None,
        "an unquantized base is exact; nf4 takes about a quarter of the memory of bf16 (QLoRA)",
        "none",
        brief="Quantize the base: nf4, int8, ...",
    )
    double_quantization: bool = _machine(
        "Also quantize the scales of nf4 and fp4", True, "saves 0.37 bits per parameter and adds almost no error", "on"
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
    device: Annotated[str, After(device_word)] = _machine(
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
    parallel: Parallel = _machine(
        "How several processes share a run: ddp (each has the whole base), fsdp (the frozen base is sharded over all), "
        "hsdp (over those of each machine), or auto (sharded only on a GPU, if it does not fit otherwise)",
        "auto",
        "gathering sharded weights takes time",
        is_changeable=True,
    )
    memory_budget: Annotated[str, After(size_of)] | None = _machine(
        "Memory limit for the planned peak, such as 4GiB; selects the fastest --recompute that should fit (--fit also "
        "selects the batch size, and measures)",
        None,
        "a step is fastest without recomputation",
        "none",
    )
    fit: Annotated[str, After(size_of)] | None = _machine(
        "Memory limit for the run, such as 8GB; selects the fastest --per-device-train-batch-size, "
        "--gradient-accumulation-steps and --recompute that fit, with the same number of rows per step",
        None,
        "the given batch size is used",
        "none",
    )
    accelerate: bool = _machine(
        "Use fused forward passes for supported layers, and pack sequences",
        True,
        "same results in less time and memory",
        "on",
    )
    tuning: bool = _machine(
        "Measure, once per machine, which kernels are fastest for the shapes in this run, and use those",
        True,
        "on some processors, splitting some matmuls doubles their speed; results agree within rounding error",
        "on",
    )

    eval_steps: int | None = _evaluation(
        "Evaluate every N steps",
        None,
        "ten evaluations show how the loss changes",
        "10% of the run",
        brief="Evaluate every N steps",
        is_changeable=True,
        ge=1,
    )
    save_steps: int | None = _evaluation(
        "Save a checkpoint every N steps",
        None,
        "limits how much work is lost in a crash",
        "same as --eval-steps",
        is_changeable=True,
        ge=1,
    )
    save_total_limit: int = _evaluation(
        "Keep at most N checkpoints; the best and the newest are always kept",
        2,
        "these two are enough",
        is_changeable=True,
        ge=1,
    )
    early_stopping_patience: int | None = _evaluation(
        "Stop after N evaluations without improvement",
        None,
        "the best step is kept in either case",
        "off",
        is_changeable=True,
        ge=1,
    )
    report_to: Annotated[list[str], Before(trackers_of)] = _evaluation(
        f"Report the settings and metrics to trackers too: {', '.join(TRACKERS)}",
        [],
        "metrics.jsonl has all metrics, and a tracker is another package",
        "none",
        is_changeable=True,
    )
    resume: bool = _evaluation(
        "Resume from the newest valid checkpoint in --output-dir, with the settings of that run",
        False,
        "a new run starts in a new directory",
        brief="Resume the run in --output-dir",
        is_changeable=True,
        conflict=Conflict("overwrite", bool, "and overwrite cannot be combined; omit one of them."),
    )
    overwrite: bool = _evaluation(
        "Replace the run in --output-dir", False, "no run is deleted by accident", is_changeable=True
    )


DEFAULTS: dict[str, Setting] = {
    name: entry for name, entry in vars(SettingFields).items() if isinstance(entry, Setting)
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
