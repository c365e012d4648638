"""The command line: `lorakit <verb>`, one file per verb, loaded when it is called.

A verb is a function `run` in `lorakit/cli/<verb>.py`; its parameters are the flags, its docstring the help, and what
it returns the exit code (None is 0). A verb file imports torch inside its functions, so that `--help` loads none. This
file knows the verbs' names, how an exception becomes a message and an exit code, and nothing of what the verbs do.

Exit codes: 0 done · 1 failed · 2 used wrongly · 130 interrupted · 141 the reader of a pipe went away.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from lorakit import __version__
from lorakit.cli import console
from lorakit.errors import LorakitError, UsageError, nearest

if TYPE_CHECKING:
    from cyclopts import App

VERBS = {
    "plan": "What a run will cost, before it starts: parameters, bytes, hours.",
    "train": "Adapt a model to data; the run is kept as a folder.",
    "eval": "Loss and perplexity of a model, with or without an adapter.",
    "generate": "Continue a prompt; several adapters answer side by side.",
    "merge": "Write base and adapter as one model directory.",
    "combine": "Several adapters as one: sums, differences, the field's eleven ways.",
    "compress": "An adapter at a lower rank, exactly, with what is lost.",
    "extract": "An adapter from a fully fine-tuned model and its base.",
    "compare": "Two adapters site by site: direction, strength, subspaces.",
    "inspect": "What is in an adapter: config, sites, norms, health, its base.",
    "doctor": "What this machine and its packages offer, and what to change.",
}

_ABOUT = "Low-Rank Adaptation for PyTorch and Transformers models: plan, train, prove, keep and serve adapters."
_EPILOGUE = (
    "`lorakit VERB --help` explains one verb. --traceback (or LORAKIT_TRACEBACK=1) shows where an error came from."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and say how it ended.

    Args:
        argv: The words after the program's name; those of this process when None.

    Returns:
        The exit code, as in the module's docstring.
    """
    tokens, as_traceback = _without_traceback_flag(list(sys.argv[1:] if argv is None else argv))
    as_traceback = as_traceback or os.environ.get("LORAKIT_TRACEBACK", "") not in ("", "0")
    as_json = "--json" in tokens
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its int8 layers log a line at every forward
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _dispatch(tokens)
            sys.stdout.flush()
        except KeyboardInterrupt as stop:
            return console.failure(str(stop) or "interrupted", 130, as_json=as_json)
        except BrokenPipeError:
            _discard_stdout()
            return 141
        except Exception as error:  # noqa: BLE001 - the last place where an error can become a sentence
            if as_traceback:
                console.traceback(error)
            return _explain(error, tokens, as_json)
        return code


def application() -> App:
    """The verbs as one cyclopts application; no verb's file is loaded by this.

    Returns:
        An application whose call returns what the verb returned and which raises its errors.
    """
    from cyclopts import App, Parameter

    app = App(
        name="lorakit",
        help=_ABOUT,
        help_epilogue=_EPILOGUE,
        version=f"lorakit {__version__}",
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(consume_multiple=True, negative_iterable=(), negative_none=()),
    )
    for verb, summary in VERBS.items():
        app.command(f"lorakit.cli.{verb}:run", name=verb, help=summary, sort_key=list(VERBS).index(verb))
    return app


def _dispatch(tokens: list[str]) -> int:
    if tokens and not tokens[0].startswith("-") and tokens[0] not in VERBS:
        raise UsageError(_unknown_verb(tokens[0]))
    result = application()(tokens, exit_on_error=False, print_error=False, verbose=False)
    return result if isinstance(result, int) else 0


def _unknown_verb(word: str) -> str:
    close = nearest(word, list(VERBS), count=1)
    meant = f" Did you mean `lorakit {close[0]}`?" if close else ""
    return f"{word!r} is not a verb of lorakit; there are {', '.join(VERBS)}.{meant}"


def _explain(error: Exception, tokens: list[str], as_json: bool) -> int:
    from cyclopts import CycloptsError

    if isinstance(error, LorakitError):
        return console.failure(str(error), error.exit_code, code=error.code, as_json=as_json)
    if isinstance(error, CycloptsError):
        verb = f" {tokens[0]}" if tokens and tokens[0] in VERBS else ""
        message = f"{error} See `lorakit{verb} --help`."
        return console.failure(message, 2, code="LORA-E011", as_json=as_json)
    what = f"unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    return console.failure(f"{what} (run again with --traceback to see where)", 1, as_json=as_json)


def _without_traceback_flag(tokens: list[str]) -> tuple[list[str], bool]:
    """Take `--traceback` out of the words before a bare `--`."""
    end = tokens.index("--") if "--" in tokens else len(tokens)
    kept = [token for token in tokens[:end] if token != "--traceback"]
    return kept + tokens[end:], len(kept) < end


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Take the place of `warnings.showwarning`, whose signature this is: people want the message alone."""
    console.warning(str(message))


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain about the closed pipe."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # a stdout without a descriptor (a test, a notebook) has nothing to flush
        return
