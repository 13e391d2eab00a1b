"""The parts of a BitNet block as pure functions on float32 arrays. T tokens, no batch axis."""

from collections.abc import Callable

import numpy as np

from bitnet_edu.quantize import absmax_int8

Observer = Callable[[str, np.ndarray], None]  # is shown arrays between the steps, by name


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Divide each token by its root mean square, then multiply by a learned weight.

    x: float32[..., n], weight: float32[n]. Returns float32[..., n].
    Called SubLN where it stands just before an output projection (attn_sub_norm, ffn_sub_norm).
    Source: RMSNorm (arXiv 1910.07467), equation 4; SubLN (arXiv 2210.06423).
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return weight * (x / np.sqrt(mean_square + np.float32(eps)))


def squared_relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)**2, elementwise. Source: Primer (arXiv 2109.08668); 2B4T report (2504.12285)."""
    return np.square(np.maximum(x, 0))


def bit_linear(x: np.ndarray, codes: np.ndarray, scale: np.float32) -> np.ndarray:
    """A linear layer with ternary weights, int8 activations: exact integer sums, then two scales.

    x: float32[T, in], codes: int8[out, in] in {-1, 0, 1}, scale: float32 that MULTIPLIES.
    Returns float32[T, out]. Source: BitNet b1.58 (arXiv 2402.17764), section 2.
    """
    q, x_scale = absmax_int8(x)
    return integer_matmul(q, codes).astype(np.float32) * (x_scale * np.float32(scale))


def integer_matmul(q: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The exact product q @ codes.T: int8[T, in] x int8[out, in] -> int32[T, out].

    NumPy multiplies integer matrices without BLAS. float32 holds every integer up to 2**24, and
    no partial sum can exceed 128 * in, so below 131,072 columns a float32 product is exact too.
    """
    if q.shape[-1] >= 2**24 // 128:
        return q.astype(np.int32) @ codes.T.astype(np.int32)
    return (q.astype(np.float32) @ codes.T.astype(np.float32)).astype(np.int32)


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Radians per position, float32[head_dim/2]: theta**(-2i/head_dim). RoFormer, section 3.2."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.power(np.float64(theta), exponents).astype(np.float32)


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotate each head's vector by its position (rotary position embedding, rotate-half form).

    x: float32[T, heads, head_dim], positions: int[T]. Element i is paired with i + head_dim/2.
    Source: RoFormer (arXiv 2104.09864), section 3.2; the pairing is transformers' own.
    """
    half = x.shape[-1] // 2
    angles = positions.astype(np.float32)[:, None, None] * rope_frequencies(2 * half, theta)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, shifted by the maximum so that nothing overflows."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal grouped-query attention (GQA): the last T of S positions look back.

    q: float32[T, heads, head_dim]; k, v: float32[S, kv_heads, head_dim], S >= T, heads a multiple
    of kv_heads. Returns float32[T, heads, head_dim].
    Source: Attention Is All You Need (arXiv 1706.03762), equation 1; GQA (arXiv 2305.13245).
    """
    (t, heads, head_dim), (s, kv_heads, _) = q.shape, k.shape
    k = np.repeat(k, heads // kv_heads, axis=1).transpose(1, 2, 0)
    v = np.repeat(v, heads // kv_heads, axis=1).transpose(1, 0, 2)
    scores = q.transpose(1, 0, 2) @ k * np.float32(head_dim**-0.5)
    future = np.arange(s) > np.arange(s - t, s)[:, None]
    return (softmax(np.where(future, -np.inf, scores)) @ v).transpose(1, 0, 2)
