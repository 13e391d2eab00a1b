"""The training loop: AdamW, a warm-up, and BitNet's two stages.

The schedule follows "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024): in the
first half a high learning rate that falls linearly, with weight decay 0.1; in the second half a
lower one that falls to zero, without weight decay, so that the ternary weights settle.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bitnet_edu.errors import BitNetError, InputError, require_whole
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE, Tokenizer
from bitnet_edu.training import corpus
from bitnet_edu.training.data import Batch, Batches, Documents, exam_batch, texts
from bitnet_edu.training.model import BitNetForTraining, ModelShape
from bitnet_edu.training.tokenizer import BEGIN, END, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; a batch has rows * length tokens.

    InputError for what no training can follow.
    """

    steps: int = 4000
    rows: int = 16
    length: int = 128
    long_every: int = 6  # in each so many-th batch the rows are four times as long; 0: in none
    peak_rates: tuple[float, float] = (2.0e-3, 1.3e-3)  # first and second half
    weight_decay: float = 0.1  # first half; the second has none
    warmup: int = 150  # steps
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float = 1.0  # the longest gradient
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self.steps, 1, None, "the number of steps")
        require_whole(self.rows, 4 if self.long_every else 1, 2**20, "the number of rows")
        require_whole(self.length, 8, 2**20, "the length of a row")
        require_whole(self.seed, 0, 2**63 - 1, "the seed")
        if not all(0 < rate < math.inf for rate in self.peak_rates):
            raise InputError(f"a learning rate is a number above 0, not {self.peak_rates}")


@dataclass(frozen=True)
class Progress:
    """What is known after a step."""

    step: int  # steps done
    loss: float  # of the batch, before the step: nats a counted token
    learning_rate: float
    tokens: int  # seen so far, padding too
    seconds: float  # of all steps so far


