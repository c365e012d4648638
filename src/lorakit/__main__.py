"""Entry point for `python -m lorakit`, which runs the same program as the `lorakit` command."""

from __future__ import annotations

import sys

from lorakit.cli import main
from lorakit.train.launching import reported

if __name__ == "__main__":
    sys.exit(reported(main()))
