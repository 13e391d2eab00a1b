"""Equal to transformers, with proof: the engine, the NumPy reference, BitNetForCausalLM.

All three multiply the same whole numbers. Around these products they add float32 numbers in
different orders, which moves the last bits (about 1e-7 of an array's range). Only where such a
hair decides how an activation rounds does an int8 code differ, by one step: a *flip*, after which
all that follows differs visibly. So each program is held against the reference in a replay: the
reference takes over the program's int8 codes one matrix after the other. Then every difference
must vanish but for float32's last bits, and every code that was taken over must be a flip: one
step away, its unrounded value in the middle between two steps.

torch and transformers are imported only when a function needs them.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitnet_edu.checkpoint import MATRICES
from bitnet_edu.errors import BitNetError, ContextLengthError, InputError
from bitnet_edu.generate import BitNetLM, generate_ids
from bitnet_edu.packing import unpack_hf
from bitnet_edu.quantize import absmax_int8
from bitnet_edu.reference import BitNetReference
from bitnet_edu.sources import find_model, load_source
from bitnet_edu.weights import Weights

if TYPE_CHECKING:
    from rich.console import Group
    from transformers import BitNetForCausalLM

BOUND = 1e-5  # of an array's range; what float32's last bits do stays far below
STEP_BOUND = 127 * BOUND  # the same for an activation, in int8 steps
QUESTIONS = (
    "Hello!",
    "What is a ternary weight?",
    "What is 3 plus 4?",
    "Tell me a story.",
    "What is a token?",
    "What is a KV cache?",
    "What is absmean?",
    "Tell me a story about a fox.",
    "Thank you!",
)
LISTED = 100  # flips kept in a report; all are counted
# the matrices that read the same int8 codes as the one named
READERS = {
    "q_proj": "q_proj, k_proj, v_proj",
    "o_proj": "o_proj",
    "gate_proj": "gate_proj, up_proj",
    "down_proj": "down_proj",
}
Trace = dict[str, np.ndarray]


class Flip(NamedTuple):
    """An activation that a program and the reference round to different int8 codes."""

    program: str
    layer: int
    matrix: str  # whose input it is
    token: int
    channel: int
    unrounded: float  # the reference's value, in int8 steps
    reference: int
    other: int

    @property
    def explained(self) -> bool:
        """One step apart, with the unrounded value in the middle: last bits decided."""
        middle = (self.reference + self.other) / 2
        return abs(self.reference - self.other) == 1 and abs(self.unrounded - middle) <= STEP_BOUND


class Row(NamedTuple):
    """One array of the replay: how far it is from the program's."""

    name: str
    max_difference: float
    range: float

    @property
    def ok(self) -> bool:
        return self.max_difference <= BOUND * self.range


@dataclass
class Comparison:
    """One program against the reference, on the same tokens."""

    program: str
    max_logit_difference: float = 0.0  # as the two are
    argmax_agreement: float = 0.0
    weights_differ: list[str] = field(default_factory=list)  # matrices read differently
    flips: list[Flip] = field(default_factory=list)  # the first ones
    flip_count: int = 0
    unexplained: int = 0
    sums_differ: int = 0  # integer sums that are not bit-exact in the replay
    rows: list[Row] = field(default_factory=list)  # of the replay, layer by layer; logits last

    @property
    def ok(self) -> bool:
        exact = not (self.unexplained or self.sums_differ or self.weights_differ)
        return exact and all(row.ok for row in self.rows)


