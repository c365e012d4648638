"""lorakit.generate.batch: equal to transformers token by token, a batch equal to its single rows, errors."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.layers import batched
from lorakit.errors import ConfigError, ModelError, NonFiniteError, RouteError, UsageError
from lorakit.generate import NewToken, Sampling, context_tokens, generate, generate_batch

PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50], [300, 2, 300]]


def rows_of(stream: Iterator[NewToken], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for new in stream:
        rows[new.row].append(new.token)
    return rows


def alone(model: Any, prompt: Sequence[int], **options: Any) -> list[int]:
    return list(generate(model, prompt, max_new_tokens=12, **options))


def attach_strong(model: Any, name: str, seed: int, targets: Any = "all-linear", **fields: Any) -> None:
    """Attach an adapter with a random B, large enough to change the generated tokens."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": targets, **fields})
    core.attach(model, config, name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in core.trainable_parameters(model, name):
        if "lora_B" in path:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    """Return a small model with weights large enough that it does not repeat one token."""
    made = request.getfixturevalue(request.param)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if (parameter.ndim == 2 and ".layers." in name) or ".h." in name:
                parameter.mul_(12)
    return made


@pytest.fixture
def adapted(model: Any) -> Any:
    attach_strong(model, "one", 1)
    attach_strong(model, "two", 2, use_dora=True)
    return model.eval()


def test_greedy_is_what_transformers_generates(model: Any) -> None:
    assert len(set(alone(model, PROMPTS[0]))) > 3
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert alone(model, prompt) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ["OPT", "Bloom", "GPTNeoX", "Qwen3"])
def test_models_that_count_positions_in_other_ways(architecture: str) -> None:
    import transformers

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 512}
    more = {"OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "Qwen3": {"num_key_value_heads": 2, "head_dim": 8}}
    config = getattr(transformers, f"{architecture}Config")(
        **sizes,
        **more.get(architecture, {}),
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    other = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    ids = torch.tensor([PROMPTS[0]])
    theirs = other.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    one_by_one = [alone(other, prompt) for prompt in PROMPTS]
    assert one_by_one[0] == theirs[0, len(PROMPTS[0]) :].tolist()
    assert rows_of(generate_batch(other, PROMPTS, max_new_tokens=12), len(PROMPTS)) == one_by_one


def test_a_batch_is_its_rows_one_by_one(model: Any) -> None:
    together = rows_of(generate_batch(model, PROMPTS, max_new_tokens=12), len(PROMPTS))
    assert together == [alone(model, prompt) for prompt in PROMPTS]


def test_a_sampled_batch_is_its_rows_one_by_one(model: Any) -> None:
    samplings = [Sampling(1.0, seed=seed, top_p=0.9) for seed in range(len(PROMPTS))]
    together = rows_of(generate_batch(model, PROMPTS, max_new_tokens=12, sampling=samplings), len(PROMPTS))
    expected = [alone(model, ids, temperature=1.0, top_p=0.9, seed=seed) for seed, ids in enumerate(PROMPTS)]
    assert together == expected
    assert together != rows_of(generate_batch(model, PROMPTS, max_new_tokens=12), len(PROMPTS))


def test_a_batch_of_mixed_adapters_is_its_rows_one_by_one(adapted: Any) -> None:
    names = ["one", None, "two", "one"]
    together = rows_of(generate_batch(adapted, PROMPTS, max_new_tokens=12, adapters=names), len(PROMPTS))
    expected = []
    for prompt, name in zip(PROMPTS, names, strict=True):
        with core.disable(adapted) if name is None else core.use(adapted, name):
            expected.append(alone(adapted, prompt))
    assert together == expected
    answers = [
        rows_of(generate_batch(adapted, PROMPTS[:1], max_new_tokens=12, adapters=[n]), 1)[0]
        for n in ("one", "two", None)
    ]
    assert all(a != b for a, b in itertools.combinations(answers, 2))


def test_the_head_gets_rows_that_lie_side_by_side(tiny_llama: Any) -> None:
    """A matmul with a slice that is not contiguous takes hundreds of times as long in bf16."""
    seen: list[tuple[tuple[int, ...], bool]] = []
    hook = tiny_llama.lm_head.register_forward_pre_hook(
        lambda _, args: seen.append((tuple(args[0].shape[:2]), args[0].is_contiguous()))
    )
    list(generate_batch(tiny_llama.eval(), PROMPTS, max_new_tokens=3))
    hook.remove()
    assert seen == [((1, 1), True)] * 4 + [((4, 1), True)] * 2


@pytest.mark.costly
@pytest.mark.parametrize("given", [True, False])
def test_factors_of_mixed_rows_are_stacked_once_and_go_with_the_stream(
    model: Any, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with adapters of different ranks give the same as each adapter alone, with the route passed or active."""
    for seed, rank in enumerate([4, 1, 8, 3]):
        attach_strong(model, f"of_{rank}", seed, r=rank)
    names, stacks = ["of_3", "of_8", None, "of_1"], []
    make = batched._stack
    monkeypatch.setattr(batched, "_stack", lambda *of: stacks.append(weakref.ref(made := make(*of))) or made)
    with contextlib.nullcontext() if given else core.route(model, names):
        stream = generate_batch(model.eval(), PROMPTS, max_new_tokens=12, adapters=names if given else None)
    together: list[list[int]] = [[] for _ in names]
    for new in stream:
        together[new.row].append(new.token)
        assert all(stack() is not None for stack in stacks)
    sites = sum(isinstance(module, core.LoraLayer) for module in model.modules())
    assert len(stacks) == 3 * sites  # ranks 8, 3 and 1: none is more than half of the one before
    gc.collect()
    assert not any(stack() for stack in stacks)
    for prompt, name, tokens in zip(PROMPTS, names, together, strict=True):
        with core.disable(model) if name is None else core.use(model, name):
            assert alone(model, prompt) == tokens


def test_an_adapter_that_is_trained_between_two_tokens_acts_as_it_is(model: Any) -> None:
    attach_strong(model, "one", 1)
    attach_strong(model, "two", 2)
    streams = [
        generate_batch(model.eval(), PROMPTS[:2], max_new_tokens=12, adapters=["one", n]) for n in ("two", "one")
    ]
    begun = [[new.token for new in itertools.islice(stream, 8)] for stream in streams]  # of two adapters, and of one
    before = rows_of(generate_batch(model, PROMPTS[:2], max_new_tokens=12, adapters=["one", "two"]), 2)[0]
    with torch.no_grad():
        for path, parameter in core.trainable_parameters(model, "one"):
            parameter.mul_(-1 if "lora_B" in path else 1)
    first, second = ((head + [new.token for new in stream])[::2] for head, stream in zip(begun, streams, strict=True))
    assert first == second
    assert first[:4] == before[:4]
    assert first != before


def test_cached_factors_are_checked_once_per_token(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes less time at the start of a forward pass than at each site."""
    checks: list[Any] = []
    still = batched.Stacks.still
    monkeypatch.setattr(batched.Stacks, "still", lambda stacks, layer: checks.append(layer) or still(stacks, layer))
    sites = sum(isinstance(module, core.LoraLayer) for module in adapted.modules())
    stream = generate_batch(adapted, PROMPTS[:2], max_new_tokens=5, adapters=["one", "two"])
    seen = [(new.row, len(checks)) for new in stream]
    assert seen[-1] == (1, len(checks))
    counts = [count for row, count in seen if row == 0]
    assert [after - before for before, after in itertools.pairwise(counts)][1:] == [sites] * 3


def test_the_route_is_the_one_in_force_at_the_call(adapted: Any) -> None:
    core.activate(adapted, "one")
    with core.use(adapted, "two"):
        stream = generate(adapted, PROMPTS[0], max_new_tokens=12)
        inside = alone(adapted, PROMPTS[0])
    assert list(stream) == inside
    assert alone(adapted, PROMPTS[0]) != inside


def test_an_open_stream_leaves_no_trace_on_whoever_reads_it(adapted: Any) -> None:
    core.activate(adapted)
    base = adapted(torch.tensor(PROMPTS[:1])).logits
    stream = generate_batch(adapted, PROMPTS[:1], max_new_tokens=3, adapters=["one"])
    next(stream)
    assert torch.is_grad_enabled()
    assert torch.equal(adapted(torch.tensor(PROMPTS[:1])).logits, base)


def test_it_ends_at_an_end_token_which_is_the_last_to_come(model: Any) -> None:
    whole = alone(model, PROMPTS[0])
    end = next(token for token in whole if whole.index(token) > 1)
    assert alone(model, PROMPTS[0], eos_ids=(end, 511)) == whole[: whole.index(end) + 1]


def test_each_row_says_why_it_ended(tiny_gpt2: Any) -> None:
    lone = alone(tiny_gpt2, PROMPTS[0])
    end = lone[2]
    long = [7] * 125
    endings = {}
    for new in generate_batch(tiny_gpt2, [PROMPTS[0], long, PROMPTS[1]], max_new_tokens=12, eos_ids={end}):
        endings.setdefault(new.row, []).append(new.ended)
    expected = lone.index(end)
    assert endings[0] == [None] * expected + ["eos"]
    assert endings[1] in ([None, None, "context"], ["eos"], [None, "eos"], [None, None, "eos"])
    assert endings[2][-1] in ("length", "eos")


def test_it_stops_where_the_context_is_full(model: Any) -> None:
    assert context_tokens(model) == 128
    tokens = list(generate_batch(model, [[7] * 120, [7] * 3], max_new_tokens=20))
    assert [(t.row, t.ended) for t in tokens if t.ended] == [(0, "context"), (1, "length")]
    assert sum(t.row == 0 for t in tokens) == 8
    assert rows_of(iter(tokens), 2)[1] == list(generate(model, [7] * 3, max_new_tokens=20))


def test_a_tensor_is_a_prompt_too(model: Any) -> None:
    assert alone(model, torch.tensor(PROMPTS[:1])) == alone(model, torch.tensor(PROMPTS[0])) == alone(model, PROMPTS[0])


def test_nothing_runs_and_all_is_checked_before_the_first_token_is_asked_for(tiny_gpt2: Any) -> None:
    with pytest.raises(UsageError):
        generate(tiny_gpt2, [], max_new_tokens=1)
    tiny_gpt2.forward = None  # would fail if it were called
    with pytest.raises(TypeError):
        generate(tiny_gpt2, [1], max_new_tokens=1)


def test_each_prompt_is_checked_once(tiny_gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int | None] = []
    monkeypatch.setattr(Sampling, "check_vocabulary", lambda _, size: checks.append(size))
    list(generate_batch(tiny_gpt2, PROMPTS[:2], max_new_tokens=1))
    assert checks == [512, 512]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "no prompt to continue"),
        ([[]], "the prompt is empty"),
        ([[1], []], "prompt 2 of 2 is empty"),
        ([[1, 512]], "the prompt contains the token id 512, but the valid ids are 0 to 511"),
        ([[-1]], "the prompt contains the token id -1"),
        ([[1] * 128], "the prompt has 128 tokens, but the model supports at most 128"),
    ],
)
def test_bad_prompts_are_refused_by_name(tiny_gpt2: Any, prompts: list[list[int]], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        generate_batch(tiny_gpt2, prompts, max_new_tokens=1)
    assert said in str(caught.value)


def test_bad_settings_are_refused_by_name(tiny_gpt2: Any) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens is 0; it must be at least 1"):
        generate(tiny_gpt2, [1], max_new_tokens=0)
    with pytest.raises(UsageError, match="prompts is 1, but the number of sampling settings is 2"):
        generate_batch(tiny_gpt2, [[1]], max_new_tokens=1, sampling=[Sampling(), Sampling()])
    with pytest.raises(UsageError, match="prompts is 1, but the number of adapters is 2"):
        generate_batch(tiny_gpt2, [[1]], max_new_tokens=1, adapters=[None, None])
    with pytest.raises(UsageError, match=r"generate continues one prompt, of shape .* got \("):
        generate(tiny_gpt2, torch.tensor([[1], [2]]), max_new_tokens=1)
    with pytest.raises(ModelError, match="in training mode, so dropout would affect the output"):
        generate(tiny_gpt2.train(), [1], max_new_tokens=1)


def test_an_unknown_adapter_is_refused(adapted: Any) -> None:
    with pytest.raises(RouteError, match="Adapter 'three' not found on this model; available: one, two"):
        generate_batch(adapted, PROMPTS[:2], max_new_tokens=1, adapters=["one", "three"])


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear does not accept a key-value cache"):
        generate(torch.nn.Linear(2, 2).eval(), [1], max_new_tokens=1)


def test_logits_that_are_no_numbers_stop_it(tiny_gpt2: Any) -> None:
    with torch.no_grad():
        tiny_gpt2.transformer.ln_f.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="The logits for row 0 are NaN or infinite at new token 1"):
        list(generate(tiny_gpt2, [1], max_new_tokens=3))
