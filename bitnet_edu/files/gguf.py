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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from bitnet_edu.errors import BitNetError, CheckpointError, printable
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import fault, parse_config
from bitnet_edu.files.tensors import (
    FLOATS,
    Stored,
    Tensors,
    map_file,
    refuse_nonfinite,
    refuse_wide,
)
from bitnet_edu.kernels.bits import cached_jit
from bitnet_edu.kernels.matmul import count_invalid
from bitnet_edu.packing import pack_i2s
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE, Tokenizer
from bitnet_edu.tokenizer_json import backend_of
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights

ARCHITECTURE = "bitnet-b1.58"
ARCHITECTURES = (ARCHITECTURE, "bitnet-25")  # bitnet.cpp builds the same graph for both
I2_S = 36
I2_S_FILE_TYPE = 40  # llama.cpp's "mostly I2_S"
SCALE_BYTES = 32  # after the codes: a float32 scale and 28 bytes that mean nothing
ALIGNMENT = 32
MOST = 2**24  # more keys, tensors or array elements than any model has
MOST_TEXT = 2**27  # bytes: 64 for each text or array, and its length; Llama 3's take 40 million
MOST_NESTED = 4
QUANTIZED = ("Q8_0", "Q6_K")  # what bitnet.cpp's tools make of an embedding; read as floats
# 37 to 39 are bitnet.cpp's, whatever ggml has used these numbers for since
TYPE_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType}
TYPE_NAMES |= {I2_S: "I2_S", 37: "I8_S", 38: "TL1", 39: "TL2", 134: "IQ1_BN", 135: "IQ2_BN"}
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
OPTIONAL = {"vocab_size", "rope.dimension_count"}
BLOCK_KEY = f"{ARCHITECTURE}.i2_s.block_size"  # ours: no other program records the layout
HF_TOKENIZER_KEY = "tokenizer.huggingface.json"
# how Llama 3's tokenizer, which 2B4T uses, cuts text into words, and GGUF's names for that; None
# is what Microsoft's converter writes
LLAMA_CUTS = (None, "llama-bpe", "llama3", "llama-v3")
LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TensorInfo(NamedTuple):
    """Where a tensor lies: ggml type, shape with the rows first, first byte and length in
    bytes (None for a type that is not implemented here)."""

    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int | None


