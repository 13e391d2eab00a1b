"""How fast is it here, and how fast could it be? Speeds next to the memory's own, in one run.

A decode step reads every weight once, so memory sets a limit that no program beats: bytes of the
weights / bytes a second. A prefill uses each weight for many tokens, so arithmetic sets its limit:
int8 multiply-adds a second. Both drift on a shared machine. So each repeat measures everything
once, one after the other, and shares of a limit compare what was measured side by side.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numba import carray

import bitnet_edu
from bitnet_edu.errors import BitNetError, ContextLengthError, InputError, require_whole
from bitnet_edu.generate import BitNetLM, generate_ids
from bitnet_edu.guess import Guesser
from bitnet_edu.kernels.bits import cached_jit, ceil_div, jit, pointer
from bitnet_edu.kernels.border import address
from bitnet_edu.kernels.peak import operands, products_of_a_chunk, spin
from bitnet_edu.kernels.simd import kernel_type
from bitnet_edu.kernels.threads import checked_threads, finish, run, take, wait_for
from bitnet_edu.model import BitNet, KVCache, Settings
from bitnet_edu.proof.transformers import serve_timings
from bitnet_edu.sampling import GREEDY, Sampling
from bitnet_edu.system import cpu_name, peak_memory
from bitnet_edu.weights import BITNET_2B4T, random_weights

if TYPE_CHECKING:
    from rich.console import Group

SHAPES = {"2b4t": BITNET_2B4T}
CONTEXTS = (64, 512, 2048)
DECODE_TOKENS = 16  # for each measurement
SAMPLED = Sampling(0.6, None, 0.9)  # what Microsoft's generation_config.json asks for
PREFILL_TOKENS = 512
PROMPTS = (128, 512, 2048)  # tokens, for the share of the int8 peak and the profile
LONG_PROMPT = 1024  # from here on a prompt takes seconds: once a run is enough
PEAK_CHUNKS = 256  # for each thread, about 20 ms
READ_CHUNK = 2**22
BUSY = 10  # percent of the machine that others may use before we warn


def benchmark(
    source: str = "tiny",
    *,
    shape: str | None = None,
    threads: int | None = None,
    against: str | None = None,
    repeats: int = 5,
    contexts: Sequence[int] = CONTEXTS,
    prompt_tokens: int = PREFILL_TOKENS,
    cache_dtype: str = "float32",
    packing: str = "auto",
    head: str = "auto",
    ternarize: bool = False,
    profile: bool = False,
    guess: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure a model; the result is ready for JSON, speeds as {min, median, max}.

    shape: "2b4t", a random model of that shape in place of `source`. against: "transformers", in a
    process of its own, taking turns. contexts: tokens in the KV cache while decoding, those that
    fit; the first is the one of `decode_tokens_per_second`. prompt_tokens: of the prefill.
    cache_dtype: "float32" or "float16". packing, head: as in `model.Settings`. ternarize: as for
    `load`. profile: also where the time of prompts goes, and of a decode step (see
    `BitNet.profile`). guess: also what guessing ahead brings, with four kinds of text (see
    `measure_guessing`). progress: told what is being done. Raises InputError, ContextLengthError if
    no context fits, and what loading raises.
    """
    if shape not in (None, *SHAPES) or against not in (None, "transformers"):
        raise InputError(f"there is no shape {shape!r}, or no engine {against!r}, to measure")
    if cache_dtype not in ("float32", "float16"):
        raise InputError(f"a KV cache is float32 or float16, not {cache_dtype}")
    for what, value in {"repeats": repeats, "prompt_tokens": prompt_tokens}.items():
        require_whole(value, 1, 10**6, what)
    for context in contexts:
        require_whole(context, 1, 2**31, "a context")
    if threads is not None:
        checked_threads(threads)
    Settings(packing=packing, head=head)  # refused before any work
    busy = psutil.cpu_percent(0.5)
    with tempfile.TemporaryDirectory(prefix="bitnet-edu-") as folder:
        if shape and against:
            source, shape = _write_random(Path(folder, shape), progress), None
        progress("loading")
        model, load_seconds = _load(source, shape, ternarize)
        threads = threads or model.threads
        model.settings = replace(model.settings, threads=threads, packing=packing, head=head)
        other = _Other(source, model.threads) if against else None
        try:
            result = {
                "model": shape or source,
                "cpu": cpu_name(),
                "threads": model.threads,
                "kernel": model.kernel,
                "busy_percent": busy,
                "load_seconds": load_seconds,
                **_measure(
                    model,
                    repeats,
                    contexts,
                    prompt_tokens,
                    np.dtype(cache_dtype).type,
                    other,
                    progress,
                ),
                **({"guessing": measure_guessing(model, repeats, progress)} if guess else {}),
                "peak_rss_bytes": peak_memory(),
            }
            if profile:
                progress("profile")
                result["profile"] = _profile(
                    model, result["parts_context"], np.dtype(cache_dtype).type
                )
            return result
        finally:
            if other:
                other.stop()


