"""The command line: `lorakit COMMAND`, with one module per command, imported when the command runs.

A command is a function `run` in `lorakit/cli/<command>.py`. Its parameters are the flags, its docstring is the help
text, and it returns the exit code (None means 0). Commands import torch inside functions, after the checks in
`lorakit.cli.early`, so that `--help` and usage errors appear immediately. This module lists the commands and turns
exceptions into messages and exit codes.

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted, 141 broken pipe.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lorakit import __version__
from lorakit.cli import console
from lorakit.errors import LorakitError, UsageError, describe, did_you_mean

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.help import DefaultFormatter, HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

COMMANDS = {
    "plan": "Estimate the parameters, memory and time of a run.",
    "data": "Show what training data looks like to the model, and what is wrong with it.",
    "train": "Train an adapter and save it in a run directory.",
    "convert-config": "Convert a settings file of Axolotl, LLaMA-Factory, mlx-lm or PEFT.",
    "eval": "Measure the loss, perplexity or metrics of a model, with and without adapters.",
    "predict": "Predict labels, scores, tags, texts or embeddings for the rows of files.",
    "generate": "Generate text with a model and its adapters, side by side.",
    "chat": "Talk to a model and its adapters in the terminal.",
    "merge": "Merge adapters into the base model and save the result.",
    "combine": "Combine adapters with one of PEFT's eleven methods.",
    "compress": "Reduce the rank of an adapter and report what is lost.",
    "extract": "Extract an adapter from a fully fine-tuned model and its base.",
    "compare": "Compare adapters: direction, norms and subspaces at each site.",
    "check": "Check what other runtimes would do with an adapter.",
    "export": "Write an adapter for vLLM, SGLang, mlx-lm and other runtimes.",
    "verify": "Compare an adapter's answers in other runtimes with lorakit's.",
    "serve": "Serve a base and many adapters over OpenAI's HTTP API.",
    "push": "Upload an adapter to the Hugging Face Hub.",
    "pull": "Download an adapter from the Hugging Face Hub.",
    "list": "List the adapters in a directory.",
    "adapters": "Publish adapters under names, with versions and rollback.",
    "inspect": "Show the config, sites, norms and problems of adapters.",
    "doctor": "Check this machine and its packages; suggest fixes.",
}

SUBCOMMANDS = {
    "adapters": {
        "add": "Publish an adapter as the current version of a name.",
        "list": "List the names with their current versions.",
        "show": "Show the history and the tags of a name.",
        "tag": "Give a version a tag.",
        "rollback": "Go back to an earlier version.",
        "remove": "Remove a name.",
        "verify": "Hash the files of all versions again, and report damage.",
        "gc": "Remove the versions that nothing uses.",
    }
}
"""Command -> the commands that it consists of; each is a function `run_NAME` in the command's module."""

MODULES = {"list": "listing", "convert-config": "convert_config", "adapters": "registry"}
"""Command -> its module, if the names differ: a module `list` would hide the built-in type in this package."""

