"""Entry point of `python -m lorakit` and of the `lorakit` command, which run the same program."""

from __future__ import annotations

import contextlib
import os
import sys

from lorakit.startup import QuickExit, limit_spinning


def start() -> int:
    """Run the command line of this process, and return its exit code."""
    ending = QuickExit()  # before other modules register functions with `atexit`
    limit_spinning()
    from lorakit.terminal import watched
    from lorakit.train.processes.launching import is_first, reported, silent_seconds

    what = " ".join(["lorakit", *sys.argv[1:2]])
    with watched(what, silent=silent_seconds()) if is_first(os.environ) else contextlib.nullcontext():
        from lorakit.cli import main

        code = main()
    return ending.set_code(reported(code))


if __name__ == "__main__":
    sys.exit(start())
