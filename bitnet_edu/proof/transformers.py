"""The adapter to transformers: load its model of a checkpoint, and listen to what it computes."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_edu.errors import BitNetError, InputError
from bitnet_edu.files.hf import MATRICES
from bitnet_edu.files.source import find_model
from bitnet_edu.proof.replay import BOUND, Trace
from bitnet_edu.system import peak_memory
from bitnet_edu.weights import Weights

# what the two SubLNs normalize, under the reference's names
INNER = {"self_attn.attn_sub_norm": "attention", "mlp.ffn_sub_norm": "feed_forward"}
UNSEEN = (".sums", ".queries", ".keys", ".values")  # no module of theirs has them as its output

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import BitNetForCausalLM


def eager_torch() -> ModuleType:
    """torch, with torch.compile switched off: transformers compiles its BitNet functions, which
    would need a C++ compiler and could change the last bits."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")
    return torch


def _missing(error: ImportError) -> BitNetError:
    return BitNetError(
        f"the comparison needs transformers, torch and accelerate ({error}): "
        "pip install 'bitnet-edu[verify]'"
    )


def load_transformers(
    source: str | Path = "tiny", *, ternarize: bool = False
) -> "BitNetForCausalLM":
    """transformers' own model of a folder ("tiny", a path or a hub id), float32, eager attention.

    ternarize=True makes transformers ternarize dense weights too, as `bitnet_edu.load` does.
    Raises CheckpointError, DownloadError or, without torch and transformers, BitNetError.
    """
    torch = eager_torch()
    import transformers

    path = model_folder(source)
    config = transformers.BitNetConfig.from_pretrained(path)
    if ternarize and getattr(config, "quantization_config", None) is None:
        config.quantization_config = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        model = transformers.BitNetForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    except ImportError as error:
        raise _missing(error) from None
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
    # what it unpacks keeps the dtype of the file, and model.float() is refused when quantized
    torch.nn.Module.float(model)
    return model.eval()


def model_folder(source: str | Path) -> Path:
    """The folder of a model that transformers can read."""
    path = find_model(str(source))
    if not path.is_dir():
        raise InputError(
            f"transformers can't read {path}: make a folder of it first, with "
            f"`bitnet-edu convert {path} FOLDER --to hf-packed`"
        )
    return path


def trace_transformers(model: "BitNetForCausalLM", ids: np.ndarray) -> tuple[np.ndarray, Trace]:
    """transformers' logits, float32[T, vocab], and what lies between its modules."""
    torch = eager_torch()
    from transformers.integrations.bitnet import BitLinear

    trace: Trace = {}

    def keep(name: str, tensor: Any) -> None:
        trace[name] = tensor[0].numpy().copy()

    def keep_codes(name: str):
        # the method quantizes as both of transformers' classes do, and uses no `self`
        return lambda _, args: keep(name, BitLinear.activation_quant(None, args[0])[0])

    def keep_input(name: str):
        return lambda _, args: keep(name, args[0])

    def keep_output(name: str):
        return lambda _, args, output: keep(name, output)

    body = model.model
    hooks = [
        body.embed_tokens.register_forward_hook(keep_output("embedding")),
        body.norm.register_forward_hook(keep_output("norm")),
    ]
    for index, layer in enumerate(body.layers):
        prefix = f"layers.{index}."
        middle, after = keep_input(f"{prefix}after_attention"), f"{prefix}after_feed_forward"
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(middle))
        hooks.append(layer.register_forward_hook(keep_output(after)))
        for path, name in INNER.items():
            inner = keep_input(f"{prefix}{name}")
            hooks.append(layer.get_submodule(path).register_forward_pre_hook(inner))
        for name, path in MATRICES.items():
            codes = keep_codes(f"{prefix}{name}.int8")
            hooks.append(layer.get_submodule(path).register_forward_pre_hook(codes))
    try:
        with torch.no_grad():
            logits = model(torch.as_tensor(ids)[None], use_cache=False).logits[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, trace


def compare_weights(model: "BitNetForCausalLM", weights: Weights, trace: Trace) -> list[str]:
    """The matrices whose codes or scale transformers reads differently.

    Master weights are ternarized by both, and may flip like activations: such codes are no
    difference, but go into `trace`, for the replay to take over.
    """
    differ = []
    for index, (layer, ours) in enumerate(zip(model.model.layers, weights.layers, strict=True)):
        for name, path in MATRICES.items():
            matrix = getattr(ours, name)
            codes, scale = matrix.codes(), matrix.scale
            theirs, their_scale, unrounded = _their_codes(layer.get_submodule(path))
            flips = codes != theirs
            if flips.any():
                trace[f"layers.{index}.{name}.codes"] = theirs
            explained = np.abs(np.abs(unrounded[flips]) - 0.5) <= BOUND
            if not explained.all() or not abs(their_scale - scale) <= BOUND * scale:
                differ.append(f"layers.{index}.{name}")
    return differ


def _their_codes(module: Any) -> tuple[np.ndarray, float, np.ndarray]:
    """transformers' ternary codes, the scale that multiplies, and the codes before rounding."""
    torch = eager_torch()
    from transformers.integrations.bitnet import BitLinear, WeightQuant, unpack_weights

    with torch.no_grad():
        if isinstance(module, BitLinear):
            codes = unpack_weights(module.weight, torch.float32)
            return codes.numpy().astype(np.int8), 1 / module.weight_scale.item(), codes.numpy()
        if module.online_quant:
            quantized = WeightQuant.apply(module.weight)
            scale = max(module.weight.abs().mean().item(), 1e-5)
            return quantized.sign().numpy().astype(np.int8), scale, module.weight.numpy() / scale
        codes = module.weight.numpy()
        return codes.astype(np.int8), module.weight_scale.item(), codes


def greedy_choices(
    model: "BitNetForCausalLM", ids: Sequence[int], places: Sequence[int]
) -> list[int]:
    """What transformers, with its own KV cache, would generate at these places of a text."""
    torch = eager_torch()
    choices, past, start = [], None, 0
    with torch.no_grad():
        for end in range(places[0], places[-1] + 1):
            new = torch.as_tensor(ids[start:end])[None]
            out = model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, start = out.past_key_values, end
            choices.append(int(out.logits[0, -1].argmax()))
    return [choices[place - places[0]] for place in places]


def serve_timings(folder: str, threads: int, decode_tokens: int, pipe: "Connection") -> None:
    """Time transformers whenever `pipe` asks: (context, prompt) -> (decode, prefill) tokens/s,
    None -> peak bytes. The first thing sent are the seconds that loading took."""
    try:
        torch = eager_torch()
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        start = time.perf_counter()
        model = transformers.BitNetForCausalLM.from_pretrained(model_folder(folder), dtype="auto")
        model.eval()
        pipe.send(time.perf_counter() - start)
        with torch.inference_mode():
            while True:
                if (lengths := pipe.recv()) is None:
                    pipe.send(peak_memory())
                    continue
                context, prompt = lengths
                start = time.perf_counter()
                model(torch.arange(prompt)[None] % model.config.vocab_size, logits_to_keep=1)
                prefill = prompt / (time.perf_counter() - start)
                ids = torch.arange(context)[None] % model.config.vocab_size
                out = model(ids, use_cache=True, logits_to_keep=1)
                start = time.perf_counter()
                for _ in range(decode_tokens):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                pipe.send((decode_tokens / (time.perf_counter() - start), prefill))
    except (BitNetError, ImportError, OSError, RuntimeError) as error:
        pipe.send(BitNetError(f"transformers could not be measured: {error}"))
