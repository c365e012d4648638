"""Catalog of published models: sizes, exact parameter counts, and their sources.

Sizes come from each model's config.json; tied weights are counted once. The tests build every entry with transformers
on the meta device and compare the counts and sites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, TypeVar

from lorakit.architectures.expert_shapes import ExpertSizes, glm4_moe, gpt_oss, mixtral, olmoe, qwen3_moe
from lorakit.architectures.shapes import ModelShape, Sizes, bert, gpt2, llama, qwen2, qwen3

S = TypeVar("S", bound=Sizes)


@dataclass(frozen=True)
class Entry(Generic[S]):
    """A published model.

    Attributes:
        names: Accepted names, which are not case-sensitive; the first is the display name.
        family: Function in `lorakit.architectures.shapes` or `expert_shapes` that builds the shape.
        parameters: Exact number of parameters; tied weights count once.
        paper: Publication that gives the sizes, cited along with the config.json of the first Hub id in `names`.
    """

    names: tuple[str, ...]
    family: Callable[[S], ModelShape]
    parameters: int
    sizes: S
    paper: str
    dtype: str = "bfloat16"


_GPT2 = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, table 2"
_BERT = "Devlin et al. 2019, arXiv:1810.04805, section 3"
_LLAMA = "Llama Team 2024, arXiv:2407.21783, table 3"
_LLAMA32 = "Llama 3.2 model card, 2024"
_QWEN25 = "Qwen Team 2024, arXiv:2412.15115, table 1"
_QWEN3 = "Qwen Team 2025, arXiv:2505.09388, table 1"
_SMOLLM2 = "Ben Allal et al. 2025, arXiv:2502.02737"
_MIXTRAL = "Jiang et al. 2024, arXiv:2401.04088, table 1"
_OLMOE = "Muennighoff et al. 2024, arXiv:2409.02060, table 10"
_GPT_OSS = "OpenAI 2025, arXiv:2508.10925, table 1"
_GLM45 = "GLM-4.5 Team 2025, arXiv:2508.06471, table 1"

_LLAMA31_8B = ("Llama-3.1-8B", "Llama-3.1-8B-Instruct")
_LLAMA32_1B = ("Llama-3.2-1B", "Llama-3.2-1B-Instruct")
_LLAMA32_3B = ("Llama-3.2-3B", "Llama-3.2-3B-Instruct")
_LLAMA33_70B = ("Llama-3.3-70B-Instruct", "Llama-3.1-70B", "Llama-3.1-70B-Instruct")

_CODE_VOCAB, _QWEN_BIG = 151_936, 152_064


def _ids(owner: str, *names: str) -> tuple[str, ...]:
    """Return each name followed by its Hub id: for example, ("x", "o/x") for the name "x" and the owner "o"."""
    return tuple(form for name in names for form in (name, f"{owner}/{name}"))


_WITH_EXPERTS: tuple[Entry[ExpertSizes], ...] = (
    Entry(
        _ids("mistralai", "Mixtral-8x7B-v0.1", "Mixtral-8x7B-Instruct-v0.1"),
        mixtral,
        46_702_792_704,
        ExpertSizes(4096, 32, 32, 32_000, 32_768, 14_336, 8, tied=False, experts=8, experts_per_token=2),
        _MIXTRAL,
    ),
    Entry(
        _ids("mistralai", "Mixtral-8x22B-v0.1"),
        mixtral,
        140_620_634_112,
        ExpertSizes(6144, 56, 48, 32_000, 65_536, 16_384, 8, tied=False, experts=8, experts_per_token=2),
        "Mixtral 8x22B model card, 2024",
    ),
    Entry(
        _ids("Qwen", "Qwen3-30B-A3B"),
        qwen3_moe,
        30_532_122_624,
        ExpertSizes(2048, 48, 32, _CODE_VOCAB, 40_960, 768, 4, 128, tied=False, experts=128, experts_per_token=8),
        _QWEN3,
    ),
    Entry(
        _ids("Qwen", "Qwen3-235B-A22B"),
        qwen3_moe,
        235_093_634_560,
        ExpertSizes(4096, 94, 64, _CODE_VOCAB, 40_960, 1536, 4, 128, tied=False, experts=128, experts_per_token=8),
        _QWEN3,
    ),
    Entry(
        _ids("allenai", "OLMoE-1B-7B-0924", "OLMoE-1B-7B-0924-Instruct"),
        olmoe,
        6_919_161_856,
        ExpertSizes(2048, 16, 16, 50_304, 4096, 1024, 16, tied=False, experts=64, experts_per_token=8),
        _OLMOE,
    ),
    Entry(
        _ids("openai", "gpt-oss-20b"),
        gpt_oss,
        20_914_757_184,
        ExpertSizes(2880, 24, 64, 201_088, 131_072, 2880, 8, 64, tied=False, experts=32, experts_per_token=4),
        _GPT_OSS,
    ),
    Entry(
        _ids("openai", "gpt-oss-120b"),
        gpt_oss,
        116_829_156_672,
        ExpertSizes(2880, 36, 64, 201_088, 131_072, 2880, 8, 64, tied=False, experts=128, experts_per_token=4),
        _GPT_OSS,
    ),
    Entry(
        ("GLM-4.5-Air", "zai-org/GLM-4.5-Air"),
        glm4_moe,
        106_852_245_504,
        ExpertSizes(
            *(4096, 46, 96, 151_552, 131_072, 1408, 8, 128, False),
            experts=128,
            experts_per_token=8,
            shared_intermediate=1408,
            dense_blocks=1,
            dense_intermediate=10_944,
        ),
        _GLM45,
    ),
)
"""Models with experts; gpt-oss is published in MXFP4, which is dequantized when it is loaded."""

_ENTRIES: tuple[Entry[Sizes] | Entry[ExpertSizes], ...] = (
    *(
        Entry((name, f"openai-community/{name}", *others), gpt2, count, sizes, _GPT2, "float32")
        for name, others, count, sizes in (
            ("gpt2", ("gpt2-small", "gpt-2"), 124_439_808, Sizes(768, 12, 12, 50_257, 1024)),
            ("gpt2-medium", (), 354_823_168, Sizes(1024, 24, 16, 50_257, 1024)),
            ("gpt2-large", (), 774_030_080, Sizes(1280, 36, 20, 50_257, 1024)),
            ("gpt2-xl", (), 1_557_611_200, Sizes(1600, 48, 25, 50_257, 1024)),
        )
    ),
    *(
        Entry((name, f"google-bert/{name}", *others), bert, count, sizes, _BERT, "float32")
        for name, others, count, sizes in (
            ("bert-base-uncased", ("bert-base", "bert"), 109_482_240, Sizes(768, 12, 12, 30_522, 512)),
            ("bert-large-uncased", ("bert-large",), 335_141_888, Sizes(1024, 24, 16, 30_522, 512)),
        )
    ),
    *(
        Entry(_ids("meta-llama", *names), llama, count, sizes, paper)
        for names, count, sizes, paper in (
            (_LLAMA31_8B, 8_030_261_248, Sizes(4096, 32, 32, 128_256, 131_072, 14_336, 8, tied=False), _LLAMA),
            (_LLAMA32_1B, 1_235_814_400, Sizes(2048, 16, 32, 128_256, 131_072, 8192, 8), _LLAMA32),
            (_LLAMA32_3B, 3_212_749_824, Sizes(3072, 28, 24, 128_256, 131_072, 8192, 8), _LLAMA32),
            (_LLAMA33_70B, 70_553_706_496, Sizes(8192, 80, 64, 128_256, 131_072, 28_672, 8, tied=False), _LLAMA),
        )
    ),
    *(
        Entry(_ids("Qwen", f"Qwen2.5-{size}", f"Qwen2.5-{size}-Instruct"), qwen2, count, sizes, _QWEN25)
        for size, count, sizes in (
            ("0.5B", 494_032_768, Sizes(896, 24, 14, _CODE_VOCAB, 32_768, 4864, 2)),
            ("1.5B", 1_543_714_304, Sizes(1536, 28, 12, _CODE_VOCAB, 32_768, 8960, 2)),
            ("3B", 3_085_938_688, Sizes(2048, 36, 16, _CODE_VOCAB, 32_768, 11_008, 2)),
            ("7B", 7_615_616_512, Sizes(3584, 28, 28, _QWEN_BIG, 32_768, 18_944, 4, tied=False)),
            ("14B", 14_770_033_664, Sizes(5120, 48, 40, _QWEN_BIG, 32_768, 13_824, 8, tied=False)),
            ("32B", 32_763_876_352, Sizes(5120, 64, 40, _QWEN_BIG, 32_768, 27_648, 8, tied=False)),
            ("72B", 72_706_203_648, Sizes(8192, 80, 64, _QWEN_BIG, 32_768, 29_568, 8, tied=False)),
        )
    ),
    *(
        Entry(_ids("Qwen", f"Qwen3-{size}"), qwen3, count, sizes, _QWEN3)
        for size, count, sizes in (
            ("0.6B", 596_049_920, Sizes(1024, 28, 16, _CODE_VOCAB, 40_960, 3072, 8, 128)),
            ("1.7B", 1_720_574_976, Sizes(2048, 28, 16, _CODE_VOCAB, 40_960, 6144, 8, 128)),
            ("4B", 4_022_468_096, Sizes(2560, 36, 32, _CODE_VOCAB, 40_960, 9728, 8, 128)),
            ("8B", 8_190_735_360, Sizes(4096, 36, 32, _CODE_VOCAB, 40_960, 12_288, 8, 128, tied=False)),
            ("14B", 14_768_307_200, Sizes(5120, 40, 40, _CODE_VOCAB, 40_960, 17_408, 8, 128, tied=False)),
            ("32B", 32_762_123_264, Sizes(5120, 64, 64, _CODE_VOCAB, 40_960, 25_600, 8, 128, tied=False)),
        )
    ),
    *(
        Entry(_ids("HuggingFaceTB", f"SmolLM2-{size}", f"SmolLM2-{size}-Instruct"), llama, count, sizes, _SMOLLM2)
        for size, count, sizes in (
            ("135M", 134_515_008, Sizes(576, 30, 9, 49_152, 8192, 1536, 3)),
            ("360M", 361_821_120, Sizes(960, 32, 15, 49_152, 8192, 2560, 5)),
            ("1.7B", 1_711_376_384, Sizes(2048, 24, 32, 49_152, 8192, 8192, 32)),
        )
    ),
    *_WITH_EXPERTS,
)


def names() -> list[str]:
    """Return the first name of every entry, in catalog order."""
    return [entry.names[0] for entry in _ENTRIES]


def aliases() -> list[str]:
    """Return every name and Hub id that `published` accepts."""
    return [name for entry in _ENTRIES for name in entry.names]


def published(name: str) -> ModelShape | None:
    """Return the shape of a published model by name or Hub id (not case-sensitive), or None if it is not listed."""
    wanted = name.casefold()
    for entry in _ENTRIES:
        if any(wanted == known.casefold() for known in entry.names):
            return _built(entry)
    return None


@cache
def _built(entry: Entry[S]) -> ModelShape:
    hub_id = next((name for name in entry.names if "/" in name), entry.names[0])
    return replace(
        entry.family(entry.sizes),
        name=entry.names[0],
        source=f"config.json of {hub_id}; {entry.paper}",
        parameters=entry.parameters,
        dtype=entry.dtype,
        published=True,
    )
