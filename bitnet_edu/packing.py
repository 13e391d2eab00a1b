"""Ternary codes to bytes and back, in the layouts that matter.

| layout | bits a weight | who reads it |
| --- | --- | --- |
| `hf` | 2 | Hugging Face transformers, and this package's kernels |
| `i2s` | 2 | bitnet.cpp (GGUF tensor type I2_S) |
| `base3` | 1.6 | who wants to see it: five neighbours in a byte, because 3**5 = 243 <= 256 |
| `base3_rows` | 1.6 | this package's kernels: five rows in a byte, as `hf` has four |
"""

import numpy as np

POWERS_OF_3 = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def _as_codes(codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2:
        raise ValueError(f"codes must be a matrix [out, in], not an array of shape {codes.shape}")
    if not np.isin(codes, (-1, 0, 1)).all():
        raise ValueError("codes must be -1, 0 or +1: quantize with absmean_ternary first")
    return codes.astype(np.int8)


def _as_trits(unsigned: np.ndarray) -> np.ndarray:
    if unsigned.size and unsigned.max() == 3:
        raise ValueError("bit pattern 11 found: these bytes are not ternary weights")
    return unsigned.astype(np.int8) - np.int8(1)


def pack_hf(codes: np.ndarray) -> np.ndarray:
    """Pack int8[out, in] codes into uint8[out/4, in], Hugging Face's layout.

    Byte row r holds the output rows r, r + out/4, r + 2*out/4 and r + 3*out/4 in the bit pairs
    0-1, 2-3, 4-5 and 6-7; a pair stores code + 1. `out` must be a multiple of 4 (ValueError).
    Source: transformers, integrations/bitnet.py.
    """
    codes = _as_codes(codes)
    rows, columns = codes.shape
    if rows % 4:
        raise ValueError(f"{rows} output rows cannot be packed in fours: not a multiple of 4")
    blocks = (codes + 1).astype(np.uint8).reshape(4, rows // 4, columns)
    return blocks[0] | blocks[1] << 2 | blocks[2] << 4 | blocks[3] << 6


def unpack_hf(packed: np.ndarray) -> np.ndarray:
    """Undo `pack_hf`: uint8[out/4, in] -> int8[out, in]. ValueError where a pair reads 3."""
    packed = np.asarray(packed, dtype=np.uint8)
    return _as_trits(np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)]))


def pack_i2s(codes: np.ndarray, block: int = 128) -> np.ndarray:
    """Pack int8[out, in] codes into uint8[out*in/4], bitnet.cpp's I2_S layout.

    Each run of `block` weights (128 on x86, 64 on Arm since November 2025) becomes block/4 bytes:
    weight j of the run lies in byte j mod block/4, in bits 7-6, 5-4, 3-2, 1-0 for the first to the
    fourth quarter; a pair stores code + 1. out*in must be a multiple of `block` (ValueError).
    Source: microsoft/BitNet, src/ggml-bitnet-mad.cpp.
    """
    codes = _as_codes(codes)
    if codes.size % block:
        raise ValueError(f"{codes.size} weights are not a multiple of the block of {block}")
    quarters = (codes + 1).astype(np.uint8).reshape(-1, 4, block // 4)
    packed = quarters[:, 0] << 6 | quarters[:, 1] << 4 | quarters[:, 2] << 2 | quarters[:, 3]
    return packed.reshape(-1)


def unpack_i2s(packed: np.ndarray, shape: tuple[int, int], block: int = 128) -> np.ndarray:
    """Undo `pack_i2s`: uint8[out*in/4] -> int8[shape]. ValueError where a pair reads 3."""
    quarters = np.asarray(packed, dtype=np.uint8).reshape(-1, 1, block // 4)
    shifts = np.array([6, 4, 2, 0], dtype=np.uint8)[:, None]
    return _as_trits((quarters >> shifts & 3).reshape(shape))


def pack_base3(codes: np.ndarray) -> np.ndarray:
    """Pack int8[out, in] codes into uint8[out, ceil(in/5)]: five base-3 digits a byte.

    The first weight of a run of five is the lowest digit; a short last run is filled with code 0.
    """
    codes = _as_codes(codes)
    rows, columns = codes.shape
    digits = np.ones((rows, -(-columns // 5) * 5), dtype=np.uint8)
    digits[:, :columns] = codes + 1
    return (digits.reshape(rows, -1, 5) * POWERS_OF_3).sum(axis=-1, dtype=np.uint8)


def unpack_base3(packed: np.ndarray, columns: int) -> np.ndarray:
    """Undo `pack_base3`: uint8[out, ceil(in/5)] -> int8[out, in]. ValueError for bytes over 242."""
    packed = np.asarray(packed, dtype=np.uint8)
    if packed.size and packed.max() > 242:
        raise ValueError("a byte over 242 found: five base-3 digits never make one")
    digits = packed[:, :, None] // POWERS_OF_3 % 3
    return digits.reshape(len(packed), -1)[:, :columns].astype(np.int8) - np.int8(1)


def pack_base3_rows(codes: np.ndarray) -> np.ndarray:
    """Pack int8[out, in] codes into uint8[ceil(out/5), in]: five base-3 digits a byte.

    Byte row r holds the output rows r, r + R, ... r + 4 R, R = ceil(out/5), the first as the lowest
    digit; a digit is code + 1, and rows that don't exist are filled with code 0.
    """
    codes = _as_codes(codes)
    out, columns = codes.shape
    digits = np.ones((-(-out // 5) * 5, columns), dtype=np.uint8)
    digits[:out] = codes + 1
    blocks = digits.reshape(5, -1, columns) * POWERS_OF_3[:, None, None]
    return blocks.sum(axis=0, dtype=np.uint8)


def unpack_base3_rows(packed: np.ndarray, out: int) -> np.ndarray:
    """Undo `pack_base3_rows`: uint8[ceil(out/5), in] -> int8[out, in]. ValueError over 242."""
    packed = np.asarray(packed, dtype=np.uint8)
    if packed.size and packed.max() > 242:
        raise ValueError("a byte over 242 found: five base-3 digits never make one")
    digits = packed[None] // POWERS_OF_3[:, None, None] % 3
    return digits.reshape(-1, packed.shape[1])[:out].astype(np.int8) - np.int8(1)
