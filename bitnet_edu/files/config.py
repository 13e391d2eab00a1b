"""config.json: what a model's shape and storage are, read with every refusal, and written.

What cannot be right raises `CheckpointError`, which names file, key, expected and found.
"""

import errno
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from bitnet_edu.errors import CheckpointError
from bitnet_edu.weights import BitNetConfig

BASE3 = "bitnet_base3"  # the quant_method of this package's own folders
MOST_JSON = 2**27  # bytes: Llama 3's tokenizer.json, the largest of a model's, has 17 million
# positions are counted in float32, which holds every whole number up to this one
MOST_POSITIONS = 2**24
ADVICE = {
    errno.EACCES: "allow yourself to read it",
    errno.EPERM: "allow yourself to read it",
    errno.EMFILE: "close other files or models, or raise `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs or models",
    errno.EIO: "the disk or the network behind it fails; copy the model anew",
    errno.ELOOP: "mend the links, which lead round in a circle",
    errno.ENAMETOOLONG: "give the folder a shorter name",
}

# What transformers takes for a key that config.json leaves out (its configuration_bitnet.py).
DEFAULTS = {
    "model_type": None,
    "vocab_size": 128256,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "hidden_act": "relu2",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. CheckpointError for what is none, or can't be opened: a folder, a
    pipe or a device would block or never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise fault(path, "it", "a file", "a folder or a device")
        return path.open("rb")
    except FileNotFoundError:
        dangling = "a link to nothing" if path.is_symlink() else "missing"
        raise CheckpointError(f"{path} is {dangling}: fetch or copy the whole model") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """What the system says about a file that it does not read, and what can be done."""
    advice = ADVICE.get(getattr(error, "errno", None), "fetch or copy it again")
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} cannot be read ({reason}): {advice}")


def read_json(path: Path, default: dict | None = None) -> dict[str, Any]:
    """Parse a JSON object; `default`, where given, stands in for a missing file."""
    if default is not None and not path.is_symlink() and not path.exists():
        return default
    try:
        with open_regular(path) as file:
            content = file.read(MOST_JSON + 1)
        if len(content) > MOST_JSON:
            raise ValueError(f"it has more than {MOST_JSON:,} bytes")
        value = parse_json(content)
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def parse_json(content: bytes) -> Any:
    """JSON in UTF-8. ValueError or RecursionError, also for a key that stands twice in an object,
    where each library would believe another one.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} appears twice")
        return found

    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)


def parse_config(raw: Mapping[str, Any], path: Path, generation: Mapping[str, Any]) -> BitNetConfig:
    """config.json -> BitNetConfig; refuses each architecture that is not implemented here.

    generation: what generation_config.json beside it holds, whose end tokens count first.
    """
    absent, raw = DEFAULTS.keys() - raw.keys(), DEFAULTS | raw
    in_generation = path.with_name("generation_config.json")

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise fault(path, key, expected, repr(raw.get(key)))

    def size(key: str) -> int:
        require(type(raw[key]) is int and 1 <= raw[key] < 2**31, key, "a positive whole number")
        return raw[key]

    require(raw["model_type"] == "bitnet", "model_type", "'bitnet'")
    require(raw["hidden_act"] == "relu2", "hidden_act", "'relu2' (squared ReLU)")
    require(raw["attention_bias"] is False, "attention_bias", "false")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = heads if raw["num_key_value_heads"] is None else size("num_key_value_heads")
    require(hidden % heads == 0, "hidden_size", f"a multiple of num_attention_heads ({heads})")
    require(hidden // heads % 2 == 0, "hidden_size", f"even in each of {heads} heads, for RoPE")
    require(raw.get("head_dim") in (None, hidden // heads), "head_dim", str(hidden // heads))
    require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of {heads} heads")
    eps = raw["rms_norm_eps"]
    require(type(eps) in (int, float) and 0 <= eps < 1, "rms_norm_eps", "a number from 0 to 1")
    context, vocabulary = size("max_position_embeddings"), size("vocab_size")
    require(context <= MOST_POSITIONS, "max_position_embeddings", f"at most {MOST_POSITIONS}")
    for key in ("bos_token_id", "eos_token_id"):
        if key in absent and raw[key] >= vocabulary:
            raw[key] = None  # a default that this vocabulary does not have
    require(type(raw["bos_token_id"]) is not list, "bos_token_id", "one token id or null")
    begins, ends = (
        _token_ids(raw, f"{name}_token_id", vocabulary, path) for name in ("bos", "eos")
    )
    _token_ids(generation, "bos_token_id", vocabulary, in_generation)
    if "eos_token_id" in generation:
        ends = _token_ids(generation, "eos_token_id", vocabulary, in_generation)
    tied = raw["tie_word_embeddings"]
    require(type(tied) is bool, "tie_word_embeddings", "true or false")
    config = BitNetConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_theta=_rope_theta(raw, path),
        rms_norm_eps=float(eps),
        bos_token_id=begins[0] if begins else None,
        eos_token_ids=ends,
    )
    for name, (rows, columns) in config.matrix_shapes.items():
        if rows % 4 or columns % 4:
            raise fault(path, f"the shape of {name}", "multiples of 4", f"[{rows}, {columns}]")
    return config


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """The rotary base, under rope_parameters (newer files) or at the top level (older ones)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise fault(path, "rope_parameters", "a JSON object", repr(rope))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise fault(
            path, "the type of RoPE", "'default', as others are not implemented", repr(kind)
        )
    theta = rope.get("rope_theta", raw["rope_theta"])
    if type(theta) not in (int, float) or not 1 < theta < 1e30:
        raise fault(path, "rope_theta", "a number above 1", repr(theta))
    return float(theta)


