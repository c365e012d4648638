"""`lorakit predict`: write labels with scores, tags, generated texts or embeddings for the rows of data files."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorakit import allocator
from lorakit.choices import TASK_NAMES
from lorakit.cli import adapters, console, early
from lorakit.cli.flag_groups import BASE, ROWS, BaseFlags, RowFlags, TagSchemeFlag
from lorakit.errors import UsageError
from lorakit.tables import format_count
from lorakit.terminal import working
from lorakit.train.settings.defaults import DEFAULTS, choices_of


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `lorakit predict`."""

    model: adapters.ModelFlag = None
    adapter: Annotated[str | None, Parameter(help=f"{adapters.NAME}; without it, the model's own head is used.")] = None
    text: Annotated[
        list[str] | None,
        Parameter(help="Texts to predict instead of files; for tags, words are separated by spaces."),
    ] = None
    output_file: Annotated[Path | None, Parameter(help="JSON Lines file to write. Default: standard output.")] = None
    task: Annotated[
        str | None, Parameter(help="Task of a model without --adapter: classification, ... Default: from the model.")
    ] = None
    reading: Annotated[RowFlags, Parameter(name="*")] = ROWS
    tag_scheme: TagSchemeFlag = "auto"
    max_length: adapters.LengthFlag = None
    max_new_tokens: Annotated[int, Parameter(help="Maximum length of a generated text in tokens (seq2seq).")] = 256
    batch_size: Annotated[int, Parameter(help="Rows per batch.")] = 16
    base: Annotated[BaseFlags, Parameter(name="*")] = BASE


NO_FLAGS = Flags()
ADAPTER = "adapter"


def run(
    files: Annotated[list[str] | None, Parameter(help=DEFAULTS["data"].help().replace("Training data", "Data"))] = None,
    /,
    *,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    json: console.JsonFlag = False,
) -> None:
    """Predict the rows of data files, or --text, and write one JSON object per row, in the order of the data.

    Each object has the row's file and line, and the prediction of the adapter's task: `label` with the probability of
    each class (`scores`), `labels`, `score`, `tags` with the `spans` that they form, `text`, or `embedding`. Rows need
    no labels. --json prints a single document instead.

    Raises:
        UsageError: The output file exists, or the model and the adapter do not predict rows.
    """
    model = _check(files or [], flags)
    folders = early.adapter_folders([flags.adapter] if flags.adapter is not None else [])
    allocator.set_up()  # before torch allocates any memory
    from lorakit.data import read_records, text_records
    from lorakit.session import RowsToPredict, Session, session_spec, to_predict

    named = dict(zip([ADAPTER], adapters.read_adapters([*folders.values()]), strict=False))
    spec = to_predict(session_spec(model, named, flags.base.options(model), flags.task, console.note), flags.tag_scheme)
    given = flags.reading.request(spec.task.task.inputs or spec.task.task.formats, needs_label=False)
    request = given.with_usual(spec.rows)
    records = text_records(flags.text, request) if flags.text else read_records(files or [], request)
    encoded = RowsToPredict.of(spec, records, spec.max_length(flags.max_length), flags.batch_size)
    for text in encoded.notes:
        console.note(text)
    with adapters.naming_flags(BaseFlags):
        session = Session.load(spec.on_machine())
    rows = session.predictions(encoded, ADAPTER if named else None, flags.max_new_tokens)
    if flags.output_file is None and json:
        with working("predicting"):
            predictions = list(rows)
        console.emit_json({"predictions": predictions})
        return
    count = 0
    with working("predicting"):
        first = list(itertools.islice(rows, 1))
        with console.row_writer(flags.output_file) as write:
            for row in itertools.chain(first, rows):
                write(row)
                count += 1
    if json:
        console.emit_json({"output_file": str(flags.output_file), "predictions": count})
    elif flags.output_file is not None:
        console.say(f"{flags.output_file}: {format_count(count, 'prediction')}")


def _check(files: list[str], flags: Flags) -> str | None:
    """Check the arguments, and return the name of the base, with its revision, or None if the adapter names it."""
    flags.base.check()
    early.check_at_least("batch_size", flags.batch_size, 1)
    early.check_at_least("max_length", flags.max_length, 2)
    early.check_at_least("max_new_tokens", flags.max_new_tokens, 1)
    if files and flags.text:
        raise UsageError("data files and --text were given; pass one of them.", field="text")
    if not files and not flags.text:
        raise UsageError("input is missing; pass data files, or texts as --text.", field="files")
    early.check_data(files)
    flags.reading.check()
    early.check_choice("tag_scheme", flags.tag_scheme, choices_of("tag_scheme"))
    early.check_choice("task", flags.task, TASK_NAMES)
    model = early.check_base(flags.model, flags.base.revision, [flags.adapter] if flags.adapter is not None else [])
    early.check_new_file(flags.output_file)
    return model
