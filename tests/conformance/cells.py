"""The product of lorakit's four registries over small models: its cells, and how both libraries create each.

Every entry of INITS and VARIANTS is included automatically, except for those in `OUTSIDE_THE_PRODUCT`. A new kind or
weight format needs a `Place`, a model that has it; `test_every_row_has_a_place` names those without one.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.inits import INITS, Init, init_named
from lorakit.core.variants import VARIANTS

from .architectures import ROWS, inputs_for, loss_of, model_named
from .rows import Row, quiet_peft

INVOCATION = (3, 4)
SEEDS = range(20, 26)
"""Seeds of the batches for inits that use data."""


@dataclass(frozen=True)
class Place:
    """Sites of one kind and one storage in one model.

    Attributes:
        model: A key of `MODELS`.
        kind: Name of an entry of KINDS.
        base: Name of an entry of WEIGHT_FORMATS.
        targets: Names for `target_modules`.
        parameters: Names for `target_parameters`.
        needs: Package that the storage needs.
    """

    model: str
    kind: str
    base: str
    targets: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    needs: str = "torch"

    @property
    def is_causal(self) -> bool:
        """Return whether its task is causal language modeling, the only one aLoRA supports."""
        return self.model.endswith("-words") and not self.model.startswith("t5")


def _places() -> Iterator[Place]:
    attention, gates = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    dense = {
        "sequential": ("up", "head"),
        "llama-words": (*attention, *gates),
        "qwen2-words": (*attention, *gates),
        "qwen3-words": (*attention, *gates),
        "gemma-words": (*attention, *gates),
        "mixtral-words": attention,
        "gpt-oss-words": attention,
        "opt-words": ("q_proj", "out_proj", "fc1", "fc2"),
        "neox-words": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        "bert-classes": ("query", "key", "value", "output.dense"),
        "roberta-classes": ("query", "key", "value", "output.dense"),
        "t5-words": ("q", "k", "v", "o", "wi", "wo"),
        "vit-pictures": ("q_proj", "v_proj", "fc1"),
        "whisper-speech": ("q_proj", "out_proj", "fc1", "fc2"),
    }
    yield from (Place(model, "Linear", "dense", targets) for model, targets in dense.items())
    yield Place("gpt2-words", "Conv1D", "transposed", ("c_attn", "c_proj", "c_fc"))
    embeddings = {
        "sequential": "embed",
        "llama-words": "embed_tokens",
        "gemma-words": "embed_tokens",
        "gpt2-words": "wpe",
        "bert-classes": "word_embeddings",
    }
    yield from (Place(model, "Embedding", "transposed", (target,)) for model, target in embeddings.items())
    yield Place("convolutions", "Conv1d", "dense", ("one",))
    yield Place("convolutions", "Conv2d", "dense", ("two", "mixed"))
    yield Place("convolutions", "Conv3d", "dense", ("three",))
    yield Place("whisper-speech", "Conv1d", "dense", ("conv1", "conv2"))
    yield Place("vit-pictures", "Conv2d", "dense", ("projection",))
    yield Place("sequential-attention", "MultiheadAttention", "dense", ("mha",))
    yield Place("sequential-bare", "Parameter", "dense", (), ("experts.stack", "experts.matrix"))
    fused = ("experts.gate_up_proj", "experts.down_proj")
    yield from (Place(model, "Parameter", "dense", (), fused) for model in ("mixtral-words", "gpt-oss-words"))
    yield Place("sequential-parametrised", "Linear", "computed", ("up",))
    yield Place("sequential-parametrised", "Embedding", "computed transposed", ("embed",))
    packed = {
        "nf4": ("bitsandbytes 4-bit", "bitsandbytes"),
        "int8": ("bitsandbytes 8-bit", "bitsandbytes"),
        "int8-torchao": ("torchao", "torchao"),
        "hqq4": ("HQQ", "hqq"),
    }
    for storage, (base, package) in packed.items():
        yield Place(f"llama-{storage}-words", "Linear", base, ("q_proj", "down_proj"), needs=package)


PLACES = tuple(_places())

WITHOUT_A_PLACE: Mapping[str, str] = {
    "InnerLinear": "the dense layer inside nn.MultiheadAttention is always adapted together with it",
    **dict.fromkeys(
        ("fp8 with block scales", "fp8 experts", "GPTQ", "AWQ", "compressed-tensors"),
        "peft has no layer for it that runs on a CPU; tests/core/quantization compares with a dense model",
    ),
    "int8 matmul (W8A8)": "a format of lorakit; tests/core/quantization and tests/laws compare with a dense model",
}
"""Entries of KINDS and WEIGHT_FORMATS without a `Place`, each with its reason."""


OUTSIDE_THE_PRODUCT: Mapping[str, str] = {
    "arrow-router": "a router needs several adapters at each site: test_arrow.py",
    "lora-xs": "peft lacks it: tests/core/variants/test_lora_xs.py compares with numpy",
}
"""Variants without cells, each with its reason."""

OF_VARIANT: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": list(INVOCATION)},
    "kasa": {"kasa_config": {"beta": 0.5, "gamma": 0.25}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {"num_groups": 5, "scale": 0.5}},
    "monteclora": {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.1, "buffer_size": 1}},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": [""], "nblocks": 2}},  # the empty text is in every path
}
"""Variant -> config fields that select it in any model."""


@dataclass(frozen=True)
class Cell:
    """One row of each table, in one model."""

    place: Place
    init: bool | str
    variant: str

    @property
    def kind(self) -> str:
        """Name of the row of KINDS."""
        return self.place.kind

    @property
    def base(self) -> str:
        """Name of the entry of WEIGHT_FORMATS."""
        return self.place.base

    @cached_property
    def rules(self) -> Init:
        """The row of its init."""
        return init_named(self.init)

    @property
    def row(self) -> Row:
        """The model and the config that both libraries understand."""
        fields: dict[str, Any] = {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": list(self.place.targets),
            "init_lora_weights": self.init,
            **OF_VARIANT[self.variant],
        }
        if self.place.parameters:
            fields["target_parameters"] = list(self.place.parameters)
        if self.place.is_causal:
            fields["task_type"] = "CAUSAL_LM"
        return Row(str(self), self.place.model, fields)

    @property
    def converted(self) -> Row:
        """The same, as plain LoRA of twice the rank."""
        fields = {key: value for key, value in self.row.fields.items() if key != "init_lora_weights"}
        return Row(str(self), self.place.model, fields)

    def configured(self, library: Any, **settings: Any) -> Any:
        """Return the config, as a class of that library.

        peft has QA-LoRA only in its layer for GPTQ, which also takes a plain nn.Linear as its base.
        """
        config = self.row.config(library, **settings)
        if self.variant == "qalora" and not library.__name__.startswith("lorakit"):
            config._register_custom_module({nn.Linear: _home(library, "gptq").GPTQLoraLinear})
        return config

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Return arguments of the forward; each row has the invocation at another position."""
        given = inputs_for(self.place.model)
        if self.variant == "alora" and "input_ids" in given:
            for index, ids in enumerate(given["input_ids"]):
                ids[ids <= INVOCATION[-1]] = INVOCATION[-1] + 1
                ids[index + 1 : index + 3] = torch.tensor(INVOCATION)
        return given

    def made(self, library: Any) -> Any:
        """Return a new model with a new adapter, in eval mode, after both steps of an init that has two.

        It is seeded, so that a cell does not depend on the tests before it: near the kink of a ReLU, equal outputs can
        have different gradients.
        """
        torch.manual_seed(11)
        model, step = model_named(self.place.model), STEPS.get(str(self.init), Steps())
        classes = _home(library, "config")
        settings = {field: getattr(classes, name)(**values) for field, name, values in step.settings}
        config = self.configured(library, **settings)
        with quiet_peft():
            step.before(library, model, config, self)
            model = library.get_peft_model(model, config)
            step.after(library, model, self)
        return model.eval()

    def __str__(self) -> str:
        return f"{self.place.model}-{self.place.kind}-{self.place.base}-{self.init}-{self.variant}".replace(" ", "-")


