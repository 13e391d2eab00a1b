"""What was published about BitNet, cell by cell with its source, and what we can check of it.

`data/published.csv` holds figures only. status says how each was read: "printed" in the paper or
the repository, "read off figure", or from a "second-hand copy" of the paper's table.
"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from bitnet_edu.weights import BITNET_2B4T, BitNetConfig

PUBLISHED = Path(__file__).parents[1] / "data" / "published.csv"

# Energy per operation at 7 nm in picojoules; 2B4T report, Table 4 (after Horowitz 2014, PokeBNN).
PJ_FP16_ADD, PJ_FP16_MUL, PJ_INT8_ADD = 0.16, 0.34, 0.007


def published() -> pd.DataFrame:
    """Every figure as a row: paper, table, row, column, value (as printed), unit, status, url."""
    return pd.read_csv(PUBLISHED, dtype=str, keep_default_na=False)


def tables() -> list[tuple[str, str]]:
    """(paper, table) of everything in `published`, in reading order."""
    return list(
        published()[["paper", "table"]].drop_duplicates().itertuples(index=False, name=None)
    )


def table(paper: str, name: str) -> pd.DataFrame:
    """One table as printed: rows and columns in the paper's order. KeyError if there is none.

    Cells that are plain numbers are floats, all others stay text; missing cells are empty.
    """
    cells = published().query("paper == @paper and table == @name")
    if cells.empty:
        raise KeyError(f"no table {name!r} of {paper!r}: see bitnet_edu.book.paper.tables()")
    frame = cells.pivot(index="row", columns="column", values="value")
    frame = frame.loc[cells["row"].unique(), cells["column"].unique()].fillna("")
    frame = frame.map(_number)
    frame.index.name = frame.columns.name = None
    return frame


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


class Shape(NamedTuple):
    """The shape of a dense model of the comparison, from its public config.json."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


BASELINES = {
    "LLaMA 3.2 1B": Shape(2048, 16, 8192, 32, 8, 64),
    "Gemma-3 1B": Shape(1152, 26, 6912, 4, 1, 256),
    "Qwen2.5 1.5B": Shape(1536, 28, 8960, 12, 2, 128),
    "SmolLM2 1.7B": Shape(2048, 24, 8192, 32, 32, 64),
    "MiniCPM 2B": Shape(2304, 40, 5760, 36, 36, 64),
}


def linear_weights(shape: Shape | BitNetConfig) -> int:
    """How many weights the q, k, v, o, gate, up and down projections of all layers have."""
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    attention = 2 * shape.hidden_size * (queries + keys)
    feed_forward = 3 * shape.hidden_size * shape.intermediate_size
    return shape.num_hidden_layers * (attention + feed_forward)


def matmul_energy(shape: Shape | BitNetConfig, tokens: int = 512) -> dict[str, float]:
    """Joules for the additions and multiplications of all matrix products, by the papers' model.

    {"linear": J, "attention": J} for one forward pass over `tokens` tokens. A dense layer spends an
    FP16 multiplication and addition per weight and token, a ternary one an INT8 addition; attention
    is FP16 in both. No memory traffic, LM head, norms or scales: an estimate of arithmetic only.
    Source: BitNet (arXiv 2310.11453), section 3.2, with the constants of 2504.12285, Table 4.
    """
    ternary = isinstance(shape, BitNetConfig)
    per_weight = PJ_INT8_ADD if ternary else PJ_FP16_ADD + PJ_FP16_MUL
    linear = linear_weights(shape) * tokens * per_weight
    width = shape.num_attention_heads * shape.head_dim
    products = 2 * shape.num_hidden_layers * tokens**2 * width
    attention = products * (PJ_FP16_ADD + PJ_FP16_MUL)
    return {"linear": linear * 1e-12, "attention": attention * 1e-12}


def memory_gigabytes(shape: Shape | BitNetConfig) -> float:
    """Non-embedding memory in GB (1e9 bytes) as Table 1 of the 2B4T report counts it.

    16 bits a weight for dense models, 1.58 for ternary ones (no file stores so few: chapter 4).
    """
    bits = 1.58 if isinstance(shape, BitNetConfig) else 16
    return linear_weights(shape) * bits / 8 / 1e9


def recomputed_table_1() -> pd.DataFrame:
    """Memory and energy of the 2B4T report's Table 1, printed beside our own arithmetic."""
    printed = table("2B4T", "Table 1: full-precision models of its size")
    shapes = BASELINES | {"BitNet b1.58 2B": BITNET_2B4T}
    return pd.DataFrame(
        {
            name: {
                "memory printed (GB)": printed.at["Memory (non-emb)", name],
                "memory computed (GB)": memory_gigabytes(shape),
                "energy printed (J)": printed.at["Energy (estimated)", name],
                "energy computed (J)": sum(matmul_energy(shape).values()),
            }
            for name, shape in shapes.items()
        }
    ).T


class Claim(NamedTuple):
    """One published row and what this project can say of it."""

    row: str
    verdict: str  # reproduced | partly | not attempted
    why: str


