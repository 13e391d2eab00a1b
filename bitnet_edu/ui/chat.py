"""The chat panel: an anywidget whose answers are generated on a worker thread.

The kernel's main thread only receives messages, so Stop works while tokens stream. Text travels
as text and is shown with `textContent`: what a model writes is never HTML.
"""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

import bitnet_edu
from bitnet_edu.chat import ChatSession
from bitnet_edu.errors import BitNetError, ContextLengthError
from bitnet_edu.files.hub import download, is_hub_id
from bitnet_edu.generate import BitNetLM

UPDATES_PER_SECOND = 15
HUB_MODEL = "microsoft/bitnet-b1.58-2B-4T"
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "max_new_tokens": 256}


class ChatPanel(anywidget.AnyWidget):
    """A conversation with a model: `ChatPanel()` or `ChatPanel("path/to/model")` in a cell."""

    _esm = Path(__file__).parent / "static" / "chat.js"
    _css = Path(__file__).parent / "static" / "chat.css"

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
    system = traitlets.Unicode().tag(sync=True)
    settings = traitlets.Dict(SAMPLING).tag(sync=True)

    def __init__(self, source: str = "tiny", system: str = ""):
        super().__init__(source=source, system=system, sources=_unique("tiny", source, HUB_MODEL))
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
            self._start(self._load, str(value).strip() or "tiny")
        elif self.session is None:
            self.notice = "No model is loaded: choose one first."
        elif action == "send" and str(value).strip():
            self._start(self._answer, str(value))
        elif action == "again":
            self._start(self._answer_again)
        elif action == "forget" and self.unsent:
            self._start(self._forget_oldest)
        elif action == "clear":
            self._reset([])
        elif action == "open":
            self._open(value)

    def wait(self, timeout: float | None = None) -> None:
        """Block until the running answer or load has ended; for tests and scripts."""
        if self._worker:
            self._worker.join(timeout)

    def _start(self, work, *arguments) -> None:
        self._stop.clear()
        self.busy, self.notice, self.full = True, "", False
        self._worker = threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True)
        self._worker.start()

    def _guarded(self, work, *arguments) -> None:
        try:
            work(*arguments)
        except ContextLengthError as error:
            self.notice = f"The context is full: {error}"
        except BitNetError as error:
            self.notice = str(error)
        except MemoryError:
            self.notice = "Out of memory: choose a smaller model or a shorter conversation."
        except Exception as error:  # a thread's exception would vanish otherwise
            self.notice = f"{type(error).__name__}: {error}"
        finally:
            self.partial, self.busy = "", False

    def _load(self, source: str) -> None:
        self.notice = f"Loading {source} ..."
        if is_hub_id(source) and not Path(source).exists():
            download(source, tqdm_class=progress_bar(self._follow_download))
        model: BitNetLM = bitnet_edu.load(source)
        if model.tokenizer is None:
            raise BitNetError(f"{source} has no tokenizer.json, so there is nothing to chat with")
        self.session = ChatSession(model, self.system or None)
        self.source, self.sources = source, _unique(*self.sources, source)
        self.notice = ""
        self._reset([])

    def _reset(self, messages: list[dict[str, str]]) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        self.session.messages = system + messages
        self.session.cache.truncate(0)
        self._show()

    def _open(self, saved: Any) -> None:
        """Replace the conversation by a saved one: {"system": ..., "messages": [...]}."""
        messages = saved.get("messages") if isinstance(saved, dict) else None
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            self.notice = "This file is not a saved conversation: it needs a list of messages."
            return
        self.system = str(saved.get("system", ""))
        self._reset([{"role": m["role"], "content": m["content"]} for m in messages])

    def _follow_download(self, done: int, total: int, name: str) -> None:
        if self._stop.is_set():
            raise BitNetError("stopped; the next download continues where this one ended")
        share = f"{done / total:.0%} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        self.notice = f"Downloading {name}: {share}"

    def _answer(self, text: str) -> None:
        self._sync_system()
        self.unsent = text
        try:
            self._write(self.session.send(text, **self._options()), waiting_for=text)
        except ContextLengthError:
            self.full = self._fits([], text)
            raise
        self.unsent = ""

    def _forget_oldest(self) -> None:
        """Drop the oldest questions and answers until half of the context is free; send again."""
        kept = [m for m in self.session.messages if m["role"] != "system"]
        while kept and not self._fits(kept, self.unsent, self.session.cache.max_len // 2):
            kept = kept[2:]
        self._reset(kept)
        self._answer(self.unsent)

    def _fits(self, messages: list[dict], text: str, limit: int | None = None) -> bool:
        system = [{"role": "system", "content": self.system}] if self.system else []
        conversation = [*system, *messages, {"role": "user", "content": text}]
        ids = self.session.model.require_tokenizer().apply_chat_template(conversation)
        return len(ids) < (limit or self.session.cache.max_len)

    def _answer_again(self) -> None:
        messages = self.session.messages
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] != "user":
            raise BitNetError("There is nothing to answer yet.")
        self._sync_system()
        self._write(self.session.answer(**self._options()))

    def _sync_system(self) -> None:
        kept = [m for m in self.session.messages if m["role"] != "system"]
        system = [{"role": "system", "content": self.system}] if self.system else []
        self.session.messages = system + kept

    def _options(self) -> dict[str, Any]:
        chosen = SAMPLING | self.settings
        return {
            "temperature": float(chosen["temperature"]),
            "top_p": float(chosen["top_p"]),
            "top_k": int(chosen["top_k"]) or None,
            "seed": int(chosen["seed"]),
            "max_new_tokens": int(chosen["max_new_tokens"]),
        }

    def _write(self, pieces, waiting_for: str = "") -> None:
        """Stream an answer into `partial` until it ends or Stop is pressed."""
        if waiting_for:
            self.messages = [*self.messages, {"role": "user", "content": waiting_for}]
        else:
            self._show()
        start, first, shown, text = time.perf_counter(), None, 0.0, ""
        before = self.session.context_used
        try:
            for piece in pieces:
                now = time.perf_counter()
                if first is None:
                    first, before = now, self.session.context_used
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


def _unique(*names: str) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )
