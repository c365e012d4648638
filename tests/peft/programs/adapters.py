"""Adapters on bare models, as transformers, pipelines, accelerate, sentence-transformers and diffusers handle them.

    python adapters.py FOLDER_OF_A_MODEL  FOLDER_FOR_FILES

After the first two lines this is written as for peft. A package that is not installed is left out.
"""

from lorakit.peft import install_as_peft

install_as_peft()

import importlib.util
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, pipeline

base_folder, files = sys.argv[1], Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(base_folder)
prompt = tokenizer("what is 7 and 7?", return_tensors="pt")
targets = ["q_proj", "v_proj"]


def base():
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)


def randomise(model, *names):
    """Give every factor different values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and (not names or any(f".{one}" in name for one in names)):
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def logits(model):
    with torch.no_grad():
        return model.eval()(**prompt).logits


# transformers' own adapters, without a wrapper
plain = logits(base())
model = base()
model.add_adapter(LoraConfig(r=4, target_modules=targets), "one")
assert torch.equal(logits(model), plain)
assert {name for name, value in model.named_parameters() if value.requires_grad} == {
    name for name, _ in model.named_parameters() if ".lora_" in name
}
model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"]), "two")
randomise(model)
assert model.active_adapters() == ["two"]
two = logits(model)
model.set_adapter("one")
one = logits(model)
model.set_adapter(["one", "two"])
both = logits(model)
model.disable_adapters()
assert torch.equal(logits(model), plain)
model.enable_adapters()
assert torch.equal(logits(model), both)
assert not any(torch.allclose(a, b) for a, b in ((one, two), (one, both), (two, both), (one, plain), (two, plain)))
model.set_adapter("one")
held = model.get_adapter_state_dict("one")
assert held
assert all(".lora_" in name and ".one" not in name for name in held)
print("ok: transformers: adapters are added, chosen and disabled")

model.save_pretrained(files / "one")
assert {path.name for path in (files / "one").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
assert not (files / "one" / "model.safetensors").exists()
stored = load_file(files / "one" / "adapter_model.safetensors")
assert set(stored) == {f"base_model.model.{name}" for name in held}
loaded = base()
loaded.load_adapter(str(files / "one"), adapter_name="again")
assert torch.equal(logits(loaded), one)
assert not any(value.requires_grad for name, value in loaded.named_parameters() if ".lora_" in name)
wrapped = PeftModel.from_pretrained(base(), files / "one")
assert torch.equal(logits(wrapped), one)
print("ok: transformers: an adapter is saved and loaded")

model.delete_adapter("two")
assert list(model.peft_config) == ["one"]
assert torch.equal(logits(model), one)
model.delete_adapter("one")
assert not model._hf_peft_config_loaded
assert torch.equal(logits(model), plain)
print("ok: transformers: adapters are deleted")

# transformers joins the experts' tensors of older files; adapters on them and on other modules still load
from transformers import MixtralConfig, MixtralForCausalLM

sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
mixture = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
torch.manual_seed(0)
MixtralForCausalLM(mixture).save_pretrained(files / "experts")
for label, fields in (
    ("beside", {"target_modules": ["q_proj"]}),
    ("on", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
):
    model = AutoModelForCausalLM.from_pretrained(files / "experts", dtype=torch.float32)
    model.add_adapter(LoraConfig(r=2, **fields))
    randomise(model)
    answer = logits(model)
    model.save_pretrained(files / label)
    loaded = AutoModelForCausalLM.from_pretrained(files / "experts", dtype=torch.float32)
    loaded.load_adapter(str(files / label))
    assert torch.equal(logits(loaded), answer), label
print("ok: transformers: adapters with and on fused experts")

# adapters of transformers 4, with tensors for each expert
from safetensors.torch import save_file

sizes_of = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}
for label, fields in (("plain", {}), ("rslora", {"use_rslora": True}), ("up", {"target_modules": ["w1", "w3"]})):
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3", "gate"]} | fields)
    generator, tensors = torch.Generator().manual_seed(7), {}
    for layer in range(2):
        block = f"base_model.model.model.layers.{layer}.block_sparse_moe"
        shapes = {f"{block}.experts.{one}.{old}": size for one in range(2) for old, size in sizes_of.items()}
        for path, (rows, columns) in (shapes | {f"{block}.gate": (2, 32)}).items():
            if path.rpartition(".")[2] in config.target_modules:
                for part, size in (("A", (2, columns)), ("B", (rows, 2))):
                    tensors[f"{path}.lora_{part}.weight"] = 0.2 * torch.randn(size, generator=generator)
    config.save_pretrained(files / f"old-{label}")
    save_file(tensors, files / f"old-{label}" / "adapter_model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(files / "experts", dtype=torch.float32)
    report = loaded.load_adapter(str(files / f"old-{label}"))
    assert not (report.missing_keys or report.unexpected_keys or report.mismatched_keys), report
    expected = AutoModelForCausalLM.from_pretrained(files / "experts", dtype=torch.float32)
    unadapted = logits(expected)
    expected = logits(PeftModel.from_pretrained(expected, files / f"old-{label}"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, unadapted, atol=1e-4), label
    loaded.save_pretrained(files / f"again-{label}")
    again = AutoModelForCausalLM.from_pretrained(files / "experts", dtype=torch.float32)
    again.load_adapter(str(files / f"again-{label}"))
    torch.testing.assert_close(logits(again), logits(loaded))
print("ok: transformers: adapters with tensors for each expert")

# an adapter's directory instead of a model's
wrapped = get_peft_model(base(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
randomise(wrapped)
wrapped.save_pretrained(files / "wrapped")
tokenizer.save_pretrained(files / "wrapped")
answer = logits(wrapped)
opened = AutoModelForCausalLM.from_pretrained(files / "wrapped", dtype=torch.float32)
assert torch.equal(logits(opened), answer)
print("ok: transformers: from_pretrained opens the folder of an adapter")

options = {"max_new_tokens": 6, "do_sample": False}
texts = [
    pipeline("text-generation", model=source, tokenizer=tokenizer)("what is 7", **options)[0]["generated_text"]
    for source in (wrapped, str(files / "wrapped"), opened)
]
assert texts[0] == texts[1] == texts[2]
print("ok: pipeline: over a wrapper, a folder and an opened model")

# accelerate
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, is_peft_model

accelerator = Accelerator(cpu=True)
student = get_peft_model(base(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([value for value in student.parameters() if value.requires_grad], lr=0.01)
student, optimizer = accelerator.prepare(student, optimizer)
assert is_peft_model(student)
student.train()


def step():
    loss = student(**prompt, labels=prompt["input_ids"]).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


first = step()
accelerator.save_state(files / "state")
after = [step(), step()]
accelerator.load_state(files / "state")
assert [step(), step()] == after
assert after[1] < first
accelerator.unwrap_model(student).save_pretrained(files / "accelerated", state_dict=accelerator.get_state_dict(student))
again = PeftModel.from_pretrained(base(), files / "accelerated")
assert torch.equal(logits(again), logits(extract_model_from_parallel(student)))
print("ok: accelerate: prepared, stepped, saved and brought back")

if importlib.util.find_spec("sentence_transformers"):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    words = [*"abcdefghijklmnopqrstuvwxyz", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (files / "bert").mkdir()
    (files / "bert" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    sizes = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, intermediate_size=48)).save_pretrained(files / "bert")
    BertTokenizerFast(vocab=str(files / "bert" / "vocab.txt")).save_pretrained(files / "bert")
    sentences = ["a b c", "x y z", "q"]

    reader = Transformer(str(files / "bert"))
    encoder = SentenceTransformer(modules=[reader, Pooling(reader.get_embedding_dimension())], device="cpu")
    before = encoder.encode(sentences, convert_to_tensor=True)
    encoder.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    assert torch.equal(encoder.encode(sentences, convert_to_tensor=True), before)
    randomise(encoder)
    adapted = encoder.encode(sentences, convert_to_tensor=True)
    assert not torch.allclose(adapted, before)
    encoder.save_pretrained(str(files / "sentences"))
    assert not list((files / "sentences").rglob("model.safetensors"))
    reopened = SentenceTransformer(str(files / "sentences"), device="cpu")
    assert torch.equal(reopened.encode(sentences, convert_to_tensor=True), adapted)
    print("ok: sentence-transformers: an adapter is added, saved and opened")

if importlib.util.find_spec("diffusers"):
    from diffusers import UNet2DConditionModel

    def unet():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
        ).eval()

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))

    def image(model):
        with torch.no_grad():
            return model(noise, 5, text).sample

    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "conv1", "proj_in"]}
    blank = image(unet())
    painter = unet()
    painter.add_adapter(LoraConfig(**settings), "style")
    randomise(painter)
    styled = image(painter)
    assert not torch.allclose(styled, blank)
    painter.disable_adapters()
    assert torch.equal(image(painter), blank)
    painter.enable_adapters()
    painter.save_lora_adapter(files / "unet", adapter_name="style")
    other = unet()
    other.load_lora_adapter(str(files / "unet"), prefix=None, adapter_name="style", use_safetensors=True)
    assert torch.equal(image(other), styled)
    other.set_adapters(["style"], [0.0])
    assert torch.allclose(image(other), blank, atol=1e-6)
    other.set_adapters(["style"], [1.0])
    other.fuse_lora()
    assert torch.allclose(image(other), styled, atol=1e-5)
    other.unfuse_lora()
    assert torch.equal(image(other), styled)
    other.delete_adapters(["style"])
    assert torch.equal(image(other), blank)
    print("ok: diffusers: a LoRA is added, saved, loaded, weighted, fused and deleted")

    injected = inject_adapter_in_model(LoraConfig(**settings), unet(), "mine")
    randomise(injected)
    assert torch.equal(image(injected), styled)
    print("ok: diffusers: inject_adapter_in_model")
