"""Ids and text against transformers' tokenizer on the same folder; streams of whole characters."""

import json
import shutil

import pytest
from checkpoints import SPECIAL, VOCABULARY, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from oracle import transformers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from bitnet_edu import CheckpointError, InputError, load
from bitnet_edu.files.gguf import write_gguf
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


# Files that would harm the library, or the machine: refused by name before they can

DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TWICE = [{"Sequence": {"id": "A", "type_id": 0}}] * 2
ANY = {"id": 5, "content": "a", "special": False, "normalized": True}
ANY |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
HARMFUL = {
    "forty doublings": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 40}},
    "a doubling without its type": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{key: DOUBLING[key] for key in ("pattern", "content")}] * 40,
        }
    },
    "a long insertion": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "a table that says it is 4 GB long": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    },
    "an empty table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "é"}},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "bytes of bytes of bytes": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
            ]
            * 30,
        }
    },
    "texts twice, forty times": {
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "TemplateProcessing", "single": TWICE, "pair": [], "special_tokens": {}}
            ]
            * 40,
        }
    },
    "a token that is not declared": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "spaces between spaces": {
        "decoder": {"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 40}
    },
    "an id beyond all": {"added_tokens": [ANY | {"id": 2**32}]},
    "no model": {"model": None},
    "steps without end": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 10**4}
    },
}


@pytest.mark.parametrize("case", HARMFUL)
def test_harmful_tokenizers_are_refused_by_name_before_the_library_sees_them(tmp_path, case):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | HARMFUL[case]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


class Harmful:
    """A good tokenizer that is written to a file as a harmful one."""

    def __init__(self, backend: HFTokenizer):
        self.backend = backend

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def to_str(self) -> str:
        content = json.loads(self.backend.to_str())
        return json.dumps(content | HARMFUL["forty doublings"])


def test_the_same_in_a_gguf_file(tmp_path):
    model = load("tiny")
    model.tokenizer.backend = Harmful(model.tokenizer.backend)
    path = tmp_path / "harmful.gguf"
    write_gguf(path, model.config, model.weights, model.tokenizer)
    with pytest.raises(CheckpointError, match=r"harmful\.gguf.*times longer"):
        load(str(path))


def test_an_id_beyond_the_vocabulary_put_around_texts_is_found_at_load(tmp_path):
    path = shutil.copytree(TINY, tmp_path / "tiny")
    content = json.loads((path / "tokenizer.json").read_text())
    around = {"type": "BertProcessing", "sep": ["a", 5], "cls": ["b", 10**6]}
    (path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": around}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*1000000"):
        load(str(path))


def test_a_key_that_comes_twice_is_refused(tmp_path):
    """One of the two would be looked at, and the other one used."""
    write_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    twice = text.replace(
        '"normalizer": null', '"normalizer": {"type": "NFC"}, "normalizer": null', 1
    )
    assert twice != text
    (tmp_path / "tokenizer.json").write_text(twice)
    with pytest.raises(CheckpointError, match="twice"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model": {
                "type": "WordPiece",
                "unk_token": "zz",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 9,
                "vocab": {"a": 0},
            },
            "post_processor": None,
            "added_tokens": [],
        },
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+b"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
    ids=["an unknown token that is unknown", "a pattern without end"],
)
def test_what_the_library_throws_at_use_is_one_error(tmp_path, changes):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
    ours = Tokenizer.from_folder(tmp_path)
    with pytest.raises(InputError, match="cannot encode"):
        ours.encode("a" * 60)


@pytest.mark.parametrize("text", [None, 5, b"Hello", ["Hello"], 1.5])
def test_what_is_no_text_is_refused(ours, text):
    for call in (ours.encode, ours.token_id, lambda text: Tokenizer(ours.backend, text)):
        with pytest.raises(InputError, match="text"):
            call(text)


@pytest.mark.parametrize("ids", [None, 5, "5", b"5", [1.0], ["1"], [True], [[1]], [None], [2**40]])
def test_what_are_no_ids_are_refused(ours, ids):
    with pytest.raises(InputError, match="token id"):
        ours.decode(ids)


def test_lone_surrogates_become_replacement_characters_everywhere(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    template = "{{ bos_token }}{{ pad_token }}é\ud800{{ '\\ud800' }}{{ messages[0].content }}"
    config |= {"bos_token": "x\ud800", "pad_token": "\udfff", "chat_template": template}
    path.write_text(json.dumps(config))
    ours = Tokenizer.from_folder(tmp_path)
    text = ours.chat_text([{"role": "user", "content": "\udcff", "\ud800": "\ud800"}])
    assert text == "x\ufffd\ufffdé\ufffd\ufffd\ufffd"
    assert ours.encode("a\ud800") == ours.encode("a\ufffd")


# Templates within bounds

ENDLESS = {
    "loops in loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}"
    "{% endfor %}",
    "loops over a list": "{% set r = range(9999) | list %}{% for a in r %}{% for b in r %}"
    "{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "squares of squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "a text times a number": "{{ 'hello ' * 20000000 }}",
    "a wide text": "{{ 'x' | center(1000000000) }}",
    "a wide text by a method": "{{ 'x'.rjust(width=1000000000) }}",
    "a wide number": "{{ '%1000000000d' % 5 }}",
    "a wide number by a variable": "{{ '{:{}}'.format(5, 1000000000) }}",
    "long times long": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "long between many": "{{ range(99999) | map('string') | join('b' * 1000000) }}",
    "a deep indent": "{{ messages | tojson(indent=1000000000) }}",
    "doubling with ~": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling with +": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling with blocks": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set t %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = t %}{% endfor %}",
    "lists of lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "dicts of dicts": "{% set n = namespace(x=1) %}{% for i in range(99) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion by twos": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "loops that call loops": "{% for a in range(99999) recursive %}{% if loop.depth < 9 %}"
    "{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "a long text again and again": "{% for a in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "a template without end": "x" * 10**6,
    "sums of lists": "{{ ([[1] * 40] * 99999) | sum(start=[]) }}",
    "a large number as bytes": "{{ (5).to_bytes(1000000000, 'little') }}",
    "rounding far": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_without_end_is_refused_at_load_and_by_name(tmp_path, case):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": ENDLESS[case]}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the chat template"):
        Tokenizer.from_folder(tmp_path)


def test_a_template_that_only_some_conversations_make_endless(ours):
    template = "{% if messages | length > 1 %}{{ 'x' * 10 ** 9 }}{% endif %}Hello"
    tokenizer = Tokenizer(ours.backend, template)
    turn = {"role": "user", "content": "x"}
    assert tokenizer.chat_text([turn]) == "Hello"
    with pytest.raises(InputError, match="template"):
        tokenizer.chat_text([turn, turn])


def test_a_template_that_can_write_nothing_is_refused_and_a_picky_one_is_not(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    for template in (
        "{% for %}",
        "{{ raise_exception('never') }}",
        "{{ messages.nothing.at.all }}",
    ):
        path.write_text(template)
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
            Tokenizer.from_folder(tmp_path)
    picky = "{% if messages[0].role != 'ROLE' %}{{ raise_exception('no') }}{% endif %}Hello"
    for role in ("user", "system"):
        path.write_text(picky.replace("ROLE", role))
        ours = Tokenizer.from_folder(tmp_path)
        assert ours.chat_text([{"role": role, "content": "x"}]) == "Hello"


def test_long_conversations_are_within_bounds(ours):
    turns = [{"role": "user", "content": "word " * 200}] * 600
    text = ours.chat_text(turns)
    assert text.count("word") == 600 * 200
