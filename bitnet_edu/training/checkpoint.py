"""A training that can be cut off at any moment and goes on to the bit.

A checkpoint is one safetensors file: the master weights, AdamW's two moments of each, and in the
header, as JSON, where the training stands and what must be the same for it to go on. It is written
beside the old one and takes its name in one step, so there is always a whole one.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bitnet_edu.errors import CheckpointError, InputError
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import fault
from bitnet_edu.files.hf import Tensor, map_safetensors, write_tensors
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training.export import as_array
from bitnet_edu.training.train import Training

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names for AdamW's two averages


def identity_of(training: Training, tokenizer: Tokenizer, corpus: str) -> dict[str, Any]:
    """What a training is made of; `corpus` names or hashes its documents."""
    model = training.model
    text = tokenizer.backend.to_str() + tokenizer.chat_template
    return {
        **asdict(training.recipe),
        **asdict(model.shape),
        "ternary": model.ternary,
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "corpus": corpus,
    }


def named_tensors(training: Training) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint; before the first step AdamW has none."""
    for name, parameter in training.model.named_parameters():
        yield name, parameter
        for moment in MOMENTS if training.optimizer.state else ():
            yield f"{moment}.{name}", training.optimizer.state[parameter][moment]


def state_of(training: Training, identity: dict[str, Any], results: dict) -> dict[str, Any]:
    """Where a training stands, in plain values. results: further ones to find again."""
    return {
        "step": training.step,
        "tokens": training.tokens,
        "seconds": training.seconds,
        "batches": training.batches.state(),
        "identity": identity,
        "results": results,
    }


def write(training: Training, file: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint as a new file."""
    tensors = [
        Tensor(name, np.dtype(np.float32), tuple(tensor.shape), partial(as_array, tensor))
        for name, tensor in named_tensors(training)
    ]
    write_tensors(file, tensors, {"format": "pt", "training": json.dumps(state)})


def save(training: Training, file: Path, state: dict[str, Any]) -> None:
    """Replace a checkpoint, or leave it as it is. BitNetError where the disk refuses."""
    size = 4 * sum(tensor.numel() for _, tensor in named_tensors(training)) + 2**20
    with all_or_nothing(file, size) as new:
        write(training, new, state)


def restore(training: Training, file: Path, identity: dict[str, Any]) -> dict:
    """Bring a training to where `file` stopped; returns the `results` that it holds.

    InputError, which names what differs, if another training wrote it. CheckpointError if it is
    damaged.
    """
    arrays = map_safetensors(file)
    state = read_state(file)
    require_same(file, state["identity"], identity)
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            parameter.copy_(tensor_of(file, arrays, name, parameter))
            if state["step"]:
                training.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"]), device=parameter.device),
                    **{m: tensor_of(file, arrays, f"{m}.{name}", parameter) for m in MOMENTS},
                }
    training.step, training.tokens = state["step"], state["tokens"]
    training.seconds = state["seconds"]
    training.batches.restore(state["batches"])
    return state["results"]


def read_state(file: Path) -> dict[str, Any]:
    """The JSON in the header of a checkpoint."""
    with safe_open(file, framework="numpy") as opened:
        notes = opened.metadata() or {}
    if "training" not in notes:
        raise CheckpointError(f"{file} is a safetensors file, but no checkpoint of a training")
    return json.loads(notes["training"])


def tensor_of(
    file: Path, arrays: dict[str, np.ndarray], name: str, like: torch.Tensor
) -> torch.Tensor:
    """A copy of one array, where `like` is."""
    shape = list(like.shape)
    if name not in arrays or list(arrays[name].shape) != shape:
        found = str(list(arrays[name].shape)) if name in arrays else "no such tensor"
        raise fault(file, name, str(shape), found)
    return torch.from_numpy(arrays[name].copy()).to(like.device)


def require_same(file: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    here = json.loads(json.dumps(here))  # as it was written: tuples are lists
    differing = [name for name in here if there.get(name) != here[name]]
    if differing:
        pairs = ", ".join(
            f"another {name}"
            if name in ("tokenizer", "corpus")
            else f"{name} {there.get(name)} instead of {here[name]}"
            for name in differing
        )
        raise InputError(
            f"{file} belongs to a training with {pairs}: give the same options as then, or another "
            "--out"
        )
