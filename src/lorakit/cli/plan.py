"""`lorakit plan`: estimate the parameters, memory and time of a run.

This module converts flags into arguments for `lorakit.plan`, which makes the estimate. Torch is loaded only to measure
speed or to read a model directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated

from cyclopts import Parameter

from lorakit.choices import TASK_NAMES
from lorakit.cli import console
from lorakit.cli.early import check_at_least, check_model
from lorakit.cli.flag_groups import RevisionFlag
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, UsageError
from lorakit.machine import this_machine
from lorakit.plan import MALLOC_SHARES, Cluster, Job, ModelShape, Plan, Speed, bytes_of, choose_parallel
from lorakit.plan.choosing import AUTO
from lorakit.plan.job import ASSUMED_LENGTH, PROCESS_BYTES, dtype_name
from lorakit.plan.parallel import LINK, LINKS, NETWORK, PER_NODE, link_named
from lorakit.plan.params import for_task, with_new_tokens
from lorakit.tables import format_quantity
from lorakit.train.settings.defaults import DEFAULTS


def _flag(name: str) -> Parameter:
    return Parameter(help=DEFAULTS[name].help(), negative=())


@dataclass(frozen=True)
class AdapterFlags:
    """Flags that describe the adapter; their defaults are those of `lorakit train`."""

    r: Annotated[int, _flag("r")] = DEFAULTS["r"].value
    lora_alpha: Annotated[float, _flag("lora_alpha")] = DEFAULTS["lora_alpha"].value
    lora_dropout: Annotated[float, _flag("lora_dropout")] = DEFAULTS["lora_dropout"].value
    target_modules: Annotated[list[str] | None, _flag("target_modules")] = None
    target_parameters: Annotated[
        list[str] | None,
        Parameter(
            help="Names of parameters, such as mlp.experts.down_proj; without --target-modules, only these are adapted."
        ),
    ] = None
    exclude_modules: Annotated[list[str] | None, Parameter(help="Names of modules to leave out. Default: none.")] = None
    modules_to_save: Annotated[
        list[str] | None, Parameter(help="Names of modules to train and save in full. Default: none.")
    ] = None
    bias: Annotated[str, Parameter(help="Base biases to train: none, all or lora_only. Default: none.")] = "none"
    new_tokens: Annotated[list[str] | None, _flag("new_tokens")] = None
    use_dora: Annotated[bool, _flag("use_dora")] = False
    use_rslora: Annotated[bool, _flag("use_rslora")] = False
    allow_partial_targets: Annotated[bool, _flag("allow_partial_targets")] = False
    task: Annotated[
        str | None,
        Parameter(help=f"Task of the run: {', '.join(TASK_NAMES)}. Default: causal-lm for a language model."),
    ] = None
    labels: Annotated[
        int, Parameter(help="Number of classes or tags, for classification and token-classification. Default: 2.")
    ] = 2

    def config(self) -> LoraConfig:
        """Return the adapter's config, or raise ConfigError, which names the field."""
        of_config = {each.name for each in fields(LoraConfig)}
        values = {name: value for name, value in asdict(self).items() if name in of_config}
        usual = [] if self.target_parameters else [DEFAULTS["target_modules"].value]
        values["target_modules"] = _words(self.target_modules or usual)
        values["exclude_modules"] = _words(self.exclude_modules)
        return LoraConfig(**values)


