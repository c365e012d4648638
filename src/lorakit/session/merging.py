"""Merge adapters into a base and write a plain model directory, which is verified before it is published.

Weights are merged site by site in fp32 or wider (`lorakit.core`). The written model is then loaded, and its logits must
match those of the unmerged base and adapters.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import core, hub
from lorakit.core import AdapterFiles
from lorakit.core.merging import tied_sites
from lorakit.core.model.base_view import dequantize
from lorakit.core.model.fingerprint import add_merge_record, vocabulary_of
from lorakit.core.model.vocabulary import grow_vocabulary
from lorakit.durable import as_object, write_json
from lorakit.durable_folders import publish_directory
from lorakit.errors import MergeError, ModelError
from lorakit.generate import context_tokens
from lorakit.machine import this_machine
from lorakit.plan.quantized import Quantization
from lorakit.session.prompts import end_ids
from lorakit.session.spec import MERGED_FILE, SessionSpec
from lorakit.session.tokenizers import SavedTokenizer

TRAINING = ("task", "labels", "prompt_format", "shape", "columns", "max_length")
"""Entries of an adapter's `training` that a merged model keeps."""

PROBE_TOKENS, PROBE_ROWS = 48, 32
ROUNDING = {"float32": 0.0, "float16": 0.05, "bfloat16": 0.3}
"""Dtype of the merged weights -> allowed change in a logit due to rounding, in standard deviations of the logits."""

NOISE = {"float32": 0.001, "float16": 0.1, "bfloat16": 0.6}
"""Dtype of the comparison -> allowed numerical error of a logit, in standard deviations of the logits. The bf16 limit
exceeds the effect of most adapters, so the comparison uses fp32 if the fp32 model fits into memory."""

ROUNDED_ACTIVATIONS = 0.3
"""Allowed change in a logit due to rounded activations in bitsandbytes' int8 matmuls, in standard deviations."""


@dataclass(frozen=True)
class MergeRequest:
    """Specification of a merge into a new directory.

    Attributes:
        spec: The base and the adapters, by their directories or Hub ids as given by the user; the quantization of the
            options is that of the base during training.
        target: The directory to create.
        dtype: A name in `lorakit.choices.DTYPES`; "auto" keeps the dtype of the base.
        untie: Whether to give a site its own copy of a weight that it shares with another module.
    """

    spec: SessionSpec
    target: Path
    dtype: str = "auto"
    untie: bool = False

    @property
    def loader(self) -> str:
        """Which class loads the model; see `lorakit.hub.TASKS`."""
        return self.spec.task.task.loader

    def load(
        self,
        tokenizer: SavedTokenizer | None,
        dtype: str | torch.dtype = "auto",
        quantization: Quantization | None = None,
    ) -> Any:
        """Load the base with the head that the task needs; a new head has random weights until the adapters load."""
        options = replace(self.spec.options, dtype=dtype, quantization=quantization, device="cpu")
        return replace(self.spec, options=options).load_base(tokenizer).model

    def load_adapters(self, model: torch.nn.Module) -> list[str]:
        """Load the adapters, largest vocabulary first, because only a base without adapters can be resized."""
        names = {name: f"adapter_{number}" for number, name in enumerate(self.spec.adapters, start=1)}
        for name, files in self.spec.largest_first:
            core.load_adapter(model, files, names[name], allow=self.spec.options.allow)
        return [*names.values()]


@dataclass(frozen=True)
class Probe:
    """Comparison of the merged model with the unmerged base and adapters on a few tokens.

    Attributes:
        max_difference: Largest difference in any logit.
        tolerance: Largest allowed difference.
        dtype: Dtype of the computation.
        effect: Largest change that the adapters make to any logit of the base, for comparison.
        same_top: Fraction of positions at which both models predict the same token.
    """

    max_difference: float
    tolerance: float
    dtype: str
    effect: float
    same_top: float


@dataclass(frozen=True)
class Merged:
    """Result of a merge: the directory, and dtype, number (shared ones count once) and size of the parameters."""

    folder: Path
    dtype: str
    parameters: int
    weights_bytes: int
    untied: bool
    has_tokenizer: bool
    report: core.MergeReport


