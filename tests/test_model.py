"""The engine against the NumPy reference, and against itself on every way through it."""

import threading

import ml_dtypes
import numpy as np
import pytest

from bitnet_edu.errors import BitNetError, ContextLengthError, InputError
from bitnet_edu.kernels.attention import SPAN
from bitnet_edu.kernels.bits import has_float16
from bitnet_edu.kernels.head import Screen
from bitnet_edu.kernels.simd import supported_kernels
from bitnet_edu.model import BATCH, BitNet
from bitnet_edu.reference import BitNetReference
from bitnet_edu.weights import BitNetConfig, TernaryMatrix, random_weights


def config(vocab=96, hidden=64, ffn=100, layers=2, heads=4, kv_heads=2, context=640):
    return BitNetConfig(
        vocab, hidden, ffn, layers, heads, kv_heads, context, 500000.0, 1e-5, None, ()
    )


CONFIGS = {
    "grouped-query": config(),
    "multi-head": config(kv_heads=4),
    "multi-query": config(kv_heads=1),
    "odd sizes": config(vocab=301, hidden=120, ffn=68, layers=3, heads=10, kv_heads=5),
    "wide": config(hidden=256, ffn=680, heads=2, kv_heads=1),
}


def model_of(config, seed=0, dtype=ml_dtypes.bfloat16, tied=True):
    weights = random_weights(config, seed)
    embedding = weights.embedding.astype(dtype)
    head = embedding
    if not tied:
        noise = np.random.default_rng(seed + 1).standard_normal(head.shape)
        head = noise.astype(dtype)
    return BitNet(config, weights._replace(embedding=embedding, lm_head=head))


