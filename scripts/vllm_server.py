"""Run real vLLM on a CPU, in an environment of its own: servers from printed commands, and its argument parser."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from environments import VLLM

CPU_OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4")
"""Options that a printed command does not have: the dtype whose differences are judged, and a start in a minute."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
START_SECONDS = 600

PARSE = """
import argparse, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers(dest="command"))
found = parser.parse_args(sys.argv[1:])
print(found.model_tag, found.max_lora_rank, [(one.name, one.path) for one in found.lora_modules or ()])
"""


def parsed(command: str) -> subprocess.CompletedProcess[str]:
    """Return the result of vLLM's own parser for a printed `vllm serve` command: model, largest rank, adapters."""
    _, words = split(command)
    environment = {**os.environ, **ENVIRONMENT}
    arguments = [str(VLLM.python), "-c", PARSE, *words[1:]]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables before a command, and its words."""
    words = shlex.split(command)
    start = words.index("vllm")
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


@contextlib.contextmanager
def serving(command: str, log: Path, *options: str) -> Iterator[str]:
    """Run a printed `vllm serve` command with further options, and yield its URL once it answers.

    The package's `vllm` command cannot be started on a CPU, so the server is started as a module.

    Raises:
        SystemExit: The server ended, or did not answer in time; the message has the end of its log.
    """
    variables, (_, _, model, *words) = split(command)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, *words, *options, *CPU_OPTIONS]
    environment = {**os.environ, **ENVIRONMENT, **variables}
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(VLLM.python), *server, "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine is a child, which must end with it
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health", timeout=5):
            return
        time.sleep(1)
    raise SystemExit(f"vLLM did not start:\n{log.read_text()[-3000:]}")
