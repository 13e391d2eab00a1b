"""Guessing ahead changes the number of steps and nothing else: tokens, cache, ends and errors."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import VOCABULARY, Recipe, make, save, write, write_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from bitnet_edu import BitNetError, ChatSession, InputError, load
from bitnet_edu.generate import BitNetLM, generate_ids
from bitnet_edu.guess import LONGEST, NGRAMS, Guesser
from bitnet_edu.sampling import GREEDY, Sampling, sample

PROMPT = [0, 70, 80, 90]
SAMPLINGS = [GREEDY, Sampling(0.6, top_p=0.9, seed=1), Sampling(1.0, 5, seed=2), Sampling(1.5)]
RECIPES = [Recipe(), Recipe(heads="mqa", tied=False, layers=3), Recipe("divide", "float32")]


@pytest.fixture(scope="module", params=["tiny", *RECIPES], ids=str)
def model(request, tmp_path_factory):
    if request.param == "tiny":
        return load("tiny")
    return load(str(write(tmp_path_factory.mktemp("model"), request.param)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that says the same twelve tokens over and over; at a temperature it changes tune."""
    config, tensors = make(Recipe(tied=False))
    head, token = tensors["lm_head.weight"], np.arange(VOCABULARY)
    after = np.where(token % 12 == 11, token - 11, token + 1)
    head[np.minimum(after, VOCABULARY - 1)] = tensors["model.embed_tokens.weight"]
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensor /= 8  # so that the last token counts most
    folder = save(tmp_path_factory.mktemp("small"), config, tensors)
    return load(str(write_tokenizer(folder)))


@pytest.fixture(scope="module")
def loop(small):
    """A prompt that ends where the model has begun to repeat itself."""
    made = small.generate(PROMPT, 60, stop=(), guess=False)
    assert made[-12:] == made[-24:-12]
    assert len(set(made[-12:])) == 12
    return PROMPT + made


def one_by_one(model, ids, count, sampling):
    """What generation is: a token a step, each with the next random number of the seed."""
    cache, keys, made = model.new_cache(), np.random.default_rng(sampling.seed), []
    scores = model.forward(ids, cache)
    for _ in range(count):
        key = int(keys.integers(0, 2**64, 1, np.uint64)[0])
        made.append(sample(scores, key, sampling))
        scores = model.forward(made[-1:], cache)
    return made


class Copier:
    """An engine that says a given text, whatever it is told, and keeps what it was fed."""

    def __init__(self, model, text):
        self.config, self.new_cache, self.text, self.fed = model.config, model.new_cache, text, []

    def next_tokens(self, ids, cache, sampling, keys):
        self.fed.append(list(ids))
        cache.length += len(ids)
        return self.text[cache.length + 1 - len(keys) : cache.length + 1]


# The same tokens


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_are_those_of_one_step_at_a_time(model, sampling, threads):
    seeded = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed or 3)
    model.threads, guesser = threads, Guesser()
    ids = PROMPT + [5 + n % 7 for n in range(40)]
    made = list(generate_ids(model, ids, 200, seeded, stop=(), guess=guesser))
    assert made == one_by_one(model, ids, 200, seeded)
    assert made == list(generate_ids(model, ids, 200, seeded, stop=(), guess=False))


def test_several_guesses_are_right_at_once_and_seeds_stay_in_step(small, loop):
    """At this temperature the loop is left now and then: guesses are right, and wrong, too."""
    seen = Counter()
    for seed in range(6):
        sampling, guesser = Sampling(7.0, seed=seed), Guesser()
        made = list(generate_ids(small, loop, 120, sampling, stop=(), guess=guesser))
        assert made == one_by_one(small, loop, 120, sampling)
        seen.update(guesser.counts())
    assert seen["accepted_tokens"] > 200
    assert seen["guessed_tokens"] - seen["accepted_tokens"] > 20


def test_what_is_said_again_takes_far_fewer_steps(small, loop):
    guesser = Guesser()
    made = small.generate(loop, 300, stop=(), guess=guesser)
    assert made == small.generate(loop, 300, stop=(), guess=False)
    assert guesser.steps < len(made) / 4
    assert guesser.steps + guesser.accepted == len(made)


def test_a_copied_passage_is_guessed_once_it_is_recognized(small):
    rng = np.random.default_rng(0)
    passage, between = rng.integers(3, 290, (2, 100)).tolist()
    text = [*passage, *between, *passage]
    engine, guesser = Copier(small, text), Guesser()
    made = list(generate_ids(engine, text[:200], 100, stop=(), guess=guesser))
    assert made == passage
    assert guesser.guessed == guesser.accepted
    assert guesser.steps == len(engine.fed) < 20


def test_an_adversary_who_makes_every_guess_wrong_costs_little(small):
    class Adversary(Copier):
        def next_tokens(self, ids, cache, sampling, keys):
            self.fed.append(list(ids))
            cache.length += len(ids)
            return [1 - token for token in ids[-len(keys) :][1:]] + [int(keys[-1]) % 2]

    engine, guesser = Adversary(small, []), Guesser()
    made = list(generate_ids(engine, [0, 1], 500, Sampling(seed=0), stop=(), guess=guesser))
    assert len(made) == guesser.steps == 500
    assert guesser.accepted == 0
    assert 501 + 10 < sum(map(len, engine.fed)) <= 501 + 4 + 500 / 32  # it was tempted, and bounded


