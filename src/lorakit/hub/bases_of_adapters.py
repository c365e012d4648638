"""The base that an adapter's config names, loaded by transformers as the caller's options say."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError

CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task of an adapter -> class of transformers that loads its base."""


def load_base(
    name: str,
    *,
    task: str | None,
    written_class: tuple[str, str],
    tokenizer_folder: Path,
    options: Mapping[str, Any],
) -> Any:
    """Load the base of an adapter; it grows with a tokenizer that lies beside the adapter.

    Args:
        name: Folder or hub id of the base.
        task: The adapter's task, a key of `CLASSES`, or None for the class that the config names.
        written_class: Package and class that the config names; the caller has checked the package.
        tokenizer_folder: The adapter's folder.
        options: What transformers' `from_pretrained` takes.

    Raises:
        ModelError: There is no such class.
    """
    import transformers

    library = transformers if task else import_module(written_class[0])
    kind = getattr(library, CLASSES[task] if task else written_class[1], None)
    if kind is None:
        raise ModelError(f"{'.'.join(written_class)}: there is no such class, so the base {name} cannot be loaded.")
    model = kind.from_pretrained(name, **options)
    if (tokenizer_folder / "tokenizer_config.json").exists() and hasattr(model, "get_input_embeddings"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    return model
