"""Layouts of transformer blocks: the names of a block's modules, and what each of them computes.

A block has two sublayers, attention and feed-forward. Each adds to the residual stream x:

    last(x + dropout(after(inner(before(x)))))

Norms and dropout that an architecture lacks are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

SublayerName = Literal["attention", "feed-forward"]

ACTIVATION = ("act_fn", "activation_fn", "act")
"""Usual names of a feed-forward block's activation."""

FUSED, DOWN = "gate_up_proj", "down_proj"
"""Parameters with the weights of all experts of a layer, in transformers 5."""

BLOCK = "mlp"
"""Usual name of the module around router and experts, in transformers 5."""

SHARED = ".shared_expert"
"""Part of the paths of modules in an expert through which every token passes."""


def is_within(path: str, module: str) -> bool:
    """Return whether a module is another one or is inside it, by their dotted paths."""
    return path == module or path.startswith(f"{module}.")


def role(path: str) -> str:
    """Return the path of a site with "*" in place of layer numbers, such as "transformer.h.*.attn.c_attn"."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def block_of(path: str) -> str | None:
    """Return the path of the block that contains a module, such as "transformer.h.11", or None."""
    parts = path.split(".")
    end = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if end is None else ".".join(parts[: end + 1])


def is_inside(path: str, modules: Collection[str]) -> bool:
    """Return whether a module is one of the given modules or inside one of them, by their dotted paths."""
    return any(is_within(path, module) for module in modules)


def short_roles(paths: Iterable[str]) -> dict[str, str]:
    """Return the shortest unambiguous dotted suffix, such as "attn.c_proj", of each role (see `role`), for tables."""
    roles = list(dict.fromkeys(role(path) for path in paths))
    parts = {r: [p for p in r.split(".") if p != "*"] for r in roles}
    short = {}
    for r, names in parts.items():
        counts = range(1, len(names) + 1)
        unique = (n for n in counts if sum(other[-n:] == names[-n:] for other in parts.values()) == 1)
        short[r] = ".".join(names[-next(unique, len(names)) :])
    return short


@dataclass(frozen=True)
class AttentionLayout:
    """Names of the modules in an attention module.

    Attributes:
        inputs: Projections to q, k and v, or one module that computes all three.
        norms: Norms of q and k before rotation; a module may lack them.
        weights_dropout: Dropout module whose p applies to the attention weights, or "".
        output_dropout: Dropout module after the output projection, or "".
        settings: Path of the module with the settings of attention, "" for the attention module itself.
        has_half_tables: Whether the tables for rotary position embeddings have half the width of a head, and apply to
            both parts of it.
        sinks: Parameter with one additional score per head, which takes part in the softmax only, or "".
        is_interleaved: Whether the output of a fused projection contains the q, k and v of one head, then those of the
            next, and so on.
    """

    inputs: tuple[str, ...]
    output: str
    norms: tuple[str, str] = ("q_norm", "k_norm")
    weights_dropout: str = ""
    output_dropout: str = ""
    settings: str = ""
    has_half_tables: bool = False
    sinks: str = ""
    is_interleaved: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the names of the linear modules."""
        return (*self.inputs, self.output)


@dataclass(frozen=True)
class FeedForwardLayout:
    """Names of the modules in a feed-forward block.

    Attributes:
        inner: Linear modules before the activation: gate and up, one module for both, or one module without a gate.
        down: Linear module after the activation.
        activation: Possible names of the activation.
        inner_dropout: Dropout module before `down`, or "".
        output_dropout: Dropout module after `down`, or "".
        is_gated: Whether the activation of the gate is multiplied by the output of up.
        saved: Tensors of the inner width that autograd saves for the activation of the model's own forward pass.
    """

    inner: tuple[str, ...]
    down: str
    activation: tuple[str, ...] = ACTIVATION
    inner_dropout: str = ""
    output_dropout: str = ""
    is_gated: bool = False
    saved: int = 1

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the names of the linear modules."""
        return (*self.inner, self.down)

    @property
    def children(self) -> tuple[str, ...]:
        """Return all names; a block has one of those of the activation."""
        return (*self.linears, *self.activation, self.inner_dropout, self.output_dropout)

    @property
    def is_fused(self) -> bool:
        """Return whether one module computes gate and up."""
        return self.is_gated and len(self.inner) == 1


@dataclass(frozen=True)
class Sublayer:
    """Paths of the modules in one sublayer, relative to the block.

    Attributes:
        before: Norm that is applied to the input, or "".
        inner: Attention module or feed-forward block; "" if the modules of a feed-forward block belong to the block.
        after: Norm that is applied to the output of `inner`, or "".
        dropout: Dropout module before the residual, or "".
        last: Norm that is applied after the residual, or "".
        dropout_p: Attribute of the block that contains the dropout probability, if the block calls a dropout function
            before the residual, or "".
    """

    before: str
    inner: str
    after: str = ""
    dropout: str = ""
    last: str = ""
    dropout_p: str = ""

    @property
    def norms(self) -> tuple[str, ...]:
        """Return the paths of the norms."""
        return tuple(name for name in (self.before, self.after, self.last) if name)

    def at(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the paths, relative to the block, of modules inside `inner`, whose names are relative to `inner`."""
        return tuple(f"{self.inner}.{name}" if self.inner else name for name in names)


