"""`lorakit eval`: measure a model on data, with and without adapters, and say whether an adapter is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit import allocator
from lorakit.cli import adapters, console, early
from lorakit.cli.flag_groups import BASE, LABELS, ROWS, BaseFlags, LabelFlags, RowFlags
from lorakit.errors import UsageError
from lorakit.terminal import working
from lorakit.train.settings.defaults import DEFAULTS

if TYPE_CHECKING:
    from lorakit.session import AnswerMetrics, EvalRows, Evaluation, Measured, SessionSpec

DEFAULT = "default"
"""Value of --forgetting for the text that is part of lorakit."""

ALONE = "base"
"""Value of --compare for the model without adapters."""


@dataclass(frozen=True)
class AnswerFlags:
    """Flags about the metrics of answers to rows of prompt and answer."""

    exact_match: Annotated[
        bool,
        Parameter(negative=(), help="Generate an answer to each prompt, and compare it with the answer of the row."),
    ] = False
    regex: Annotated[
        str | None,
        Parameter(
            help="Generate answers, and search them for this regular expression. If it has a group, the first group "
            "must have the same text as in the answer of the row."
        ),
    ] = None
    choices: Annotated[
        list[str] | None,
        Parameter(help="Possible answers; the most likely one is compared with the answer of the row."),
    ] = None
    normalize_choices: Annotated[
        bool, Parameter(negative=(), help="Divide the log-likelihood of each choice by its number of characters.")
    ] = False
    max_new_tokens: Annotated[int, Parameter(help="Maximum length of a generated answer in tokens.")] = 256

    def metrics(self) -> AnswerMetrics:
        """Return the metrics of answers; this imports torch.

        Raises:
            ConfigError: The expression is not valid, or the choices are not different answers.
        """
        from lorakit.session import AnswerMetrics

        choices = tuple(self.choices or ())
        return AnswerMetrics(self.exact_match, self.regex, choices, self.normalize_choices, self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `lorakit eval`."""

    model: adapters.ModelFlag = None
    data: Annotated[list[str], Parameter(help=DEFAULTS["data"].help().replace("Training data", "Data"))]
    adapter: Annotated[list[str] | None, Parameter(help=f"{adapters.NAMES} to measure.")] = None
    compare: Annotated[
        str | None,
        Parameter(help=f"Compare the adapters with base, or with one of the {adapters.NAMES.lower()}."),
    ] = None
    group: Annotated[
        str | None, Parameter(help="Count rows with equal values of this column as one document of the interval.")
    ] = None
    output_file: Annotated[
        Path | None,
        Parameter(help="JSON Lines file to write with the results of each row, for the base and each adapter."),
    ] = None
    forgetting: Annotated[
        list[str] | None,
        Parameter(
            help="Compare the adapters on text outside their task too: files, as for --data, or default for a text "
            "that is part of lorakit (documentation of Python)."
        ),
    ] = None
    answers: Annotated[AnswerFlags, Parameter(name="*")] = AnswerFlags()
    reading: Annotated[RowFlags, Parameter(name="*")] = ROWS
    labels: Annotated[LabelFlags, Parameter(name="*")] = LABELS
    max_length: adapters.LengthFlag = None
    batch_size: Annotated[int, Parameter(help="Sequences per batch at --max-length; more if all are shorter.")] = (
        DEFAULTS["per_device_train_batch_size"].value
    )
    base: Annotated[BaseFlags, Parameter(name="*")] = BASE