def _load(source: str, shape: str | None, ternarize: bool) -> tuple[BitNetLM, float]:
    """The model and the seconds it took; for a shape without making its random weights."""
    weights = random_weights(SHAPES[shape]) if shape else None
    start = time.perf_counter()
    if weights:
        model = BitNetLM(SHAPES[shape], weights, None)
    else:
        model = bitnet_edu.load(source, ternarize=ternarize)
    return model, time.perf_counter() - start


def _write_random(folder: Path, progress: Callable[[str], None]) -> str:
    """A random model as a file that both programs can load."""
    from bitnet_edu.files.convert import convert

    progress("writing a random model of 1.2 GB")
    process = multiprocessing.get_context("spawn").Process(  # its memory is not ours
        target=convert, args=("random-2b4t", folder)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise BitNetError(f"the random model could not be written to {folder}")
    return str(folder)


def _measure(
    model: BitNetLM,
    repeats: int,
    contexts: Sequence[int],
    prompt_tokens: int,
    cache_dtype: type,
    other: "_Other | None",
    progress: Callable[[str], None],
) -> dict[str, Any]:
    most = model.config.max_position_embeddings
    contexts = [n for n in contexts if n + DECODE_TOKENS <= most]
    if not contexts:
        raise ContextLengthError(
            f"this model's context is {most} tokens, of which {DECODE_TOKENS} are decoded: measure "
            f"at contexts of at most {most - DECODE_TOKENS}"
        )
    prompt = np.arange(min(prompt_tokens, most)) % model.config.vocab_size
    prompts = [n for n in PROMPTS if n <= most]
    cache = _filled_cache(model, max(contexts) + DECODE_TOKENS, cache_dtype)
    progress("compiling")
    _decode(model, cache, contexts[0])
    _decode(model, cache, contexts[0], SAMPLED)
    model.forward(prompt[:5], model.new_cache(5))
    bandwidth, sampled, prefill, theirs = [], [], [], []
    peaks: list[float] = []
    shares_of_peak: dict[int, list[float]] = {n: [] for n in prompts}
    decode: list[list[float]] = [[] for _ in contexts]
    parts: list[dict[str, float]] = []
    for repeat in range(repeats):
        progress(f"repeat {repeat + 1} of {repeats}")
        bandwidth.append(read_bandwidth(model.engine))
        for n, speeds in zip(contexts, decode, strict=True):
            speeds.append(_decode(model, cache, n))
        sampled.append(_decode(model, cache, contexts[0], SAMPLED))
        parts.append(_parts(model, cache, contexts[-1]))
        peaks.append(int8_peak(model.engine))
        due = [n for n in prompts if n < LONG_PROMPT or repeat == 0]
        seconds = {n: _prefill(model, n) for n in {*due, len(prompt)}}
        prefill.append(len(prompt) / seconds[len(prompt)])
        for n in due:
            shares_of_peak[n].append(_products(model, n) / seconds[n] / peaks[-1])
        if other:
            theirs.append(other.measure(contexts[0], len(prompt)))
    size = sum(array.nbytes for array in model.engine.arrays_of_a_token)
    shares = [speed * size / rate for speed, rate in zip(decode[0], bandwidth, strict=True)]
    result: dict[str, Any] = {
        "bytes_per_token": size,
        "read_bandwidth_bytes_per_second": float(np.median(bandwidth)),
        "roofline_tokens_per_second": float(np.median(bandwidth)) / size,
        "roofline_share": float(np.median(shares)),
        "decode_tokens_per_second": _spread(decode[0]),
        "sampled_decode_tokens_per_second": _spread(sampled),
        "mode": model.engine.mode,
        "whole_head_share": model.engine.whole_heads / max(1, model.engine.screened),
        "prefill_tokens_per_second": _spread(prefill),
        "prefill_tokens": len(prompt),
        "int8_peak_multiply_adds_per_second": float(np.median(peaks)),
        "prefill_share_of_int8_peak": {
            str(n): float(np.median(found)) for n, found in shares_of_peak.items()
        },
        "cache_dtype": np.dtype(cache_dtype).name,
        "contexts": [
            {"context": n, "decode_tokens_per_second": _spread(speeds)}
            for n, speeds in zip(contexts, decode, strict=True)
        ],
        "parts_context": contexts[-1],
        "parts_seconds": {name: float(np.median([p[name] for p in parts])) for name in parts[0]},
    }
    if other:
        result["transformers"] = {
            "decode_tokens_per_second": _spread([speeds[0] for speeds in theirs]),
            "prefill_tokens_per_second": _spread([speeds[1] for speeds in theirs]),
            "peak_rss_bytes": other.peak_memory(),
            "load_seconds": other.load_seconds,
        }
    return result


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "min": float(min(values)),
        "median": float(np.median(values)),
        "max": float(max(values)),
    }


