"""The comparisons: one `Row` per model and config, and the pair of wrapped models that it creates."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.peft as ours

from .architectures import inputs_for, model_named

theirs = pytest.importorskip("peft")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: Shown in the test's id.
        model: A key of `MODELS`.
        fields: Fields of the config in addition to r=4 and lora_alpha=6.
    """

    name: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """Return the names of the fields, with the values of switches and choices."""
        choices = {key: value for key, value in self.fields.items() if key != "target_modules"}
        return tuple((key, value if isinstance(value, (bool, str)) else "") for key, value in choices.items())

    def config(self, library: Any, **more: Any) -> Any:
        """The config, as a class of that library."""
        fields = {"r": 4, "lora_alpha": 6, **self.fields, **more}
        copied = {key: (type(v)(v) if isinstance(v, (list, dict)) else v) for key, v in fields.items()}
        return library.LoraConfig(**copied)

    def wrapped(self, library: Any, **more: Any) -> Any:
        """A fresh model, wrapped by that library."""
        with quiet_peft():
            return library.get_peft_model(model_named(self.model), self.config(library, **more))

    def pair(self, *names: str, **more: Any) -> tuple[Any, Any]:
        """Return a model of each library with the same random values in its adapters: (peft's, ours).

        Args:
            names: Adapters; "default" if empty. Each has different values; the first is active.
            more: More fields of the config.
        """
        names = names or ("default",)
        made = []
        for library in (theirs, ours):
            with quiet_peft():
                model = library.get_peft_model(
                    model_named(self.model), self.config(library, **more), adapter_name=names[0]
                )
                for name in names[1:]:
                    model.add_adapter(name, self.config(library, **more))
            made.append(model)
        peft_model, our_model = made
        randomise(peft_model)
        copy_adapters(peft_model, our_model)
        peft_model.eval()  # the wrapper alone is in training mode after get_peft_model; ours has the mode of its base
        return peft_model, our_model

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the forward."""
        return inputs_for(self.model)

    def __str__(self) -> str:
        return self.name


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppress peft's own warnings, which are not under test, within a context; ours still fail a test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\..*")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft asks transformers so
        yield


def belongs_to_adapter(name: str) -> bool:
    """Return whether a parameter belongs to a factor or to a module in modules_to_save."""
    return ".lora_" in name or ".modules_to_save." in name


def randomise(model: nn.Module) -> None:
    """Give all tensors that peft would train different values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if belongs_to_adapter(name) or parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise)
                elif ".lora_" in name:
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.add_(0.3 * noise)


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Copy all adapters' tensors by their names in memory, and those of the base except packed weights."""
    given = dict(source.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in target.named_parameters(remove_duplicate=False):
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.copy_(given[name])


def _blocks(in_A: list[str], in_B: list[str], **more: Any) -> dict[str, Any]:
    return {"target_modules_bd_a": in_A, "target_modules_bd_b": in_B, "nblocks": 2, **more}


def _rows() -> list[Row]:
    word, pair, group, tag = "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"
    experts = ["gate_up_proj", "down_proj"]
    blocks = _blocks(["v_proj"], ["q_proj"])
    attention, gpt2, llama, bert, t5 = ["q_proj", "v_proj"], "gpt2-words", "llama-words", "bert-classes", "t5-words"
    return [
        # kinds x variants x inits
        Row("linear", "sequential", {"target_modules": ["up", "head"]}),
        Row("linear-dora", "sequential", {"target_modules": ["up", "head"], "use_dora": True}),
        Row("linear-gaussian", "sequential", {"target_modules": ["up"], "init_lora_weights": "gaussian"}),
        Row("linear-random", "sequential", {"target_modules": ["up", "head"], "init_lora_weights": False}),
        Row(
            "linear-dora-random", "sequential", {"target_modules": ["up"], "use_dora": True, "init_lora_weights": False}
        ),
        Row("linear-rslora-dora", "sequential", {"target_modules": ["up"], "use_dora": True, "use_rslora": True}),
        Row("embedding", "sequential", {"target_modules": ["embed"]}),
        Row("embedding-gaussian", "sequential", {"target_modules": ["embed"], "init_lora_weights": "gaussian"}),
        Row("embedding-random", "sequential", {"target_modules": ["embed", "up"], "init_lora_weights": False}),
        Row("embedding-rslora", "sequential", {"target_modules": ["embed"], "use_rslora": True}),
        Row("embedding-dora", "sequential", {"target_modules": ["embed", "up"], "use_dora": True}),
        Row("linear-bias", "sequential", {"target_modules": ["up"], "lora_bias": True}),
        Row("convolutions", "convolutions", {"target_modules": ["one", "two", "three"]}),
        Row("convolutions-dora", "convolutions", {"target_modules": ["one", "two", "three"], "use_dora": True}),
        Row("convolutions-bias", "convolutions", {"target_modules": ["one", "mixed", "three"], "lora_bias": True}),
        Row("convolutions-gaussian", "convolutions", {"target_modules": ["two"], "init_lora_weights": "gaussian"}),
        Row("convolutions-rslora", "convolutions", {"target_modules": ["one", "head"], "use_rslora": True}),
        Row("convolutions-in-groups", "convolutions-in-groups", {"target_modules": ["mixed", "head"]}),
        Row("unnamed", "sequential-unnamed", {"target_modules": ["1", "3"]}),
        Row("unnamed-all", "sequential-unnamed", {"target_modules": "all-linear"}),
        Row("conv1d", gpt2, {"task_type": word, "target_modules": ["c_attn", "c_proj"]}),
        Row("conv1d-dora", gpt2, {"task_type": word, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
        Row("conv1d-gaussian", gpt2, {"task_type": word, "target_modules": ["c_fc"], "init_lora_weights": "gaussian"}),
        Row("conv1d-random", gpt2, {"task_type": word, "target_modules": ["c_attn"], "init_lora_weights": False}),
        # how targets are named
        Row("default-targets-gpt2", gpt2, {"task_type": word}),
        Row("default-targets-llama", llama, {"task_type": word}),
        Row("default-targets-bert", bert, {"task_type": group}),
        Row("default-targets-t5", t5, {"task_type": pair}),
        Row("default-targets-opt", "opt-words", {"task_type": word}),
        Row("all-linear-gpt2", gpt2, {"task_type": word, "target_modules": "all-linear"}),
        Row("all-linear-llama", llama, {"task_type": word, "target_modules": "all-linear"}),
        Row("all-linear-qwen2", "qwen2-words", {"task_type": word, "target_modules": "all-linear"}),
        Row("all-linear-bert", bert, {"task_type": group, "target_modules": "all-linear"}),
        Row("all-linear-roberta", "roberta-classes", {"task_type": group, "target_modules": "all-linear"}),
        Row("all-linear-t5", t5, {"task_type": pair, "target_modules": "all-linear"}),
        Row("all-linear-dora", llama, {"task_type": word, "target_modules": "all-linear", "use_dora": True}),
        Row("regex", llama, {"task_type": word, "target_modules": r".*layers\.1\..*\.(q|k)_proj"}),
        Row("full-paths", llama, {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]}),
        Row("suffix-of-two-words", llama, {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}),
        Row(
            "exclude-list",
            llama,
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        ),
        Row("exclude-regex", llama, {"target_modules": attention, "exclude_modules": r".*layers\.0.*"}),
        Row("one-layer", llama, {"target_modules": attention, "layers_to_transform": 1}),
        Row("layers", llama, {"target_modules": attention, "layers_to_transform": [0], "layers_pattern": "layers"}),
        Row("layers-gpt2", gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["h"]}),
        # ranks and scales by site
        Row("rslora", llama, {"task_type": word, "target_modules": attention, "use_rslora": True}),
        Row(
            "rank-pattern",
            llama,
            {"target_modules": attention, "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
        ),
        Row("alpha-pattern", llama, {"target_modules": attention, "alpha_pattern": {"q_proj": 3, "v_proj": 11.5}}),
        Row(
            "patterns-rslora",
            gpt2,
            {
                "target_modules": ["c_attn", "c_proj"],
                "rank_pattern": {"attn.c_proj": 2},
                "alpha_pattern": {"c_attn": 9},
                "use_rslora": True,
            },
        ),
        Row(
            "patterns-anchored",
            llama,
            {"target_modules": attention, "rank_pattern": {"^model.layers.1.self_attn.q_proj": 3}},
        ),
        Row("kasa", "sequential", {"target_modules": ["up", "head"], "kasa_config": {}}),
        Row("kasa-rslora", llama, {"target_modules": attention, "kasa_config": {}, "use_rslora": True, "r": 7}),
        Row("kasa-lora-bias", "sequential", {"target_modules": ["up"], "kasa_config": {}, "lora_bias": True, "r": 1}),
        Row("kasa-bias", bert, {"target_modules": ["query"], "kasa_config": {}, "bias": "lora_only"}),
        Row("kasa-ranks", llama, {"target_modules": attention, "kasa_config": {}, "rank_pattern": {"q_proj": 2}}),
        Row("bdlora", "sequential", {"target_modules": ["up", "head"], "use_bdlora": _blocks(["head"], ["up"])}),
        Row("bdlora-rslora", llama, {"target_modules": attention, "use_bdlora": blocks, "use_rslora": True}),
        Row("bdlora-bias", "qwen2-words", {"target_modules": attention, "use_bdlora": blocks, "bias": "lora_only"}),
        Row(
            "bdlora-in-part",
            llama,
            {
                "target_modules": attention,
                "use_bdlora": _blocks(["q_proj"], [], match_strict=False),
            },
        ),
        Row(
            "bdlora-ranks",
            llama,
            {"target_modules": attention, "use_bdlora": blocks, "rank_pattern": {"q_proj": 2}, "r": 8},
        ),
        Row(
            "velora-rslora",
            llama,
            {"target_modules": attention, "velora_config": {"num_groups": 7}, "use_rslora": True},
        ),
        Row("velora-bias", gpt2, {"target_modules": ["c_attn"], "velora_config": {}, "lora_bias": True}),
        Row(
            "monteclora-rslora",
            llama,
            {"target_modules": attention, "monteclora_config": {"buffer_size": 1}, "use_rslora": True},
        ),
        Row(
            "monteclora-bias",
            gpt2,
            {
                "target_modules": ["c_attn"],
                "monteclora_config": {"num_samples": 2, "buffer_size": 1},
                "lora_bias": True,
            },
        ),
        Row("large-rank", "sequential", {"target_modules": ["head"], "r": 6}),
        # parts that are not factors
        Row("bias-all", bert, {"task_type": group, "target_modules": ["query"], "bias": "all"}),
        Row("bias-lora-only", bert, {"task_type": group, "target_modules": ["query", "value"], "bias": "lora_only"}),
        Row("bias-lora-only-gpt2", gpt2, {"task_type": word, "target_modules": ["c_attn"], "bias": "lora_only"}),
        Row("bias-lora-only-qwen2", "qwen2-words", {"target_modules": attention, "bias": "lora_only"}),
        Row("bias-all-opt", "opt-words", {"task_type": word, "target_modules": attention, "bias": "all"}),
        Row("saved-head", "sequential", {"target_modules": ["up"], "modules_to_save": ["head"]}),
        Row("saved-lm-head", llama, {"task_type": word, "target_modules": attention, "modules_to_save": ["lm_head"]}),
        Row("saved-pooler", "bert-features", {"target_modules": ["query"], "modules_to_save": ["pooler"]}),
        Row(
            "saved-and-bias",
            bert,
            {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"},
        ),
        # tasks and architectures
        Row("causal-llama", llama, {"task_type": word, "target_modules": [*attention, "down_proj"]}),
        Row("causal-tied", "llama-tied-words", {"task_type": word, "target_modules": attention}),
        Row("causal-qwen2", "qwen2-words", {"task_type": word, "target_modules": ["q_proj", "o_proj"]}),
        Row("causal-opt", "opt-words", {"task_type": word, "target_modules": ["q_proj", "fc1"]}),
        Row("causal-embeddings", llama, {"task_type": word, "target_modules": ["q_proj", "embed_tokens"]}),
        Row("causal-head", llama, {"task_type": word, "target_modules": ["q_proj", "lm_head"]}),
        Row("causal-qwen3", "qwen3-words", {"task_type": word, "target_modules": "all-linear"}),
        Row("causal-gemma", "gemma-words", {"task_type": word, "target_modules": ["q_proj", "gate_proj"]}),
        Row(
            "causal-gemma-embeddings", "gemma-words", {"task_type": word, "target_modules": ["q_proj", "embed_tokens"]}
        ),
        Row("causal-mixtral", "mixtral-words", {"task_type": word, "target_modules": ["q_proj", "o_proj"]}),
        Row(
            "experts-mixtral",
            "mixtral-words",
            {"task_type": word, "target_modules": [], "target_parameters": [f"experts.{p}" for p in experts]},
        ),
        Row(
            "experts-mixtral-and-modules",
            "mixtral-words",
            {"task_type": word, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        ),
        Row(
            "experts-mixtral-rslora",
            "mixtral-words",
            {
                "target_modules": [],
                "target_parameters": [f"experts.{p}" for p in experts],
                "use_rslora": True,
            },
        ),
        Row(
            "experts-gpt-oss",
            "gpt-oss-words",
            {"task_type": word, "target_modules": [], "target_parameters": [f"mlp.experts.{p}" for p in experts]},
        ),
        Row(
            "parameter-of-a-linear",
            llama,
            {"task_type": word, "target_modules": ["q_proj"], "target_parameters": ["gate_proj.weight"]},
        ),
        Row(
            "parameter-of-a-conv1d",
            gpt2,
            {"task_type": word, "target_modules": [], "target_parameters": ["attn.c_proj.weight", "c_fc.weight"]},
        ),
        Row(
            "layers-stacked-llama",
            llama,
            {"task_type": word, "target_modules": attention, "layer_replication": [(0, 2), (1, 2), (0, 1)]},
        ),
        Row(
            "layers-stacked-bert",
            "bert-features",
            {"target_modules": ["query"], "layer_replication": [(0, 1), (0, 2)]},
        ),
        Row("causal-neox", "neox-words", {"task_type": word, "target_modules": ["query_key_value", "dense_4h_to_h"]}),
        Row(
            "pictures-vit", "vit-pictures", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        ),
        Row("pictures-vit-patches", "vit-pictures", {"target_modules": ["projection", "classifier"]}),
        Row("speech-whisper", "whisper-speech", {"target_modules": ["q_proj", "v_proj", "fc1"]}),
        Row("classes-bert", bert, {"task_type": group, "target_modules": ["query", "dense"]}),
        Row("classes-roberta", "roberta-classes", {"task_type": group, "target_modules": ["query", "value"]}),
        Row("classes-gpt2", "gpt2-classes", {"task_type": group, "target_modules": ["c_attn"]}),
        Row("classes-llama", "llama-classes", {"task_type": group, "target_modules": attention}),
        Row("classes-word-embeddings", bert, {"task_type": group, "target_modules": ["word_embeddings", "query"]}),
        Row("tokens-bert", "bert-tokens", {"task_type": tag, "target_modules": ["query", "key"]}),
        Row("answers-bert", "bert-answers", {"task_type": "QUESTION_ANS", "target_modules": ["query"]}),
        Row(
            "features-bert",
            "bert-features",
            {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "pooler.dense"]},
        ),
        Row("sequences-t5", t5, {"task_type": pair, "target_modules": ["q", "v", "wo"]}),
        Row("sequences-t5-dora", t5, {"task_type": pair, "target_modules": ["q", "v"], "use_dora": True}),
    ]


ROWS_COMPARED = _rows()
