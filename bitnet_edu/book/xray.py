"""What the loaded weights look like: share of zeros, entropy, scale, per matrix and layer."""

from typing import NamedTuple

import numpy as np

from bitnet_edu.weights import TernaryMatrix, Weights

# how often a packed byte holds the codes -1, 0 and +1: int64[256, 3]
CODES_IN_BYTE = np.array(
    [[sum(byte >> s & 3 == code for s in (0, 2, 4, 6)) for code in range(3)] for byte in range(256)]
)


class MatrixXray(NamedTuple):
    """One ternary matrix in three numbers."""

    layer: int
    matrix: str
    zero_share: float  # of all weights, 0 to 1
    entropy_bits: float  # per weight: what an ideal code would need; log2(3) = 1.585 at most
    scale: float


def code_counts(packed: np.ndarray) -> np.ndarray:
    """How many weights are -1, 0 and +1: uint8[out/4, in] in Hugging Face's layout -> int64[3].

    Counts the 256 byte values instead of unpacking: a 2B4T model takes about a second.
    """
    return np.bincount(packed.reshape(-1), minlength=256) @ CODES_IN_BYTE


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon entropy of a histogram, in bits per weight."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def xray(weights: Weights) -> list[MatrixXray]:
    """Every ternary matrix of the model, layer by layer in the order of `LayerWeights`."""
    rows = []
    for index, layer in enumerate(weights.layers):
        for name, matrix in zip(layer._fields, layer, strict=True):
            if isinstance(matrix, TernaryMatrix):
                counts = code_counts(matrix.in_two_bits())
                zero_share = float(counts[1] / counts.sum())
                row = (index, name, zero_share, entropy_bits(counts), float(matrix.scale))
                rows.append(MatrixXray(*row))
    return rows
