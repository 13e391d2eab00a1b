"""bitnet.cpp's GGUF files: one file that holds the shape, the tokenizer and the weights, as I2_S.

    magic "GGUF", version, counts | key/values | names, shapes, types, offsets | padding | tensors

The `gguf` package writes them. It cannot read them (it gave up tensor type 36, I2_S), and it
trusts every size it finds, so the header is parsed here. Source: the GGUF specification (ggml,
docs/gguf.md); microsoft/BitNet, src/ggml-bitnet-mad.cpp and utils/convert-ms-to-gguf-bitnet.py.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType
from numba import njit
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from bitnet_edu.errors import CheckpointError
from bitnet_edu.files.config import fault, parse_config
from bitnet_edu.kernels.matmul import count_invalid
from bitnet_edu.packing import pack_i2s, unpack_hf
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE, Tokenizer
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights

ARCHITECTURE = "bitnet-b1.58"
I2_S = 36
I2_S_FILE_TYPE = 40  # llama.cpp's "mostly I2_S"
SCALE_BYTES = 32  # after the codes: a float32 scale and 28 bytes that mean nothing
ALIGNMENT = 32
MOST = 2**24  # more keys, tensors, array elements or bytes of text than any model has
FLOATS = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}
TYPE_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType} | {I2_S: "I2_S"}
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
VALUE_TYPES = {
    str: GGUFValueType.STRING,
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    list: GGUFValueType.ARRAY,
}
# in the order in which bitnet.cpp's own files hold a layer
TENSORS = {
    "input_layernorm": "attn_norm",
    "down_proj": "ffn_down",
    "ffn_sub_norm": "ffn_sub_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "attn_sub_norm": "attn_sub_norm",
    "k_proj": "attn_k",
    "o_proj": "attn_output",
    "q_proj": "attn_q",
    "v_proj": "attn_v",
}
METADATA = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "head_dim": "rope.dimension_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
BLOCK_KEY = f"{ARCHITECTURE}.i2_s.block_size"  # ours: no other program records the layout
HF_TOKENIZER_KEY = "tokenizer.huggingface.json"
# how Llama 3's tokenizer, which 2B4T uses, cuts text into words; GGUF calls it "llama-bpe"
LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TensorInfo(NamedTuple):
    """Where a tensor lies: ggml type, shape with the rows first, first byte and length in bytes."""

    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """Everything in a GGUF file but the tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf(path: Path, block: int | None = None) -> tuple[BitNetConfig, Weights, Tokenizer]:
    """Read an I2_S file. The codes are repacked for our kernels; a float16 embedding becomes
    bfloat16 if that changes nothing (Microsoft's was bfloat16 once), else it stays memory-mapped.

    block: 128 for files made on x86 (and everywhere before November 2025), 64 for files made on Arm
    since. The format does not record it and every byte is legal in both, so it cannot be detected:
    the default is what the file says, if this package wrote it, and else 128.

    The chat template in Microsoft's file ("Human: ... BITNETAssistant: ...") is not the one that
    the model was trained on; the tokenizer returned has the right one. Raises CheckpointError.
    """
    metadata, infos = read_header(path)
    config = _read_config(metadata, path)
    block = block or metadata.get(BLOCK_KEY, 128)
    if block not in (64, 128):
        raise fault(path, "a block of I2_S", "128 (x86) or 64 (Arm) weights", repr(block))
    tensors = _Tensors(path, infos, block)
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = _as_bfloat16(tensors.floats("token_embd", vocabulary))
    layers = tuple(_read_layer(tensors, config, i) for i in range(config.num_hidden_layers))
    norm = tensors.norm("output_norm", config.hidden_size)
    if infos:
        raise fault(path, min(infos), "absent, as no BitNet of this shape has it", "it")
    tokenizer = _read_tokenizer(metadata, config, path)
    return config, Weights(embedding, layers, norm, embedding), tokenizer


def _read_layer(tensors: "_Tensors", config: BitNetConfig, index: int) -> LayerWeights:
    sizes = {"ffn_sub_norm": config.intermediate_size}
    fields = {}
    for field, name in TENSORS.items():
        if field in config.matrix_shapes:
            fields[field] = tensors.matrix(f"blk.{index}.{name}", config.matrix_shapes[field])
        else:
            size = sizes.get(field, config.hidden_size)
            fields[field] = tensors.norm(f"blk.{index}.{name}", size)
    return LayerWeights(**fields)


