"""A whole BitNet in NumPy, without a cache, a kernel or a trick: the oracle of every test.

Read it from top to bottom: tokens become vectors, each layer adds what attention and then the
feed-forward network found, and the last norm and the head turn vectors into logits.
"""

import numpy as np

from bitnet_edu.layers import Observer, attention, integer_matmul, rms_norm, rope, squared_relu
from bitnet_edu.quantize import absmax_int8
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights


class BitNetReference:
    """The NumPy model. `observe(name, array)`, where given, is shown every intermediate array.

    It sees each array before the next step uses it, and may change it: so `verify` replays
    another program's roundings.
    """

    def __init__(self, config: BitNetConfig, weights: Weights):
        self.config = config
        self.weights = weights

    def logits(self, ids: np.ndarray, observe: Observer | None = None) -> np.ndarray:
        """Scores of every possible next token after each prefix: int[T] -> float32[T, vocab]."""
        see = observe or (lambda name, array: None)
        x = self.weights.embedding[np.asarray(ids)].astype(np.float32)
        see("embedding", x)
        for index, layer in enumerate(self.weights.layers):
            x = self.decoder_layer(x, layer, lambda name, a, i=index: see(f"layers.{i}.{name}", a))
        x = rms_norm(x, self.weights.norm, self.config.rms_norm_eps)
        see("norm", x)
        return x @ self.weights.lm_head.astype(np.float32).T

    def decoder_layer(self, x: np.ndarray, layer: LayerWeights, see: Observer) -> np.ndarray:
        """One block, float32[T, hidden] to the same: each half adds to the residual stream."""
        x = x + self.attention_half(self.norm(x, layer.input_layernorm), layer, see)
        see("after_attention", x)
        x = x + self.feed_forward_half(self.norm(x, layer.post_attention_layernorm), layer, see)
        see("after_feed_forward", x)
        return x

    def attention_half(self, x: np.ndarray, layer: LayerWeights, see: Observer) -> np.ndarray:
        """Project to heads, rotate by position, look back, normalise (SubLN), project out."""
        config, positions = self.config, np.arange(len(x))
        heads = (len(x), -1, config.head_dim)
        q = bit_linear_packed(x, layer.q_proj, "q_proj", see).reshape(heads)
        k = bit_linear_packed(x, layer.k_proj, "k_proj", see).reshape(heads)
        v = bit_linear_packed(x, layer.v_proj, "v_proj", see).reshape(heads)
        q, k = rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta)
        for name, array in (("queries", q), ("keys", k), ("values", v)):
            see(name, array)
        mixed = attention(q, k, v).reshape(len(x), -1)
        see("attention", mixed)
        return bit_linear_packed(self.norm(mixed, layer.attn_sub_norm), layer.o_proj, "o_proj", see)

    def feed_forward_half(self, x: np.ndarray, layer: LayerWeights, see: Observer) -> np.ndarray:
        """Squared-ReLU gate times up-projection, normalised (SubLN), projected down."""
        gate = bit_linear_packed(x, layer.gate_proj, "gate_proj", see)
        up = bit_linear_packed(x, layer.up_proj, "up_proj", see)
        inner = squared_relu(gate) * up
        see("feed_forward", inner)
        inner = self.norm(inner, layer.ffn_sub_norm)
        return bit_linear_packed(inner, layer.down_proj, "down_proj", see)

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return rms_norm(x, weight, self.config.rms_norm_eps)


def bit_linear_packed(x: np.ndarray, matrix: TernaryMatrix, name: str, see: Observer) -> np.ndarray:
    """`layers.bit_linear` on packed weights, showing input, codes and integer sums to `see`."""
    codes = matrix.codes()
    q, x_scale = absmax_int8(x)
    see(f"{name}.input", x)
    see(f"{name}.codes", codes)
    see(f"{name}.int8", q)
    sums = integer_matmul(q, codes)
    see(f"{name}.sums", sums)
    return sums.astype(np.float32) * (x_scale * np.float32(matrix.scale))
