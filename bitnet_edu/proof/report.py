"""`verify`: the engine, the NumPy reference and transformers on the same tokens."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_edu.errors import ContextLengthError, InputError
from bitnet_edu.generate import BitNetLM, generate_ids
from bitnet_edu.load import load
from bitnet_edu.proof.engine import Path, long_attention, other_paths, trace_engine
from bitnet_edu.proof.replay import BOUND, Comparison, Row, agreement, replay
from bitnet_edu.proof.transformers import (
    UNSEEN,
    compare_weights,
    greedy_choices,
    load_transformers,
    model_folder,
    trace_transformers,
)
from bitnet_edu.reference import BitNetReference

if TYPE_CHECKING:
    from rich.console import Group
    from transformers import BitNetForCausalLM

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


@dataclass
class Report:
    """What `verify` found. `ok` is strict: see `as_json` for what each part holds."""

    tokens: int  # generated greedily, after the prompt
    prompt_tokens: int
    engine: Comparison
    transformers: Comparison
    paths: list[Path]  # other ways through the engine, equal to the bit
    long_rows: list[Row]  # rotation and attention over many positions
    max_logit_difference: float  # between engine and transformers
    early_logit_difference: float  # the same, over the tokens before the first flip
    logit_range: float
    argmax_agreement: float  # share of positions where these two prefer the same token
    greedy_chosen: bool  # the engine generated what its own logits prefer
    greedy_equal: bool  # and so would the other two
    greedy_explained: bool  # or they part behind a flip, where the two tokens are as good

    @property
    def rounding_flips(self) -> int:
        return self.engine.flip_count + self.transformers.flip_count

    @property
    def paths_equal(self) -> bool:
        return not any(path.differ for path in self.paths)

    @property
    def ok(self) -> bool:
        greedy = self.greedy_chosen and (self.greedy_equal or self.greedy_explained)
        parts = self.engine.ok and self.transformers.ok and self.paths_equal
        close = self.early_logit_difference <= BOUND * self.logit_range
        return bool(parts and greedy and close and all(row.ok for row in self.long_rows))

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
                "missing": comparison.missing,
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
            "paths_equal": self.paths_equal,
            "paths": [path._asdict() for path in self.paths],
            "long_text": [row._asdict() for row in self.long_rows],
            "flips": [flip._asdict() | {"explained": flip.explained} for flip in flips],
            "engine": part(self.engine),
            "transformers": part(self.transformers),
        }


def verify(
    source: str = "tiny",
    tokens: int = 200,
    *,
    ternarize: bool = False,
    packing: str = "auto",
    head: str = "auto",
) -> Report:
    """Compare all three programs in a conversation with `tokens` greedily generated tokens.

    packing, head: how the engine works, as in `model.Settings`. Raises CheckpointError,
    DownloadError or InputError where there is nothing to compare.
    """
    path = model_folder(source)
    model = load(str(path), ternarize=ternarize)
    model.settings = replace(model.settings, packing=packing, head=head)
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
    paths = other_paths(model, ids, made, engine_logits, trace)
    engine = replay(reference, ids, "engine", engine_logits, trace, plain)
    their_logits, trace = trace_transformers(theirs, ids)
    differ = compare_weights(theirs, model.weights, trace)
    transformers = replay(reference, ids, "transformers", their_logits, trace, plain, UNSEEN)
    transformers.weights_differ = differ

    difference = np.abs(engine_logits - their_logits).max(axis=-1)
    flips = [part.first_flip for part in (engine, transformers) if part.first_flip is not None]
    first_flip = min(flips, default=len(ids))
    before = np.array(made) - 1
    chosen = np.array(conversation)[before + 1]
    others = np.array([plain[before].argmax(axis=-1), greedy_choices(theirs, conversation, made)])
    difference_to = [np.abs(engine_logits - plain).max(axis=-1)[before], difference[before]]
    return Report(
        tokens=tokens,
        prompt_tokens=len(conversation) - tokens,
        engine=engine,
        transformers=transformers,
        paths=paths,
        long_rows=long_attention(model),
        max_logit_difference=float(difference.max()),
        early_logit_difference=float(difference[:first_flip].max(initial=0)),
        logit_range=float(np.ptp(their_logits)),
        argmax_agreement=agreement(engine_logits, their_logits),
        greedy_chosen=bool((engine_logits[before].argmax(axis=-1) == chosen).all()),
        greedy_equal=bool((others == chosen).all()),
        greedy_explained=_explained(
            engine_logits[before], chosen, others, difference_to, before >= first_flip
        ),
    )


def _explained(
    rows: np.ndarray,
    chosen: np.ndarray,
    others: np.ndarray,
    difference: Sequence[np.ndarray],
    after_flip: np.ndarray,
) -> bool:
    """Whether flips account for every place where another program prefers another token.

    There must be one before it, and of the two tokens the engine's own must lead, by no more than
    two logits together differ between the programs at that place. rows: float32[tokens, vocab], the
    engine's logits; others: int[programs, tokens].
    """
    places = np.arange(len(chosen))
    for other, most in zip(others, difference, strict=True):
        lead = rows[places, chosen] - rows[places, other]
        fine = (other == chosen) | (after_flip & (lead >= 0) & (lead <= 2 * most))
        if not fine.all():
            return False
    return True


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
        last = part.rows[-1:] if part.flip_count else []
        rows = part.rows if layers else [r for r in part.rows[:-1] if not r.ok] + last
        for row in rows:
            add(f"{name}, replayed", row.name, row.max_difference, row.range)
    for row in report.long_rows if layers else [r for r in report.long_rows if not r.ok]:
        add("engine - layers", row.name, row.max_difference, row.range)
    positions = report.prompt_tokens + report.tokens - 1
    lines = [
        f"{len(report.paths)} ways through the engine (prefill, decode, truncate, threads): "
        + ("the same to the bit" if report.paths_equal else "[bold red]not the same[/]"),
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
    for path in report.paths:
        if path.differ:
            places = "; ".join(path.differ[:3])
            lines.append(f"[bold red]{path.name}: {len(path.differ)} differences ({places})[/]")
    if not report.greedy_chosen:
        lines.append("[bold red]the engine generated tokens that its own logits don't prefer[/]")
    for part in (report.engine, report.transformers):
        if part.flip_count > len(part.flips):
            lines.append(f"  ... and {part.flip_count - len(part.flips)} more of {part.program}")
        if part.unexplained:
            lines.append(f"[bold red]{part.program}: {part.unexplained} codes differ for real[/]")
        if part.sums_differ:
            lines.append(f"[bold red]{part.program}: {part.sums_differ} integer sums differ[/]")
        if part.missing:
            lines.append(f"[bold red]{part.program} does not show {', '.join(part.missing[:5])}[/]")
        if part.weights_differ:
            names = ", ".join(part.weights_differ[:5])
            lines.append(f"[bold red]{len(part.weights_differ)} matrices differ: {names}[/]")
    lines.append("[bold green]equal[/]" if report.ok else "[bold red]NOT equal[/]")
    return Group(table, *lines)


def prompts_of(model: BitNetLM) -> list[list[int]]:
    """Questions in the model's chat template, or random ids where it has no tokenizer."""
    if model.tokenizer is None:
        return [np.random.default_rng(0).integers(0, model.config.vocab_size, 16).tolist()]
    template = model.tokenizer.apply_chat_template
    first, *later = [template([{"role": "user", "content": text}]) for text in QUESTIONS]
    # a conversation has one start token, in front of all
    return [first, *(ids[ids[0] == model.config.bos_token_id :] for ids in later)]
