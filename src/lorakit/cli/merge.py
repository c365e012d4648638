"""`lorakit merge`: base and adapters as one model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import Allowances, read_adapters
from lorakit.cli.stored import say_how_trained
from lorakit.errors import ConfigError, MergeError
from lorakit.plan.quantized import Quantization, stored_as
from lorakit.train.defaults import DEFAULTS

if TYPE_CHECKING:
    from lorakit.cli.merged_model import Merged, Order

WORST_SITES = 5
LITTLE_SURVIVED = 0.5
LARGE_DIFFERENCE = 0.5  # of what the adapters do to the base


@dataclass(frozen=True)
class Flags:
    """The flags of the verb, as their help says."""

    model: Annotated[str, Parameter(help="Model directory, hub id, or smollm2 (the packaged model).")]
    adapter: Annotated[list[str], Parameter(help="Adapter directories; several are added up.")]
    output_dir: Annotated[Path, Parameter(help="Model directory to make; it must not exist, or be empty.")]
    dtype: Annotated[
        str,
        Parameter(
            help="Of the weights written: auto (as the base's), bfloat16, float16 or float32. The merge itself "
            "computes in float32; float32 also keeps all of a small adapter, at twice the size."
        ),
    ] = "auto"
    quantization: Annotated[
        str | None,
        Parameter(
            help="Merge into the base as it was stored in training (nf4, ...): the directory holds the numbers of the "
            "quantised base multiplied out, with the adapter in them. Default none: into the base as it is."
        ),
    ] = None
    double_quantization: Annotated[bool, Parameter(help=DEFAULTS["double_quantization"].help())] = True
    untie: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Where an adapted weight is also another's (tied embeddings), make them two; the config says so.",
        ),
    ] = False


def run(
    *,
    flags: Annotated[Flags, Parameter(name="*")],
    allow: Annotated[Allowances | None, Parameter(name="*")] = None,
    json: console.JsonFlag = False,
) -> None:
    """Write base and adapters as one model directory that any program loads.

    It is loaded again and compared with base and adapters before it gets its name; a directory that says something
    else is not kept. The adapters are noted in it, so that lorakit does not apply them a second time.
    """
    from lorakit import hub
    from lorakit.cli.merged_model import Order, check_target, record, write_merged

    _check_dtype(flags.dtype)
    check_target(flags.output_dir)
    quantization = stored_as(flags.quantization, flags.double_quantization)
    if quantization is not None:
        hub.require_quantiser(quantization)
    files = read_adapters(flags.adapter)
    say_how_trained(files, quantization)
    source = hub.resolve(flags.model, console.note)
    hub.require(source)
    _refuse_quantised_files(flags.model, hub.stored_as_files(source, quantization), quantization)
    words = (allow or Allowances()).words()
    order = Order(source, files, flags.adapter, flags.output_dir, flags.dtype, flags.untie, words, quantization)
    done = write_merged(order, console.note)
    for sentence in doubts(done):
        console.warning(sentence)
    if json:
        console.emit_json(
            {
                "output_dir": str(done.folder),
                "weights_bytes": done.weights_bytes,
                "parameters": done.parameters,
                **record(order, done),
            }
        )
    else:
        console.say(_text(order, done))


def doubts(done: Merged) -> list[str]:
    """What a person should know about a merge that worked.

    Args:
        done: What was written.
    """
    found = []
    survived = _mean_survived(done)
    if survived < LITTLE_SURVIVED:
        found.append(
            f"only {survived:.0%} of the adapter's change fits into {done.dtype} weights; the rest is smaller than a "
            "step of that precision. --dtype float32 keeps it."
        )
    if done.probe is not None and done.probe.max_difference > LARGE_DIFFERENCE * done.probe.effect:
        found.append(
            f"the merged model differs from base and adapters by up to {done.probe.max_difference:.2g} in a logit, "
            f"while the adapters change the base by up to {done.probe.effect:.2g}: much of what they do is lost."
        )
    if not done.has_tokenizer:
        found.append("neither the model nor the adapters have a tokenizer, so the directory has none.")
    return found


def _refuse_quantised_files(model: str, stored: Quantization | None, wanted: Quantization | None) -> None:
    if stored is not None and wanted is None:
        raise MergeError(
            f"{model}: its files are quantised ({stored.name}), and a plain directory is made of the plain base. Give "
            f"that as --model, with --quantization {stored.name} for the numbers that the adapter was trained on.",
            where=model,
        )


def _check_dtype(dtype: str) -> None:
    from lorakit.hub.models import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.", what=dtype, field="dtype")


def _mean_survived(done: Merged) -> float:
    shares = [site.survived for site in done.sites]
    return sum(shares) / len(shares) if shares else 1.0


def _text(order: Order, done: Merged) -> str:
    size = console.bytes_text(done.weights_bytes)
    lines = [
        f"{done.folder}: {done.parameters:,} parameters, {size} in {done.dtype}",
        f"merged     {' + '.join(order.folders)} at {len(done.sites)} sites",
        f"survived   {_mean_survived(done):.2%} of the change on average, once rounded to {done.dtype}",
    ]
    if done.probe is not None:
        probe = done.probe
        lines += [
            f"checked    loaded again: the largest difference of a logit from base and adapters is "
            f"{probe.max_difference:.2g} (allowed {probe.tolerance:.2g}),",
            f"           where the adapters change the base by up to {probe.effect:.2g}; the likeliest token is the "
            f"same at {probe.same_top:.0%} of positions",
        ]
    if done.untied:
        lines.append("untied     input and output embeddings are two weights now (tie_word_embeddings is false)")
    worst = sorted(done.sites, key=lambda site: site.survived)[:WORST_SITES]
    rows = [[site.path, f"{site.survived:.2%}", f"{site.changed:.2%}"] for site in worst]
    table = console.table(["site with the least", "survived", "weights changed"], rows) if rows else ""
    return "\n".join(["\n".join(lines), "", table]).rstrip()
