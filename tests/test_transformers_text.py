# ruff: noqa: E501  (templates read better in one line)
"""Ids, prompts and texts against transformers' AutoTokenizer, over kinds of tokenizers and templates.

A case is a folder that both read. What transformers accepts must come out the same here.
"""

import json
import shutil

import jinja2
import pytest
from checkpoints import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds_of_tokenizers import KINDS, SIMPLE, byte_level, folder_of, with_start
from tokenizers import Tokenizer as HFTokenizer

from bitnet_edu import CheckpointError, InputError
from bitnet_edu.files.source import TINY
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE, Tokenizer, tidied, tidy

transformers = pytest.importorskip("transformers")

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
# Templates, each in the manner of one that is in use.
TEMPLATES = {
    "BitNet": BITNET_CHAT_TEMPLATE,
    "simple": SIMPLE,
    "ChatML": CHATML,
    "generation": "{% for m in messages %}{% set x = m.role %}{{ x }}{% generation %}\n{{ m.content }}"
    "{{ eos_token }}\n{% endgeneration %}{% endfor %}",
    "generation with a minus": "{%- for m in messages -%} {%- generation -%} {{ m.content }} "
    "{%- endgeneration -%} {%- endfor -%}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 'é<>'} | tojson }}"
    "{{ [1, 'é'] | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "tools and documents": "{% if tools is none and documents is none %}plain{% endif %}"
    "{% if tools is defined %}defined{% endif %}{{ messages[0].content }}",
    "what is not defined": "{% if foo is defined %}no{% endif %}{% if pad_token is defined %}pad"
    "{% endif %}{{ foo }}{{ messages[0].content }}{% if not sep_token %}none{% endif %}",
    "blocks are trimmed": "{% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}\n\n",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.text = ns.text "
    "~ m.content ~ loop.index %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.text * 2 }}{{ ns.n }}",
    "macros": "{% macro turn(m, end='!') %}{{ m['role']|upper }}{{ m['content']|trim }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end=eos_token) }}{% endfor %}",
    "loops": "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.revindex }}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{{ loop.cycle('a', 'b') }}"
    "{% else %}none{% endfor %}{% for i in range(3) if i != 1 %}{{ i }}{% endfor %}",
    "loops in loops": "{% for a in [[1, [2, 3]], 4] recursive %}{% if a is iterable %}({{ loop(a) }})"
    "{% else %}{{ a }}{% endif %}{% endfor %}{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}{{ v }}{% endfor %}",
    "slices and methods": "{% set m = messages[-1].content %}{{ m[::-1] }}{{ m[1:3] }}{{ m.strip().split() }}"
    "{{ m.replace('e', '<s>') }}{{ m.startswith('H') }}{{ ' '.join(['a', 'b']) }}{{ '{}-{:>4}'.format(1, 'x') }}"
    "{{ '%s %03d' % (m, 7) }}{{ 'x'.center(7) }}{{ m.title() }}{{ m.rstrip('!').lstrip('H') }}",
    "filters": "{% set texts = messages | map(attribute='content') | list %}{{ texts | join(' + ') }}"
    "{{ texts | first | length }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ texts | last | indent(4) }}{{ 'a\\nb' | indent(2, true) }}{{ texts[0] | replace('e', 'E') }}"
    "{{ 3.7 | round | int }}{{ [3, 1, 2] | sort | reverse | list }}{{ 'a b' | wordcount }}{{ none | default('d', true) }}"
    "{{ [1, 2, 3] | sum }}{{ [1, 2, 3] | batch(2) | list }}{{ {'b': 1} | dictsort }}{{ 'x' | center(5) }}"
    "{{ messages[0] | items | list }}{{ '<b>' | escape }}{{ '<b>' | safe }}{{ 'é' | urlencode }}{{ '%05.1f' | format(2.5) }}",
    "numbers": "{{ 2 ** 10 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ -3 * 4 }}{{ 1 / 4 }}{{ 'ab' * 3 }}{{ [0] * 3 }}{{ 2 ** -1 }}"
    "{{ 10 ** 20 }}{{ true + 1 }}{{ 1.5 * 2 }}{{ (1, 2) + (3,) }}{{ 'a' ~ 1 ~ none ~ [1] ~ true }}",
    "conditions": "{{ 'yes' if messages[0].role in ['user', 'system'] else 'no' }}{{ messages is sequence }}"
    "{{ messages[0] is mapping }}{{ 'a' is string }}{{ 1 is odd }}{{ not false and (1 < 2 < 3) }}",
    "set blocks and filter blocks": "{% set x %}a{{ messages[0].content }}b{% endset %}{{ x | upper }}"
    "{% filter upper %}{{ messages[0].content }}é{% endfilter %}",
    "call blocks": "{% macro outer() %}[{{ caller(3) }}]{% endmacro %}{% call(n) outer() %}{{ n }}"
    "{{ messages[0].content }}{% endcall %}",
    "dates": "{{ strftime_now('%Y') | length }}{% set date = strftime_now('%d %b %Y') %}{{ date | length }}",
    "a long text": "{{ messages[0].content }}"
    + "You are a helpful assistant. " * 40
    + "{{ eos_token }}",
    "dict and comments": "{# {{ no }} #}{{ dict(a=1, b=[2]) }}{{ {'a': {'b': 1}}.a.b }}{% raw %}{{ x }}{% endraw %}",
    "pieces of special tokens": "{{ '<|eot' ~ '_id|>' }}{{ '</' + 's>' }}{{ messages[0].content }}",
    "spaces": "  {{ bos_token }}  {{ messages[0].content }}  \n ",
    "nothing at all": "",
    "refuses a system message": "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}",
    "thoughts": "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{{ m.thinking }}"
    "{{ m.name }}{{ m.tool_calls is defined }}{% endfor %}",
}
CHATS = [
    [{"role": "user", "content": "  Hello there, é <b> & 🙂!  "}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "It is </s> -1.", "reasoning": "hm", "name": None},
        {"role": "user", "content": "Don't you know?\n"},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "<s>weight<|eot_id|>", "x": [1, {"y": 2.5}]},
    ],
]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}],
    }
]


