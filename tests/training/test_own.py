"""A corpus of one's own: every form that is read, and one line for whatever is wrong."""

import json
import random
from collections import Counter

import pytest

from bitnet_edu.errors import InputError
from bitnet_edu.files.source import TINY
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training import own
from bitnet_edu.training.data import encode

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


def read(tmp_path, content: str | bytes, name: str = "corpus.txt") -> own.Corpus:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return own.read_corpus(file)


def test_paragraphs_are_documents(tmp_path) -> None:
    text = "\ufeff\n One.\nStill one.  \r\n \r\nTwo\u2028and more.\r\r\rThree."
    found = read(tmp_path, text).entries
    assert found == [(2, " One.\nStill one."), (5, "Two\u2028and more."), (8, "Three.")]


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.txt"])
def test_every_form_of_a_line_is_read(tmp_path, name) -> None:
    values = [
        {"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "id": 7},
        {"prompt": "Hi", "response": "Hello.", "source": "me"},
        {"text": "A text\u2028of two lines."},
    ]
    lines = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    documents = [entry.document for entry in read(tmp_path, lines, name).entries]
    assert documents == [values[0]["messages"], CHAT, "A text\u2028of two lines."]


GOOD = json.dumps({"messages": CHAT})
WRONG = {
    "no JSON": ('{"text": "a"', "this is no JSON"),
    "a list": ("[1]", "expected {"),
    "a number": ("17", "expected {"),
    "nothing known": ('{"question": "a"}', "expected {"),
    "a prompt alone": ('{"prompt": "a"}', "expected {"),
    "no list": ('{"messages": "a"}', '"messages" must be a list'),
    "no objects": ('{"messages": ["a"]}', '"messages" must be a list'),
    "an empty chat": ('{"messages": []}', "no message has the role assistant"),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "no message has the role assistant",
    ),
    "an unknown role": (
        '{"messages": [{"role": "bot", "content": "a"}]}',
        "the role must be one of system, user, assistant, not 'bot'",
    ),
    "a role that is none": ('{"messages": [{"role": [], "content": "a"}]}', "the role must be"),
    "no content": ('{"messages": [{"role": "user"}]}', "what the user says must be text"),
    "a blank answer": ('{"prompt": "a", "response": " "}', "what the assistant says must be text"),
    "a number for a text": ('{"text": 3}', "text must be text"),
    "nested too deep": ("[" * 100_000, "this is no JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named(tmp_path, case) -> None:
    line, words = WRONG[case]
    with pytest.raises(InputError) as caught:
        read(tmp_path, f"{GOOD}\n\n{line}\n{GOOD}\n", "corpus.jsonl")
    assert f"corpus.jsonl, line 3: {words}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\n\t", "is empty"),
        (b"one\ntwo \xff", "line 2: this is not UTF-8"),
        ("text".encode("utf-16"), "line 1: this is not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl"])
def test_what_is_no_corpus(tmp_path, content, words, name) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path, content, name)


def test_a_missing_file_and_a_folder(tmp_path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            own.read_corpus(path)


def test_a_long_text_is_cut_to_fit_and_loses_no_word(tmp_path, tokenizer) -> None:
    text = " ".join(f"word{number}" for number in range(500)) + "x" * 300
    pieces = own.fitted(read(tmp_path, text), tokenizer, 40, 512)
    assert max(len(encode(tokenizer, piece)[0]) for piece in pieces) <= 40
    assert len(pieces) > 20
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert "".join(own.cut(tokenizer, "日本語" * 60, 40)) == "日本語" * 60


def test_a_long_conversation_is_named(tmp_path, tokenizer) -> None:
    long = json.dumps({"prompt": "Hi", "response": "word " * 100})
    corpus = read(tmp_path, f"{GOOD}\n{long}", "corpus.jsonl")
    size = own.longest_chat(corpus, tokenizer)[0]
    with pytest.raises(InputError, match=rf"line 2: .* choose --length {size}, or shorten it"):
        own.fitted(corpus, tokenizer, 64, 512)
    assert len(own.fitted(corpus, tokenizer, size, 512)) == 2
    with pytest.raises(InputError, match="the model's context has room for 64: shorten it"):
        own.fitted(corpus, tokenizer, 64, 64)


def test_a_share_is_held_out(tmp_path) -> None:
    documents = [str(number) for number in range(50)]
    learned, held_out = own.split(documents, 0.1, seed=3)
    assert sorted(learned + held_out) == sorted(documents)
    assert len(held_out) == 5
    assert own.split(documents, 0.1, seed=3)[1] == held_out
    assert own.split(documents, 0.1, seed=4)[1] != held_out
    assert [len(part) for part in own.split(["a", "b"], 0.999, 0)] == [1, 1]
    for share in (0, 1, -0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="between 0 and 1"):
            own.split(documents, share, 0)
    with pytest.raises(InputError, match="one document"):
        own.split(["alone"], 0.5, 0)


def test_an_endless_stream_uses_all_equally_and_is_random_access() -> None:
    stream = own.endless(list("abcde"), seed=1)
    text = [stream(number) for number in range(50)]
    assert Counter(text) == dict.fromkeys("abcde", 10)
    assert text[:5] != text[5:10]
    numbers = list(range(50))
    random.Random(0).shuffle(numbers)
    other = own.endless(list("abcde"), seed=1)
    assert [other(number) for number in numbers] == [text[number] for number in numbers]
    both = own.mixed(stream, str)
    assert [both(number) for number in range(4)] == [text[0], "0", text[1], "1"]
