"""Between two products, one token at a time: residual, squared ReLU, RMSNorm, quantization.

The operations and their order are those of layers.py and quantize.py, so that both give the same
int8 activations; only sums are added up in another order.
"""

import math

import numpy as np

from bitnet_edu.kernels.bits import as_float, jit, sum_jit


@jit
def add_sums(x, sums, scale):
    """The residual: x += sums * scale."""
    for i in range(len(x)):
        x[i] += np.float32(sums[i]) * scale


@jit
def squared_relu(gates, gate_scale, ups, up_scale, out):
    """relu(gate)**2 * up, from int32 sums."""
    for i in range(len(out)):
        gate = max(np.float32(gates[i]) * gate_scale, np.float32(0))
        out[i] = gate * gate * (np.float32(ups[i]) * up_scale)


@jit
def norm_and_quantize(x, weight, eps, normed, q):
    """normed = RMSNorm(x), q = its absmax int8. Returns (scale, sum of q, whether all is finite).

    NaN and Inf become zeros: whoever calls must report them.
    """
    root = math.sqrt(mean_square(x) + eps)
    for i in range(len(x)):
        normed[i] = weight[i] * (x[i] / root)
    largest = largest_magnitude(normed)
    finite = largest < np.inf
    if not finite:
        normed[:] = 0
        largest = np.float32(0)
    inverse = np.float32(1) / max(largest, np.float32(1e-5)) * np.float32(127)
    return np.float32(1) / inverse, round_to_int8(normed, inverse, q), finite


@sum_jit
def mean_square(x):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return total / np.float32(len(x))


@jit
def largest_magnitude(x):
    """max |x|, NaN or Inf where x holds any: without their signs, floats order like their bits."""
    bits, largest = x.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return as_float(largest)


@jit
def round_to_int8(x, inverse, q):
    """q = round half to even(x * inverse); returns the sum of q."""
    magic = np.float32(3 << 22)  # float32 has no fraction bits up here, so that adding it rounds
    total = np.int32(0)
    for i in range(len(x)):
        value = np.int32((x[i] * inverse + magic) - magic)
        q[i] = value
        total += value
    return total