class Header(NamedTuple):
    """Everything in a GGUF file but the tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf(
    path: Path, block: int | None = None
) -> tuple[BitNetConfig, Weights, Tokenizer | None]:
    """Read an I2_S file. The codes are repacked for our kernels. Embedding and head may be F32,
    F16, BF16, Q8_0 or Q6_K; see `_table` for what becomes of them.

    block: 128 for files made on x86 (and everywhere before November 2025), 64 for files made on Arm
    since. The format does not record it and every byte is legal in both, so it cannot be detected:
    the default is what the file says, if this package wrote it, and else 128.

    The chat template in Microsoft's file ("Human: ... BITNETAssistant: ...") is not the one that
    the model was trained on; the tokenizer returned has the right one, and a note that says so.
    Raises CheckpointError.
    """
    metadata, infos = read_header(path)
    if (parts := _single(metadata, "split.count", path, 0)) not in (0, 1):
        raise CheckpointError(
            f"{path} is one of {parts} parts of a model: join them with bitnet.cpp's "
            "llama-gguf-split --merge FIRST-PART WHOLE.gguf, and use that file"
        )
    tensors = Tensors(path)
    memory = map_file(path)
    for name, (kind, shape, offset, nbytes) in infos.items():
        if nbytes is None:
            raise CheckpointError(
                f"{path}: {name} is stored as {_type_name(kind)}, which is not implemented here: "
                f"use I2_S for the matrices, and {' or '.join([*FLOATS, *QUANTIZED])} for the "
                "embedding"
            )
        tensors.add(name, Stored(path, memory, _type_name(kind), shape, offset, nbytes))
    config = _read_config(metadata, infos, path)
    refuse_wide(path, config)
    block = block or _single(metadata, BLOCK_KEY, path, 128)
    if type(block) is not int or block not in (64, 128):
        raise fault(path, "a block of I2_S", "128 (x86) or 64 (Arm) weights", repr(block))
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = _table(tensors, "token_embd.weight", vocabulary)
    untied = "output.weight" in tensors.stored
    head = _table(tensors, "output.weight", vocabulary) if untied else embedding
    layers = tuple(_read_layer(tensors, config, i, block) for i in range(config.num_hidden_layers))
    norm = tensors.norm("output_norm.weight", config.hidden_size)
    tensors.refuse_leftovers()
    tokenizer = _read_tokenizer(metadata, config, path)
    return config, Weights(embedding, layers, norm, head), tokenizer


def _read_layer(tensors: Tensors, config: BitNetConfig, index: int, block: int) -> LayerWeights:
    sizes = {"ffn_sub_norm": config.intermediate_size}
    fields = {}
    for field, name in TENSORS.items():
        name = f"blk.{index}.{name}.weight"
        if field in config.matrix_shapes:
            fields[field] = _read_matrix(tensors, name, config.matrix_shapes[field], block)
        else:
            fields[field] = tensors.norm(name, sizes.get(field, config.hidden_size))
    return LayerWeights(**fields)


def _read_matrix(tensors: Tensors, name: str, shape: tuple[int, int], block: int) -> TernaryMatrix:
    """Repack bitnet.cpp's layout into ours; check the scale and every code."""
    stored = tensors.take(name, shape, ("I2_S",))
    if shape[1] % block:
        expected = f"a multiple of the block of {block} weights"
        raise fault(stored.file, f"the width of {name}", expected, str(shape[1]))
    data = stored.bytes()
    scale = data[-SCALE_BYTES : 4 - SCALE_BYTES].view(np.float32)[0]
    if not 0 < scale < np.inf:
        raise fault(stored.file, f"the scale of {name}", "positive", str(scale))
    packed = repack_i2s(data[:-SCALE_BYTES], shape, block)
    stored.release()
    if invalid := count_invalid(packed):
        found = f"the bit pair 11 in {invalid} byte(s)"
        raise fault(stored.file, name, "codes of -1, 0 and +1", found)
    return TernaryMatrix(packed, np.float32(scale))


