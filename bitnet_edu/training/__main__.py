"""Retrain the embedded model: `python -m bitnet_edu.training --out FOLDER`.

About 40 minutes on two processor cores that have bf16 arithmetic, longer elsewhere. Whatever cuts
it off, --resume goes on. The same seed gives the same corpus and the same start; the weights that
come out still depend on the machine's floating point.
"""

import argparse
import sys
from pathlib import Path

import torch

from bitnet_edu.errors import BitNetError
from bitnet_edu.training.data import exam_batch, fingerprint
from bitnet_edu.training.model import ModelShape, new_model
from bitnet_edu.training.report import write_report
from bitnet_edu.training.run import require_free, run
from bitnet_edu.training.train import Recipe, Training, new_tokenizer, own_corpus

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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a toy model in about a minute")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="go on where it was cut off")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    require_free(options.out, options.resume)
    shape = QUICK_SHAPE if options.quick else ModelShape()
    steps = options.steps or (QUICK_STEPS if options.quick else Recipe.steps)
    recipe, tokenizer = Recipe(steps, seed=options.seed), new_tokenizer(shape, options.seed)
    model, documents = new_model(shape, options.seed), own_corpus(options.seed)
    how = {"device": options.device, "compiled": options.compile}
    training = Training(model, recipe, tokenizer, documents, **how)
    held_out, name = [exam_batch(tokenizer)], fingerprint(documents)
    result = run(training, tokenizer, options.out, held_out, corpus=name, resume=options.resume)
    if training.rank == 0:
        facts = {
            "steps": steps,
            "seed": options.seed,
            "tokens": result.tokens,
            "minutes": round(result.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        report = write_report(options.out, facts)
        print(f"{report['question_accuracy']:.1%} of the held-out questions answered right")


if __name__ == "__main__":
    try:
        main()
    except BitNetError as error:
        sys.exit(f"python -m bitnet_edu.training: {error}")
