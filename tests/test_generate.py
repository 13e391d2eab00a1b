"""Options, streams, stops and limits. How a token is chosen: test_sampling.py."""

import numpy as np
import pytest
from checkpoints import VOCABULARY, Recipe, write
from hypothesis import given
from hypothesis import strategies as st

from bitnet_edu import ContextLengthError, InputError, load
from bitnet_edu.generate import BitNetLM, generate_ids, until
from bitnet_edu.model import BATCH, BitNet, Settings

PROMPT = [0, 70, 80, 90]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(write(tmp_path_factory.mktemp("model"), Recipe())))


@pytest.fixture(scope="module")
def greedy(model):
    """A long greedy text with no end token in force."""
    return model.generate(PROMPT, max_new_tokens=60, stop=())


BAD_OPTIONS = [
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": "0.5"},
    {"temperature": True},
    {"temperature": None},
    {"top_k": 0},
    {"top_k": 2.0},
    {"top_k": "3"},
    {"top_k": True},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_p": float("nan")},
    {"top_p": "0.9"},
    {"seed": -1},
    {"seed": 2**64},
    {"seed": 1.0},
    {"seed": "1"},
    {"seed": [1, 2]},
    {"max_new_tokens": 0},
    {"max_new_tokens": 2.5},
    {"max_new_tokens": "9"},
    {"max_new_tokens": None},
    {"max_new_tokens": True},
    {"stop": ""},
    {"stop": b"x"},
    {"stop": 1.5},
    {"stop": True},
    {"stop": -1},
    {"stop": VOCABULARY},
    {"stop": [None]},
    {"stop": [b"x"]},
    {"stop": [0.5]},
    {"stop": {"x": 1}},
    {"progress": 5},
]


def refuse_work(model, monkeypatch):
    def work(*_):
        raise AssertionError("work was done")

    monkeypatch.setattr(model, "prefill", work)
    monkeypatch.setattr(model, "next_tokens", work)


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options_are_refused_by_name_before_any_work(model, monkeypatch, options):
    refuse_work(model, monkeypatch)
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=next(iter(options))):
            call(PROMPT, **options)  # not iterated: a generator must refuse at once, too


@pytest.mark.parametrize("options", [{"made": ()}, {"stopp": 1}, {"top_k": 5, "topk": 5}], ids=str)
def test_what_is_no_option_is_no_option(model, options):
    with pytest.raises((InputError, TypeError), match=r"made|unexpected keyword"):
        model.stream(PROMPT, **options)


def test_numpy_numbers_are_numbers(model):
    options = {"temperature": np.float32(5), "top_k": np.int64(9), "seed": np.uint64(3)}
    expected = model.generate(PROMPT, 8, temperature=5.0, top_k=9, seed=3, stop=())
    assert model.generate(PROMPT, np.int32(8), stop=(), **options) == expected
    assert model.generate(np.array(PROMPT, np.uint8), 8, stop=[np.int64(VOCABULARY - 1)])
    assert model.generate(tuple(PROMPT), 1) == model.generate(np.array(PROMPT), 1)


# Generation


def test_greedy_tokens_are_the_best_of_each_whole_forward(model, greedy):
    scores = model.logits(np.array(PROMPT + greedy[:-1]))[len(PROMPT) - 1 :]
    assert scores.argmax(axis=1).tolist() == greedy


def test_a_seed_repeats_and_another_differs(model):
    def text(seed: int | None) -> list[int]:
        return model.generate(PROMPT, max_new_tokens=30, temperature=100.0, seed=seed, stop=())

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


def test_an_end_token_ends_and_is_returned(model, greedy):
    at = 7
    end = greedy[at]
    expected = greedy[: greedy.index(end) + 1]
    assert model.generate(PROMPT, max_new_tokens=60, stop=[end]) == expected
    assert model.generate(PROMPT, max_new_tokens=60, stop=end) == expected
    assert list(generate_ids(model, PROMPT, 60, stop={end})) == expected


def test_the_end_tokens_of_the_model_are_the_default(model, greedy):
    end = greedy[5]
    config = model.config._replace(eos_token_ids=(end,))
    other = BitNetLM(config, model.weights, model.tokenizer)
    expected = greedy[: greedy.index(end) + 1]
    assert other.generate(PROMPT, max_new_tokens=60) == expected
    # strings come on top of the end tokens, token ids take their place
    assert other.generate(PROMPT, max_new_tokens=60, stop=["\0never\0"]) == expected
    unused = next(token for token in range(VOCABULARY) if token not in greedy)
    assert other.generate(PROMPT, max_new_tokens=60, stop=[unused]) == greedy


def test_eot_ends_a_turn_even_where_config_names_another_end(tmp_path):
    model = load(str(write(tmp_path)))
    assert model.config.eos_token_ids == (1, 2)


def test_the_stream_is_the_text_of_the_tokens(model, greedy):
    text = model.tokenizer.decode(greedy)
    made = []
    assert "".join(model.stream(PROMPT, max_new_tokens=60, stop=(), made=made)) == text
    assert made == greedy


