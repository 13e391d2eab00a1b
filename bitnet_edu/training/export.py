"""Write a trained model as a Hugging Face folder, in the format of the 2B4T checkpoint.

Ternary weights as packed uint8 [out/4, in] with a bf16 `weight_scale` [1] that multiplies
(transformers' `autobitlinear`, offline); norms and embedding bf16. Any `AutoModelForCausalLM`
loads it.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from bitnet_edu.packing import pack_hf
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.training.model import BitNetForTraining, ModelShape
from bitnet_edu.training.tokenizer import BEGIN, END, END_OF_TURN, save_tokenizer


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


def config_json(shape: ModelShape, tokenizer: Tokenizer) -> dict:
    """config.json, with the fields of microsoft/bitnet-b1.58-2B-4T."""
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "relu2",
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }


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
    """Write model, configuration and tokenizer into `folder` (made if need be)."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    save_file(packed_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config_json(shape, tokenizer),
        "generation_config.json": generation_config_json(tokenizer, shape.max_position_embeddings),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder, shape.max_position_embeddings)
