"""tokenizer.json and what lies beside it, read as transformers' AutoTokenizer reads them.

The tokenizers library trusts its files: some make it panic, some take all memory, and then the
process ends. What does that is named here before the library sees it.
"""

import base64
import binascii
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bitnet_edu.errors import BitNetError, CheckpointError, clean_text
from bitnet_edu.files.config import fault, read_json

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
MAX_STEPS = 200  # things in a normalizer, pre-tokenizer, post-processor or decoder
MAX_GROWTH = 1024  # how many times longer replacements may make a text
MAX_INSERTED = 1024  # characters that a step may insert
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


class Parts(NamedTuple):
    """What a folder says about its tokenizer."""

    backend: Tokenizer
    template: str | None
    template_file: Path
    tokens: dict[str, str]  # by name: bos_token, eos_token, pad_token, ...
    tidies: bool  # whether decoded text loses the spaces before punctuation


@contextmanager
def refusing(kind: type[BitNetError], what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library throws (panics are no `Exception`) into one error."""
    try:
        yield
    except (BitNetError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {error}") from None


def read_parts(folder: Path) -> Parts:
    """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the templates.

    Raises CheckpointError, which names the file at fault.
    """
    path, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    with refusing(CheckpointError, f"{path} cannot be read"):
        text = path.read_text("utf-8")
    config, model = read_json(config_file, {}), read_json(folder / "config.json", {})
    kind = config.get("tokenizer_class") or model.get("tokenizer_class")
    file = backend = backend_of(text, str(path))
    if kind in LLAMA and '"ByteLevel"' not in text and type(file.model).__name__ == "BPE":
        with refusing(CheckpointError, f"{path} cannot be read"):
            backend = _llama(file, json.loads(text)["model"], config)
        config = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | config
    template, template_file = _template(folder, config, config_file)
    named, new = _tokens(file, folder, config)
    with refusing(CheckpointError, f"{config_file}: the special tokens cannot be read"):
        backend.add_tokens(_fitting(backend, new, model.get("vocab_size")))
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    tidies = config.get("clean_up_tokenization_spaces", False)
    tidies = bool(tidies and (forced or type(backend.model).__name__ != "BPE"))
    return Parts(backend, template, template_file, named, tidies)


def backend_of(text: str, what: str) -> Tokenizer:
    """The text of a tokenizer.json as a tokenizer; CheckpointError, which begins with `what`."""
    with refusing(CheckpointError, f"{what} cannot be read"):
        raw = json.loads(text, object_pairs_hook=_object)
        if not isinstance(raw, dict):
            raise ValueError("it must hold a JSON object")
        growth = {part: _growth(raw.get(part), part) for part in PARTS}
        decoder = growth.pop("decoder")
        if (worst := max(decoder, math.prod(growth.values()))) > MAX_GROWTH:
            raise ValueError(f"it can make a text {worst:.3g} times longer")
        return Tokenizer.from_str(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that comes twice would mean one thing here, another in the library."""
    found = dict(pairs)
    if len(found) != len(pairs) and not all(isinstance(value, int) for value in found.values()):
        raise ValueError("an object holds a key twice")
    return found


def _growth(part: Any, name: str) -> float:
    """How many times longer a part of a tokenizer can make a text.

    ValueError for what makes the library panic or run for ever.
    """
    steps = list(_objects(part))
    if len(steps) > MAX_STEPS:
        raise ValueError(f"the {name} has more than {MAX_STEPS} steps")
    growth = 1.0
    for step in steps:
        if step.get("type") == "FixedLength" and step.get("length", 1) == 0:
            raise ValueError(f"the {name} cuts text into pieces of length 0")
        inserted = step.get("content", step.get("prepend", ""))
        if isinstance(inserted, str) and len(inserted) > MAX_INSERTED:
            raise ValueError(f"the {name} inserts a text of {len(inserted)} characters")
        if step.get("type") == "ByteLevel" or "trim_offsets" in step:
            growth *= 2  # bytes beyond ASCII are written as two
        if "" in (step.get("word_delimiter_token"), step.get("suffix")):
            growth *= 2  # a space between any two characters
        if isinstance(pattern := step.get("pattern"), dict) and "content" in step:
            growth *= _replacement(pattern, str(inserted))
        if step.get("precompiled_charsmap") is not None:
            growth *= _longest_mapping(step["precompiled_charsmap"])
        if "single" in step or "pair" in step:
            growth *= _copies(step)
    return growth


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _objects(inner)


def _replacement(pattern: dict[str, Any], content: str) -> float:
    """How many times longer replacing a pattern can make a text."""
    literal = pattern.get("String")
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    return 1.0 + len(content)  # a regular expression may match nothing, between any two characters


def _copies(template: dict[str, Any]) -> int:
    """How often a post-processor's template repeats its text; its tokens must be declared."""
    declared = template.get("special_tokens", {})
    most = 1
    for pieces in (template.get("single", []), template.get("pair", [])):
        if not isinstance(pieces, list) or len(pieces) > MAX_STEPS:
            raise ValueError("the post_processor's template is no short list")
        for piece in pieces:
            token = piece.get("SpecialToken", {}).get("id") if isinstance(piece, dict) else None
            if token is not None and token not in declared:
                raise ValueError(f"the post_processor uses the token {token!r} undeclared")
        most = max(most, sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces))
    return most