@dataclass
class Report:
    """What `verify` found. `ok` is strict: see the module's text."""

    tokens: int  # generated greedily, after the prompt
    prompt_tokens: int
    engine: Comparison
    transformers: Comparison
    max_logit_difference: float  # between engine and transformers
    logit_range: float
    argmax_agreement: float  # share of positions where these two prefer the same token
    greedy_equal: bool  # all three generate the same tokens
    greedy_explained: bool  # or part where two tokens are equally good but for the flips

    @property
    def rounding_flips(self) -> int:
        return self.engine.flip_count + self.transformers.flip_count

    @property
    def ok(self) -> bool:
        close = self.max_logit_difference <= BOUND * self.logit_range
        greedy = self.greedy_equal or (self.rounding_flips > 0 and self.greedy_explained)
        parts = self.engine.ok and self.transformers.ok and greedy
        return bool(parts and (close or self.rounding_flips > 0))

    def as_json(self) -> dict[str, Any]:
        def part(comparison: Comparison) -> dict[str, Any]:
            return {
                "ok": comparison.ok,
                "max_logit_difference": comparison.max_logit_difference,
                "replayed_logit_difference": comparison.rows[-1].max_difference,
                "argmax_agreement": comparison.argmax_agreement,
                "weights_differ": comparison.weights_differ,
                "rounding_flips": comparison.flip_count,
                "unexplained": comparison.unexplained,
                "sums_differ": comparison.sums_differ,
                "layers": [row._asdict() for row in comparison.rows],
            }

        flips = self.engine.flips + self.transformers.flips
        return {
            "ok": self.ok,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "max_logit_difference": self.max_logit_difference,
            "logit_range": self.logit_range,
            "bound": BOUND * self.logit_range,
            "argmax_agreement": self.argmax_agreement,
            "greedy_equal": self.greedy_equal,
            "rounding_flips": self.rounding_flips,
            "flips": [flip._asdict() | {"explained": flip.explained} for flip in flips],
            "engine": part(self.engine),
            "transformers": part(self.transformers),
        }


def verify(source: str = "tiny", tokens: int = 200, *, ternarize: bool = False) -> Report:
    """Compare all three programs in a conversation with `tokens` greedily generated tokens.

    Raises CheckpointError, DownloadError or InputError where there is nothing to compare.
    """
    path = model_folder(source)
    model = load_source(str(path), ternarize=ternarize)
    conversation, made = converse(model, prompts_of(model), tokens)
    return compare(model, load_transformers(path, ternarize=ternarize), conversation, made)


def compare(
    model: BitNetLM, theirs: "BitNetForCausalLM", conversation: Sequence[int], made: Sequence[int]
) -> Report:
    """Run `model`, the reference on its weights, and transformers' model on the same tokens.

    conversation: token ids, made: the places in it of those that the model generated (`converse`).
    """
    ids, tokens = np.array(conversation[:-1]), len(made)
    reference = BitNetReference(model.config, model.weights)
    plain = reference.logits(ids)

    engine_logits, trace = trace_engine(model, ids)
    engine = replay(reference, ids, "engine", engine_logits, trace, plain)
    their_logits, trace = trace_transformers(theirs, ids)
    differ = compare_weights(theirs, model.weights, trace)
    transformers = replay(reference, ids, "transformers", their_logits, trace, plain)
    transformers.weights_differ = differ

    # the three generate the same text if, after every prefix of it, they choose the same token
    before = np.array(made) - 1
    chosen, rows = np.array(conversation)[before + 1], engine_logits[before]
    others = np.array([plain[before].argmax(axis=-1), greedy_choices(theirs, conversation, made)])
    lead = rows[np.arange(tokens), chosen] - rows[np.arange(tokens), others]
    difference = float(np.abs(engine_logits - their_logits).max())
    return Report(
        tokens=tokens,
        prompt_tokens=len(conversation) - tokens,
        engine=engine,
        transformers=transformers,
        max_logit_difference=difference,
        logit_range=float(np.ptp(their_logits)),
        argmax_agreement=_agreement(engine_logits, their_logits),
        greedy_equal=bool((others == chosen).all()),
        greedy_explained=bool(lead.max() <= 2 * difference),
    )


