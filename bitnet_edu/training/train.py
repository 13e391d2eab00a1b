"""The training loop: AdamW, a warm-up, and BitNet's two stages.

The schedule follows "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024): in the
first half a high learning rate that falls linearly, with weight decay 0.1; in the second half a
lower one that falls to zero, without weight decay, so that the ternary weights settle.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from bitnet_edu.training.corpus import training_documents
from bitnet_edu.training.data import IGNORED, Batch, exam_batch, texts, training_batches
from bitnet_edu.training.model import BitNetForTraining, ModelShape
from bitnet_edu.training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; a batch has rows * length tokens."""

    steps: int = 4000
    rows: int = 16
    length: int = 128
    peak_rates: tuple[float, float] = (2.0e-3, 1.3e-3)  # first and second half
    weight_decay: float = 0.1  # first half; the second has none
    warmup: int = 150
    seed: int = 0


@dataclass
class Progress:
    """What the loop hands to its caller after every step."""

    step: int
    loss: float
    seconds: float
    tokens: int


def learning_rate(step: int, recipe: Recipe) -> float:
    """Two linear decays to zero at the last step; half-way the lower line takes over."""
    peak = recipe.peak_rates[step >= recipe.steps // 2]
    return peak * min(1.0, (step + 1) / recipe.warmup) * (1 - step / recipe.steps)


def weight_decay(step: int, recipe: Recipe) -> float:
    return recipe.weight_decay if step < recipe.steps // 2 else 0.0


def optimizer_for(model: BitNetForTraining, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rates[0], betas=(0.9, 0.95), fused=True)


def batch_loss(model: BitNetForTraining, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the tokens that count."""
    hidden = model.hidden_states(batch.ids, batch.mask)
    counts = batch.targets != IGNORED
    logits = F.linear(hidden[counts], model.model.embed_tokens.weight)
    return F.cross_entropy(logits.float(), batch.targets[counts])


@torch.no_grad()
def held_out_loss(model: BitNetForTraining, tokenizer: Tokenizer, rows: int = 32) -> float:
    """Cross-entropy in nats a token on answers to questions that are never trained on."""
    return batch_loss(model, exam_batch(tokenizer, rows)).item()


def new_tokenizer(shape: ModelShape, seed: int, documents: int = 30_000) -> Tokenizer:
    return train_tokenizer(
        texts(list(islice(training_documents(seed), documents))), shape.vocab_size
    )


def train(
    shape: ModelShape,
    recipe: Recipe,
    tokenizer: Tokenizer,
    after_step: Callable[[BitNetForTraining, Progress], None] = lambda model, progress: None,
    compiled: bool = False,
) -> BitNetForTraining:
    """Train from scratch. Matrix products run in bf16 where the processor has them.

    `compiled` takes a third of the time away; torch.compile needs a C++ compiler.
    """
    torch.manual_seed(recipe.seed)
    model = BitNetForTraining(shape)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = optimizer_for(model, recipe)
    stream = training_batches(tokenizer, recipe.seed, recipe.rows, recipe.length)
    half = torch.autocast("cpu", torch.bfloat16) if fast_bf16() else nullcontext()
    start, tokens = time.perf_counter(), 0
    for step, batch in zip(range(recipe.steps), stream, strict=False):
        for group, decays in zip(optimizer.param_groups, (True, False), strict=True):
            group["lr"] = learning_rate(step, recipe)
            group["weight_decay"] = weight_decay(step, recipe) if decays else 0.0
        with half:
            loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch.ids.numel()
        after_step(model, Progress(step + 1, loss.item(), time.perf_counter() - start, tokens))
    return model


def fast_bf16() -> bool:
    """True where bf16 matrix products are done in hardware, not emulated."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
