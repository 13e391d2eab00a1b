"""What a model is made of, in numbers: shape, dtypes, sizes, share of zeros in every matrix."""

import math
from typing import TYPE_CHECKING, Any

from bitnet_edu.book.xray import code_counts, entropy_bits, xray
from bitnet_edu.files.hf import weight_files
from bitnet_edu.files.source import find_model, read_model

if TYPE_CHECKING:
    from rich.console import Group


def describe(source: str = "tiny", *, ternarize: bool = False) -> dict[str, Any]:
    """A model as plain values for JSON; sizes are in bytes. Raises as `bitnet_edu.load` does."""
    path = find_model(source)
    config, weights, tokenizer = read_model(path, ternarize=ternarize)
    files = weight_files(path) if path.is_dir() else [path]
    matrices = [array for layer in weights.layers for array in layer[:7]]
    norms = [array for layer in weights.layers for array in layer[7:]] + [weights.norm]
    tied = weights.lm_head is weights.embedding
    tables = [weights.embedding] if tied else [weights.embedding, weights.lm_head]
    ternary = sum(math.prod(matrix.shape) for matrix in matrices)
    counts = sum(code_counts(matrix.in_two_bits()) for matrix in matrices)
    layers: list[dict[str, Any]] = [{} for _ in weights.layers]
    for row in xray(weights):
        shape = list(config.matrix_shapes[row.matrix])
        numbers = row._asdict()
        del numbers["layer"], numbers["matrix"]
        layers[row.layer][row.matrix] = {"shape": shape, **numbers}
    return {
        "model": source,
        "config": config._asdict() | {"head_dim": config.head_dim},
        "parameters": ternary + sum(array.size for array in norms + tables),
        "ternary_parameters": ternary,
        "packing": matrices[0].packing,
        "tied_embeddings": tied,
        "embedding_dtype": str(weights.embedding.dtype),
        "vocabulary_of_tokenizer": tokenizer and tokenizer.backend.get_vocab_size(),
        "bytes": {
            "files": sum(file.stat().st_size for file in files),
            "ternary": sum(matrix.packed.nbytes for matrix in matrices),
            "embedding_and_head": sum(table.nbytes for table in tables),
        },
        "zero_share": float(counts[1] / counts.sum()),
        "entropy_bits": entropy_bits(counts),
        "notes": [tokenizer.note] if tokenizer and tokenizer.note else [],
        "layers": layers,
    }


def render(description: dict[str, Any]) -> "Group":
    """The description as tables for a terminal or a notebook (rich)."""
    from rich.console import Group
    from rich.table import Table

    packing = "packed in 2 bits" if description["packing"] == "2bit" else "in base 3, 1.6 bits each"
    size, config = description["bytes"], description["config"]
    facts = Table(box=None, show_header=False)
    for name, value in {
        "parameters": f"{description['parameters']:,}, of them ternary "
        f"{description['ternary_parameters']:,}",
        "files": f"{size['files']:,} bytes",
        "ternary weights": f"{size['ternary']:,} bytes, {packing} "
        f"(entropy {description['entropy_bits']:.3f} bits a weight)",
        "embedding": f"{size['embedding_and_head']:,} bytes, {description['embedding_dtype']}, "
        + ("tied to the head" if description["tied_embeddings"] else "with a head of its own"),
        "zeros": f"{description['zero_share']:.1%} of the ternary weights",
        **config,
    }.items():
        facts.add_row(str(name), str(value))

    names = list(description["layers"][0])
    zeros = Table("layer", *names, title="share of zeros", title_justify="left", box=None)
    for index, layer in enumerate(description["layers"]):
        zeros.add_row(str(index), *(f"{layer[name]['zero_share']:.1%}" for name in names))
    shapes = Table("matrix", "shape [out, in]", "scale in layer 0", box=None)
    for name in names:
        matrix = description["layers"][0][name]
        shapes.add_row(name, str(matrix["shape"]), f"{matrix['scale']:.4g}")
    notes = [f"note: {note}" for note in description["notes"]]
    return Group(facts, "", shapes, "", zeros, *notes)