def converse(
    model: BitNetLM, prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[list[int], list[int]]:
    """The engine answers one prompt after another, greedily, until it has made `tokens` tokens.

    Returns the ids of the whole conversation, and the places in it of those that were made.
    InputError if the model's context can't hold it.
    """
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, not {tokens}")
    cache, ids, made = model.new_cache(), [], []
    for prompt in itertools.cycle(prompts):
        if len(made) == tokens:
            break
        new = ids[cache.length :] + [int(token) for token in prompt]
        try:
            answer = list(generate_ids(model, new, tokens - len(made), cache=cache))
        except ContextLengthError:
            raise InputError(
                f"only {len(made)} tokens, beside the prompts, fit into this model's context of "
                f"{cache.max_len}: ask for fewer than {tokens}"
            ) from None
        ids += prompt
        made += range(len(ids), len(ids) + len(answer))
        ids += answer
    return ids, made


def replay(
    reference: BitNetReference,
    ids: np.ndarray,
    program: str,
    logits: np.ndarray,
    trace: Trace,
    plain: np.ndarray,
) -> Comparison:
    """Run the reference on the program's int8 codes (`trace`), and note all that differs.

    logits: the program's, plain: the reference's own, both float32[T, vocab].
    """
    found = Comparison(program)
    found.max_logit_difference = float(np.abs(plain - logits).max())
    found.argmax_agreement = _agreement(plain, logits)
    inputs: dict[str, np.ndarray] = {}

    def see(name: str, array: np.ndarray) -> None:
        if name.endswith(".input"):
            inputs["last"] = array
        if name not in trace:
            return
        if name.endswith(".int8"):
            _note_flips(found, name, array, trace[name], inputs["last"])
            array[:] = trace[name]
        elif name.endswith(".codes"):
            array[:] = trace[name]
        elif name.endswith(".sums"):
            found.sums_differ += int((array != trace[name]).sum())
        else:
            found.rows.append(_row(name, array, trace[name]))

    replayed = reference.logits(ids, see)
    found.rows.append(_row("logits", replayed, logits))
    return found


def _note_flips(
    found: Comparison, name: str, ours: np.ndarray, theirs: np.ndarray, x: np.ndarray
) -> None:
    _, layer, matrix, _ = name.split(".")
    if matrix not in READERS or np.array_equal(ours, theirs):
        return
    unrounded = x.astype(np.float64) / absmax_int8(x)[1]
    for token, channel in np.argwhere(ours != theirs):
        at = token, channel
        codes = int(ours[at]), int(theirs[at])
        place = int(layer), READERS[matrix], int(token), int(channel)
        flip = Flip(found.program, *place, float(unrounded[at]), *codes)
        found.flip_count += 1
        found.unexplained += not flip.explained
        if len(found.flips) < LISTED:
            found.flips.append(flip)


def _row(name: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    return Row(name, float(np.abs(ours - theirs).max()), float(np.ptp(theirs)))


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())


def trace_engine(model: BitNetLM, ids: np.ndarray) -> tuple[np.ndarray, Trace]:
    """The engine's logits, float32[T, vocab], and what lies between its stages."""
    parts: dict[str, list[np.ndarray]] = {}

    def see(name: str, array: np.ndarray) -> None:
        if not name.endswith(".input"):
            parts.setdefault(name, []).append(array.copy())

    logits = model.logits(ids, see)
    return logits, {name: np.concatenate(tiles) for name, tiles in parts.items()}


def render(report: Report, layers: bool = False) -> "Group":
    """The report as tables for a terminal or a notebook (rich)."""
    from rich.console import Group
    from rich.table import Table

    table = Table("compared", "values", "max difference", "of the range", "bound", "", box=None)

    def add(what: str, values: str, difference: float, size: float, judged: bool = True) -> None:
        share = difference / size if size else float(difference > 0)
        verdict = "" if not judged else "ok" if share <= BOUND else "[bold red]too far[/]"
        bound = f"{BOUND:.0e}" if judged else "flips"
        table.add_row(what, values, f"{difference:.1e}", f"{share:.1e}", bound, verdict)

    flips = report.rounding_flips
    size = report.logit_range
    add("engine - transformers", "logits", report.max_logit_difference, size, not flips)
    for part in (report.engine, report.transformers):
        name = f"{part.program} - reference"
        add(name, "logits", part.max_logit_difference, size, not part.flip_count)
        rows = part.rows if layers else part.rows[-1:] if part.flip_count else []
        for row in rows:
            add(f"{name}, replayed", row.name, row.max_difference, row.range)
    positions = report.prompt_tokens + report.tokens - 1
    lines = [
        f"{positions} positions; engine and transformers prefer the same token in "
        f"{report.argmax_agreement:.1%} of them",
        f"{report.tokens} greedy tokens: "
        + ("the same in all three" if report.greedy_equal else "[bold red]not the same[/]"),
        f"{flips} rounding flips (an int8 code one step off, its unrounded value in the middle)",
    ]
    for flip in report.engine.flips + report.transformers.flips:
        lines.append(
            f"  {flip.program}, layer {flip.layer}, input of {flip.matrix}, token {flip.token}, "
            f"channel {flip.channel}: {flip.unrounded:.6f} -> {flip.reference} in the reference, "
            f"{flip.other} there" + ("" if flip.explained else " [bold red](not explained)[/]")
        )
    for part in (report.engine, report.transformers):
        if part.flip_count > len(part.flips):
            lines.append(f"  ... and {part.flip_count - len(part.flips)} more of {part.program}")
        if part.unexplained:
            lines.append(f"[bold red]{part.program}: {part.unexplained} codes differ for real[/]")
        if part.sums_differ:
            lines.append(f"[bold red]{part.program}: {part.sums_differ} integer sums differ[/]")
        if part.weights_differ:
            names = ", ".join(part.weights_differ[:5])
            lines.append(f"[bold red]{len(part.weights_differ)} matrices differ: {names}[/]")
    lines.append("[bold green]equal[/]" if report.ok else "[bold red]NOT equal[/]")
    return Group(table, *lines)


# --- transformers --------------------------------------------------------------------------------


def eager_torch() -> ModuleType:
    """torch, with torch.compile switched off: transformers compiles its BitNet functions, which
    would need a C++ compiler and could change the last bits."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")
    return torch


def _missing(error: ImportError) -> BitNetError:
    return BitNetError(
        f"the comparison needs transformers, torch and accelerate ({error}): "
        "pip install 'bitnet-edu[verify]'"
    )


def load_transformers(
    source: str | Path = "tiny", *, ternarize: bool = False
) -> "BitNetForCausalLM":
    """transformers' own model of a folder ("tiny", a path or a hub id), float32, eager attention.

    ternarize=True makes transformers ternarize dense weights too, as `bitnet_edu.load` does.
    Raises CheckpointError, DownloadError or, without torch and transformers, BitNetError.
    """
    torch = eager_torch()
    import transformers

    path = model_folder(source)
    config = transformers.BitNetConfig.from_pretrained(path)
    if ternarize and getattr(config, "quantization_config", None) is None:
        config.quantization_config = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        model = transformers.BitNetForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    except ImportError as error:
        raise _missing(error) from None
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
    # what it unpacks keeps the dtype of the file, and model.float() is refused when quantized
    torch.nn.Module.float(model)
    return model.eval()


def model_folder(source: str | Path) -> Path:
    """The folder of a model that transformers can read."""
    path = find_model(str(source))
    if not path.is_dir():
        raise InputError(
            f"transformers can't read {path}: make a folder of it first, with "
            f"`bitnet-edu convert {path} FOLDER --to hf-packed`"
        )
    return path


def prompts_of(model: BitNetLM) -> list[list[int]]:
    """Questions in the model's chat template, or random ids where it has no tokenizer."""
    if model.tokenizer is None:
        return [np.random.default_rng(0).integers(0, model.config.vocab_size, 16).tolist()]
    template = model.tokenizer.apply_chat_template
    first, *later = [template([{"role": "user", "content": text}]) for text in QUESTIONS]
    # a conversation has one start token, in front of all
    return [first, *(ids[ids[0] == model.config.bos_token_id :] for ids in later)]


def trace_transformers(model: "BitNetForCausalLM", ids: np.ndarray) -> tuple[np.ndarray, Trace]:
    """transformers' logits, float32[T, vocab], and what lies between its modules."""
    torch = eager_torch()
    from transformers.integrations.bitnet import BitLinear

    trace: Trace = {}

    def keep(name: str, tensor: Any) -> None:
        trace[name] = tensor[0].numpy().copy()

    def keep_codes(name: str):
        # the method quantizes as both of transformers' classes do, and uses no `self`
        return lambda _, args: keep(name, BitLinear.activation_quant(None, args[0])[0])

    def keep_input(name: str):
        return lambda _, args: keep(name, args[0])

    def keep_output(name: str):
        return lambda _, args, output: keep(name, output)

    body = model.model
    hooks = [
        body.embed_tokens.register_forward_hook(keep_output("embedding")),
        body.norm.register_forward_hook(keep_output("norm")),
    ]
    for index, layer in enumerate(body.layers):
        prefix = f"layers.{index}."
        middle, after = keep_input(f"{prefix}after_attention"), f"{prefix}after_feed_forward"
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(middle))
        hooks.append(layer.register_forward_hook(keep_output(after)))
        for name, path in MATRICES.items():
            codes = keep_codes(f"{prefix}{name}.int8")
            hooks.append(layer.get_submodule(path).register_forward_pre_hook(codes))
    try:
        with torch.no_grad():
            logits = model(torch.as_tensor(ids)[None], use_cache=False).logits[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, trace


def compare_weights(model: "BitNetForCausalLM", weights: Weights, trace: Trace) -> list[str]:
    """The matrices whose codes or scale transformers reads differently.

    Master weights are ternarized by both, and may flip like activations: such codes are no
    difference, but go into `trace`, for the replay to take over.
    """
    differ = []
    for index, (layer, ours) in enumerate(zip(model.model.layers, weights.layers, strict=True)):
        for name, path in MATRICES.items():
            packed, scale = getattr(ours, name)
            codes = unpack_hf(packed)
            theirs, their_scale, unrounded = _their_codes(layer.get_submodule(path))
            flips = codes != theirs
            if flips.any():
                trace[f"layers.{index}.{name}.codes"] = theirs
            explained = np.abs(np.abs(unrounded[flips]) - 0.5) <= BOUND
            if not explained.all() or not abs(their_scale - scale) <= BOUND * scale:
                differ.append(f"layers.{index}.{name}")
    return differ


def _their_codes(module: Any) -> tuple[np.ndarray, float, np.ndarray]:
    """transformers' ternary codes, the scale that multiplies, and the codes before rounding."""
    torch = eager_torch()
    from transformers.integrations.bitnet import BitLinear, WeightQuant, unpack_weights

    with torch.no_grad():
        if isinstance(module, BitLinear):
            codes = unpack_weights(module.weight, torch.float32)
            return codes.numpy().astype(np.int8), 1 / module.weight_scale.item(), codes.numpy()
        if module.online_quant:
            quantized = WeightQuant.apply(module.weight)
            scale = max(module.weight.abs().mean().item(), 1e-5)
            return quantized.sign().numpy().astype(np.int8), scale, module.weight.numpy() / scale
        codes = module.weight.numpy()
        return codes.astype(np.int8), module.weight_scale.item(), codes


def greedy_choices(
    model: "BitNetForCausalLM", ids: Sequence[int], places: Sequence[int]
) -> list[int]:
    """What transformers, with its own KV cache, would generate at these places of a text."""
    torch = eager_torch()
    choices, past, start = [], None, 0
    with torch.no_grad():
        for end in range(places[0], places[-1] + 1):
            new = torch.as_tensor(ids[start:end])[None]
            out = model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, start = out.past_key_values, end
            choices.append(int(out.logits[0, -1].argmax()))
    return [choices[place - places[0]] for place in places]
