"""Damage a small model in a seeded way and load it: `python fuzz.py KIND COUNT SEED FOLDER`.

The rule: `BitNetError`, or a right answer. Each input has 20 seconds and all have 1 GB of memory.
Prints the number of inputs that loaded; whatever else is printed or raised is a finding.
"""

import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import gguf_files
import numpy as np
from safetensors import deserialize

from bitnet_edu import BitNetError
from bitnet_edu.files.gguf import SCALARS, _Parser
from bitnet_edu.files.hf import MATRICES
from bitnet_edu.files.source import find_model, read_model
from bitnet_edu.model import BitNet

SECONDS = 20
MEMORY = 2**30
NASTY = [
    *(0, -1, 1, 2, 3, 4, 5, 7, 64, 127, 128, 255, 256, 2**16, 2**24, 2**31 - 1, 2**31, 2**32),
    *(2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e300, 4.0),
    *(
        float("nan"),
        float("inf"),
        None,
        True,
        False,
        "",
        "x",
        "\ud800",
        "\x1b[31m\n",
        "0",
        "a" * 999,
    ),
    *([], {}, [[]], [1], [[1, [2]]], {"a": {}}, [0] * 70, [None], ["x"], [1, 2, 3, 4], [2**63, 0]),
    *(
        "../../etc/passwd",
        "/dev/zero",
        "model.safetensors",
        "bitnet",
        "BF16",
        "F32",
        "U8",
        "default",
    ),
]


def main(kind: str, count: int, seed: int, folder: Path) -> None:
    origins = make(kind, folder / "origins")
    damage = {"safetensors": damage_safetensors, "config": damage_config, "gguf": damage_gguf}[kind]
    for origin in origins:
        load(origin)  # whatever is compiled or imported is so before memory is counted
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, too_long)
    loaded = 0
    for number in range(count):
        rng = random.Random(f"{kind} {seed} {number}")
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        origin = rng.choice(origins)
        shutil.copytree(origin, case)
        what = f"{origin.name}, {damage(case, rng)}"
        signal.alarm(SECONDS)
        try:
            loaded += check(kind, origin.name, case)
        except BaseException:
            print(f"{kind} {seed} {number}: {what}", flush=True)
            raise
        finally:
            signal.alarm(0)
    print(loaded)


def too_long(*_: Any) -> None:
    raise AssertionError(f"more than {SECONDS} seconds")


def load(path: Path) -> tuple:
    config, weights, _ = read_model(find_model(str(path)))
    return config, weights, BitNet(config, weights).logits(np.arange(2) % config.vocab_size)


def check(kind: str, form: str, case: Path) -> bool:
    """Whether it loads. If so, the answer must be right: what the file says, in finite numbers."""
    try:
        config, weights, logits = load(case)
    except BitNetError as error:
        if not str(error).isprintable():
            raise AssertionError(repr(error)) from error
        return False
    assert logits.shape == (2, config.vocab_size)
    if kind == "config":  # elsewhere numbers may have become huge, and say so
        assert np.isfinite(logits).all()
    single = case / "model.safetensors"
    if single.exists():
        stored = {name: about["data"] for name, about in deserialize(single.read_bytes())}
        assert weights.embedding.tobytes() == stored["model.embed_tokens.weight"]
    if single.exists() and form in ("packed", "divide"):
        for index, layer in enumerate(weights.layers):
            for field, name in MATRICES.items():
                packed = getattr(layer, field).packed.tobytes()
                assert packed == stored[f"model.layers.{index}.{name}.weight"]
    return True


def make(kind: str, folder: Path) -> list[Path]:
    """Whole models of different forms, to be damaged."""
    folder.mkdir(parents=True)
    if kind == "gguf":
        return [make_gguf(folder / form, form) for form in ("F16", "Q8_0", "Q6_K")]
    forms = [("packed", True), ("divide", False), ("unpacked", True), ("online", False)]
    shards = 2 if kind == "config" else 1
    recipes = [checkpoints.Recipe(scheme, tied=tied, shards=shards) for scheme, tied in forms]
    origins = [checkpoints.write(folder / recipe.scheme, recipe) for recipe in recipes]
    for origin in origins:
        ends = '{"bos_token_id": 0, "eos_token_id": [1, 2]}'
        (origin / "generation_config.json").write_text(ends)
    return origins


def make_gguf(folder: Path, form: str) -> Path:
    shape = gguf_files.SHAPE._replace(num_hidden_layers=1, hidden_size=256)
    tensors = gguf_files.random_tensors(shape)
    if form != "F16":
        size = shape.vocab_size, shape.hidden_size
        tensors["token_embd.weight"], _ = gguf_files.quantized(form, *size)
        tensors["output.weight"], _ = gguf_files.quantized(form, *size, seed=1)
    folder.mkdir()
    gguf_files.write_real(folder / "model.gguf", tensors, gguf_files.real_keys(shape))
    return folder


def damage_config(case: Path, rng: random.Random) -> str:
    names = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    path = case / rng.choice([names[0], *names])
    content = path.read_bytes()
    if rng.random() < 0.7:
        path.write_bytes(dump(damage_json(json.loads(content), rng)))
    else:
        path.write_bytes(damage_bytes(content, rng))
    return f"{path.name}: {path.read_bytes()[:2000]!r}"