def _nothing(*_: Any) -> None:
    """Do nothing: most inits have one step."""


def _batches(cell: Cell) -> list[dict[str, Tensor]]:
    return [inputs_for(cell.place.model, seed) for seed in SEEDS]


def _home(library: Any, name: str) -> Any:
    return importlib.import_module(f"{library.__name__}.tuners.lora.{name}")


def _covariances(library: Any, model: Any, config: Any, cell: Cell) -> None:
    def run() -> None:
        for batch in _batches(cell):
            for index in range(ROWS):  # one row at a time: peft does not support batches of several
                model(**{name: tensor[index : index + 1] for name, tensor in batch.items()})

    _home(library, "corda").preprocess_corda(model, config, run_model=run)


def _gradients(library: Any, model: Any, config: Any, cell: Cell) -> None:
    def step() -> None:
        for batch in _batches(cell):
            loss_of(model(**batch)).backward()

    _home(library, "loraga").preprocess_loraga(model, config, step)


def _directions(library: Any, model: Any, cell: Cell) -> None:
    library.initialize_lora_eva_weights(
        model,
        _batches(cell),
        forward_fn=lambda model, batch: model(**batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        **({} if library.__name__.startswith("lorakit") else {"show_progress_bar": False}),
    )


@dataclass(frozen=True)
class Steps:
    """Settings and calls that an init needs in addition to its name.

    Attributes:
        settings: Field of the config, its class, its values.
        before: Library, model, config, cell -> None, ahead of `get_peft_model`.
        after: Library, wrapped model, cell -> None.
    """

    settings: tuple[tuple[str, str, dict[str, Any]], ...] = ()
    before: Callable[..., None] = _nothing
    after: Callable[..., None] = _nothing


STEPS: Mapping[str, Steps] = {
    "loftq": Steps((("loftq_config", "LoftQConfig", {"loftq_bits": 8}),)),
    "eva": Steps((("eva_config", "EvaConfig", {"rho": 1.0}),), after=_directions),
    "corda": Steps((("corda_config", "CordaConfig", {"corda_method": "ipm"}),), before=_covariances),
    "lora_ga": Steps((("lora_ga_config", "LoraGAConfig", {"direction": "ArB2r"}),), before=_gradients),
}
"""Init -> its steps; a test fails for an init that needs data and has no entry."""


def every_cell() -> list[Cell]:
    """Return every cell of the product."""
    names = [variant.name for variant in VARIANTS if variant.name not in OUTSIDE_THE_PRODUCT]
    axes = ([init.name for init in INITS], names)
    return [Cell(*cell) for cell in itertools.product(PLACES, *axes)]
