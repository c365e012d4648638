"""`verify`: ask runtimes for an adapter's log-probabilities and greedy tokens, and compare them with lorakit's."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lorakit.choices import GgufType
from lorakit.errors import ConfigError, NonFiniteError, UsageError
from lorakit.generate import context_tokens
from lorakit.session import Session, SessionOptions, SessionSpec, session_spec
from lorakit.session.prompts import end_ids, prompt_format
from lorakit.session.spec import read_adapter
from lorakit.verify.http_client import host_of
from lorakit.verify.llama_cpp import open_gguf, open_merged_gguf
from lorakit.verify.loaded import ADAPTER, SessionRuntime, chosen, open_merged, open_reloaded, package_versions
from lorakit.verify.mlx import open_mlx
from lorakit.verify.prompts import MOST_TOKENS, Prompt, read_prompts
from lorakit.verify.report import JUDGED_DTYPE, OWN_BASE, Comparison, GreedyDifference, VerifyReport
from lorakit.verify.runtime import BASE, Runtime, RuntimeRequest
from lorakit.verify.servers import open_url

CANARY_PROMPTS = 3
"""Number of prompts for which the other models of a runtime are asked."""

TOP = 50
"""Number of most likely tokens whose log-probabilities are kept at each greedy token."""


@dataclass(frozen=True)
class RuntimeEntry:
    """Function that opens an adapter in a runtime, and the largest allowed difference in float32."""

    open: Callable[[str, RuntimeRequest], contextlib.AbstractContextManager[Runtime]]
    bound: float


RUNTIMES: Mapping[str, RuntimeEntry] = {
    "reloaded": RuntimeEntry(lambda _, request: open_reloaded(request), 1e-4),
    "merged": RuntimeEntry(lambda _, request: open_merged(request), 1e-4),
    "gguf": RuntimeEntry(lambda _, request: open_gguf(request), 1e-3),
    "gguf-merged": RuntimeEntry(lambda _, request: open_merged_gguf(request), 1e-3),
    "mlx": RuntimeEntry(lambda _, request: open_mlx(request), 1e-3),
    "http": RuntimeEntry(open_url, 1e-3),
    "https": RuntimeEntry(open_url, 1e-3),
}
"""Name of a runtime, or scheme of a server's URL -> its entry."""


@dataclass(frozen=True)
class VerifyOptions:
    """Settings of a comparison.

    Attributes:
        model: The base; None for the one that the adapter names.
        data: Files with held-out prompts; the packaged prompts by default.
        prompts: Number of prompts.
        new_tokens: Number of greedy tokens per prompt.
        session: How lorakit loads the base; values of other dtypes than float32 are reported, not judged.
        base_gguf: See `RuntimeRequest`, as the others.
    """

    model: str | None = None
    data: Sequence[str] = ()
    prompts: int = 20
    new_tokens: int = 16
    session: SessionOptions = SessionOptions(dtype="float32")  # noqa: RUF009 - frozen
    base_gguf: Path | None = None
    outtype: GgufType = "F32"
    served_model: str | None = None
    key: str | None = None
    timeout: float = 60.0


@dataclass(frozen=True)
class Reference:
    """lorakit's answer to a prompt.

    Attributes:
        given: The prompt's tokens and then lorakit's greedy tokens.
        greedy: The greedy tokens.
        adapted: Log-probability of each given token but the first, with the adapter.
        base: The same of the base.
        tops: For each greedy token, the most likely tokens -> their log-probabilities.
    """

    prompt: Prompt
    ids: Sequence[int]
    greedy: Sequence[int]
    adapted: Sequence[float]
    base: Sequence[float]
    tops: Sequence[Mapping[int, float]]

    @property
    def given(self) -> list[int]:
        """The prompt's tokens and then the greedy ones."""
        return [*self.ids, *self.greedy]


@dataclass(frozen=True)
class Answers:
    """A runtime's answers to the prompts.

    Attributes:
        encoded: Token ids of each prompt; None if the runtime does not tell them.
        values: For each prompt, the log-probabilities of the given tokens, with the adapter.
        greedy: The runtime's greedy tokens; None if it does not tell them.
        others: Name of another model -> its log-probabilities for the first prompts.
    """

    encoded: Sequence[Sequence[int] | None]
    values: Sequence[Sequence[float]]
    greedy: Sequence[Sequence[int] | None]
    others: Mapping[str, Sequence[Sequence[float]]]


