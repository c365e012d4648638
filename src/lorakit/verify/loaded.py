"""Runtimes that compute with torch: lorakit's session, the saved files in plain arithmetic, and the merged model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core, hub
from lorakit.choices import DENSE
from lorakit.errors import AdapterError
from lorakit.generate import Sampling
from lorakit.session import Session, session_spec
from lorakit.session.merging import MergeRequest, write_merged
from lorakit.session.prompts import encode_prompts
from lorakit.session.tokenizers import SavedTokenizer
from lorakit.verify.prompts import Prompt
from lorakit.verify.runtime import BASE, RuntimeRequest

ADAPTER = "adapter"


def package_versions(*names: str) -> Mapping[str, str]:
    """Return the versions of installed packages."""
    return {name: version(name) for name in names}


def encoded(prompt: Prompt, tokenizer: SavedTokenizer) -> list[int]:
    """Return the token ids of a prompt by another tokenizer."""
    form, content = ("text", prompt.text) if prompt.chat is None else ("chat", prompt.chat)
    return encode_prompts([content], tokenizer, form, None)[0]


class LoadedRuntime:
    """A model in memory, whose logits are those of a plain forward pass."""

    parallel = 1

    def __init__(self, title: str, model: nn.Module, tokenizer: SavedTokenizer, request: RuntimeRequest) -> None:
        self.title = title
        self.dtype = request.dtype
        self.versions = package_versions("torch", "transformers")
        self.others: Sequence[str] = ()
        self._model: Any = model  # a transformers model
        self._tokenizer, self._ends = tokenizer, request.end_ids

    def encode(self, prompt: Prompt) -> list[int] | None:
        """Return the token ids of a rendered prompt."""
        return encoded(prompt, self._tokenizer)

    def scores(self, ids: Sequence[int], other: str | None = None) -> Tensor:
        """Return the log-probabilities of the next token after each of `ids`, shape (tokens, vocabulary), in fp64."""
        with torch.no_grad(), self._active(other):
            logits = self._model(input_ids=torch.tensor([[*ids]], device=self._model.device)).logits[0]
        return logits.double().log_softmax(-1)

    def _active(self, other: str | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def log_probabilities(self, ids: Sequence[int], other: str | None = None) -> list[float]:
        """Return the log-probability of each token but the first, given those before it."""
        return chosen(self.scores(ids, other), ids)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return up to `count` most likely tokens, each from a forward pass over all tokens before it."""
        new: list[int] = []
        while len(new) < count and not set(new) & self._ends:
            new.append(int(self.scores([*ids, *new])[-1].argmax()))
        return new


class SessionRuntime(LoadedRuntime):
    """lorakit's session with one adapter, which generates as it does for users."""

    def __init__(self, session: Session, request: RuntimeRequest, title: str = "lorakit") -> None:
        super().__init__(title, session.model, session.spec.tokenizer, request)
        self.versions = package_versions("lorakit", "torch", "transformers")
        self.others = (BASE,)
        self._session = session

    def _active(self, other: str | None) -> contextlib.AbstractContextManager[None]:
        return core.disable(self._model) if other == BASE else core.use(self._model, ADAPTER)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return up to `count` most likely tokens."""
        tokens = self._session.stream([ids], [ADAPTER], max_new_tokens=count, sampling=Sampling(), eos_ids=self._ends)
        return [token.token for token in tokens]


def chosen(scores: Tensor, ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token but the first, from scores of shape (tokens, vocabulary)."""
    following = torch.tensor([*ids[1:]], device=scores.device)
    return [float(value) for value in scores[:-1].gather(1, following[:, None])[:, 0]]


@contextlib.contextmanager
def open_session_runtime(request: RuntimeRequest, title: str = "lorakit") -> Iterator[SessionRuntime]:
    """Open the adapter in a new session.

    Raises:
        LorakitError: The base or the adapter cannot be loaded.
    """
    with Session.load(request.spec) as session:
        yield SessionRuntime(session, request, title)


@contextlib.contextmanager
def open_reloaded(request: RuntimeRequest) -> Iterator[LoadedRuntime]:
    """Save the adapter again, and open the files: plain LoRA as it is exported, in plain torch; else in a session.

    Raises:
        LorakitError: The adapter cannot be saved or loaded.
    """
    saved = request.workspace / "saved"
    with Session.load(request.spec) as session:
        core.save_adapter(session.model, saved, ADAPTER)
    files = core.read_adapter(saved)
    spec = session_spec(request.spec.source, {ADAPTER: files}, request.spec.options)
    again = replace(request, spec=replace(spec, task=request.spec.task))
    try:
        common = core.common_form(again.export("peft"))
    except AdapterError:  # a part that is not plain LoRA, or that waits for tokens
        with open_session_runtime(again, "lorakit, the adapter saved again") as runtime:
            yield runtime
        return
    model = hub.load_model(request.spec.source, request.spec.options.dtype, request.spec.device)
    if not add_update(model, common):
        with open_session_runtime(again, "lorakit, the adapter saved again") as runtime:
            yield runtime
        return
    yield LoadedRuntime("transformers, the update added in plain torch", model, request.spec.tokenizer, request)


def add_update(model: nn.Module, adapter: core.CommonAdapter) -> bool:
    """Add x·Aᵀ·Bᵀ to the output of each adapted linear layer of a plain model; return False if it has other sites."""
    pairs = {path: (factor.A, factor.B) for path, factor in adapter.weights.factors.items() if factor.bare is None}
    modules = {path: model.get_submodule(path) for path in pairs}
    if len(pairs) < len(adapter.weights.factors) or any(type(one).__name__ not in DENSE for one in modules.values()):
        return False
    for path, (down, up) in pairs.items():
        modules[path].register_forward_hook(_adding(down, up))
    return True


def _adding(down: Tensor, up: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update = inputs[0].float() @ down.to(output.device).T @ up.to(output.device).T
        return output + update.to(output.dtype)

    return hook


@contextlib.contextmanager
def open_merged(request: RuntimeRequest) -> Iterator[LoadedRuntime]:
    """Merge the adapter into the base, and open the written model with transformers.

    Raises:
        MergeError: The adapter cannot be merged.
        LorakitError: The base or the adapter cannot be loaded.
    """
    target = request.workspace / "merged"
    write_merged(MergeRequest(request.spec, target, request.dtype, untie=True), lambda text: None)
    model = hub.load_model(target, request.spec.options.dtype, request.spec.device)
    yield LoadedRuntime("transformers, the merged model", model, hub.load_tokenizer(target), request)
