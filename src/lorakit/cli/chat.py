"""`lorakit chat`: a conversation with a model and its adapters in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit import allocator
from lorakit.choices import DTYPES
from lorakit.cli import adapters, console, early
from lorakit.cli.flag_groups import DeviceFlag, DtypeFlag, RevisionFlag
from lorakit.cli.prompts import show
from lorakit.errors import LorakitError, UsageError
from lorakit.terminal import working, write_model_text

if TYPE_CHECKING:
    from lorakit.generate import Sampling
    from lorakit.session import Session

COMMANDS = """\
/adapter NAME   answer with this adapter
/base           answer with the base
/again          write the last answer again, with another seed
/reset          begin a new conversation
/help           show this list
/quit           end (also Ctrl-D); Ctrl-C ends an answer"""


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit chat`."""

    model: adapters.ModelFlag = None
    revision: RevisionFlag = None
    adapter: Annotated[list[str] | None, Parameter(help=f"{adapters.NAMES}. The first one answers at first.")] = None
    system: Annotated[str | None, Parameter(help="System message at the beginning of a conversation.")] = None
    max_new_tokens: Annotated[int, Parameter(help="Maximum length of an answer in tokens.")] = 512
    temperature: Annotated[float, Parameter(help="Sampling temperature; 0 selects the most likely token.")] = 0.7
    top_p: Annotated[
        float, Parameter(help="Sample from the smallest set of tokens that reaches this total probability.")
    ] = 0.95
    seed: Annotated[int, Parameter(help="Sampling seed of the first answer; each further answer has the next one.")] = 0
    dtype: DtypeFlag = "auto"
    device: DeviceFlag = "auto"


NO_FLAGS = Flags()


def run(*, flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS) -> None:
    """Talk to a model and its adapters; a line is a message, and /help lists the commands.

    Each adapter answers with its own chat template. Answers go to standard output, everything else to standard error.

    Raises:
        LorakitError: The base or an adapter cannot be loaded, or has no chat template.
    """
    base = _check(flags)
    folders = early.adapter_folders(flags.adapter or ())
    allocator.set_up()  # before torch allocates any memory
    from lorakit.generate import Sampling
    from lorakit.session.opening import open_session
    from lorakit.tasks import CAUSAL_LM

    task = None if folders else CAUSAL_LM.name
    revision = None if base else flags.revision
    given = {f"adapter_{number}": folder for number, folder in enumerate(folders.values())}
    session = open_session(base, given, task=task, dtype=flags.dtype, device=flags.device, revision=revision)
    console.remarks(session.remarks)
    names = dict(zip(folders, given, strict=True))
    sampling = Sampling(temperature=flags.temperature, top_p=flags.top_p, seed=flags.seed)
    with session:
        Chat(session, names, next(iter(names), None), flags.system, flags.max_new_tokens, sampling).run(_lines())


def _check(flags: Flags) -> str | None:
    """Check the flags, and return the name of the base, or None if the adapters name it."""
    early.check_sampling(temperature=flags.temperature, top_p=flags.top_p, seed=flags.seed)
    early.check_at_least("max_new_tokens", flags.max_new_tokens, 1)
    early.check_choice("dtype", flags.dtype, DTYPES)
    early.check_device(flags.device)
    return early.check_base(flags.model, flags.revision, flags.adapter)


def _lines() -> Iterator[str]:
    """Yield the lines of standard input, with a prompt in a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        console.note("/help lists the commands.")
    while True:
        if is_terminal:
            write_model_text("> ")
        with working(None):  # it waits for the user
            line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")


@dataclass
class Chat:
    """A conversation.

    Attributes:
        names: Name of an adapter as given -> in the session.
        adapter: Name, as given, of the adapter that answers, or None for the base.
        sampling: Settings of the next answer.
        messages: The conversation so far.
    """

    session: Session
    names: dict[str, str]
    adapter: str | None
    system: str | None
    max_new_tokens: int
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line, or do what it commands, until the lines end."""
        for line in lines:
            command, _, rest = line.strip().partition(" ")
            if command == "/quit":
                return
            try:
                if command.startswith("/"):
                    self._obey(command, rest.strip())
                elif command:
                    self._answer(self.messages, {"role": "user", "content": line})
            except LorakitError as error:
                console.error(str(error))

    def _obey(self, command: str, rest: str) -> None:
        if command == "/adapter" and rest in self.names:
            self.adapter = rest
        elif command == "/base":
            self.adapter = None
        elif command == "/reset":
            self.messages.clear()
        elif command == "/again" and self.messages:
            self._answer(self.messages[:-2], self.messages[-2])
        elif command == "/help":
            console.note(COMMANDS)
        else:
            known = ", ".join(self.names) or "none"
            text = f"{command} {rest}".strip() + f" is not possible here; /help lists the commands (adapters: {known})."
            raise UsageError(text, what=command, field="command", allowed=tuple(self.names))

    def _answer(self, before: list[dict[str, str]], question: dict[str, str]) -> None:
        """Answer a message after others; an answer that is interrupted stays in the conversation as it is."""
        from lorakit.session.prompts import conversation

        system = [{"role": "system", "content": self.system}] if self.system else []
        name = None if self.adapter is None else self.names[self.adapter]
        prompt = conversation({"messages": [*system, *before, question]}, "messages")
        answers, tokens = self.session.begin(
            [prompt], [name], max_new_tokens=self.max_new_tokens, sampling=self.sampling
        )
        try:
            show(answers, tokens)
        except KeyboardInterrupt:
            console.note("[interrupted]")
        self.messages = [*before, question, {"role": "assistant", "content": answers[0].text}]
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
