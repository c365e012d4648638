"""`lorakit generate`: generate text with a model and its adapters, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit import allocator
from lorakit.choices import BASE_MATMULS, DTYPES, MATMUL_IN_DTYPE, MATMUL_IN_INT8, SAMPLING_RULES
from lorakit.cli import adapters, console, early
from lorakit.cli.flag_groups import DeviceFlag, DtypeFlag, RevisionFlag
from lorakit.cli.prompts import first_line, read_chats, read_prompts, read_tools, show, summary
from lorakit.errors import MergeError, UsageError
from lorakit.plan.quantized import stored_as
from lorakit.terminal import working
from lorakit.train.settings.defaults import DEFAULTS

if TYPE_CHECKING:
    from lorakit.data import Conversation
    from lorakit.session import Session


WORTHWHILE_TOKENS = 128
"""Minimum number of tokens for an automatic merge. For SmolLM2-135M with rank 16 on all linear layers, a merge pays for
itself after about a hundred tokens. Larger models need more tokens, because the adapter's relative overhead is lower.
"""


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit generate`."""

    model: adapters.ModelFlag = None
    revision: RevisionFlag = None
    adapter: Annotated[
        list[str] | None,
        Parameter(help=f"{adapters.NAMES}. With several, the outputs of the base and each adapter are compared."),
    ] = None
    base: Annotated[bool, Parameter(negative=(), help="Show the base's answer next to a single adapter's.")] = False
    prompt: Annotated[
        list[str] | None,
        Parameter(
            help="Prompts, answered one by one. Default: read a prompt from standard input; in a terminal, a line."
        ),
    ] = None
    prompt_file: Annotated[list[Path] | None, Parameter(help="Files with one prompt each.")] = None
    messages: Annotated[
        list[Path] | None,
        Parameter(
            help="JSON or JSONL files with conversations to continue: lists of messages, or objects with messages, "
            "tools and chat_template_kwargs, as in training data."
        ),
    ] = None
    tools: Annotated[
        Path | None, Parameter(help="JSON file with a list of functions (JSON schemas) that the model may call.")
    ] = None
    chat: Annotated[
        bool | None,
        Parameter(
            help="Format the prompt as a user turn with the chat template, instead of continuing it as plain text. "
            "Default: chat if the tokenizer has a template.",
            show_default=False,
        ),
    ] = None
    system: Annotated[str | None, Parameter(help="System message before the user's turn.")] = None
    max_new_tokens: Annotated[int, Parameter(help="Maximum length of an answer in tokens.")] = 256
    stop: Annotated[list[str] | None, Parameter(help="Texts that end an answer, which does not include them.")] = None
    temperature: Annotated[
        float, Parameter(help="Sampling temperature; 0 selects the most likely token, so answers are reproducible.")
    ] = 0.0
    top_p: Annotated[
        float, Parameter(help="Sample from the smallest set of tokens that reaches this total probability.")
    ] = 1.0
    top_k: Annotated[int, Parameter(help="Sample only from this many of the most likely tokens; 0 means all.")] = 0
    min_p: Annotated[
        float,
        Parameter(help="Sample only from tokens with at least this fraction of the most likely one's probability."),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Parameter(help="Divide the logits of tokens in the prompt and the answer by this if positive, else multiply."),
    ] = 1.0
    seed: Annotated[int, Parameter(help="Sampling seed, the same for every answer.")] = 0
    merged: Annotated[
        bool | None,
        Parameter(
            help="Merge a single adapter into the base in memory before generating. Generation is then faster, with "
            "the same results up to rounding. Default: merge if the merge is exact (float32), the base itself does "
            f"not answer, and at least {WORTHWHILE_TOKENS} tokens may be generated.",
            show_default=False,
        ),
    ] = None
    dtype: DtypeFlag = "auto"
    device: DeviceFlag = "auto"
    quantization: Annotated[str | None, Parameter(help=DEFAULTS["quantization"].help())] = None
    double_quantization: Annotated[bool, Parameter(help=DEFAULTS["double_quantization"].help())] = True
    base_matmul: Annotated[
        str,
        Parameter(
            help="Select how the frozen linear layers are multiplied: dtype, or int8, an approximation that is faster "
            "on a CPU with int8 units. The input scales are those of the adapter's run (--base-matmul int8 of train), "
            "or calibrated on the prompts."
        ),
    ] = MATMUL_IN_DTYPE


NO_FLAGS = Flags()


