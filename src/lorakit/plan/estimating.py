"""Plan a run from a model's shape, a config, a job and, optionally, the speed of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.architectures.shapes import ModelShape, replicated
from lorakit.config import LoraConfig
from lorakit.config.variants import costs_of
from lorakit.plan import activations, flops, memory, params
from lorakit.plan.flops import Flops
from lorakit.plan.job import DTYPE_BYTES, MASTER_BYTES, Job, Speed
from lorakit.plan.memory import Memory
from lorakit.plan.optimizer_state import optimizer_state
from lorakit.plan.packed import packed_files
from lorakit.plan.params import Count, Group, RankTable, rank_table
from lorakit.tables import format_percent
from lorakit.targets.resolving import SEVERAL_MODULES


@dataclass(frozen=True)
class FileSize:
    """Size of one file, with the formula that computes it, numbers filled in."""

    what: str
    formula: str
    size_bytes: int


def sizes(shape: ModelShape, counted: Count, optimizer: str = "adamw") -> list[FileSize]:
    """Return the sizes on disk for LoRA and for full fine-tuning. [docs/math.md (40)-(43)]

    Sizes of the adapter, the adapter with the state of its optimizer (Adam's two moments), the model, and a full
    fine-tuning checkpoint (fp32 with two moments).
    """
    trained, stored, base = counted.trainable, counted.saved_parameters, shape.parameters
    formula, state = optimizer_state(counted, optimizer, MASTER_BYTES)
    whole, what = f"4 × {stored:,} + {formula}", "adapter with the state of its optimizer"
    if state == 2 * MASTER_BYTES * trained:
        whole = f"3 × 4 × {trained:,}" if stored == trained else f"4 × {stored:,} + 2 × 4 × {trained:,}"
        what = "adapter with Adam's two moments"
    published = DTYPE_BYTES.get(shape.dtype, MASTER_BYTES)
    return [
        FileSize("adapter, fp32", f"4 × {stored:,}", MASTER_BYTES * stored),
        FileSize(what, whole, MASTER_BYTES * stored + state),
        FileSize(f"full model, {shape.dtype}", f"{published} × {base:,}", published * base),
        FileSize("full checkpoint with Adam's two moments", f"3 × 4 × {base:,}", 3 * MASTER_BYTES * base),
    ]


@dataclass(frozen=True)
class Method:
    """Cost of one training method: LoRA, or full fine-tuning.

    Attributes:
        tokens_per_second: Expected training speed, or None if no speed is known.
        saved_bytes: Size on disk of the trained adapter or model.
        resumable_bytes: Size on disk of a checkpoint with optimizer state.
    """

    job: Job
    trainable: int
    memory: Memory
    flops: Flops
    tokens_per_second: float | None
    saved_bytes: int
    resumable_bytes: int

    @property
    def step_seconds(self) -> float | None:
        """Return the expected duration of an optimizer step in seconds, or None if no speed is known."""
        return None if self.tokens_per_second is None else self.job.step_tokens / self.tokens_per_second

    @property
    def run_seconds(self) -> float | None:
        """Return the expected duration of the run in seconds, or None if the speed or step count is unknown.

        An evaluation takes the forward pass's fraction of the time of a step per token. [docs/math.md (112)]
        """
        if self.tokens_per_second is None or self.job.steps is None:
            return None
        evaluated = (self.job.evaluations or 0) * self.job.evaluated_tokens * self.flops.forward / self.flops.total
        return (self.job.steps * self.job.step_tokens + evaluated) / self.tokens_per_second


_MODEL_FIELDS = (
    *("name", "source", "architecture", "parameters", "active_parameters", "layers", "hidden", "vocab"),
    *("positions", "tied"),
)
_COUNT_FIELDS = ("trainable", "base", "share", "factors", "magnitudes")
_JOB_FIELDS = ("gradient_checkpointing", "batch_tokens", "step_tokens")
_METHOD_FIELDS = ("tokens_per_second", "step_seconds", "run_seconds", "saved_bytes", "resumable_bytes")


@dataclass(frozen=True)
class Plan:
    """Estimated cost of a run; `reasons` explain the counts, and `full` is full fine-tuning with the same job."""

    shape: ModelShape
    config: LoraConfig
    job: Job
    speed: Speed | None
    counted: Count
    reasons: tuple[str, ...]
    lora: Method
    full: Method
    files: tuple[FileSize, ...]
    ranks: RankTable | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the whole plan as JSON values, including everything in the text output."""
        shape, counted = self.shape, self.counted
        return {
            "model": {name: getattr(shape, name) for name in _MODEL_FIELDS},
            "adapter": {
                **{name: getattr(counted, name) for name in _COUNT_FIELDS},
                "modules_to_save": dict(counted.saved),
                "biases": counted.biases,
                "token_rows": dict(counted.rows),
                "groups": [{**asdict(group), "trainable": group.trainable} for group in counted.groups()],
                "reasons": list(self.reasons),
            },
            "job": {
                **asdict(self.job),
                **{name: getattr(self.job, name) for name in _JOB_FIELDS},
                "run_tokens": None if self.job.steps is None else self.job.steps * self.job.step_tokens,
            },
            "speed": None if self.speed is None else asdict(self.speed),
            "lora": _method_dict(self.lora),
            "full_fine_tuning": _method_dict(self.full),
            "files": [asdict(file) for file in self.files],
            "ranks": None if self.ranks is None else asdict(self.ranks),
            "notes": list(self.notes),
        }


def estimate(
    shape: ModelShape,
    config: LoraConfig,
    job: Job | None = None,
    speed: Speed | None = None,
    *,
    ranks: Sequence[int] = (),
    allow_partial: bool = False,
) -> Plan:
    """Estimate the parameter count, memory, FLOPs and time needed to train an adapter, without loading weights.

    Args:
        shape: Shape of the base, from `catalogue.published(name)` or `lorakit.hub.shape_of(model)`.
        config: The adapter's config; `target_modules` must be set.
        job: The job; by default, batches of 4 rows of 256 tokens.
        speed: Speed of the machine; without it, the plan contains no times.
        ranks: Ranks for the columns of the rank table; without ranks, the plan has no rank table.
        allow_partial: Whether targets that match nothing are reported in the notes instead of raising an error.

    Raises:
        TargetError: A target matches nothing, or matches a module that does not support LoRA.
        ConfigError: The config has no targets or contains an invalid pattern.
    """
    job = job or Job()
    # if rows are not packed, padding counts as well
    if not (job.accelerated and activations.packs(shape)):
        job = dataclasses.replace(job, mean_tokens=None, packed_tokens=None)
    shape = replicated(shape, config.layer_replication)
    config = dataclasses.replace(config, layer_replication=None)
    counted = params.count(shape, config, allow_partial=allow_partial, optimizer=job.optimizer)
    on_disk = sizes(shape, counted, job.optimizer)
    saved = [file.size_bytes for file in on_disk]
    costs, costs_of_full = flops.lora(shape, counted, job), flops.full(shape, job)
    seconds = _token_seconds(shape, counted, costs, job, speed)
    rates = _rates(speed, costs, costs_of_full, seconds)
    needs = memory.of_lora(shape, counted, config.lora_dropout, job)
    return Plan(
        shape=shape,
        config=config,
        job=job,
        speed=speed,
        counted=counted,
        reasons=tuple(reasons(counted, config)),
        lora=Method(job, counted.trainable, needs, costs, rates[0], saved[0], saved[1]),
        full=Method(job, shape.parameters, memory.of_full(shape, job), costs_of_full, rates[1], saved[2], saved[3]),
        files=tuple(on_disk),
        ranks=rank_table(shape, config, ranks, job.optimizer) if ranks else None,
        notes=(*needs.notes, *_notes(shape, counted, job, speed, seconds)),
    )


def _token_seconds(shape: ModelShape, counted: Count, costs: Flops, job: Job, speed: Speed | None) -> float | None:
    """Return the seconds per token, or None if a sublayer is not fused or the machine's matmul rate is unknown."""
    fused = activations.fused_sublayers(shape, counted, job)
    if speed is None or not 0 < 2 * len(shape.blocks) == len(fused):
        return None
    return flops.token_seconds(shape, costs, job, speed)


def _rates(speed: Speed | None, lora: Flops, full: Flops, seconds: float | None) -> tuple[float | None, float | None]:
    """Return the throughput of LoRA and of full fine-tuning in tokens per second.

    A speed in tokens per second is that of LoRA; the ratio of the FLOPs gives that of full fine-tuning.
    """
    if speed is None:
        return None, None
    is_measured = speed.tokens_per_second is not None
    of_full = speed.tokens_at(full.total) * (lora.total / full.total if is_measured else 1.0)
    return speed.tokens_at(lora.at_dtype_rate(speed)) if seconds is None else 1 / seconds, of_full


def length_warnings(shape: ModelShape, job: Job) -> list[str]:
    """Return a warning if the rows of a job are longer than the model supports."""
    if 0 < shape.positions < job.length_tokens:
        return [f"{shape.name} supports at most {shape.positions:,} tokens; the job's rows have {job.length_tokens:,}."]
    return []


def _notes(
    shape: ModelShape, counted: Count, job: Job, speed: Speed | None, token_seconds: float | None
) -> Iterator[str]:
    yield from length_warnings(shape, job)
    files = packed_files(shape)
    if files is not None:
        yield from files.notes()
    packed = job.quantization or (files.method if files is not None and files.base is not None else None)
    if packed is not None:
        yield (
            f"{packed}: every matmul dequantizes its weight first, but the times do not include this cost; "
            "the estimates of full fine-tuning are for the unquantized base."
        )
    if job.base_matmul == "int8":
        yield (
            "int8: the frozen linear layers are multiplied in int8 (W8A8), the head and the embeddings in the dtype; "
            "the estimates of full fine-tuning are for the original base."
        )
        if speed is not None and speed.tokens_per_second is None and speed.int8_flops_per_second is None:
            yield "The speed of int8 matmuls was not measured; times assume that of the dtype."
    if speed is None:
        yield ("No time estimate; pass the --tokens-per-second of an earlier run, or --calibrate to measure the speed.")
    elif speed.tokens_per_second is None:
        is_fused = token_seconds is not None
        fraction = flops.MATMUL_UTILIZATION if is_fused else speed.utilisation
        rest = "plus the time for norms, activations and softmax" if is_fused else "typical of small models on a CPU"
        yield (
            f"Times assume {format_percent(fraction, 0)} of the measured matmul speed, {rest}; the first steps of the "
            "run give a more accurate estimate."
        )
    if shape.fused or any(site.experts > 1 for site in counted.sites):
        through = f"{shape.experts_per_token} experts" if shape.experts_per_token else "all experts"
        yield (
            f"Memory and time estimates assume that each token passes through {through} per layer and that A and B "
            "run alongside the experts, as in transformers' own modules; a module that does not expose the tokens of "
            "each expert copies the whole weight in each forward pass."
        )


def _method_dict(method: Method) -> dict[str, Any]:
    return {
        "trainable": method.trainable,
        "memory": {
            "lines": [asdict(line) for line in method.memory.lines],
            "peak_bytes": method.memory.peak_bytes,
            "peak_moment": method.memory.peak_moment,
            "above_weights_bytes": method.memory.above_weights_bytes,
        },
        "flops_per_token": {**asdict(method.flops), "total": method.flops.total},
        **{name: getattr(method, name) for name in _METHOD_FIELDS},
    }


_MANY_GROUPS = 8


def reasons(counted: Count, config: LoraConfig) -> list[str]:
    """Explain in messages which modules each target matches and how the total is computed."""
    by_entry: dict[str, list[Group]] = {}
    for group in counted.groups():
        by_entry.setdefault(group.entry, []).append(group)
    messages = [_entry(entry, groups) for entry, groups in sorted(by_entry.items())]
    dropout = "Dropout has no parameters" if config.lora_dropout else "Dropout, if set, has no parameters"
    idle = dropout + (', and bias "none" adds none.' if config.bias == "none" else ".")
    messages += [_sum(counted), idle, *_notes_on_variant(config, counted)]
    if counted.frozen:
        which = "A and B of each site are" if _both_frozen(counted) else "One factor of each site is"
        whose = "their" if _both_frozen(counted) else "its"
        messages.append(f"{which} frozen; {whose} {counted.frozen:,} parameters are not included.")
    for path, count in counted.saved.items():
        messages.append(f"{path} is a saved module with {count:,} parameters.")
    for path, count in counted.rows.items():
        messages.append(f"{path} has trainable token rows with {count:,} parameters.")
    if config.bias != "none":
        messages.append(f"bias={config.bias!r} trains {counted.biases:,} biases of the base.")
    # `_entry` already reports the modules that a name matches, with counts
    messages += [note.text for note in counted.notes if note.kind != SEVERAL_MODULES]
    messages += [unmatched.text for unmatched in counted.missing]
    return messages


def _entry(entry: str, groups: list[Group]) -> str:
    parts = [f"{g.label} ({g.in_features:,}→{g.out_features:,}, {_kinds(g)}), {g.each:,} each" for g in groups]
    if len(groups) == 1:
        return f"{entry!r} matches {parts[0]}."
    if entry.lower() == "all-linear":
        return f"{entry!r} matches every dense layer except the output head: {'; '.join(parts)}."
    attention = [g.label for g in groups if "attn" in g.label or "attention" in g.label]
    mlp = [g.label for g in groups if "mlp" in g.label]
    where = ", in the attention and MLP blocks" if attention and mlp else ""
    return f"{entry!r} matches {len(groups)} different modules{where}: {'; '.join(parts)}."


def _kinds(group: Group) -> str:
    if group.experts > 1:
        return f"{group.sites} × {group.experts} experts in one parameter"
    return f"{group.sites} × {group.kind}" if group.sites > 1 else f"one {group.kind}"


def _both_frozen(counted: Count) -> bool:
    return any(len(site.frozen_factors) > 1 for site in counted.sites)


def _notes_on_variant(config: LoraConfig, counted: Count) -> list[str]:
    costs = costs_of(config)
    return [costs.note.format(total=abs(counted.own_numbers))] if costs is not None and costs.note else []


def _sum(counted: Count) -> str:
    groups = counted.groups()
    by_sites: dict[int, list[Group]] = {}
    for group in groups:
        by_sites.setdefault(group.sites, []).append(group)
    total = sum(group.trainable for group in groups)
    if len(groups) > _MANY_GROUPS:
        return f"{len(counted.sites):,} sites with {total:,} parameters in total."
    terms = []
    for count, members in by_sites.items():
        inner = " + ".join(f"{group.each:,}" for group in members)
        terms.append(f"{count} × ({inner})" if len(members) > 1 else f"{count} × {inner}")
    if _both_frozen(counted):
        return f"{' + '.join(terms)} = {total:,}."
    frozen = {factor for site in counted.sites for factor in site.frozen_factors}
    each = "out (in for an embedding)" if "A" in frozen else "in" if "B" in frozen else "(in + out)"
    each += " for each expert" if any(group.experts > 1 for group in groups) else ""
    if counted.own_numbers:
        each += " + out" if counted.magnitudes else ", plus or minus the difference made by its variant"
    if counted.factor_biases:
        each += " + out for the bias of B"
    return f"{' + '.join(terms)} = {total:,}; each site trains r × {each}."
