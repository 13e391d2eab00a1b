"""The standard Transformer block beside the BitNet block, and the X-ray of the loaded weights."""

import inspect
from typing import Any

import anywidget
from IPython.display import HTML

from bitnet_edu import layers
from bitnet_edu.book.xray import xray
from bitnet_edu.model import BitNet
from bitnet_edu.ui.figure import live_figure, static_figure
from bitnet_edu.weights import BitNetConfig

# (label in a standard block, label in a BitNet block, explanation, function, chapter, matrices)
ROWS = (
    (
        "RMSNorm",
        "RMSNorm",
        "Brings every token to root mean square 1, so that its int8 scale is well used.",
        layers.rms_norm,
        "09_norms_and_squared_relu",
        (),
    ),
    (
        "Linear q, k, v",
        "BitLinear q, k, v",
        "Weights are -1, 0 or +1 and inputs int8: the products are sums of integers. Two scales "
        "at the end bring them back to floats.",
        layers.bit_linear,
        "05_bitlinear",
        ("q_proj", "k_proj", "v_proj"),
    ),
    (
        "RoPE",
        "RoPE",
        "Rotates queries and keys by their position; nothing is learned, nothing is ternary.",
        layers.rope,
        "10_rope_attention_kv_cache",
        (),
    ),
    (
        "Attention",
        "Attention (GQA)",
        "Each token looks back at all earlier ones. Several query heads share one key and value "
        "head, which makes the KV cache smaller. Stays in floats.",
        layers.attention,
        "10_rope_attention_kv_cache",
        (),
    ),
    (
        None,
        "SubLN",
        "A second norm, right before the output projection quantizes: the heads' outputs differ "
        "widely in size. A standard block has none here.",
        layers.rms_norm,
        "09_norms_and_squared_relu",
        (),
    ),
    (
        "Linear o",
        "BitLinear o",
        "Mixes the heads and writes to the residual stream, which stays in floats.",
        layers.bit_linear,
        "05_bitlinear",
        ("o_proj",),
    ),
    ("+ residual", "+ residual", "What attention found is added to what came in.", None, None, ()),
    (
        "RMSNorm",
        "RMSNorm",
        "The same norm before the feed-forward half.",
        layers.rms_norm,
        "09_norms_and_squared_relu",
        (),
    ),
    (
        "Linear gate, up",
        "BitLinear gate, up",
        "Two ternary matrices into the wide inner layer: most of a block's weights.",
        layers.bit_linear,
        "05_bitlinear",
        ("gate_proj", "up_proj"),
    ),
    (
        "SiLU(gate) * up",
        "ReLU(gate)² * up",
        "Squared ReLU instead of SiLU: many exact zeros, and the squares make SubLN necessary.",
        layers.squared_relu,
        "09_norms_and_squared_relu",
        (),
    ),
    (
        None,
        "SubLN",
        "The norm before the down projection quantizes. A standard block has none here.",
        layers.rms_norm,
        "09_norms_and_squared_relu",
        (),
    ),
    (
        "Linear down",
        "BitLinear down",
        "Back to the residual stream's width.",
        layers.bit_linear,
        "05_bitlinear",
        ("down_proj",),
    ),
    ("+ residual", "+ residual", "What the feed-forward half found is added.", None, None, ()),
)


def architecture_figure(model: BitNet) -> HTML:
    """The drawing for a page, with or without a kernel, with the shapes and weights of `model`."""
    return static_figure("architecture", architecture_state(model))


def architecture_panel(model: BitNet) -> anywidget.AnyWidget:
    """The drawing as a widget."""
    return live_figure("architecture", architecture_state(model))


def architecture_state(model: BitNet) -> dict[str, Any]:
    """All that the page needs: boxes with code and sizes, and the X-ray."""
    config = model.config
    return {
        "boxes": [_box(config, *row) for row in ROWS],
        "facts": _facts(config),
        "xray": [row._asdict() for row in xray(model.weights)],
        "matrices": list(config.matrix_shapes),
    }


def _box(config: BitNetConfig, standard, ours, text, function, chapter, matrices) -> dict[str, Any]:
    return {
        "standard": standard,
        "ours": ours,
        "text": text,
        "code": inspect.getsource(function) if function else "",
        "chapter": chapter,
        "sizes": [_size(name, *config.matrix_shapes[name]) for name in matrices],
    }


def _size(name: str, out: int, inputs: int) -> dict[str, Any]:
    return {
        "name": name,
        "shape": f"[{out}, {inputs}]",
        "packed": out * inputs // 4,
        "bf16": out * inputs * 2,
    }


def _facts(config: BitNetConfig) -> str:
    return (
        f"{config.num_hidden_layers} blocks, width {config.hidden_size}, inner width "
        f"{config.intermediate_size}, {config.num_attention_heads} query heads and "
        f"{config.num_key_value_heads} key/value heads of {config.head_dim}, "
        f"{config.vocab_size:,} tokens in the vocabulary"
    )