_ABOUT = "Plan, train, evaluate, merge and combine LoRA adapters."
_EPILOGUE = (
    "Run `lorakit COMMAND --help` to list a command's flags. Pass --traceback (or set LORAKIT_TRACEBACK=1) to print "
    "the traceback of an error."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process, and return one of the exit codes in the module docstring."""
    tokens, as_traceback = _without_traceback_flag(list(sys.argv[1:] if argv is None else argv))
    as_traceback = as_traceback or os.environ.get("LORAKIT_TRACEBACK", "") not in ("", "0")
    as_json = "--json" in tokens
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # bitsandbytes' int8 layers log a line per forward pass
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: console.warning(str(message))
        try:
            code = _dispatch(tokens)
            sys.stdout.flush()
        except KeyboardInterrupt as stop:
            return console.failure(str(stop) or "interrupted", 130, as_json=as_json)
        except BrokenPipeError:
            _discard_stdout()
            return 141
        except Exception as error:  # noqa: BLE001 - the last chance to turn an error into a message
            if as_traceback:
                console.traceback(error)
            return _explain(error, tokens, as_json)
        return code


def application() -> App:
    """Return a cyclopts application with all commands, which returns a command's result and propagates its errors.

    Each command's module is imported when the command runs.
    """
    from cyclopts import App, Parameter

    looks: Any = {"help_format": "plaintext", "help_formatter": _help_formatter(), "help_epilogue": _EPILOGUE}
    app = App(
        name="lorakit",
        help=_ABOUT,
        version=f"lorakit {__version__}",
        **looks,
        result_action="return_value",
        error_console=cast("Console", sys.stderr),  # never used (`main` prints errors); avoids importing rich
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(consume_multiple=True, negative_iterable=(), negative_none=()),
    )
    for place, (command, summary) in enumerate(COMMANDS.items()):
        path, parts = f"lorakit.cli.{MODULES.get(command, command)}:run", SUBCOMMANDS.get(command)
        if parts is None:
            app.command(path, name=command, help=summary, sort_key=place)
            continue
        app.command(group := App(name=command, help=summary, sort_key=place, **looks))
        for inner, (part, about) in enumerate(parts.items()):
            group.command(f"{path}_{part}", name=part, help=about, sort_key=inner)
    return app


def _help_formatter() -> DefaultFormatter:
    """Return a help formatter whose option column fits the longest flag, so that no flag wraps."""
    from cyclopts.help import DefaultFormatter, NameRenderer
    from cyclopts.help.specs import get_default_parameter_columns

    def parameter_columns(console: Console, options: ConsoleOptions, entries: list[HelpEntry]) -> tuple[Any, ...]:
        words = [word for entry in entries for word in str(NameRenderer()(entry)).split()]
        width = max(map(len, words), default=0)
        return tuple(
            column.copy(renderer=NameRenderer(max_width=width), max_width=width)
            if column.header == "Option" and width > (column.max_width or 0)
            else column
            for column in get_default_parameter_columns(console, options, entries)
        )

    wide = DefaultFormatter(column_specs=parameter_columns)

    class Formatter(DefaultFormatter):
        def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
            if panel.format == "parameter":
                wide(console, options, panel)
            else:
                super().__call__(console, options, panel)

    return Formatter()


def _dispatch(tokens: list[str]) -> int:
    if tokens and not tokens[0].startswith("-") and tokens[0] not in COMMANDS:
        text = f"unknown command {tokens[0]!r}; choose from {', '.join(COMMANDS)}.{did_you_mean(tokens[0], COMMANDS)}"
        raise UsageError(text, what=tokens[0], allowed=COMMANDS)
    words = tokens[: tokens.index("--")] if "--" in tokens else tokens
    if words[:1] == ["train"] and {"--help", "-h"} & set(words):
        from lorakit.cli.train import brief_help

        console.say(brief_help())
        return 0
    tokens = ["--help" if number < len(words) and word == "--help-all" else word for number, word in enumerate(tokens)]
    result = application()(tokens, exit_on_error=False, print_error=False, verbose=False)
    return result if isinstance(result, int) else 0


def _explain(error: Exception, tokens: list[str], as_json: bool) -> int:
    from cyclopts import CycloptsError, UnknownOptionError

    from lorakit.train.processes.launching import is_first
    from lorakit.train.settings.conversion import CONVERT_ADVICE, NAMES_ELSEWHERE

    if tokens[:1] == ["train"] and isinstance(error, CycloptsError) and not is_first(os.environ):
        return 2  # the first of the processes of the run reports it
    if isinstance(error, LorakitError):
        return console.failure(str(error), error.exit_code, code=error.code, as_json=as_json)
    if isinstance(error, UnknownOptionError) and error.token is not None and error.token.keyword is not None:
        option = error.token.keyword
        here = NAMES_ELSEWHERE.get(option.lstrip("-").replace("-", "_"))
        if here is not None and tokens[0] == "train":
            text = f"unknown option {option}; the corresponding option is --{here.replace('_', '-')}. {CONVERT_ADVICE}"
            return console.failure(text, 2, code="LORA-E011", as_json=as_json)
    if isinstance(error, CycloptsError):
        command = f" {tokens[0]}" if tokens and tokens[0] in COMMANDS else ""
        message = f"{error} See `lorakit{command} --help`."
        return console.failure(message, 2, code="LORA-E011", as_json=as_json)
    return console.failure(f"unexpected {describe(error)} (rerun with --traceback to see where)", 1, as_json=as_json)


def _without_traceback_flag(tokens: list[str]) -> tuple[list[str], bool]:
    """Remove `--traceback` from the arguments that precede a bare `--`, and return whether the flag was given."""
    end = tokens.index("--") if "--" in tokens else len(tokens)
    kept = [token for token in tokens[:end] if token != "--traceback"]
    return kept + tokens[end:], len(kept) < end


def _discard_stdout() -> None:
    """Redirect stdout to the null device, so that the interpreter's final flush does not fail on the closed pipe."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # in a test or notebook, stdout may lack a file descriptor
        return
