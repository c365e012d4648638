#!/usr/bin/env python3
"""Measure a source tree: modules, lines of code, docstrings and tests, long files, and calls between files.

python scripts/structure.py                        # a Markdown table for src/lorakit, with the standard library only
python scripts/structure.py --src ../old/src/lorakit
python scripts/structure.py --runtime              # also walks: the calls into other files of a load, a merge, a set-up
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import sys
import tempfile
import threading
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}
MAX_FILE_LINES = 400


def line_counts(text: str) -> tuple[int, int]:
    """Return the lines of code (not blank, comment or docstring) and of docstrings; any string statement is one."""
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr) and _is_text(node.value)]
    spans = [(node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0) for node in strings]
    code = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = any(span[:2] <= token.start < span[2:] for span in spans)
        if token.type not in LAYOUT and not is_docstring:
            code |= set(range(token.start[0], token.end[0] + 1))
    lines = text.split("\n")
    documented = {number for first, _, last, _ in spans for number in range(first, last + 1)} - code
    return sum(bool(lines[number - 1].strip()) for number in code), len(documented)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def sizes(root: Path) -> dict[str, int | str]:
    """Return the measurements of the package below a directory, by label; its tests are in ../../tests, if anywhere."""
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in sorted(root.rglob("*.py"))}
    counts = [line_counts(text) for text in texts.values()]
    tests = (path.read_text("utf-8") for path in (root.parent.parent / "tests").rglob("*.py"))
    long = [f"{path} {text.count(chr(10))}" for path, text in texts.items() if text.count("\n") > MAX_FILE_LINES]
    return {
        "modules": len(texts),
        "code lines": sum(code for code, _ in counts),
        "docstring lines": sum(docstring for _, docstring in counts),
        "test lines": sum(text.count("\n") for text in tests),
        f"files above {MAX_FILE_LINES} lines": ", ".join(long) or 0,
    }


class Walk:
    """The functions of a package that are called from another file, in order of their first calls, in any thread."""

    def __init__(self, root: Path) -> None:
        self.calls: dict[str, None] = {}
        self._prefix = f"{root}{os.sep}"

    @property
    def files(self) -> list[str]:
        """Return the files that were entered."""
        return list(dict.fromkeys(call.partition(":")[0] for call in self.calls))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record for the duration of a block, or until `stop`."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """End the recording."""
        sys.setprofile(None)
        threading.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        name = getattr(code, "co_qualname", code.co_name)
        if event != "call" or code.co_name.startswith("<") or not code.co_filename.startswith(self._prefix):
            return
        while caller and not caller.f_code.co_filename.startswith(self._prefix):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename != code.co_filename:
            self.calls[f"{code.co_filename.removeprefix(self._prefix)}:{name}"] = None


def walks_of_a_model(root: Path, make_model: Callable[[], Any]) -> dict[str, Walk]:
    """Return the walks of `load_adapter` and `merge` on a model."""
    import lorakit

    for _ in range(2):  # the first round imports what is needed, so that the second sees no import
        found = {"load_adapter": Walk(root), "merge": Walk(root)}
        with tempfile.TemporaryDirectory() as folder:
            model = make_model()
            lorakit.attach(model, lorakit.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            lorakit.save_adapter(model, folder)
            lorakit.detach(model)
            with found["load_adapter"].recording():
                lorakit.load_adapter(model, folder)
            with found["merge"].recording():
                lorakit.merge(model)
    return found


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def walk_of_set_up(root: Path) -> Walk:
    """Return the walk of a training run, from `lorakit.train.run` to the call that reports that the loop starts."""
    for _ in range(2):
        walk = Walk(root)
        with tempfile.TemporaryDirectory() as folder:
            _train(Path(folder), walk)
    return walk


def _train(folder: Path, walk: Walk) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    from lorakit.train import TrainSettings, run

    logging.disable_progress_bar()
    tokenizer = Tokenizer(
        models.BPE(
            {letter: n for n, letter in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder / "model")
    _llama().save_pretrained(folder / "model")
    (folder / "data.txt").write_text("The quick fox jumps over the lazy dogs. " * 40, encoding="utf-8")
    files = {"model": str(folder / "model"), "data": [str(folder / "data.txt")], "output_dir": str(folder / "run")}
    settings = TrainSettings(**files, max_length=16, max_steps=1, device="cpu", r=2)
    with warnings.catch_warnings(), walk.recording():
        warnings.simplefilter("ignore")
        run(settings, _UntilTheLoop(walk))


class _UntilTheLoop:
    """A run's progress that reports nothing, and ends a recording when the training loop starts (`begin`)."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def __enter__(self) -> _UntilTheLoop:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: self.walk.stop() if name == "begin" else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--src", type=Path, default=ROOT / "src" / "lorakit", help="package directory to measure")
    parser.add_argument("--runtime", action="store_true", help="also list the calls of three walks (needs torch)")
    options = parser.parse_args(arguments)
    root = options.src.resolve()
    if not (root / "__init__.py").is_file():
        parser.error(f"{options.src} is not a package: it has no __init__.py")
    rows: dict[str, int | str] = sizes(root)
    found: dict[str, Walk] = {}
    if options.runtime:
        sys.path.insert(0, str(root.parent))
        found = {**walks_of_a_model(root, _llama), "training set-up": walk_of_set_up(root)}
        if not all(walk.calls for walk in found.values()):
            parser.error(f"lorakit was imported from elsewhere, not from {root}")
    for name, walk in found.items():
        rows |= {f"{name}: calls into other files": len(walk.calls), f"{name}: files entered": len(walk.files)}
        own = "train/" if name.startswith("training") else "core/"
        rows[f"{name}: files entered in {own}"] = sum(file.startswith(own) for file in walk.files)
    print("| measurement | value |\n|---|---:|")
    print(
        "\n".join(
            f"| {label} | {value:,} |" if isinstance(value, int) else f"| {label} | {value} |"
            for label, value in rows.items()
        )
    )
    for name, walk in found.items():
        print("\n".join([f"\n{name}:", *(f"{number:4d}  {call}" for number, call in enumerate(walk.calls, 1))]))


if __name__ == "__main__":
    main()