def write_merged(request: MergeRequest, say: Callable[[str], None]) -> tuple[Merged, Probe]:
    """Merge adapters and write a model directory, which is published only if it is complete and verified.

    Return the result and the comparison; `say` receives a message before each slow step.

    Raises:
        MergeError: An adapter cannot be merged, or the merged model's logits differ too much from the unmerged model's.
        DiskError: Writing fails.
        LorakitError: The model or an adapter cannot be used.
    """
    with publish_directory(request.target) as folder:  # first, to detect an unwritable disk early
        tokenizer = _tokenizer(request)
        computing = probe_dtype(request.spec.source)
        say(f"Computing the logits of the base and adapters in {computing}.")
        expected = _expected_logits(request, computing, tokenizer)
        say("Merging.")
        done = _merge_into(request, folder, tokenizer)
        gc.collect()  # avoids holding both the merged and the reloaded model in memory
        say("Loading the merged model and comparing its logits.")
        loader = request.loader
        again = hub.load_model(
            hub.ModelSource("directory", str(request.target), str(folder), str(folder), ""), computing, task=loader
        )
        probe = compare(expected, _outputs(again, _probe_ids(again, loader), []), done.dtype)
        write_json(folder / MERGED_FILE, record(request, done, probe))
    return done, probe


def probe_dtype(source: hub.ModelSource) -> str:
    """Return the dtype of the comparison: "float32" if an fp32 model fits in memory, else "auto" (the stored dtype)."""
    free_bytes = this_machine().available_bytes
    return "float32" if free_bytes is None or 4.4 * hub.shape_of(source).parameters < free_bytes else "auto"


@dataclass(frozen=True)
class Expected:
    """Logits of the base alone and with its adapters on the probe tokens, each (tokens, vocabulary), and their dtype.

    `noise` is the error of a quantized base's matmuls, as a multiple of the logits' standard deviation.
    """

    base: Tensor
    adapted: Tensor
    dtype: str
    noise: float = 0.0


def compare(expected: Expected, merged: Tensor, dtype: str) -> Probe:
    """Compare the logits of a merged model, (tokens, vocabulary) in `expected.dtype`, with those of the unmerged one.

    Raises:
        MergeError: They differ by more than numerical errors and rounding to `dtype`, that of the weights, can explain.
    """
    adapted = expected.adapted
    difference = float((merged - adapted).abs().max())
    tolerance = (ROUNDING.get(dtype, 0.0) + NOISE.get(expected.dtype, 0.001) + expected.noise) * float(adapted.std())
    if not difference <= tolerance:  # also true for NaN
        raise MergeError(
            f"The merged model differs from the unmerged one: on {len(adapted)} tokens, its logits differ by up to "
            f"{difference:.3g}; rounding to {dtype} explains at most {tolerance:.3g}. Nothing was written; try "
            "--dtype float32.",
            field="dtype",
        )
    same = float((merged.argmax(-1) == adapted.argmax(-1)).float().mean())
    return Probe(difference, tolerance, expected.dtype, float((adapted - expected.base).abs().max()), same)


def record(request: MergeRequest, done: Merged, probe: Probe) -> dict[str, Any]:
    """Return the contents of `lorakit_merged.json`."""
    sites, stored = done.report.sites, request.spec.options.stored
    return {
        "format_version": 1,
        "base": {
            "name": request.spec.source.base_name,
            "name_or_path": request.spec.source.recorded_name,
            "revision": request.spec.source.revision,
        },
        "adapters": [
            {"folder": given, "weights_sha256": files.file.sha256} for given, files in request.spec.adapters.items()
        ],
        "dtype": done.dtype,
        "quantization": None if stored is None else hub.quantization_metadata(stored),
        "untied": done.untied,
        "training": _training(request.spec.files),
        "probe": asdict(probe),
        "survived": {"mean": done.report.retained, "worst": min((site.retained for site in sites), default=1.0)},
        "sites": {site.path: {"survived": site.retained, "changed": site.changed} for site in sites},
    }


def _training(adapters: Sequence[AdapterFiles]) -> dict[str, Any]:
    """Return how the adapters were trained, as far as it matters for the use of the model and all of them agree."""
    first, *others = [as_object(files.sidecar.facts.get("training")) for files in adapters]
    return {name: first[name] for name in TRAINING if name in first and all(o.get(name) == first[name] for o in others)}


def _tokenizer(request: MergeRequest) -> SavedTokenizer | None:
    """Return the tokenizer to write, or None if there is none; the weights can be merged without a tokenizer."""
    try:
        return request.spec.tokenizer
    except ModelError:
        if request.spec.source.kind == "hub":
            raise
        return None


