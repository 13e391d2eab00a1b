"""Small GGUF files of exactly the form of Microsoft's ggml-model-i2_s.gguf.

Made without the code under test: its 24 keys in their order, its tensor names, types and order, its
tokenizer (Llama 3's kind), its chat template, and I2_S packed as bitnet.cpp's quantizer does it.
Known from logs of llama.cpp's loader, from the converter and from ggml-bitnet-mad.cpp.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitnet_edu.weights import BitNetConfig

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
BASE = 256 + 60  # bytes and merges come first, special tokens last, as in Llama 3
SHAPE = BitNetConfig(
    vocab_size=BASE + len(SPECIAL),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=11,  # so that blk.10 comes before blk.2
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    bos_token_id=BASE,
    eos_token_ids=(BASE + 1, BASE + 2),
)
WRONG_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'] + "
    "'\\n\\nBITNETAssistant: ' + eos_token }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


class Quantized(NamedTuple):
    """Bytes in one of ggml's types, of a shape in numbers."""

    kind: GGMLQuantizationType
    data: np.ndarray  # uint8[rows, bytes]
    shape: tuple[int, int]


def quantized(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Quantized, np.ndarray]:
    """Random blocks, and the numbers that they stand for by ggml's definition (ggml-quants.c)."""
    rng = np.random.default_rng(seed)
    size, numbers = {"Q8_0": (34, 32), "Q6_K": (210, 256)}[kind]
    blocks = rng.integers(0, 256, (rows * columns // numbers, size), np.uint8)
    scale = rng.uniform(1e-3, 2e-3, len(blocks)).astype(np.float16)
    place = 0 if kind == "Q8_0" else 208
    blocks[:, place : place + 2] = scale[:, None].view(np.uint8)
    values = np.empty((len(blocks), numbers), np.float32)
    for block, d, out in zip(blocks, scale.astype(np.float32), values, strict=True):
        signed = block.view(np.int8)
        if kind == "Q8_0":
            out[:] = d * signed[2:]
            continue
        for i in range(256):  # low 4 bits, high 2 bits, a scale for each 16
            half, part, j = i // 128, i % 128 // 32, i % 32
            low = block[64 * half + 32 * (part % 2) + j] >> (4 * (part // 2)) & 15
            high = block[128 + 32 * half + j] >> (2 * part) & 3
            factor = d * np.float32(signed[192 + 8 * half + j // 16 + 2 * part])
            out[i] = factor * np.float32((int(low) | int(high) << 4) - 32)
    data = blocks.reshape(rows, -1)
    shape = rows, columns
    return Quantized(GGMLQuantizationType[kind], data, shape), values.reshape(shape)


def llama_tokenizer() -> Tokenizer:
    """A small tokenizer built like Llama 3's tokenizer.json."""
    words = Regex(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
        "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=BASE - 1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = (
        "What is 1234 + 5678? It's a sum, they'll say;\n\n    and I'd agree: naïve, isn't it? "
        "A ternary weight is minus one, zero or one, and nothing between them is ever stored. "
    )
    tokenizer.train_from_iterator([text * 4], trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    state["model"]["vocab"]["ĠBitNet"] = BASE - 1  # a word that no merges lead to
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], BASE)]
    )
    return tokenizer


def random_tensors(shape: BitNetConfig = SHAPE, seed: int = 0) -> dict[str, Any]:
    """Tensors in file order: (codes, scale) for a matrix, else an array in the file's dtype.

    A `Quantized` may stand for the embedding.
    """
    rng = np.random.default_rng(seed)
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    kv = shape.num_key_value_heads * shape.head_dim

    def matrix(out: int, n: int) -> tuple[np.ndarray, np.float32]:
        return rng.integers(-1, 2, (out, n), np.int8), np.float32(rng.uniform(0.5, 1.5) / n**0.5)

    def norm(size: int) -> np.ndarray:
        values = rng.uniform(0.5, 1.5, size)
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    embedding = rng.standard_normal((shape.vocab_size, hidden)).astype(ml_dtypes.bfloat16)
    tensors: dict[str, Any] = {"token_embd.weight": embedding.astype(np.float16)}
    for layer in sorted(range(shape.num_hidden_layers), key=str):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": norm(hidden),
            f"blk.{layer}.ffn_down.weight": matrix(hidden, ffn),
            f"blk.{layer}.ffn_sub_norm.weight": norm(ffn),
            f"blk.{layer}.ffn_gate.weight": matrix(ffn, hidden),
            f"blk.{layer}.ffn_up.weight": matrix(ffn, hidden),
            f"blk.{layer}.ffn_norm.weight": norm(hidden),
            f"blk.{layer}.attn_sub_norm.weight": norm(hidden),
            f"blk.{layer}.attn_k.weight": matrix(kv, hidden),
            f"blk.{layer}.attn_output.weight": matrix(hidden, hidden),
            f"blk.{layer}.attn_q.weight": matrix(hidden, hidden),
            f"blk.{layer}.attn_v.weight": matrix(kv, hidden),
        }
    return tensors | {"output_norm.weight": norm(hidden)}


def real_keys(shape: BitNetConfig = SHAPE) -> dict[str, tuple[GGUFValueType, Any]]:
    """The 24 keys, but for general.architecture, which the writer adds."""
    tokenizer, kind = llama_tokenizer(), GGUFValueType
    tokens = [tokenizer.id_to_token(i) for i in range(shape.vocab_size)]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    arch = "bitnet-b1.58."
    return {
        "general.name": (kind.STRING, "bitnet2b"),
        f"{arch}vocab_size": (kind.UINT32, shape.vocab_size),
        f"{arch}context_length": (kind.UINT32, shape.max_position_embeddings),
        f"{arch}embedding_length": (kind.UINT32, shape.hidden_size),
        f"{arch}block_count": (kind.UINT32, shape.num_hidden_layers),
        f"{arch}feed_forward_length": (kind.UINT32, shape.intermediate_size),
        f"{arch}rope.dimension_count": (kind.UINT32, shape.head_dim),
        f"{arch}attention.head_count": (kind.UINT32, shape.num_attention_heads),
        f"{arch}attention.head_count_kv": (kind.UINT32, shape.num_key_value_heads),
        "tokenizer.ggml.add_bos_token": (kind.BOOL, True),
        f"{arch}attention.layer_norm_rms_epsilon": (kind.FLOAT32, shape.rms_norm_eps),
        f"{arch}rope.freq_base": (kind.FLOAT32, shape.rope_theta),
        "general.file_type": (kind.UINT32, 40),
        "tokenizer.ggml.model": (kind.STRING, "gpt2"),
        "tokenizer.ggml.tokens": (kind.ARRAY, tokens),
        "tokenizer.ggml.scores": (kind.ARRAY, [0.0] * BASE + [-1000.0] * len(SPECIAL)),
        "tokenizer.ggml.token_type": (kind.ARRAY, [1] * BASE + [3] * len(SPECIAL)),
        "tokenizer.ggml.merges": (kind.ARRAY, merges),
        "tokenizer.ggml.bos_token_id": (kind.UINT32, shape.bos_token_id),
        "tokenizer.ggml.eos_token_id": (kind.UINT32, shape.eos_token_ids[0]),
        "tokenizer.ggml.padding_token_id": (kind.UINT32, shape.eos_token_ids[0]),
        "tokenizer.chat_template": (kind.STRING, WRONG_TEMPLATE),
        "general.quantization_version": (kind.UINT32, 2),
    }


def i2s_bytes(codes: np.ndarray, scale: np.float32, block: int) -> bytes:
    """bitnet.cpp's quantize_i2_s; what follows the scale is whatever was in memory."""
    data = np.zeros(codes.size // 4, np.uint8)
    quarter = block // 4
    run, place = np.divmod(np.arange(codes.size), block)
    group, byte = np.divmod(place, quarter)
    pairs = (codes.reshape(-1).astype(np.int64) + 1) << (6 - 2 * group)
    np.bitwise_or.at(data, run * quarter + byte, pairs.astype(np.uint8))
    return data.tobytes() + np.float32(scale).tobytes() + b"\xa5" * 28


def write_real(
    path: Path,
    tensors: dict[str, Any] | None = None,
    keys: dict[str, tuple[GGUFValueType, Any]] | None = None,
    block: int = 128,
    architecture: str = "bitnet-b1.58",
) -> Path:
    """Write such a file; `tensors` and `keys` may hold what the real one would not."""
    tensors = random_tensors() if tensors is None else tensors
    writer = GGUFWriter(path, architecture)
    for key, (kind, value) in (real_keys() if keys is None else keys).items():
        writer.add_key_value(key, value, kind)
    data = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantized):
            kind, data[name], shape = int(tensor.kind), tensor.data, tensor.shape
        elif isinstance(tensor, tuple):
            shape, kind = tensor[0].shape, 36
            data[name] = np.frombuffer(i2s_bytes(*tensor, block), np.uint8)
        else:
            shape, kind, data[name] = tensor.shape, None, tensor
        dtype = np.dtype(np.int8) if kind is not None else tensor.dtype
        writer.add_tensor_info(name, shape, dtype, data[name].nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in data.values():
        writer.write_tensor_data(array)
    writer.close()
    return path
