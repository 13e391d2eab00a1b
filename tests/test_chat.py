"""A conversation: the same answers as without a cache, a transcript that is never half-written."""

import pytest
from checkpoints import Recipe, write

from bitnet_edu import ChatSession, ContextLengthError, InputError, load
from bitnet_edu.generate import generate_ids


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(write(tmp_path_factory.mktemp("model"), Recipe())))


def without_cache(model, messages, **options) -> str:
    return "".join(model.stream(messages, **options))


def test_turns_equal_fresh_generations(model):
    chat, messages = ChatSession(model, system="Be brief."), []
    messages.append({"role": "system", "content": "Be brief."})
    for text in ("Hello!", "And more?", "  spaces  "):
        messages.append({"role": "user", "content": text})
        expected = without_cache(model, messages, max_new_tokens=12)
        assert "".join(chat.send(text, max_new_tokens=12)) == expected
        messages.append({"role": "assistant", "content": expected})
        assert chat.messages == messages


def test_the_cache_is_kept_between_turns(model, monkeypatch):
    chat = ChatSession(model)
    list(chat.send("Hello there, what is a ternary weight?", max_new_tokens=5))
    lengths = []
    for name in ("prefill", "next_tokens"):
        original = getattr(model, name)

        def spy(ids, *args, original=original):
            lengths.append(len(ids))
            return original(ids, *args)

        monkeypatch.setattr(model, name, spy)
    prompt = len(model.tokenizer.apply_chat_template([*chat.messages, user("Why?")]))
    list(chat.send("Why?", max_new_tokens=5))
    assert lengths[0] < prompt / 2


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_an_edited_transcript_is_answered_as_if_it_were_new(model):
    chat = ChatSession(model)
    list(chat.send("Hello!", max_new_tokens=8))
    list(chat.send("What is one?", max_new_tokens=8))
    chat.messages = [user("Something else")]
    expected = without_cache(model, chat.messages, max_new_tokens=8)
    assert "".join(chat.answer(max_new_tokens=8)) == expected


def test_answering_again_gives_the_same_answer(model):
    chat = ChatSession(model)
    first = "".join(chat.send("Hello!", max_new_tokens=8))
    chat.messages.pop()
    assert "".join(chat.answer(max_new_tokens=8)) == first
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_closing_keeps_what_came_so_far_and_the_chat_goes_on(model):
    chat = ChatSession(model)
    pieces = chat.send("Hello!", max_new_tokens=50, stop=())
    shown = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": shown}
    expected = without_cache(model, [*chat.messages, user("More")], max_new_tokens=6)
    assert "".join(chat.send("More", max_new_tokens=6)) == expected


def test_closing_before_the_first_piece(model):
    chat = ChatSession(model)
    chat.send("Hello!").close()
    assert chat.messages == []
    assert "".join(chat.send("Hello!", max_new_tokens=4)) == without_cache(
        model, [user("Hello!")], max_new_tokens=4
    )


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"max_new_tokens": 0}, {"stop": ""}, {"seed": -1}, {"made": 1}],
    ids=str,
)
def test_bad_options_are_refused_at_once_with_the_transcript_as_it_was(model, options):
    chat = ChatSession(model, system="Be brief.")
    list(chat.send("Hello!", max_new_tokens=4))
    before = [dict(message) for message in chat.messages]
    with pytest.raises(InputError):
        chat.send("More", **options)  # not iterated
    with pytest.raises(InputError):
        chat.answer(**options)
    assert chat.messages == before
    expected = without_cache(model, [*before, user("More")], max_new_tokens=4)
    assert "".join(chat.send("More", max_new_tokens=4)) == expected


@pytest.mark.parametrize("text", [None, 5, b"Hello", ["Hello"], {"role": "user"}])
def test_what_is_no_text_is_refused_at_once(model, text):
    chat = ChatSession(model)
    with pytest.raises(InputError, match="message"):
        chat.send(text)
    if text is not None:
        with pytest.raises(InputError, match="system"):
            chat.system = text
    assert chat.messages == []


