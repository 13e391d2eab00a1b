"""Numbers to fewer bits: ternary weights and 8-bit activations.

Both quantizers divide by a scale, round half to even and clip.
Weights share one scale per matrix (the mean of the absolute values); activations have one
scale per token (the largest absolute value).
"""

import numpy as np

SCALE_FLOOR = np.float32(1e-5)  # keeps an all-zero matrix or token from dividing by zero


def absmean_ternary(w: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Round a weight matrix to {-1, 0, +1} times its mean absolute value.

    w: float[out, in]. Returns (codes int8[out, in] in {-1, 0, 1}, scale float32), so that
    w ≈ codes * scale. Source: BitNet b1.58 (arXiv 2402.17764), section 2, equations 1 to 3.
    """
    w = np.asarray(w, dtype=np.float32)
    mean = np.abs(w).mean(dtype=np.float64).astype(np.float32)
    scale = np.maximum(mean, SCALE_FLOOR)
    codes = np.clip(np.rint(w * (np.float32(1) / scale)), -1, 1).astype(np.int8)
    return codes, scale


def ternary_to_float(codes: np.ndarray, scale: np.float32) -> np.ndarray:
    """Undo `absmean_ternary` as far as it can be undone: int8[out, in] -> float32[out, in]."""
    return codes.astype(np.float32) * np.float32(scale)


def absmax_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each token's activations to int8 so that its largest magnitude becomes 127.

    x: float[..., n]. Returns (q int8[..., n], scale float32[..., 1]), so that x ≈ q * scale.
    Source: BitNet b1.58 (arXiv 2402.17764), section 2; per token, without zero point.
    """
    x = np.asarray(x, dtype=np.float32)
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), SCALE_FLOOR)
    # torch divides a number by a tensor as reciprocal times number: rounded twice, like here
    inverse = np.float32(1) / largest * np.float32(127)
    q = np.clip(np.rint(x * inverse), -128, 127).astype(np.int8)
    return q, np.float32(1) / inverse


def int8_to_float(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Undo `absmax_int8` up to half a step: (int8[..., n], float32[..., 1]) -> float32[..., n]."""
    return q.astype(np.float32) * scale


def relative_error(exact: np.ndarray, approximate: np.ndarray) -> float:
    """Root-mean-square error as a share of the root-mean-square of `exact` (0 is perfect)."""
    exact = np.asarray(exact, dtype=np.float64)
    error = np.sqrt(np.mean((exact - approximate) ** 2))
    return float(error / np.sqrt(np.mean(exact**2)))


def signal_to_noise(exact: np.ndarray, approximate: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio in decibels: 6 dB is about one bit of precision."""
    return float(-20 * np.log10(max(relative_error(exact, approximate), 1e-300)))