def ids_of(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


def difference(a, b):
    """Largest difference of logits as a share of their range."""
    return np.abs(a - b).max() / np.ptp(b)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_reference(name):
    """Tightly, but for the rare sequence in which an activation sits on a rounding boundary and one
    int8 step flips (design of BitNet, not an error): these stay few and small."""
    differences = []
    for seed in range(20):
        model = model_of(CONFIGS[name], seed)
        ids = ids_of(CONFIGS[name], 7, seed)
        expected = BitNetReference(model.config, model.weights).logits(ids)
        differences.append(difference(model.logits(ids), expected))
    assert np.median(differences) < 1e-6
    assert np.mean(np.array(differences) < 2e-6) >= 0.8
    assert max(differences) < 0.03


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_embedding_dtypes_and_untied_heads(dtype, tied):
    differences = []
    for seed in range(5):
        model = model_of(config(), seed, dtype, tied)
        ids = ids_of(model.config, 7, seed)
        expected = BitNetReference(model.config, model.weights).logits(ids)
        differences.append(difference(model.forward(ids, model.new_cache(8)), expected[-1]))
    assert np.median(differences) < 1e-6


@pytest.mark.parametrize("kernel", supported_kernels())
def test_cache_prefill_and_decode_give_the_same_rows(kernel):
    model = model_of(CONFIGS["odd sizes"])
    model.kernel = kernel
    ids = ids_of(model.config, 9)
    whole = model.logits(ids)
    cache = model.new_cache(9)
    rows = [model.forward(ids[:4], cache)] + [model.forward([token], cache) for token in ids[4:]]
    assert cache.length == 9
    assert difference(np.array(rows), whole[3:]) < 1e-6


def test_chunked_prefill_is_the_same_as_whole():
    """Also across the tiles that a long prompt is cut into, and the spans of attention."""
    model = model_of(config(context=2048), seed=3)
    ids = ids_of(model.config, SPAN + BATCH + 90)
    whole = model.forward(ids, model.new_cache(1400))
    for cuts in ([BATCH], [1, 2], [300, 301, 302], [SPAN, SPAN + 1], [len(ids) - 1]):
        cache = model.new_cache(1400)
        for part in np.split(ids, cuts):
            scores = model.forward(part, cache)
        assert difference(scores, whole) < 1e-6


def test_threads_do_not_change_a_bit():
    model = model_of(config(hidden=512, ffn=1536, heads=8, kv_heads=4, vocab=3000))
    ids = ids_of(model.config, 300)
    results = []
    for threads in (1, 2, 3):
        model.threads = threads
        cache = model.new_cache(310)
        results.append([model.forward(ids, cache), model.forward([5], cache)])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_calls_from_several_threads_take_turns():
    model = model_of(config())
    ids = ids_of(model.config, 30)
    expected = model.forward(ids, model.new_cache(30))
    results = [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = model.forward(ids, model.new_cache(30))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_truncate_forgets():
    model = model_of(config())
    cache = model.new_cache(20)
    first = model.forward([1, 2, 3], cache)
    model.forward([4, 5, 6], cache)
    cache.truncate(2)
    np.testing.assert_allclose(model.forward([3], cache), first, rtol=0, atol=1e-5 * np.ptp(first))
    with pytest.raises(InputError, match="cannot keep 9"):
        cache.truncate(9)


def test_half_precision_cache_is_close():
    if not has_float16():
        with pytest.raises(InputError, match="take a float32 KV cache"):
            model_of(config()).new_cache(10, np.float16)
        return
    model = model_of(config(context=1024))
    ids = ids_of(model.config, 600)
    exact = model.forward(ids, model.new_cache(600))
    half = model.new_cache(600, np.float16)
    assert half.keys.nbytes == model.new_cache(600).keys.nbytes // 2
    assert 0 < difference(model.forward(ids, half), exact) < 0.05
    with pytest.raises(InputError, match="float32 or float16"):
        model.new_cache(10, np.int8)


def test_what_does_not_fit_leaves_the_cache_alone():
    model = model_of(config())
    cache = model.new_cache(4)
    model.forward([1, 2], cache)
    keys = cache.keys.copy()
    with pytest.raises(ContextLengthError, match="3 tokens do not fit after 2 in a context of 4"):
        model.forward([1, 2, 3], cache)
    for bad in ([], [[1]], [1.5], [-1], [96]):
        with pytest.raises(InputError):
            model.forward(bad, cache)
    with pytest.raises(InputError, match="another model"):
        model.forward([1], model_of(config(layers=3)).new_cache(4))
    assert cache.length == 2
    np.testing.assert_array_equal(cache.keys, keys)
    with pytest.raises(ContextLengthError, match="1 to 640"):
        model.new_cache(641)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["embedding", "norm", *config().matrix_shapes])
def test_nan_and_inf_are_reported(value, where):
    model = model_of(config())
    weights = model.weights
    if where == "embedding":
        weights.embedding[7, 3] = value
        expected = r"layer 0, input norm"
    elif where == "norm":
        weights.layers[1].attn_sub_norm[0] = value
        expected = "layer 1, attention's SubLN"
    else:
        layer = weights.layers[1]
        matrix = TernaryMatrix(getattr(layer, where).packed, np.float32(value))
        weights = weights._replace(layers=(weights.layers[0], layer._replace(**{where: matrix})))
        expected = "layer 1" if where != "down_proj" else "last norm"
    model = BitNet(model.config, weights)
    cache = model.new_cache(8)
    with pytest.raises(BitNetError, match=f"NaN or Inf .*{expected}"):
        model.forward([1, 2, 7], cache)
    assert cache.length == 0


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("top_k", [1, 10])
def test_screened_head_finds_the_same_best_words_with_the_same_logits(dtype, top_k):
    model = model_of(config(vocab=2000, hidden=256, heads=4), dtype=dtype, tied=False)
    head = model.weights.lm_head
    head[50:90] = head[7]  # many near-equals that int8 cannot tell apart
    head[50:90, :3] += np.random.default_rng(1).normal(0, 0.02, (40, 3)).astype(dtype)
    head[90] = 0
    model = BitNet(model.config, model.weights)
    prompts = [ids_of(model.config, 5, seed) for seed in range(30)]
    exact = [model.forward(ids, model.new_cache(5)) for ids in prompts]
    model.screen_head(top_k)
    for ids, expected in zip(prompts, exact, strict=True):
        found = model.forward(ids, model.new_cache(5))
        best = np.argsort(-expected, kind="stable")[:top_k]
        np.testing.assert_array_equal(np.argsort(-found, kind="stable")[:top_k], best)
        np.testing.assert_array_equal(found[best], expected[best])
        assert 0 < difference(found, expected) < 0.02  # the others are a little off
    with pytest.raises(InputError, match="top_k"):
        model.screen_head(0)


def test_the_screen_bounds_its_error():
    rng = np.random.default_rng(0)
    head = rng.standard_cauchy((500, 130)).astype(np.float32)
    screen = Screen(head)
    for _ in range(20):
        x = (rng.standard_normal(130) * 10.0 ** rng.integers(-3, 4, 130)).astype(np.float32)
        exact = head.astype(np.float64) @ x.astype(np.float64)
        screened = screen.scales * (screen.codes.astype(np.float32) @ x)
        error = np.abs(exact - screened)
        assert (error <= screen.slack * np.linalg.norm(x.astype(np.float64))).all()
        logits = screened.copy()
        assert 1 <= screen.settle(logits, x, 1) < 500
        assert logits.argmax() == exact.argmax()