def test_messages_are_prompted_by_the_chat_template(model):
    messages = [{"role": "user", "content": "Hello"}]
    ids = model.tokenizer.apply_chat_template(messages)
    expected = "".join(model.stream(ids, max_new_tokens=20))
    assert "".join(model.stream(messages, max_new_tokens=20)) == expected


def test_a_stop_string_ends_the_text_before_it_is_shown(model, greedy):
    text = model.tokenizer.decode(greedy)
    for length in (1, 3, 6):
        stop = text[20 : 20 + length]
        pieces = list(model.stream(PROMPT, max_new_tokens=60, stop=["\0no\0", stop]))
        assert "".join(pieces) == text[: text.index(stop)]
        ids = model.generate(PROMPT, max_new_tokens=60, stop=stop)
        assert ids == greedy[: len(ids)]
        assert stop in model.tokenizer.decode(ids)
        assert stop not in model.tokenizer.decode(ids[:-1])


@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_until_passes_all_text_before_the_first_stop(pieces, strings):
    text = "".join(pieces)
    passed = list(until(iter(pieces), strings))
    # the first to be complete ends the text; of those complete at once, the first to begin
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in strings)]
    if not ends:
        assert "".join(passed) == text
    else:
        assert text.startswith("".join(passed))
        assert not any(s in "".join(passed) for s in strings)
        rest = text[len("".join(passed)) :]
        assert any(rest.startswith(s) for s in strings)
    assert "" not in passed


def test_until_keeps_back_only_what_may_become_a_stop():
    sent = iter(["ab", "c", "d", "x"])
    passing = until(sent, ["cde"])
    assert next(passing) == "ab"
    assert next(passing) == "cdx"


def test_closing_the_stream_stops_the_work(model):
    made = []
    pieces = model.stream(PROMPT, max_new_tokens=60, stop=(), made=made)
    next(pieces)
    count = len(made)
    pieces.close()
    assert len(made) == count < 60


# Limits


def test_generation_ends_where_the_context_ends(tmp_path):
    model = load(str(write(tmp_path, Recipe())))
    longest = model.config.max_position_embeddings
    ids = model.generate([5] * (longest - 3), max_new_tokens=50, stop=())
    assert len(ids) == 4  # three that fit, and the one that the full context predicts
    with pytest.raises(ContextLengthError, match=str(longest)):
        model.generate([5] * (longest + 1))


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([], {}, "non-empty"),
        ([VOCABULARY], {}, str(VOCABULARY)),
        ([-1], {}, "-1"),
        ([2**70], {}, str(2**70)),
        ([1.5], {}, "integers"),
        (np.array([1.0]), {}, "integers"),
        (np.array([[1]]), {}, "integers"),
        (np.array([True]), {}, "integers"),
        ([True], {}, "integers"),
        ([[1], [2, 3]], {}, "integers"),
        (["1"], {}, "integers|role"),
        ("abc", {}, "integers"),
        (b"abc", {}, "integers"),
        (None, {}, "integers"),
        ({1: 2}, {}, "integers"),
        (5, {}, "integers"),
    ],
)
def test_prompts_that_cannot_be_right(model, monkeypatch, ids, options, words):
    refuse_work(model, monkeypatch)
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=words):
            call(ids, **options)


def test_a_prompt_is_read_tile_by_tile_and_can_be_stopped_between_them():
    model = load("tiny")
    ids = [5 + n % 900 for n in range(BATCH + 7)]
    seen = []
    made = model.generate(ids, 3, stop=(), progress=lambda *said: seen.append(said))
    assert seen == [(0, len(ids)), (BATCH, len(ids))]
    assert made[0] == model.logits(ids)[-1].argmax()

    class Stopped(Exception):
        pass

    def stop(read: int, _: int) -> None:
        if read:
            raise Stopped

    cache = model.new_cache(300)
    with pytest.raises(Stopped):
        list(generate_ids(model, ids, 3, cache=cache, progress=stop))
    assert cache.length == BATCH


def test_the_model_has_an_engine_whose_settings_it_shows():
    model = load("tiny")
    assert not isinstance(model, BitNet)
    assert model.engine.weights is model.weights
    model.threads = 2
    assert model.engine.threads == model.settings.threads == 2
    model.settings = Settings(threads=1, kernel=model.kernel)
    assert model.engine.threads == 1
    model.kernel = "portable"
    assert model.engine.kernel == "portable"
    cache = model.new_cache(4)
    np.testing.assert_array_equal(model.forward(PROMPT, cache), model.engine.logits(PROMPT)[-1])
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    made = model.generate(PROMPT, 12, **options)
    model.settings = Settings(head="screened")
    assert model.generate(PROMPT, 12, **options) == made
    assert model.engine.screened == len(made)


def test_a_model_without_a_tokenizer_works_with_ids_alone(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    model = load(str(tmp_path))
    assert model.tokenizer is None
    assert len(model.generate(PROMPT, max_new_tokens=3, stop=())) == 3
    for attempt in (
        lambda: model.generate(PROMPT, stop="x"),
        lambda: list(model.stream(PROMPT)),
        lambda: list(model.stream([{"role": "user", "content": "x"}])),
    ):
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            attempt()
