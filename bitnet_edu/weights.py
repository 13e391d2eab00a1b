"""What a model is made of: its shape and its arrays. Every format is read into these."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from bitnet_edu.packing import pack_hf, unpack_base3_rows, unpack_hf


class BitNetConfig(NamedTuple):
    """The shape of a model, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of a layer's seven ternary matrices, in the order of `LayerWeights`."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        kv = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
        }


BITNET_2B4T = BitNetConfig(
    vocab_size=128256,
    hidden_size=2560,
    intermediate_size=6912,
    num_hidden_layers=30,
    num_attention_heads=20,
    num_key_value_heads=5,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    eos_token_ids=(128001, 128009),
)


class TernaryMatrix(NamedTuple):
    """A weight matrix [out, in] of {-1, 0, +1} * scale, packed in Hugging Face's layout.

    Or, where base3_rows tells how many rows there are, in that of `packing.pack_base3_rows`.
    """

    packed: np.ndarray  # uint8[out/4, in] or uint8[ceil(out/5), in], possibly memory-mapped
    scale: np.float32  # multiplies, whatever the file says
    base3_rows: int | None = None

    @property
    def packing(self) -> str:
        """ "2bit" or "base3"."""
        return "2bit" if self.base3_rows is None else "base3"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.packed.shape
        return 4 * rows if self.base3_rows is None else self.base3_rows, columns

    def codes(self) -> np.ndarray:
        """int8[out, in]."""
        if self.base3_rows is None:
            return unpack_hf(self.packed)
        return unpack_base3_rows(self.packed, self.base3_rows)

    def in_two_bits(self) -> np.ndarray:
        """The codes in Hugging Face's layout, uint8[out/4, in]."""
        return self.packed if self.base3_rows is None else pack_hf(self.codes())


class LayerWeights(NamedTuple):
    """One decoder layer: seven ternary matrices, four float32 norm weights."""

    q_proj: TernaryMatrix
    k_proj: TernaryMatrix
    v_proj: TernaryMatrix
    o_proj: TernaryMatrix
    gate_proj: TernaryMatrix
    up_proj: TernaryMatrix
    down_proj: TernaryMatrix
    input_layernorm: np.ndarray  # [hidden]
    post_attention_layernorm: np.ndarray  # [hidden]
    attn_sub_norm: np.ndarray  # [hidden]
    ffn_sub_norm: np.ndarray  # [intermediate]


class Weights(NamedTuple):
    """A whole model. Embedding and head keep the file's dtype (bfloat16, float16 or float32)."""

    embedding: np.ndarray  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: np.ndarray  # float32[hidden]
    lm_head: np.ndarray  # [vocab, hidden]; the same array as `embedding` where the two are tied

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, by storage or by value."""
        return self.lm_head is self.embedding or np.array_equal(self.lm_head, self.embedding)


def random_weights(config: BitNetConfig, seed: int = 0) -> Weights:
    """A model of any shape with random ternary weights: for measuring and testing, no download.

    Random 16-bit numbers are looked up in tables of 2**16 ready values, which makes the 2B4T shape
    (1.2 GB) a matter of seconds: two bytes of packed weights, or one normally distributed bfloat16.
    """
    import ml_dtypes

    rng = np.random.default_rng(seed)
    legal = [byte for byte in range(256) if all(byte >> shift & 3 < 3 for shift in (0, 2, 4, 6))]
    two_bytes = np.array(
        [legal[i // 81 % 81] + 256 * legal[i % 81] for i in range(2**16)], np.uint16
    )
    quantile = NormalDist().inv_cdf
    normal = np.array([quantile((i + 0.5) / 2**16) for i in range(2**16)]).astype(
        ml_dtypes.bfloat16
    )

    def draw(table: np.ndarray, size: int) -> np.ndarray:
        values = np.empty(size, np.uint16)
        for first in range(0, size, 2**20):
            part = values[first : first + 2**20]
            quarter = rng.integers(0, 2**64, -(-len(part) // 4), np.uint64)
            np.take(table.view(np.uint16), quarter.view(np.uint16)[: len(part)], out=part)
        return values

    shapes = list(config.matrix_shapes.values()) * config.num_hidden_layers
    ends = np.cumsum([out * n // 4 for out, n in shapes])
    memory = draw(two_bytes, -(-ends[-1] // 2)).view(np.uint8)  # one piece, as in a file
    matrices = [
        TernaryMatrix(
            memory[end - out * n // 4 : end].reshape(out // 4, n),
            # like Microsoft's, the scale is a bfloat16
            np.float32(ml_dtypes.bfloat16(1.2 / np.sqrt(n))),
        )
        for (out, n), end in zip(shapes, ends, strict=True)
    ]

    def norm(n: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, n).astype(ml_dtypes.bfloat16).astype(np.float32)

    hidden, ffn = config.hidden_size, config.intermediate_size
    embedding = draw(normal, config.vocab_size * hidden).view(ml_dtypes.bfloat16)
    embedding = embedding.reshape(config.vocab_size, hidden)
    layers = tuple(
        LayerWeights(
            *matrices[7 * i : 7 * i + 7],
            norm(hidden),
            norm(hidden),
            norm(hidden),
            norm(ffn),
        )
        for i in range(config.num_hidden_layers)
    )
    return Weights(embedding, layers, norm(hidden), embedding)
