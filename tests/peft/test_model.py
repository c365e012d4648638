"""`PeftModel`: adapters that come, go, act, are trained, saved and read; and what it says when something does not fit."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.errors import AdapterError, AdapterFileError, ConfigError, RouteError
from lorakit.peft import LoraConfig, LoraModel, PeftModel, PeftModelForCausalLM, get_peft_model

from .models import bert, ids, randomise, t5, trained

TARGETS = ["q_proj", "v_proj"]
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")


@pytest.fixture
def again(tiny_llama: Any) -> Callable[[], Any]:
    """Makes fresh bases with the bits that `tiny_llama` had before adapters came."""
    kept = copy.deepcopy(tiny_llama)
    return lambda: copy.deepcopy(kept)


@pytest.fixture
def two(again: Any, tiny_llama: Any) -> Any:
    """Two adapters "a" and "b" with different values; "a" is active."""
    model = get_peft_model(tiny_llama, CONFIG, adapter_name="a")
    model.add_adapter("b", CONFIG)
    randomise(model)
    return model


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), **more).logits


class TestTrainableParameters:
    def test_the_line_on_gpt2_small(self, capsys: pytest.CaptureFixture[str]) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.device("meta"):
            base = GPT2LMHeadModel(GPT2Config())
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"))
        model.print_trainable_parameters()
        expected = "trainable params: 811,008 || all params: 125,250,816 || trainable%: 0.6475\n"
        assert capsys.readouterr().out == expected
        assert model.get_nb_trainable_parameters() == (811_008, 125_250_816)
        assert base.num_parameters(only_trainable=True) == 811_008

    def test_copied_heads_count_as_they_do_in_peft(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        head = 16 * 2 + 2
        assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (16 + 16) + head
        model.print_trainable_parameters()
        assert capsys.readouterr().out.startswith("trainable params: 162 || all params: ")

    def test_nothing_trained(self, two: Any, capsys: pytest.CaptureFixture[str]) -> None:
        two.set_adapter("a", inference_mode=True)
        two.print_trainable_parameters()
        assert "trainable params: 0 ||" in capsys.readouterr().out
        assert "trainable%: 0.0000" in repr(capsys.readouterr()) or two.get_nb_trainable_parameters()[0] == 0


class TestWhichActs:
    def test_the_first_is_active_and_alone_is_trained(self, two: Any) -> None:
        assert (two.active_adapter, two.active_adapters) == ("a", ["a"])
        assert list(two.peft_config) == ["a", "b"]
        assert two.active_peft_config is two.peft_config["a"]
        assert trained(two) and all(".a." in name for name in trained(two))

    def test_set_adapter_moves_outputs_training_and_gradients(self, two: Any) -> None:
        before = logits(two)
        two.set_adapter("b")
        assert two.active_adapter == "b"
        assert not torch.equal(logits(two), before)
        two(input_ids=ids(), labels=ids()).loss.backward()
        reached = {name for name, p in two.named_parameters() if p.grad is not None}
        assert reached == trained(two)
        assert all(".b." in name for name in reached)
        two.set_adapter("a")
        assert torch.equal(logits(two), before)

    def test_several_at_once(self, two: Any) -> None:
        two.set_adapter(["a", "b"])
        assert two.active_adapter == two.active_adapters == ["a", "b"]
        assert {name.split(".")[-2] for name in trained(two)} == {"a", "b"}
        assert not torch.equal(logits(two), logits(two, adapter_names=["a"] * 3))

    def test_in_inference_mode_nothing_is_trained(self, two: Any) -> None:
        two.set_adapter("b", inference_mode=True)
        assert (two.active_adapter, trained(two)) == ("b", set())
        two.set_adapter("b")
        assert all(".b." in name for name in trained(two))

    def test_a_config_in_inference_mode_comes_frozen(self, tiny_llama: Any) -> None:
        config = LoraConfig(target_modules=TARGETS, inference_mode=True)
        assert trained(get_peft_model(tiny_llama, config)) == set()

    def test_unknown_names(self, two: Any) -> None:
        with pytest.raises(AdapterError, match=r"^Adapter c not found\. Available: a, b\.$"):
            two.set_adapter("c")
        with pytest.raises(AdapterError, match=r"^Adapter c does not exist"):
            two.delete_adapter("c")
        with pytest.raises(ConfigError, match=r"Trying to infer with non-existing adapter\(s\): c"):
            logits(two, adapter_names=["a", "b", "c"])
        assert two.active_adapter == "a"

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a", "Adapter with name 'a' already exists"),
            ("x.y", "'x.y' cannot be an adapter's name"),
            ("keys", "torch's module containers have an attribute of that name"),
            ("", "'' cannot be an adapter's name"),
            ("../up", "cannot be an adapter's name"),
        ],
    )
    def test_names_that_cannot_be(self, two: Any, name: str, text: str) -> None:
        with pytest.raises(AdapterError, match=text):
            two.add_adapter(name, CONFIG)
        assert list(two.peft_config) == ["a", "b"]

    def test_attributes_of_the_model_are_in_reach(self, two: Any, tiny_llama: Any) -> None:
        assert two.config is tiny_llama.config
        assert two.lm_head is tiny_llama.lm_head
        assert two.device == torch.device("cpu")
        assert two.get_base_model() is tiny_llama
        assert isinstance(two.base_model, LoraModel)
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = two.no_such_thing

    def test_what_is_trained_has_a_class_people_know(self, two: Any) -> None:
        site = two.base_model.model.model.layers[0].self_attn.q_proj
        assert isinstance(site, lorakit.LoraLayer)
        assert isinstance(site.lora_A["a"], torch.nn.Linear)
        assert (site.r["a"], site.lora_alpha["a"], site.scaling["a"]) == (4, 8, 2.0)
        assert (site.in_features, site.out_features) == (32, 32)


class TestDisable:
    def test_is_the_base_for_a_block(self, two: Any, tiny_llama: Any) -> None:
        adapted = logits(two)
        with two.disable_adapter():
            base = logits(two)
            assert not torch.equal(base, adapted)
        assert torch.equal(logits(two), adapted)
        assert torch.equal(two.unload()(ids()).logits, base)

    def test_ends_with_its_block_when_the_block_raises(self, two: Any) -> None:
        adapted = logits(two)
        with pytest.raises(ZeroDivisionError), two.disable_adapter():
            _ = 1 / 0
        assert torch.equal(logits(two), adapted)

    def test_no_gradient_reaches_an_adapter_inside(self, two: Any) -> None:
        with two.disable_adapter():
            loss = two(input_ids=ids(), labels=ids()).loss
        assert not loss.requires_grad

    def test_layers_can_be_switched_off_until_further_notice(self, two: Any) -> None:
        adapted = logits(two)
        with two.disable_adapter():
            base = logits(two)
        two.base_model.disable_adapter_layers()
        assert torch.equal(logits(two), base)
        two.base_model.enable_adapter_layers()
        assert torch.equal(logits(two), adapted)
        assert two.active_adapter == "a"

    def test_without_adapters_it_does_nothing(self, two: Any) -> None:
        two.delete_adapter("b")
        two.delete_adapter("a")
        with two.disable_adapter():
            assert logits(two).shape == (3, 7, 512)

    def test_another_thread_keeps_its_adapter(self, two: Any) -> None:
        adapted, seen = logits(two), []

        def work() -> None:
            with pytest.warns(RuntimeWarning, match="block is open on this model in another thread"):
                seen.append(logits(two))

        with two.disable_adapter():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert torch.equal(seen[0], adapted)


class TestDelete:
    def test_of_the_active_one_names_the_next(self, two: Any) -> None:
        two.set_adapter("b")
        expected = logits(two)
        two.set_adapter("a")
        with pytest.warns(
            UserWarning, match=r"Adapter a was active which is now deleted. Setting active adapter to b\."
        ):
            two.delete_adapter("a")
        assert two.active_adapter == "b"
        assert torch.equal(logits(two), expected)
        assert all(".b." in name for name in trained(two))

    def test_of_another_changes_nothing_else(self, two: Any) -> None:
        before, names = logits(two), trained(two)
        two.delete_adapter("b")
        assert (list(two.peft_config), trained(two)) == (["a"], names)
        assert torch.equal(logits(two), before)
        assert not any(".b." in name for name in two.state_dict())

    def test_of_the_last_leaves_the_base(self, two: Any) -> None:
        two.delete_adapter("b")
        two.delete_adapter("a")
        assert two.peft_config == {}
        assert not any("lora_" in name or "base_layer" in name for name in two.state_dict())
        two.add_adapter("c", CONFIG)
        assert two.active_adapter == "c"


class TestRows:
    def test_each_row_has_its_adapter(self, two: Any) -> None:
        with two.disable_adapter():
            base = logits(two)
        a = logits(two)
        two.set_adapter("b")
        b = logits(two)
        mixed = logits(two, adapter_names=["b", "__base__", "a"])
        torch.testing.assert_close(mixed, torch.stack([b[0], base[1], a[2]]), rtol=1e-5, atol=1e-6)
        assert two.active_adapter == "b"

    def test_too_few_and_too_many(self, two: Any) -> None:
        for names in (["a"], ["a"] * 4):
            with pytest.raises(RouteError, match="Pass one adapter per row of the batch"):
                logits(two, adapter_names=names)

    def test_none_at_all(self, two: Any) -> None:
        with pytest.raises(RouteError, match="a list with one adapter"):
            logits(two, adapter_names=[])

    def test_not_while_training(self, two: Any) -> None:
        with pytest.raises(ConfigError, match=r"^Cannot pass `adapter_names` when the model is in training mode\.$"):
            two.train()(input_ids=ids(), adapter_names=["a", "b", "a"])

    @pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
    @pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
    def test_generate(self, tiny_llama: Any, kind: str, how: dict[str, int]) -> None:
        model: Any = two_t5() if kind == "encoder-decoder" else two_of(tiny_llama)
        common = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
        names = ["b", "__base__", "a"]
        mixed = model.generate(input_ids=ids(), attention_mask=torch.ones_like(ids()), adapter_names=names, **common)
        each = how.get("num_return_sequences", 1)
        for row, name in enumerate(names):
            prompt = ids()[row : row + 1]
            with model.disable_adapter() if name == "__base__" else _using(model, name):
                alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **common)
            assert torch.equal(mixed[row * each : (row + 1) * each], alone)

    def test_beams_from_a_generation_config(self, two: Any) -> None:
        from transformers import GenerationConfig

        how = GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0)
        out = two.generate(
            input_ids=ids(), attention_mask=torch.ones_like(ids()), generation_config=how, adapter_names=["a", "b", "a"]
        )
        assert out.shape[0] == 3

    def test_generate_in_a_thread_carries_its_route(self, two: Any) -> None:
        common = {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "max_new_tokens": 4, "pad_token_id": 0}
        expected = two.generate(**common, adapter_names=["b"] * 3)
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(two.generate(**common, adapter_names=["b"] * 3)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], expected)


def two_of(base: Any) -> PeftModel:
    model = get_peft_model(base, CONFIG, adapter_name="a")
    model.add_adapter("b", CONFIG)
    randomise(model)
    return model


def two_t5() -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(t5(), config, adapter_name="a")
    model.add_adapter("b", config)
    randomise(model)
    return model


class _using:
    """A block in which this adapter is the default."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name, self.before = model, name, model.active_adapter

    def __enter__(self) -> None:
        self.model.set_adapter(self.name)

    def __exit__(self, *_: object) -> None:
        self.model.set_adapter(self.before)


