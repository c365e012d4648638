"""`lorakit data`: show what training data looks like to the model, and what is wrong with it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.choices import TASK_NAMES, LabelType, Overlong
from lorakit.cli import console, early
from lorakit.cli.flag_groups import LABELS, ROWS, LabelFlags, RevisionFlag, RowFlags
from lorakit.terminal import colored, working, write_pieces
from lorakit.train.settings.defaults import DEFAULTS

if TYPE_CHECKING:
    from lorakit.data import Encoded, Record, Sequence
    from lorakit.data.quality import Quality, Visit
    from lorakit.data.tokens import Tokenizer


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit data`."""

    model: Annotated[
        str, Parameter(help="Model directory, GGUF file, Hub id, or smollm2; only its tokenizer is loaded.")
    ]
    revision: RevisionFlag = None
    eval_data: Annotated[list[str] | None, Parameter(help=DEFAULTS["eval_data"].help())] = None
    eval_fraction: Annotated[float | None, Parameter(help=DEFAULTS["eval_fraction"].help())] = None
    group: Annotated[str | None, Parameter(help=DEFAULTS["group"].help())] = None
    reading: Annotated[RowFlags, Parameter(name="*")] = ROWS
    chat_template: Annotated[str | None, Parameter(help=DEFAULTS["chat_template"].help())] = None
    task: Annotated[str | None, Parameter(help=DEFAULTS["task"].help())] = None
    label_type: Annotated[LabelType, Parameter(help=DEFAULTS["label_type"].help(), show_choices=False)] = "auto"
    alora_invocation_tokens: Annotated[list[int] | None, Parameter(help=DEFAULTS["alora_invocation_tokens"].help())] = (
        None
    )
    labels: Annotated[LabelFlags, Parameter(name="*")] = LABELS
    overlong: Annotated[Overlong, Parameter(help=DEFAULTS["overlong"].help(), show_choices=False)] = "truncate"
    max_length: Annotated[int | None, Parameter(help=DEFAULTS["max_length"].help())] = None
    seed: Annotated[int, Parameter(help=DEFAULTS["seed"].help())] = DEFAULTS["seed"].value
    rows: Annotated[int, Parameter(help="Number of rows to show as tokens.")] = 1
    html: Annotated[Path | None, Parameter(help="Write a page with the first 50 rows, tokens colored by loss.")] = None


def run(
    files: Annotated[list[str], Parameter(help=DEFAULTS["data"].help())],
    /,
    *,
    flags: Annotated[Flags, Parameter(name="*")],
    json: console.JsonFlag = False,
) -> None:
    """Check training data: rows, tokens that contribute to the loss, truncation, duplicates, leaks and odd characters.

    The command reads the data exactly as `lorakit train` does. It fails if no token contributes to the loss, or if no
    end marker does; everything else is a counted warning.

    Raises:
        DataError: The data cannot be read, or no token or no end marker contributes to the loss.
    """
    early.check_data([*files, *(flags.eval_data or ())])
    model = early.check_model(flags.model, flags.revision)
    flags.reading.check()
    flags.labels.check()
    early.check_at_least("max_length", flags.max_length, 2)
    early.check_at_least("rows", flags.rows, 0)
    early.check_choice("task", flags.task, TASK_NAMES)

    from lorakit import hub
    from lorakit.data import read_split
    from lorakit.data.quality import measure, write_page
    from lorakit.session.coding import max_length_for, usual_length
    from lorakit.session.tokenizers import training_tokenizer
    from lorakit.tasks import TASKS, EncodeOptions, task_for

    allowed = TASKS[flags.task].formats if flags.task is not None else ()
    request = flags.reading.request(allowed, flags.group)
    parts = read_split(files, flags.eval_data, flags.eval_fraction, flags.seed, request)
    source = hub.resolve(model, console.note)
    hub.require(source, tokenizer=True, weights=False)
    tokenizer, _ = training_tokenizer(source, flags.chat_template)
    shown = max(flags.rows, ROWS_ON_PAGE if flags.html else 0)
    labels = flags.labels.options(flags.label_type, is_evaluation_given=flags.eval_data is not None)
    task = task_for(flags.task, parts, source, labels)
    length = max_length_for(hub.shape_of(source), flags.max_length, lambda: usual_length(parts.train, tokenizer, task))

    def encode(visit: Visit) -> Encoded:
        options = EncodeOptions(length, flags.overlong, visit=visit)
        encoded = task.task.encode(parts.train, tokenizer, task.target, options)
        _count_inactive(encoded, tokenizer, flags, length)
        return encoded

    def show(record: Record, count: int) -> Iterable[Sequence]:
        return task.task.encode_one(record, tokenizer, task.target, EncodeOptions(length, flags.overlong, shown=count))

    names = task.target.names if task.task.unit == "row" else ()
    with working("tokenizing"):
        quality = measure(parts, tokenizer, length, encode, show, shown, names)
    if task.note:
        console.note(task.note)
    if flags.html is not None:
        write_page(flags.html, files, quality, parts.note)
    if json:
        console.emit_json(quality.as_dict())
    else:
        _print(quality, parts.note, flags)
    quality.report.check_end()


ROWS_ON_PAGE = 50


def _count_inactive(encoded: Encoded, tokenizer: Tokenizer, flags: Flags, length: int) -> None:
    """Record how many sequences an adapter with the given invocation tokens would not learn from."""
    if flags.alora_invocation_tokens is None:
        return
    from lorakit.config import LoraConfig
    from lorakit.core import check_invocation
    from lorakit.train.setup.run_data import count_inactive

    adapter = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=flags.alora_invocation_tokens)
    check_invocation(adapter, set(tokenizer.get_vocab().values()), "the tokenizer", length)
    encoded.report.inactive_sequences = count_inactive(adapter, encoded.sequences)


def _print(quality: Quality, note: str, flags: Flags) -> None:
    from lorakit.data.quality import marked, row_title

    for line in [*quality.report.lines(), note, *quality.notes]:
        console.say(line)
    for line in quality.warnings():
        console.warning(line)
    most = max((count for _, count in quality.histogram), default=1)
    rows = [[f"<= {size:,}", f"{count:,}", "#" * max(1, round(30 * count / most))] for size, count in quality.histogram]
    console.say()
    console.say(console.table(["tokens", "sequences", ""], rows))
    for number, tokens in enumerate(quality.examples[: flags.rows], start=1):
        is_colored = colored(sys.stdout)
        how = "colored" if is_colored else "in brackets"
        console.say(f"\n{row_title(number, tokens)} ({how}: contributes to the loss)")
        if is_colored:
            runs = itertools.groupby(
                tokens, key=lambda token: token.is_trained
            )  # a color would part letters and accents
            write_pieces(("".join(one.text for one in run), "green" if on else "") for on, run in runs)
        else:
            write_pieces([(marked(tokens), "")])
    if flags.html is not None:
        console.say(f"\nPage: {flags.html}")