def both(path):
    return Tokenizer.from_folder(path), transformers.AutoTokenizer.from_pretrained(path)


def require_same_prompts(path, chats=CHATS):
    ours, theirs = both(path)
    for chat in chats:
        for prompt in (True, False):
            if refuses(theirs, chat):
                with pytest.raises(InputError, match="no system"):
                    ours.chat_text(chat, prompt)
                continue
            expected = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.chat_text(chat, prompt) == expected
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
            assert ours.apply_chat_template(chat, prompt) == ids


def refuses(theirs, chat) -> bool:
    """Whether it is the template itself that doesn't want this conversation."""
    try:
        theirs.apply_chat_template(chat, tokenize=False)
    except jinja2.TemplateError as error:
        return str(error) == "no system"
    return False


TEXTS = [
    "",
    " ",
    "Hello there!",
    "  two  spaces , and . stops ? Don't \n\tn't 's",
    "naïve 中文 🙂👩‍👩‍👧 \x00\ufffd",
    "<s></s> <|eot_id|><unk> typed by hand",
]


def require_same_texts(path):
    ours, theirs = both(path)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert "".join(ours.decode_stream(iter(ids))) == ours.decode(ids)


@pytest.fixture(scope="module")
def backends():
    return {kind: make().to_str() for kind, make in KINDS.items()}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_write_the_same_prompts(tmp_path, backends, template):
    """Each on every kind of tokenizer."""
    for index, backend in enumerate(backends.values()):
        path = tmp_path / str(index)
        require_same_prompts(
            folder_of(path, HFTokenizer.from_str(backend), TEMPLATES[template], pad_token="</s>")
        )


