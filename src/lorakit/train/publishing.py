"""What a finished run leaves for others: `adapter/` with tokenizer and model card, and the loss plot.

Knows the run folder; the adapter's files are those of the chosen checkpoint, taken over byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit import durable
from lorakit.errors import DiskError, MissingExtra
from lorakit.report import loss_plot, read_metrics
from lorakit.train import adapter_only, checkpoint
from lorakit.train.run_folder import ADAPTER_FOLDER, PLOT_FILE

_OURS = {checkpoint.MANIFEST, checkpoint.STATE, checkpoint.OPTIMIZER, checkpoint.RANDOM}

_GROWING = """rows = len(AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER"))
if rows > base.get_input_embeddings().num_embeddings:  # peft needs this for the new tokens; lorakit does it by itself
    base.resize_token_embeddings(rows)
"""


def publish_adapter(source: Path, folder: Path, save_tokenizer: Callable[[Path], object], card: str) -> Path:
    """Put the adapter of a checkpoint into `adapter/`, whole or not at all.

    Args:
        source: The checkpoint, which has been verified, or an adapter alone, whose files are not copied but linked:
            it was saved because the disk is full.
        folder: The run folder.
        save_tokenizer: Writes the tokenizer's files into a folder.
        card: Text of README.md.

    Returns:
        The adapter's folder.

    Raises:
        DiskError: The disk refuses.
    """
    final = folder / ADAPTER_FOLDER
    with durable.publish_directory(final, replace=True) as temporary:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in _OURS:
                _take(path, temporary / path.name, linked=adapter_only.step_of(source) >= 0)
        save_tokenizer(temporary)
        durable.write_text(temporary / "README.md", card)
    return final


def _take(path: Path, target: Path, *, linked: bool) -> None:
    if linked:
        with contextlib.suppress(OSError):  # a file system without links
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files.

    Args:
        tokenizer: Any transformers tokenizer.
        folder: Where; it exists.

    Raises:
        DiskError: They cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as cause:  # tokenizers raises a plain Exception on a full disk
        raise DiskError(f"The tokenizer cannot be written ({' '.join(str(cause).split())}).") from cause


def plot_loss(folder: Path, title: str) -> str:
    """Draw `loss.svg` where matplotlib is there.

    Args:
        folder: The run folder.
        title: A line above the plot.

    Returns:
        A sentence that says where it is, or why there is none.
    """
    path = folder / PLOT_FILE
    try:
        loss_plot(read_metrics(folder), path, title)
    except (MissingExtra, DiskError) as cause:
        return str(cause)
    return f"Loss over the steps: {path}"


def model_card(facts: Mapping[str, Any]) -> str:
    """The README of an adapter: what it is, how it was made, how it did, how to use it.

    Args:
        facts: base, targets, r, lora_alpha, trainable, total, new_tokens, data (names), step, steps, eval (a sentence),
            seed, learning_rate, dtype, versions.

    Returns:
        Markdown with the metadata block that model hubs read.
    """
    base = facts["base_model_name_or_path"]
    header = ["---", "library_name: peft", "tags:", "- lora", "- lorakit"]
    if base:
        header.append(f"base_model: {base}")
    header.append("---")
    tokens = ", ".join(f"`{token}`" for token in facts["new_tokens"]).replace("|", r"\|")
    row = f"| new tokens | {tokens} |\n" if tokens else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    body = f"""
# LoRA adapter for {facts["base"]}

{facts["trainable"]:,} trained parameters beside {facts["total"]:,} of the frozen base: rank {facts["r"]},
alpha {facts["lora_alpha"]}, on {facts["targets"]}.

| | |
|---|---|
{row}| data | {", ".join(facts["data"])} |
| trained | {facts["step"]} of {facts["steps"]} optimizer steps, rate {facts["learning_rate"]}, seed {facts["seed"]} |
| result | {facts["eval"]} |
| precision | base {facts["dtype"]}, adapter float32 |
| made with | {versions} |

```python
from lorakit import PeftModel  # or: from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base or "PATH_OF_THE_BASE"!r})
{_GROWING if tokens else ""}model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

Known limits: it was measured on the data above only. Licence and limits of the base apply.
"""
    return "\n".join(header) + "\n" + body
