"""Ids and text against transformers' tokenizer on the same folder; streams of whole characters."""

import json

import pytest
from checkpoints import SPECIAL, VOCABULARY, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from oracle import transformers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from bitnet_edu import CheckpointError, InputError
from bitnet_edu.files.source import TINY
from bitnet_edu.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello there!",
    "  two  spaces\n\nand\ttabs ",
    "naïve café, Ελλάδα, 中文, 🙂👩‍👩‍👧, שלום",
    "<|eot_id|> typed by hand, <|begin_of_text|>",
    "<script>alert('x')</script> & \\0",
    "x" * 10_000,
]
CHATS = [
    [("user", "Hello!")],
    [("system", "Be brief."), ("user", "  Hello!  ")],
    [("user", "Hi"), ("assistant", "Hi. "), ("user", "中文?\n")],
    [("system", ""), ("user", ""), ("assistant", ""), ("user", "<b>{{ 7 * 7 }}</b>")],
]


@pytest.fixture(scope="module", params=["small", "tiny"])
def folder(request, tmp_path_factory):
    """A tokenizer of these tests, and that of the embedded model."""
    if request.param == "tiny":
        return TINY
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return of_transformers(folder)


def of_transformers(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_ids_and_text_are_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)
    bare = ours.encode(text, add_special_tokens=False)
    assert bare == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(bare, skip_special_tokens=False) == theirs.decode(bare) == text
    assert ours.decode(bare) == theirs.decode(bare, skip_special_tokens=True)


@pytest.mark.parametrize("chat", CHATS, ids=repr)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_gives_the_ids_of_transformers(ours, theirs, chat, prompt):
    messages = [{"role": role, "content": content} for role, content in chat]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_chat_text_is_what_the_real_model_was_trained_on(ours):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
    ]
    assert ours.chat_text(messages) == (
        "<|begin_of_text|>System: Be brief.<|eot_id|>User: Hi<|eot_id|>Assistant: "
    )


def test_a_template_of_the_folder_goes_first(tmp_path):
    write_tokenizer(tmp_path)
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    template += "{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    ours, theirs = Tokenizer.from_folder(tmp_path), of_transformers(tmp_path)
    assert ours.chat_text(messages) == "one"
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)["input_ids"]


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=24))
def test_a_stream_gives_the_text_of_the_whole_for_any_ids(tmp_path_factory, ids):
    ours = stream_tokenizer(tmp_path_factory)
    assert "".join(ours.decode_stream(iter(ids))) == ours.decode(ids)


@given(st.text(max_size=20))
def test_a_stream_never_splits_a_character(tmp_path_factory, text):
    ours = stream_tokenizer(tmp_path_factory)
    ids = ours.encode(text, add_special_tokens=False)
    pieces = list(ours.decode_stream(iter(ids)))
    assert "".join(pieces) == ours.decode(ids)
    assert "" not in pieces
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


_made = []


def stream_tokenizer(tmp_path_factory) -> Tokenizer:
    if not _made:
        _made.append(Tokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("stream"))))
    return _made[0]


def test_a_stream_comes_as_the_tokens_come(ours):
    ids = ours.encode("one two three", add_special_tokens=False)
    taken = []
    pieces = ours.decode_stream(taken.append(token) or token for token in ids)
    first = next(pieces)
    assert "one two three".startswith(first)
    assert len(taken) < len(ids)


def test_a_stream_cut_inside_a_character_ends_with_a_replacement(ours):
    ids = ours.encode("a🙂", add_special_tokens=False)
    assert list(ours.decode_stream(iter(ids[:-1]))) == ["a", "\ufffd"]


ODD = ["▁", "▁▁", "a", "▁a", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "é", "</s>", "b▁"]
STEPS = {
    "Llama": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    "three spaces lost": [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)],
    "spaces lost at both ends": [decoders.Fuse(), decoders.Strip("▁", 1, 2)],
    "replaced when joined": [decoders.Fuse(), decoders.Replace("a▁", "xy")],
    "of each token": [decoders.Strip("▁", 1, 1), decoders.Replace("a", "")],
    "CTC": [decoders.CTC("a", "▁")],
    "BPE with an end of word": [decoders.BPEDecoder("▁")],
    "WordPiece": [decoders.WordPiece("▁")],
    "Metaspace": [decoders.Metaspace()],
    "none": [],
}


@pytest.mark.parametrize("steps", STEPS)
@given(ids=st.lists(st.integers(0, len(ODD) + 1), max_size=12))
def test_a_stream_of_any_decoder_gives_the_text_of_the_whole(steps, ids):
    backend = HFTokenizer(models.WordLevel({token: i for i, token in enumerate(ODD)}, "a"))
    backend.add_special_tokens(["</s>"])
    if STEPS[steps]:
        backend.decoder = decoders.Sequence(STEPS[steps])
    ours = Tokenizer(backend)
    try:
        whole = backend.decode(ids) if ids else ""
    except BaseException as error:  # some decoders panic where there is nothing left to strip
        if type(error).__name__ != "PanicException":
            raise
        with pytest.raises(InputError, match="cannot decode"):
            list(ours.decode_stream(iter(ids)))
        return
    assert "".join(ours.decode_stream(iter(ids))) == whole
    if max(ids, default=0) < len(ODD):
        assert ours.decode(ids) == whole


def test_settings_of_the_training_do_not_cut_texts(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    path.write_text(json.dumps(content))
    text = "a long text that is longer than four tokens"
    theirs = of_transformers(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode(text) == theirs.encode(text)


def test_special_tokens_by_name(ours, theirs):
    ids = theirs.convert_tokens_to_ids(SPECIAL)
    assert [ours.token_id(token) for token in SPECIAL] == ids
    assert ids[:2] == [theirs.bos_token_id, theirs.eos_token_id]
    assert ours.token_id("<|nothing|>") is None
    assert (ours.bos_token, ours.eos_token) == tuple(SPECIAL[:2])


@pytest.mark.parametrize("token", [-1, 2048, 10**12])
def test_ids_outside_the_vocabulary_are_refused(ours, token):
    with pytest.raises(InputError, match=str(token)):
        ours.decode([5, token])


@pytest.mark.parametrize(
    "message", ["Hello", {"role": "user"}, {"role": "user", "content": None}, {"content": "x"}]
)
def test_messages_of_another_form_are_refused(ours, message):
    with pytest.raises(InputError, match="role"):
        ours.apply_chat_template([message])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system here') }}",
        "{{ 1 + 'a' }}",
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(folder, template):
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="template"):
        tokenizer.chat_text([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "nothing"),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("tokenizer_config.json", '{"bos_token": 5}'),
        ("tokenizer_config.json", '{"eos_token": {"content": 5}}'),
        ("tokenizer_config.json", '{"eos_token": {}}'),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, file, content):
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        Tokenizer.from_folder(tmp_path)
