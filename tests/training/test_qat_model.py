"""The torch model: the straight-through gradient, and the same numbers as transformers."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BitNetForCausalLM
from transformers.integrations.bitnet import ActQuant, WeightQuant

from bitnet_edu.quantize import absmax_int8, absmean_ternary
from bitnet_edu.training.export import export
from bitnet_edu.training.model import (
    IGNORED,
    BitLinear,
    BitNetForTraining,
    ModelShape,
    StraightThrough,
    fake_quantize_activation,
    fake_quantize_weight,
    new_model,
    quantize_input,
)
from bitnet_edu.training.train import new_tokenizer

SHAPE = ModelShape(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.mark.parametrize("quantize", [fake_quantize_weight, fake_quantize_activation])
def test_straight_through_gradient_is_the_identity(quantize) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    gradient = torch.randn(5, 8)
    quantized = StraightThrough.apply(x, quantize)
    quantized.backward(gradient)
    assert torch.equal(x.grad, gradient)
    assert not torch.equal(quantized, x)


def test_straight_through_equals_the_detach_formula() -> None:
    x = torch.randn(6, 16, requires_grad=True)
    ours = StraightThrough.apply(x, fake_quantize_weight).square().sum()
    (gradient,) = torch.autograd.grad(ours, x)
    textbook = x + (fake_quantize_weight(x) - x).detach()
    (expected,) = torch.autograd.grad(textbook.square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_weight_gradient_of_a_layer_sees_quantized_inputs() -> None:
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    layer(quantize_input(x)).sum().backward()
    expected = fake_quantize_activation(x).sum(0).expand(4, 8)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_layer_equals_the_detach_formula_in_output_and_gradients() -> None:
    layer, x = BitLinear(24, 12), torch.randn(5, 24, requires_grad=True)
    out = layer(quantize_input(x))
    gradients = torch.autograd.grad(out.square().sum(), (x, layer.weight))
    xq = x + (fake_quantize_activation(x) - x).detach()
    wq = layer.weight + (fake_quantize_weight(layer.weight) - layer.weight).detach()
    textbook = xq @ wq.T
    expected = torch.autograd.grad(textbook.square().sum(), (x, layer.weight))
    torch.testing.assert_close(out, textbook)
    torch.testing.assert_close(gradients, expected)


def test_the_twin_has_the_same_names_and_start_and_quantizes_nothing(monkeypatch) -> None:
    model, twin = new_model(SHAPE, seed=3), new_model(SHAPE, seed=3, ternary=False)
    for (name, ours), (other, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    x = torch.randn(5, SHAPE.hidden_size)
    layer = twin.model.layers[0].self_attn.q_proj
    assert torch.equal(layer(x), x @ layer.weight.T)
    assert torch.equal(quantize_input(x, twin.ternary), x)
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj(x), layer(x), rtol=1e-3)
    ids = torch.arange(20)[None]
    assert not torch.allclose(model(ids), twin(ids), rtol=1e-2)
    for name in ("fake_quantize_weight", "fake_quantize_activation"):
        monkeypatch.setattr(f"bitnet_edu.training.model.{name}", None)
    twin(ids)
    with pytest.raises(TypeError):
        model(ids)


def test_the_loss_is_the_sum_over_the_tokens_that_count() -> None:
    model = new_model(SHAPE)
    ids = torch.arange(24).view(2, 12)
    targets = torch.roll(ids, -1, 1).where(torch.rand(2, 12) < 0.5, IGNORED)
    logits = model(ids).transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(model(ids, targets=targets), expected)


def test_fake_quantizers_equal_transformers_and_the_package() -> None:
    x = torch.randn(7, 32) * 3
    torch.testing.assert_close(fake_quantize_weight(x), WeightQuant.apply(x))
    torch.testing.assert_close(fake_quantize_activation(x), ActQuant.apply(x))
    codes, scale = absmean_ternary(x.numpy())
    np.testing.assert_allclose(fake_quantize_weight(x), codes * scale, rtol=1e-6)
    q, scale = absmax_int8(x.numpy())
    np.testing.assert_allclose(fake_quantize_activation(x), q * scale, rtol=1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An untrained model whose scales, norms and embedding bf16 can hold, and its folder."""
    torch.manual_seed(0)
    model = BitNetForTraining(SHAPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("_proj.weight"):  # a scale of 2**-6 exactly
                codes, _ = absmean_ternary(parameter.numpy())
                share = np.abs(codes).mean()
                parameter.copy_(torch.from_numpy(codes * (2.0**-6 / share)))
            else:
                parameter.copy_(parameter.bfloat16().float())
    folder = tmp_path_factory.mktemp("exported")
    export(model, new_tokenizer(SHAPE, seed=0, documents=500), folder)
    return model.eval(), folder


def load_with_transformers(folder) -> BitNetForCausalLM:
    model = BitNetForCausalLM.from_pretrained(folder, dtype="auto")
    return torch.nn.Module.float(model).eval()


def test_exported_folder_has_the_format_of_the_real_checkpoint(exported) -> None:
    _, folder = exported
    tensors = load_file(folder / "model.safetensors")
    layers = SHAPE.num_hidden_layers
    assert len(tensors) == 2 + layers * (7 * 2 + 4)  # embedding, norm; 7 matrices, scales, 4 norms
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert down.dtype == torch.uint8
    assert down.shape == (SHAPE.hidden_size // 4, SHAPE.intermediate_size)
    scale = tensors["model.layers.1.mlp.down_proj.weight_scale"]
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (1,)
    floats = {t.dtype for name, t in tensors.items() if t.dtype != torch.uint8}
    assert floats == {torch.bfloat16}


def test_exported_model_equals_transformers(exported) -> None:
    model, folder = exported
    theirs = load_with_transformers(folder)
    ids = torch.randint(0, SHAPE.vocab_size, (4, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = model(ids), theirs(ids).logits
    # an activation on a rounding boundary may flip by one step: never in most of the positions
    difference = (ours - expected).abs().amax(-1) / expected.abs().max()
    assert difference.median() < 1e-5
    assert difference.max() < 2e-2
    broken = BitNetForTraining(SHAPE)
    broken.load_state_dict(model.state_dict())
    broken.model.layers[0].self_attn.attn_sub_norm.weight.data.mul_(1.1).sub_(0.1)
    assert ((broken(ids) - expected).abs().amax(-1) / expected.abs().max()).median() > 1e-3


def test_a_document_does_not_see_its_neighbours() -> None:
    torch.manual_seed(0)
    model = BitNetForTraining(SHAPE).eval()
    ids = torch.randint(0, SHAPE.vocab_size, (1, 12))
    owner = torch.tensor([[0] * 5 + [1] * 7])
    mask = (owner[:, :, None] == owner[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    with torch.no_grad():
        packed = model(ids, mask[:, None])[0, 5:]
        alone = model(ids[:, 5:])[0]
    # RoPE sees distances only, so a later start changes nothing
    difference = (packed - alone).abs().amax(-1) / alone.abs().max()
    assert difference.median() < 1e-5


def test_greedy_continuation_equals_transformers(exported) -> None:
    model, folder = exported
    theirs = load_with_transformers(folder)
    ids = torch.randint(0, SHAPE.vocab_size, (1, 6), generator=torch.Generator().manual_seed(2))
    expected = theirs.generate(
        ids, max_new_tokens=20, max_length=None, do_sample=False, eos_token_id=None
    )
    with torch.no_grad():
        while ids.shape[1] < expected.shape[1]:
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert ids.tolist() == expected.tolist()