def test_content_in_parts(tmp_path):
    template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
    )
    require_same_prompts(folder_of(tmp_path, byte_level(), template), [PARTS])


CONFIGS = {
    "nothing more": {},
    "no class": {"tokenizer_class": None},
    "the new name of the class": {"tokenizer_class": "TokenizersBackend"},
    "a class that nobody knows": {"tokenizer_class": "MyOwnTokenizer"},
    "a start token is asked for": {"add_bos_token": True, "add_eos_token": True},
    "no start token is asked for": {"add_bos_token": False},
    "tidied": {"clean_up_tokenization_spaces": True},
    "tidied at any cost": {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    },
    "a prefix space": {"add_prefix_space": True, "legacy": False},
    "special tokens are split": {"split_special_tokens": True},
    "another length and side": {
        "model_max_length": 5,
        "padding_side": "left",
        "truncation_side": "left",
    },
    "a new pad token": {"pad_token": "<pad>"},
    "tokens as objects": {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True, "rstrip": False},
        "mask_token": {
            "__type": "AddedToken",
            "content": "<mask>",
            "lstrip": True,
            "normalized": True,
        },
    },
    "more tokens": {"additional_special_tokens": ["<more>", "<|eot_id|>"]},
    "extra tokens": {"extra_special_tokens": ["<extra>", "Hello"]},
    "named extra tokens": {
        "extra_special_tokens": {"image_token": "<image>", "boi_token": "there"}
    },
    "tokens of the model's own": {"image_token": "<image>", "audio_token": "weight"},
    "declared tokens": {
        "added_tokens_decoder": {
            "1": {
                "content": "<s>",
                "lstrip": True,
                "rstrip": True,
                "normalized": False,
                "special": True,
            },
            "5": {
                "content": "there",
                "lstrip": False,
                "rstrip": True,
                "single_word": True,
                "special": False,
            },
            "900": {"content": "<new>", "special": True},
        }
    },
    "no unknown token": {"unk_token": None, "eos_token": None},
}
SHOWS_TOKENS = (
    "{{ bos_token }}{{ pad_token }}{{ mask_token }}{{ image_token }}{{ audio_token }}{{ boi_token }}"
    "{{ unk_token }}{{ eos_token is defined }}{{ messages[0].content }} <mask> <image> <new> <pad>"
)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_configurations_mean_the_same(tmp_path, backends, kind, config):
    path = folder_of(
        tmp_path, HFTokenizer.from_str(backends[kind]), SHOWS_TOKENS, **CONFIGS[config]
    )
    require_same_prompts(path)
    require_same_texts(path)


FILES = {
    "special_tokens_map.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": True},
    },
    "a map that contradicts": {"bos_token": "</s>", "pad_token": "<pad>", "image_token": "there"},
    "a map of more": {
        "additional_special_tokens": ["<more>"],
        "extra_special_tokens": ["<x>", "Hello"],
    },
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("declared", [False, True])
def test_special_tokens_map(tmp_path, file, declared):
    config = {"bos_token": None, "eos_token": None} if file == "special_tokens_map.json" else {}
    if declared:  # then the map no longer counts
        config["added_tokens_decoder"] = {"1": {"content": "<s>", "special": True}}
    path = folder_of(tmp_path, with_start(byte_level()), SHOWS_TOKENS, **config)
    (path / "special_tokens_map.json").write_text(json.dumps(FILES[file]))
    require_same_prompts(path)
    require_same_texts(path)


def test_added_tokens_json(tmp_path):
    path = folder_of(tmp_path, byte_level(), SHOWS_TOKENS, pad_token="<pad>")
    (path / "added_tokens.json").write_text(json.dumps({"<pad>": 320, "<tool>": 321}))
    require_same_prompts(path)
    require_same_texts(path)


LLAMA = {
    "Fast": {"tokenizer_class": "LlamaTokenizerFast"},
    "plain": {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    "new": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
    "no prefix": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    "default names": {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "pad_token": "<pad>",
    },
}


@pytest.mark.parametrize("config", LLAMA)
@pytest.mark.parametrize("kind", ["byte fallback", "byte-level"])
def test_llama_classes(tmp_path, backends, kind, config):
    path = folder_of(tmp_path, HFTokenizer.from_str(backends[kind]), SIMPLE, **LLAMA[config])
    require_same_prompts(path)
    require_same_texts(path)


NAMED_TEMPLATES = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SIMPLE}]


def test_named_templates(tmp_path):
    require_same_prompts(folder_of(tmp_path, byte_level(), NAMED_TEMPLATES))


def test_template_files(tmp_path):
    path = folder_of(tmp_path, byte_level(), "in the config")
    (path / "chat_template.jinja").write_text("own file: " + SIMPLE)
    require_same_prompts(path)
    more = path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    require_same_prompts(path)
    (more / "default.jinja").write_text("default: " + SIMPLE)
    require_same_prompts(path)


@pytest.mark.parametrize("where", ["config", "files"])
def test_named_templates_without_a_default_are_refused_by_name(tmp_path, where):
    path = folder_of(tmp_path, byte_level(), NAMED_TEMPLATES[:1] if where == "config" else None)
    if where == "files":
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    with pytest.raises(CheckpointError, match=r"default.*tool_use"):
        Tokenizer.from_folder(path)


def test_a_token_that_the_embedding_does_not_have_is_no_reason_to_refuse(tmp_path):
    """transformers gives it the next id, which no text needs and the model would not know."""
    path = shutil.copytree(TINY, tmp_path / "tiny")
    config = json.loads((path / "tokenizer_config.json").read_text())
    rows = json.loads((path / "config.json").read_text())["vocab_size"]
    have = Tokenizer.from_folder(path).backend.get_vocab_size()
    tokens = [f"<new{n}>" for n in range(rows - have + 3)]
    config["additional_special_tokens"] = tokens
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_folder(path)
    assert ours.backend.get_vocab_size() == rows
    assert ours.largest_id == rows - 1
    assert ours.chat_text(CHATS[0]) == Tokenizer.from_folder(TINY).chat_text(CHATS[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tidied", [False, True])
@settings(max_examples=150)
@given(seed=st.randoms(use_true_random=False), length=st.integers(1, 30))
def test_streams_of_any_ids_are_the_text_of_transformers(decoded, kind, tidied, seed, length):
    """Bytes that make no character, special tokens in between, ids without a token."""
    ours, theirs = decoded[kind, tidied]
    few = seed.sample(range(theirs.vocab_size + 2), 6)  # few, so that their order matters
    ids = [seed.choice(few) for _ in range(length)]
    expected = theirs.decode(ids, skip_special_tokens=True)
    pieces = list(ours.decode_stream(iter(ids)))
    assert "".join(pieces) == expected
    assert "" not in pieces


@settings(max_examples=500)
@given(st.lists(st.text(" .?!,'ntmsver", max_size=4), max_size=20))
def test_tidied_streams_are_the_text_that_transformers_tidies(pieces):
    text = "".join(pieces)
    theirs = transformers.PreTrainedTokenizerFast.clean_up_tokenization
    assert tidy(text) == theirs(None, text) == "".join(tidied(iter(pieces)))


@pytest.fixture(scope="module")
def decoded(tmp_path_factory, backends):
    pairs = {}
    for kind, backend in backends.items():
        for tidies in (False, True):
            path = tmp_path_factory.mktemp("decoded")
            config = {"clean_up_tokenization_spaces": tidies}
            folder_of(path, HFTokenizer.from_str(backend), **config)
            pairs[kind, tidies] = both(path)
    return pairs


def test_the_tokenizer_of_these_tests_and_of_tiny(tmp_path):
    for path in (TINY, write_tokenizer(tmp_path)):
        require_same_prompts(path)
        require_same_texts(path)
