"""`lorakit check`: what other runtimes would do with an adapter, from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.choices import MAX_RANK, RUNTIME_NAMES
from lorakit.cli import console
from lorakit.cli.adapters import NAME
from lorakit.cli.early import adapter_folders, check_at_least, check_choice, check_model
from lorakit.errors import UsageError
from lorakit.tables import format_count

if TYPE_CHECKING:
    from lorakit.durable import JsonValue
    from lorakit.export.checking import Check, RuleMatch


def run(
    adapter: Annotated[str, Parameter(help=f"{NAME}, of lorakit or PEFT.")],
    *,
    runtimes: Annotated[
        list[str] | None,
        Parameter(name="--for", help=f"Runtimes, separated by commas: {', '.join(RUNTIME_NAMES)}. Default: all."),
    ] = None,
    base: Annotated[
        str | None, Parameter(help="Base that the runtime serves; names, shapes and chat templates are compared.")
    ] = None,
    max_rank: Annotated[int, Parameter(help="Rank that the runtime is started for (--max-lora-rank).")] = MAX_RANK,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> int:
    """Check what other runtimes would do with an adapter, from its files; no runtime and no weights are loaded.

    The exit code is 1 if a runtime would give other answers than the adapter was trained for, without an error; an
    adapter that is rejected is reported with exit code 0. --verbose adds what is fine, and the source of each rule.

    Raises:
        UsageError: --for names no runtime.
        ConfigError: A runtime is unknown.
        AdapterFileError: A directory contains no adapter, or a file is damaged.
    """
    names = [name for word in runtimes or RUNTIME_NAMES for name in word.split(",") if name]
    for name in names:
        check_choice("for", name, RUNTIME_NAMES)
    if not names:
        raise UsageError("--for names no runtime; omit it to check all.", field="for", allowed=RUNTIME_NAMES)
    check_at_least("max_rank", max_rank, 1)
    if base is not None:
        check_model(base)
    ((given, folder),) = adapter_folders([adapter]).items()
    from lorakit.export.checking import check
    from lorakit.export.facts import adapter_facts, base_facts

    facts = adapter_facts(folder, None if base is None else base_facts(base), max_rank)
    found = check(facts, list(dict.fromkeys(names)))
    if json:
        console.emit_json(as_dict(given, found))
    else:
        console.say(_text(given, found, verbose))
    return 1 if found.is_silent else 0


def as_dict(given: str, found: Check) -> dict[str, JsonValue]:
    """Return a check as JSON values: per runtime its version, verdict and rules."""
    from lorakit.export.rules import RUNTIMES

    runtimes = {
        name: {
            "version": RUNTIMES[name].version,
            "verdict": found.verdict(name).value,
            "rules": [_rule(match) for match in matches],
        }
        for name, matches in found.matches.items()
    }
    return {
        "adapter": given,
        "silent": found.is_silent,
        "runtimes": runtimes,
        "not_compared": list(found.not_compared),
    }


def _rule(match: RuleMatch) -> dict[str, JsonValue]:
    return {
        "condition": match.condition,
        "evidence": match.evidence,
        "effect": match.rule.effect.value,
        "source": match.rule.source,
        "known": match.rule.known,
        "remedy": match.remedy,
    }


def _text(given: str, found: Check, verbose: bool) -> str:
    from lorakit.export.rules import FINE, RUNTIMES

    rows = []
    details: list[str] = []
    for name, matches in found.matches.items():
        shown = [match for match in matches if verbose or match.rule.effect is not FINE]
        version = f"{name} {RUNTIMES[name].version}"
        rows.append([version, found.verdict(name).value, _reasons(shown)])
        details += ["", version, *(line for match in shown for line in _lines(match, verbose))] if shown else []
    lines = [f"{console.inline(given)}:", "", console.table(["runtime", "verdict", "because of"], rows), *details]
    if found.not_compared:
        many = format_count(len(found.not_compared), "comparison")
        lines += ["", f"{many} with the base left out; pass --base: {', '.join(found.not_compared)}"]
    return "\n".join(lines)


def _reasons(matches: Sequence[RuleMatch]) -> str:
    return ", ".join(match.condition for match in matches)


def _lines(match: RuleMatch, verbose: bool) -> list[str]:
    lines = [f"- {match.rule.effect.value}: {console.inline(match.evidence)}"]
    lines += [f"    source: {match.rule.source} ({match.rule.known})"] if verbose else []
    return lines + ([f"    remedy: {console.inline(match.remedy)}"] if match.remedy else [])