def run(
    *,
    flags: Annotated[Flags, Parameter(name="*")],
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> None:
    """Measure the loss of the base and of each adapter, and the perplexity or the metrics of the task.

    The task is that of the adapters; without adapters, the data and the model determine it. Each adapter is compared
    with the base, or with --compare: the difference, its 95% interval over the documents, and a verdict. --verbose adds
    data statistics and the reason for the chosen precision.

    Raises:
        UsageError: --compare is given without --adapter.
    """
    flags.base.check()
    early.check_at_least("batch_size", flags.batch_size, 1)
    early.check_at_least("max_length", flags.max_length, 1)
    early.check_data(flags.data)
    flags.reading.check()
    flags.labels.check()
    early.check_at_least("max_new_tokens", flags.answers.max_new_tokens, 1)
    early.check_new_file(flags.output_file)
    model = early.check_base(flags.model, flags.base.revision, flags.adapter)
    for name, value in (("compare", flags.compare), ("forgetting", flags.forgetting)):
        if value is not None and not flags.adapter:
            raise UsageError(f"--{name} needs --adapter: the adapter that is compared.", what=value, field=name)
    early.check_data(name for name in flags.forgetting or () if name != DEFAULT)
    folders = early.adapter_folders(flags.adapter or ())
    reference, folders = _reference(flags.compare, folders)
    allocator.set_up()  # before torch allocates any memory
    files = adapters.read_adapters([*folders.values()])
    from lorakit.data import read_records
    from lorakit.session import EvalRows, compare, session_spec
    from lorakit.tasks import CAUSAL_LM
    from lorakit.train.setup.run_data import seen_note

    named = dict(zip(folders, files, strict=True))
    spec = session_spec(model, named, flags.base.options(model), CAUSAL_LM.name, console.note)  # the data decides
    allowed = spec.task.task.formats if named else ()
    metrics = flags.answers.metrics()
    with adapters.naming_flags(BaseFlags), working("evaluating"):
        records = read_records(flags.data, flags.reading.request(allowed, flags.group).with_usual(spec.rows))
        for one in files:
            seen = seen_note(one.folder, one.sidecar.facts, records)
            if seen is not None:
                console.note(seen)
        rows = EvalRows(records, flags.labels.options(), spec.max_length(flags.max_length), flags.batch_size)
        detail = console.note if verbose else console.quiet
        data = [rows, *([_outside(flags, spec)] if flags.forgetting else [])]
        measured, *others = compare(spec, data, reference, console.note, detail, metrics)
    if flags.output_file is not None:
        with console.row_writer(flags.output_file) as write:
            for row in (row for each in measured for row in each.rows(records)):
                write(row)
    if json:
        document = {"model": spec.source.given, "data": flags.data, "results": _results(measured)}
        outside = [{"data": flags.forgetting, "results": _results(other)} for other in others]
        console.emit_json({**document, **({"forgetting": outside[0]} if outside else {})})
        return
    parts = [_table(measured), _verdicts(measured)]
    for other in others:
        parts += [f"Text outside the task ({', '.join(flags.forgetting or ())}):\n{_table(other)}", _verdicts(other)]
    console.say("\n\n".join(filter(None, parts)))


def _outside(flags: Flags, spec: SessionSpec) -> EvalRows:
    """Read the text of --forgetting.

    Raises:
        UsageError: The task of the adapters does not continue text.
        DataError: A file cannot be read.
    """
    from lorakit.data import Request, read_records
    from lorakit.session import GENERAL_TEXT, EvalRows

    task = spec.task.task
    if not task.generates:
        text = f"--forgetting measures the loss of text, but the task {task.name} does not continue text; omit it."
        raise UsageError(text, what=task.name, field="forgetting")
    files = [str(GENERAL_TEXT) if name == DEFAULT else name for name in flags.forgetting or ()]
    records = read_records(files, Request(allowed=task.formats))
    return EvalRows(records, max_length=spec.max_length(flags.max_length), batch_rows=flags.batch_size)


def _reference(name: str | None, folders: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Return the name of what adapters are compared with, and the directories of all adapters to measure."""
    if name is None or name == ALONE:
        return ALONE, folders
    others = early.adapter_folders([name])
    known = {folder: given for given, folder in folders.items()}
    other, folder = next(iter(others.items()))
    return (known[folder], folders) if folder in known else (other, {**others, **folders})


def _results(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    return [{"name": one.name, **_values(one)} for one in measured]


def _values(measured: Measured) -> dict[str, Any]:
    one = measured.evaluation
    undefined = {"undefined": one.undefined} if one.undefined else {}
    metrics = {**(one.metrics or {"perplexity": one.perplexity}), **measured.answer_metrics}
    values = {"loss": one.loss, "tokens": one.tokens, **metrics, **undefined}
    compared = {name: difference.as_dict() for name, difference in measured.differences.items()}
    return {**values, **({"compared_with": measured.reference, "differences": compared} if compared else {})}


def _verdicts(measured: Sequence[Measured]) -> str:
    lines = [
        f"{one.name} against {one.reference}: {difference.sentence(name, one.unit)}"
        for one in measured
        for name, difference in one.differences.items()
    ]
    return "\n".join(lines)


def _table(measured: Sequence[Measured]) -> str:
    """Return measurements as a table; metrics of single classes are listed below it."""
    named = [(one.name, one.evaluation) for one in measured]
    metrics = [name for name in named[0][1].metrics if "/" not in name]
    if not named[0][1].metrics:
        answers = [*measured[0].answer_metrics]
        rows = [
            [name, f"{one.loss:.4f}", f"{one.perplexity:.2f}", f"{one.tokens:,}"]
            + [f"{whole.answer_metrics[key]:.4f}" for key in answers]
            for (name, one), whole in zip(named, measured, strict=True)
        ]
        return console.table(["", "loss", "perplexity", "tokens", *answers], rows)
    rows = [[name, f"{one.loss:.4f}", *(_shown(one, key) for key in metrics)] for name, one in named]
    reasons = {f"{key}: undefined, because {reason}." for _, one in named for key, reason in one.undefined.items()}
    table = "\n".join([console.table(["", "loss", *metrics], rows), *sorted(reasons)])
    classes = [name for name in named[0][1].metrics if "/" in name]
    if not classes:
        return table
    single = [[name.partition("/")[2], *(_shown(one, name) for _, one in named)] for name in classes]
    return f"{table}\n\n{console.table(['F1 by class', *(name for name, _ in named)], single)}"


def _shown(one: Evaluation, name: str) -> str:
    value = one.metrics.get(name)
    return "-" if value is None else f"{value:.4f}"
