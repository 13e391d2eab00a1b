"""The published figures, and what our own arithmetic makes of them."""

import pytest

from bitnet_edu.book import paper
from bitnet_edu.weights import BITNET_2B4T

TABLE_1 = "Table 1: full-precision models of its size"


def test_every_figure_has_a_source_and_a_status():
    cells = paper.published()
    assert not cells.duplicated(["paper", "table", "row", "column"]).any()
    assert cells["url"].str.startswith("https://").all()
    assert set(cells["status"]) == {"printed", "read off figure", "second-hand copy"}


def test_every_table_can_be_shown():
    names = paper.tables()
    assert sum(paper.table(*name).ne("").to_numpy().sum() for name in names) == len(
        paper.published()
    )
    with pytest.raises(KeyError, match="tables"):
        paper.table("2B4T", "Table 99")


def test_shapes_give_the_weight_counts_of_the_models():
    assert (
        paper.linear_weights(BITNET_2B4T)
        == sum(rows * columns for rows, columns in BITNET_2B4T.matrix_shapes.values())
        * BITNET_2B4T.num_hidden_layers
    )


def test_arithmetic_reproduces_the_energy_row():
    rows = paper.recomputed_table_1()
    assert len(rows) == 6
    for _, row in rows.iterrows():
        assert round(row["energy computed (J)"], 3) == row["energy printed (J)"]


def test_arithmetic_reproduces_the_memory_row():
    rows = paper.recomputed_table_1()
    # the report prints one decimal; MiniCPM's 4.88 is printed as 4.8
    assert (rows["memory computed (GB)"] - rows["memory printed (GB)"]).abs().max() < 0.1


def test_attention_is_most_of_the_ternary_models_energy():
    energy = paper.matmul_energy(BITNET_2B4T)
    assert energy["attention"] > 2 * energy["linear"]


def test_printed_averages_disagree_with_their_own_columns():
    table = paper.table("2B4T", TABLE_1)
    scores = table.loc["ARC-Challenge (0-shot; acc_norm)":"MT-bench (0-shot; average)"].astype(
        float
    )
    difference = (scores.mean() - table.loc["Average (as printed)"].astype(float)).abs()
    assert difference["BitNet b1.58 2B"] < 0.01
    assert (difference.drop("BitNet b1.58 2B") > 0.2).all()
