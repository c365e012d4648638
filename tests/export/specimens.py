"""Small adapters written by real peft (or, where peft lacks the variant, by lorakit) for the rules about runtimes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from tests import small_models
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12)
INVOCATION = [3, 4]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
THETA = 500_000.0

Edit = Callable[[Path], None]
Tensors = dict[str, Tensor]

ROPE = {"rope_type": "default", "rope_theta": THETA}
BASES: dict[str, Callable[..., Any]] = {
    "llama": lambda **sizes: small_models.llama(rope_parameters=ROPE, **sizes),
    "tied": lambda **sizes: small_models.llama(tie_word_embeddings=True, **sizes),
    "deeper": lambda **sizes: small_models.llama(**{**sizes, "num_hidden_layers": 3}),
    "larger": lambda **sizes: small_models.llama(**{**sizes, "intermediate_size": 64}),
    "resized": lambda **sizes: small_models.llama(**{**sizes, "vocab_size": small_models.VOCABULARY + 3}),
    "qwen2": small_models.qwen2,
    "gpt2": small_models.gpt2,
    "mixtral": small_models.mixtral,
    "classifier": lambda **sizes: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**small_models.GROUPED | sizes, num_labels=3, pad_token_id=0)
    ),
}
"""Name of a base -> a function that makes it."""


def with_random_adapter(base: Any, folder: Path, std: float, **settings: Any) -> Any:
    """Return a model of PEFT with a random adapter on a base, after saving the adapter."""
    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(base, peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    return model


def nothing(folder: Path) -> None:
    """Leave an adapter unchanged."""


@dataclass(frozen=True)
class Specimen:
    """Settings and edits that make a small adapter.

    Attributes:
        settings: Fields of the config, for peft or, if `own`, for lorakit.
        edit: What is then changed in its directory.
        trained_on: Name of the base in `BASES` for which the adapter is made.
        served_on: Name of the base that the runtime has.
        edit_base: What is changed in the directory of that base.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    edit: Edit = nothing
    trained_on: str = "llama"
    served_on: str = "llama"
    edit_base: Edit = nothing
    own: bool = False

    def model(self, **sizes: int) -> Any:
        """Return the base that the runtime has."""
        return _made(self.served_on, **sizes)

    def write(self, folder: Path, **sizes: int) -> tuple[Path, Path, Tensor]:
        """Write the base and the adapter, and return their directories and the logits that the adapter is for."""
        base, adapter = folder / "base", folder / "adapter"
        self.model(**sizes).save_pretrained(base)
        self.edit_base(base)
        model = _made(self.trained_on, **sizes)
        model.name_or_path = str(base)
        fields = {"r": 8, "target_modules": TARGETS, **self.settings}
        if self.own:
            core.attach(model, LoraConfig(**fields))
            _randomize([parameter for _, parameter in core.trainable_parameters(model)])
            expected = logits(model)
            core.save_adapter(model, adapter)
        else:
            task = "SEQ_CLS" if self.trained_on == "classifier" else "CAUSAL_LM"
            model = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": task, **fields}))
            own = [p for n, p in model.named_parameters() if "lora_" in n and "monteclora" not in n and p.requires_grad]
            _randomize(own)
            expected = logits(model.eval())
            model.save_pretrained(adapter)
        self.edit(adapter)
        return base, adapter, expected


def _made(name: str, **sizes: int) -> Any:
    torch.manual_seed(0)
    return BASES[name](**sizes).eval()


def _randomize(parameters: list[Tensor]) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.2 * torch.randn_like(parameter)


def tensors(change: Callable[[Tensors], Tensors]) -> Edit:
    """Return an edit of an adapter's tensors."""

    def edit(folder: Path) -> None:
        found = change(load_file(folder / WEIGHTS))
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / WEIGHTS)

    return edit


def renamed(old: str, new: str) -> Edit:
    """Return an edit that replaces a part of the tensors' names."""
    return tensors(lambda found: {name.replace(old, new): tensor for name, tensor in found.items()})


def without(part: str) -> Edit:
    """Return an edit that drops the tensors whose names contain a text."""
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def mapped(part: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """Return an edit that changes the tensors whose names contain a text."""
    return tensors(lambda found: {n: change(tensor) if part in n else tensor for n, tensor in found.items()})


def config(name: str = CONFIG, **fields: Any) -> Edit:
    """Return an edit of fields of a JSON file; None removes a field."""

    def edit(folder: Path) -> None:
        values = {**(json.loads((folder / name).read_text()) if (folder / name).exists() else {}), **fields}
        values = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(values))

    return edit


def _with_nan(tensor: Tensor) -> Tensor:
    return tensor.flatten().index_fill(0, torch.tensor([0]), torch.nan).view_as(tensor)


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def added_tokens(*added: str) -> Edit:
    """Return an edit that writes the tokenizer of one word and added tokens, as transformers 5 does."""

    def edit(folder: Path) -> None:
        tokenizer = Tokenizer(models.WordLevel({"t0": 0}, unk_token="t0"))
        tokenizer.add_tokens(list(added))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)

    return edit


BD = BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}