def _expected_logits(request: MergeRequest, computing: str, tokenizer: SavedTokenizer | None) -> Expected:
    model = request.load(tokenizer, computing, request.spec.options.stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the merge loads the adapters again and issues the same warnings
        names = request.load_adapters(model)
    if not request.untie:
        _reject_tied(model, names)
    ids = _probe_ids(model, request.loader)
    stored = request.spec.options.stored
    noise = ROUNDED_ACTIVATIONS if stored is not None and stored.name == "int8" else 0.0
    return Expected(_outputs(model, ids, []), _outputs(model, ids, names), _dtype_name(model), noise)


def _merge_into(request: MergeRequest, folder: Path, tokenizer: SavedTokenizer | None) -> Merged:
    """Merge the adapters and save the model, without comparing its logits."""
    model = request.load(tokenizer)
    rounds = request.dtype != "auto" and getattr(torch, request.dtype) != model.dtype
    hub.dequantize_files(model, torch.float32 if rounds else None)  # does nothing unless the files are quantized
    if rounds:
        model.to(torch.float32)  # merge in fp32, then round once, to the requested dtype
    stored = model
    if request.spec.options.stored is not None:  # merge into the quantized base, then copy the weights to `model`
        stored = request.load(tokenizer, model.dtype, request.spec.options.stored)
    names = request.load_adapters(stored)
    report = core.merge_and_unload(stored, *names, untie=request.untie, dense=True)
    if stored is not model:
        dequantize(stored)
        grow_vocabulary(model, vocabulary_of(stored))  # `load_adapters` may have resized `stored`
        model.load_state_dict(stored.state_dict(), strict=True)
    untied = _untie_config(model)
    if request.dtype != "auto":
        model.to(getattr(torch, request.dtype))
    add_merge_record(model, {files.file.sha256: given for given, files in request.spec.adapters.items()})
    _end_as_trained(model, tokenizer, request.spec.files)
    hub.save_model(model, folder, tokenizer)
    if request.loader == "encoder" and not hub.copy_embedding_files(request.spec.source, folder):
        hub.write_embedding_files(folder, request.spec.task.target.embedding)
    return Merged(
        folder=request.target,
        dtype=_dtype_name(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_bytes=sum(part.stat().st_size for part in folder.glob("*.safetensors")),
        untied=untied,
        has_tokenizer=tokenizer is not None,
        report=report,
    )


def _end_as_trained(model: torch.nn.Module, tokenizer: SavedTokenizer | None, adapters: Sequence[AdapterFiles]) -> None:
    """Add the tokens that end turns in training to the generation config, so that any program ends answers there."""
    generation = getattr(model, "generation_config", None)
    if tokenizer is None or generation is None or _training(adapters).get("prompt_format") != "chat":
        return
    ends = end_ids(model, tokenizer, "chat")
    if ends - end_ids(model, tokenizer, "text"):
        generation.eos_token_id = sorted(ends)


def _reject_tied(model: torch.nn.Module, names: Sequence[str]) -> None:
    tied = tied_sites(model, names)
    if tied:
        path, other = tied[0]
        text = (
            f"{path} is adapted and shares its weight with {other}, so a merge would change both modules. Pass --untie "
            "to give each module its own weight, which makes the model larger."
        )
        raise MergeError(text, what=other, where=path, override="untie")


def _untie_config(model: torch.nn.Module) -> bool:
    """Return whether a merge untied the embeddings; if so, update the config to keep them untied on reload."""
    loaded: Any = model  # a transformers model
    inner, outer = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    tied = getattr(loaded.config, "tie_word_embeddings", False)
    if not tied or inner is None or outer is None or inner.weight is outer.weight:
        return False
    loaded.config.tie_word_embeddings = False
    return True


def _probe_ids(model: torch.nn.Module, loader: str) -> Tensor:
    """Return pseudorandom token ids, shape (rows, tokens), that depend only on the vocabulary and context length.

    A model that classifies rows has one output per row, so it gets more rows.
    """
    length = min(PROBE_TOKENS, context_tokens(model) or PROBE_TOKENS)
    rows = PROBE_ROWS if loader == "classification" else 1
    return torch.randint(vocabulary_of(model), (rows, length), generator=torch.Generator().manual_seed(0))


def _outputs(model: torch.nn.Module, ids: Tensor, names: Sequence[str]) -> Tensor:
    """Return the outputs of the model with the named adapters, or of the base if `names` is empty.

    The result has dtype float32 and shape (tokens, vocabulary), or (rows, classes) for a model that classifies rows, or
    (tokens, width) for a model without a head.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        if not core.adapters(model):
            return _rows(model(**inputs))
        with core.use(model, *names) if names else core.disable(model):
            return _rows(model(**inputs))


def _rows(output: Any) -> Tensor:
    """Return the logits, or the last hidden states, with all dimensions but the last combined."""
    values = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    return values.float().flatten(0, -2)


def _dtype_name(model: torch.nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")