def _filled_cache(model: BitNetLM, length: int, dtype: type) -> KVCache:
    """A cache with noise in every position: attention's time does not depend on the numbers."""
    cache = model.new_cache(length, dtype)
    noise = np.random.default_rng(0).standard_normal((length, model.config.head_dim))
    cache.keys[:] = cache.values[:] = noise
    return cache


def _decode(model: BitNetLM, cache: KVCache, context: int, sampling: Sampling = GREEDY) -> float:
    """Tokens a second after `context` tokens, as a generation makes them."""
    cache.length = context
    token = 0
    start = time.perf_counter()
    for key in range(DECODE_TOKENS):
        [token] = model.next_tokens([token], cache, sampling, np.array([key], np.uint64))
    return DECODE_TOKENS / (time.perf_counter() - start)


def _prefill(model: BitNetLM, tokens: int) -> float:
    """Seconds of a prompt of so many tokens."""
    prompt = np.arange(tokens) % model.config.vocab_size
    cache = model.new_cache(tokens)
    start = time.perf_counter()
    model.forward(prompt, cache)
    return time.perf_counter() - start


def _products(model: BitNetLM, tokens: int) -> int:
    """Multiply-adds of a prompt's ternary products: no decoding, attention or head among them."""
    matrices = sum(rows * columns for rows, columns in model.config.matrix_shapes.values())
    return tokens * model.config.num_hidden_layers * matrices


def _parts(model: BitNetLM, cache: KVCache, context: int) -> dict[str, float]:
    """Seconds of a decode step, part by part."""
    steps = []
    for _ in range(DECODE_TOKENS):
        cache.length = context
        steps.append(model.engine.profile([0], cache))
    return {name: float(np.median([step[name] for step in steps])) for name in steps[0]}


def _profile(model: BitNetLM, context: int, dtype: type) -> list[dict[str, Any]]:
    """Where the time goes, for prompts and for one token after `context` others."""
    most = model.config.max_position_embeddings
    entries = []
    for n in (n for n in PROMPTS if n <= most):
        prompt = np.arange(n) % model.config.vocab_size
        seconds = model.engine.profile(prompt, model.new_cache(n, dtype))
        entries.append({"tokens": n, "context": 0, "seconds": seconds})
    cache = _filled_cache(model, context + 1, dtype)
    entries.append({"tokens": 1, "context": context, "seconds": _parts(model, cache, context)})
    return entries


