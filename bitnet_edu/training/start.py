"""Where a training starts from: random weights, or a model that is there.

A packed model holds codes and scales, not the master weights of its training. Those that
`convert --to hf-bf16` writes ternarize to exactly the same model, so the first step sees it
unchanged. Weights in Hugging Face's bf16 master form are taken as they are.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bitnet_edu.container import memory_available
from bitnet_edu.errors import CheckpointError, InputError
from bitnet_edu.files.config import parse_config, read_json
from bitnet_edu.files.convert import is_master
from bitnet_edu.files.gguf import read_gguf
from bitnet_edu.files.hf import MATRICES, NORMS, master_of, open_folder
from bitnet_edu.files.source import TINY, find_model, read_model
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training.model import BitNetForTraining, ModelShape
from bitnet_edu.training.train import Recipe
from bitnet_edu.weights import BitNetConfig, Weights


class Start(NamedTuple):
    """A model to be trained further."""

    model: BitNetForTraining
    tokenizer: Tokenizer
    folder: Path | None  # that holds the tokenizer's files; None for a GGUF file

    @property
    def is_tiny(self) -> bool:
        return self.folder == TINY


def shape_of(config: BitNetConfig) -> ModelShape:
    return ModelShape(**{name: getattr(config, name) for name in ModelShape.__dataclass_fields__})


def start_from(source: str, recipe: Recipe, on_gpu: bool = False) -> Start:
    """A model by name, as for `bitnet_edu.load`, with float32 master weights.

    InputError if this machine's memory is too small for its training, or it is of a kind that
    can't be trained here; else what `load` raises.
    """
    path = find_model(source)
    if path.is_dir():
        file = path / "config.json"
        generation = read_json(path / "generation_config.json", {})
        config = parse_config(read_json(file), file, generation)
    else:
        config = read_gguf(path)[0]
    require_memory(shape_of(config), recipe, on_gpu)
    config, weights, tokenizer = read_model(path, ternarize=True)
    if tokenizer is None:
        raise InputError(f"{source} has no tokenizer: copy its tokenizer.json into the folder")
    if not weights.tied:
        raise InputError(f"{source} has an output head of its own: only tied ones can be trained")
    masters = dense_masters(path) if path.is_dir() and is_dense(path) else None
    model = from_weights(shape_of(config), weights, masters)
    return Start(model, tokenizer, path if path.is_dir() else None)


def is_dense(folder: Path) -> bool:
    """Whether the linear layers are master weights, with or without a word about it."""
    try:
        return is_master(folder)
    except CheckpointError:  # without quantization_config, as dense models are
        return "quantization_config" not in read_json(folder / "config.json")


def dense_masters(folder: Path) -> dict[str, np.ndarray]:
    tensors = open_folder(folder).stored
    return {
        name: stored.array() for name, stored in tensors.items() if name.endswith("_proj.weight")
    }


@torch.no_grad()
def from_weights(
    shape: ModelShape, weights: Weights, masters: dict[str, np.ndarray] | None = None
) -> BitNetForTraining:
    """A model for training whose ternary weights are those of `weights`.

    masters: by name, weights of the linear layers that are more than ternary.
    """
    with torch.device("meta"):  # no random start for what is overwritten
        model = BitNetForTraining(shape)
    model = model.to_empty(device="cpu")
    model.make_rope_tables()
    parameters = dict(model.named_parameters())

    def put(name: str, array: np.ndarray) -> None:
        parameters[name].copy_(torch.from_numpy(np.asarray(array, np.float32)))

    put("model.embed_tokens.weight", weights.embedding)
    put("model.norm.weight", weights.norm)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        for field, name in NORMS.items():
            put(f"{prefix}{name}.weight", getattr(layer, field))
        for field, part in MATRICES.items():
            name = f"{prefix}{part}.weight"
            put(name, master_of(name, getattr(layer, field)) if masters is None else masters[name])
    return model


def require_memory(shape: ModelShape, recipe: Recipe, on_gpu: bool) -> None:
    """InputError where a training would not fit, said before anything is read."""
    needed = training_bytes(shape, recipe)
    free = torch.cuda.mem_get_info()[0] if on_gpu else memory_available()
    if needed > free:
        raise InputError(
            f"training this model needs about {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: choose a smaller model, or fewer --rows"
        )


def training_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """About how many bytes a training holds at once.

    16 for each parameter (weight, gradient, two moments), 4 for each ternary weight that waits for
    the backward pass, and what the layers remember of each token.
    """
    hidden, ffn, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    kv = shape.num_key_value_heads * shape.head_dim
    ternary = shape.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn)
    embedding = shape.vocab_size * hidden
    length = recipe.length * (4 if recipe.long_every else 1)
    remembered = shape.num_hidden_layers * (12 * hidden + 8 * ffn + 3 * heads * length)
    per_token = remembered + 3 * shape.vocab_size
    return 16 * (ternary + embedding) + 4 * ternary + 5 * recipe.rows * recipe.length * per_token
