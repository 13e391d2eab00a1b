"""The exam: greedy answers of an exported folder to questions that were never trained on.

The folder is loaded by transformers, unmodified, and computed in float32: what is marked is what
was exported, not the model in training.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitnet_edu.training.corpus import Question, is_right
from bitnet_edu.training.data import IGNORED, Batch
from bitnet_edu.training.tokenizer import END_OF_TURN


class Examinee:
    """An exported model that answers many questions at once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        with torch.compiler.set_stance("force_eager"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model = torch.nn.Module.float(model).eval()

    @torch.no_grad()
    def answers(self, questions: list[Question], max_new_tokens: int = 120) -> Iterator[str]:
        """Greedy replies, in order; 64 at a time."""
        tokenizer = self.tokenizer
        prompts = [
            tokenizer.apply_chat_template(
                question.messages(), add_generation_prompt=True, tokenize=False
            )
            for question in questions
        ]
        for start in range(0, len(prompts), 64):
            batch = tokenizer(
                prompts[start : start + 64],
                add_special_tokens=False,
                padding=True,
                return_tensors="pt",
            )
            with torch.compiler.set_stance("force_eager"):  # spares transformers a C++ compiler
                output = self.model.generate(
                    **batch, max_new_tokens=max_new_tokens, max_length=None, do_sample=False
                )
            for row in output[:, batch.input_ids.shape[1] :]:
                yield tokenizer.decode(row).split(END_OF_TURN)[0]

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy in nats over the tokens that count."""
        with torch.compiler.set_stance("force_eager"):
            logits = self.model(batch.ids, attention_mask=batch.mask).logits
        logits = logits.transpose(1, 2)
        return F.cross_entropy(logits, batch.targets, ignore_index=IGNORED).item()


def accuracy(questions: list[Question], replies: list[str]) -> dict[str, tuple[int, int]]:
    """Category -> (right, asked), with the sum under "all"."""
    marks: dict[str, list[bool]] = defaultdict(list)
    for question, reply in zip(questions, replies, strict=True):
        right = is_right(question, reply)
        marks[question.category].append(right)
    marks["all"] = [mark for category in list(marks) for mark in marks[category]]
    return {category: (sum(m), len(m)) for category, m in marks.items()}
