"""`flexmoe chat`: talk with a model. Lines come from the terminal or a pipe; only its answers go to stdout."""

from __future__ import annotations

import contextlib
import difflib
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import click

from flexmoe.cli.conversation import Conversation, Message
from flexmoe.cli.options import model_options, sampling_options
from flexmoe.cli.terminal import note, open_llm, speed, write
from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError

if TYPE_CHECKING:
    from flexmoe.engine.outputs import RequestOutput
    from flexmoe.llm import LLM

_GREETING = "Type a message. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."
_HELP = """\
/help         this list
/reset        forget the conversation
/retry        answer the last message once more
/system TEXT  give the model instructions (no TEXT: show them; -: remove them)
/save FILE    write the conversation as JSON
/exit         leave; so does Ctrl-D
A line that ends in \\ goes on in the next one. A message may begin with a slash: //like this."""


@click.command()
@click.option("--system", help="Instructions for the model, before the first message.")
@sampling_options(temperature=0.3, max_tokens=512)
@model_options
def chat(system: str | None, sampling: SamplingParams, llm_options: dict[str, Any]) -> None:
    """Talk with a model in the terminal.

    It remembers the conversation; when the model's context is full, the oldest turns are dropped. Messages can also
    be piped in, one a line: then the answers alone are printed.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with open_llm(llm_options, quiet=not interactive) as llm:
        if not llm.engine.chat_template:
            raise RequestError("this model has no chat template; use `flexmoe generate` to complete a text.")
        session = Session(llm, sampling, Conversation(system), interactive)
        if interactive:
            note(_GREETING)
        failed = session.run(_typed_lines() if interactive else _piped_lines())
        if failed and not interactive:
            click.get_current_context().exit(1)


@dataclass
class Session:
    """One chat: what is said, and how it is answered."""

    llm: LLM
    sampling: SamplingParams
    conversation: Conversation
    interactive: bool
    interrupted: Callable[[], bool] = lambda: False

    def run(self, lines: Iterator[str]) -> bool:
        """Answer line after line until the input ends or /exit. Returns whether any of them was refused."""
        failed = False
        for line in lines:
            try:
                with _first_interrupt(self.interactive) as self.interrupted:
                    if not self.take(line):
                        break
            except RequestError as error:
                failed = True
                click.echo(click.style(f"Error: {error}", fg="red"), err=True)
        return failed

    def take(self, line: str) -> bool:
        """Obey a command or answer a message. Returns whether to go on."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].split(maxsplit=1))
        if line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
        return True

    def _command(self, name: str = "", argument: str = "") -> bool:
        commands: dict[str, Callable[[str], object]] = {
            "help": lambda _: note(_HELP),
            "reset": lambda _: self._reset(),
            "retry": lambda _: self._retry(),
            "system": self._system,
            "save": self._save,
            "exit": lambda _: None,
            "quit": lambda _: None,
        }
        if name not in commands:
            near = difflib.get_close_matches(name, commands, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them."
            raise RequestError(f"there is no command /{name}; {hint}")
        commands[name](argument.strip())
        return name not in ("exit", "quit")

    def _reset(self) -> None:
        self.conversation.reset()
        note("The conversation starts anew.")

    def _retry(self) -> None:
        question = self.conversation.take_back()
        if question is None:
            raise RequestError("there is no message to answer yet.")
        self._answer(question)

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
        note(f"Instructions: {self.conversation.system or 'none'}")

    def _save(self, file: str) -> None:
        if not file:
            raise RequestError("/save needs the name of a file.")
        self.conversation.save(Path(file).expanduser())
        note(f"{len(self.conversation)} turns saved to {file}.")

    def _answer(self, question: str) -> None:
        """Ask the model, print its answer as it comes, remember both; a question that is refused is forgotten."""
        self.conversation.ask(question)
        try:
            ids, sampling = self._prompt()
            output, stopped = self._stream(ids, sampling)
        except BaseException:
            self.conversation.take_back()
            raise
        self.conversation.answer(output.text.strip())
        if self.interactive:
            note(_ending(output, stopped, sampling) + speed(output))

    def _prompt(self) -> tuple[list[int], SamplingParams]:
        context = self.llm.engine.max_model_len
        wanted = self.sampling.max_tokens or context
        ids, dropped = self.conversation.fit(self._encode, context, min(wanted, context // 4))
        if dropped:
            note(f"The context is full: the oldest {dropped} turns are forgotten.")
        return ids, replace(self.sampling, max_tokens=min(wanted, context - len(ids)))

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self.llm.encode_chat(messages)[1]

    def _stream(self, ids: list[int], sampling: SamplingParams) -> tuple[RequestOutput, bool]:
        """Print an answer. Returns it, and whether Ctrl-C stopped it; white space around it is not shown."""
        shown = ""
        pieces = cast("Generator[RequestOutput]", self.llm.stream(ids, sampling))
        with contextlib.closing(pieces):
            for output in pieces:
                text = output.text.strip()
                write(text[len(shown) :])
                shown = text
                if self.interrupted():
                    break
        click.echo()
        return output, not output.finished


def _ending(output: RequestOutput, stopped: bool, sampling: SamplingParams) -> str:
    if stopped:
        return "[stopped] "
    if output.outputs[0].finish_reason == "length":
        return f"[cut off after {sampling.max_tokens} tokens] "
    return ""


@contextlib.contextmanager
def _first_interrupt(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is only noted, so that no step is left half done. A second one ends the program."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    if enabled:
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(received)
    finally:
        if enabled:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed_lines() -> Iterator[str]:
    """Messages typed at a prompt, with the line editing of readline where Python has it. Ctrl-D ends them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is loaded)
    prompt = "\001\033[1;32m\002>\001\033[0m\002 "  # 1 and 2 tell readline what takes no room
    while True:
        try:
            with _interruptible():
                line = _joined(lambda more: input(".. " if more else prompt))
            yield line
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            note("Ctrl-D or /exit leaves.")


def _piped_lines() -> Iterator[str]:
    def read(_: bool) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    with contextlib.suppress(EOFError):
        while True:
            yield _joined(read)


def _joined(read: Callable[[bool], str]) -> str:
    r"""One message: a line, and those after it as long as they end in a backslash."""
    lines = [read(False)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(True))
    return "\n".join(lines)
