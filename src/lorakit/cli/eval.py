"""`lorakit eval`: loss and perplexity of a model on data, with and without adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from lorakit import allocator
from lorakit.cli import console
from lorakit.plan.quantized import stored_as
from lorakit.train.defaults import DEFAULTS


@dataclass(frozen=True)
class Flags:
    """The flags of the verb, as their help says."""

    model: Annotated[str, Parameter(help="Model directory, hub id, or smollm2 (the packaged model).")]
    data: Annotated[list[str], Parameter(help="Files: .txt, .md (documents) or .jsonl.")]
    adapter: Annotated[list[str] | None, Parameter(help="Adapter directories, evaluated side by side.")] = None
    max_length: Annotated[int, Parameter(help="Longest row in tokens.")] = DEFAULTS["max_length"].value
    batch_size: Annotated[int, Parameter(help="Rows of a batch of the longest; of shorter ones it takes more.")] = (
        DEFAULTS["per_device_train_batch_size"].value
    )
    dtype: Annotated[str, Parameter(help="Precision of the base: auto, bfloat16 or float32.")] = "auto"
    device: Annotated[str, Parameter(help="cpu, cuda, cuda:N, mps or auto.")] = "auto"
    quantization: Annotated[str | None, Parameter(help=DEFAULTS["quantization"].help())] = None
    double_quantization: Annotated[bool, Parameter(help=DEFAULTS["double_quantization"].help())] = True
    allow_base_mismatch: Annotated[bool, Parameter(negative=(), help="Take an adapter of another base.")] = False


def run(*, flags: Annotated[Flags, Parameter(name="*")], json: console.JsonFlag = False) -> None:
    """Loss and perplexity over all trained tokens of the data, of the base and of each adapter on it."""
    allocator.set_up()  # before torch takes any memory
    from lorakit.train.evaluation import EvalSettings, compare

    found = compare(
        EvalSettings(
            model=flags.model,
            data=flags.data,
            adapters=flags.adapter or (),
            max_length=flags.max_length,
            batch_rows=flags.batch_size,
            dtype=flags.dtype,
            device=flags.device,
            allow=("base_mismatch",) if flags.allow_base_mismatch else (),
            quantization=stored_as(flags.quantization, flags.double_quantization),
        ),
        console.note,
    )
    if json:
        console.emit_json({"model": flags.model, "data": flags.data, "results": [row.as_dict() for row in found]})
        return
    rows = [
        [row.name, f"{row.evaluation.loss:.4f}", f"{row.evaluation.perplexity:.2f}", f"{row.evaluation.tokens:,}"]
        for row in found
    ]
    console.say(console.table(["", "loss", "perplexity", "tokens"], rows))
