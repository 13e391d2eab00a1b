"""A BitNet b1.58 2B4T architecture in PyTorch, for quantization-aware training from scratch.

Every linear layer keeps full-precision master weights; the forward pass sees only their ternary
values, and the backward pass pretends that rounding were the identity (the straight-through
estimator, Bengio et al. 2013). Module names equal those of transformers' `BitNetForCausalLM`, so
the state dict needs no renaming on export.

Sources: BitNet b1.58 2B4T technical report (arXiv 2504.12285) section 2; The Era of 1-bit LLMs
(arXiv 2402.17764) equations 1-3; transformers `models/bitnet/modeling_bitnet.py` and
`integrations/bitnet.py` (AutoBitLinear, online).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -1  # the target of a token that the loss does not count


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; the field names are those of Hugging Face's `config.json`."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """absmean ternary values of `weight` float[out, in], times their scale (2402.17764 eq. 1-3)."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight / scale).round_().clamp_(-1, 1).mul_(scale)


def fake_quantize_activation(x: Tensor) -> Tensor:
    """absmax int8 values of `x` float[..., n], one scale per token, scaled back to float."""
    scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round_().clamp_(-128, 127).div_(scale)


class StraightThrough(torch.autograd.Function):
    """`quantize(x)` forward, the identity backward.

    The same as `x + (quantize(x) - x).detach()`, with less to compute and to remember.
    """

    @staticmethod
    def forward(ctx, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return quantize(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def quantize_input(x: Tensor, ternary: bool = True) -> Tensor:
    """What a BitLinear layer sees of its input: int8 values, with a straight-through gradient.

    Outside of the layer, for those that read the same input. The twin (`ternary=False`) sees x.
    """
    return StraightThrough.apply(x, fake_quantize_activation) if ternary else x


class BitLinear(nn.Linear):
    """A linear layer without bias and with ternary weights, for inputs from `quantize_input`.

    What is stored and trained are the master weights, float[out, in]. `ternary=False` makes an
    ordinary linear layer of the same name, shape and start.
    """

    def __init__(self, in_features: int, out_features: int, ternary: bool = True) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.ternary = ternary

    def forward(self, x: Tensor) -> Tensor:
        if not self.ternary:
            return F.linear(x, self.weight)
        return F.linear(x, StraightThrough.apply(self.weight, fake_quantize_weight))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


def rope_tables(shape: ModelShape, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float[length, head_dim], of the rotate-half form."""
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle = torch.arange(length)[:, None] * frequency[None, :]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x[..., T, head_dim] by its positions (rotate-half RoPE)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with an RMSNorm (SubLN) before the output projection."""

    def __init__(self, shape: ModelShape, ternary: bool) -> None:
        super().__init__()
        self.ternary, self.head_dim = ternary, shape.head_dim
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = BitLinear(shape.hidden_size, shape.hidden_size, ternary)
        self.k_proj = BitLinear(shape.hidden_size, kv_size, ternary)
        self.v_proj = BitLinear(shape.hidden_size, kv_size, ternary)
        self.o_proj = BitLinear(shape.hidden_size, shape.hidden_size, ternary)
        self.attn_sub_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = quantize_input(x, self.ternary)
        q, k, v = (
            proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Query heads of one group stand side by side, so one product serves the whole group.
        groups = k.shape[1]
        q = q.reshape(batch, groups, -1, self.head_dim) * self.head_dim**-0.5
        scores = (q @ k.transpose(-1, -2)).view(batch, -1, length, length) + bias
        shares = scores.softmax(-1).view(batch, groups, -1, length)
        heads = (shares.to(v.dtype) @ v).view(batch, -1, length, self.head_dim)
        heads = heads.transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(quantize_input(self.attn_sub_norm(heads), self.ternary))


class MLP(nn.Module):
    """Gated squared ReLU with an RMSNorm (SubLN) before the down projection."""

    def __init__(self, shape: ModelShape, ternary: bool) -> None:
        super().__init__()
        self.ternary = ternary
        self.gate_proj = BitLinear(shape.hidden_size, shape.intermediate_size, ternary)
        self.up_proj = BitLinear(shape.hidden_size, shape.intermediate_size, ternary)
        self.down_proj = BitLinear(shape.intermediate_size, shape.hidden_size, ternary)
        self.ffn_sub_norm = RMSNorm(shape.intermediate_size, shape.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = quantize_input(x, self.ternary)
        gate = F.relu(self.gate_proj(x)).square()
        inner = self.ffn_sub_norm(gate * self.up_proj(x))
        return self.down_proj(quantize_input(inner, self.ternary))


class DecoderLayer(nn.Module):
    def __init__(self, shape: ModelShape, ternary: bool) -> None:
        super().__init__()
        self.self_attn = Attention(shape, ternary)
        self.mlp = MLP(shape, ternary)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: ModelShape, ternary: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, ternary) for _ in range(shape.num_hidden_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class BitNetForTraining(nn.Module):
    """The whole model; the output head is the embedding matrix (tied).

    `ternary=False` makes its full-precision twin: the same modules, names and start weights, and
    nothing is quantized, neither weights nor activations.
    """

    def __init__(self, shape: ModelShape, ternary: bool = True) -> None:
        super().__init__()
        self.shape = shape
        self.ternary = ternary
        self.model = Decoder(shape, ternary)
        self.make_rope_tables()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Of size 1 after every projection; what blocks add to the residual stream is
                # smaller, so that twelve of them don't drown the embedding.
                std = parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= (2 * shape.num_hidden_layers) ** 0.5
                nn.init.normal_(parameter, std=std)

    def make_rope_tables(self) -> None:
        cos, sin = rope_tables(self.shape, self.shape.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden_states(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """int64[B, T] -> float32[B, T, hidden], after the final norm.

        `mask` bool[B, 1, T, T] says which key each query may see; None means causal.
        """
        length, device = ids.shape[1], ids.device.type
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).tril()
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(ids)
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device) else x.dtype
        bias = torch.zeros(mask.shape, dtype=dtype, device=ids.device).masked_fill(~mask, -1e4)
        for layer in self.model.layers:
            x = layer(x, cos, sin, bias)
        return self.model.norm(x)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """int64[B, T] -> logits float[B, T, vocab].

        With `targets` int64[B, T] -> the loss instead, float32[]: the cross-entropy in nats, summed
        over the tokens whose target is not IGNORED.
        """
        hidden, head = self.hidden_states(ids, mask), self.model.embed_tokens.weight
        if targets is None:
            return F.linear(hidden, head)
        counts = targets != IGNORED  # only there the large product with the head is needed
        logits = F.linear(hidden[counts], head).float()
        return F.cross_entropy(logits, targets[counts], reduction="sum")


def new_model(shape: ModelShape, seed: int = 0, ternary: bool = True) -> BitNetForTraining:
    """A model at its start; the same seed gives a BitNet and its twin the same master weights."""
    torch.manual_seed(seed)
    return BitNetForTraining(shape, ternary)
