"""Where a model is found: odd names, what lies beside it, and things that are no files."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DEFAULT, Recipe, make, save, write
from gguf_files import SHAPE, random_tensors, real_keys, write_real

from bitnet_edu import BitNetError, CheckpointError, InputError, load
from bitnet_edu.errors import printable
from bitnet_edu.files.config import ADVICE
from bitnet_edu.files.convert import convert
from bitnet_edu.files.hf import read_folder, write_folder
from bitnet_edu.files.hub import download
from bitnet_edu.files.source import TINY, find_model
from bitnet_edu.kernels.simd import MAX_COLUMNS
from bitnet_edu.weights import BitNetConfig, random_weights


def refuse(source, *words: str, error: type = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        load(source)
    message = str(caught.value)
    assert message.isprintable()
    for word in words:
        assert word in message, message


# Arguments.


@pytest.mark.parametrize("source", ["", b"tiny", None, 3, ["tiny"], "a\0b", True], ids=repr)
def test_what_names_no_model(source):
    refuse(source, "a model is named by text", error=InputError)


@pytest.mark.parametrize(
    "source", ["a/b/c", "./a", "..\\a", "a b/c", "\x1b[31m", "~nobody-x/m", "\ud800"]
)
def test_names_that_nothing_has(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refuse(source)


@pytest.mark.parametrize("options", [{"ternarize": "yes"}, {"ternarize": 1}], ids=str)
def test_options_of_a_wrong_type(options):
    with pytest.raises(InputError, match="ternarize"):
        load("tiny", **options)


@pytest.mark.parametrize("block", [64.0, "64", True, [64], 32], ids=repr)
def test_blocks_of_a_wrong_type(tmp_path, block):
    path = write_real(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="a block of I2_S must be 128"):
        load(str(path), i2s_block=block)
    with pytest.raises(InputError, match="an I2_S block has 128"):
        convert("tiny", tmp_path / "b.gguf", i2s_block=block)


@pytest.mark.parametrize(
    "destination", ["", None, b"m", 3, "a\0b", "\ud800", "n" * 300, "no/where"], ids=repr
)
def test_destinations_that_cannot_be(tmp_path, monkeypatch, destination):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BitNetError) as caught:
        convert("tiny", destination)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repo", [None, 3, b"a/b", ["a/b"]], ids=repr)
def test_names_of_a_wrong_type_on_the_hub(repo):
    with pytest.raises(InputError, match="named by text"):
        download(repo)


def test_names_that_are_too_long():
    refuse("n" * 300, "too long", "shorter")
    refuse("n/" * 5000 + "m.gguf", "too long", "shorter")


def test_a_path_and_a_home(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "model")
    assert load(tmp_path / "model").config == load("tiny").config
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/model") == tmp_path / "model"


# What lies beside a model.

COMPANIONS = {
    "._model.safetensors": b"\0\5\x16\7Mac OS X",
    "._config.json": b"\0\5\x16\7",
    ".DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf",
    "desktop.ini": b"[.ShellClassInfo]",
    "pytorch_model.bin": b"PK\3\4",
    "consolidated.00.pth": b"PK\3\4",
    "other.gguf": b"GGUF",
    "adapter.safetensors": b"half",
    "model.safetensors.index.json": b"{",
    "model.safetensors.index.json.lock": b"",
    "README.md": b"# A model",
    "config.json.bak": b"{",
}


def test_what_lies_beside_a_model_does_not_decide(tmp_path):
    write(tmp_path)
    expected = read_folder(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "model.safetensors").write_bytes(b"half")
    for name, content in COMPANIONS.items():
        (tmp_path / name).write_bytes(content)
        found = read_folder(find_model(str(tmp_path)))
        assert found[0] == expected[0]
        np.testing.assert_array_equal(found[1].embedding, expected[1].embedding)


def test_a_gguf_file_among_companions(tmp_path):
    path = write_real(tmp_path / "model.GGUF")
    for name in ("._model.gguf", ".DS_Store", "config.json", "tokenizer.json", "README.md"):
        (tmp_path / name).write_bytes(b"\0\5")
    (tmp_path / "folder.gguf").mkdir()
    assert find_model(str(tmp_path)) == path
    write_real(tmp_path / "other.gguf")
    refuse(str(tmp_path), "2 models", "model.GGUF, other.gguf", "name one")


def test_the_parts_of_a_split_file_are_named(tmp_path):
    keys = real_keys()
    kind = keys["general.file_type"][0]
    keys |= {"split.count": (kind, 2), "split.no": (kind, 0)}
    for part in (1, 2):
        write_real(tmp_path / f"m-0000{part}-of-00002.gguf", random_tensors(), keys)
    refuse(str(tmp_path), "m-00001-of-00002.gguf is one of 2 parts", "--merge")
    refuse(str(tmp_path / "m-00002-of-00002.gguf"), "m-00002-of-00002.gguf is one of 2 parts")


def test_pickled_weights_are_refused_by_name(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refuse(str(tmp_path), "pytorch_model.bin", "no safetensors")


def test_buffers_that_transformers_ignores(tmp_path):
    config, tensors = make()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save(tmp_path, config, tensors | {name: np.ones(6, np.float64)})
    np.testing.assert_array_equal(
        read_folder(tmp_path)[1].embedding, tensors["model.embed_tokens.weight"]
    )


# Things that are no files.


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.mkdir()


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_dangling(path: Path) -> None:
    path.symlink_to("nothing")


def put_loop(path: Path) -> None:
    path.symlink_to(path.name)


def put_nothing(path: Path) -> None:
    path.touch()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has none of these")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "put", [put_fifo, put_folder, put_device, put_dangling, put_loop, put_nothing]
)
def test_things_that_are_no_files_in_a_folder(tmp_path, name, put):
    write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    put(tmp_path / name)
    refuse(str(tmp_path), name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has none of these")
@pytest.mark.parametrize("put", [put_fifo, put_device, put_dangling, put_loop, put_nothing])
def test_things_that_are_no_gguf_files(tmp_path, put):
    put(tmp_path / "m.gguf")
    refuse(str(tmp_path / "m.gguf"), "m.gguf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("code", ADVICE, ids=errno.errorcode.get)
def test_what_the_system_refuses_is_told_with_advice(tmp_path, monkeypatch, name, code):
    write(tmp_path)
    original = Path.open

    def refused(self: Path, *args, **options):
        if self.name == name:
            raise OSError(code, os.strerror(code), str(self))
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    refuse(str(tmp_path), name, os.strerror(code), ADVICE[code])


# Names that a terminal would obey.


def test_names_never_reach_a_terminal_raw(tmp_path):
    folder = tmp_path / "a\x1b[31m\nb\udc80"
    config, tensors = make()
    save(tmp_path / "m", config, tensors | {"evil\x1b]0;title\x07\r\n": np.ones(3, np.float32)})
    refuse(str(tmp_path / "m"), r"evil\x1b]0;title\x07\r\n")
    save(tmp_path / "m", config | {"model_type": "\x1b[2J\u202e"}, tensors)
    refuse(str(tmp_path / "m"), r"\x1b[2J\u202e")
    (tmp_path / "m").rename(folder)
    refuse(str(folder), r"a\x1b[31m\nb\udc80")


def test_long_names_are_cut():
    message = str(CheckpointError("start " + "x" * 10**6 + " end"))
    assert len(message) < 2100
    assert message.startswith("start xx")
    assert message.endswith("xx end")
    assert printable("naïve 中文") == "naïve 中文"


# Numbers that ask for too much.


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"max_position_embeddings": 10**8}, ["config.json", "16777216", "100000000"]),
        ({"max_position_embeddings": 2**31 - 1}, ["config.json", "16777216"]),
        ({"vocab_size": 2**31 - 1}, ["model.safetensors", "embed_tokens", "[2147483647, 72]"]),
        ({"num_hidden_layers": 10**6}, ["model.safetensors", "model.layers.2", "no such tensor"]),
        ({"bos_token_id": 299}, ["config.json", "bos_token_id", "below 299", "found 299"]),
        ({"eos_token_id": [1, 300]}, ["config.json", "eos_token_id", "300"]),
        ({"eos_token_id": -1}, ["config.json", "eos_token_id", "-1"]),
        ({"eos_token_id": True}, ["config.json", "eos_token_id", "True"]),
    ],
    ids=str,
)
def test_numbers_beyond_reason(tmp_path, edit, words):
    config, tensors = make()
    refuse(str(save(tmp_path, config | edit, tensors)), *words)


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "x"}', '{"eos_token_id": 999}', "[", '{"bos_token_id": 999}']
)
def test_faults_of_generation_config_are_its_own(tmp_path, content):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    refuse(str(tmp_path), f"{tmp_path / 'generation_config.json'}")


def test_default_ids_that_a_small_vocabulary_lacks_are_none(tmp_path):
    config, tensors = make()
    for key in ("bos_token_id", "eos_token_id"):
        del config[key]
    found = read_folder(save(tmp_path, config, tensors))[0]
    assert (found.bos_token_id, found.eos_token_ids) == (None, ())


def test_keys_that_stand_twice(tmp_path):
    write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 8, ' + path.read_text().removeprefix("{"))
    refuse(str(tmp_path), "config.json", "'hidden_size' appears twice")


def test_rows_longer_than_the_kernels_add_up(tmp_path):
    shape = BitNetConfig(8, 4, MAX_COLUMNS + 1, 1, 1, 1, 16, 1e4, 1e-5, 0, (1,))
    write_folder(tmp_path / "wide", shape, random_weights(shape))
    refuse(str(tmp_path / "wide"), str(tmp_path / "wide"), str(MAX_COLUMNS))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tables_that_are_not_finite(tmp_path, name, value):
    config, tensors = make(DEFAULT._replace(tied=False))
    tensors[name][5, 7] = value
    refuse(str(save(tmp_path, config, tensors)), "model.safetensors", name, "NaN or Inf in 1 place")


# Memory and open files.

MANY = """
import os, resource, sys
import bitnet_edu
from bitnet_edu.files.source import read_model
from pathlib import Path
read_model(Path(sys.argv[1]))
limit = len(os.listdir("/proc/self/fd")) + 8
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
kept = [read_model(Path(path)) for path in sys.argv[1:] for _ in range(2)]
print(len(kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted by Linux's means")
def test_a_file_takes_one_descriptor(tmp_path):
    shape = BitNetConfig(64, 64, 128, 30, 2, 1, 64, 1e4, 1e-5, 0, (1,))
    write_folder(tmp_path / "deep", shape, random_weights(shape))
    gguf = write_real(tmp_path / "deep.gguf", random_tensors(SHAPE), real_keys(SHAPE))
    run = [sys.executable, "-c", MANY, str(tmp_path / "deep"), str(gguf)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr[-800:]


@pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
def test_no_descriptor_left_is_said(tmp_path):
    write(tmp_path)
    find_model(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
        while True:
            try:
                opened.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        with pytest.raises(BitNetError, match=r"Too many open files.*ulimit -n"):
            read_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in opened:
            os.close(file)


def test_tensors_at_odd_bytes_are_read(tmp_path):
    """The format allows them, and some writers don't pad their header."""
    write(tmp_path, Recipe("online"))
    path = tmp_path / "model.safetensors"
    expected = read_folder(tmp_path)[1]
    before, content = [np.array(expected.embedding), expected.layers[0]], path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:size])).encode()
    header += b" " * (1 - len(header) % 2)
    path.unlink()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[size:])
    found = read_folder(tmp_path)[1]
    np.testing.assert_array_equal(found.embedding, before[0])
    assert found.embedding.flags.aligned
    np.testing.assert_array_equal(found.layers[0].q_proj.packed, before[1].q_proj.packed)