@dataclass(frozen=True)
class Block:
    """Layout of a block.

    Attributes:
        feed_forward_modules: Names of the modules in the feed-forward block, or None if it consists of experts.
        norm: Kind of the norms.
        is_split: Whether each sublayer is a separate module, which contains its norm and dropout; paths are then
            relative to that module.
    """

    attention: Sublayer
    feed_forward: Sublayer
    attention_modules: AttentionLayout
    feed_forward_modules: FeedForwardLayout | None
    norm: Literal["rms", "layer"] = "rms"
    is_split: bool = False

    @property
    def is_post_norm(self) -> bool:
        """Return whether norms follow the residuals."""
        return bool(self.attention.last)

    @property
    def norms(self) -> tuple[str, ...]:
        """Return the paths of the norms, without those of q and k."""
        return (*self.attention.norms, *self.feed_forward.norms)

    @property
    def activations(self) -> tuple[str, ...]:
        """Return the possible paths of the activation."""
        modules = self.feed_forward_modules
        return () if modules is None else self.feed_forward.at(modules.activation)

    @property
    def called(self) -> tuple[str, ...]:
        """Return the paths of the modules that compute the feed-forward sublayer, in the order of their calls."""
        modules = self.feed_forward_modules
        if self.feed_forward.inner or modules is None:
            return (self.feed_forward.inner,)
        return (*modules.inner, *self.activations, modules.down)

    @property
    def children(self) -> set[str]:
        """Return the names of the block's children, if the paths of its modules are those of children."""
        sublayers = (self.attention, self.feed_forward)
        around = {name for one in sublayers for name in (*one.norms, one.dropout)}
        return {self.attention.inner, *self.called, *around} - {""}

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the paths of the linear modules, in the order of their calls."""
        inputs, inner = self.inputs
        output, down = self.outputs
        return tuple(path for path in (*inputs, output, *inner, down) if path)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """Return groups of paths, relative to the block; the linear modules of a group read the same tensor."""
        modules = self.feed_forward_modules
        inner = () if modules is None else self.feed_forward.at(modules.inner)
        return self.attention.at(self.attention_modules.inputs), inner

    @property
    def outputs(self) -> tuple[str, str]:
        """Return the paths, relative to the block, of the output projection and of the last feed-forward module."""
        modules = self.feed_forward_modules
        last = ("",) if modules is None else self.feed_forward.at([modules.down])
        return self.attention.at([self.attention_modules.output])[0], last[0]

    def sublayer_of(self, path: str) -> SublayerName | None:
        """Return the sublayer that a module, by its path relative to the block, belongs to, or None."""
        sublayers: dict[SublayerName, Sublayer] = {"attention": self.attention, "feed-forward": self.feed_forward}
        for name, sublayer in sublayers.items():
            modules = self.feed_forward_modules if name == "feed-forward" else self.attention_modules
            inner = (sublayer.inner,) if sublayer.inner or modules is None else modules.linears
            paths = (*inner, *sublayer.norms, *([sublayer.dropout] if sublayer.dropout else []))
            if any(is_within(path, one) or is_within(one, path) for one in paths):
                return name
        return None


@dataclass(frozen=True)
class ExpertsLayout:
    """Names that transformers 4 used in layers with experts, where each expert was a separate module.

    Attributes:
        inner: Modules whose weights are now fused in one parameter, in the order of its rows.
        down: Module after the activation.
        router: Module that selects the experts.
        current_router: Name of that module in transformers 5, if it is another, or "".
        block: Name of the module around router and experts in transformers 4, if it has another name now, or "".
        model_types: Values of a config's `model_type` for which PEFT converts these names.
    """

    inner: tuple[str, ...]
    down: str
    router: str = "gate"
    block: str = ""
    current_router: str = ""
    model_types: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, str]:
        """Return the name of the parameter, relative to the module that held the old one, for each old name."""
        router = f"{self.current_router or self.router}.weight"
        return {self.router: router, **dict.fromkeys(self.inner, FUSED), self.down: DOWN}

    def parts(self, parameter: str) -> tuple[str, ...]:
        """Return the old names of the modules that a parameter, a value of `parameters`, consists of."""
        return tuple(old for old, new in self.parameters.items() if new == parameter)


@dataclass(frozen=True)
class Architecture:
    """One row of the table: models that have the same blocks.

    Attributes:
        title: What is shown in a plan, such as "Llama-like block (RMSNorm, rotary, SwiGLU, sdpa)".
        models: Names of transformers classes whose blocks have this layout; each of them is tested.
        block: Layout of the blocks, or None if `accelerate` has no fused forward methods for them.
        is_planned: Whether `lorakit.plan` counts the tensors that the blocks save exactly, for rows within the sliding
            window.
        model_types: Values of a config's `model_type` to which `targets` applies.
        targets: Default target modules, as in PEFT: names or a regular expression; () if there are none.
    """

    name: str
    title: str = ""
    models: tuple[str, ...] = ()
    block: Block | None = None
    is_planned: bool = False
    model_types: tuple[str, ...] = ()
    targets: tuple[str, ...] | str = ()