@dataclass(frozen=True)
class ParallelFlags:
    """Flags that describe the processes of the run and their GPUs."""

    nproc: Annotated[
        int | None, Parameter(help="Number of processes with one GPU each, on all nodes together. Default: 1.")
    ] = None
    gpu: Annotated[
        str | None,
        Parameter(help="Memory of each GPU, such as 24GB, into which the run has to fit. Default: the run uses a CPU."),
    ] = None
    parallel: Annotated[
        str | None,
        Parameter(
            help="Set how the processes share the base: ddp (each holds all of it), fsdp (sharded), hsdp (sharded "
            "within each node) or auto. Default: auto, the first that fits, which is ddp without --gpu."
        ),
    ] = None
    gpus_per_node: Annotated[int, Parameter(help=f"GPUs of a node. Default: {PER_NODE}.")] = PER_NODE
    link: Annotated[
        str,
        Parameter(help=f"Link between GPUs of a node: {', '.join(LINKS)}, or a rate such as 25GB/s. Default: {LINK}."),
    ] = LINK
    network: Annotated[
        str, Parameter(help=f"Link between nodes: one of the same names, or a rate. Default: {NETWORK}.")
    ] = NETWORK

    @property
    def limit_bytes(self) -> int | None:
        """Return the memory of each GPU in bytes, or None for a CPU; raise ConfigError if `gpu` is not a size."""
        return None if self.gpu is None else bytes_of(self.gpu, "gpu")

    def cluster(self) -> Cluster | None:
        """Return the processes, or None if none of these flags is given; raise ConfigError, which names the flag."""
        if self == ParallelFlags():
            return None
        _ = self.limit_bytes  # reject a wrong size before the model is read
        link, network = link_named(self.link, "link"), link_named(self.network, "network")
        return Cluster(1 if self.nproc is None else self.nproc, self.gpus_per_node, link, network)


@dataclass(frozen=True)
class JobFlags:
    """Flags that describe the job; their defaults are those of `lorakit train`."""

    per_device_train_batch_size: Annotated[
        int,
        Parameter(
            name=("--per-device-train-batch-size", "--batch-size"), help=DEFAULTS["per_device_train_batch_size"].help()
        ),
    ] = DEFAULTS["per_device_train_batch_size"].value
    max_length: Annotated[
        int | None,
        Parameter(
            help="Tokens per row, which `lorakit train` chooses by the data. Default: 512, or the model's limit."
        ),
    ] = None
    gradient_accumulation_steps: Annotated[int, _flag("gradient_accumulation_steps")] = DEFAULTS[
        "gradient_accumulation_steps"
    ].value
    recompute: Annotated[str, _flag("recompute")] = DEFAULTS["recompute"].value
    gradient_checkpointing: Annotated[bool, _flag("gradient_checkpointing")] = False
    memory_budget: Annotated[str | None, _flag("memory_budget")] = None
    fit: Annotated[str | None, _flag("fit")] = None
    accelerate: Annotated[bool, Parameter(help=DEFAULTS["accelerate"].help())] = DEFAULTS["accelerate"].value
    optimizer: Annotated[str, _flag("optimizer")] = DEFAULTS["optimizer"].value
    quantization: Annotated[str | None, _flag("quantization")] = None
    double_quantization: Annotated[bool, Parameter(help=DEFAULTS["double_quantization"].help())] = True
    base_matmul: Annotated[str, _flag("base_matmul")] = DEFAULTS["base_matmul"].value
    dtype: Annotated[
        str,
        Parameter(
            help="Precision of the base: auto, bfloat16, float16 or float32. Default: auto, which chooses as `lorakit "
            "train` does if this machine is measured, or else uses the published model's precision."
        ),
    ] = "auto"
    max_steps: Annotated[int | None, Parameter(help="Number of optimizer steps. Default: no time estimate.")] = None
    tokens: Annotated[
        int | None, Parameter(help="Number of tokens to train on, instead of --max-steps; rounded up to whole steps.")
    ] = None
    tokens_per_second: Annotated[
        float | None, Parameter(help="Training speed as printed by a run, instead of a measurement.")
    ] = None
    calibrate: Annotated[
        bool | None,
        Parameter(
            negative="--no-calibrate",
            help="Measure this machine (takes a second; loads torch). Default: only if --max-steps or --tokens "
            "requests a time estimate and neither --tokens-per-second nor --gpu is given.",
        ),
    ] = None
    processes: Annotated[ParallelFlags, Parameter(name="*", show_default=False)] = field(default_factory=ParallelFlags)

    @property
    def process_bytes(self) -> int | None:
        """Return the resident size of the process before weights are loaded, or None on a GPU."""
        return PROCESS_BYTES if self.processes.gpu is None else None


_ADAPTER, _JOB = AdapterFlags(), JobFlags()


