"""`lorakit eval`: measure the loss and perplexity of a model on data, with and without adapters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated

from cyclopts import Parameter

from lorakit import allocator
from lorakit.cli import console, early
from lorakit.plan.quantized import stored_as
from lorakit.train.defaults import DEFAULTS


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit eval`."""

    model: Annotated[str, Parameter(help="Model directory, GGUF file, Hub id, or smollm2 (the packaged model).")]
    data: Annotated[list[str], Parameter(help=DEFAULTS["data"].help().replace("Training data", "Data"))]
    adapter: Annotated[list[str] | None, Parameter(help="Adapter directories to compare with the base.")] = None
    format: Annotated[str | None, Parameter(help=DEFAULTS["format"].help())] = None
    columns: Annotated[list[str] | None, Parameter(help=DEFAULTS["columns"].help())] = None
    on_bad_row: Annotated[str, Parameter(help=DEFAULTS["on_bad_row"].help())] = DEFAULTS["on_bad_row"].value
    max_length: Annotated[int, Parameter(help="Maximum sequence length in tokens.")] = DEFAULTS["max_length"].value
    batch_size: Annotated[int, Parameter(help="Sequences per batch at --max-length; more if all are shorter.")] = (
        DEFAULTS["per_device_train_batch_size"].value
    )
    dtype: Annotated[str, Parameter(help="Precision of the base: auto, bfloat16 or float32.")] = "auto"
    device: Annotated[str, Parameter(help="cpu, cuda, cuda:N, mps or auto.")] = "auto"
    quantization: Annotated[str | None, Parameter(help=DEFAULTS["quantization"].help())] = None
    double_quantization: Annotated[bool, Parameter(help=DEFAULTS["double_quantization"].help())] = True
    allow_base_mismatch: Annotated[bool, Parameter(negative=(), help="Accept an adapter trained on another base.")] = (
        False
    )


def run(
    *,
    flags: Annotated[Flags, Parameter(name="*")],
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> None:
    """Measure the loss and perplexity of the base and of each adapter, over all tokens that contribute to the loss.

    --verbose adds data statistics and the reason for the chosen precision.
    """
    quantization = stored_as(flags.quantization, flags.double_quantization)
    early.check_choice("dtype", flags.dtype, early.RUN_DTYPES)
    early.check_device(flags.device)
    early.check_at_least("batch_size", flags.batch_size, 1)
    early.check_at_least("max_length", flags.max_length, 1)
    early.check_data(flags.data)
    early.check_choice("on_bad_row", flags.on_bad_row, ("stop", "skip"))
    columns = early.columns_of(flags.columns or ())
    flags = replace(flags, adapter=early.adapter_folders(flags.adapter or ()))
    early.check_model(flags.model)
    allocator.set_up()  # before torch allocates any memory
    from lorakit.data import Request

    request = Request(flags.format, columns, flags.on_bad_row == "skip")
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
            quantization=quantization,
            request=request,
        ),
        console.note,
        console.note if verbose else console.quiet,
    )
    if json:
        results = [{"name": name, **asdict(one), "perplexity": one.perplexity} for name, one in found]
        console.emit_json({"model": flags.model, "data": flags.data, "results": results})
        return
    rows = [[name, f"{one.loss:.4f}", f"{one.perplexity:.2f}", f"{one.tokens:,}"] for name, one in found]
    console.say(console.table(["", "loss", "perplexity", "tokens"], rows))
