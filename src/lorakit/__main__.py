"""Entry point of `python -m lorakit` and of the `lorakit` command, which run the same program."""

from __future__ import annotations

import sys

from lorakit.startup import QuickExit, limit_spinning


def start() -> int:
    """Run the command line of this process, and return its exit code."""
    ending = QuickExit()  # before other modules register functions with `atexit`
    limit_spinning()
    from lorakit.cli import main
    from lorakit.train.launching import reported

    return ending.set_code(reported(main()))


if __name__ == "__main__":
    sys.exit(start())
