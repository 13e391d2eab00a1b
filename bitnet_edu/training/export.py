"""A trained model leaves the training: as the engine's weights, or as a Hugging Face folder.

The folder is written by the package's own writer, in the format of the 2B4T checkpoint: ternary
weights as packed uint8 [out/4, in] with a bf16 `weight_scale` [1] that multiplies, norms and
embedding bf16. Any `AutoModelForCausalLM` loads it.
"""

from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
from torch import Tensor

from bitnet_edu.errors import InputError
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import write_json
from bitnet_edu.files.hf import (
    MATRICES,
    NORMS,
    copy_tokenizer,
    file_tensors,
    write_model,
    write_tokenizer,
)
from bitnet_edu.packing import pack_hf
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training.model import BitNetForTraining
from bitnet_edu.training.tokenizer import END_OF_TURN
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights


def packed_weights(model: BitNetForTraining) -> Weights:
    """The weights that the engine takes, with every float rounded to bfloat16."""
    if not model.ternary:
        raise InputError("the full-precision twin has no ternary weights to export")
    state = {name: as_array(tensor) for name, tensor in model.state_dict().items()}

    def norm(name: str) -> np.ndarray:
        return in_bf16(state[f"{name}.weight"]).astype(np.float32)

    layers = []
    for index in range(model.shape.num_hidden_layers):
        prefix = f"model.layers.{index}."
        matrices = {f: packed(state[f"{prefix}{n}.weight"]) for f, n in MATRICES.items()}
        norms = {field: norm(prefix + name) for field, name in NORMS.items()}
        layers.append(LayerWeights(**matrices, **norms))
    embedding = in_bf16(state["model.embed_tokens.weight"])
    return Weights(embedding, tuple(layers), norm("model.norm"), embedding)


def packed(master: np.ndarray) -> TernaryMatrix:
    """Master weights float32[out, in], ternarized: codes and a scale that bfloat16 can hold."""
    codes, scale = absmean_ternary(master)
    return TernaryMatrix(pack_hf(codes), np.float32(in_bf16(scale)))


def in_bf16(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(ml_dtypes.bfloat16)


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def config_of(model: BitNetForTraining, tokenizer: Tokenizer) -> BitNetConfig:
    """The model's shape, and the tokens with which a text begins and ends."""
    ends = [tokenizer.token_id(token) for token in (tokenizer.eos_token, END_OF_TURN) if token]
    begin = tokenizer.token_id(tokenizer.bos_token) if tokenizer.bos_token else None
    ends = tuple(end for end in ends if end is not None)
    return BitNetConfig(**asdict(model.shape), bos_token_id=begin, eos_token_ids=ends)


def export(
    model: BitNetForTraining,
    tokenizer: Tokenizer,
    folder: Path,
    tokenizer_from: Path | None = None,
) -> None:
    """Write model, configuration and tokenizer into `folder` (made if need be).

    tokenizer_from: a folder whose tokenizer files are copied as they are. Whoever stops it, there
    is a whole model afterwards or none that loads.
    """
    config = config_of(model, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with all_or_nothing(folder) as new:
        new.mkdir()
        write_model(new, config, file_tensors(packed_weights(model)), "multiply", tied=True)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, new)
        else:
            write_tokenizer(new, config, tokenizer)
            write_json(new / "generation_config.json", generation_config(config))


def generation_config(config: BitNetConfig) -> dict:
    """Both end marks stop an answer; greedy unless asked otherwise."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.eos_token_ids[0],
        "do_sample": False,
        "max_length": config.max_position_embeddings,
    }
