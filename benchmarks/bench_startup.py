"""Claims: `import lorakit` adds at most 0.15 s to a bare Python, `lorakit --help` takes at most 0.6 s, and importing
`lorakit.peft` takes at most 0.3 s more than torch alone.

    python benchmarks/bench_startup.py
"""

from __future__ import annotations

import subprocess
import sys

from runner import append_row, seconds_of

COMMANDS = {
    "bare python": ["-c", "pass"],
    "import lorakit": ["-c", "import lorakit"],
    "import lorakit.plan": ["-c", "import lorakit.plan"],
    "import torch": ["-c", "import torch"],
    "from lorakit.peft import get_peft_model": ["-c", "from lorakit.peft import LoraConfig, get_peft_model"],
    "from peft import get_peft_model": ["-c", "from peft import LoraConfig, get_peft_model"],
    "lorakit --help": ["-m", "lorakit", "--help"],
    "lorakit train --help": ["-m", "lorakit", "train", "--help"],
}


def main() -> None:
    for what, arguments in COMMANDS.items():

        def start(arguments: list[str] = arguments) -> None:
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)

        append_row("startup", {"what": what}, {"seconds": seconds_of(start, repeats=7)})


if __name__ == "__main__":
    main()
