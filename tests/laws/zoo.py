"""Models and adapters for the tests of laws and core, and the cases that follow from their tables.

Each `Specimen` makes a fresh small model from a fixed seed, in eval mode, and knows its input and its output.
`randomise` gives an adapter numbers that no other adapter has: with a zero B, every routing test would pass.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.config.nested import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from lorakit.core import attach, collect_for, trainable_parameters
from lorakit.core.inits import INITS, init_named
from lorakit.core.kinds import KINDS, kind_named
from lorakit.core.model.checks import conflict
from lorakit.core.variants import VARIANTS, variant_named

ROWS = 4
INVOCATION = (3, 4)
"""The tokens that aLoRA adapters wait for here."""
FP32 = torch.float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Specimen:
    """A small model.

    Attributes:
        name: Shown in the test's id.
        make: Builds it in fp32.
        targets: Names for `target_modules`.
        inputs: Number of rows -> keyword arguments of the model, or one tensor.
        kind: The kind of its targeted sites, "" where they are mixed.
        parameters: Names for `target_parameters`.
    """

    name: str
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    inputs: Callable[[int], Any]
    kind: str = ""
    parameters: tuple[str, ...] = ()

    def model(self, dtype: torch.dtype = FP32, seed: int = 0) -> nn.Module:
        """Return a new model in eval mode; the same seed gives the same bits."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(dtype).eval()

    def given(self, dtype: torch.dtype = FP32, rows: int = ROWS) -> Any:
        """Return the input, in the model's dtype if it is floating-point."""
        given = self.inputs(rows)
        if isinstance(given, Tensor):
            return given.to(dtype) if given.is_floating_point() else given
        return given

    def config(self, **fields: Any) -> LoraConfig:
        """Return a config for its targets with rank 4 and alpha 8."""
        words = {"r": 4, "lora_alpha": 8, "target_modules": list(self.targets)}
        if self.parameters:
            words["target_parameters"] = list(self.parameters)
        return LoraConfig(**{**words, **fields})

    def __str__(self) -> str:
        return self.name


def run(model: nn.Module, given: Any) -> Tensor:
    """Return the output of a model, (rows, …), without a graph."""
    with torch.no_grad():
        return output(model, given)


def output(model: nn.Module, given: Any) -> Tensor:
    """Return the output of a model, (rows, …), with its graph."""
    if isinstance(given, Tensor):
        return model(given)
    return model(**given).logits


def randomise(model: nn.Module, name: str, seed: int, size: float = 0.5) -> None:
    """Set all parameters that an adapter trains, including B, to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in trainable_parameters(model, name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "lora_magnitude" in path:
                parameter.mul_((1 + 0.2 * noise).to(parameter.dtype))
            elif "lora_" in path:
                parameter.copy_(size * noise)
            else:
                parameter.add_((size * noise).to(parameter.dtype))


def with_adapters(specimen: Specimen, *names: str, dtype: torch.dtype = FP32, **fields: Any) -> nn.Module:
    """Return a model with adapters that differ in every parameter; the first is active.

    Only one adapter of a site can change its base, so if the init does, the others use the default init.
    """
    model, plain = specimen.model(dtype), {}
    for index, name in enumerate(names):
        attach_fresh(model, specimen, name, dtype, **{**fields, **plain})
        randomise(model, name, seed=100 + index)
        if init_named(fields.get("init_lora_weights", True)).changes_base:
            plain = {"init_lora_weights": True, "loftq_config": {}}
    return model


def attach_fresh(
    model: nn.Module,
    specimen: Specimen,
    name: str = "default",
    dtype: torch.dtype = FP32,
    seed: int | None = None,
    **fields: Any,
) -> None:
    """Attach an adapter, with the statistics that its init reads and the settings that its init requires."""
    init = init_named(fields.get("init_lora_weights", True))
    config, statistics = specimen.config(**{**SETTINGS.get(str(init.name), {}), **fields}), None
    if init.needs:
        batches = [specimen.given(dtype, rows=40)]
        statistics = collect_for(
            model, config, batches, lambda model, given: output(model, given).square().mean() / 100
        )
        config = statistics.config
    attach(model, config, name, seed=seed, statistics=statistics)


SETTINGS: dict[str, dict[str, Any]] = {
    "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}},
    "eva": {"eva_config": {"rho": 1.0}},
    "corda": {"corda_config": {"corda_method": "ipm"}},
    "lora_ga": {"r": 2, "lora_alpha": 4},  # twice the rank must fit into the smallest weight
}
"""Init -> further config fields."""


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _ids(rows: int, length: int = 6, below: int = 50) -> Tensor:
    return torch.randint(1, below, (rows, length), generator=torch.Generator().manual_seed(8))


def _linears() -> nn.Module:
    return nn.Sequential(
        OrderedDict(up=nn.Linear(12, 20), act=nn.Tanh(), square=nn.Linear(20, 20, bias=False), out=nn.Linear(20, 7))
    )


def _conv1ds() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    up, square, out = Conv1D(20, 12), Conv1D(20, 20), nn.Linear(20, 7)
    for module in (up, square):  # its own start, 0.02, would drown in the adapters
        nn.init.normal_(module.weight, std=0.3)
        nn.init.normal_(module.bias)
    return nn.Sequential(OrderedDict(up=up, act=nn.Tanh(), square=square, out=out))


def _embedding() -> nn.Module:
    return nn.Sequential(OrderedDict(embed=nn.Embedding(50, 12), act=nn.Tanh(), out=nn.Linear(12, 7)))


def _on_tokens(make: Callable[[], nn.Module]) -> nn.Module:
    embed = nn.Embedding(50, 12)
    return nn.Sequential(OrderedDict([("embed", embed), ("still", nn.Tanh()), *make().named_children()]))


def _convs(dims: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    around = {"padding": 1, "padding_mode": "circular"}  # what moves the kernel is the base's, not the adapter's
    up, square = conv(3, 8, 3, **around), conv(8, 8, 3, dilation=2, padding=2, bias=False)
    out = nn.Linear(8 * 6**dims, 7)
    nn.init.normal_(out.weight, std=0.3)  # its own start would drown what differs
    return nn.Sequential(OrderedDict(up=up, act=nn.Tanh(), square=square, flat=nn.Flatten(), out=out))


class _Attending(nn.Module):
    """Self-attention and a dense layer; keys and values may have other widths than queries."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        self.out = nn.Linear(8, 7)
        self.widths = widths
        self.requires_grad_(False)  # if a weight is trained, torch uses another attention kernel with other rounding

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (x[..., : self.widths.get(name, 8)] for name in ("kdim", "vdim"))
        return self.out(self.mha(x, keys, values)[0])


