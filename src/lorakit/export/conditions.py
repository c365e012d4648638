"""`CONDITIONS`: what an adapter, its tokenizer or its base can have that some runtime does not compute as trained.

A condition is a function from the facts to the evidence, a phrase for messages, or "" if it does not hold. Those that
compare with the base do not hold without one. This module does not depend on runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorakit import hub
from lorakit.architectures.shapes import ModelShape, SiteShape, replicated
from lorakit.errors import PatternError
from lorakit.export.facts import AdapterFacts, BaseFacts, Pair
from lorakit.plan.params import candidates
from lorakit.tables import format_count, format_some
from lorakit.targets.patterns import literal_value, names_path
from lorakit.targets.resolving import ALL_LINEAR, selects

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Inits by name whose saved factors are plain LoRA on the original base (PEFT 0.21; vllm/lora/peft_helper.py)."""

HEADS = ("classifier", "score")
"""Saved modules that are heads of sequence classification."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank` (vllm/config/lora.py, 0.32)."""

COPY = ".base_layer.weight"
"""Ending of the copies of embeddings that PEFT saves with an adapter on them."""

WRAPPED = "language_model"
"""Component of paths below which a multimodal model holds its language model."""

MLX_THETAS: Mapping[str, float] = {
    **dict.fromkeys(("afmoe", "bitnet", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "gemma"), 1e4),
    **dict.fromkeys(("gemma2", "glm", "hunyuan_v1_dense", "internlm2", "internlm3", "llama", "mimo", "mistral"), 1e4),
    **dict.fromkeys(("nanochat", "nemotron", "olmo", "olmo2", "olmoe", "phi", "phi3", "phimoe", "plamo"), 1e4),
    **dict.fromkeys(("gemma3_text", "qwen2", "qwen2_moe", "mixtral", "minicpm", "minicpm3"), 1e6),
    "seed_oss": 1e4,
    "starcoder2": 1e5,
    "gpt_oss": 150_000.0,
    "cohere": 8e6,
    "cohere2": 5e4,
    "nemotron-nas": 5e5,
}
"""Type of a model whose module in mlx-lm 0.32.2 reads `rope_theta`, but not `rope_parameters` -> its default there."""

_LACKING = """BailingMoeV2_5 BailingMoeV3 Bloom Cohere2Moe Dbrx DeepseekV4 Falcon FalconMamba Gemma3n Glm5Next GPTJ
HrmText HCXVisionV2 IQuestLoopCoder KimiLinear Mamba Mamba2 MiniMaxM3Sparse MiMoV2Flash MiMoV2 Orion Step1 Step3Text
Step3p5 StableLm Zamba2"""
VLLM_WITHOUT_LORA = {"GPT2LMHeadModel", *(f"{name}ForCausalLM" for name in _LACKING.split())}
"""Language models for which vLLM 0.32 does not start with adapters."""


@dataclass(frozen=True)
class Condition:
    """Something that an adapter can have.

    Attributes:
        find: Function from the facts to the evidence, or "" if the condition does not hold.
        compares: Whether the condition needs the base.
    """

    find: Callable[[AdapterFacts], str]
    compares: bool = False


