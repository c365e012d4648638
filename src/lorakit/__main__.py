"""Entry point for `python -m lorakit`, which is the same program as `lorakit`."""

from __future__ import annotations

import sys

from lorakit.cli import main

if __name__ == "__main__":
    sys.exit(main())