class TestFiles:
    def test_default_at_the_root_and_others_below(self, tiny_llama: Any, tmp_path: Path) -> None:
        model = get_peft_model(tiny_llama, CONFIG)
        model.add_adapter("b", CONFIG)
        model.save_pretrained(tmp_path / "out")
        files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
        three = {"adapter_config.json", "adapter_model.safetensors", "lorakit.json"}
        assert files == three | {f"b/{name}" for name in three} | {"README.md"}

    def test_selected_adapters_and_the_main_process(self, two: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path / "none", is_main_process=False)
        assert not (tmp_path / "none").exists()
        two.save_pretrained(str(tmp_path / "some"), selected_adapters=["b"])
        assert {p.name for p in (tmp_path / "some").iterdir()} == {"b", "README.md"}
        with pytest.raises(ConfigError, match=r"invalid `selected_adapters` arguments.* got \['c'\]"):
            two.save_pretrained(tmp_path / "some", selected_adapters=["c"])

    def test_no_pickle_is_written_or_read(self, two: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not write pickle files"):
            two.save_pretrained(tmp_path, safe_serialization=False)
        two.save_pretrained(tmp_path, selected_adapters=["a"])
        (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
        with pytest.raises(AdapterFileError, match="the weights are a pickle"):
            two.load_adapter(tmp_path / "a", "c")

    def test_a_file_stands_in_the_way(self, two: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="is a file; pass a directory"):
            two.save_pretrained(tmp_path / "file")

    def test_what_comes_back(self, two: Any, again: Any, tmp_path: Path) -> None:
        expected = logits(two)
        two.save_pretrained(tmp_path)
        base = again()
        model = PeftModel.from_pretrained(base, tmp_path / "a")
        assert type(model) is PeftModelForCausalLM
        assert torch.equal(logits(model), expected)
        assert (model.active_adapter, model.training) == ("default", False)
        assert model.peft_config["default"].inference_mode
        model.load_adapter(tmp_path / "b", "b")
        assert model.active_adapter == "default"
        model.set_adapter("b")
        assert not torch.equal(logits(model), expected)

    def test_frozen_unless_asked(self, two: Any, again: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path)
        frozen = PeftModel.from_pretrained(again(), tmp_path / "a")
        assert trained(frozen) == set()
        going_on = PeftModel.from_pretrained(again(), tmp_path / "a", is_trainable=True)
        assert trained(going_on)
        assert all(".lora_" in name for name in trained(going_on))
        assert not going_on.peft_config["default"].inference_mode
        frozen.load_adapter(tmp_path / "b", "b", is_trainable=True)  # not active, so not trained until it is
        frozen.set_adapter("b")
        assert all(".b." in name for name in trained(frozen))

    def test_by_string_and_in_a_subfolder(self, two: Any, again: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(again(), str(tmp_path), subfolder="b", adapter_name="x")
        assert list(model.peft_config) == ["x"]

    def test_a_subclass_asked_by_name(self, two: Any, again: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path)
        model = PeftModelForCausalLM.from_pretrained(again(), tmp_path / "a")
        assert type(model) is PeftModelForCausalLM

    def test_missing_folder(self, tiny_llama: Any, tmp_path: Path) -> None:
        with pytest.raises(
            AdapterFileError,
            match=r"nowhere: directory not found; an adapter is a directory with adapter_config\.json",
        ):
            PeftModel.from_pretrained(tiny_llama, tmp_path / "nowhere")
        with pytest.raises(AdapterFileError, match=r"no adapter_config\.json, so this is not an adapter"):
            PeftModel.from_pretrained(tiny_llama, tmp_path)
        assert not any("lora" in name for name, _ in tiny_llama.named_modules())

    def test_mismatched_keys_are_warned_about_where_the_core_raises(self, two: Any, again: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path)
        folder = tmp_path / "a"
        path = folder / "adapter_model.safetensors"
        gone = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
        tensors = {n: t for n, t in load_file(path).items() if n != gone}
        (folder / "lorakit.json").unlink()
        save_file({**tensors, "base_model.model.extra.weight": torch.zeros(1)}, path, {"format": "pt"})
        with pytest.raises(AdapterFileError, match=f"does not match this model: missing {gone}"):
            lorakit.load_adapter(again(), folder)
        with pytest.warns(UserWarning, match=r"loaded in part as allowed") as said:
            PeftModel.from_pretrained(again(), folder)
        assert f"missing {gone}" in str(said[0].message)
        assert "unexpected base_model.model.extra.weight" in str(said[0].message)
        assert said[0].filename == __file__

    def test_shapes_are_refused_here_too(self, two: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
        two.unload()
        with pytest.raises(AdapterFileError, match=r"lora_A\.weight has shape \(4, 32\), expected \(8, 32\)"):
            PeftModel.from_pretrained(two.get_base_model(), tmp_path / "a")

    def test_nothing_that_fits_is_refused_here_too(self, two: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path)
        other = bert()
        with pytest.raises(AdapterFileError, match="does not match this model: unexpected site model"):
            PeftModel.from_pretrained(other, tmp_path / "a")
        assert all(parameter.requires_grad for parameter in other.parameters())

    def test_another_base_is_warned_about(self, two: Any, again: Any, tmp_path: Path) -> None:
        two.save_pretrained(tmp_path)
        other = again()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        with pytest.warns(UserWarning, match="loaded on another base as allowed"):
            PeftModel.from_pretrained(other, tmp_path / "a")

    def test_not_a_number_is_refused_on_saving(self, two: Any, tmp_path: Path) -> None:
        with torch.no_grad():
            two.base_model.model.model.layers[0].self_attn.q_proj.lora_B["a"].weight.fill_(float("nan"))
        with pytest.raises(AdapterError, match="contains NaN or infinite values"):
            two.save_pretrained(tmp_path)


class TestCopies:
    def test_deepcopy_and_pickle(self, two: Any) -> None:
        expected = logits(two)
        twin = copy.deepcopy(two)
        assert torch.equal(logits(twin), expected)
        twin.set_adapter("b")
        assert two.active_adapter == "a"
        assert torch.equal(logits(two), expected)
        again = pickle.loads(pickle.dumps(two))
        assert torch.equal(logits(again), expected)

    def test_state_dict_into_a_twin(self, two: Any, again: Any) -> None:
        twin = two_of(again())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert twin.load_state_dict(two.state_dict()) is not None
        assert torch.equal(logits(twin), logits(two))
