"""Names and values that flags and settings may have, names of layer types: what is needed with and without torch.

Flags are checked and plans are made before torch is loaded; so each list is here, and a test compares it with the
registry that implements its names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

TaskName = Literal["causal-lm", "classification", "token-classification", "seq2seq", "embedding"]
LabelType = Literal["auto", "class", "classes", "score"]
"""One class per row, any number of classes per row, or a number."""

TagScheme = Literal["auto", "BIO", "IOB1", "IOE", "BIOES", "BILOU", "BMES", "IO", "none"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Overlong = Literal["truncate", "drop", "split", "error"]
"""Treatment of rows that are longer than the maximum length."""

Bias = Literal["none", "all", "lora_only"]
Recompute = Literal["none", "feed-forward", "layers"]
BaseMatmul = Literal["dtype", "int8"]
Optimizer = Literal["adamw", "adamw8bit", "lorafa", "muon"]
ExportFormatName = Literal["peft", "vllm", "sglang", "gguf", "mlx"]
"""Names in `lorakit.export.formats.FORMATS`, without their flags."""

GgufType = Literal["F32", "F16", "BF16", "Q8_0"]
"""Storage formats of merged weights in GGUF files."""

RuntimeName = Literal["vllm", "sglang", "llama.cpp", "ollama", "mlx", "peft"]
VerifyName = Literal["reloaded", "merged", "gguf", "gguf-merged", "mlx"]
"""Names in `lorakit.verify.verifying.RUNTIMES`, which also has schemes of URLs."""

Stored = Literal["nf4", "fp4", "int8", "int8-torchao", "hqq4", "hqq8"]

VERIFY_NAMES: tuple[VerifyName, ...] = get_args(VerifyName)
"""Values of `--against` of `verify`, besides URLs."""

TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
"""Names in `lorakit.tasks.TASKS`."""

FORMATS = (
    *("text", "prompt-completion", "messages", "alpaca", "sharegpt", "question-answer"),
    *("classification", "text-pair", "token-classification", "source-target"),
)
"""Names of the shapes in `lorakit.data.shapes` that training supports."""

TAG_SCHEMES: tuple[TagScheme, ...] = get_args(TagScheme)[1:]
"""Keys of `lorakit.tasks.metrics.SCHEMES`."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""Values of `--dtype`."""

DTYPE_NAMES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""Short name of a dtype -> its name."""

BIASES: tuple[Bias, ...] = get_args(Bias)
"""Values of `bias` in a config."""

INITS = ("default", "gaussian", "pissa", "olora", "orthogonal", "eva", "corda", "lora_ga", "mica")
"""Names in `lorakit.core.inits.INITS` that training supports, except `pissa_niter_N`; "default" is True.

LoftQ needs the unquantized base.
"""

BASE_MATMULS: tuple[BaseMatmul, ...] = get_args(BaseMatmul)
"""Dtypes in which the linear layers of the base are multiplied: the job's dtype, or int8 (W8A8)."""

MATMUL_IN_DTYPE, MATMUL_IN_INT8 = BASE_MATMULS

KEPT_CHANNELS = 16
"""Default number of input channels of an int8 weight that keep their dtype."""

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
"""Names in `lorakit.plan.optimizer_state.OPTIMIZERS` and `lorakit.train.loop.optimizer.OPTIMIZERS`."""

SAMPLING_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "0 (greedy) or a number above 0, such as 0.7"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1 (all tokens)"),
    "top_k": (lambda value: value >= 0, "0 (all tokens) or an integer above 0"),
    "seed": (lambda value: 0 <= value < 2**63, "an integer from 0 to 2**63 - 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "from -2 to 2"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "from -2 to 2"),
    "repetition_penalty": (lambda value: 0.01 <= value <= 100, "from 0.01 to 100 (1: no penalty)"),
    "min_tokens": (lambda value: value >= 0, "0 or an integer above 0"),
}
"""Numbers in `lorakit.generate.Sampling` -> the test of a value, and its description."""

STORED: tuple[Stored, ...] = get_args(Stored)
"""Names in `lorakit.plan.quantized.STORAGES`."""

RUNTIME_NAMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
"""Names in `lorakit.export.rules.RUNTIMES`."""

MAX_RANK = 16
"""Default rank that a runtime is started for, as in vLLM (vllm/config/lora.py, 0.32)."""

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
"""Names in `lorakit.train.files.trackers.TRACKERS`."""

LINEAR, CONV1D, EMBEDDING = "Linear", "Conv1D", "Embedding"
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
ATTENTION, INNER_LINEAR = "MultiheadAttention", "InnerLinear"
PARAMETER = "Parameter"
"""Names in `lorakit.core.kinds.KINDS`; a bare parameter, which `target_parameters` selects, has the type PARAMETER."""

DENSE = (LINEAR, CONV1D)
"""Types of modules that multiply their input by a matrix; "all-linear" selects such modules."""

PLANNED = (*DENSE, EMBEDDING)
"""Layer types that plans support and that error messages suggest as targets."""
