"""A chat in the terminal: text as it comes, the speed live below it, Ctrl-C stops the answer."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from bitnet_edu.chat import ChatSession
from bitnet_edu.errors import BitNetError, InputError, printable
from bitnet_edu.files.atomic import all_or_nothing

HELP = """\
/system TEXT   what the model is told before you speak (alone: show it)
/clear         forget the conversation
/save FILE     write the conversation as JSON
/help          this list
/exit          leave (or Ctrl-D)
Ctrl-C         stop the answer
//TEXT         the message /TEXT: two slashes where it begins with one
End a line with \\ to go on in the next one, or put a longer text between two lines of \"\"\"; where
the input ends, the message ends."""


# what could steer the terminal, as the pictures that Unicode has for it
NO_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
NO_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Command(str):
    """A line that begins with a slash."""


class Clock:
    """Tokens per second from the first token on: what comes before is the prompt's time."""

    def __init__(self):
        self.start = time.perf_counter()
        self.first: tuple[float, int] | None = None
        self.last = (self.start, 0)

    def see(self, tokens: int) -> None:
        """So many tokens there are now."""
        self.last = time.perf_counter(), tokens
        self.first = self.first or (self.last if tokens else None)

    @property
    def seconds_to_first(self) -> float:
        return (self.first or self.last)[0] - self.start

    @property
    def tokens_per_second(self) -> float:
        first = self.first or (self.start, 0)
        if self.last[1] == first[1]:  # all came at once
            first = (self.start, 0)
        return (self.last[1] - first[1]) / max(self.last[0] - first[0], 1e-9)


class Terminal:
    """Reads messages and commands, writes answers. In a pipe: a message a line, answers only."""

    def __init__(self, session: ChatSession, name: str, options: dict[str, Any], console: Console):
        self.session = session
        self.name = name
        self.options = options
        self.console = console
        self.interactive = console.is_terminal and sys.stdin.isatty()

    def run(self) -> int:
        """Chat until /exit or the end of the input; returns the exit status."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (history and editing for input())
            self.say(f"{printable(self.name)}: type a message, or /help")
        while True:
            try:
                text = self.read()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.console.print("\nCtrl-D or /exit leaves", style="dim")
                continue
            if text is None:
                return 0
            try:
                if isinstance(text, Command):
                    if not self.command(text):
                        return 0
                elif text.strip():
                    self.answer(text)
            except (BitNetError, OSError) as error:
                if not self.interactive:
                    raise
                self.console.print(Text(printable(error), style="red"))

    def read(self) -> str | None:
        """The next message or `Command`, None at the end of the input."""
        if (line := self._line("> ")) is None:
            if self.interactive:
                self.console.print()
            return None
        if line.strip() == '"""':
            return "\n".join(self._lines_of_a_block())
        while line.endswith("\\"):
            line = "\n".join([line[:-1], self._line("... ") or ""])
        if line.startswith("//"):
            return line[1:]
        return Command(line) if line.startswith("/") else line

    def _lines_of_a_block(self) -> Iterator[str]:
        while (line := self._line("... ")) is not None and line.strip() != '"""':
            yield line

    def _line(self, prompt: str) -> str | None:
        try:
            return input(prompt if self.interactive else "")
        except EOFError:
            return None

    def command(self, text: str) -> bool:
        """Obey a line that begins with a slash; False for /exit."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/clear":
            self.session.clear()
            self.say("The conversation is forgotten.")
        elif name == "/system":
            if rest:
                self.session.system = rest
            self.say(f"System: {self.session.system or '(nothing)'}")
        elif name == "/save":
            self.save(rest)
        elif name == "/help":
            self.say(HELP)
        else:
            self.say(f"There is no {printable(name)}: /help lists the commands.")
        return True

    def save(self, file: str) -> None:
        if not file:
            raise InputError("name a file: /save conversation.json")
        messages = [m for m in self.session.messages if m["role"] != "system"]
        saved = {"system": self.session.system or "", "messages": messages}
        data = json.dumps(saved, ensure_ascii=False, indent=1).encode("utf-8")
        try:
            path = Path(file).expanduser()
        except RuntimeError as error:  # ~nobody
            raise InputError(f"{file}: {error}") from None
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file in it")
        with all_or_nothing(path, len(data)) as temporary:
            temporary.write_bytes(data)
        self.say(f"Saved to {path}.")

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))

    def answer(self, text: str) -> None:
        """Send a message and write the answer as it comes."""
        made, clock = [], Clock()
        try:
            with contextlib.closing(self.session.send(text, made=made, **self.options)) as pieces:
                if self.interactive and not self.console.is_dumb_terminal:
                    self.show_live(pieces, made, clock)
                else:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                    print()
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.say("(stopped)")

    def show_live(self, pieces: Iterator[str], made: list[int], clock: Clock) -> None:
        """Keep the last line and the speed live; lines that are full scroll away above them."""
        tail = ""
        with Live(console=self.console, refresh_per_second=12, transient=True) as live:
            try:
                for piece in pieces:
                    clock.see(len(made))
                    *full, tail = self.wrap(tail + piece)
                    for line in full:
                        self.console.print(Text(line))
                    live.update(Group(Text(tail), Text(self.status(clock), style="dim")))
            finally:
                live.update(Text(""))
                self.console.print(Text(tail))
        self.say(self.status(clock))

    def wrap(self, text: str) -> list[str]:
        """Cut text into lines of the terminal's width; the last one may still grow."""
        text = text.expandtabs().translate(NO_CONTROLS)
        lines = [line.plain for line in Text(text).wrap(self.console, self.console.width)] or [""]
        lines[-1] = lines[-1].rstrip(" ") + text[len(text.rstrip(" ")) :]  # wrap drops spaces
        return lines

    def status(self, clock: Clock) -> str:
        return (
            f"{clock.tokens_per_second:.1f} tokens/s, {clock.last[1]} tokens, "
            f"first after {clock.seconds_to_first:.2f} s, "
            f"context {self.session.context_used} of {self.session.cache.max_len}"
        )