def run(
    model: Annotated[
        str, Parameter(help="Model directory, GGUF file, config.json, smollm2, name of a known model, or Hub id.")
    ],
    /,
    *,
    ranks: Annotated[
        list[str] | None, Parameter(help="Ranks for a table of parameter counts, such as 4,8,16,32. Default: no table.")
    ] = None,
    revision: RevisionFlag = None,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
    adapter: Annotated[AdapterFlags, Parameter(name="*", show_default=False)] = _ADAPTER,
    job: Annotated[JobFlags, Parameter(name="*", show_default=False)] = _JOB,
) -> None:
    """Estimate the parameters, memory and time of a run; no weights are loaded.

    MODEL is looked up as a path, then as a packaged model (smollm2), then as a name in the catalog (gpt2,
    meta-llama/Llama-3.2-1B, ...), and finally as a Hub id. --max-steps or --tokens adds a time estimate, based on
    --tokens-per-second or on a measurement that takes about a second. --nproc and --gpu add what each process holds
    and sends if the base is replicated (ddp) or sharded (fsdp, hsdp), and which of these fits. --verbose adds formulas,
    FLOPs, notes and the derivation of the counts.
    """
    config, columns = adapter.config(), _ranks(ranks)
    model = check_model(model, revision)
    from lorakit import plan

    cluster = job.processes.cluster()
    shape, config = _for_task(model, config, adapter)
    tokens = {token.strip() for word in adapter.new_tokens or () for token in word.split(",")} - {""}
    if tokens:
        config = with_new_tokens(shape, config, len(tokens))
    plan.count(shape, config, allow_partial=adapter.allow_partial_targets)  # reject a wrong name before measuring
    wanted = _job(job, shape)
    steps = _steps(job, wanted.step_tokens * (1 if cluster is None else cluster.processes))
    dtype, speed, measured = _machine(job, wanted.dtype, steps)
    final = replace(wanted, dtype=dtype, steps=steps)
    shape = _as_loaded(shape, model, adapter.task, final.dtype)
    planned = plan.estimate(shape, config, final, speed, ranks=columns, allow_partial=adapter.allow_partial_targets)
    planned, reasons = _limited(planned, job)
    if job.max_length is None:
        reasons.append(f"assumed      rows of {final.length_tokens:,} tokens; set --max-length to that of the data")
    way, limit = job.processes.parallel or AUTO, job.processes.limit_bytes
    together = None if cluster is None else choose_parallel(planned, cluster, way, limit)
    if json:
        parallel = None if together is None else together.as_dict()
        console.emit_json({**planned.as_dict(), "machine": [*measured, *reasons], "parallel": parallel})
        return
    console.say(plan.render(planned, verbose=verbose, notes=tuple(reasons)))
    if together is not None:
        console.say("\n" + plan.render_parallel(together))
    if verbose and measured:
        console.say("\n" + "\n".join(measured))


def _for_task(model: str, config: LoraConfig, adapter: AdapterFlags) -> tuple[ModelShape, LoraConfig]:
    """Return the shape of the model for the task, and the config with the modules that the task trains in full.

    Raises:
        ConfigError: The task is unknown.
        UsageError: `--labels` is below 1.
    """
    from lorakit import hub

    if adapter.task not in (None, *TASK_NAMES):
        raise ConfigError.of("task", adapter.task, allowed=TASK_NAMES)
    check_at_least("labels", adapter.labels, 1)
    if adapter.task is None:
        return hub.shape_of(model), config
    from lorakit.tasks import TASKS

    task = TASKS[adapter.task]
    values = {"id2label": {str(n): f"LABEL_{n}" for n in range(adapter.labels)}}
    shape = hub.shape_for_task(model, task.loader, values if task.loader in hub.WITH_NEW_HEADS else {})
    return shape, for_task(config.with_fields(task_type=task.adapter_task), shape)


def _as_loaded(shape: ModelShape, model: str, task: str | None, dtype: str) -> ModelShape:
    """Return the shape with the source and dtype of the files from which a run would load the model."""
    if not shape.source.lower().endswith(".gguf"):
        return shape
    from lorakit import hub
    from lorakit.tasks import TASKS

    return hub.as_kept(shape, hub.resolve(model), TASKS[task or "causal-lm"].loader, dtype)


