#!/usr/bin/env python3
"""Draw what the command line prints on a terminal of 80 columns, for docs/command-line.md.

    python scripts/terminal_pictures.py                  # runs each command in a temporary directory; a few minutes
    python scripts/terminal_pictures.py --only plan      # one of them, and those that it needs

The commands are those of the README, on SmolLM2-135M-Instruct and one page of the documentation.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "terminal"
COLUMNS = 80
COMMANDS = {
    "plan": "lorakit plan gpt2 --r 8 --lora-alpha 16 --target-modules c_attn c_proj",
    "data": "lorakit data notes.md --model smollm2 --rows 0",
    "train": "lorakit train --model smollm2 --data notes.md --output-dir runs/notes --max-steps 10",
    "eval": "lorakit eval --model smollm2 --data notes.md --adapter runs/notes/adapter",
    "generate": "lorakit generate --model smollm2 --adapter runs/notes/adapter --base --max-new-tokens 40 "
    '--prompt "What is an adapter?"',
    "inspect": "lorakit inspect runs/notes/adapter",
    "merge": "lorakit merge --model smollm2 --adapter runs/notes/adapter --output-dir runs/notes-merged",
    "doctor": "lorakit doctor",
}
"""Name of the picture -> command; later ones read the adapter that "train" writes."""
ANIMATED = ("train", "generate")
"""Commands that redraw lines on a terminal that can; they run with TERM=dumb, which prints each line once."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures; return 0, or 1 if a command failed."""
    parser = argparse.ArgumentParser(description="Draw the output of the command line.")
    parser.add_argument("--only", choices=tuple(COMMANDS), help="draw this command alone")
    only = parser.parse_args(arguments).only
    needs_adapter = only is not None and "runs/notes/adapter" in COMMANDS[only]
    names = [name for name in COMMANDS if only in (None, name) or (name == "train" and needs_adapter)]
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(ROOT / "docs" / "format.md", Path(directory, "notes.md"))
        for name in names:
            status, output = run_in_terminal(
                COMMANDS[name], directory, "dumb" if name in ANIMATED else "xterm-256color"
            )
            if status:
                print(f"{COMMANDS[name]} exited with {status}:\n{output}", file=sys.stderr)
                return 1
            if only in (None, name):
                (PICTURES / f"{name}.svg").write_text(picture(COMMANDS[name], output), encoding="utf-8")
                print(f"docs/terminal/{name}.svg")
    return 0


def run_in_terminal(command: str, directory: str, kind: str = "xterm-256color") -> tuple[int, str]:
    """Run a command of lorakit in a pseudo-terminal of 80 columns.

    Args:
        command: The command.
        directory: Working directory.
        kind: Type of the terminal (TERM).

    Returns:
        Exit status and output with its escape sequences.
    """
    controller, terminal = pty.openpty()
    words = [sys.executable, "-m", *shlex.split(command)]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": kind}
    null = subprocess.DEVNULL
    with subprocess.Popen(words, cwd=directory, env=environment, stdin=null, stdout=terminal, stderr=terminal) as run:
        os.close(terminal)
        chunks = list(_chunks(controller))
    os.close(controller)
    return run.returncode, b"".join(chunks).decode().replace("\r\n", "\n")


def _chunks(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # Linux reports the end of a pseudo-terminal as EIO
            return
        if not chunk:
            return
        yield chunk


def picture(command: str, output: str) -> str:
    """Return an SVG of a command and its output; the home directory is shown as `~`."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold"))
    for line in output.replace(str(Path.home()), "~").splitlines():
        console.print(Text.from_ansi(line), soft_wrap=True)
    return console.export_svg(title="lorakit", unique_id="lorakit")


if __name__ == "__main__":
    sys.exit(main())
