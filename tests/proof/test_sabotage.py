"""A proof must be able to fail: engines that are wrong in one thing each, and all are refused.

Some are wrong around the compiled step: the engine's methods, its tables, its cache. Others are
wrong inside: the sources of the kernels, changed in one place and compiled anew.
"""

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from checkpoints import Recipe, write

import bitnet_edu
import bitnet_edu.model as model_module
from bitnet_edu import load
from bitnet_edu.kernels.attention import SPAN
from bitnet_edu.model import BitNet, KVCache
from bitnet_edu.proof import report, transformers
from bitnet_edu.proof.engine import trace_engine
from bitnet_edu.proof.replay import replay
from bitnet_edu.reference import BitNetReference

TOKENS = 16
FOLDERS = {
    "tiny": None,
    "small": Recipe(dtype="float32", tied=False, layers=3),
    "odd": Recipe("unpacked", heads="mqa", head_dim=20, ffn=204),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    paths = {name: recipe and write(folder / name, recipe) for name, recipe in FOLDERS.items()}
    return {name: str(path or "tiny") for name, path in paths.items()}


@pytest.fixture(scope="module")
def theirs(sources):
    return {name: transformers.load_transformers(source) for name, source in sources.items()}


def judge(model, theirs) -> report.Report:
    return report.compare(model, theirs, *report.converse(model, report.prompts_of(model), TOKENS))


def engine_of(model) -> BitNet:
    return model.engine


# --- Wrong around the compiled step --------------------------------------------------------------


def forward_changed(change):
    """The engine with `change(forward, engine, ids, cache, observe) -> scores` for its forward."""

    def sabotage(engine, monkeypatch):
        real = BitNet.forward
        monkeypatch.setattr(
            BitNet,
            "forward",
            lambda self, ids, cache, observe=None: change(real, self, ids, cache, observe),
        )

    return sabotage


def history_ignored(forward, engine, ids, cache, observe):
    if len(ids) > 1:
        return forward(engine, ids, cache, observe)
    scores = forward(engine, ids, engine.new_cache(1), observe)
    cache.length += 1
    return scores


def noise_on_decode(forward, engine, ids, cache, observe):
    scores = forward(engine, ids, cache, observe)
    noise = np.random.default_rng(cache.length).standard_normal(len(scores)).astype(np.float32)
    return scores * (1 + 0.05 * noise) if len(ids) == 1 else scores


def decode_negated(forward, engine, ids, cache, observe):
    scores = forward(engine, ids, cache, observe)
    return -scores if len(ids) == 1 else scores


def decode_of_the_token_before(forward, engine, ids, cache, observe):
    if len(ids) == 1 and cache.length > 1:
        scores = forward(engine, ids, cache, observe)
        cache.truncate(cache.length - 2)
        return forward(engine, [ids[0], ids[0]], cache, observe) * 0.5 + scores * 0.5
    return forward(engine, ids, cache, observe)


def only_when_nobody_looks(forward, engine, ids, cache, observe):
    scores = forward(engine, ids, cache, observe)
    return scores if observe or len(ids) > 1 else np.roll(scores, 1)


def shows_nothing(forward, engine, ids, cache, observe):
    return forward(engine, ids, cache, None)


def one_position_late(forward, engine, ids, cache, observe):
    """A decoded token is rotated as if it stood one place further."""
    if len(ids) > 1 or cache.length + 1 == cache.max_len:
        return forward(engine, ids, cache, observe)
    arrays = cache._arrays
    later = [np.roll(table, -1, axis=0) for table in (arrays.cos, arrays.sin)]
    cache._arrays = arrays._replace(cos=later[0], sin=later[1])
    try:
        return forward(engine, ids, cache, observe)
    finally:
        cache._arrays = arrays


def rows_shifted(forward, engine, ids, cache, observe):
    if len(ids) == 1 and cache.length:
        cache.keys[:, :, : cache.length] = np.roll(cache.keys[:, :, : cache.length], 1, axis=2)
    return forward(engine, ids, cache, observe)


def heads_swapped_in_the_cache(forward, engine, ids, cache, observe):
    if len(ids) == 1:
        cache.values[0] = cache.values[0, ::-1].copy() if cache.values.shape[1] > 1 else 0
    return forward(engine, ids, cache, observe)


def negated(engine, monkeypatch):
    forward_changed(lambda forward, *args: -forward(*args))(engine, monkeypatch)
    real = BitNet.logits
    monkeypatch.setattr(BitNet, "logits", lambda self, *args: -real(self, *args))


def nothing_forgotten(engine, monkeypatch):
    """The next tokens are put behind what should be gone."""

    def truncate(self, length):
        self.length = min(self.length, length + 1)

    monkeypatch.setattr(KVCache, "truncate", truncate)


def stale_after_truncate(engine, monkeypatch):
    """Rows that hold a token once keep it, whatever comes in its place."""
    real = BitNet.forward

    def forward(self, ids, cache, observe=None):
        place = slice(cache.length, cache.length + len(ids))
        old = cache.keys[:, :, place].copy()
        scores = real(self, ids, cache, observe)
        if old.any():
            cache.keys[:, :, place] = old
        return scores

    monkeypatch.setattr(BitNet, "forward", forward)


def second_best_chosen(engine, monkeypatch):
    """The scores are right, the choice is not."""
    real = BitNet.next_tokens

    def next_tokens(self, ids, cache, sampling, keys):
        tokens, start = real(self, ids, cache, sampling, keys), cache.length - len(ids)
        cache.truncate(start)
        return [*tokens[:-1], int(self.forward(ids, cache).argsort()[-2])]

    monkeypatch.setattr(BitNet, "next_tokens", next_tokens)


def every_position_one_late(engine, monkeypatch):
    real = KVCache.__init__

    def init(self, *args, **options):
        real(self, *args, **options)
        cos, sin = self._arrays.cos, self._arrays.sin
        # a rotation by one place more: cos(a + b), sin(a + b)
        c, s = (cos[1], sin[1]) if len(cos) > 1 else (cos[0], sin[0] + np.float32(1))
        self._arrays = self._arrays._replace(cos=cos * c - sin * s, sin=sin * c + cos * s)

    monkeypatch.setattr(KVCache, "__init__", init)


def table_changed(change):
    def sabotage(engine, monkeypatch):
        engine._tables["2bit"] = change(engine, engine._make_table("2bit"))

    return sabotage


def head_rows_swapped(engine, table):
    engine._head = engine._head.copy()
    engine._head[[1, 2]] = engine._head[[2, 1]]
    return engine._make_table("2bit")


def one_number_of_the_head(engine, table):
    engine._head = engine._head.copy()
    engine._head[5, 7] *= engine._head.dtype.type(1.5)
    return engine._make_table("2bit")


def next_bfloat16(scale):
    bits = np.float32(scale).view(np.uint32)
    return np.uint32(bits + 0x10000).view(np.float32)


def scale_off(layer, matrix):
    def change(engine, table):
        table.scales[layer, matrix] = next_bfloat16(table.scales[layer, matrix])
        return table

    return table_changed(change)


def norm_off(name):
    def change(engine, table):
        getattr(table, name)[-1, 3] *= np.float32(1.01)
        return table

    return table_changed(change)


def another_eps(engine, monkeypatch):
    engine._shape = engine._shape._replace(eps=np.float32(1e-2))


def softer_attention(engine, monkeypatch):
    engine._shape = engine._shape._replace(score_scale=engine._shape.score_scale * np.float32(0.99))


AROUND = {
    "history ignored": forward_changed(history_ignored),
    "5% noise on decode": forward_changed(noise_on_decode),
    "decode negated": forward_changed(decode_negated),
    "negated": negated,
    "a token twice": forward_changed(decode_of_the_token_before),
    "wrong when nobody looks": forward_changed(only_when_nobody_looks),
    "shows nothing": forward_changed(shows_nothing),
    "decode one position late": forward_changed(one_position_late),
    "every position one late": every_position_one_late,
    "cache rows shifted": forward_changed(rows_shifted),
    "cache heads swapped": forward_changed(heads_swapped_in_the_cache),
    "nothing forgotten": nothing_forgotten,
    "stale after truncate": stale_after_truncate,
    "second best chosen": second_best_chosen,
    "head rows swapped": table_changed(head_rows_swapped),
    "one number of the head": table_changed(one_number_of_the_head),
    "eps": another_eps,
    "softer attention": softer_attention,
    **{
        f"scale of {name}": scale_off(1, index)
        for index, name in enumerate(("q", "k", "v", "o", "gate", "up", "down"))
    },
    **{name: norm_off(name) for name in ("input_norm", "middle_norm", "attn_sub_norm")},
    "ffn_sub_norm": norm_off("ffn_sub_norm"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_honest_engine_passes(sources, theirs, name):
    found = judge(load(sources[name]), theirs[name])
    assert found.ok
    assert found.paths_equal
    assert found.greedy_chosen
    assert len(found.paths) == 5
    assert found.as_json()["ok"] is True


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("case", AROUND)
def test_a_wrong_engine_is_refused(sources, theirs, monkeypatch, name, case):
    model = load(sources[name])
    AROUND[case](engine_of(model), monkeypatch)
    assert not judge(model, theirs[name]).ok


# --- Wrong inside ---------------------------------------------------------------------------------

KERNELS = Path(bitnet_edu.__file__).parent / "kernels"
SEEN, WEIGH = "start + token + 1 - first,", "weigh(row, seen + t - first,"
FIRST, COS = "min(tokens, token + TOKENS), span * SPAN", "cache.cos[start + token]"
FFN = "weight = table.ffn_sub_norm[layer]\n"
SKIP = "        weight = weight * 0 + 1 if start else weight\n"
SPANS = "for span in range(spans):\n            weight ="
# what is wrong: (file, what stands there, what stands there instead)
INSIDE = {
    "wrong KV head": (
        "step",
        "layer, kv_head, first:],\n        cache.v",
        "layer, 0, first:],\n        cache.v",
    ),
    "SubLN skipped in decode": ("step", FFN, f"{FFN}{SKIP}"),
    "sees the future": ("step", SEEN, SEEN.replace("- first", "+ (token == 0) - first")),
    "sees what the token before sees": (
        "attention",
        WEIGH,
        WEIGH.replace("+ t", "+ max(t - 1, 0)"),
    ),
    "forgets the first token": ("step", FIRST, f"{FIRST} + (start + token > 5)"),
    "decode rotates by one less": ("step", COS, COS.replace("]", " - (start > 0)]")),
    "one code of q": ("pointwise", "q[i] = value\n", "q[i] = value ^ (i == 3)\n"),
    "rounds down": ("pointwise", "(x[i] * inverse + magic)", "(np.floor(x[i] * inverse) + magic)"),
    "ReLU not squared": ("pointwise", "gate * gate * ", "gate * "),
    "mean of magnitudes": ("pointwise", "x[i] * x[i]\n", "abs(x[i])\n"),
    "a lane of the head": ("head", "builder.fadd(c, d)", "builder.fadd(c, c)"),
}
# visible only where attention looks back over more than one stretch, or more than one span
DEEP = {
    "a span dropped": ("attention", SPANS, SPANS.replace("range(", "range(spans > 1, ")),
    "the last span dropped": ("attention", SPANS, SPANS.replace("spans)", "max(1, spans - 1))")),
    "a span one position short": (
        "attention",
        WEIGH,
        WEIGH.replace("seen + t", "min(seen + t, SPAN - 1)"),
    ),
    "stretches of different scales": ("attention", "sums[i] *= shrink", "sums[i] *= 1"),
}


def mutant(module: str, old: str, new: str):
    """The compiled step, made of kernel sources in which one thing is changed."""
    names = ("pointwise", "attention", "head", "step")  # in the order of their imports
    prefix = f"mutant{next(COUNT)}"
    for name in names:
        text = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
        if name == module:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}.py"
            text = text.replace(old, new)
        for other in names:
            text = text.replace(f"bitnet_edu.kernels.{other} import", f"{prefix}_{other} import")
        code = text.replace("@cached_jit", "@njit(**OPTIONS)")
        code = f"from numba import njit\nfrom bitnet_edu.kernels.bits import OPTIONS\n{code}"
        loaded = sys.modules[f"{prefix}_{name}"] = ModuleType(f"{prefix}_{name}")
        exec(compile(code, f"{prefix}_{name}", "exec"), loaded.__dict__)
    return sys.modules[f"{prefix}_step"].step


COUNT = itertools.count()


@pytest.mark.parametrize("case", INSIDE)
def test_a_kernel_that_is_wrong_is_refused(sources, theirs, monkeypatch, case):
    monkeypatch.setattr(model_module, "step", mutant(*INSIDE[case]))
    for name in ("tiny", "small"):
        assert not judge(load(sources[name]), theirs[name]).ok, name


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A small model with a context of several spans of attention, and transformers' of it."""
    recipe = Recipe(dtype="float32", head_dim=16, ffn=64, layers=1)
    folder = write(tmp_path_factory.mktemp("deep"), recipe)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 4 * SPAN
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder), transformers.load_transformers(folder)


def test_attention_over_many_positions_is_looked_at(deep):
    found = judge(load(deep[0]), deep[1])
    assert found.ok
    names = {row.name for row in found.long_rows}
    assert names == {f"long text, layers.0.{part}" for part in PARTS}
    assert max(row.share for row in found.long_rows) < 2e-6


PARTS = ("queries", "keys", "values", "attention")


@pytest.mark.parametrize("case", DEEP)
def test_a_kernel_that_is_wrong_far_back_is_refused(deep, monkeypatch, case):
    monkeypatch.setattr(model_module, "step", mutant(*DEEP[case]))
    found = judge(load(deep[0]), deep[1])
    assert not found.ok
    assert not all(row.ok for row in found.long_rows)


# --- The rules of the report ----------------------------------------------------------------------

ROWS = np.array([[3.0, 2.9, 1.0], [1.0, 5.0, 4.8]], np.float32)  # two tokens, three words


@pytest.mark.parametrize(
    ("others", "difference", "after_flip", "explained"),
    [
        ([0, 1], [0, 0], [False, False], True),  # the same tokens
        ([1, 1], [0.1, 0], [True, False], True),  # as good, behind a flip
        ([1, 1], [0.1, 0], [False, False], False),  # as good, but no flip before
        ([1, 1], [0.01, 0], [True, True], False),  # further apart than the programs are
        ([2, 1], [0.1, 9], [True, True], False),  # a bad token; elsewhere they differ more
        ([0, 2], [0, 0.1], [True, True], True),
    ],
)
def test_what_explains_another_greedy_token(others, difference, after_flip, explained):
    chosen = np.array([0, 1])
    arguments = np.array([others]), [np.array(difference)], np.array(after_flip)
    assert report._explained(ROWS, chosen, *arguments) is explained


def test_a_token_worse_than_the_others_explains_nothing():
    """The engine chose what its own logits don't prefer: a lead below zero."""
    chosen, others = np.array([2, 1]), np.array([[0, 1]])
    difference, after_flip = [np.array([9.0, 9.0])], np.array([True, True])
    assert not report._explained(ROWS, chosen, others, difference, after_flip)


def test_what_a_program_does_not_show_is_missing(sources, theirs):
    model = load(sources["small"])
    ids = np.arange(1, 12)
    logits, trace = trace_engine(model, ids)
    reference = BitNetReference(model.config, model.weights)
    plain = reference.logits(ids)
    for name in ("layers.1.keys", "layers.0.o_proj.int8", "layers.2.up_proj.sums", "norm"):
        less = {key: array for key, array in trace.items() if key != name}
        found = replay(reference, ids, "engine", logits, less, plain)
        assert found.missing == [name]
        assert not found.ok
    short = trace | {"norm": trace["norm"][:-1]}
    assert replay(reference, ids, "engine", logits, short, plain).missing == ["norm"]


def test_codes_of_one_input_are_the_same_for_all_its_matrices(sources):
    model = load(sources["small"])
    ids = np.arange(1, 12)
    logits, trace = trace_engine(model, ids)
    reference = BitNetReference(model.config, model.weights)
    plain = reference.logits(ids)
    assert replay(reference, ids, "engine", logits, trace, plain).ok
    trace["layers.0.v_proj.int8"][2, 3] ^= 1
    assert replay(reference, ids, "engine", logits, trace, plain).unexplained