def learning_rate(step: int, recipe: Recipe) -> float:
    """Two linear decays to zero at the last step; half-way the lower line takes over."""
    peak = recipe.peak_rates[step >= recipe.steps // 2]
    return peak * min(1.0, (step + 1) / max(1, recipe.warmup)) * (1 - step / recipe.steps)


def weight_decay(step: int, recipe: Recipe) -> float:
    return recipe.weight_decay if step < recipe.steps // 2 else 0.0


def optimizer_for(model: BitNetForTraining, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rates[0], betas=recipe.betas, fused=True)


@contextmanager
def flushing_subnormals() -> Iterator[None]:
    """Numbers below 1e-38 are 0: they cost time and carry nothing. Others get them back after."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class Training:
    """A training between two steps: the model, AdamW, the batches to come, and what was counted.

    device: "cpu", "cuda", or "auto", a GPU if there is one. bf16: whether matrix products run in
    bfloat16; None means wherever hardware does them. compiled: torch.compile, which takes a third
    of the time away and needs a C++ compiler. Under torchrun every process takes its share of each
    batch's rows, and gradients are averaged. The model is moved to the device and trained in place.
    """

    def __init__(
        self,
        model: BitNetForTraining,
        recipe: Recipe,
        tokenizer: Tokenizer,
        documents: Documents,
        *,
        device: str = "auto",
        bf16: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.recipe, self.device = recipe, find_device(device)
        self.require_room(model)
        self.model = model.to(self.device)
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        self.optimizer = optimizer_for(model, recipe)
        self.batches = Batches(documents, tokenizer, recipe.rows, recipe.length, recipe.long_every)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.half = half_precision(self.device, bf16)
        self.rank, self.world = join_processes(self.device)
        fewest = recipe.rows // 4 if recipe.long_every else recipe.rows
        if self.world > fewest:
            raise InputError(f"{self.world} processes need as many rows: there are {fewest}")
        # its hooks average the gradients; the parameters stay those of the model itself
        self.parallel = DistributedDataParallel(model) if self.world > 1 else model

    def require_room(self, model: BitNetForTraining) -> None:
        longest = self.recipe.length * (4 if self.recipe.long_every else 1)
        if longest > model.shape.max_position_embeddings:
            raise InputError(
                f"rows of {longest} tokens are longer than the model's context of "
                f"{model.shape.max_position_embeddings}: choose a smaller length"
            )

    @flushing_subnormals()
    def advance(self) -> Progress:
        """One step. BitNetError if loss or gradient are no numbers: the weights stay as they were.

        The loss is the mean over all counted tokens of the batch, whichever process has them.
        """
        start = time.perf_counter()
        rate = learning_rate(self.step, self.recipe)
        decay = weight_decay(self.step, self.recipe)
        for group, decays in zip(self.optimizer.param_groups, (True, False), strict=True):
            group["lr"], group["weight_decay"] = rate, decay if decays else 0.0
        batch = next(self.batches)
        counted = max(1, batch.counted)
        part = batch.share(self.rank, self.world).to(self.device)
        with self.half():
            loss = self.parallel(part.ids, part.mask, part.targets) / counted
        # the gradients of all processes are averaged, and the loss is their sum
        (loss * self.world).backward()
        size = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        total = summed(loss.detach(), self.world)
        self.require_finite(total, size.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + batch.ids.numel()
        self.seconds += time.perf_counter() - start
        return Progress(self.step, total, rate, self.tokens, self.seconds)

    def require_finite(self, loss: float, gradient: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            raise BitNetError(
                f"step {self.step + 1}: the loss is {loss} and the gradient's size {gradient}; the "
                "training stopped before they got into the weights: start anew with a lower "
                "learning rate"
            )


def train(
    model: BitNetForTraining,
    recipe: Recipe,
    tokenizer: Tokenizer,
    documents: Documents,
    after_step: Callable[[BitNetForTraining, Progress], None] = lambda model, progress: None,
    *,
    device: str = "auto",
    bf16: bool | None = None,
    compiled: bool = False,
) -> BitNetForTraining:
    """Train `model` in place by `recipe` on documents 0, 1, 2, ...; see `Training` for the rest.

    Nothing is saved: `run` does that.
    """
    options = {"device": device, "bf16": bf16, "compiled": compiled}
    training = Training(model, recipe, tokenizer, documents, **options)
    while training.step < recipe.steps:
        after_step(model, training.advance())
    return model


@torch.no_grad()
def mean_loss(model: BitNetForTraining, batches: list[Batch]) -> float:
    """Mean cross-entropy in nats over all counted tokens of these batches, in float32."""
    parts = (batch.to(model.cos.device) for batch in batches)
    total = sum(model(part.ids, part.mask, part.targets).item() for part in parts)
    return total / sum(batch.counted for batch in batches)


def held_out_loss(model: BitNetForTraining, tokenizer: Tokenizer, rows: int = 32) -> float:
    """The same on answers to questions of the book's own corpus that are never trained on."""
    return mean_loss(model, [exam_batch(tokenizer, rows)])


def own_corpus(seed: int) -> Documents:
    """The documents of the book's own corpus, which `corpus` writes."""
    return partial(corpus.document, seed)


def new_tokenizer(shape: ModelShape, seed: int, documents: int = 30_000) -> Tokenizer:
    """A tokenizer that learned from the book's own corpus."""
    return tokenizer_of(texts(map(own_corpus(seed), range(documents))), shape.vocab_size)


def tokenizer_of(lines: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with at most `vocab_size` tokens and BitNet's chat template."""
    return Tokenizer(train_tokenizer(lines, vocab_size), BITNET_CHAT_TEMPLATE, BEGIN, END)


def find_device(name: str) -> torch.device:
    """ "cpu", "cuda" or "auto"; under torchrun each process gets a GPU of its own."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"a device is auto, cpu or cuda, not {name!r}")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("torch finds no GPU here: choose --device cpu")
    if name == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def half_precision(device: torch.device, bf16: bool | None) -> Callable:
    """A context in which matrix products run in bfloat16, or in which nothing changes."""
    if bf16 is None:
        bf16 = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else fast_bf16()
    return partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext


def fast_bf16() -> bool:
    """True where the processor does bf16 matrix products in hardware."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def join_processes(device: torch.device) -> tuple[int, int]:
    """This process's number and how many there are, under torchrun; else (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def leave_processes() -> None:
    """Take the group of processes apart, after a pause in which nothing happens in it.

    Gloo's threads need Python's lock to let go of their last tensors, and torch holds that lock
    while it waits for these threads to end: without the pause one may wait for the other for ever.
    """
    distributed.barrier()
    time.sleep(1)
    distributed.destroy_process_group()


def summed(value: torch.Tensor, world: int) -> float:
    """The sum of one number over all processes."""
    if world > 1:
        distributed.all_reduce(value)
    return value.item()