def entry_of(target: str) -> RuntimeEntry:
    """Return the entry of a runtime's name or a server's URL.

    Raises:
        ConfigError: There is no such runtime.
        UsageError: The URL is not that of a server.
    """
    name, is_url, _ = target.partition("://")
    if name not in RUNTIMES or bool(is_url) != name.startswith("http"):
        raise ConfigError.of("against", target, allowed=[*list(RUNTIMES)[:-2], "URL"])
    if is_url:
        host_of(target)
    return RUNTIMES[name]


def verify(
    adapter: str | Path,
    against: Sequence[str],
    options: VerifyOptions = VerifyOptions(),
    say: Callable[[str], None] = lambda text: None,
) -> VerifyReport:
    """Compare an adapter's answers in runtimes with lorakit's; nothing is kept on disk.

    Args:
        adapter: Directory of an adapter or a run, or Hub id.
        against: Names of runtimes ("reloaded", "merged", "gguf", "mlx") and URLs of servers.
        options: How they are asked.
        say: Receives a message before each slow step.

    Raises:
        ConfigError: A runtime is unknown.
        UsageError: The context has no room for a prompt and the new tokens.
        NonFiniteError: A runtime, or lorakit, computes NaN or infinite log-probabilities.
        LorakitError: A runtime cannot be opened or asked; the error class and message say why.
    """
    entries = {target: entry_of(target) for target in against}
    files = read_adapter(adapter)
    spec = session_spec(options.model, {ADAPTER: files}, options.session, say=say)
    spec.check_generates()
    prompts = read_prompts(spec, options.data, options.prompts)
    with tempfile.TemporaryDirectory(prefix="lorakit-verify-") as temporary:
        say(f"lorakit: answering {len(prompts)} prompts")
        request, references = _answered(spec, prompts, options, Path(temporary))
        comparisons = []
        for number, (target, entry) in enumerate(entries.items()):
            say(f"{target}: opening")
            workspace = Path(temporary) / str(number)
            workspace.mkdir()
            with entry.open(target, replace(request, workspace=workspace)) as runtime:
                say(f"{target}: asking {runtime.title}")
                answers = _asked(target, runtime, references, options.new_tokens)
                comparisons.append(_compared(target, runtime, references, answers, request))
    return VerifyReport(
        adapter=str(adapter),
        weights_sha256=files.file.sha256,
        base=spec.source.base_name,
        dtype=request.dtype,
        prompts=", ".join(options.data) or "packaged",
        effect=max(_largest(one.adapted, one.base) for one in references),
        versions=package_versions("lorakit", "torch", "transformers"),
        comparisons=comparisons,
    )


def _answered(
    spec: SessionSpec, prompts: Sequence[Prompt], options: VerifyOptions, workspace: Path
) -> tuple[RuntimeRequest, list[Reference]]:
    """Return what runtimes need to know of the model, and lorakit's answers."""
    with Session.load(spec) as session:
        form, _ = prompt_format(spec.tokenizer, spec.facts, None)
        limit = context_tokens(session.model) or math.inf
        length = int(min(limit - options.new_tokens - 1, MOST_TOKENS))
        if length < 1:
            text = f"--max-new-tokens {options.new_tokens} leaves no room for a prompt in {limit} tokens; pass fewer."
            raise UsageError(text, what=options.new_tokens, field="max_new_tokens")
        request = RuntimeRequest(
            spec=spec,
            workspace=workspace,
            dtype=str(session.model.dtype).removeprefix("torch."),
            end_ids=frozenset(end_ids(session.model, spec.tokenizer, form)),
            added_ids=frozenset(getattr(spec.tokenizer, "added_tokens_decoder", ())),
            context=max(len(prompt.ids) for prompt in prompts) + options.new_tokens + 1,
            base_gguf=options.base_gguf,
            outtype=options.outtype,
            served_model=options.served_model,
            key=options.key,
            timeout=options.timeout,
        )
        runtime = SessionRuntime(session, request)
        return request, [_reference(runtime, prompt, length, options.new_tokens) for prompt in prompts]