def test_a_screened_head_chooses_the_same_several_at_a_time(small, loop):
    model = BitNetLM(small.config, small.weights, small.tokenizer)
    model.settings = replace(model.settings, head="screened")
    ways = (GREEDY, Sampling(9.0, 3), Sampling(7.0, None, 0.01), Sampling(0.1))
    for sampling in ways:
        sampling = replace(sampling, seed=4)
        guesser = Guesser()
        made = list(generate_ids(model, loop, 120, sampling, stop=(), guess=guesser))
        assert made == list(generate_ids(model, loop, 120, sampling, stop=(), guess=False))
        assert made == list(generate_ids(small, loop, 120, sampling, stop=(), guess=False))
        assert guesser.accepted > 0
    assert model.engine.screened > model.engine.whole_heads


# The same ends, the same cache


def test_whenever_a_token_comes_the_cache_is_as_without_guesses(small, loop):
    caches = [small.new_cache() for _ in range(2)]
    runs = [
        generate_ids(small, loop, 100, stop=(), cache=cache, guess=guess)
        for cache, guess in zip(caches, (True, False), strict=True)
    ]
    for i, (one, other) in enumerate(zip(*runs, strict=True)):
        assert one == other
        assert caches[0].length == caches[1].length == len(loop) + i
        for numbers in ("keys", "values"):
            a, b = (getattr(cache, numbers)[:, :, : cache.length] for cache in caches)
            np.testing.assert_array_equal(a, b)
    assert caches[0].length == caches[1].length == len(loop) + 99


def test_a_stop_token_ends_the_text_inside_a_guess(small, loop):
    whole = small.generate(loop, 100, stop=(), guess=False)
    within = 0
    for stop in set(whole):
        cache, guesser = small.new_cache(), Guesser()
        made = list(generate_ids(small, loop, 100, stop={stop}, cache=cache, guess=guesser))
        assert made == whole[: whole.index(stop) + 1]
        assert cache.length == len(loop) + len(made) - 1
        within += guesser.steps + guesser.accepted > len(made)
    assert within


@pytest.mark.parametrize("limit", ["max_new_tokens", "cache"])
def test_the_last_token_is_the_same_wherever_the_limit_lies(small, loop, limit):
    whole = small.generate(loop, 60, stop=(), guess=False)
    for count in range(1, 40):
        most, room = (count, 60) if limit == "max_new_tokens" else (60, count - 1)
        cache = small.new_cache(len(loop) + room)
        assert list(generate_ids(small, loop, most, stop=(), cache=cache)) == whole[:count]
        assert cache.length == len(loop) + count - 1


def test_a_stop_string_ends_the_text_at_the_same_place(small, loop):
    text = small.tokenizer.decode(small.generate(loop, 60, stop=(), guess=False))
    for at in range(0, len(text) - 3, 5):
        pieces = [
            list(small.stream(loop, 60, stop=text[at : at + 3], guess=g)) for g in (True, False)
        ]
        assert pieces[0] == pieces[1]


def test_closing_at_any_token_leaves_the_cache_as_without_guesses(small, loop):
    for count in range(1, 30):
        cache = small.new_cache()
        tokens = generate_ids(small, loop, 60, stop=(), cache=cache)
        made = [next(tokens) for _ in range(count)]
        tokens.close()
        assert cache.length == len(loop) + count - 1
        more = list(generate_ids(small, made[-1:], 10, stop=(), cache=cache))
        assert made + more == small.generate(loop, count + 10, stop=(), guess=False)


# The same errors


class Failing(BitNetLM):
    """Fails once it is fed more than `limit` tokens in all, before or after the cache has grown."""

    limit, late, error = 0, False, BitNetError

    def next_tokens(self, ids, cache, sampling, keys):
        fails = cache.length + len(ids) > self.limit
        if not fails or self.late:
            chosen = super().next_tokens(ids, cache, sampling, keys)
        if fails:
            raise self.error("too much")
        return chosen


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [BitNetError, KeyboardInterrupt, MemoryError])
def test_an_error_comes_at_the_same_token(small, loop, late, error):
    model = Failing(small.config, small.weights, small.tokenizer)
    model.late, model.error = late, error
    for count in range(1, 25):
        model.limit, ends = len(loop) + count - 1, []
        for guess in (True, False):
            cache, made = small.new_cache(), []
            with pytest.raises(error, match="too much"):
                made.extend(generate_ids(model, loop, 60, stop=(), cache=cache, guess=guess))
            ends.append((made, cache.length))
        (guessed, length), (plain, expected) = ends
        assert len(plain) == count
        if error is BitNetError:
            assert (guessed, length) == (plain, expected)
        else:  # what stops the work from outside stops a whole step
            assert guessed == plain[: len(guessed)]
            assert length == len(loop) + len(guessed) - 1 + late


