import json

import numpy as np
import pytest

from bitnet_edu.book.ledger import Ledger, ledger_folder, read_ledger


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A checkout of the book, seen from its notebooks."""
    (tmp_path / "_toc.yml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def test_a_row_is_printed_and_kept(book, capsys):
    Ledger("07_x").check("codes", np.arange(4), np.arange(4) + 0.5, 1.0, "half a step")
    (row,) = read_ledger(ledger_folder() / "07_x.json")
    assert row == {
        "chapter": "07_x",
        "what": "codes",
        "elements": 4,
        "max_difference": 0.5,
        "bound": 1.0,
        "why": "half a step",
    }
    assert "codes" in capsys.readouterr().out
    assert ledger_folder() == book / "_build" / "ledger"


@pytest.mark.parametrize(
    ("theirs", "bound"),
    [([1.0, 2.5], 0.0), ([1.0, 2.5], 0.4), ([1.0, np.nan], 9.0), ([1.0, np.inf], 9.0)],
)
def test_a_difference_above_the_bound_fails_and_stays_visible(book, theirs, bound):
    with pytest.raises(AssertionError, match="codes"):
        Ledger("07_x").check("codes", [1.0, 2.0], theirs, bound)
    (row,) = read_ledger(ledger_folder() / "07_x.json")
    assert not row["max_difference"] <= row["bound"]


def test_equal_means_equal(book):
    with pytest.raises(AssertionError):
        Ledger("07_x").check("sums", np.int64([2**53]), np.int64([2**53 + 4]))


def test_unlike_shapes_are_refused(book):
    with pytest.raises(AssertionError, match="shapes"):
        Ledger("07_x").check("codes", np.zeros((2, 3)), np.zeros(3))


def test_a_new_run_drops_the_rows_of_the_last(book):
    Ledger("07_x").check("codes", [1], [1])
    Ledger("07_x")  # and then the chapter fails before its first check
    assert not (ledger_folder() / "07_x.json").exists()


def test_nothing_is_written_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Ledger("07_x").check("codes", [1], [1])
    assert ledger_folder() is None
    assert list(tmp_path.iterdir()) == []


def test_the_bound_may_be_a_numpy_number(book):
    Ledger("07_x").check("codes", [1], [1], np.float32(0.5))
    assert json.loads((ledger_folder() / "07_x.json").read_text())[0]["bound"] == 0.5
