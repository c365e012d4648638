"""A base and adapters as one plain model directory, checked by loading it again before it gets its name.

The weights are merged site by site in fp32 or wider (`lorakit.core`); what stands on the disk is loaded anew and must
say the same as base and adapters did. Knows nothing of flags or the terminal.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit import core, hub
from lorakit.cli.adapters import load_adapters, tokenizer_for
from lorakit.cli.early import check_new_directory
from lorakit.core.layers.merged_weight import SiteMerge
from lorakit.core.merging.checks import tied_sites
from lorakit.core.model.base_view import multiply_out
from lorakit.core.model.fingerprint import note_applied, vocabulary_of
from lorakit.core.model.vocabulary import grow_vocabulary
from lorakit.durable import publish_directory, write_json
from lorakit.errors import MergeError, ModelError
from lorakit.machine import this_machine
from lorakit.plan.quantized import Quantization

if TYPE_CHECKING:
    from lorakit.core.files.adapter_folder import AdapterFiles

RECORD_FILE = "lorakit_merged.json"
PROBE_TOKENS = 48
ROUNDING = {"float32": 0.0, "float16": 0.05, "bfloat16": 0.3}
"""By dtype of the merged weights: what rounding them may change a logit by, in standard deviations of the logits."""

NOISE = {"float32": 0.001, "float16": 0.1, "bfloat16": 0.6}
"""By dtype of the comparison: what two ways to compute the same may differ by, in the same unit. In bf16 that is more
than most adapters change, so the comparison is made in fp32 wherever that fits into memory."""

ROUNDED_ACTIVATIONS = 0.3
"""What bitsandbytes' int8 may change a logit by when it evaluates, since it rounds activations; in the same unit."""


@dataclass(frozen=True)
class Order:
    """What to merge into what.

    Attributes:
        source: The base.
        adapters: The adapters' files, in order.
        folders: Their folders as the user gave them.
        target: The directory to make.
        dtype: "auto" (the base's) or a name of `hub.models.DTYPES`.
        untie: Give sites that share a weight one of their own.
        allow: Refusals of `core.load_adapter` to lift.
        quantization: How the base was stored when the adapters were trained, or None for as it is.
    """

    source: hub.ModelSource
    adapters: Sequence[AdapterFiles]
    folders: Sequence[str]
    target: Path
    dtype: str
    untie: bool
    allow: Collection[str]
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Probe:
    """How the merged directory compares with base and adapters on a few tokens.

    Attributes:
        max_difference: Largest difference of a logit.
        tolerance: What would have been too much.
        dtype: What it was computed in.
        effect: Largest change of a logit that the adapters make to the base, for comparison.
        same_top: Share of positions with the same most likely token.
    """

    max_difference: float
    tolerance: float
    dtype: str
    effect: float
    same_top: float


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        folder: Where.
        dtype: Of the weights.
        parameters: Numbers in the model, shared ones once.
        weights_bytes: Size of the safetensors files.
        untied: Input and output embeddings were one weight and are two now.
        has_tokenizer: A tokenizer was written too.
        sites: How each site took the merge.
        probe: The check, once it was made.
    """

    folder: Path
    dtype: str
    parameters: int
    weights_bytes: int
    untied: bool
    has_tokenizer: bool
    sites: tuple[SiteMerge, ...]
    probe: Probe | None


def write_merged(order: Order, say: Callable[[str], None]) -> Merged:
    """Merge and write; the directory appears whole and checked, or not at all.

    Args:
        order: What to merge into what.
        say: Told what takes long.

    Returns:
        What was written.

    Raises:
        MergeError: An adapter cannot be merged, or the directory does not say what base and adapters did.
        DiskError: The disk refuses.
        LorakitError: Model or adapters cannot be used; class and message say what.
    """
    check_new_directory(order.target)
    with publish_directory(order.target) as folder:  # first of all, so that a disk that refuses is known at once
        tokenizer = _tokenizer(order)
        computing = probe_dtype(order.source)
        say(f"Asking base and adapters, in {computing}.")
        expected = _ask_unmerged(order, computing)
        say("Merging.")
        made = _merge_into(order, folder, tokenizer)
        gc.collect()  # the merged and the reloaded model need not be in memory together
        say("Loading it again and comparing.")
        again = hub.load_model(hub.ModelSource("directory", str(order.target), str(folder), None, ""), computing)
        done = replace(made, probe=compare(expected, _logits(again, _probe_ids(again), []), made.dtype))
        write_json(folder / RECORD_FILE, record(order, done))
    return done


def probe_dtype(source: hub.ModelSource) -> str:
    """The dtype to compare in: "float32" where the model fits into this machine's memory so, else "auto" (its own)."""
    free_bytes = this_machine().available_bytes
    return "float32" if free_bytes is None or 4.4 * hub.shape_of(source).parameters < free_bytes else "auto"


@dataclass(frozen=True)
class Expected:
    """What base and adapters say on the probe.

    Attributes:
        base: Logits of the base alone, (tokens, vocabulary).
        adapted: Of base and adapters, (tokens, vocabulary).
        dtype: What they were computed in.
        noise: What the quantised base's own products may be off by, in standard deviations of the logits.
    """

    base: Tensor
    adapted: Tensor
    dtype: str
    noise: float = 0.0