def _longest_mapping(encoded: Any) -> int:
    """Bytes of the longest text in a table of sentencepiece: a trie's size, the trie, texts."""
    try:
        table = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("the precompiled_charsmap is not base64") from None
    size = int.from_bytes(table[:4], "little")
    if len(table) < 8 or size % 4 or not 4 <= size <= len(table) - 4:
        raise ValueError("the precompiled_charsmap is cut off or damaged")
    return max(1, *map(len, table[4 + size :].split(b"\0")))


def _llama(file: Tokenizer, model: dict[str, Any], config: dict[str, Any]) -> Tokenizer:
    """What transformers makes of a Llama tokenizer that isn't byte-level: vocabulary, merges and
    post-processor are the file's, all else is the class's own."""
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, fuse_unk=True, byte_fallback=True))
    spaced = config.get("add_prefix_space")
    spaced = True if spaced is None else spaced
    scheme = ("always" if config.get("legacy", False) else "first") if spaced else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if spaced else []
    backend.decoder = decoders.Sequence(steps)
    if file.post_processor:
        backend.post_processor = file.post_processor
    return backend


def _template(folder: Path, config: dict[str, Any], config_file: Path) -> tuple[str | None, Path]:
    """The chat template and its file. Files of their own go before tokenizer_config.json."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (own := folder / "chat_template.jinja").exists():
        files = {"default": own} | files
    if files:
        path = files.get("default", own)
        templates = dict.fromkeys(files, "")
        if "default" in files:
            with refusing(CheckpointError, f"{path} cannot be read"):
                return path.read_text("utf-8"), path
    else:
        path, templates = config_file, config.get("chat_template")
        if templates is None or isinstance(templates, str):
            return templates, path
        with refusing(CheckpointError, f"{path}: chat_template is neither text nor named texts"):
            if isinstance(templates, list):
                templates = {each["name"]: each["template"] for each in templates}
            if isinstance(templates.get("default"), str):
                return templates["default"], path
    names = ", ".join(sorted(map(str, templates))) or "none"
    raise fault(path, "the chat templates", "one that is named default", names)


def _tokens(
    file: Tokenizer, folder: Path, config: dict[str, Any]
) -> tuple[dict[str, str], list[AddedToken]]:
    """The named tokens, and all tokens that the files beside tokenizer.json declare."""
    config, path = dict(config), folder / "tokenizer_config.json"
    if config.get("additional_special_tokens") and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    added: dict[int, AddedToken] = {}
    if (declared := config.get("added_tokens_decoder")) is None:
        config |= read_json(folder / "special_tokens_map.json", {})
        if (folder / "special_tokens_map.json").exists():
            path = folder / "special_tokens_map.json"
        for token, index in read_json(folder / "added_tokens.json", {}).items():
            special = any(token == value for key, value in config.items() if _names(key, value))
            added[index] = AddedToken(token, normalized=not special, special=special)
        added |= file.get_added_tokens_decoder()
    with refusing(CheckpointError, f"{path}: the special tokens cannot be read"):
        added |= {int(index): _token(token, {}) for index, token in (declared or {}).items()}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = {key: value for key, value in config.items() if _names(key, value)}
        if isinstance(extra, dict):
            named, extra = named | extra, []
        named = {key: value for key, value in named.items() if value is not None}
        texts = {key: _text(value) for key, value in named.items()}
        new = [token for _, token in sorted(added.items())]
        known = {token.content for token in [*new, *file.get_added_tokens_decoder().values()]}
        more = [_token(value, {"special": True}) for value in named.values()]
        more += [_token(value, {} if _is_token(value) else {"special": True}) for value in extra]
        new += [token for token in more if token.content not in known]
    for token in new:
        token.special = token.special or token.content in texts.values()
    return texts, new


def _fitting(backend: Tokenizer, new: list[AddedToken], size: Any) -> list[AddedToken]:
    """Without the tokens whose new ids the model's embedding (of `size` rows) would not have."""
    room = size - backend.get_vocab_size() if isinstance(size, int) else len(new)
    fitting = []
    for token in new:
        unknown = backend.token_to_id(token.content) is None
        if token.content and (not unknown or room > 0):
            fitting.append(token)
            room -= unknown
    return fitting


def _names(key: str, value: Any) -> bool:
    """Whether this entry of a tokenizer_config.json names a special token."""
    if not key.endswith("_token"):
        return False
    return key.removesuffix("_token") in NAMED or isinstance(value, str) or _is_token(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and "content" in value


def _text(token: str | dict[str, Any]) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"a special token must be text, not {token!r:.80}")
    return clean_text(text, "a special token")


def _token(token: str | dict[str, Any], options: dict[str, bool]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    if isinstance(token, dict):
        options = {flag: token[flag] for flag in flags if flag in token} | options
    return AddedToken(_text(token), **options)