def vllm_limit(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM for a rank, at least 8; None if the rank is above all."""
    return next((limit for limit in VLLM_RANKS[1:] if limit >= rank), None)


def _set(field: str) -> Condition:
    """Return the condition that a field of the config is set."""

    def find(facts: AdapterFacts) -> str:
        value = getattr(facts.config, field)
        return f"{field} is set" if value else ""

    return Condition(find)


def _rank(facts: AdapterFacts) -> str:
    rank, limit = facts.largest_rank, facts.max_rank
    return f"the largest rank is {rank}, above --max-rank {limit}" if rank > limit else ""


def _rank_value(facts: AdapterFacts) -> str:
    return f"{facts.max_rank} is not one of {', '.join(map(str, VLLM_RANKS))}" * (facts.max_rank not in VLLM_RANKS)


def _saved(facts: AdapterFacts) -> str:
    """Return evidence of modules that are saved in full, other than heads of sequence classification."""
    found = [path for path in _modules_in_full(facts) if path.rpartition(".")[2] not in HEADS]
    return f"saved in full: {format_some(found)}" if found else ""


def _classifier(facts: AdapterFacts) -> str:
    found = [path for path in _modules_in_full(facts) if path.rpartition(".")[2] in HEADS]
    return f"saved in full: {format_some(found)}" if found else ""


def _modules_in_full(facts: AdapterFacts) -> list[str]:
    """Return the paths of modules whose own weight is in the file."""
    names = [name for name in facts.others if name.endswith(".weight") and not name.endswith(COPY)]
    return [name.removesuffix(".weight") for name in names if ".lora_" not in name]


def _rows(facts: AdapterFacts) -> str:
    found = [name.partition(".token_adapter")[0] for name in facts.others if ".token_adapter." in name]
    return f"trained token rows of {format_some(found)}" if found else ""


def _new_tokens(facts: AdapterFacts) -> str:
    """Return evidence of tokens beyond the vocabulary of the base."""
    known, own = facts.vocabulary, set(facts.base.added_tokens.values()) if facts.base is not None else set()
    new = [text for one, text in facts.added_tokens.items() if 0 < known <= one and text not in own]
    return f"the tokenizer adds {format_count(len(new), 'token')} to a vocabulary of {known:,}" if new else ""


def _resized(facts: AdapterFacts) -> str:
    """Return evidence of saved copies of embeddings with more or fewer rows than the base's."""
    copies = {name.removesuffix(COPY): shape[0] for name, shape in facts.others.items() if name.endswith(COPY)}
    known = facts.vocabulary
    found = [f"{path} has {rows:,} rows, not {known:,}" for path, rows in copies.items() if 0 < known != rows]
    return format_some(found)


def _init(facts: AdapterFacts) -> str:
    init = facts.config.init_lora_weights
    is_plain = not isinstance(init, str) or init.lower() in PLAIN_INITS
    return "" if is_plain else f"init_lora_weights is {init!r}: the factors belong to a changed base"


def _extra(facts: AdapterFacts) -> str:
    """Return evidence of tensors of a variant, other than A, B, their biases, and those of DoRA and KaSA."""
    if facts.config.kasa_config:
        return ""
    known = (".lora_B.bias", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
    found = [name for name in facts.others if ".lora_" in name and not name.endswith(known)]
    return f"tensors of a variant: {format_some(found, 1)}" if found else ""


def _expression(facts: AdapterFacts) -> str:
    targets = facts.config.target_modules
    is_list = not isinstance(targets, str) and targets is not None
    return "" if is_list or targets == ALL_LINEAR else "target_modules is not a list of names"


def _unselected(facts: AdapterFacts) -> str:
    """Return evidence of sites that a list of targets does not name, nor a module around them."""
    targets, others = facts.config.target_modules, facts.config.target_parameters
    is_list = targets and not isinstance(targets, str) and not others
    found = [path for path in facts.pairs if is_list and not any(f".{name}." in f".{path}." for name in targets or ())]
    return f"target_modules does not name {format_some(found, 1)}" if found else ""


def _incomplete(facts: AdapterFacts) -> str:
    return f"A or B is missing or of another rank at {format_some(facts.incomplete, 1)}" if facts.incomplete else ""


def _nonfinite(facts: AdapterFacts) -> str:
    return f"NaN or infinite values in {format_some(facts.nonfinite, 1)}" if facts.nonfinite else ""


def _scale_zero(facts: AdapterFacts) -> str:
    """Return evidence of sites that a scale of zero turns off; patterns that are expressions are not evaluated."""
    alpha, patterns = facts.config.lora_alpha, facts.config.alpha_pattern
    try:
        found = [path for path in facts.pairs if literal_value(patterns, path, alpha) == 0]
    except PatternError:
        found = []
    return f"the scale is 0 at {format_count(len(found), 'site')}" if found else ""


def _zero(facts: AdapterFacts) -> str:
    is_zero = all(pair.is_zero for pair in facts.pairs.values()) and not _acts_otherwise(facts)
    return "B·A is zero at all sites" if is_zero else ""


def _acts_otherwise(facts: AdapterFacts) -> bool:
    """Return whether the adapter changes answers by more than B·A: by magnitudes, saved modules or a changed base.

    The tensors of VeLoRA and MonteCLoRA are for training.
    """
    is_for_training = facts.config.velora_config or facts.config.monteclora_config
    others = () if is_for_training else [name for name in facts.others if not name.endswith(COPY)]
    return bool(others or _init(facts))


def _part_of_attention(facts: AdapterFacts) -> str:
    """Return evidence of layers with an adapter on q, k or v, but not on both q and v."""
    names: dict[str, set[str]] = {}
    for path in facts.pairs:
        parent, _, name = path.rpartition(".")
        if name in ("q_proj", "k_proj", "v_proj"):
            names.setdefault(parent, set()).add(name)
    found = [parent for parent, own in names.items() if not {"q_proj", "v_proj"} <= own]
    return f"q_proj or v_proj is not adapted at {format_some(found, 1)}" if found else ""


def _of_base(compare: Callable[[AdapterFacts, BaseFacts], str]) -> Condition:
    """Return a condition that compares the adapter with the base."""
    return Condition(lambda facts: compare(facts, facts.base) if facts.base is not None else "", compares=True)


def _base_name(facts: AdapterFacts, base: BaseFacts) -> str:
    name = facts.config.base_model_name_or_path
    return f"the adapter names the base {name!r}" if name and name not in base.names else ""


def _other_base(facts: AdapterFacts, base: BaseFacts) -> str:
    """Return evidence that the adapter was trained on a base with another architecture or number of parameters."""
    trained = [facts.fingerprint.get(name) for name in ("architecture", "parameters")]
    if None in trained or facts.config.task_type not in (None, "CAUSAL_LM"):
        return ""
    here = [base.shape.architecture, base.shape.parameters]
    return "" if trained == here else f"trained on {trained[0]} with {trained[1]:,} parameters, not {here[1]:,}"


def _shape(facts: AdapterFacts, base: BaseFacts) -> ModelShape:
    """Return the shape of the base with the replicas of layers that the adapter adds."""
    return replicated(base.shape, facts.config.layer_replication)


def _absent(facts: AdapterFacts, base: BaseFacts) -> dict[str, list[str]]:
    """Return the paths of sites that the base does not have, by what is different: "name", "wrapper" or "path".

    Fused experts are modules that are not sites.
    """
    shape = _shape(facts, base)
    here = [site.path for site in shape.sites]
    known = {*here, *(other.path for other in shape.others)}
    names, unwrapped = {path.rpartition(".")[2] for path in here}, {_unwrapped(path) for path in here}
    found: dict[str, list[str]] = {"name": [], "wrapper": [], "path": []}
    for path in facts.pairs:
        if path.removesuffix(".base_layer") not in known:
            is_named = path.rpartition(".")[2] in names
            found["wrapper" if _unwrapped(path) in unwrapped else "path" if is_named else "name"].append(path)
    return found


def _unwrapped(path: str) -> str:
    """Return a path without the components that differ between a language model and a multimodal model around it."""
    return ".".join(word for word in path.split(".") if word not in (WRAPPED, "model"))


def _lacks(difference: str, text: str) -> Callable[[AdapterFacts, BaseFacts], str]:
    """Return a comparison that finds sites that the base does not have."""

    def compare(facts: AdapterFacts, base: BaseFacts) -> str:
        found = _absent(facts, base)[difference]
        return f"{text} {format_some(found, 1)}" if found else ""

    return compare


def _shapes(facts: AdapterFacts, base: BaseFacts) -> str:
    """Return evidence of factors whose sizes are not those of the base's weights; block-diagonal ones are smaller."""
    found = [
        f"{path} ({pair.out_features} × {pair.in_features}, not {site.out_features} × {site.in_features})"
        for path, pair, site in _on_base(facts, base)
        if (pair.out_features, pair.in_features) != (site.out_features, site.in_features)
        and not facts.config.use_bdlora
        and not _is_grouped(facts, pair, site)
    ]
    return f"other shapes than the base: {format_some(found, 1)}" if found else ""


def _grouped(facts: AdapterFacts, base: BaseFacts) -> str:
    """Return evidence of an A that reads means of groups; PEFT itself writes it for a GPTQ base only."""
    found = [path for path, pair, site in _on_base(facts, base) if _is_grouped(facts, pair, site)]
    return f"A reads means of {facts.config.qalora_group_size} inputs at {format_some(found, 1)}" if found else ""


def _is_grouped(facts: AdapterFacts, pair: Pair, site: SiteShape) -> bool:
    size = facts.config.qalora_group_size if facts.config.use_qalora else 1
    return size > 1 and pair.in_features * size == site.in_features


def _on_base(facts: AdapterFacts, base: BaseFacts) -> list[tuple[str, Pair, SiteShape]]:
    """Return the adapter's sites that the base has: path, factors, weight."""
    sites = {site.path: site for site in _shape(facts, base).sites}
    return [(path, pair, sites[path]) for path, pair in facts.pairs.items() if path in sites]


def _missing(facts: AdapterFacts, base: BaseFacts) -> str:
    """Return evidence of a file that has some of the sites that the config selects in the base, but not all.

    Expressions are not evaluated.
    """
    config, targets = facts.config, facts.config.target_modules
    fields = (config.exclude_modules, config.layers_pattern, None if targets == ALL_LINEAR else targets)
    if targets is None or any(isinstance(one, str) for one in fields):
        return ""
    saved, is_selected = config.modules_to_save or (), selects(config)
    wanted = [
        one.path
        for one in candidates(_shape(facts, base))
        if (one.dense if targets == ALL_LINEAR else one.kind and any(names_path(name, one.path) for name in targets))
        and is_selected(one)
        and not any(names_path(name, one.path) for name in saved)
    ]
    missing = [path for path in wanted if path not in facts.pairs]
    is_partial = 0 < len(missing) < len(wanted)
    return f"{len(missing)} of {len(wanted)} sites are missing: {format_some(missing, 1)}" if is_partial else ""


def _quantized(facts: AdapterFacts, base: BaseFacts) -> str:
    method = base.shape.quantization.get("quant_method")
    return f"the base is quantized ({method})" if method else ""


def _tied(*, is_head: bool) -> Callable[[AdapterFacts, BaseFacts], str]:
    """Return a comparison that finds an adapter on one of two tied weights, the head or the embedding."""

    def compare(facts: AdapterFacts, base: BaseFacts) -> str:
        tied = {site.path if is_head else site.tied_to for site in base.shape.sites if site.tied_to}
        found = [path for path in facts.pairs if path in tied]
        return f"{found[0]} is adapted, and the base ties it" if found else ""

    return compare


def _tokenizer(facts: AdapterFacts, base: BaseFacts) -> str:
    """Return evidence of tokens that the base's tokenizer does not have, also in rows that the base has."""
    known = base.added_tokens.values()
    new = [text for text in facts.added_tokens.values() if known and text not in known]
    return f"the base's tokenizer lacks {format_some(new)}" if new else ""


def _template(facts: AdapterFacts, base: BaseFacts) -> str:
    differs = facts.template is not None and facts.template != base.template
    return "the adapter's chat template is not the base's" if differs else ""


def unread_rope(base: BaseFacts) -> str:
    """Return evidence of rope parameters of a base that mlx-lm does not read and replaces by others, or ""."""
    default = MLX_THETAS.get(str(base.config.get("model_type")))
    replaced = {"rope_theta": default, "rope_local_base_freq": 1e4, "rope_scaling": None}
    meant = hub.with_earlier_rope(base.config)
    names = [key for key, used in replaced.items() if key not in base.config and meant.get(key, used) != used]
    return f"{names[0]} is {meant[names[0]]}, but only in rope_parameters" if names and default is not None else ""


CONDITIONS: Mapping[str, Condition] = {
    "any adapter": Condition(lambda facts: "the runtime does not read PEFT's directories"),
    "rank": Condition(_rank),
    "rank value": Condition(_rank_value),
    "rslora": _set("use_rslora"),
    "rank pattern": _set("rank_pattern"),
    "alpha pattern": _set("alpha_pattern"),
    "dora": _set("use_dora"),
    "kasa": _set("kasa_config"),
    "lora bias": _set("lora_bias"),
    "bias": Condition(lambda facts: f"bias is {facts.config.bias!r}" * (facts.config.bias != "none")),
    "saved module": Condition(_saved),
    "classification head": Condition(_classifier),
    "token rows": Condition(_rows),
    "new tokens": Condition(_new_tokens),
    "resized embedding": Condition(_resized),
    "alora": _set("alora_invocation_tokens"),
    "init": Condition(_init),
    "bd-lora": _set("use_bdlora"),
    "qa-lora": _set("use_qalora"),
    "lora-xs": _set("use_lora_xs"),
    "extra tensors": Condition(_extra),
    "layer replication": _set("layer_replication"),
    "experts": _set("target_parameters"),
    "target expression": Condition(_expression),
    "part of attention": Condition(_part_of_attention),
    "unselected": Condition(_unselected),
    "incomplete site": Condition(_incomplete),
    "prefix": Condition(
        lambda facts: f"names without PEFT's prefix: {facts.unprefixed[0]}" if facts.unprefixed else ""
    ),
    "nan": Condition(_nonfinite),
    "scale 0": Condition(_scale_zero),
    "zero update": Condition(_zero),
    "no base name": Condition(lambda f: "base_model_name_or_path is not set" * (not f.config.base_model_name_or_path)),
    "base name": _of_base(_base_name),
    "other base": _of_base(_other_base),
    "unknown name": _of_base(_lacks("name", "the base has no module with this name:")),
    "language model": _of_base(_lacks("wrapper", f"paths differ from the base's by {WRAPPED!r} or 'model':")),
    "unknown path": _of_base(_lacks("path", "the base has no module")),
    "shape": _of_base(_shapes),
    "grouped inputs": _of_base(_grouped),
    "missing sites": _of_base(_missing),
    "quantized base": _of_base(_quantized),
    "architecture": _of_base(lambda _, base: base.shape.architecture * (base.shape.architecture in VLLM_WITHOUT_LORA)),
    "tied head": _of_base(_tied(is_head=True)),
    "tied embedding": _of_base(_tied(is_head=False)),
    "tokenizer": _of_base(_tokenizer),
    "chat template": _of_base(_template),
    "rope parameters": _of_base(lambda _, base: unread_rope(base)),
}
"""Name -> condition."""