OURS = (
    Claim(
        "Memory (non-emb)",
        "partly",
        "16 bits a weight, and 1.58 for BitNet, give the printed GB of all models but MiniCPM 2B: "
        "4.88 by its shapes, 4.8 in print. Every file of BitNet spends 2 bits, a quarter more.",
    ),
    Claim(
        "Latency (CPU; TPOT)",
        "partly",
        "Our engine's speed on a model of the same shape is measured on your machine; the report's "
        "laptop and the other models are not.",
    ),
    Claim(
        "Energy (estimated)",
        "reproduced",
        "As arithmetic: the paper's energy per operation times the operations of a 512-token "
        "sequence gives every printed cell. No power meter was read, there or here.",
    ),
    Claim(
        "Training tokens (pre-training)",
        "not attempted",
        "Four trillion tokens are out of reach; the embedded model shows the method in the small.",
    ),
    Claim(
        "Benchmarks (ARC to MT-bench)",
        "not attempted",
        "They need the evaluation sets and the original weights. With both, our engine gives "
        "the same logits as transformers, so the same scores.",
    ),
    Claim(
        "Lossless inference",
        "reproduced",
        "Codes, int8 activations and integer sums equal the NumPy reference bit by bit; logits "
        "agree with transformers as the parity ledger shows.",
    ),
)


class Disagreement(NamedTuple):
    """Two published figures that do not go together, told plainly."""

    title: str
    text: str


def disagreements() -> tuple[Disagreement, ...]:
    """Where the papers contradict themselves or each other; figures are read from the tables."""
    main = table("2B4T", "Table 1: full-precision models of its size")
    scores = main.loc["ARC-Challenge (0-shot; acc_norm)":"MT-bench (0-shot; average)"]
    means, printed = scores.astype(float).mean(), main.loc["Average (as printed)"].astype(float)
    wrong = [name for name in means.index if abs(means[name] - printed[name]) > 0.1]
    energy = matmul_energy(BITNET_2B4T)
    decode = table("microsoft/BitNet", "i7-13800H, generate 128")
    report = 1000 / main.at["Latency (CPU; TPOT)", "BitNet b1.58 2B"]
    one_bit = table("2B4T", "Table 3: other 1-bit models")
    falls_behind = [
        row.split(" (")[0]
        for row in one_bit.index[1:-1]
        if one_bit.loc[row].astype(float).idxmax() != "BitNet b1.58 2B"
    ]
    m2 = table("1-bit AI Infra", "Figure 1: Apple M2 Ultra")
    i7 = table("1-bit AI Infra", "Figure 1: Intel i7-13700H")
    ours = "BitNet b1.58 2B"
    perplexity = table("b1.58", "Table 1: memory, latency, perplexity").at["BitNet b1.58 3B", "PPL"]
    return (
        Disagreement(
            "The averages of Table 1",
            f"BitNet's printed average ({printed[ours]:.2f}) is the mean of its 16 scores. The "
            f"printed averages of {len(wrong)} other models are not: for "
            + ", ".join(f"{name} {means[name]:.2f} against {printed[name]:.2f}" for name in wrong)
            + ". Each is lower in print than its own column.",
        ),
        Disagreement(
            "0.028 joules, for what?",
            "The report gives no unit of work. Its energy model gives "
            f"{sum(energy.values()):.4f} J for all matrix products of a 512-token sequence, so the "
            "cell is per sequence, not per token, and counts arithmetic only. "
            f"{energy['attention'] / sum(energy.values()):.0%} of it is FP16 attention.",
        ),
        Disagreement(
            "0.4 gigabytes",
            f"{linear_weights(BITNET_2B4T):,} weights at 1.58 bits are "
            f"{memory_gigabytes(BITNET_2B4T):.3f} GB. The published files store 2 bits: "
            f"{linear_weights(BITNET_2B4T) / 4e9:.3f} GB, and the 16-bit embedding adds "
            f"{BITNET_2B4T.vocab_size * BITNET_2B4T.hidden_size * 2 / 1e9:.3f} GB.",
        ),
        Disagreement(
            "Two speeds for one processor",
            f"On an Intel i7-13800H the report's {1000 / report:.0f} ms a token are {report:.1f} "
            "tokens/s (8 threads). The project's own chart of January 2026 shows, for the same "
            f"model and processor, {decode.at['original', '6']} before and "
            f"{decode.at['latest', '6']} tokens/s after its speed-up (6 threads).",
        ),
        Disagreement(
            "A 100-billion model at reading speed",
            "The claim of 5 to 7 tokens/s on one CPU holds for the Apple M2 Ultra "
            f"({m2.at['bitnet.cpp (ternary)', '100B']}); on the Intel i7-13700H of the same "
            f"figure it is {i7.at['bitnet.cpp (ternary)', '100B']}.",
        ),
        Disagreement(
            "Best of the 1-bit models, mostly",
            f"In Table 3 BitNet leads in all rows but {len(falls_behind)}: "
            f"{', '.join(falls_behind)}.",
        ),
        Disagreement(
            "One model, three perplexities",
            "BitNet b1.58 3B has perplexity "
            f"{perplexity} in its first paper and other values in later ones, measured on other "
            "text: perplexities of different papers cannot be compared.",
        ),
    )