# --- The limits ----------------------------------------------------------------------------------


def int8_peak(engine: BitNet) -> float:
    """int8 multiply-adds a second of the engine's threads and kernel, without memory in the way."""
    codes, x, sums = operands(engine.kernel, engine.threads)
    chunks = PEAK_CHUNKS * engine.threads
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        run(spin, (kernel_type(engine.kernel), codes, x, sums, chunks), engine.threads)
        rates.append(chunks * products_of_a_chunk(engine.kernel) / (time.perf_counter() - start))
    return float(max(rates))


def read_bandwidth(engine: BitNet) -> float:
    """Bytes a second at which the engine's threads read all its weights and do nothing else."""
    arrays = engine.arrays_of_a_token
    addresses = np.array([address(a, a.dtype.type, a.shape, "weights") for a in arrays])
    sizes = np.array([a.nbytes for a in arrays])
    sums = np.zeros(int(sum(-(-size // READ_CHUNK) for size in sizes)), np.int32)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        run(_read, (addresses, sizes, sums), engine.threads)
        rates.append(sizes.sum() / (time.perf_counter() - start))
    return float(max(rates))


@cached_jit
def _read(addresses, sizes, sums, thread, counters):
    """Add up everything: the cheapest way to read it that a compiler can't remove."""
    chunk, array, first = take(counters), 0, 0
    while chunk < len(sums):
        while chunk >= first + ceil_div(sizes[array], READ_CHUNK):
            first += ceil_div(sizes[array], READ_CHUNK)
            array += 1
        begin = (chunk - first) * READ_CHUNK
        size = min(READ_CHUNK, sizes[array] - begin)
        sums[chunk] = _sum(addresses[array] + begin, size // 4)
        finish(counters)
        chunk = take(counters)
    wait_for(counters, len(sums))


@jit
def _sum(address, count):
    numbers, total = carray(pointer(address, np.int32), count), np.int32(0)
    for i in range(count):
        total += numbers[i]
    return total


# --- transformers --------------------------------------------------------------------------------


class _Other:
    """transformers in its own process, which works only when asked."""

    def __init__(self, folder: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve_timings, args=(folder, threads, DECODE_TOKENS, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.load_seconds = self._answer()

    def measure(self, context: int, prompt: int) -> tuple[float, float]:
        """(decode, prefill) tokens a second."""
        self.pipe.send((context, prompt))
        return self._answer()

    def peak_memory(self) -> int:
        self.pipe.send(None)
        return self._answer()

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise BitNetError("transformers' process ended, perhaps for lack of memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


# --- Guessing ahead ------------------------------------------------------------------------------

PASSAGE = """The lighthouse at Crane Point was built in 1871 from grey granite that was quarried \
on the island itself. Its tower is 38 metres high. Until 1966 three keepers lived there with their \
families and wound the clockwork of the lamp every four hours. Supplies came by boat once a \
fortnight, and in the winter of 1903 no boat could land for 51 days. The keepers' houses are a \
museum now, open from May to September. Visitors take the ferry from Port Ellery; the crossing \
takes 40 minutes. Please stay on the marked paths, because terns breed between the stones.
"""
CODE = """def read_table(path):
    rows = []
    for line in open(path):
        if not line.startswith("#"):
            rows.append([float(cell) for cell in line.split(",")])
    return rows


def column_means(rows):
    totals = [0.0] * len(rows[0])
    for row in rows:
        for i, cell in enumerate(row):
            totals[i] += cell
    return [total / len(rows) for total in totals]
"""
EDITED = CODE.replace("read_table(path)", "read_table(path, separator)")
EDITED = EDITED.replace('split(",")', "split(separator)").replace("cell", "value")
ABOUT_IT = """It was built in 1871, from grey granite that was quarried on the island itself. For \
almost a century people lived there: until 1966 three keepers, with their families, wound the \
clockwork of the lamp every four hours. Life was lonely: in the winter of 1903 no boat could land \
for 51 days. If you want to go, take the ferry from Port Ellery; the crossing takes 40 minutes. \
You can see the keepers' houses, which are a museum, open from May to September.
"""
STORY = """Mira had never trusted the clock in her grandmother's kitchen. It ran backwards on \
rainy days, and nobody but her seemed to notice. One Thursday, while soup simmered on the stove, \
she climbed onto a chair and opened its little glass door. Behind the dial sat a snail no bigger \
than a pea, harnessed to the smallest wheel. "At last," it sighed. "Do you have any idea how hard \
it is to pull an hour uphill?" She fetched a lettuce leaf, undid the silver thread, and asked what \
would happen to time if its engine took a holiday.
"""
KINDS = {  # a prompt, and what we make of it
    "copying a passage": (f"Repeat this word for word:\n{PASSAGE}\n", PASSAGE),
    "editing code": (f"Rename cell to value, add a parameter separator:\n{CODE}\n", EDITED),
    "about a document": (f"{PASSAGE}\nHow was life there, and how do I get there?\n", ABOUT_IT),
    "free story": ("Tell me a story about a clock.\n", STORY),
}


class _Scripted:
    """An engine that does all its work, but says what a given text says."""

    def __init__(self, model: BitNetLM, text: list[int]):
        self.model, self.config, self.prefill, self.text = model, model.config, model.prefill, text
        self.own = [-1] * len(text)  # what it would have said at each place

    def next_tokens(
        self, ids: Sequence[int], cache: KVCache, sampling: Sampling, keys: np.ndarray
    ) -> list[int]:
        chosen = self.model.next_tokens(ids, cache, sampling, keys)
        places = slice(cache.length + 1 - len(keys), cache.length + 1)
        self.own[places] = chosen
        return self.text[places]


def measure_guessing(
    model: BitNetLM, repeats: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What guessing ahead brings for each of `KINDS`, with and without it by turns.

    How often a guess is right depends on the text, and a model at hand (a random one, say) does
    not write all kinds. So the text is given, and the model works on it as if it were its own: all
    of each step is computed, choices too, and these must be the same with and without guesses,
    else BitNetError. A model without a tokenizer reads with that of `tiny`.
    """
    tokenizer = model.tokenizer or bitnet_edu.load("tiny").tokenizer
    most, results = model.config.max_position_embeddings, []
    for kind, (question, answer) in KINDS.items():
        prompt = tokenizer.encode(question)
        text = [*prompt, *tokenizer.encode(answer, add_special_tokens=False)][:most]
        text = [token % model.config.vocab_size for token in text]
        if len(prompt) >= len(text):
            raise ContextLengthError(f"a context of {most} tokens is too short to guess ahead in")
        ratios = []
        for repeat in range(repeats):
            progress(f"guessing ahead: {kind}, {repeat + 1} of {repeats}")
            guesser = Guesser()
            turns = [(True, guesser), (False, Guesser(0))][:: (-1) ** repeat]
            runs = {which: _say(model, text, len(prompt), ours) for which, ours in turns}
            if runs[True][1] != runs[False][1]:
                raise BitNetError(f"other tokens were chosen when guessing ahead ({kind})")
            ratios.append(runs[False][0] / runs[True][0])
        results.append(
            {
                "kind": kind,
                "tokens": len(text) - len(prompt),
                "speedup": float(np.median(ratios)),
                "acceptance": guesser.accepted / guesser.guessed if guesser.guessed else None,
                **guesser.counts(),
            }
        )
    return results


def _say(
    model: BitNetLM, text: list[int], prompt: int, guesser: Guesser
) -> tuple[float, list[int]]:
    """Seconds from the first token on; the tokens that the model itself would have chosen."""
    engine, count = _Scripted(model, text), len(text) - prompt
    cache = model.new_cache(len(text))
    tokens = generate_ids(engine, text[:prompt], count, stop=(), cache=cache, guess=guesser)
    next(tokens)
    start = time.perf_counter()
    for _ in tokens:
        pass
    return time.perf_counter() - start, engine.own[prompt:]


# --- The table -----------------------------------------------------------------------------------


def render(result: dict[str, Any]) -> "Group":
    """The result as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table

    def row(table: Table, name: str, speeds: dict[str, float]) -> None:
        table.add_row(name, *(f"{speeds[key]:,.1f}" for key in ("min", "median", "max")))

    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    table = Table("tokens/s", "min", "median", "max", title=f"{result['model']}, {threads}")
    for entry in result["contexts"]:
        row(table, f"decode, context {entry['context']}", entry["decode_tokens_per_second"])
    first = f"context {result['contexts'][0]['context']}, sampled"
    row(table, f"decode, {first}", result["sampled_decode_tokens_per_second"])
    row(table, f"prefill, {result['prefill_tokens']} tokens", result["prefill_tokens_per_second"])
    if theirs := result.get("transformers"):
        row(table, "transformers, decode", theirs["decode_tokens_per_second"])
        row(table, "transformers, prefill", theirs["prefill_tokens_per_second"])
    shares = result["prefill_share_of_int8_peak"].items()
    reached = ", ".join(f"{share:.0%} at {n} tokens" for n, share in shares)
    parts = ", ".join(f"{k} {1e3 * v:.2f}" for k, v in result["parts_seconds"].items())
    lines = [
        f"{result['cpu']}, {result['kernel']} kernel, {result['cache_dtype']} KV cache, "
        f"{result['mode']['packing']} weights, {result['mode']['head']} head",
        f"memory reads {result['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, a token "
        f"{result['bytes_per_token'] / 1e6:,.1f} MB: at most "
        f"{result['roofline_tokens_per_second']:,.1f} tokens/s, "
        f"{result['roofline_share']:.0%} of it reached",
        f"at most {result['int8_peak_multiply_adds_per_second'] / 1e9:,.0f} billion int8 "
        f"multiply-adds/s; a prompt's products reach {reached}",
        f"one token at context {result['parts_context']}, ms: {parts}",
        f"loaded in {result['load_seconds']:.3f} s, at most "
        f"{result['peak_rss_bytes'] / 1e9:.2f} GB of memory",
    ]
    if result["mode"]["head"] == "screened":
        lines.append(
            f"the whole head was needed for {result['whole_head_share']:.1%} of the tokens"
        )
    for entry in result.get("profile", ()):
        whole = sum(entry["seconds"].values())
        split = ", ".join(f"{k} {v / whole:.1%}" for k, v in entry["seconds"].items())
        after = f" after {entry['context']}" if entry["context"] else ""
        plural = "s" * (entry["tokens"] > 1)
        lines.append(f"{entry['tokens']} token{plural}{after}, {whole:.3f} s: {split}")
    for found in result.get("guessing", ()):
        lines.append(
            f"guessing ahead, {found['kind']}: {found['speedup']:.2f} times as fast, "
            f"{found['tokens']} tokens in {found['steps']} steps, "
            f"{found['accepted_tokens']} of {found['guessed_tokens']} guesses right"
        )
    if theirs:
        lines.append(
            f"transformers: loaded in {theirs['load_seconds']:.1f} s, at most "
            f"{theirs['peak_rss_bytes'] / 1e9:.2f} GB of memory"
        )
    if warning := busy_warning(result):
        lines.append(f"[yellow]{warning}[/]")
    return Group(table, *lines)


def busy_warning(result: dict[str, Any]) -> str | None:
    """What to say if other programs were at work when the measurement began."""
    if result["busy_percent"] <= BUSY:
        return None
    return (
        f"other programs were using {result['busy_percent']:.0f}% of this machine: "
        "close them and measure again"
    )