def damage_safetensors(case: Path, rng: random.Random) -> str:
    path = case / "model.safetensors"
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header, data = content[8:size], content[size:]
    way = rng.randrange(5)
    if way == 0:
        header = dump(damage_json(json.loads(header), rng))
    elif way == 1:
        header = damage_bytes(header, rng)
    elif way == 2:
        data = damage_bytes(data, rng)
    length = len(header) if way != 3 else rng.choice([*range(9), size + 1, 2**31, 2**63, 2**64 - 1])
    content = length.to_bytes(8, "little") + header + data
    path.write_bytes(damage_bytes(content, rng) if way == 4 else content)
    return f"way {way}: {path.read_bytes()[:6000]!r}"


def damage_gguf(case: Path, rng: random.Random) -> str:
    path = case / "model.gguf"
    content = path.read_bytes()
    end = content.index(b"token_embd.weight") + 2000  # of the header, about
    way = rng.randrange(6)
    if way == 0:
        content = content[: rng.randrange(len(content))]
    elif way > 3:  # whole values become others, the rest stays right
        content = damage_keys(content, rng)
    elif way == 1:  # a number in the header becomes another
        place, width = rng.randrange(4, end), rng.choice([4, 8])
        number = rng.choice([n for n in NASTY if type(n) is int and 0 <= n < 2**64])
        number = (number % 2 ** (8 * width)).to_bytes(width, "little")
        content = content[:place] + number + content[place + width :]
    elif way == 2:  # near the keys of the shape and the table of tensors, where it hurts
        near = [
            b"bitnet-b1.58.",
            b"tokenizer.ggml.",
            b"general.",
            b"blk.0.",
            b"token_embd",
            b"output",
        ]
        word = rng.choice(near)
        places = [i for i in range(end) if content.startswith(word, i)]
        place = rng.choice(places) + rng.randrange(-12, 60)
        content = (
            content[:place] + damage_bytes(content[place : place + 16], rng) + content[place + 16 :]
        )
    else:
        content = damage_bytes(content[:end], rng) + content[end:]
    path.write_bytes(content)
    return f"way {way}, {len(content)} bytes"


def damage_keys(content: bytes, rng: random.Random) -> bytes:
    metadata, infos = _Parser(content).header()
    table = content.index(gguf_text("token_embd.weight"))
    start = min(info.offset for info in infos.values())
    end = table + sum(len(name) + 24 + 8 * len(info.shape) for name, info in infos.items())
    values = {key: kv_bytes(value) for key, value in metadata.items()}
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(values))
        way = rng.randrange(4)
        if way == 0:
            del values[key]
        elif way == 1:
            values[rng.choice([*values, "split.count", "tokenizer.ggml.pre"])] = values.pop(key)
        else:
            values[key] = kv_bytes(rng.choice(GGUF_VALUES))
    head = content[:16] + struct.pack("<Q", len(values))
    head += b"".join(gguf_text(key) + value for key, value in values.items()) + content[table:end]
    return head + bytes(-len(head) % 32) + content[start:]


def gguf_text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def kv_bytes(value: Any) -> bytes:
    """A GGUF value: its type, then itself."""
    if isinstance(value, np.ndarray):
        kind = list(SCALARS.values()).index(value.dtype.char.replace("l", "q").replace("L", "Q"))
        return struct.pack("<IIQ", 9, list(SCALARS)[kind], value.size) + value.tobytes()
    if isinstance(value, list):
        parts = [kv_bytes(part) for part in value]
        kind = parts[0][:4] if parts else struct.pack("<I", 8)
        body = b"".join(part[4:] for part in parts)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + body
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<IQ", 10, value) if value >= 0 else struct.pack("<Iq", 11, value)


GGUF_VALUES = [
    *(0, 1, 2, 4, 7, 64, 128, 255, 2**31 - 1, 2**31, 2**40, 2**64 - 1, -1, -(2**63)),
    *(0.0, 1.5, float("nan"), float("inf"), -1.0, True, False, "", "x", "\x1b[2J", "llama-bpe"),
    *("none", "gpt2", "{{ 1/0 }}", "{% for %}", "{}", "a" * 5000, [], ["a", "b"], ["a"] * 320),
    *([["a"], ["b", "c"]], [[[["a"]]]], [[[[[[["a"]]]]]]], np.arange(0), np.arange(320)),
    *(np.ones(320, np.float32), np.zeros(320, np.int8), np.full(320, 99, np.uint32)),
    *(np.full(3, 2**63, np.uint64), np.ones(5, bool), np.full(4, np.nan, np.float64)),
]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(content)) if content else 0
        length = rng.choice([1, 1, 4, 8, 100])
        part = content[place : place + length]
        ways: list[Callable[[], bytes]] = [
            lambda part=part: rng.randbytes(len(part)),
            lambda part=part: bytes(byte ^ 1 << rng.randrange(8) for byte in part),
            lambda: b"",
            lambda part=part: bytes(part * 2),
            lambda part=part: b"\xff" * len(part),
            lambda part=part: bytes(len(part)),
        ]
        content[place : place + length] = rng.choice(ways)()
        if rng.random() < 0.1:
            del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


def damage_json(value: Any, rng: random.Random) -> Any:
    """Change a few places of a tree."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        node = value
        while node and rng.random() < 0.8:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key]:
                break
            node = node[key]
        if not node or not isinstance(node, dict | list):
            return rng.choice(NASTY)
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        way = rng.randrange(6)
        if way == 0:
            del node[key]
        elif way == 1 and isinstance(node, dict):
            node[rng.choice([*node, "x", "\x1b", "head_dim", "rope_scaling"])] = node.pop(key)
        elif way == 2 and isinstance(node, dict):
            node["twice"] = node[key]
        elif way == 3 and type(node[key]) is int:
            node[key] += rng.choice([-4, -1, 1, 4, 2**31, 2**64])
        else:
            node[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