def _as_bfloat16(values: np.ndarray) -> np.ndarray:
    """float16[rows, n] in the dtype that the engine reads fastest; unchanged if digits would go."""
    if values.dtype != np.float16:
        return values
    narrow = np.empty(values.shape, np.uint16)
    for start in range(0, len(values), 1024):
        bits = values[start : start + 1024].astype(np.float32).view(np.uint32)
        if (bits & 0xFFFF).any():
            return values
        narrow[start : start + 1024] = bits >> 16
    return narrow.view(ml_dtypes.bfloat16)


class _Tensors:
    """The tensors of a file, each to be taken once with what it must be."""

    def __init__(self, path: Path, infos: dict[str, TensorInfo], block: int):
        self.path, self.infos, self.block = path, infos, block

    def take(self, name: str, shape: tuple[int, ...], types: Iterable[int]) -> TensorInfo:
        info = self.infos.pop(f"{name}.weight", None)
        if info is None or info.shape != shape or info.type not in types:
            expected = f"{' or '.join(TYPE_NAMES[t] for t in types)} of shape {list(shape)}"
            found = f"{TYPE_NAMES[info.type]} of shape {list(info.shape)}" if info else "nothing"
            raise fault(self.path, f"{name}.weight", expected, found)
        return info

    def map(self, info: TensorInfo) -> np.ndarray:
        # a map for each tensor, so that its memory goes when the array goes
        return np.asarray(np.memmap(self.path, np.uint8, "r", info.offset, (info.nbytes,)))

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        info = self.take(name, shape, FLOATS)
        return self.map(info).view(FLOATS[info.type]).reshape(shape)

    def norm(self, name: str, size: int) -> np.ndarray:
        weight = self.floats(name, (size,)).astype(np.float32)
        if not np.isfinite(weight).all():
            raise fault(self.path, f"{name}.weight", "finite", "NaN or Inf")
        return weight

    def matrix(self, name: str, shape: tuple[int, int]) -> TernaryMatrix:
        """Repack bitnet.cpp's layout into ours; check the scale and every code."""
        if shape[1] % self.block:
            expected = f"a multiple of the block of {self.block} weights"
            raise fault(self.path, f"the width of {name}.weight", expected, str(shape[1]))
        data = self.map(self.take(name, shape, (I2_S,)))
        scale = data[-SCALE_BYTES : 4 - SCALE_BYTES].view(np.float32)[0]
        if not (np.isfinite(scale) and scale > 0):
            raise fault(self.path, f"the scale of {name}.weight", "positive", str(scale))
        packed = repack_i2s(data[:-SCALE_BYTES], shape, self.block)
        if invalid := count_invalid(packed):
            found = f"the bit pair 11 in {invalid} byte(s)"
            raise fault(self.path, f"{name}.weight", "codes of -1, 0 and +1", found)
        return TernaryMatrix(packed, np.float32(scale))


