"""Batches, the schedule, and a whole quick training from corpus to exported folder."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitnet_edu import load
from bitnet_edu.errors import InputError
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE, Tokenizer
from bitnet_edu.training.corpus import held_out_questions
from bitnet_edu.training.data import (
    IGNORED,
    Batches,
    chat_pieces,
    encode,
    exam_batch,
    finite_batches,
)
from bitnet_edu.training.evaluate import ask
from bitnet_edu.training.export import export
from bitnet_edu.training.model import BitNetForTraining, ModelShape, new_model
from bitnet_edu.training.tokenizer import BEGIN, END, END_OF_TURN
from bitnet_edu.training.train import (
    Recipe,
    held_out_loss,
    learning_rate,
    mean_loss,
    new_tokenizer,
    own_corpus,
    train,
    weight_decay,
)

SHAPE = ModelShape(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
CHAT = [
    {"role": "user", "content": " What is 3 + 4? "},
    {"role": "assistant", "content": "3 + 4 = 7."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer(SHAPE, seed=0, documents=2000)


def test_schedule_has_two_stages() -> None:
    recipe = Recipe(steps=1000, peak_rates=(2e-3, 1e-3), warmup=10)
    rates = [learning_rate(step, recipe) for step in range(1000)]
    assert rates.index(max(rates)) == 9
    assert rates[499] == pytest.approx(2 * rates[500], rel=0.01)
    assert rates[999] == pytest.approx(1e-6)
    assert [weight_decay(step, recipe) for step in (0, 499, 500, 999)] == [0.1, 0.1, 0, 0]


def test_only_the_assistant_counts(tokenizer) -> None:
    ids, targets = encode(tokenizer, [{**CHAT[0], "content": "What is 3 + 4?"}, CHAT[1]])
    counted = [target for target in targets if target != IGNORED]
    assert tokenizer.decode(counted, skip_special_tokens=False) == f"3 + 4 = 7.{END_OF_TURN}"
    assert all(
        target in (IGNORED, following)
        for target, following in zip(targets, [*ids[1:], None], strict=True)
    )


def batches(tokenizer, seed: int = 1) -> Batches:
    return Batches(own_corpus(seed), tokenizer, rows=8, length=128, long_every=6)


def test_batches_are_packed_and_repeatable(tokenizer) -> None:
    first, second = ([next(b) for _ in range(6)] for b in (batches(tokenizer), batches(tokenizer)))
    assert [b.ids.shape for b in first] == [(8, 128)] * 5 + [(2, 512)]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.mask, other.mask)
    begin = tokenizer.token_id("<|begin_of_text|>")
    seen = first[0].mask[0, 0].sum(-1)  # every query sees its document up to itself
    starts = (first[0].ids[0] == begin).nonzero()[:, 0]
    assert (seen[starts] == 1).all()
    assert first[0].mask.triu(1).sum() == 0


@pytest.mark.parametrize("number", [0, 1, 5, 6, 17])
def test_batches_go_on_from_a_few_numbers(tokenizer, number) -> None:
    whole, resumed = batches(tokenizer), batches(tokenizer)
    for _ in range(number):
        next(whole)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for _ in range(7):
        one, other = next(whole), next(resumed)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.mask, other.mask)


def test_every_document_is_used_once(tokenizer) -> None:
    documents = [f"Document {number}." for number in range(300)]
    text = "".join(
        tokenizer.decode(batch.ids[row].tolist())
        for batch in finite_batches(documents, tokenizer, 4, 64)
        for row in range(4)
    )
    assert sorted(re.findall(r"Document \d+\.", text)) == sorted(documents)


def test_documents_that_never_fit_are_an_error(tokenizer) -> None:
    stream = Batches(lambda number: "word " * 500, tokenizer, 4, 16, long_every=0)
    with pytest.raises(InputError, match="at most 16 tokens: use longer rows"):
        next(stream)


def test_the_fast_template_equals_the_real_one(tokenizer) -> None:
    """And a template in other words, which only Jinja knows, is followed, too."""
    slow = Tokenizer(tokenizer.backend, BITNET_CHAT_TEMPLATE + "{# #}", BEGIN, END)
    for number in range(50):
        chat = own_corpus(2)(number)
        if not isinstance(chat, str):
            assert list(chat_pieces(tokenizer, chat)) == list(chat_pieces(slow, chat))
            pieces = "".join(text for text, _ in chat_pieces(tokenizer, chat))
            assert pieces == tokenizer.chat_text(chat, add_generation_prompt=False)


def test_chat_encodes_to_the_same_tokens_whole_or_in_turns(tokenizer, tmp_path) -> None:
    export(BitNetForTraining(SHAPE), tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompt = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True).input_ids
    for content in (CHAT[1]["content"], "It is the scale."):
        answer = theirs(content + END_OF_TURN, add_special_tokens=False).input_ids
        whole = theirs.apply_chat_template([CHAT[0], {**CHAT[1], "content": content}]).input_ids
        assert whole == prompt + answer
    assert theirs.decode(prompt) == f"<|begin_of_text|>User: What is 3 + 4?{END_OF_TURN}Assistant: "
    assert theirs("12").input_ids == [
        theirs.bos_token_id,
        *theirs.convert_tokens_to_ids(["1", "2"]),
    ]


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_is_stopped_leaves_no_half_model(tokenizer, tmp_path, monkeypatch, there):
    """At each of its files, in a new folder and in one with an older model."""
    model, folder = BitNetForTraining(SHAPE), tmp_path / "model"
    steps = ("file_tensors", "write_model", "generation_config", "write_tokenizer")
    for step in steps:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            export(model, tokenizer, folder)
            (folder / "training_report.json").write_text("{}")
        with monkeypatch.context() as patch:
            patch.setattr(f"bitnet_edu.training.export.{step}", stop)
            with pytest.raises(KeyboardInterrupt):
                export(model, tokenizer, folder)
        assert [path.name for path in tmp_path.iterdir()] == ["model"] * there
        if there:
            assert load(str(folder)).tokenizer.bos_token == "<|begin_of_text|>"
    export(model, tokenizer, folder)
    assert load(str(folder)).config.eos_token_ids == tuple(
        tokenizer.token_id(token) for token in (END, END_OF_TURN)
    )
    assert (folder / "training_report.json").exists() == there


def stop(*args, **options) -> None:
    raise KeyboardInterrupt


def test_quick_training_learns_and_exports(tokenizer, tmp_path) -> None:
    losses = []
    recipe = Recipe(steps=60, rows=16, length=64, warmup=10, peak_rates=(4e-3, 2e-3))
    model = train(
        new_model(SHAPE),
        recipe,
        tokenizer,
        own_corpus(0),
        lambda model, progress: losses.append(progress.loss),
    )
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])

    export(model, tokenizer, tmp_path)
    batch = exam_batch(tokenizer, rows=8)
    exported = loss_of(tmp_path, batch)
    trained = mean_loss(model, [batch])
    # scales, norms and embedding were rounded to bf16, and nothing else changed
    assert exported == pytest.approx(trained, rel=0.01)
    assert held_out_loss(model, tokenizer, rows=8) < losses[0]

    assert len(ask(load(tmp_path), "few", held_out_questions(1)[:3])) == 3


@torch.no_grad()
def loss_of(folder, batch) -> float:
    """What transformers makes of an exported model, in float32."""
    with torch.compiler.set_stance("force_eager"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        logits = torch.nn.Module.float(model)(batch.ids, attention_mask=batch.mask).logits
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED).item()


def test_a_step_leaves_numpys_smallest_numbers_alone(tokenizer) -> None:
    recipe = Recipe(steps=1, rows=4, length=64)
    train(new_model(SHAPE, 0), recipe, tokenizer, own_corpus(0))
    smallest = np.array([1], np.uint32).view(np.float32)  # 1.4e-45
    assert (2 * smallest > smallest).all()
