"""Small tokenizers of every kind that the tokenizers library has, and folders that hold them."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as HFTokenizer

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SIMPLE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)
CORPUS = [
    "User: Hello there, what is a ternary weight? It is -1, 0 or 1. Don't you know, he's é?"
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|eot_id|>"]


def byte_level(prefix: bool = False) -> HFTokenizer:
    t = HFTokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(t, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))


def byte_fallback() -> HFTokenizer:
    """Llama 2's kind: sentencepiece's spaces, bytes for what has no token."""
    learned = HFTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    train(learned, trainers.BpeTrainer(vocab_size=90))
    raw = json.loads(learned.to_str())
    vocabulary = raw["model"]["vocab"]
    vocabulary |= {f"<0x{b:02X}>": len(vocabulary) + b for b in range(256)}
    merges = [tuple(pair) for pair in raw["model"]["merges"]]
    t = HFTokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = llama_decoder()
    t.add_special_tokens(SPECIAL)
    t.post_processor = start_token(t)
    return t


def llama_decoder() -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])


def unigram() -> HFTokenizer:
    t = HFTokenizer(models.Unigram())
    t.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    return train(t, trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>"))


def word_piece() -> HFTokenizer:
    t = HFTokenizer(models.WordPiece(unk_token="<unk>"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece(cleanup=False)
    t = train(t, trainers.WordPieceTrainer(vocab_size=120))
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return t


def word_level() -> HFTokenizer:
    t = HFTokenizer(models.WordLevel(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return train(t, trainers.WordLevelTrainer(vocab_size=60))


def train(t: HFTokenizer, trainer: trainers.Trainer) -> HFTokenizer:
    trainer.show_progress, trainer.special_tokens = False, [AddedToken(s) for s in SPECIAL]
    t.train_from_iterator(CORPUS, trainer)
    return t


def start_token(t: HFTokenizer) -> processors.PostProcessor:
    start = t.token_to_id("<s>")
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])


def with_start(t: HFTokenizer) -> HFTokenizer:
    t.post_processor = start_token(t)
    return t


KINDS = {
    "byte-level": byte_level,
    "byte-level with a start token": lambda: with_start(byte_level()),
    "byte-level with a prefix space": lambda: byte_level(prefix=True),
    "byte fallback": byte_fallback,
    "Unigram": unigram,
    "WordPiece": word_piece,
    "WordLevel": word_level,
}


def folder_of(
    path: Path, backend: HFTokenizer, template: object = SIMPLE, **config: object
) -> Path:
    """A folder with this tokenizer and tokenizer_config.json."""
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **config}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