def read_header(path: Path) -> Header:
    """Parse keys, values and the table of tensors; every size is checked against the file's."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data, size).header()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({error}): fetch or convert it again"
        ) from None


class _Parser:
    """A place in the file, moving forward. Sizes that the rest of it can't hold are refused."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data, self.size, self.place = data, size, 0

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.place = 4
        version, tensors, keys = self.take("I"), self.count(24), self.count(13)
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"key {key} appears twice")
            metadata[key] = self.value(self.take("I"))
        entries = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 4096:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self.place // alignment) * alignment
        infos = {}
        for name, kind, shape, offset in entries:
            info = TensorInfo(kind, shape, start + offset, _nbytes(name, kind, shape))
            if info.offset + info.nbytes > self.size:
                raise ValueError(f"{name} would end after the file")
            if name in infos:
                raise ValueError(f"tensor {name} appears twice")
            infos[name] = info
        return Header(metadata, infos)

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.place)
        self.place += struct.calcsize("<" + form)
        return value

    def count(self, smallest: int) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count = self.take("Q")
        if count > min(MOST, (self.size - self.place) // smallest):
            raise ValueError(f"{count} things of at least {smallest} byte(s) at byte {self.place}")
        return count

    def string(self) -> str:
        length = self.count(1)
        self.place += length
        return self.data[self.place - length : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"value type {kind}")
        kind = self.take("I")
        if kind == STRING:
            return [self.string() for _ in range(self.count(8))]
        if kind not in SCALARS:
            raise ValueError(f"array of type {kind}")
        form = SCALARS[kind]
        count = self.count(struct.calcsize("<" + form))
        values = struct.unpack_from(f"<{count}{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{count}{form}")
        return list(values)

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self.string(), self.take("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self.take("Q") for _ in range(dimensions))
        return name, self.take("I"), shape[::-1], self.take("Q")


def _nbytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind == I2_S:
        return math.prod(shape) // 4 + SCALE_BYTES
    if kind in FLOATS:
        return math.prod(shape) * np.dtype(FLOATS[kind]).itemsize
    raise ValueError(f"{name} has type {TYPE_NAMES.get(kind, kind)}, not I2_S or a float")


def _read_config(metadata: dict[str, Any], path: Path) -> BitNetConfig:
    if (found := metadata.get("general.architecture")) != ARCHITECTURE:
        raise fault(path, "general.architecture", repr(ARCHITECTURE), repr(found))
    raw: dict[str, Any] = {"model_type": "bitnet"}
    for field, key in METADATA.items():
        if (key := f"{ARCHITECTURE}.{key}") not in metadata:
            raise fault(path, key, "there", "nothing")
        raw[field] = metadata[key]
        if isinstance(raw[field], float):
            raw[field] = float(str(np.float32(raw[field])))  # 1e-5, not 9.99999974e-06
    raw["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    raw["eos_token_id"] = [token for token in ends if token is not None]
    return parse_config(raw, path, {})


def repack_i2s(i2s: np.ndarray, shape: tuple[int, int], block: int) -> np.ndarray:
    """`pack_hf(unpack_i2s(i2s, shape, block))` in one pass: uint8[out*in/4] -> uint8[out/4, in].

    Rows must be whole blocks: `in` a multiple of `block`.
    """
    rows, columns = shape
    packed = np.empty((rows // 4, columns), np.uint8)
    _repack(i2s.view(np.uint64).reshape(4, rows // 4, -1), packed.view(np.uint64), block // 32)
    return packed


@njit(cache=True)
def _repack(i2s: np.ndarray, packed: np.ndarray, words: int) -> None:
    """uint64[4, out/4, in/32] -> uint64[out/4, in/8]; a quarter of a block is `words` long."""
    pair = np.uint64(0x0303030303030303)
    for r in range(len(packed)):
        a, b, c, d, out = i2s[0, r], i2s[1, r], i2s[2, r], i2s[3, r], packed[r]
        for start in range(0, len(a), words):
            for group in range(4):
                shift = np.uint64(6 - 2 * group)
                for j in range(start, start + words):
                    codes = a[j] >> shift & pair
                    codes |= (b[j] >> shift & pair) << np.uint64(2)
                    codes |= (c[j] >> shift & pair) << np.uint64(4)
                    codes |= (d[j] >> shift & pair) << np.uint64(6)
                    out[3 * start + group * words + j] = codes


def _read_tokenizer(metadata: dict[str, Any], config: BitNetConfig, path: Path) -> Tokenizer | None:
    """The embedded tokenizer, or None if the file has none."""
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    model, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if HF_TOKENIZER_KEY not in metadata and (model != "gpt2" or cut not in (None, "llama-bpe")):
        found = f"{model!r} cutting text like {cut!r}"
        raise fault(path, "the tokenizer", "Llama 3's ('gpt2' cutting like 'llama-bpe')", found)
    tokens = metadata["tokenizer.ggml.tokens"]

    def text(key: str) -> str:
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[token] if token is not None else ""

    try:
        if HF_TOKENIZER_KEY in metadata:
            backend = HFTokenizer.from_str(metadata[HF_TOKENIZER_KEY])
        else:
            starts = metadata.get("tokenizer.ggml.add_bos_token", True)
            backend = _llama_bpe(metadata, text("bos") if starts else "")
        if len(tokens) > config.vocab_size or len(set(tokens)) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for a vocabulary of {config.vocab_size}")
        template = metadata.get("tokenizer.chat_template") or BITNET_CHAT_TEMPLATE
        if "BITNETAssistant" in template:  # what the converter writes into every file
            template = BITNET_CHAT_TEMPLATE
        return Tokenizer(backend, template, text("bos"), text("eos"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{path}: the embedded tokenizer is damaged: {error}") from None


def template_note(path: Path, tokenizer: Tokenizer | None) -> str | None:
    """What to tell whoever uses a GGUF file with another chat template than the tokenizer has."""
    if path.is_dir() or not tokenizer:
        return None
    template = read_header(path).metadata.get("tokenizer.chat_template", tokenizer.chat_template)
    if template == tokenizer.chat_template:
        return None
    return f"the chat template in {path.name} is not the model's own: the right one is used instead"


def _llama_bpe(metadata: dict[str, Any], bos: str) -> HFTokenizer:
    """Rebuild Llama 3's tokenizer from its tokens and merges."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_BPE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    return backend


def write_gguf(
    path: Path,
    config: BitNetConfig,
    weights: Weights,
    tokenizer: Tokenizer | None = None,
    block: int = 128,
) -> None:
    """Write an I2_S file like bitnet.cpp's: its names, order and types, and two keys of our own.

    The embedding becomes F16, as bitnet.cpp stores it: bfloat16 values below 6e-5 lose digits.
    block: 128 for bitnet.cpp on x86, 64 on Arm. CheckpointError for what the format can't hold.
    """
    if not weights.tied:
        raise CheckpointError("bitnet.cpp ties the head to the embedding, this model does not")
    for name, (_, columns) in config.matrix_shapes.items():
        if columns % block:
            raise CheckpointError(
                f"{name} has {columns} inputs: I2_S needs a multiple of {block}, the block size"
            )
    arrays = [("token_embd", weights.embedding)]
    for index, layer in enumerate(weights.layers):
        arrays += [(f"blk.{index}.{name}", getattr(layer, f)) for f, name in TENSORS.items()]
    arrays.append(("output_norm", weights.norm))
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        for key, value in _metadata(config, tokenizer, block).items():
            writer.add_key_value(key, value, VALUE_TYPES[type(value)])
        for name, array in arrays:
            kind, shape = _kind(array)
            nbytes = _nbytes(name, kind, shape)
            writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.int8), nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, array in arrays:
            writer.write_tensor_data(_data(name, array, block))
    finally:
        writer.close()


def _kind(array: np.ndarray | TernaryMatrix) -> tuple[int, tuple[int, ...]]:
    """ggml type and shape, rows first: matrices I2_S, vectors F32, the embedding F16."""
    if isinstance(array, TernaryMatrix):
        return I2_S, (4 * len(array.packed), array.packed.shape[1])
    return (0 if array.ndim == 1 else 1), array.shape


def _data(name: str, array: np.ndarray | TernaryMatrix, block: int) -> np.ndarray:
    if isinstance(array, TernaryMatrix):
        tail = np.zeros(SCALE_BYTES, np.uint8)
        tail[:4] = np.array([array.scale], np.float32).view(np.uint8)
        return np.concatenate([pack_i2s(unpack_hf(array.packed), block), tail])
    with np.errstate(over="ignore"):
        data = array.astype(FLOATS[_kind(array)[0]])
    if not np.isfinite(data).all():
        raise CheckpointError(f"{name} holds values that float16 can't: a GGUF file needs float16")
    return data


def _metadata(config: BitNetConfig, tokenizer: Tokenizer | None, block: int) -> dict[str, Any]:
    keys = {"general.name": "bitnet"}
    keys |= {f"{ARCHITECTURE}.{key}": getattr(config, field) for field, key in METADATA.items()}
    keys |= {"general.file_type": I2_S_FILE_TYPE, BLOCK_KEY: block}
    if tokenizer:
        keys |= _tokenizer_metadata(config, tokenizer)
    special = dict(zip(("eos", "eot"), config.eos_token_ids, strict=False))
    special["bos"] = config.bos_token_id
    keys |= {f"tokenizer.ggml.{k}_token_id": v for k, v in special.items() if v is not None}
    return keys | {"general.quantization_version": 2}


def _tokenizer_metadata(config: BitNetConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    whole = tokenizer.backend.to_str()
    model, cut = (json.loads(whole)[key] for key in ("model", "pre_tokenizer"))
    if model["type"] != "BPE":
        raise CheckpointError(f"a GGUF file holds a BPE tokenizer, not one of type {model['type']}")
    tokens = [tokenizer.backend.id_to_token(i) for i in range(config.vocab_size)]
    kinds = [int(TokenType.NORMAL if token else TokenType.UNUSED) for token in tokens]
    for index, token in tokenizer.backend.get_added_tokens_decoder().items():
        kinds[index] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.add_bos_token": tokenizer.encode("")[:1] == [config.bos_token_id],
        "tokenizer.ggml.tokens": [t or f"[PAD{i}]" for i, t in enumerate(tokens)],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.chat_template": tokenizer.chat_template,
        HF_TOKENIZER_KEY: whole,
    }
    steps = (cut or {}).get("pretokenizers", [])
    if any(step.get("pattern") == {"Regex": LLAMA_BPE} for step in steps):
        keys["tokenizer.ggml.pre"] = "llama-bpe"
    return keys
