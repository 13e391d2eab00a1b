"""The chat panel: an anywidget whose answers are generated on a worker thread.

The kernel's main thread only receives messages, so Stop works while tokens stream. Text travels
as text and is shown with `textContent`: what a model writes is never HTML.
"""

import io
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import anywidget
import traitlets

import bitnet_edu
from bitnet_edu.chat import ChatSession
from bitnet_edu.errors import BitNetError, ContextLengthError, InputError
from bitnet_edu.files.hub import MODEL, download, is_hub_id
from bitnet_edu.generate import BitNetLM
from bitnet_edu.tokenizer import clean_text
from bitnet_edu.ui.figure import module_source, style

UPDATES_PER_SECOND = 15
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "max_new_tokens": 256}
HOLD_TEXT = ("messages", "partial", "notice", "unsent", "source", "sources", "system", "settings")


class Stopped(BitNetError):
    """Stop was pressed before there was anything to keep."""


class ChatPanel(anywidget.AnyWidget):
    """A conversation with a model: `ChatPanel()` or `ChatPanel("path/to/model")` in a cell."""

    _esm = module_source("chat")
    _css = style("chat")

    messages = traitlets.List().tag(sync=True)
    partial = traitlets.Unicode().tag(sync=True)  # the answer so far, while one is being written
    busy = traitlets.Bool(False).tag(sync=True)
    heard = traitlets.Int(0).tag(sync=True)  # messages of the page that have arrived
    notice = traitlets.Unicode().tag(sync=True)  # what went wrong, or what is being waited for
    unsent = traitlets.Unicode().tag(sync=True)  # a message that could not be answered
    full = traitlets.Bool(False).tag(sync=True)  # forgetting old messages would make it fit
    stats = traitlets.Dict().tag(sync=True)
    source = traitlets.Unicode().tag(sync=True)
    sources = traitlets.List().tag(sync=True)
    # set by the page, so of any type until they are used
    system = traitlets.Any("").tag(sync=True, echo_update=False)
    settings = traitlets.Any(SAMPLING).tag(sync=True, echo_update=False)

    @traitlets.validate(*HOLD_TEXT)
    def _sendable(self, proposal: Any) -> Any:
        return sendable(proposal.value)

    def __init__(self, source: str = "tiny", system: str = ""):
        super().__init__(source=source, system=system, sources=_unique("tiny", source, MODEL))
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self.session: ChatSession | None = None
        self.on_msg(lambda _, message, __: self.receive(message))
        self._start(self._load, source)

    def receive(self, message: dict[str, Any]) -> None:
        """Act on a message of the page: {"do": "send", "value": text}, "stop", "again", ..."""
        self.heard += 1
        action, value = message.get("do"), message.get("value")
        if action == "stop":
            self._stop.set()
        elif self.busy:
            self.notice = "One thing at a time: stop the answer first."
        elif action == "load":
            self._start(self._load, value)
        elif self.session is None:
            self.notice = "No model is loaded: choose one first."
        elif action == "send":
            self._start(self._answer, value)
        elif action == "again":
            self._start(self._answer_again)
        elif action == "forget" and self.unsent:
            self._start(self._forget_oldest)
        elif action == "clear":
            self._do(self._reset, [])
        elif action == "open":
            self._do(self._open, value)

    def wait(self, timeout: float | None = None) -> None:
        """Block until the running answer or load has ended; for tests and scripts."""
        if self._worker:
            self._worker.join(timeout)

    def _start(self, work: Callable, *arguments: Any) -> None:
        self._stop.clear()
        self.busy = True
        self._worker = threading.Thread(target=self._do, args=(work, *arguments), daemon=True)
        self._worker.start()

    def _do(self, work: Callable, *arguments: Any) -> None:
        self.notice, self.full = "", False
        try:
            work(*arguments)
        except ContextLengthError as error:
            self.notice = f"The context is full: {error}"
        except BitNetError as error:
            self.notice = str(error)
        except MemoryError:
            self.notice = "Out of memory: choose a smaller model or a shorter conversation."
        except BaseException as error:  # it would vanish with the thread; Rust's panics are such
            self.notice = f"{type(error).__name__}: {error}"
        finally:
            self.partial, self.busy = "", False

    def _load(self, source: Any) -> None:
        clean_text(source, "the name of a model")  # refuses what is no text
        source = source.strip() or "tiny"
        self.notice = f"Loading {source} ..."
        if is_hub_id(source) and not Path(source).exists():
            download(source, tqdm_class=progress_bar(self._follow_download))
        model: BitNetLM = bitnet_edu.load(source)
        if model.tokenizer is None:
            raise InputError(f"{source} has no tokenizer.json, so there is nothing to chat with")
        self._look(f"stopped; {self.source} stays the model")
        self.session = ChatSession(model)
        self.source, self.sources = source, _unique(*self.sources, source)
        self.notice = ""
        self._reset([])

    def _reset(self, messages: list[dict[str, str]]) -> None:
        self.session.clear()
        self.session.messages += messages
        self.unsent = ""
        self._show()

    def _open(self, saved: Any) -> None:
        """Replace the conversation by a saved one: {"system": ..., "messages": [...]}."""
        messages = saved.get("messages") if isinstance(saved, dict) else None
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise InputError("This file is not a saved conversation: it needs a list of messages.")
        system = saved.get("system")
        self.system = "" if system is None else clean_text(system, "a saved system prompt")
        self._reset(sendable([{"role": m["role"], "content": m["content"]} for m in messages]))

    def _look(self, notice: str) -> None:
        """Raise Stopped if Stop was pressed."""
        if self._stop.is_set():
            raise Stopped(notice)

    def _follow_download(self, done: int, total: int, name: str) -> None:
        self._look("stopped; the next download continues where this one ended")
        share = f"{done / total:.0%} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        self.notice = f"Downloading {name}: {share}"

    def _follow_prompt(self, done: int, total: int) -> None:
        self._look("Stopped before the answer began.")
        if done:
            self.notice = f"Reading {done:,} of {total:,} tokens"

    def _answer(self, text: Any) -> None:
        text = clean_text(text, "a message")
        if not text.strip():
            return
        self.unsent = text
        try:
            self._prepare()
            pieces = self.session.send(text, **self._options())
        except ContextLengthError:
            self.full = self._fits_alone(text)
            raise
        self.messages = [*self.messages, {"role": "user", "content": text}]
        self._write(pieces)
        self.unsent = ""

    def _prepare(self) -> None:
        system = "" if self.system is None else self.system
        self.session.system = clean_text(system, "the system prompt")

    def _forget_oldest(self) -> None:
        """Drop the oldest questions and answers until half of the context is free; send again."""
        self._prepare()
        question = {"role": "user", "content": self.unsent}
        self.session.drop_oldest(
            self.session.cache.max_len // 2,
            question,
            look=lambda: self._look("Stopped; nothing is forgotten."),
        )
        self._show()
        self._answer(self.unsent)

    def _fits_alone(self, text: str) -> bool:
        system = [m for m in self.session.messages if m["role"] == "system"]
        tokenizer = self.session.model.require_tokenizer()
        ids = tokenizer.apply_chat_template([*system, {"role": "user", "content": text}])
        return len(ids) < self.session.cache.max_len

    def _answer_again(self) -> None:
        self._prepare()
        session, before = self.session, list(self.session.messages)
        if before and before[-1]["role"] == "assistant":
            session.messages = before[:-1]
        if not session.messages or session.messages[-1]["role"] != "user":
            session.messages = before
            raise InputError("There is nothing to answer yet.")
        try:
            pieces = session.answer(**self._options())
            self._show()
            self._write(pieces)
        finally:
            if session.messages[-1]["role"] == "user":  # no other answer came: the old one stays
                session.messages = before
                self._show()

    def _options(self) -> dict[str, Any]:
        if not isinstance(self.settings, dict):
            raise InputError(f"the settings must be names with values, not {self.settings!r:.80}")
        chosen = {name: self.settings.get(name, usual) for name, usual in SAMPLING.items()}
        chosen["top_k"] = chosen["top_k"] if chosen["top_k"] != 0 else None
        return chosen | {"progress": self._follow_prompt}

    def _write(self, pieces: Generator[str, None, None]) -> None:
        """Stream an answer into `partial` until it ends or Stop is pressed."""
        start, first, shown, text = time.perf_counter(), None, 0.0, ""
        before = self.session.context_used
        try:
            for piece in pieces:
                now = time.perf_counter()
                if first is None:
                    first, before, self.notice = now, self.session.context_used, ""
                text += piece
                if now - shown > 1 / UPDATES_PER_SECOND:
                    self.partial, shown = text, now
                    self._measure(start, first, before)
                if self._stop.is_set():
                    break
        finally:
            pieces.close()
            if first is not None:
                self._measure(start, first, before)
            self._show()

    def _measure(self, start: float, first: float, before: int) -> None:
        tokens, seconds = self.session.context_used - before, time.perf_counter() - first
        self.stats = {
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            "first_token_seconds": first - start,
            "context_used": self.session.context_used,
            "context": self.session.cache.max_len,
        }

    def _show(self) -> None:
        self.messages = [m for m in self.session.messages if m["role"] != "system"]
        self.stats = self.stats | {
            "context_used": self.session.context_used,
            "context": self.session.cache.max_len,
        }


def progress_bar(tell: Callable[[int, int, str], None]) -> type:
    """A class for `download` that tells bytes done, bytes in all and the file's name."""
    from huggingface_hub.utils import tqdm

    class Progress(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            tell(int(self.n), int(self.total or 0), self.desc)

        def close(self) -> None:
            self.disable = True  # a bar that ends has nothing more to tell

    return Progress


def sendable(value: Any) -> Any:
    """The same JSON with text that has UTF-8 (lone surrogates, legal in JSON, have none)."""
    if isinstance(value, str):
        return clean_text(value, "text")
    if isinstance(value, dict):
        return {sendable(key): sendable(content) for key, content in value.items()}
    return [sendable(content) for content in value] if isinstance(value, list | tuple) else value


def _unique(*names: str) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )
