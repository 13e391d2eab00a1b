"""Damaged tokenizers, templates, messages and options: a `BitNetError` or a right answer, and soon.

The tokenizers library may end the process, so the cases run in children with little memory.
"""

import contextlib
import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kinds_of_tokenizers import KINDS, SIMPLE, folder_of
from tokenizers import Tokenizer as HFTokenizer

from bitnet_edu.errors import BitNetError
from bitnet_edu.generate import require_request, split_stop, token_ids
from bitnet_edu.sampling import Sampling
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.weights import BitNetConfig

SECONDS = 20  # for one case; most take a millisecond
TEXTS = ("Hello there!", "aaaa   bbbb\n\n", "é🙂 中文\0\ufffd", "<s>Hello</s>" * 20, "")
ODD = [
    *(
        None,
        True,
        -1,
        0,
        1,
        7,
        2**31,
        2**32,
        2**64,
        1e308,
        -0.5,
        [],
        {},
        [[]],
        [None],
        "",
        "a",
        " ",
    ),
    *("▁", "x" * 3000, "<s>", "(a+)+b", "(", "Hello", {"String": ""}, {"Regex": ""}),
    *({"String": "a"}, {"Regex": "(a|aa)+$"}, {"Regex": "."}, {"id": "A", "type_id": 0}),
]
PARTS = [
    {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAAAAAAAYQA="},
    {"precompiled_charsmap": "/////w=="},
    {"type": "Prepend", "prepend": "x" * 100},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "abc"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Strip", "content": " ", "start": 3, "stop": 3},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": True},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Contiguous", "invert": False},
    {"type": "FixedLength", "length": 0},
    {"type": "FixedLength", "length": 3},
    {"type": "Digits", "individual_digits": True},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "NFKD"},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "q", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {},
    },
    {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 10**6]},
    {"type": "WordPiece", "unk_token": "zz", "vocab": {"a": 0}, "max_input_chars_per_word": 2},
    {"type": "WordLevel", "unk_token": "zz", "vocab": {"a": 2**32 - 1}},
    {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]], "byte_fallback": True},
    {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a", 1e300]]},
    {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": 1.0},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True, "unk_token": "zz"},
]
TEMPLATES = [
    SIMPLE,
    "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n else '' }}{% endmacro %}{{ m(60) }}",
    "{{ messages | tojson(indent=2) }}{{ 'x' | center(20) }}{{ '%5d' % 3 }}{{ 9 ** 9 ** 3 }}",
    "{{ ('a' * 1000) | replace('a', 'b' * 1000) | length }}{{ messages[0].content.split() }}",
    "{% generation %}{{ messages[-1]['content'] | trim }}{% endgeneration %}{{ eos_token }}",
]
SCRAPS = [
    *(
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "{# ",
        "| list ",
        "* 99999999 ",
        "** 99 ",
        "~ ",
        "(",
        ")",
        "[",
        "]",
    ),
    *(
        "{% for x in messages %}",
        "{% endfor %}",
        "{% if x %}",
        "{% endif %}",
        "messages",
        "range(9 ** 6)",
    ),
    *(
        "| tojson",
        "| join('x' * 999)",
        ".center(10 ** 9)",
        "['__class__']",
        ".__class__",
        "| attr('x')",
    ),
    *(
        "raise_exception('no')",
        "strftime_now('%Y' * 99)",
        "{% set x = [x, x] %}",
        "| sum(start=[])",
        "\ud800",
    ),
    *(
        "loop",
        "self",
        "namespace()",
        "dict(x=1)",
        "-1",
        "1.5",
        "'é'",
        "none",
        "{% include 'x' %}",
        "\n",
        "\0",
    ),
]


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    if not isinstance(value, dict | list):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items)[:40]:
        yield from places(inner, (*path, key))


