"""Measure public calls of lorakit on a small model: how often each walks the model, and which modules it enters.

Used by `structure.py --runtime`. Only public names are imported, so that the same script measures any version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
CALLS = (
    "attach",
    "save_adapter",
    "merge",
    "unmerge",
    "merged_state_dict",
    "detach",
    "load_adapter",
    "merge_and_unload",
)


@dataclasses.dataclass(frozen=True)
class Call:
    """Measurements of one public call.

    Attributes:
        modules: Modules of the package whose functions were called.
        walks: Outermost calls of `named_modules` or `modules`, also by `parameters` and others of torch.
        listed: How often the model's direct children were listed. Every walk that starts at the model does that once,
            however it is written: also the package's own walks, `state_dict`, `train` and `apply`.
    """

    modules: tuple[str, ...]
    walks: int | None = None
    listed: int | None = None

    def counts(self) -> dict[str, int]:
        """Return what was counted, by name."""
        counts = {"walks": self.walks, "listed": self.listed, "modules": len(self.modules)}
        return {name: count for name, count in counts.items() if count is not None}


class Walks:
    """Count walks over a model while `counting` is active, as `Call` has them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.walks = self.listed = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Replace torch's two methods, and the model's table of children, for the duration of a block."""
        from torch import nn

        originals = {name: getattr(nn.Module, name) for name in ("named_modules", "modules")}
        own = {method.__code__ for method in originals.values()}

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def call(module: Any, *arguments: Any, **keywords: Any) -> Any:
                if sys._getframe(1).f_code not in own:  # only the outermost call: both methods call named_modules
                    self.walks += 1
                return original(module, *arguments, **keywords)

            return call

        children = self.model._modules
        try:
            for name, method in originals.items():
                setattr(nn.Module, name, counted(method))
            self.model.__dict__["_modules"] = _counted_children(self, children)
            yield
        finally:
            for name, method in originals.items():
                setattr(nn.Module, name, method)
            now = self.model.__dict__["_modules"]
            if now is not children:
                children.clear()
                children.update(dict.items(now))
            self.model.__dict__["_modules"] = children


def _counted_children(walks: Walks, children: dict[str, Any]) -> dict[str, Any]:
    class Counted(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            walks.listed += 1
            return super().items()

        def values(self) -> Any:
            walks.listed += 1
            return super().values()

    return Counted(children)


class Trace:
    """Collect the modules of a package whose functions are called, in any thread; running an import does not count."""

    def __init__(self, root: Path) -> None:
        self.modules: set[str] = set()
        self._prefix = f"{root}{os.sep}"

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
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(self._prefix):
            self.modules.add(code.co_filename.removeprefix(self._prefix))


def measure(root: Path) -> dict[str, Call]:
    """Measure each function of CALLS, and return "training set-up" with the modules that it enters.

    Args:
        root: The package's directory; the package must not have been imported from elsewhere.

    Raises:
        RuntimeError: lorakit was imported from another directory.
    """
    sys.path.insert(0, str(root.parent))
    import lorakit

    if Path(lorakit.__file__).resolve().parent != root:
        raise RuntimeError(f"lorakit was imported from {lorakit.__file__}, not from {root}")
    public_calls(llama(), root)  # imports what the calls need, so that the trace sees no import
    return {**public_calls(llama(), root), "training set-up": Call(training_modules(root))}


def table(calls: Mapping[str, Call]) -> str:
    """Return a Markdown table with one row per call."""
    lines = ["| call | `named_modules`, `modules` | walks of any kind | modules entered |", "|---|---:|---:|---:|"]
    for name, call in calls.items():
        counts = call.counts()
        lines.append(f"| {name} | {counts.get('walks', '–')} | {counts.get('listed', '–')} | {counts['modules']} |")
    return "\n".join(lines)


def llama() -> Any:
    """Build a Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def public_calls(model: Any, root: Path) -> dict[str, Call]:
    """Call each function of CALLS once, in that order, with one adapter on all linear layers."""
    import lorakit

    config = lorakit.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        further = {"attach": (config,), "save_adapter": (folder,), "load_adapter": (folder,)}
        for name in CALLS:
            call, walks, trace = getattr(lorakit, name), Walks(model), Trace(root)
            with walks.counting(), trace.recording():
                call(model, *further.get(name, ()))
            found[name] = Call(tuple(sorted(trace.modules)), walks.walks, walks.listed)
    return found


def training_modules(root: Path) -> tuple[str, ...]:
    """Trace a run of one step, from `lorakit.train.run` to the call that reports that the loop starts.

    Raises:
        RuntimeError: The run never reported that.
    """
    from transformers.utils import logging

    from lorakit.train import TrainSettings, run

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        llama().save_pretrained(folder / "model")
        _write_tokenizer(folder / "model")
        (folder / "data.txt").write_text("The quick fox jumps over the lazy dogs. " * 40, encoding="utf-8")
        files = {"model": str(folder / "model"), "data": [str(folder / "data.txt")]}
        for number in range(2):  # the first run imports what is needed
            progress = _UntilTheLoop(Trace(root))
            output = str(folder / f"run-{number}")
            settings = TrainSettings(**files, output_dir=output, max_length=16, max_steps=1, device="cpu", r=2)
            with progress.trace.recording():
                run(settings, progress)
    if not progress.started:
        raise RuntimeError("the run never called `begin` of its progress, so the end of the set-up is unknown")
    return tuple(sorted(progress.trace.modules))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {
        letter: number for number, letter in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)


class _UntilTheLoop:
    """A run's progress that reports nothing, and ends a trace when the training loop starts (`begin`)."""

    def __init__(self, trace: Trace) -> None:
        self.started = False
        self.trace = trace

    def __enter__(self) -> _UntilTheLoop:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        def report(*_: object) -> None:
            if name == "begin":
                self.started = True
                self.trace.stop()

        return report
