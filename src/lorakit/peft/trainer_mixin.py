"""`LoraTrainerMixin`: train an adapted model with Hugging Face's `Trainer`, TRL's `SFTTrainer` or a similar trainer.

    class LoraTrainer(LoraTrainerMixin, Trainer): ...

The parent class trains the user's own model, which contains the factors; only the adapter is saved and loaded. Neither
`peft` nor transformers is imported: the parent is whichever trainer class follows the mixin.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorakit.config import CONFIG_FILE, LoraConfig
from lorakit.core import penalties
from lorakit.core.model.index import find_state
from lorakit.errors import ConfigError, NotYetSupported, RunError
from lorakit.peft.loaded import load_peft_weights
from lorakit.peft.mapping import get_peft_model
from lorakit.peft.model import PeftModel
from lorakit.peft.paths import PENALTY_METHODS
from lorakit.peft.state_dicts import WRAPPED, get_peft_model_state_dict, names_of, set_peft_model_state_dict

ARGUMENTS_FILE = "training_args.bin"
"""Name of the file, saved next to the adapter, that contains the parent's training arguments."""


class LoraTrainerMixin:
    """Mixin that makes a trainer save adapter-only checkpoints; training can resume from them, and PEFT can load them.

    The mixin must precede the trainer in the list of base classes.

    Args:
        model: A `PeftModel`, a model adapted by `lorakit.attach`, or any model if `peft_config` is given.
        args: The parent's positional arguments after the model.
        peft_config: A `LoraConfig` for adapting a model that has no adapter.
        kwargs: The parent's keyword arguments.

    Attributes:
        lora_model: The `PeftModel` that wraps the trained model; `model` is the user's model inside the wrapper.

    Raises:
        ConfigError: The model has no adapter, or `peft_config` is not a LoraConfig or is given without a loaded model.
        NotYetSupported: The parent uses DeepSpeed.
    """

    lora_model: PeftModel
    model: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(LoraTrainerMixin)]
        parent = next((kind for kind in before if "_inner_training_loop" in vars(kind)), None)
        if parent is not None:
            name = cls.__name__
            text = f"LoraTrainerMixin must precede the trainer: class {name}(LoraTrainerMixin, {parent.__name__})."
            raise ConfigError(text, what=name)

    def __init__(
        self, model: nn.Module | str | None = None, *args: Any, peft_config: LoraConfig | None = None, **kwargs: Any
    ) -> None:
        if isinstance(peft_config, LoraConfig) and isinstance(model, nn.Module):
            model = get_peft_model(model, peft_config)
        elif peft_config is not None:
            kinds = f"a {type(peft_config).__name__} and a {type(model).__name__}"
            text = f"peft_config and model are {kinds}; the mixin needs lorakit's LoraConfig and a loaded model."
            raise ConfigError(text, field="peft_config")
        self._judged = True  # the parent checks the model only in its constructor
        self._marked: list[nn.Module] = []
        try:
            self._parent.__init__(None if model is None else self._adopt(model), *args, **kwargs)
        finally:
            self._judged = False
            for base in self._marked:
                del base._hf_peft_config_loaded
        if getattr(self, "is_deepspeed_enabled", False):
            text = "LoraTrainerMixin does not support DeepSpeed; use DDP, FSDP, or a trainer with install_as_peft."
            raise NotYetSupported(text, what="deepspeed")

    @property
    def _parent(self) -> Any:
        """`super()`, the trainer class that follows the mixin; typed as `Any`, since the class is unknown."""
        return super()

    @property
    def _trainer(self) -> Any:
        """The trainer itself, with the attributes of the parent class."""
        return self

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Call the parent's `model_init`, wrap the resulting model if necessary, and return the model to train."""
        return self._adopt(self._parent.call_model_init(trial))

    def create_optimizer(self, *args: nn.Module | None, **kwargs: nn.Module | None) -> Optimizer:
        """Create the parent's optimizer after checking that at least one parameter is trainable.

        Raises:
            ConfigError: No parameters are trainable, for example because an adapter was loaded without `is_trainable`.
        """
        if not any(parameter.requires_grad for parameter in self.lora_model.parameters()):
            name = next(iter(self.lora_model.peft_config), None)
            text = f"No parameters are trainable. Load {name!r} with is_trainable=True, or call set_requires_grad."
            raise ConfigError(text, what=name)
        return self._parent.create_optimizer(*args, **kwargs)

    def _adopt(self, model: nn.Module | str) -> nn.Module:
        """Keep the wrapper for loading and saving, and return the user's model, which the parent trains."""
        if not isinstance(model, PeftModel):
            if not isinstance(model, nn.Module) or find_state(model) is None:
                kind = type(model).__name__
                text = f"model is a {kind} without an adapter; call get_peft_model first, or pass a peft_config."
                raise ConfigError(text, field="model")
            model = PeftModel(model)
        self.lora_model = model
        base = model.get_base_model()
        if self._judged and getattr(base, "is_quantized", False) and not base._hf_peft_config_loaded:
            # The parent rejects a quantized model without this flag; while the flag is set, saving the base needs peft.
            vars(base)["_hf_peft_config_loaded"] = True
            self._marked.append(base)
        return base

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapters, the tokenizer and the training arguments; with FSDP, every process must call this.

        With FSDP, the tensors of the adapters alone are gathered, whatever `state_dict_type` is.

        Args:
            output_dir: Directory to write to; None uses the trainer's.
            _internal_call: Whether the parent calls this for a checkpoint, which is uploaded elsewhere.

        Raises:
            AdapterError: A tensor cannot be completed.
        """
        if not getattr(self, "is_fsdp_enabled", False):
            self._parent.save_model(output_dir, _internal_call)
            return
        self._write(output_dir, {name: self._whole_tensors(name) for name in self.lora_model.peft_config})
        if self._trainer.args.push_to_hub and not _internal_call:
            self._parent.push_to_hub(commit_message="Model save")

    def _whole_tensors(self, name: str) -> dict[str, Tensor]:
        """Return the whole tensors (…) of an adapter of a sharded model, keyed by name on disk."""
        found = get_peft_model_state_dict(self.model, adapter_name=name)
        return {WRAPPED + key.removeprefix(WRAPPED): tensor for key, tensor in found.items()}

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Save the adapters, the tokenizer and the training arguments instead of the full model."""
        self._write(output_dir, dict.fromkeys(self.lora_model.peft_config))

    def _write(self, output_dir: str | None, tensors: Mapping[str, Mapping[str, Tensor] | None]) -> None:
        """Save adapters, given by name with their tensors (None for the model's own), and what belongs to them."""
        trainer = self._trainer
        if not trainer.args.should_save:
            return
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, given in tensors.items():
            self.lora_model.save_pretrained(folder, selected_adapters=[name], state_dict=given)
        tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(trainer.args, folder / ARGUMENTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load each adapter in a checkpoint into the model's adapter of the same name."""
        for name, folder in self._folders(resume_from_checkpoint).items():
            if getattr(self, "is_fsdp_enabled", False):  # FSDP 1 can write only through its outermost module
                unfit = _put_through(self.model, folder, name)
            else:
                result = self.lora_model.load_adapter(folder, name, is_trainable=True)
                unfit = [*result.missing_keys, *result.unexpected_keys]
            if unfit:
                text = f"{folder}: not a checkpoint of this adapter: {len(unfit)} key(s) do not match, e.g. {unfit[0]}."
                raise RunError(text, what=unfit[0], where=folder)

    def _load_best_model(self) -> None:
        """Load the adapters in the best checkpoint into the model."""
        self._load_from_checkpoint(self._trainer.state.best_model_checkpoint)

    def _folders(self, checkpoint: str | os.PathLike[str]) -> dict[str, Path]:
        """Return a dict from adapter to directory: the checkpoint itself for "default", otherwise a subdirectory."""
        root = Path(checkpoint)
        folders = {name: root if name == "default" else root / name for name in self.lora_model.peft_config}
        gone = [name for name, folder in folders.items() if not (folder / CONFIG_FILE).exists()]
        if gone:
            text = f"{root}: this checkpoint has no adapter {', '.join(gone)}; nothing was read from it."
            raise RunError(text, what=gone[0], where=root)
        return folders


def _put_through(model: nn.Module, folder: Path, name: str) -> list[str]:
    """Copy the tensors of a checkpoint into an adapter of a sharded model; return names that do not match."""
    tensors = load_peft_weights(str(folder))
    own = {on_disk.removeprefix(WRAPPED) for on_disk, _ in names_of(model, name)}
    given = {key.removeprefix(WRAPPED) for key in tensors}
    unfit = sorted(own ^ given)
    if not unfit:
        set_peft_model_state_dict(model, tensors, name)
    return unfit


class MontecloraTrainerMixin:
    """Mixin that adds MonteCLoRA's penalty to a trainer's loss; without MonteCLoRA, the loss does not change.

    The mixin must precede the trainer in the list of base classes, and can be combined with `LoraTrainerMixin`:

        class MontecloraTrainer(MontecloraTrainerMixin, LoraTrainerMixin, Trainer): ...
    """

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the parent's loss of a batch plus the penalty of the active adapters.

        Returns:
            The loss, a scalar; if `return_outputs` is set, a tuple of the loss and the outputs.
        """
        parent: Any = super()
        found = parent.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        penalty = penalties(model, PENALTY_METHODS["_get_monteclora_loss"])
        if penalty is None:
            return found
        if not return_outputs:
            return found + penalty.to(found.device)
        loss, outputs = found
        return loss + penalty.to(loss.device), outputs
