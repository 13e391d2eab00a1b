"""The engine: the same maths as reference.py on compiled kernels, with a KV cache."""

import numpy as np

from bitnet_edu.errors import ContextLengthError, InputError
from bitnet_edu.kernels.matmul import ternary_matmul
from bitnet_edu.layers import attention, rms_norm, rope, squared_relu
from bitnet_edu.quantize import absmax_int8
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights


class KVCache:
    """Keys and values of the tokens seen so far: float32[layers, max_len, kv_heads, head_dim] each."""

    def __init__(self, config: BitNetConfig, max_len: int):
        if not 1 <= max_len <= config.max_position_embeddings:
            raise ContextLengthError(
                f"a cache of {max_len} tokens was asked for, but this model's context is 1 to "
                f"{config.max_position_embeddings} tokens: ask for a max_len in that range"
            )
        shape = config.num_hidden_layers, max_len, config.num_key_value_heads, config.head_dim
        self.keys = np.zeros(shape, np.float32)
        self.values = np.zeros(shape, np.float32)
        self.max_len = max_len
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot keep {length} tokens of a cache that holds {self.length}")
        self.length = length


class BitNet:
    """A model that maps token ids to logits. Text comes in `bitnet_edu.generate`."""

    def __init__(self, config: BitNetConfig, weights: Weights):
        self.config = config
        self.weights = weights

    def new_cache(self, max_len: int | None = None) -> KVCache:
        """An empty KV cache for up to `max_len` tokens (default: the model's whole context)."""
        return KVCache(self.config, max_len or self.config.max_position_embeddings)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Scores after every prefix of the sequence: int[T] -> float32[T, vocab]."""
        ids = self._checked(ids)
        return self._head(self._body(ids, self.new_cache(len(ids))))

    def forward(self, ids: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append int[T] tokens to the cache; return the scores of the next token, float32[vocab].

        ContextLengthError, with the cache as it was, if the tokens don't fit in it.
        """
        return self._head(self._body(self._checked(ids), cache)[-1])

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise InputError("token ids must be a non-empty one-dimensional list of integers")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)][0]
            raise InputError(
                f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}"
            )
        return ids

    def _body(self, ids: np.ndarray, cache: KVCache) -> np.ndarray:
        """All layers: int[T] -> float32[T, hidden] after the last norm; the cache grows by T."""
        if cache.length + len(ids) > cache.max_len:
            raise ContextLengthError(
                f"{len(ids)} tokens do not fit after {cache.length} in a context of {cache.max_len}: "
                "shorten the prompt or start a new conversation"
            )
        x = self.weights.embedding[ids].astype(np.float32)
        for index, layer in enumerate(self.weights.layers):
            x = self._layer(x, layer, cache, index)
        cache.length += len(ids)
        return rms_norm(x, self.weights.norm, self.config.rms_norm_eps)

    def _layer(self, x: np.ndarray, layer: LayerWeights, cache: KVCache, index: int) -> np.ndarray:
        config, eps = self.config, self.config.rms_norm_eps
        start, end = cache.length, cache.length + len(x)
        positions, heads = np.arange(start, end), (len(x), -1, config.head_dim)

        normed = rms_norm(x, layer.input_layernorm, eps)
        q, k, v = (
            y.reshape(heads) for y in _project(normed, layer.q_proj, layer.k_proj, layer.v_proj)
        )
        cache.keys[index, start:end] = rope(k, positions, config.rope_theta)
        cache.values[index, start:end] = v
        q = rope(q, positions, config.rope_theta)
        mixed = attention(q, cache.keys[index, :end], cache.values[index, :end]).reshape(len(x), -1)
        x = x + _project(rms_norm(mixed, layer.attn_sub_norm, eps), layer.o_proj)[0]

        normed = rms_norm(x, layer.post_attention_layernorm, eps)
        gate, up = _project(normed, layer.gate_proj, layer.up_proj)
        inner = rms_norm(squared_relu(gate) * up, layer.ffn_sub_norm, eps)
        return x + _project(inner, layer.down_proj)[0]

    def _head(self, x: np.ndarray) -> np.ndarray:
        return x @ self.weights.lm_head.astype(np.float32).T


def _project(x: np.ndarray, *matrices: TernaryMatrix) -> list[np.ndarray]:
    """BitLinear with each matrix; the activations are quantized once for all of them."""
    q, x_scale = absmax_int8(x)
    outputs = []
    for packed, scale in matrices:
        sums = np.empty((len(x), 4 * len(packed)), np.int32)
        ternary_matmul(packed, q, sums)
        outputs.append(sums.astype(np.float32) * (x_scale * np.float32(scale)))
    return outputs