def _token_ids(raw: Mapping[str, Any], key: str, vocabulary: int, path: Path) -> tuple[int, ...]:
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        expected = f"a token id or a list of them, each below {vocabulary}"
        raise fault(path, key, expected, repr(value))
    return tuple(ids)


def parse_scheme(raw: Mapping[str, Any], path: Path, ternarize: bool = False) -> str:
    """How the weights are stored: packed with a scale to "multiply" or "divide" by, in "base3" with
    a scale that multiplies, or as "master" weights.
    """
    quantization = raw.get("quantization_config")
    if quantization is None:
        if ternarize:
            return "master"
        raise CheckpointError(
            f"{path} has no quantization_config, so transformers runs it with dense weights: "
            "ask for ternarize=True (--ternarize) if they are meant to be ternarized"
        )
    if not isinstance(quantization, dict):
        raise fault(path, "quantization_config", "a JSON object", repr(quantization))

    def choose(key: str, *allowed: Any) -> Any:
        value = quantization.get(key, allowed[0])
        if value not in allowed:
            raise fault(path, f"quantization_config: {key}", f"one of {allowed}", repr(value))
        return value

    if quantization.get("quant_method") == BASE3:
        return "base3"
    if quantization.get("quant_method") != "bitnet":
        found = repr(quantization.get("quant_method"))
        raise fault(path, "quantization_config: quant_method", "'bitnet'", found)
    choose("use_rms_norm", False)
    choose("modules_to_not_convert", None, ["lm_head"])
    mode = choose("quantization_mode", "offline", "online")
    if choose("linear_class", "bitlinear", "autobitlinear") == "bitlinear":
        return "divide"
    return "multiply" if mode == "offline" else "master"


def fault(path: Path, what: str, expected: str, found: str) -> CheckpointError:
    """The one form of complaint: which file, what in it, what it must be and what it is."""
    return CheckpointError(f"{path}: {what} must be {expected}, found {found}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def config_json(config: BitNetConfig, *, tied: bool, scheme: str) -> dict[str, Any]:
    """What transformers reads as config.json, without the dtype; a base-3 folder it refuses.

    scheme: "multiply", "master" or "base3", as in `parse_scheme`.
    """
    ends = list(config.eos_token_ids)
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        **{key: value for key, value in config._asdict().items() if key != "eos_token_ids"},
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "tie_word_embeddings": tied,
        "quantization_config": {
            "quant_method": BASE3 if scheme == "base3" else "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online" if scheme == "master" else "offline",
        },
    }
