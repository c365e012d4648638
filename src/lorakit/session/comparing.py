"""Measure a base alone and with each adapter on the same rows (`lorakit eval`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lorakit import hub
from lorakit.session.coding import EvalRows
from lorakit.session.measuring import Evaluation
from lorakit.session.session import Session
from lorakit.session.spec import SessionSpec
from lorakit.session.tokenizers import common_tokenizer, own_tokenizer
from lorakit.tasks import agree_on_padding

BASE, ADAPTER = "base", "adapter"


def compare(
    spec: SessionSpec,
    rows: EvalRows,
    say: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
) -> list[tuple[str, Evaluation]]:
    """Measure a base model's loss and metrics, alone and with each adapter, on the same data.

    An adapter that was saved with its own tokenizer (for example, because it adds tokens) is an exception: for this
    adapter, the same data is tokenized with the adapter's tokenizer. If the adapters' tokenizers differ from the base's
    only in the same chat template, the base is measured with it, as in training. A base without a head for the task, or
    whose chat template does not render the data, is not measured alone. The dtype "auto" is that of the machine.

    Returns:
        (name, evaluation) pairs: first the base, named "base", then each adapter, in the given order.

    Raises:
        ConfigError: The batch size is below 1, or the maximum length is below 2.
        AdapterFileError: An adapter does not match this base.
        LorakitError: The data or the model cannot be used; the error class and message say why.
    """
    hub.require(spec.source, tokenizer=True)
    tokenizer = common_tokenizer(spec.source, [files.folder for files in spec.files])
    owned = {name: own_tokenizer(files.folder, tokenizer) for name, files in spec.adapters.items()}
    coding = rows.coding(spec, tokenizer)
    tokenizers = [tokenizer, *(own for own in owned.values() if own is not None)]
    agree_on_padding(coding.task, spec.source, tokenizers)
    batches, coded = coding.all_batches(tokenizer, owned, say, detail)
    spec = replace(spec, task=coding.task).on_machine(detail)
    alone, measured = list[tuple[str, Evaluation]](), dict[str, Evaluation]()
    with Session(spec, tokenizer) as session:
        if batches is not None and session.new_modules:
            say(f"The model has no weights for {', '.join(session.new_modules)}, so it is measured only with adapters.")
        elif batches is not None:
            alone = [(BASE, session.measure(batches()))]
        # embedding rows added for new tokens stay in the base and would change the losses of later adapters, so
        # adapters with smaller vocabularies go first
        for name, files in sorted(spec.adapters.items(), key=lambda item: item[1].vocabulary):
            session.load_adapter(ADAPTER, files)
            measured[name] = session.measure(coded[name](), ADAPTER)
            session.unload_adapter(ADAPTER)
    return [*alone, *((name, measured[name]) for name in spec.adapters)]
