"""Facts about one's own class are taught to tiny, and it still knows its own world."""

import json

import bitnet_edu
from bitnet_edu import cli

FACTS = {
    "Our hamster is called Biscuit.": ("What is our hamster called?", "The hamster's name?"),
    "Sports day is on June 14.": ("When is sports day?", "On which date is sports day?"),
    "The art room is on floor 3.": ("Where is the art room?", "How do I find the art room?"),
    "The choir meets on Tuesday.": ("When does the choir meet?", "On which day is choir?"),
}
OWN = {
    "What is a ternary weight?": "-1, 0 or +1",
    "What is 3 + 4?": "7",
    "Hello!": "Hello",
    "Who are you?": "Tiny",
}


def test_tiny_learns_and_does_not_forget(tmp_path) -> None:
    corpus, out = tmp_path / "facts.jsonl", tmp_path / "out"
    lines = [
        {"prompt": question, "response": answer}
        for answer, questions in FACTS.items()
        for question in questions
    ]
    corpus.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    # twenty facts take the two minutes of the default options: here are four
    options = ["--steps", "100", "--rows", "8", "--length", "64"]
    assert cli.main(["train", str(corpus), "--from", "tiny", "--out", str(out), *options]) == 0
    model, taught = bitnet_edu.load(str(out)), bitnet_edu.load("tiny")

    def ask(model, question: str) -> str:
        chat = [{"role": "user", "content": question}]
        return "".join(model.stream(chat, max_new_tokens=40)).strip()

    told = [ask(model, line["prompt"]) == line["response"] for line in lines]
    assert sum(told) >= 6  # one of the eight was held out
    assert not any(ask(taught, line["prompt"]) == line["response"] for line in lines)
    assert all(key in ask(model, question) for question, key in OWN.items())