class _Experts(nn.Module):
    """Each row through all experts in one tensor, and a square matrix; the second layout is transformers' other one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.square = nn.Parameter(torch.randn(3, 12, 20) / 3), nn.Parameter(torch.randn(20, 20) / 4)
        self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("ni,eio->no", x, self.up)) @ self.square.T


class _Mixed(nn.Module):
    """Experts, and a dense layer whose weight parameter is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.down = _Experts(), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.experts(x)))


def _every_kind() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(12, 12)
    nn.init.normal_(conv.weight, std=0.3)
    return nn.Sequential(OrderedDict(embed=nn.Embedding(50, 12), conv=conv, act=nn.Tanh(), linear=nn.Linear(12, 7)))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2))


def _llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    words = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **words, initializer_range=0.2))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    words = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, **words, initializer_range=0.2))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, num_labels=3, initializer_range=0.2)
    return BertForSequenceClassification(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False))


def _text(rows: int) -> dict[str, Tensor]:
    return {"input_ids": _ids(rows)}


def _invoking(rows: int) -> Tensor:
    """Return tokens with `INVOCATION` once in each row, from the third token on."""
    ids = _ids(rows).clamp_min(INVOCATION[-1] + 1)
    ids[:, 2 : 2 + len(INVOCATION)] = torch.tensor(INVOCATION)
    return ids


def _pair(rows: int) -> dict[str, Tensor]:
    return {"input_ids": _ids(rows), "decoder_input_ids": _ids(rows, 4)}


LINEARS = Specimen("linears", _linears, ("up", "square"), lambda rows: _numbers(rows, 12), "Linear")
CONV1DS = Specimen("conv1ds", _conv1ds, ("up", "square"), lambda rows: _numbers(rows, 12), "Conv1D")
EMBEDDING = Specimen("embedding", _embedding, ("embed",), _ids, "Embedding")
EVERY_KIND = Specimen("every-kind", _every_kind, ("embed", "conv", "linear"), _ids)
GPT2 = Specimen("gpt2", _gpt2, ("c_attn", "c_proj"), _text, "Conv1D")
LLAMA = Specimen("llama", _llama, ("q_proj", "v_proj", "down_proj"), _text, "Linear")
TIED = Specimen("llama-tied", lambda: _llama(tied=True), ("q_proj", "v_proj"), _text, "Linear")
BERT = Specimen("bert", _bert, ("query", "value"), _text, "Linear")
T5 = Specimen("t5", _t5, ("q", "v"), _pair, "Linear")

MIXTRAL = Specimen("mixtral", _mixtral, ("q_proj",), _text, "", ("experts.gate_up_proj", "experts.down_proj"))
EXPERTS = Specimen("experts", _Mixed, (), lambda rows: _numbers(rows, 12), "Parameter", ("up", "square", "down.weight"))

CONV1 = Specimen("conv1d", lambda: _convs(1), ("up", "square"), lambda rows: _numbers(rows, 3, 6), "Conv1d")
CONV2 = Specimen("conv2d", lambda: _convs(2), ("up", "square"), lambda rows: _numbers(rows, 3, 6, 6), "Conv2d")
CONV3 = Specimen("conv3d", lambda: _convs(3), ("up", "square"), lambda rows: _numbers(rows, 3, 6, 6, 6), "Conv3d")
MHA = Specimen("attention", _Attending, ("mha",), lambda rows: _numbers(rows, 5, 8), "MultiheadAttention")
MHA_WIDTHS = Specimen(
    "attention-widths", lambda: _Attending(kdim=6, vdim=4), ("mha",), lambda rows: _numbers(rows, 5, 8)
)