def damaged(rng: random.Random, value: dict) -> dict:
    """A copy with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        *path, key = rng.choice([path for path in places(value) if path])
        parent = value
        for step in path:
            parent = parent[step]
        action = rng.random()
        if action < 0.15:
            del parent[key]
        elif action < 0.3 and isinstance(parent, list):
            parent[key:key] = [copy.deepcopy(parent[key])] * rng.choice((1, 2, 50))
        elif action < 0.65:
            parent[key] = copy.deepcopy(rng.choice(ODD))
        else:
            parent[key] = copy.deepcopy(rng.choice(PARTS))
    return value


FITTING = {
    "normalizer": ("Precompiled", "Prepend", "Replace", "Strip", "NFKD", "ByteLevel"),
    "pre_tokenizer": ("ByteLevel", "Metaspace", "Split", "FixedLength", "Digits"),
    "decoder": ("Strip", "CTC", "WordPiece", "BPEDecoder", "ByteFallback", "Fuse", "Replace"),
    "post_processor": ("TemplateProcessing", "BertProcessing"),
    "model": ("WordPiece", "WordLevel", "Unigram", "BPE"),
}
ROWS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def with_parts(rng: random.Random, value: dict) -> dict:
    """A copy with one or two parts replaced by odd ones, alone or in a row."""
    value = dict(value)
    for name in rng.sample(sorted(FITTING), rng.choice((1, 1, 2))):
        fitting = [part for part in PARTS if part.get("type") in FITTING[name]]
        part = rng.choice(fitting)
        if name in ROWS and rng.random() < 0.4:
            row = [rng.choice(fitting), part] * rng.choice((1, 1, 6, 20))
            part = {"type": "Sequence", ROWS[name]: row}
        value[name] = part
    return value


def scrambled(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.choices(range(len(text) + 1), k=2))
        end = min(end, at + rng.randint(0, 12))
        text = text[:at] + rng.choice(["", *SCRAPS]) + text[end:]
    return text


def tokenizer_case(rng: random.Random, folder: Path, bases: list[dict]) -> None:
    """A folder with something wrong in one of its files, used in every way."""
    base = rng.choice(bases)
    change = rng.choice((damaged, with_parts, with_parts))
    text = json.dumps(change(rng, base))
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(("", "\0", '"', "9", "}"))
            + text[at + rng.choice((0, 1, 10**9)) :]
        )
    (folder / "tokenizer.json").write_text(text)
    config = {"bos_token": "<s>", "pad_token": "<pad>", "chat_template": SIMPLE}
    config |= {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}}}
    config = damaged(rng, config) if rng.random() < 0.3 else config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    use(Tokenizer.from_folder(folder))


def use(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text)
            assert tokenizer.encode(text) == ids or '"dropout"' in tokenizer.backend.to_str()
            if len(ids) < 5000:
                whole = tokenizer.decode(ids)
                assert "".join(tokenizer.decode_stream(iter(ids))) == whole
        except BitNetError:
            pass
    tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])


def template_case(rng: random.Random, backend: str) -> None:
    template = scrambled(rng, rng.choice(TEMPLATES))
    tokenizer = Tokenizer(HFTokenizer.from_str(backend), template, "<s>", "</s>")
    text = tokenizer.chat_text([{"role": "user", "content": rng.choice(TEXTS)}])
    text.encode("utf-8")


def child(kind: str, first: int, last: int, folder: str) -> None:
    """Run cases; the last line that is printed says which one was begun last, and when."""
    try:
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * 2**30,) * 2)
    except (ImportError, OSError):
        pass  # no limits, then, on this system
    path = Path(folder)
    backends = [(path / f"{name}.json").read_text() for name in KINDS]
    bases = [json.loads(backend) for backend in backends]
    for seed in range(first, last):
        print("case", seed, flush=True)
        rng, start = random.Random(seed), time.monotonic()
        with contextlib.suppress(BitNetError):
            if kind == "tokenizer":
                tokenizer_case(rng, path, bases)
            else:
                template_case(rng, backends[0])
        assert time.monotonic() - start < SECONDS
    print("done", flush=True)


@pytest.mark.parametrize(("kind", "cases"), [("tokenizer", 2000), ("template", 1200)])
def test_damaged_files_end_in_one_error_or_work(tmp_path, kind, cases):
    for name, make in KINDS.items():
        (tmp_path / f"{name}.json").write_text(make().to_str())
    code = f"import test_fuzz_text as t; t.child({kind!r}, 0, {cases}, {str(tmp_path)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
        timeout=500,
    )
    said = result.stdout.decode(errors="replace").splitlines()
    assert said[-1:] == ["done"], (said[-1:], result.returncode, result.stderr[-2000:].decode())


CONFIG = BitNetConfig(100, 8, 8, 1, 1, 1, 16, 1e-5, 1e4, 0, (1,))
VALUES = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        5,
        99,
        100,
        2**40,
        2**64,
        -0.5,
        0.5,
        1.5,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "a",
        "5",
        b"",
        b"5",
        [],
        [1],
        [True],
        [1.5],
        [[1], [2, 3]],
        ["a", 1],
        {1: 2},
        {"role": 1},
    ),
    *(range(3), (1, 2), {1, 2}, object(), print, 1j, [None], ["\ud800"], [10**30], [b"a"]),
]


def test_options_of_any_type_are_refused_in_one_way_or_right():
    rng = random.Random(0)
    for _ in range(3000):
        a, b, c, d = (rng.choice(VALUES) for _ in range(4))
        try:
            good = Sampling(a, b, c, d)
        except BitNetError:
            pass
        else:
            assert good.temperature >= 0
            assert good.top_k is None or good.top_k >= 1
        for check in (
            lambda a=a, b=b, c=c: require_request(a, b, c),
            lambda a=a: split_stop(a, CONFIG),
            lambda a=a: token_ids(a, CONFIG.vocab_size),
        ):
            with contextlib.suppress(BitNetError):
                check()


def test_messages_of_any_type_are_refused_in_one_way_or_written():
    tokenizer, rng = Tokenizer(KINDS["byte-level"]()), random.Random(0)
    keys = ["role", "content", "name", 5, None, "thinking", "\ud800"]
    for _ in range(2000):
        messages = [
            {rng.choice(keys): rng.choice([*VALUES, "user", "Hello"]) for _ in range(4)}
            | rng.choice([{}, {"role": "user"}, {"role": "user", "content": "Hello"}])
            for _ in range(rng.randint(0, 2))
        ]
        messages = rng.choice([messages, messages, messages, rng.choice(VALUES)])
        try:
            ids = tokenizer.apply_chat_template(messages)
        except BitNetError:
            continue
        assert "Assistant: ".endswith(tokenizer.decode(ids)[-5:])


def test_a_message_that_holds_itself():
    tokenizer, message = Tokenizer(KINDS["byte-level"]()), {"role": "user", "content": "Hello"}
    message["more"] = message
    with pytest.raises(BitNetError):
        tokenizer.chat_text([message])


def test_a_folder_that_nothing_happened_to(tmp_path):
    """The cases would all pass if every folder were refused."""
    for make in KINDS.values():
        use(Tokenizer.from_folder(folder_of(tmp_path, make(), SIMPLE)))
