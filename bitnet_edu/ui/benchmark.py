"""The benchmark panel: one click, and what limits the speed beside the speed."""

import base64
import html
import json
import threading
from collections.abc import Sequence
from typing import Any

import ipywidgets
import pandas as pd

from bitnet_edu import system
from bitnet_edu.benchmark import CONTEXTS, PREFILL_TOKENS, benchmark, busy_warning
from bitnet_edu.book import plots
from bitnet_edu.errors import BitNetError, InputError
from bitnet_edu.tokenizer import clean_text

SHAPES = {"the loaded model": None, "the shape of 2B4T (random, 1.2 GB)": "2b4t"}
NEEDED = {None: 0, "2b4t": 4e9}  # bytes of free memory
TRANSFORMERS_NEEDS = {None: 2e9, "2b4t": 8e9}


class BenchmarkPanel(ipywidgets.VBox):
    """Measure a model: `BenchmarkPanel("tiny")` in a cell. Everything runs on a worker thread."""

    def __init__(self, source: str = "tiny"):
        self.source = source
        wide = {"style": {"description_width": "11em"}, "layout": {"width": "min(100%, 28em)"}}
        self.shape = ipywidgets.Dropdown(options=SHAPES, description="Model", **wide)
        self.prompt = ipywidgets.BoundedIntText(
            PREFILL_TOKENS, min=1, max=4096, description="Prompt, tokens", **wide
        )
        self.contexts = ipywidgets.Text(
            ", ".join(map(str, CONTEXTS)), description="Decode at context", **wide
        )
        self.repeats = ipywidgets.BoundedIntText(5, min=1, max=50, description="Repeats", **wide)
        self.sweep = ipywidgets.Checkbox(description="with 1, 2, ... threads", indent=False)
        self.against = ipywidgets.Checkbox(description="against transformers", indent=False)
        self.start = ipywidgets.Button(description="Measure", tooltip="Start the measurement")
        self.status = ipywidgets.HTML()
        self.output = ipywidgets.HTML()
        self.results: list[dict[str, Any]] = []
        self._worker: threading.Thread | None = None
        self.start.on_click(lambda _: self.measure())
        choices = [self.shape, self.prompt, self.contexts, self.repeats, self.sweep, self.against]
        super().__init__([*choices, self.start, self.status, self.output])
        self.add_class("bn-benchmark")

    def measure(self) -> None:
        """What the button does."""
        self.start.disabled = True
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def wait(self, timeout: float | None = None) -> None:
        """Block until the running measurement has ended; for tests and scripts."""
        if self._worker:
            self._worker.join(timeout)

    def _work(self) -> None:
        try:
            contexts = parse_contexts(self.contexts.value)
            self._require_memory()
            self.results = []
            for threads in self._thread_counts():
                self.results.append(
                    benchmark(
                        self.source,
                        shape=self.shape.value,
                        threads=threads,
                        against="transformers" if self.against.value else None,
                        repeats=self.repeats.value,
                        contexts=contexts,
                        prompt_tokens=self.prompt.value,
                        progress=lambda text, n=threads: self._say(f"{n or 'all'} threads: {text}"),
                    )
                )
            self.output.value = report(self.results)
            self._say(busy_warning(self.results[-1]) or "Done.")
        except BitNetError as error:
            self._say(str(error))
        except BaseException as error:  # it would vanish with the thread; Rust's panics are such
            self._say(f"{type(error).__name__}: {error}")
        finally:
            self.start.disabled = False

    def _thread_counts(self) -> Sequence[int | None]:
        return range(1, system.machine().threads + 1) if self.sweep.value else [None]

    def _require_memory(self) -> None:
        needed = NEEDED[self.shape.value]
        if self.against.value:
            needed += TRANSFORMERS_NEEDS[self.shape.value]
        free = system.memory().available
        if free < needed:
            raise InputError(
                f"this needs about {needed / 1e9:.0f} GB of free memory and {free / 1e9:.1f} GB "
                "are free: close other programs, or measure the loaded model alone"
            )

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)