def _job(job: JobFlags, shape: ModelShape) -> Job:
    """Return the job of one process, without the number of steps; the precision is the published one if it is "auto".

    Raises:
        ConfigError: A value is not allowed, or two of them are incompatible.
    """
    return Job.of(
        job,
        length_tokens=job.max_length or min(ASSUMED_LENGTH, shape.positions or ASSUMED_LENGTH),
        dtype=shape.dtype if job.dtype == "auto" else job.dtype,
        process_bytes=job.process_bytes,
        malloc_share=MALLOC_SHARES["equal"] if job.fit is None else 0,
    )


def _limited(planned: Plan, job: JobFlags) -> tuple[Plan, list[str]]:
    """Return the plan with what a memory limit selects, and a line that describes the choice."""
    from lorakit.plan import within
    from lorakit.plan.budget import describe, fitting

    if job.fit is not None:
        limit = bytes_of(job.fit)
        chosen = fitting(planned, limit)[0]
        return chosen, [describe(chosen, limit)]
    if job.memory_budget is not None:
        chosen, reason = within(planned, bytes_of(job.memory_budget))
        return chosen, [reason]
    return planned, []


def _machine(job: JobFlags, dtype: str, steps: int | None) -> tuple[str, Speed | None, list[str]]:
    """Return the dtype, the speed and notes.

    The speed is measured if requested, or needed for a time estimate or for the dtype that `lorakit train` would
    choose. If the size of a GPU is given, this machine is not measured.
    """
    has_gpu = job.processes.gpu is not None
    if job.calibrate and (has_gpu or job.tokens_per_second is not None):
        other = "--gpu" if has_gpu else "--tokens-per-second"
        text = (
            f"--calibrate, which measures this machine, and {other} are mutually exclusive; omit --calibrate, and pass "
            "a known speed as --tokens-per-second."
        )
        raise UsageError(text, field="calibrate")
    from lorakit import hub

    choice = None if has_gpu or job.dtype != "auto" else hub.expected_dtype(this_machine().features)
    is_open = choice is None and job.dtype == "auto" and not has_gpu
    needs_speed = steps is not None and job.tokens_per_second is None and not has_gpu
    given = None
    if job.tokens_per_second is not None:
        given = Speed(tokens_per_second=job.tokens_per_second, source="given for LoRA training")
    if not (is_open or needs_speed if job.calibrate is None else job.calibrate):
        if job.dtype != "auto":
            return dtype, given, []
        choice = choice or hub.DtypeChoice(dtype, f"{dtype}, as published, because nothing was measured.")
        return choice.dtype, given, [f"Precision: {choice.reason}"]
    measured = hub.calibrate(with_fp16=dtype_name(dtype) == "float16", with_int8=job.base_matmul == "int8")
    notes = [measured.line()]
    if job.dtype == "auto":
        choice = hub.choose_dtype("auto", measured=measured)
        dtype = choice.dtype
        notes.append(f"Precision: {choice.reason}")
    rate = measured.flops_per_second(dtype, tuned=job.accelerate)
    basis = f"measured, {format_quantity(rate, 'FLOP/s')}"
    int8_rate = measured.int8_flops_per_second
    speed = Speed(rate, source=basis, threads=measured.threads, int8_flops_per_second=int8_rate)
    return dtype, given or speed, notes


def _steps(job: JobFlags, step_tokens: int) -> int | None:
    """Return the number of optimizer steps of the run, from --max-steps, or from --tokens and the tokens of a step."""
    for name, value in (("max_steps", job.max_steps), ("tokens", job.tokens)):
        if value is not None:
            check_at_least(name, value, 1)
    if job.tokens is None:
        return job.max_steps
    if job.max_steps is not None:
        raise UsageError("--max-steps and --tokens are mutually exclusive; pass one of them.", field="max_steps")
    return -(-job.tokens // step_tokens)


def _ranks(words: Sequence[str] | None) -> list[int]:
    ranks = []
    for word in (part for given in words or () for part in given.split(",") if part):
        if not word.strip().isdigit() or int(word) < 1:
            text = f"--ranks contains {word!r}; pass positive integers, such as 4,8,16,32."
            raise UsageError(text, what=word, field="ranks")
        ranks.append(int(word))
    return ranks


def _words(names: list[str] | None) -> list[str] | str | None:
    """Return "all-linear" for a list whose only entry is "all-linear", and any other value unchanged."""
    return "all-linear" if names is not None and [name.lower() for name in names] == ["all-linear"] else names