WAITING_LINEARS = Specimen("tokens-linears", lambda: _on_tokens(_linears), ("up", "square"), _invoking, "Linear")
WAITING_CONV1DS = Specimen("tokens-conv1ds", lambda: _on_tokens(_conv1ds), ("up", "square"), _invoking, "Conv1D")
WAITING = {specimen.kind: specimen for specimen in (WAITING_LINEARS, WAITING_CONV1DS)}

OF_KIND = {specimen.kind: specimen for specimen in (LINEARS, CONV1DS, EMBEDDING, CONV1, CONV2, CONV3, MHA, EXPERTS)}
ARCHITECTURES = (GPT2, LLAMA, BERT, T5)


OF_VARIANT: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": list(INVOCATION), "task_type": "CAUSAL_LM"},
    "kasa": {"kasa_config": KasaConfig()},
    "bdlora": {"use_bdlora": BdLoraConfig(["up"], ["square"], nblocks=2)},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": VeloraConfig(num_groups=5, scale=0.5, init_type="random")},
    "monteclora": {"monteclora_config": MontecloraConfig(num_samples=3)},
    "lora-xs": {"use_lora_xs": True},
}
"""Variant -> config fields; a variant without an entry here or in `WITHOUT_A_CASE` is an error."""

WITHOUT_A_CASE = {"arrow-router": "it needs several adapters at each site: tests/core/variants/test_arrow.py"}
"""Variants to which no law is applied, each with its reason."""

KINDS_WITHOUT_A_CASE = {"InnerLinear": "a dense layer inside nn.MultiheadAttention comes with that"}
"""Kinds to which no law is applied, each with its reason."""


def cased(registry: Iterable[Any], there: Container[str], left_out: Mapping[str, str]) -> list[str]:
    """Return the names of a registry's entries that have a case.

    Raises:
        LookupError: An entry has neither a case nor a reason to have none, so no law would be applied to it.
    """
    names = [entry.name for entry in registry if entry.name not in left_out]
    missing = [name for name in names if name not in there]
    if missing:
        raise LookupError(f"tests/laws/zoo.py has no case for {', '.join(missing)}")
    return names


@dataclass(frozen=True)
class Case:
    """One row of each table, and a dtype for the base."""

    kind: str
    variant: str
    init: bool | str
    dtype: torch.dtype

    @property
    def specimen(self) -> Specimen:
        """Return the model whose sites are of this kind; a new kind needs one in `OF_KIND`."""
        return WAITING[self.kind] if self.variant == "alora" else OF_KIND[self.kind]

    @property
    def takes_rows(self) -> bool:
        """Return whether rows of a batch can have different adapters."""
        return kind_named(self.kind).row_axis(nn.Module()) is not None

    @property
    def fields(self) -> dict[str, Any]:
        """Return the config fields except targets, rank and alpha."""
        return {"init_lora_weights": self.init, **OF_VARIANT[self.variant]}

    @property
    def mergeable(self) -> bool:
        """Return whether the variant has an update of the weight."""
        return variant_named(self.variant).is_mergeable

    @property
    def moves_base(self) -> bool:
        """Return whether it changes the base by more than the rounding of the base's dtype."""
        if variant_named(self.variant).move is not None:
            return True
        unseen = (self.kind, self.init, self.dtype) == ("Embedding", "lora_ga", torch.bfloat16)  # B has steps of 1e-4
        return init_named(self.init).changes_base and not unseen

    def adapted(self, *names: str) -> nn.Module:
        """Return a model with adapters that differ in every parameter."""
        return with_adapters(self.specimen, *names, dtype=self.dtype, **self.fields)

    def __str__(self) -> str:
        return f"{self.kind}-{self.variant}-{self.init}-{str(self.dtype).removeprefix('torch.')}"


def _allowed(case: Case) -> bool:
    init = init_named(case.init)
    variant = variant_named(case.variant)
    if not init.fits(kind_named(case.kind)):
        return False
    if conflict(init, variant) is not None:
        return False
    return variant.fits(kind_named(case.kind))


@functools.cache
def every_case() -> tuple[Case, ...]:
    """Return all combinations of the tables."""
    kinds, variants = cased(KINDS, OF_KIND, KINDS_WITHOUT_A_CASE), cased(VARIANTS, OF_VARIANT, WITHOUT_A_CASE)
    axes = (kinds, variants, [i.name for i in INITS], DTYPES)
    return tuple(case for case in itertools.starmap(Case, itertools.product(*axes)) if _allowed(case))


def cases(mergeable: bool = False) -> list[Any]:
    """Return parameters for pytest: all combinations of the tables, or those that can be merged."""
    axes = pytest.mark.axes("case.kind", "case.variant", "case.init", "case.dtype")
    return [pytest.param(case, id=str(case), marks=axes) for case in every_case() if case.mergeable or not mergeable]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the current tensors of the base, under their names in the plain model."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name.replace(".base_layer", ""): tensor for name, tensor in tensors if ".lora_" not in name}