def compare(expected: Expected, merged: Tensor, dtype: str) -> Probe:
    """Whether a merged model says what base and adapters say.

    Args:
        expected: What they say.
        merged: Logits of the merged model, (tokens, vocabulary), computed in the same dtype.
        dtype: Of the merged weights.

    Returns:
        The comparison.

    Raises:
        MergeError: They differ by more than the dtypes explain.
    """
    adapted = expected.adapted
    difference = float((merged - adapted).abs().max())
    tolerance = (ROUNDING.get(dtype, 0.0) + NOISE.get(expected.dtype, 0.001) + expected.noise) * float(adapted.std())
    if not difference <= tolerance:  # also where it is NaN
        raise MergeError(
            f"The merged directory does not say what base and adapters say: on {len(adapted)} tokens the logits differ "
            f"by up to {difference:.3g}, and {dtype} explains {tolerance:.3g}. Nothing was written; try "
            "--dtype float32."
        )
    same = float((merged.argmax(-1) == adapted.argmax(-1)).float().mean())
    return Probe(difference, tolerance, expected.dtype, float((adapted - expected.base).abs().max()), same)


def record(order: Order, done: Merged) -> dict[str, Any]:
    """What `lorakit_merged.json` holds.

    Args:
        order: What was asked for.
        done: What was written.
    """
    shares = [site.survived for site in done.sites]
    return {
        "format_version": 1,
        "base": {"name": order.source.base_name, "name_or_path": order.source.recorded_name},
        "adapters": [
            {"folder": given, "weights_sha256": files.file.sha256}
            for given, files in zip(order.folders, order.adapters, strict=True)
        ],
        "dtype": done.dtype,
        "quantization": None if order.quantization is None else hub.quantiser_facts(order.quantization),
        "untied": done.untied,
        "probe": asdict(done.probe) if done.probe else None,
        "survived": {"mean": sum(shares) / len(shares) if shares else 1.0, "worst": min(shares, default=1.0)},
        "sites": {site.path: {"survived": site.survived, "changed": site.changed} for site in done.sites},
    }


def _tokenizer(order: Order) -> Any:
    """The tokenizer to write, or None where there is none: the weights can be merged without."""
    try:
        return tokenizer_for(order.source, order.adapters)
    except ModelError:
        if order.source.kind == "hub":
            raise
        return None


def _ask_unmerged(order: Order, computing: str) -> Expected:
    model = hub.load_model(order.source, computing, quantization=order.quantization)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again, and are shown, when the adapters are loaded to be merged
        names = load_adapters(model, order.adapters, order.allow)
    if not order.untie:
        _refuse_tied(model, names)
    ids = _probe_ids(model)
    noise = ROUNDED_ACTIVATIONS if order.quantization is not None and order.quantization.name == "int8" else 0.0
    return Expected(_logits(model, ids, []), _logits(model, ids, names), _dtype_name(model), noise)


def _merge_into(order: Order, folder: Path, tokenizer: Any) -> Merged:
    """Merge and save; the probe is still to come."""
    model = hub.load_model(order.source)
    if order.dtype != "auto" and getattr(torch, order.dtype) != model.dtype:
        model.to(torch.float32)  # merged there and rounded once, on the way to the wanted dtype
    stored = model
    if order.quantization is not None:  # what was trained on is merged, and its numbers are put into the plain model
        stored = hub.load_model(order.source, model.dtype, quantization=order.quantization)
    names = load_adapters(stored, order.adapters, order.allow)
    report = core.merge_and_unload(stored, *names, untie=order.untie, dense=True)
    if stored is not model:
        multiply_out(stored)
        grow_vocabulary(model, vocabulary_of(stored))  # as it did for the adapters
        model.load_state_dict(stored.state_dict(), strict=True)
    untied = _untie_config(model)
    if order.dtype != "auto":
        model.to(getattr(torch, order.dtype))
    note_applied(model, {f.file.sha256: given for f, given in zip(order.adapters, order.folders, strict=True)})
    hub.save_model(model, folder, tokenizer)
    return Merged(
        folder=order.target,
        dtype=_dtype_name(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_bytes=sum(part.stat().st_size for part in folder.glob("*.safetensors")),
        untied=untied,
        has_tokenizer=tokenizer is not None,
        sites=report.sites,
        probe=None,
    )


def _refuse_tied(model: Any, names: Sequence[str]) -> None:
    tied = tied_sites(model, names)
    if tied:
        path, other = tied[0]
        raise MergeError(
            f"{path} is adapted and shares its weight with {other}, so a merge would change both. Give --untie: "
            "they become two weights, and the model grows by one of them."
        )


def _untie_config(model: Any) -> bool:
    """Say in the config that the embeddings are two weights, where a merge made them two, or a load would tie them."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if not tied or inner is None or outer is None or inner.weight is outer.weight:
        return False
    model.config.tie_word_embeddings = False
    return True


def _probe_ids(model: Any) -> Tensor:
    """Token ids to compare on, (1, tokens): the same for every model of this vocabulary."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    limit = getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS
    generator = torch.Generator().manual_seed(0)
    return torch.randint(rows, (1, min(PROBE_TOKENS, int(limit))), generator=generator)


def _logits(model: Any, ids: Tensor, names: Sequence[str]) -> Tensor:
    """Logits with adapters or, with none, of the base: (tokens, vocabulary), fp32."""
    with torch.no_grad():
        if not core.adapters(model):
            return model(input_ids=ids, use_cache=False).logits[0].float()
        with core.use(model, *names) if names else core.disable(model):
            return model(input_ids=ids, use_cache=False).logits[0].float()


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
