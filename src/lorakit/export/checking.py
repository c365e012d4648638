"""Apply the rules about other runtimes to what is known of an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.export.conditions import CONDITIONS, VLLM_RANKS, vllm_limit
from lorakit.export.facts import TEMPLATE_FILE, TOKENIZER_CONFIG, AdapterFacts
from lorakit.export.rules import IGNORED, REMEDIES, RUNTIMES, WRONG, Effect, Rule

SILENT = (IGNORED, WRONG)
"""Effects that change an answer without an error."""


@dataclass(frozen=True)
class RuleMatch:
    """A rule whose condition holds for an adapter.

    Attributes:
        condition: Name of the condition in `CONDITIONS`.
        evidence: What the adapter has.
        remedy: What to do, a command if there is one; "" if the runtime needs nothing.
    """

    runtime: str
    condition: str
    evidence: str
    rule: Rule
    remedy: str


@dataclass(frozen=True)
class Check:
    """The result for one adapter.

    Attributes:
        matches: Runtime -> the rules whose conditions hold, the worst effects first.
        not_compared: Names of the conditions that were not examined, because no base was given.
    """

    matches: Mapping[str, Sequence[RuleMatch]]
    not_compared: tuple[str, ...]

    def verdict(self, runtime: str) -> Effect:
        """Return the worst effect in a runtime."""
        return max((match.rule.effect for match in self.matches[runtime]), key=list(Effect).index, default=Effect.FINE)

    @property
    def is_silent(self) -> bool:
        """Return whether some runtime would change answers without an error."""
        return any(self.verdict(runtime) in SILENT for runtime in self.matches)


def check(facts: AdapterFacts, runtimes: Sequence[str]) -> Check:
    """Return the rules of runtimes, by their names in `RUNTIMES`, whose conditions hold for an adapter."""
    held = {name: evidence for name, condition in CONDITIONS.items() if (evidence := condition.find(facts))}
    matches = {}
    for runtime in runtimes:
        rules = RUNTIMES[runtime].rules
        found = [_match(facts, runtime, name, held[name]) for name in held if name in rules]
        matches[runtime] = sorted(found, key=lambda one: -list(Effect).index(one.rule.effect))
    compared = [name for name, condition in CONDITIONS.items() if condition.compares and facts.base is None]
    return Check(matches, tuple(name for name in compared if any(name in RUNTIMES[one].rules for one in runtimes)))


def _match(facts: AdapterFacts, runtime: str, name: str, evidence: str) -> RuleMatch:
    rule = RUNTIMES[runtime].rules[name]
    limit = vllm_limit(facts.largest_rank) or VLLM_RANKS[-1]
    template = facts.folder / TEMPLATE_FILE
    file = shlex.quote(str(template)) if template.is_file() else f"FILE, with that of {TOKENIZER_CONFIG}"
    is_named = facts.config.base_model_name_or_path is not None
    served, model = ("", "") if is_named else (" --served-base MODEL", " --model MODEL")
    values = {"adapter": shlex.quote(str(facts.folder)), "format": runtime, "limit": limit, "template": file}
    values |= {"served": served, "model": model}
    remedy = REMEDIES[rule.remedy].format(**values) if rule.remedy else ""
    return RuleMatch(runtime, name, evidence, rule, remedy)