def _reference(runtime: SessionRuntime, prompt: Prompt, length: int, count: int) -> Reference:
    ids = prompt.ids[:length]
    greedy = runtime.greedy(ids, count)
    given = [*ids, *greedy]
    scores = runtime.scores(given)
    tops = [row.topk(min(TOP, len(row))) for row in scores[len(ids) - 1 : -1]]
    return Reference(
        prompt=prompt,
        ids=ids,
        greedy=greedy,
        adapted=_finite(chosen(scores, given), "lorakit"),
        base=_finite(runtime.log_probabilities(given, BASE), "lorakit"),
        tops=[dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in tops],
    )


def _asked(target: str, runtime: Runtime, references: Sequence[Reference], count: int) -> Answers:
    """Ask a runtime for every prompt, and its other models for the first ones."""
    with contextlib.ExitStack() as stack:
        each: Any = map
        if runtime.parallel > 1:
            pool = ThreadPoolExecutor(runtime.parallel)
            stack.callback(pool.shutdown, cancel_futures=True)  # after an error, no more prompts
            each = pool.map

        def values(rows: Sequence[Reference], other: str | None = None) -> list[Sequence[float]]:
            found = each(lambda one: runtime.log_probabilities(one.given, other), rows)
            return [_finite(one, target) for one in found]

        return Answers(
            encoded=[*each(lambda one: runtime.encode(one.prompt), references)],
            values=values(references),
            greedy=[*each(lambda one: runtime.greedy(one.ids, count), references)],
            others={name: values(references[:CANARY_PROMPTS], name) for name in runtime.others},
        )


def _compared(
    target: str, runtime: Runtime, references: Sequence[Reference], answers: Answers, request: RuntimeRequest
) -> Comparison:
    """Compare a runtime's answers with lorakit's."""
    is_told = all(ids is not None for ids in answers.encoded)
    differences = [
        _first_difference(index, one, theirs, request.end_ids)
        for index, (one, theirs) in enumerate(zip(references, answers.greedy, strict=True))
        if theirs is not None
    ]
    differing = [one for one in differences if one is not None]
    some = references[:CANARY_PROMPTS]
    distances = {
        name: max(_largest(values, one.adapted) for values, one in zip(rows, some, strict=True))
        for name, rows in answers.others.items()
    }
    base = None
    if BASE in answers.others:
        base = max(_largest(values, one.base) for values, one in zip(answers.others[BASE], some, strict=True))
    return Comparison(
        runtime=target,
        title=runtime.title,
        versions=runtime.versions,
        dtype=runtime.dtype
        if request.dtype in (runtime.dtype, JUDGED_DTYPE)
        else f"{runtime.dtype}, lorakit's {request.dtype}",
        bound=entry_of(target).bound,
        prompts=len(references),
        tokens=sum(map(len, answers.values)),
        other_tokens=tuple(index for index, one in enumerate(references) if answers.encoded[index] != [*one.prompt.ids])
        if is_told
        else None,
        difference=max(_largest(values, one.adapted) for values, one in zip(answers.values, references, strict=True)),
        distances={OWN_BASE: max(_largest(one.base, one.adapted) for one in references), **distances},
        base_difference=base,
        greedy_same=len(differences) - len(differing) if len(differences) == len(references) else None,
        greedy_first=max(differing, key=lambda one: one.gap, default=None),
    )


def _first_difference(
    index: int, ours: Reference, theirs: Sequence[int], end_ids: Collection[int]
) -> GreedyDifference | None:
    """Return where two answers differ first, or None; each may leave out the token that ends it."""
    rows = zip_longest(_without_end(ours.greedy, end_ids), _without_end(theirs, end_ids))
    for position, (own, other) in enumerate(rows):
        if own != other:
            top = ours.tops[position] if position < len(ours.tops) else {}
            least = min(top.values(), default=-math.inf)
            gap = math.inf if own is None or other is None else top[own] - top.get(other, least)
            return GreedyDifference(index, position, own, other, gap)
    return None


def _without_end(tokens: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """Return an answer without the token that ends it."""
    return [*tokens[:-1]] if tokens and tokens[-1] in end_ids else [*tokens]


def _largest(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference of two lists of log-probabilities of the same tokens."""
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0)


def _finite(values: Sequence[float], who: str) -> Sequence[float]:
    """Return log-probabilities, which must all be finite, because a comparison with NaN finds nothing."""
    if all(map(math.isfinite, values)):
        return values
    raise NonFiniteError(f"{who}: computes log-probabilities that are NaN or infinite.", what=who, where=who)
