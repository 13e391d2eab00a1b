"""Small random checkpoints, in every form in which Hugging Face folders store a BitNet."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitnet_edu.files.hf import MATRICES, NORMS
from bitnet_edu.packing import pack_hf
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE
from bitnet_edu.weights import BitNetConfig

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
QUANTIZATION = {
    "packed": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "unpacked": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "divide": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "dense": None,
}
HEADS = {"gqa": (6, 2), "mha": (5, 5), "mqa": (5, 1)}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
VOCABULARY = 256 + len(SPECIAL) + 40


class Recipe(NamedTuple):
    """One way to store a model. The sizes are multiples of 4 and of nothing that SIMD likes."""

    scheme: str = "packed"
    dtype: str = "bfloat16"
    tied: bool = True
    heads: str = "gqa"
    shards: int = 1
    nested_rope: bool = False
    head_dim: int = 12
    ffn: int = 100
    layers: int = 2

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        return f"{self.scheme}-{self.dtype}-{tied}-{self.heads}-{self.shards}"


DEFAULT = Recipe()


def matrix() -> list[Recipe]:
    """Every scheme, dtype and tying, with the kinds of heads, of files and of RoPE keys in turn."""
    recipes = []
    for scheme in ("packed", "unpacked", "divide", "online"):
        for dtype in DTYPES:
            for tied in (True, False):
                turn = len(recipes)
                heads = list(HEADS)[turn % 3]
                recipes.append(Recipe(scheme, dtype, tied, heads, 1 + turn % 2 * 2, turn % 4 < 2))
    return recipes


def config_json(recipe: Recipe) -> dict[str, Any]:
    heads, kv_heads = HEADS[recipe.heads]
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "hidden_size": heads * recipe.head_dim,
        "intermediate_size": recipe.ffn,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": recipe.tied,
        "dtype": recipe.dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if recipe.nested_rope:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    else:
        config["rope_theta"] = 10000.0
    if QUANTIZATION[recipe.scheme]:
        config["quantization_config"] = {"quant_method": "bitnet", **QUANTIZATION[recipe.scheme]}
    return config


def shape_of(config: dict[str, Any]) -> BitNetConfig:
    """The shape of the model, made without the code under test."""
    rope = config.get("rope_parameters") or config
    return BitNetConfig(
        *(config[key] for key in BitNetConfig._fields[:7]),
        rope_theta=rope["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
        bos_token_id=config["bos_token_id"],
        eos_token_ids=(config["eos_token_id"],),
    )


def make(recipe: Recipe = DEFAULT, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A random model as (config.json, tensors by name)."""
    rng = np.random.default_rng(seed)
    config, dtype = config_json(recipe), DTYPES[recipe.dtype]
    shape = shape_of(config)
    tensors = {}
    for layer in range(recipe.layers):
        prefix = f"model.layers.{layer}."
        for field, (out, n) in shape.matrix_shapes.items():
            name = prefix + MATRICES[field]
            if recipe.scheme in ("online", "dense"):
                tensors[f"{name}.weight"] = (rng.standard_normal((out, n)) / n).astype(dtype)
                continue
            codes = rng.integers(-1, 2, (out, n), dtype=np.int8)
            packed = recipe.scheme != "unpacked"
            tensors[f"{name}.weight"] = pack_hf(codes) if packed else codes.astype(dtype)
            scale = rng.uniform(0.8, 1.6) / np.sqrt(n)
            stored = 1 / scale if recipe.scheme == "divide" else scale
            tensors[f"{name}.weight_scale"] = np.array([stored], dtype)
        for field, name in NORMS.items():
            size = recipe.ffn if field == "ffn_sub_norm" else shape.hidden_size
            tensors[f"{prefix}{name}.weight"] = rng.uniform(0.5, 1.5, size).astype(dtype)
    tensors["model.norm.weight"] = rng.uniform(0.5, 1.5, shape.hidden_size).astype(dtype)
    vocabulary = shape.vocab_size, shape.hidden_size
    for name in ("model.embed_tokens.weight", "lm_head.weight")[: 1 if recipe.tied else 2]:
        tensors[name] = rng.standard_normal(vocabulary).astype(dtype)
    return config, tensors


def save(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """Write config.json and the weights, in one file or sharded with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[index::shards]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write(folder: Path, recipe: Recipe = DEFAULT, seed: int = 0) -> Path:
    """A whole model folder with a tokenizer; returns the folder."""
    config, tensors = make(recipe, seed)
    save(folder, config, tensors, recipe.shards)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with the special tokens and the chat template of the real one."""
    _tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "chat_template": BITNET_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@lru_cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "User: Hello there, what is a ternary weight? Assistant: It is minus one, zero or one. "
    tokenizer.train_from_iterator([text * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    return tokenizer