SPECIMENS: dict[str, Specimen] = {
    "any adapter": Specimen(),
    "rank": Specimen({"r": 32}),
    "rank value": Specimen(),  # the tests pass a rank that is not in the list
    "rslora": Specimen({"use_rslora": True}),
    "rank pattern": Specimen({"rank_pattern": {"q_proj": 4}}),
    "alpha pattern": Specimen({"alpha_pattern": {"q_proj": 4}}),
    "dora": Specimen({"use_dora": True}),
    "kasa": Specimen({"kasa_config": KasaConfig()}),
    "lora bias": Specimen({"lora_bias": True}),
    "bias": Specimen({"bias": "all"}, trained_on="qwen2", served_on="qwen2"),
    "saved module": Specimen({"modules_to_save": ["lm_head"]}),
    "classification head": Specimen(trained_on="classifier", served_on="classifier"),
    "token rows": Specimen({"trainable_token_indices": [3, 4]}),
    "new tokens": Specimen(
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        config("added_tokens.json", **{"<new>": small_models.VOCABULARY}),
        trained_on="resized",
    ),
    "resized embedding": Specimen({"target_modules": ["embed_tokens", "q_proj"]}, trained_on="resized"),
    "alora": Specimen({"alora_invocation_tokens": INVOCATION}),
    "init": Specimen({"init_lora_weights": "pissa"}),
    "bd-lora": Specimen({"use_bdlora": BD}),
    "qa-lora": Specimen({"use_qalora": True, "qalora_group_size": 4}),
    "lora-xs": Specimen({"use_lora_xs": True}, own=True),
    "extra tensors": Specimen({"velora_config": VeloraConfig(num_groups=4, init_type="random")}),
    "layer replication": Specimen({"layer_replication": [(0, 2), (1, 2)]}),
    "experts": Specimen(
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]},
        trained_on="mixtral",
        served_on="mixtral",
    ),
    "target expression": Specimen({"target_modules": r".*\.0\..*(q_proj|v_proj)"}),
    "part of attention": Specimen({"target_modules": ["k_proj"]}),
    "unselected": Specimen(edit=config(target_modules=["k_proj"])),
    "incomplete site": Specimen(edit=without("layers.0.self_attn.q_proj.lora_B")),
    "prefix": Specimen(edit=renamed("base_model.model.", "")),
    "nan": Specimen(edit=mapped("q_proj.lora_A", _with_nan)),
    "scale 0": Specimen(edit=config(lora_alpha=0)),
    "zero update": Specimen(edit=mapped("lora_B", torch.zeros_like)),
    "no base name": Specimen(edit=config(base_model_name_or_path=None)),
    "base name": Specimen(edit=config(base_model_name_or_path="owner/other")),
    "other base": Specimen({"layers_to_transform": [0, 1]}, trained_on="deeper", own=True),
    "unknown name": Specimen({"target_modules": ["q_proj"]}, renamed("q_proj", "query")),
    "language model": Specimen(edit=renamed("model.model.layers", "model.model.language_model.layers")),
    "unknown path": Specimen({"layers_to_transform": [1]}, renamed("layers.1.", "layers.7.")),
    "shape": Specimen({"target_modules": ["down_proj"]}, trained_on="larger"),
    "grouped inputs": Specimen({"use_qalora": True, "qalora_group_size": 4}, own=True),
    "missing sites": Specimen(edit=without("layers.0.self_attn.q_proj")),
    "quantized base": Specimen(edit_base=config("config.json", quantization_config=QUANTIZED)),
    "architecture": Specimen({"target_modules": ["c_attn"]}, trained_on="gpt2", served_on="gpt2"),
    "tied head": Specimen({"target_modules": ["lm_head"]}, trained_on="tied", served_on="tied"),
    "tied embedding": Specimen({"target_modules": ["embed_tokens"]}, trained_on="tied", served_on="tied"),
    "tokenizer": Specimen(edit=added_tokens("<s>", "<tool>"), edit_base=added_tokens("<s>")),
    "chat template": Specimen(edit=_template),
    "rope parameters": Specimen(),  # transformers 5 writes the base's config so
}
"""Name of a condition -> an adapter for which it holds."""


def logits(model: nn.Module) -> Tensor:
    """Return the logits, in double precision, of (rows, positions) tokens, or of (rows) for a classifier."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(IDS).logits.double()


def in_peft(specimen: Specimen, adapter: Path) -> Tensor:
    """Return the logits of real peft with an adapter; any of its errors if it does not load it."""
    return logits(peft.PeftModel.from_pretrained(specimen.model(), str(adapter)).eval())


def in_lorakit(specimen: Specimen, adapter: Path) -> Tensor:
    """Return lorakit's logits with an adapter; a LorakitError if it does not load it."""
    model = specimen.model()
    core.load_adapter(model, adapter, allow=["recompute_init"])
    return logits(model.eval())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
    "layer": {"layers_to_transform": [1]},
    "all": {"target_modules": "all-linear"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": INVOCATION},
    "kasa": {"kasa_config": KasaConfig()},
    "velora": {"velora_config": VeloraConfig(num_groups=4, init_type="random")},
    "monteclora": {"monteclora_config": MontecloraConfig(num_samples=3)},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"lora_bias": True},
}


def fields_of(variant: str, setting: str) -> dict[str, Any]:
    """Return the fields of a variant with a setting, which the caller may change."""
    return copy.deepcopy({**VARIANTS[variant], **SETTINGS[setting]})