def parse_contexts(text: str) -> list[int]:
    """ "64, 512" -> [64, 512]; InputError if that is not a list of positive numbers."""
    try:
        contexts = [int(part) for part in clean_text(text, "contexts").split(",")]
    except ValueError:
        contexts = []
    if not contexts or min(contexts) < 1:
        raise InputError(f"contexts must be positive numbers with commas between, not {text!r:.80}")
    return contexts


def speeds(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Every speed of some results of `benchmark` as one row: threads, engine, what, min to max."""
    rows = []
    for result in results:
        prompt = f"prefill, {result['prefill_tokens']} tokens"
        lines = [
            ("bitnet_edu", f"decode, context {entry['context']}", entry["decode_tokens_per_second"])
            for entry in result["contexts"]
        ] + [("bitnet_edu", prompt, result["prefill_tokens_per_second"])]
        if theirs := result.get("transformers"):
            first = f"decode, context {result['contexts'][0]['context']}"
            lines += [
                ("transformers", first, theirs["decode_tokens_per_second"]),
                ("transformers", prompt, theirs["prefill_tokens_per_second"]),
            ]
        rows += [{"threads": result["threads"], "engine": e, "what": w} | s for e, w, s in lines]
    return pd.DataFrame(rows)


def report(results: Sequence[dict[str, Any]]) -> str:
    """Tables, a chart and links to save them, as HTML."""
    last, table = results[-1], speeds(results)
    prefill = last["prefill_tokens_per_second"]["median"]
    facts = {
        "processor": last["cpu"],
        "kernel": last["kernel"],
        "memory reads": f"{last['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s",
        "a token reads": f"{last['bytes_per_token'] / 1e6:,.1f} MB",
        "so at most": f"{last['roofline_tokens_per_second']:,.1f} tokens/s",
        "share reached": f"{last['roofline_share']:.0%}",
        "time to first token": f"{last['prefill_tokens'] / prefill:.2f} s after a prompt of "
        f"{last['prefill_tokens']} tokens",
        "loaded in": f"{last['load_seconds']:.3f} s",
        "peak memory": f"{last['peak_rss_bytes'] / 1e9:.2f} GB",
    }
    links = [
        _link("results.csv", "text/csv", table.to_csv(index=False)),
        _link("results.json", "application/json", json.dumps(list(results), indent=1)),
    ]
    shown = table.rename(columns={c: f"{c} tokens/s" for c in ("min", "median", "max")})
    return (
        '<div style="overflow-x:auto">'
        + pd.Series(facts).to_frame().to_html(header=False, border=0)
        + shown.to_html(index=False, border=0, float_format="{:,.1f}".format)
        + f"</div>{chart(results).data}<p>Save {' or '.join(links)}</p>"
    )


def chart(results: Sequence[dict[str, Any]]):
    """Decode speed against context, and against threads where several were measured."""
    fig, axes = plots.figure(1, 2 if len(results) > 1 else 1, squeeze=False)
    for result in results:
        contexts = [entry["context"] for entry in result["contexts"]]
        median = [entry["decode_tokens_per_second"]["median"] for entry in result["contexts"]]
        axes[0, 0].plot(contexts, median, "o-", label=f"{result['threads']} threads")
    axes[0, 0].set(xlabel="tokens in the context", ylabel="decode, tokens/s", ylim=0)
    axes[0, 0].legend()
    if len(results) > 1:
        first = [r["decode_tokens_per_second"]["median"] for r in results]
        axes[0, 1].plot([r["threads"] for r in results], first, "o-")
        axes[0, 1].set(xlabel="threads", ylabel="decode, tokens/s", ylim=0)
    return plots.show(fig, "Decode speed against the length of the context and against threads.")


def _link(name: str, kind: str, text: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{name}" href="data:{kind};base64,{data}">{name}</a>'