def test_a_wrong_guess_can_do_no_harm(small):
    """Not even one that has no meaning, or that the model can't read."""
    embedding = small.weights.embedding.copy()
    embedding[7] = np.nan
    weights = small.weights._replace(embedding=embedding)
    model = BitNetLM(small.config, weights, small.tokenizer)
    expected = small.generate(PROMPT, 40, stop=(), guess=False)
    text = PROMPT + expected
    assert 7 not in text
    for nonsense in (7, -1, small.config.vocab_size, "x"):
        guesser = Guesser()
        for place in range(5, 15):
            guesser.extend([*text[place - 5 : place], nonsense])
        assert model.generate(PROMPT, 40, stop=(), guess=guesser) == expected
        assert guesser.guessed > guesser.accepted > 0


@pytest.mark.parametrize("guess", [None, 1, "yes", 0.5, [], Guesser])
def test_guess_is_yes_or_no_or_a_guesser(small, guess):
    for call in (small.generate, small.stream):
        with pytest.raises(InputError, match="guess must be"):
            call(PROMPT, guess=guess)
    with pytest.raises(InputError, match="guess must be"):
        ChatSession(small).send("Hello!", guess=guess)


@pytest.mark.parametrize("longest", [-1, LONGEST + 1, 2.0, True, None])
def test_a_guess_has_a_length(longest):
    with pytest.raises(InputError, match="the longest guess"):
        Guesser(longest)


# Conversations


def test_a_conversation_is_the_same_and_guesses_from_what_was_said_before(model):
    guessing, plain = ChatSession(model), ChatSession(model)
    guesser = Guesser()
    for i, text in enumerate(("What is a ternary weight?", "Again?", "And again?", "Why?")):
        options = {"max_new_tokens": 40, "temperature": 0.3 * (i % 2), "seed": 5, "stop": ()}
        pieces = list(guessing.send(text, guess=guesser, **options))
        assert pieces == list(plain.send(text, guess=False, **options))
        assert guessing.messages == plain.messages
        assert guessing.context_used == plain.context_used
        assert guessing._cached_ids == plain._cached_ids
    assert guesser.accepted > 0


def test_only_what_an_earlier_turn_said_is_needed(small, monkeypatch):
    chat, said = ChatSession(small), []
    monkeypatch.setattr(Guesser, "extend", lambda self, tokens: said.append(list(tokens)))
    list(chat.send("Hello!", 8, stop=()))
    kept = list(chat._cached_ids[: chat.context_used])
    del said[:]
    list(chat.send("More!", 8, stop=()))
    before, prompt = said[:2]
    assert before == kept[: len(before)]
    assert len(before) > 10
    assert before + prompt == chat._cached_ids[: len(before + prompt)]


def test_a_chat_goes_on_after_any_answer_was_closed(small):
    for count in range(1, 25, 2):
        runs = []
        for guess in (True, False):
            chat = ChatSession(small)
            list(chat.send("Hello there, what is it?", 60, stop=(), guess=guess))
            pieces = chat.send("And?", 60, stop=(), guess=guess)
            shown = [next(pieces) for _ in range(count)]
            pieces.close()
            runs.append([shown, chat.context_used, list(chat.send("More", 20, guess=guess))])
        assert runs[0] == runs[1]


# The guesser itself


@example([0, 1] * 4, 3, 9)  # a loop, guessed beyond its end
@example([*range(6), 7, *range(6), 8, *range(6)], 2, 9)  # twice before: the last time counts
@example([0, 1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 0, 1, 2, 3, 4], 1, 9)  # the longer match counts
@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9), st.integers(0, 20))
def test_a_guess_is_what_followed_last_time(text, cut, room):
    guesser = Guesser()
    guesser._credit = 100.0
    for first in range(0, len(text), cut):
        guesser.extend(text[first : first + cut])
    expected = []
    for n in NGRAMS:  # a slow search from the end
        places = range(n, len(text)) if len(text) > n else ()
        found = [at for at in places if text[at - n : at] == text[-n:]]
        if found:
            endless = text + text[found[-1] :] * 20
            expected = endless[found[-1] :][: min(room, LONGEST)]
            break
    assert guesser.guess(room) == expected


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=200))
def test_wrong_guesses_are_bounded_by_the_text_and_the_right_ones(steps):
    guesser, text = Guesser(), [1] * 10
    guesser.extend(text)
    for room, right in steps:
        guessed = len(guesser.guess(room))
        assert guessed <= room
        right = min(right, guessed)
        guesser.judge(guessed, right)
        wrong, tokens = guesser.guessed - guesser.accepted, guesser.steps + guesser.accepted
        assert wrong <= 4 + tokens / 32 + guesser.accepted / 3
    assert guesser.steps == len(steps)


def test_a_guesser_of_length_zero_keeps_still():
    guesser = Guesser(0)
    guesser.extend([1] * 20)
    assert guesser.guess(10) == []
    guesser.judge(0, 0)
    assert guesser.counts() == {"steps": 1, "guessed_tokens": 0, "accepted_tokens": 0}