@pytest.mark.parametrize("messages", [["Hi"], [None], [{"role": "user"}], "Hi", None, [], [user]])
def test_an_edited_transcript_of_another_form_is_refused_at_once(model, messages):
    chat = ChatSession(model)
    chat.messages = messages
    with pytest.raises(InputError):
        chat.answer()
    with pytest.raises(InputError):
        chat.answer(progress=print)
    assert chat.messages == messages


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped, MemoryError, SystemExit])
@pytest.mark.parametrize("when", ["in progress", "in the engine"])
def test_what_stops_the_reading_of_the_prompt_leaves_no_empty_turn(model, monkeypatch, error, when):
    def stop(*_):
        raise error

    chat = ChatSession(model, system="Be brief.")
    list(chat.send("Hello!", max_new_tokens=4))
    before = [dict(message) for message in chat.messages]
    with monkeypatch.context() as patch:
        if when == "in the engine":
            patch.setattr(model, "next_tokens", stop)
        pieces = chat.send("More", progress=stop if when == "in progress" else None)
        with pytest.raises(error):
            next(pieces)
    assert chat.messages == before
    expected = without_cache(model, [*before, user("More")], max_new_tokens=4)
    assert "".join(chat.send("More", max_new_tokens=4)) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
def test_what_stops_an_answer_after_its_first_piece_leaves_what_came(model, monkeypatch, error):
    chat, calls = ChatSession(model), []
    original = model.next_tokens

    def next_tokens(ids, *args):
        calls.append(len(ids))
        if len(calls) == 40:
            raise error
        return original(ids, *args)

    shown = []
    with monkeypatch.context() as patch:
        patch.setattr(model, "next_tokens", next_tokens)
        options = {"temperature": 5.0, "seed": 1}
        pieces = chat.send("Hello!", max_new_tokens=50, stop=(), **options)
        with pytest.raises(error):
            any(map(shown.append, pieces))
    shown = "".join(shown)
    assert shown
    assert chat.messages == [user("Hello!"), {"role": "assistant", "content": shown}]
    expected = without_cache(model, [*chat.messages, user("More")], max_new_tokens=6)
    assert "".join(chat.send("More", max_new_tokens=6)) == expected


def test_an_answer_without_a_word_is_an_answer(model):
    chat = ChatSession(model)
    first = chat.model.generate(model.tokenizer.apply_chat_template([user("Hello!")]), 1, stop=())
    assert "".join(chat.send("Hello!", stop="".join(model.tokenizer.decode(first)) or first)) == ""
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_lone_surrogates_become_replacement_characters(model):
    chat = ChatSession(model, system="a\ud800")
    assert chat.system == "a\ufffd"
    list(chat.send("b\udcff", max_new_tokens=2))
    assert chat.messages[1] == user("b\ufffd")
    chat.messages[1]["content"] = "\ud83d"
    assert chat.prompt() == model.tokenizer.apply_chat_template(
        [{"role": "system", "content": "a\ufffd"}, user("\ufffd"), chat.messages[2]]
    )


def test_a_full_context_is_refused_with_the_transcript_unchanged(model):
    chat = ChatSession(model, max_len=40)
    with pytest.raises(ContextLengthError, match="40"):
        list(chat.send("word " * 40))
    assert chat.messages == []
    answer = list(chat.send("Hi", max_new_tokens=500, stop=()))
    assert answer
    assert chat.context_used == 40
    with pytest.raises(ContextLengthError):
        list(chat.send("Hi again"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    chat.messages = [user("word " * 40)]
    with pytest.raises(ContextLengthError):
        list(chat.answer())
    assert len(chat.messages) == 1


def test_clear_forgets_all_but_the_system_prompt(model):
    chat = ChatSession(model, system="Be brief.")
    list(chat.send("Hello!", max_new_tokens=4))
    assert chat.context_used > 0
    chat.clear()
    assert chat.context_used == 0
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    bare = ChatSession(model)
    list(bare.send("Hello!", max_new_tokens=4))
    bare.clear()
    assert bare.messages == []


def test_stop_strings_and_made_ids(model):
    whole = "".join(ChatSession(model).send("Hello!", max_new_tokens=30, stop=()))
    made = []
    chat = ChatSession(model)
    cut = "".join(chat.send("Hello!", max_new_tokens=30, stop=whole[5:7], made=made))
    assert cut == whole[: whole.index(whole[5:7])]
    ids = model.tokenizer.apply_chat_template([user("Hello!")])
    assert made == list(generate_ids(model, ids, len(made), stop=()))


def test_text_of_any_kind_goes_through_unharmed(model):
    for text in ("<script>alert(1)</script>", "**bold**", "שלום", "🙂👩‍👩‍👧", "{{ 7*7 }}", "a\0b"):
        chat = ChatSession(model)
        list(chat.send(text, max_new_tokens=2))
        assert chat.messages[0] == user(text)


def test_a_model_without_a_tokenizer_cannot_chat(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        list(ChatSession(load(str(tmp_path))).send("Hello"))
