"""`bitnet-edu train`, from a file to a model that chats, converts and is verified."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import bitnet_edu
from bitnet_edu import cli
from bitnet_edu.files.source import TINY
from bitnet_edu.training import job
from bitnet_edu.training.train import new_tokenizer

TOY = {"vocab_size": 400, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
TOY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
QUICK = ["--steps", "3", "--rows", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(job, "SMALL", replace(job.SMALL, **TOY))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = [{"prompt": f"Who sits at {n}?", "response": f"Pupil {n + 3}."} for n in range(12)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def test_from_scratch_on_conversations(tmp_path, chats, capsys) -> None:
    out = tmp_path / "deep" / "out"
    arguments = ["train", str(chats), "--out", str(out), *QUICK, "--steps", "40", "--json"]
    assert cli.main(arguments) == 0
    printed, progress = capsys.readouterr()
    found = json.loads(printed)
    assert printed.count("\n") == 1
    assert found["held_out_loss_after"] < 0.9 * found["held_out_loss_before"]
    assert found["steps"] == 40
    assert found["tokens"] == 40 * 2 * 128
    assert (found["documents"], found["held_out_documents"]) == (11, 1)
    assert "40/40: loss" in progress
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "training.csv",
        "training.json",
    }
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    assert "".join(bitnet_edu.ChatSession(bitnet_edu.load(str(out))).send("Who sits at 2?"))
    assert cli.main(["convert", str(out), str(tmp_path / "m.gguf")]) == 0
    assert cli.main(["verify", str(out), "--tokens", "12", "--json"]) == 0


def test_from_tiny_keeps_its_tokenizer_and_its_world(tmp_path, chats, capsys, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(job.own, "mixed", lambda *streams: seen.append(streams) or streams[0])
    out = tmp_path / "out"
    assert cli.main(["train", str(chats), "--from", "tiny", "--out", str(out), *QUICK]) == 0
    assert "talk to it: bitnet-edu chat" in capsys.readouterr().out
    assert len(seen) == 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (TINY / name).read_bytes()
    assert bitnet_edu.load(str(out)).config == bitnet_edu.load("tiny").config


def test_the_books_own_corpus(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(job, "new_tokenizer", partial(new_tokenizer, documents=500))
    out = tmp_path / "out"
    assert cli.main(["train", "--out", str(out), *QUICK, "--rows", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out_documents"] > 100


def mistakes(tmp_path, chats):
    text = tmp_path / "text.txt"
    text.write_text("One.\n\nTwo.")
    (tmp_path / "empty").write_text("")
    (tmp_path / "there").mkdir()
    out = ["--out", str(tmp_path / "out")]
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a", "response": "b " * 2000}) + "\n")
    return {
        "a missing corpus": [str(tmp_path / "missing"), *out],
        "an empty corpus": [str(tmp_path / "empty"), *out],
        "nothing held out": [str(text), *out, "--held-out", "0"],
        "all held out": [str(text), *out, "--held-out", "1"],
        "no number": [str(text), *out, "--held-out", "nan"],
        "a share of the book's": [*out, "--held-out", "0.1"],
        "past the context": [str(long), *out],
        "past the rows": [str(long), *out, "--length", "64"],
        "rows past the context": [str(text), *out, "--length", "1024"],
        "no steps": [str(text), *out, "--steps", "0"],
        "no rows": [str(text), *out, "--rows", "-1"],
        "no length": [str(text), *out, "--length", "0"],
        "no rate": [str(text), *out, "--learning-rate", "0"],
        "a rate that is none": [str(text), *out, "--learning-rate", "nan"],
        "a negative seed": [str(text), *out, "--seed", "-1"],
        "no threads": [str(text), *out, "--threads", "0"],
        "a folder that is there": [str(text), "--out", str(tmp_path / "there")],
        "nothing to resume": [str(text), "--out", str(tmp_path / "there"), "--resume"],
        "a file in the way": [str(text), "--out", f"{text}/out"],
        "an unwritable place": [str(text), "--out", "/proc/out"],
        "no such model": [str(text), *out, "--from", "no/such/model"],
        "no out": [str(text)],
        "an empty out": [str(text), "--out", ""],
    }


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, chats, capsys) -> None:
    cases = mistakes(tmp_path, chats)
    before = sorted(tmp_path.rglob("*"))
    for case, arguments in cases.items():
        try:
            status = cli.main(["train", *arguments])
        except SystemExit as error:  # from argparse
            status = error.code
        printed, said = capsys.readouterr()
        assert (status, printed, said.count("\n")) == (2, "", 1), case
        assert said.startswith("bitnet-edu")
        assert sorted(tmp_path.rglob("*")) == before, case


def test_without_torch_it_says_what_to_install(tmp_path) -> None:
    code = "import sys; sys.modules['torch'] = None; from bitnet_edu import cli; cli.command()"
    command = [sys.executable, "-c", code, "train", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "training needs torch" in line
    assert "pip install 'bitnet-edu[verify]'" in line


def test_ctrl_c_says_how_to_go_on(tmp_path, chats, capsys, monkeypatch) -> None:
    def interrupt(self):
        raise KeyboardInterrupt

    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(job.Training, "advance", interrupt)
        assert cli.main(["train", str(chats), "--out", out, *QUICK]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    again = ["train", str(chats), "--out", out, *QUICK, "--resume", "--json"]
    assert cli.main(again) == 0
    first = json.loads(capsys.readouterr().out)
    assert cli.main(again) == 0  # there is nothing left to do
    assert json.loads(capsys.readouterr().out) == first
    assert cli.main([*again, "--seed", "1"]) == 2
    assert "seed 0 instead of 1" in capsys.readouterr().err
