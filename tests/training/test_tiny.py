"""The committed model: its size, its files, and that it still answers what its report says."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitnet_edu
from bitnet_edu.files.source import TINY
from bitnet_edu.training.report import spot_check


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((TINY / "training_report.json").read_text(encoding="utf-8"))


def test_size(report) -> None:
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert sum(sizes.values()) < 4_000_000
    assert set(sizes) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_report.json",
    }
    assert report["weight_bytes"] == sizes["model.safetensors"]


def test_transformers_loads_it_and_it_knows_its_subject() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    chat = [{"role": "user", "content": "What is a ternary weight?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_length=None, max_new_tokens=40)
    reply = tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert "-1, 0 or +1" in reply


def test_it_answers_the_committed_share(report) -> None:
    marks, committed = spot_check(bitnet_edu.load("tiny")), report["spot_check"]
    assert marks["asked"] == committed["asked"]
    # another machine's rounding may turn one answer in a hundred
    assert marks["right"] >= committed["right"] - 0.01 * committed["asked"]
    assert report["question_accuracy"] > 0.85
