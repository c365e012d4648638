"""The training settings of the inputs and outputs, the task and the adapter; `defaults.py` adds the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lorakit.choices import FORMATS, TAG_SCHEMES, TASK_NAMES, Bias, LabelType, Overlong, TagScheme, TaskName
from lorakit.train.settings import types
from lorakit.train.settings.types import Conflict, Setting


def in_group(title: str) -> Callable[..., Any]:
    """Return a function that makes the entries of a group of settings."""
    return partial(Setting, group=title)


OF_CONFIG = ("Adapter", "Other fields of LoraConfig")
"""Groups with fields of `LoraConfig`."""

_input = in_group("Inputs and outputs")
_task = in_group("Task")
_adapter, _field = map(in_group, OF_CONFIG)


class DataAndAdapter:
    """The settings of the inputs and outputs, the task and the adapter, in the order of `--help-all`."""

    model: types.Text | None = _input(
        "Model directory, GGUF file, Hub id, or smollm2 (the packaged model); may be omitted if --from-adapter names "
        "its base",
        ...,
        brief="Model directory, GGUF file, Hub id, or smollm2",
    )
    revision: types.Text | None = _input(
        "Branch, tag or commit of the base model, if it is on the Hub",
        None,
        "the usual default branch on the Hub",
        "main",
    )
    data: types.Paths = _input(
        "Training data: files (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .arrow), directories, glob patterns, or "
        "Hub data sets such as hf:owner/name:train",
        ...,
        brief="Files, directories, patterns or Hub data sets",
    )
    output_dir: types.Text = _input(
        "Run directory: run.json, metrics.jsonl, checkpoints, adapter",
        ...,
        brief="Run directory: records, checkpoints, adapter",
    )
    eval_data: types.Paths | None = _input(
        "Evaluation files", None, "a fraction of the training data is held out", brief="Evaluation files"
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
    group: types.Text | None = _input(
        "Hold out whole groups of rows that have the same value in this column, such as a document or user id",
        None,
        "rows are independent; only rows with equal content stay together",
        conflict=Conflict(
            "eval_data",
            lambda value: value is not None,
            "cannot be combined with eval_data, because no rows are held out; omit one of them.",
        ),
    )
    data_weights: types.Weights = _input(
        "Set how often the sequences of a source occur per epoch as NAME=WEIGHT, such as a.jsonl=2 b.jsonl=0.5; the "
        "names are those in --data",
        {},
        "every sequence occurs once",
        "1 for each source",
    )
    streaming: types.Streaming = _input(
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
        is_changeable=True,
    )
    format: types.Format | None = _input(
        f"Select the shape of the rows: {', '.join(FORMATS)}", None, "the shape is recognized by the columns", "auto"
    )
    columns: types.Columns = _input(
        "Map fields to columns as FIELD=COLUMN, such as prompt=question completion=answer",
        {},
        "columns with the usual names are recognized",
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
    chat_template: types.Text | None = _input(
        "Chat template to use instead of the model's: chatml, gemma, llama3, plain or a Jinja file; it is saved with "
        "the adapter",
        None,
        "the model was trained with its own template",
    )
    on_bad_row: types.OnBadRow = _input(
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
    label_map: types.LabelMap = _task(
        "Rename labels of the data as NAME=NAME, such as Spam=spam 0=ham: the label in the data, and its name in the "
        "model; saved with the adapter",
        {},
        "labels must have the names that the model has",
    )
    tag_scheme: TagScheme = _task(
        f"Select how tags mark the words of an entity: {', '.join(TAG_SCHEMES)} or auto; none compares single words",
        "auto",
        "the letters of the tags show the scheme",
    )

    from_adapter: types.Text | None = _adapter(
        "Train an existing adapter further: an adapter directory, a run directory, a checkpoint or a Hub id; the "
        "settings of the adapter, such as --r and --target-modules, are taken from it",
        None,
        "a run trains a new adapter",
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
    target_modules: types.Targets | None = _adapter(
        "Select modules to adapt: names, a regular expression, or all-linear",
        "all-linear",
        "adapting attention and MLP works better than adapting attention alone with the same number of parameters",
        brief="Modules to adapt",
    )
    new_tokens: types.Tokens = _adapter(
        "Add tokens to the vocabulary, such as '<think>,</think>', and train only their rows in the embedding and the "
        "head; the tokenizer is saved with the adapter",
        [],
        "the base's vocabulary is sufficient for most tasks",
        is_for_new=True,
    )
    use_dora: bool = _adapter(
        "Also train one magnitude per output (DoRA)", False, "slower, and rarely better at r = 16"
    )
    use_rslora: bool = _adapter("Scale by alpha / sqrt(r) (rsLoRA)", False, "matters only for ranks above 64")
    allow_partial_targets: bool = _adapter(
        "Continue if a name in --target-modules matches nothing", False, "such a name is usually a typo"
    )
    init_lora_weights: types.Init = _adapter(
        "Select how A and B are initialized: default, gaussian, pissa, olora, orthogonal or mica; or eva, corda or "
        "lora_ga, which use the first training rows",
        "default",
        "A is random and B is zero, as in PEFT; pissa, olora, corda and lora_ga keep a second copy of each adapted "
        "weight in memory, and their adapters are saved as LoRA with twice the rank",
        is_for_new=True,
    )
    allocate_ranks: types.Allocation = _adapter(
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

    target_parameters: types.Names | None = _field(
        "Adapt parameters that are not the weight of a layer, such as mlp.experts.down_proj; without --target-modules, "
        "only these",
        None,
        "most models have none",
    )
    exclude_modules: types.Excluded | None = _field(
        "Exclude modules from --target-modules: names or a regular expression", None, "the targets say it"
    )
    modules_to_save: types.Names | None = _field(
        "Train these modules in full and save them with the adapter", None, "needed only for new heads"
    )
    layers_to_transform: list[int] | None = _field(
        "Adapt only the layers with these numbers", None, "all layers are adapted"
    )
    layers_pattern: types.Names | None = _field(
        "Name of the layer list that --layers-to-transform counts", None, "the usual names are recognized", "auto"
    )
    rank_pattern: types.Ranks = _field(
        "Ranks of individual modules as PATTERN=RANK, such as down_proj=32", {}, "--r applies"
    )
    alpha_pattern: types.Numbers = _field("Alphas of individual modules as PATTERN=ALPHA", {}, "--lora-alpha applies")
    bias: Bias = _field(
        "Train biases of the base too: none, all or lora_only",
        "none",
        "they change the base's output without the adapter",
    )
    lora_bias: bool = _field("Train a bias in each B", False, "rarely useful; some programs cannot load it")
    layer_replication: types.Ranges | None = _field(
        "Stack ranges of layers as FIRST:END, such as 0:16 8:24; replicas share the base weights",
        None,
        "the model keeps its depth",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _field(
        "Train the embedding rows of existing tokens with these ids", None, "the embeddings are frozen"
    )
    ensure_weight_tying: bool = _field(
        "Apply an adapter on one of two tied weights to both", False, "the output head is not adapted by default"
    )
    alora_invocation_tokens: list[int] | None = _field(
        "Ids of the tokens after which the adapter becomes active (aLoRA)", None, "LoRA is always active"
    )
    use_bdlora: types.Part = _field("Settings of BD-LoRA as a JSON object", None, "A and B are dense")
    kasa_config: types.Part = _field("Settings of KaSA as a JSON object", None, "the base keeps its weights")
    use_qalora: bool = _field("Let A read means of groups of inputs (QA-LoRA)", False, "A reads each input")
    qalora_group_size: int = _field("Number of inputs per group in QA-LoRA", 16, "PEFT's value", ge=1)
    use_lora_xs: bool = _field(
        "Freeze A and B at singular directions of W, and train an r × r matrix between them (LoRA-XS)",
        False,
        "A and B are trained",
    )
    velora_config: types.Part = _field(
        "Settings of VeLoRA as a JSON object", None, "A's gradient is computed from the whole input"
    )
    monteclora_config: types.Part = _field("Settings of MonteCLoRA as a JSON object", None, "A is not sampled")
    eva_config: types.Part = _field("Settings of the init eva as a JSON object", None, "PEFT's values", is_for_new=True)
    corda_config: types.Part = _field(
        "Settings of the init corda as a JSON object", None, "PEFT's values", is_for_new=True
    )
    lora_ga_config: types.Part = _field(
        "Settings of the init lora_ga as a JSON object", None, "PEFT's values", is_for_new=True
    )
