"""Retrain the embedded model: `python -m bitnet_edu.training --out FOLDER`.

About 40 minutes on two processor cores that have bf16 arithmetic, longer elsewhere. After every
500 steps the model so far is saved. The same seed gives the same corpus and the same start; the
weights that come out still depend on the machine's floating point.
"""

import argparse
import time
from pathlib import Path

import torch

from bitnet_edu.training.export import export
from bitnet_edu.training.model import BitNetForTraining, ModelShape, new_model
from bitnet_edu.training.report import write_report
from bitnet_edu.training.train import (
    Progress,
    Recipe,
    held_out_loss,
    new_tokenizer,
    own_corpus,
    train,
)

QUICK_SHAPE = ModelShape(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2
)
QUICK_STEPS = 200


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bitnet_edu.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, help=f"of 2048 tokens (default: {Recipe.steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="a toy model in about a minute")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38 cost time and carry nothing here
    shape = QUICK_SHAPE if options.quick else ModelShape()
    steps = options.steps or (QUICK_STEPS if options.quick else Recipe.steps)
    recipe = Recipe(steps=steps, seed=options.seed)
    tokenizer = new_tokenizer(shape, options.seed)

    def after_step(model: BitNetForTraining, progress: Progress) -> None:
        speed = progress.tokens / progress.seconds
        if progress.step % 50 == 0:
            print(f"{progress.step}/{steps}: loss {progress.loss:.3f}, {speed:.0f} tokens/s")
        if progress.step % 500 == 0:
            export(model, tokenizer, options.out)
            print(f"held-out loss {held_out_loss(model, tokenizer):.4f}, saved to {options.out}")

    start = time.perf_counter()
    model = new_model(shape, options.seed)
    train(model, recipe, tokenizer, own_corpus(options.seed), after_step, compiled=options.compile)
    minutes = (time.perf_counter() - start) / 60
    export(model, tokenizer, options.out)
    facts = {
        "steps": steps,
        "seed": options.seed,
        "tokens": steps * recipe.rows * recipe.length,
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    report = write_report(options.out, facts)
    print(f"{report['question_accuracy']:.1%} of the held-out questions answered right")


if __name__ == "__main__":
    main()