def run(
    *,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    allow: Annotated[adapters.Allowances, Parameter(name="*")] = adapters.NONE_ALLOWED,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> None:
    """Generate text; the answer is streamed to standard output, and everything else goes to standard error.

    --verbose adds the token count and speed of each answer, and whether the adapter was merged first.
    """
    base = _check(flags)
    folders = early.adapter_folders(flags.adapter or ())
    flags = replace(flags, adapter=[*folders])
    quantization = stored_as(flags.quantization, flags.double_quantization)
    tools = read_tools(flags.tools) if flags.tools else ()
    prompts: list[str | Conversation] = [*read_chats(flags.messages or ())]
    if not prompts:
        prompts += read_prompts(flags.prompt or (), flags.prompt_file or ())
    allocator.limit_compiled_matmuls()  # every prompt length adds new matmul shapes

    from lorakit import hub
    from lorakit.generate import Sampling
    from lorakit.session import Answer, Session, SessionOptions, session_spec
    from lorakit.session.prompts import encode_prompts, end_ids, prompt_format, until_ended
    from lorakit.tasks import CAUSAL_LM

    sampling = Sampling(**_sampling(flags))
    allowed = adapters.overridden(asdict(allow))
    revision = flags.revision if base is None else None  # the name of a given base has it
    options = SessionOptions(flags.dtype, flags.device, quantization, flags.base_matmul, allowed, revision)
    files = enumerate(adapters.read_adapters([*folders.values()]), start=1)
    numbered = {f"adapter_{number}": one for number, one in files}
    spec = session_spec(base, numbered, options, CAUSAL_LM.name, console.note)
    spec.check_generates()
    hub.require(spec.source)
    console.remarks(spec.remarks)
    form, remark = prompt_format(spec.tokenizer, spec.facts, True if flags.messages or tools else flags.chat)
    console.remarks([remark] if remark else [])
    encoded = encode_prompts(prompts, spec.tokenizer, form, flags.system, tools)
    with adapters.naming_flags():
        session = Session.load(spec, encoded)
    names: list[str | None] = [*([None] if flags.base or len(numbered) != 1 else []), *numbered]
    labels: dict[str | None, str] = {None: "base", **dict(zip(numbered, folders, strict=True))}
    if len(names) == 1:
        _merge(session, flags, len(prompts), labels[names[0]], console.note if verbose else console.quiet)
    console.remarks(session.remarks[len(spec.remarks) :])
    ends = end_ids(session.model, spec.tokenizer, form)
    stream = partial(session.stream, max_new_tokens=flags.max_new_tokens, sampling=sampling, eos_ids=ends)
    rows = [name if name in session.adapters else None for name in names]  # none is left after a merge
    results = []
    for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        answers = [Answer(labels[name], spec.tokenizer, ids, flags.stop or ()) for name in names]
        if len(prompts) > 1 and not json:
            console.say(("\n" if number else "") + f"> {first_line(summary(prompt))}\n")
        with working("generating"):
            show(answers, until_ended(answers, stream([ids] * len(rows), rows)), quiet=json, verbose=verbose)
        results.append({"prompt": summary(prompt), "answers": [answer.as_dict() for answer in answers]})
    if json:
        dtype = str(session.model.dtype).removeprefix("torch.")
        facts = {"model": spec.source.given, "dtype": dtype, "device": str(session.device), "chat": form == "chat"}
        facts |= {"merged": bool(session.merged), "base_matmul": session.base_matmul}
        console.emit_json({**facts, "sampling": asdict(sampling), "results": results})


def _merge(session: Session, flags: Flags, prompts: int, folder: str, detail: Callable[[str], None]) -> None:
    """Merge the only adapter into the base in memory if the flags ask for it, or if the merge is exact and saves time.

    Raises:
        MergeError: The requested merge is not exact or not possible. The model is unchanged.
    """
    wanted = flags.merged if flags.base_matmul == MATMUL_IN_DTYPE else False
    if not session.adapters or wanted is False:
        return
    if wanted is None and prompts * flags.max_new_tokens < WORTHWHILE_TOKENS:
        return
    try:
        session.merge()
    except MergeError as refusal:  # some problems, such as NaN in the result, appear only during the merge
        if wanted:
            text = f"{folder}: --merged requires an exact merge, and this one is not exact. {refusal} Omit --merged."
            raise MergeError(text, where=folder) from None
        return
    dtype = str(session.model.dtype).removeprefix("torch.")
    detail(f"{folder}: merged into the base in memory, which is exact in {dtype} (disable with --no-merged)")


def _sampling(flags: Flags) -> dict[str, Any]:
    """Return the flags that are settings of `lorakit.generate.Sampling`, by name."""
    return {name: getattr(flags, name) for name in SAMPLING_RULES if hasattr(flags, name)}


def _check(flags: Flags) -> str | None:
    """Check the flags, and return the name of the base, with its revision, or None if the adapters name it."""
    early.check_sampling(**_sampling(flags))
    early.check_at_least("max_new_tokens", flags.max_new_tokens, 1)
    if not all(flags.stop or ()):
        raise UsageError("--stop needs a text that is not empty.", field="stop")
    early.check_choice("dtype", flags.dtype, DTYPES)
    early.check_device(flags.device)
    base = early.check_base(flags.model, flags.revision, flags.adapter)
    _check_chat(flags)
    early.check_choice("base_matmul", flags.base_matmul, BASE_MATMULS)
    other = "--quantization" if flags.quantization else "--merged" if flags.merged else ""
    if flags.base_matmul == MATMUL_IN_INT8 and other:
        text = f"--base-matmul int8 cannot be combined with {other}, which also changes the base; omit one of them."
        raise UsageError(text, field="base_matmul")
    if flags.merged and (flags.base or len(flags.adapter or ()) != 1):
        problem = "there are several answers" if flags.adapter else "there is no adapter"
        text = f"--merged needs exactly one adapter and no other answer, but {problem}; omit --merged."
        raise UsageError(text, field="merged")
    return base


def _check_chat(flags: Flags) -> None:
    """Check the flags that need the chat template."""
    if flags.system is not None and flags.chat is False:
        text = "--system needs the chat template, but --no-chat disables it; pass one of them."
        raise UsageError(text, field="system")
    texts = [name for name in ("prompt", "prompt_file", "system") if getattr(flags, name)]
    if flags.messages and texts:
        one = texts[0].replace("_", "-")
        text = f"--messages contains whole conversations and cannot be combined with --{one}; omit one of them."
        raise UsageError(text, field="messages")
    if (flags.messages or flags.tools) and flags.chat is False:
        text = "--messages and --tools need the chat template, but --no-chat disables it; omit one of them."
        raise UsageError(text, field="chat")
