"""`FORMATS`, the registry of what `lorakit export` writes, and the publication of one export."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.durable_folders import publish_directory
from lorakit.errors import AdapterError, UsageError
from lorakit.export.gguf import llama_commands, write_gguf
from lorakit.export.merged_gguf import merged_commands, write_merged_gguf
from lorakit.export.mlx import mlx_commands, write_mlx
from lorakit.export.peft_folder import serving_commands, write_peft
from lorakit.export.request import Exported, ExportRequest, versioned


@dataclass(frozen=True)
class ExportFormat:
    """Form in which a runtime reads adapters.

    Attributes:
        title: What is written, for messages.
        write: Function that writes the files for a request to an empty directory.
        commands: Function from the name of an export, the base, the rank and the output directory to how runtimes load
            it: title -> command.
        flags: What `lorakit export` needs for a base, in model cards; "{base}" is its name.
        needs_base: Whether the request must have the base; only its config is read.
        is_library: Whether the output directory holds several exports, each in `NAME@HASH12`, instead of one.
        takes_invocation: Whether the runtime runs adapters that wait for tokens (aLoRA).
        verified_as: The runtime of `lorakit.verify` that computes with what this format has.
    """

    title: str
    write: Callable[[ExportRequest, Path], Exported]
    commands: Callable[[str, str, int, str], Mapping[str, str]]
    flags: str = "--model {base}"
    needs_base: bool = False
    is_library: bool = False
    takes_invocation: bool = False
    verified_as: str = "reloaded"


_PEFT = ExportFormat(
    "a PEFT adapter in the common form", write_peft, serving_commands, "--served-base {base}", is_library=True
)

FORMATS: Mapping[str, ExportFormat] = {
    "vllm": _PEFT,
    "sglang": _PEFT,
    "peft": _PEFT,
    "gguf": ExportFormat(
        "a GGUF adapter for llama.cpp",
        write_gguf,
        llama_commands,
        needs_base=True,
        takes_invocation=True,
        verified_as="gguf",
    ),
    "gguf --merged": ExportFormat(
        "a merged GGUF model for llama.cpp and Ollama",
        write_merged_gguf,
        merged_commands,
        "--model {base} --base-gguf BASE.gguf",
        needs_base=True,
        verified_as="gguf-merged",
    ),
    "mlx": ExportFormat("an adapter for mlx-lm", write_mlx, mlx_commands, needs_base=True, verified_as="mlx"),
}
"""Format or runtime, and flag, as given to `lorakit export` -> its entry."""


def export(name: str, request: ExportRequest, output: Path) -> tuple[Exported, Path]:
    """Write an adapter in a format, and return what was written and its directory; an error leaves nothing.

    An export that the output directory already has stays unchanged.

    Raises:
        AdapterError: The adapter has a part that the runtime cannot apply.
        UsageError: The output directory has another export of this name, or files.
    """
    entry, source = FORMATS[name], request.adapter.folder
    if request.adapter.invocation and not entry.takes_invocation:
        text = f"{source}: as {entry.title}, an adapter that waits for tokens (aLoRA) is rejected; export it as gguf."
        raise AdapterError(text, what="aLoRA", where=source)
    if not entry.is_library:
        with publish_directory(output) as folder:
            return entry.write(request, folder), output
    with tempfile.TemporaryDirectory() as draft:
        exported = entry.write(request, Path(draft))
        target = output / exported.name
        if not target.exists():
            with publish_directory(target) as folder:
                shutil.copytree(draft, folder, dirs_exist_ok=True)
        elif versioned(request.name, target) != exported.name:
            text = f"{target}: exists and was changed after its export; remove it, or pass another --output-dir."
            raise UsageError(text, where=target, field="output_dir")
    return exported, target
