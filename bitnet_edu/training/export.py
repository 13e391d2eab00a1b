"""Write a trained model as a Hugging Face folder, in the format of the 2B4T checkpoint.

Ternary weights as packed uint8 [out/4, in] with a bf16 `weight_scale` [1] that multiplies
(transformers' `autobitlinear`, offline); norms and embedding bf16. Any `AutoModelForCausalLM`
loads it.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import config_json, write_json
from bitnet_edu.packing import pack_hf
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.training.model import BitNetForTraining
from bitnet_edu.training.tokenizer import BEGIN, END, END_OF_TURN, save_tokenizer
from bitnet_edu.weights import BitNetConfig


def packed_state(model: BitNetForTraining) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            codes, scale = absmean_ternary(tensor.numpy())
            state[name] = torch.from_numpy(pack_hf(codes))
            scale = torch.tensor([float(scale)], dtype=torch.bfloat16)
            state[name.removesuffix("weight") + "weight_scale"] = scale
        else:
            state[name] = tensor.to(torch.bfloat16)
    return state


def generation_config_json(tokenizer: Tokenizer, max_length: int) -> dict:
    """generation_config.json: both end marks stop an answer; greedy unless asked otherwise."""
    return {
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": [tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TURN)],
        "pad_token_id": tokenizer.token_to_id(END),
        "do_sample": False,
        "max_length": max_length,
    }


def export(model: BitNetForTraining, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model, configuration and tokenizer into `folder` (made if need be).

    Whoever stops it, there is a whole model afterwards or none that loads.
    """
    shape = model.shape
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    config = BitNetConfig(**asdict(shape), bos_token_id=begin, eos_token_ids=(end,))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with all_or_nothing(folder) as new:
        new.mkdir()
        (new / "model.safetensors").write_bytes(save(packed_state(model), {"format": "pt"}))
        about = config_json(config, tied=True, scheme="multiply") | {"dtype": "bfloat16"}
        write_json(new / "config.json", about)
        length = shape.max_position_embeddings
        write_json(new / "generation_config.json", generation_config_json(tokenizer, length))
        save_tokenizer(tokenizer, new, length)