def _table(tensors: Tensors, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Embedding or head, [vocab, hidden], in the smallest dtype that changes none of its numbers.

    F32 and BF16 stay mapped as they are. F16 becomes bfloat16, which the engine reads fastest, if
    that is exact (Microsoft's was bfloat16 once), else it stays mapped. A quantized one is a scale
    times a whole number: it becomes bfloat16 or float16 where these happen to hold every product,
    in general float32, four times the file's bytes.
    """
    stored = tensors.take(name, shape, (*FLOATS, *QUANTIZED))
    if stored.kind in FLOATS:
        floats = stored.array()
        refuse_nonfinite(stored.file, name, floats)
        if stored.kind == "F16":
            narrow = _converted(floats.__getitem__, shape, ml_dtypes.bfloat16)
            stored.release()
            return floats if narrow is None else narrow
        return floats
    kind = GGMLQuantizationType[stored.kind]
    blocks = stored.bytes().reshape(shape[0], -1)

    def rows(part: slice) -> np.ndarray:
        with np.errstate(all="ignore"):
            floats = dequantize(blocks[part], kind)
        refuse_nonfinite(stored.file, name, floats)
        return floats

    return next(
        table
        for dtype in (ml_dtypes.bfloat16, np.float16, np.float32)
        if (table := _converted(rows, shape, dtype)) is not None
    )


def _converted(
    rows: Callable[[slice], np.ndarray], shape: tuple[int, int], dtype: type
) -> np.ndarray | None:
    """The rows in another dtype, or None if that would change a number."""
    table = np.empty(shape, dtype)
    for first in range(0, len(table), 1024):
        part = slice(first, first + 1024)
        exact = rows(part).astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            table[part] = exact
        if not np.array_equal(table[part].astype(np.float32), exact):
            return None
    return table


def read_header(path: Path) -> Header:
    """Parse keys, values and the table of tensors; every size is checked against the file's."""
    memory = map_file(path)
    try:
        return _Parser(memory).header()
    except BitNetError as error:
        raise CheckpointError(f"{path} {error}") from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({error}): fetch or convert it again"
        ) from None


class _Parser:
    """A place in the file, moving forward. Sizes that the rest of it can't hold are refused."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.place, self.text = data, len(data), 0, 0

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.place = 4
        self.check_version(self.take("I"))
        tensors, keys = self.count(24), self.count(13)
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
            if info.offset + (info.nbytes or 0) > self.size:
                raise ValueError(f"{name} would end after the file")
            if name in infos:
                raise ValueError(f"tensor {name} appears twice")
            infos[name] = info
        return Header(metadata, infos)

    def check_version(self, version: int) -> None:
        if version in (2, 3):
            return
        if version == 1:
            raise BitNetError(
                "is of GGUF's version 1, of 2023, which no BitNet uses: convert the model anew "
                "with bitnet.cpp's tools"
            )
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
            raise BitNetError(
                "is big-endian, made for another kind of processor: turn it round with the gguf "
                "package's command, gguf-convert-endian FILE little"
            )
        raise BitNetError(f"is of version {version} of GGUF: versions 2 and 3 are implemented here")

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

    def charge(self, size: int) -> None:
        """Python's texts and lists take more memory than the file's: there is an end to it."""
        self.text += 64 + size
        if self.text > MOST_TEXT:
            raise ValueError(f"more than {MOST_TEXT} bytes of text")

    def string(self) -> str:
        length = self.count(1)
        self.charge(length)
        self.place += length
        return self.data[self.place - length : self.place].decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value; of an array of numbers, a view of the file."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind != ARRAY or depth > MOST_NESTED:
            raise ValueError(f"value type {kind}, {depth} deep in arrays")
        self.charge(0)
        kind = self.take("I")
        if kind in (STRING, ARRAY):
            return [self.value(kind, depth + 1) for _ in range(self.count(8))]
        if kind not in SCALARS:
            raise ValueError(f"array of type {kind}")
        dtype = np.dtype("<" + SCALARS[kind])
        count = self.count(dtype.itemsize)
        values = np.frombuffer(self.data, dtype, count, self.place) if count else np.empty(0, dtype)
        self.place += count * dtype.itemsize
        return values

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self.string(), self.take("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self.take("Q") for _ in range(dimensions))
        return name, self.take("I"), shape[::-1], self.take("Q")


def _type_name(kind: int) -> str:
    return TYPE_NAMES.get(kind, f"type {kind}")


def _nbytes(name: str, kind: int, shape: tuple[int, ...]) -> int | None:
    """How long a tensor is in the file; None for a type that is not implemented."""
    if kind == I2_S:
        return math.prod(shape) // 4 + SCALE_BYTES
    if _type_name(kind) not in (*FLOATS, *QUANTIZED):
        return None
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % numbers:
        raise BitNetError(
            f"holds {name} as {_type_name(kind)} in rows of {shape[-1]}, which are not whole "
            f"blocks of {numbers}: use F16"
        )
    return math.prod(shape) // numbers * size


def _read_config(
    metadata: dict[str, Any], infos: dict[str, TensorInfo], path: Path
) -> BitNetConfig:
    architecture = _single(metadata, "general.architecture", path)
    if architecture not in ARCHITECTURES:
        expected = " or ".join(map(repr, ARCHITECTURES))
        raise fault(path, "general.architecture", expected, repr(architecture))
    scaling = _single(metadata, f"{architecture}.rope.scaling.type", path, "none")
    if scaling != "none":
        expected = "'none', as others are not implemented"
        raise fault(path, f"{architecture}.rope.scaling.type", expected, repr(scaling))
    raw: dict[str, Any] = {"model_type": "bitnet"}
    if "token_embd.weight" in infos:
        raw["vocab_size"] = infos["token_embd.weight"].shape[0]
    for field, short in METADATA.items():
        key = f"{architecture}.{short}"
        if key in metadata:
            raw[field] = _single(metadata, key, path)
        elif short not in OPTIONAL:
            raise fault(path, key, "there", "nothing")
        if isinstance(raw.get(field), float):
            raw[field] = float(str(np.float32(raw[field])))  # 1e-5, not 9.99999974e-06
    raw["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    raw["eos_token_id"] = [token for token in ends if token is not None]
    return parse_config(raw, path, {})


def _single(metadata: dict[str, Any], key: str, path: Path, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if isinstance(value, list | np.ndarray):
        raise fault(path, key, "a single value", "an array")
    return value


def repack_i2s(i2s: np.ndarray, shape: tuple[int, int], block: int) -> np.ndarray:
    """`pack_hf(unpack_i2s(i2s, shape, block))` in one pass: uint8[out*in/4] -> uint8[out/4, in].

    Rows must be whole blocks: `in` a multiple of `block`.
    """
    rows, columns = shape
    packed = np.empty((rows // 4, columns), np.uint8)
    _repack(i2s.view(np.uint64).reshape(4, rows // 4, -1), packed.view(np.uint64), block // 32)
    return packed


@cached_jit
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
    model = _single(metadata, "tokenizer.ggml.model", path)
    cut = _single(metadata, "tokenizer.ggml.pre", path)
    if HF_TOKENIZER_KEY not in metadata and (model != "gpt2" or cut not in LLAMA_CUTS):
        found = f"{model!r} cutting text like {cut!r}"
        raise fault(path, "the tokenizer", "Llama 3's ('gpt2' cutting like 'llama-bpe')", found)
    tokens = metadata["tokenizer.ggml.tokens"]

    def text(key: str) -> str:
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[token] if token is not None else ""

    try:
        if len(tokens) > config.vocab_size or len(set(tokens)) != len(tokens):
            raise ValueError(
                f"{len(set(tokens))} different of {len(tokens)} tokens for a vocabulary of "
                f"{config.vocab_size}"
            )
        if HF_TOKENIZER_KEY in metadata:
            backend = backend_of(metadata[HF_TOKENIZER_KEY], HF_TOKENIZER_KEY)
        else:
            starts = metadata.get("tokenizer.ggml.add_bos_token", True)
            backend = _llama_bpe(metadata, text("bos") if starts else "")
        template = metadata.get("tokenizer.chat_template") or BITNET_CHAT_TEMPLATE
        wrong = "BITNETAssistant" in template  # what the converter writes into every file
        template = BITNET_CHAT_TEMPLATE if wrong else template
        tokenizer = Tokenizer(backend, template, text("bos"), text("eos"))
    except BaseException as error:  # the tokenizers library raises bare Exception, and panics
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CheckpointError(f"{path}: the embedded tokenizer is damaged: {error}") from None
    if wrong:
        tokenizer.note = (
            f"the chat template in {printable(path.name)} is not the model's own: the right one "
            "is used instead"
        )
    return tokenizer


def _llama_bpe(metadata: dict[str, Any], bos: str) -> HFTokenizer:
    """Rebuild Llama 3's tokenizer from its tokens, their types and the merges.

    In text, CONTROL and UNKNOWN tokens are found and count as special, USER_DEFINED ones are found
    and are text. BYTE tokens ("<0x0A>") stand for their byte. UNUSED ones are never found.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type")
    types = [int(TokenType.NORMAL)] * len(tokens) if types is None else list(map(int, types))
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
    if TokenType.BYTE in types:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.ByteLevel()])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    special = {TokenType.CONTROL, TokenType.UNKNOWN}
    # in the order of their ids, which the library keeps, and special and other ones together
    backend.add_tokens(
        [
            AddedToken(token, special=kind in special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in special or kind == TokenType.USER_DEFINED
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
    block: 128 for bitnet.cpp on x86, 64 on Arm. CheckpointError for what the format can't hold;
    either the whole file gets there or nothing.
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
    sizes = {name: _nbytes(name, *_kind(array)) for name, array in arrays}
    with all_or_nothing(path, sum(sizes.values()) + 2**24) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        try:
            for key, value in _metadata(config, tokenizer, block).items():
                writer.add_key_value(key, value, VALUE_TYPES[type(value)])
            for name, array in arrays:
                kind, shape = _kind(array)
                size = sizes[name]
                writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.int8), size, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, array in arrays:
                writer.write_tensor_data(_data(name, array, block))
        finally:
            writer.close()


def writing_notes(weights: Weights, tokenizer: Tokenizer | None) -> list[str]:
    """What a user should know of the GGUF file that `write_gguf` makes of these."""
    notes = []
    changed, most = 0, 0.0
    for rows in np.array_split(weights.embedding, -(-weights.embedding.size // 2**22)):
        exact = rows.astype(np.float32)
        difference = np.abs(rows.astype(np.float16).astype(np.float32) - exact)
        changed, most = changed + np.count_nonzero(difference), max(most, float(difference.max()))
    if changed:
        values = f"{changed:,} of {weights.embedding.size:,} embedding values"
        notes.append(
            f"{values} were rounded, by at most {most:.1e}: bitnet.cpp stores them as float16"
        )
    if tokenizer and not _cuts_like_llama(tokenizer):
        notes.append(
            "this tokenizer does not cut text like Llama 3's, the only way that bitnet.cpp has for "
            "a BitNet: there the same text will become other tokens, and answers may be worse"
        )
    return notes


def _kind(array: np.ndarray | TernaryMatrix) -> tuple[int, tuple[int, ...]]:
    """ggml type and shape, rows first: matrices I2_S, vectors F32, the embedding F16."""
    if isinstance(array, TernaryMatrix):
        return I2_S, array.shape
    return (0 if array.ndim == 1 else 1), array.shape


def _data(name: str, array: np.ndarray | TernaryMatrix, block: int) -> np.ndarray:
    if isinstance(array, TernaryMatrix):
        tail = np.zeros(SCALE_BYTES, np.uint8)
        tail[:4] = np.array([array.scale], np.float32).view(np.uint8)
        return np.concatenate([pack_i2s(array.codes(), block), tail])
    with np.errstate(over="ignore"):
        data = array.astype(FLOATS[_type_name(_kind(array)[0])])
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
    model = json.loads(whole)["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"a GGUF file holds a BPE tokenizer, not one of type {model['type']}")
    if not model["merges"]:
        raise CheckpointError(
            "this tokenizer has no merges, and bitnet.cpp loads no tokenizer without: write a "
            "folder instead, or take another tokenizer"
        )
    tokens = [tokenizer.backend.id_to_token(i) for i in range(config.vocab_size)]
    tokens = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    kinds = [
        int(TokenType.UNUSED if token == f"[PAD{i}]" else TokenType.NORMAL)
        for i, token in enumerate(tokens)
    ]
    for index, token in tokenizer.backend.get_added_tokens_decoder().items():
        kinds[index] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.add_bos_token": tokenizer.encode("")[:1] == [config.bos_token_id],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        # a lone surrogate, which JSON can hold and UTF-8 can't, becomes a question mark
        "tokenizer.chat_template": tokenizer.chat_template.encode("utf-8", "replace").decode(),
        HF_TOKENIZER_KEY: whole,
    }
    if _cuts_like_llama(tokenizer):
        keys["tokenizer.ggml.pre"] = "llama-bpe"
    return keys


def _cuts_like_llama(tokenizer: Tokenizer) -> bool:
    cut = json.loads(tokenizer.backend.to_str())["pre_tokenizer"]
    steps = (cut or {}).get("pretokenizers", [])
    return any(step.get("pattern") == {"Regex": LLAMA_BPE} for step in steps)
